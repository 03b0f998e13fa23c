"""Toy networks that take labels and a guidance scale, their family, and what the tests of methods
do again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from fastdistill.data.closed_form import ExactTeacher, GaussianMixture
from fastdistill.data.latents import LatentBatch
from fastdistill.data.pairs import PairBatch, PairPool
from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import Process, RectifiedFlow
from fastdistill.diffusion.schedulers import run
from fastdistill.distill.methods.dmd2 import DMD2
from fastdistill.distill.methods.tdm import TDM
from fastdistill.models.families.family import Stack, one_stream
from fastdistill.train.method import Loss, Method, give_turn
from fastdistill.train.trainer import TrainConfig, Trainer
from tests.toy import generator, mixture, quasi_random_noise

FLOW = RectifiedFlow()
# Seeds whose first draw is the student's first and its second time.
SEED_OF_INDEX = {0: 4, 1: 1}


@dataclass(frozen=True)
class Labels:
    """The conditioning of toy networks: labels (B,), and the guidance scale (B,) of those that take
    one."""

    labels: Tensor | None
    guidance: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Labels:
        return Labels(None if self.labels is None else self.labels[rows])

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)


class LabelFamily:
    """Networks that are called with `(x_t, t, labels)`, and the guidance scale if they take it.
    Their blocks are `layers`."""

    stacks = (Stack(attribute="layers", config_field="", short="layers", pass_through=one_stream),)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Labels) -> Tensor:
        extra = {} if conditioning.guidance is None else {"guidance": conditioning.guidance}
        return network(x_t, t, conditioning.labels, **extra)

    def stack(self, attribute: str) -> Stack:
        return self.stacks[0]

    def streams(self, block_output: Tensor) -> Mapping[str, Tensor]:
        return {"image": block_output[:, None]}


def of_time(t: Tensor) -> Tensor:
    """Features (B, 8) of `t` (B,) that tell times apart where signal and noise are equally strong,
    and where one of them is weak."""
    angle = torch.atan2(t, 1 - t)[:, None] * 2 ** torch.arange(4)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Perceptron(nn.Module):
    """Perceptron of `x_t`, Fourier features of `t`, a label, and the guidance scale; float64."""

    def __init__(self, *, labels: int = 3, width: int = 16, guidance: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(guidance_embeds=guidance)
        self.labels = labels
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.into = nn.Linear(2 + 8 + labels + 1 + guidance, width)
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
            self.out = nn.Linear(width, 2)
        self.double()

    def embed(self, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance: Tensor | None) -> Tensor:
        """Input of the blocks (B, width)."""
        labels = torch.full_like(t, self.labels, dtype=torch.long) if labels is None else labels
        parts = [x_t, of_time(t).to(x_t), nn.functional.one_hot(labels, self.labels + 1).to(x_t)]
        if self.config.guidance_embeds:
            assert guidance is not None
            parts.append(guidance[:, None].to(x_t) / 8)
        return nn.functional.silu(self.into(torch.cat(parts, dim=1)))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        hidden = self.embed(x_t, t, labels, guidance)
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(hidden))
        return self.out(hidden)


class AffineFlow(nn.Module):
    """A network whose output is affine in `x_t`, as every exact one is on a Gaussian: `A(t) x_t +
    b(t)`, both perceptrons of `t`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6)
            )
        self.double()

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        matrix, offset = self.layers(of_time(t).to(x_t)).split([4, 2], dim=1)
        return (matrix.view(-1, 2, 2) @ x_t[..., None])[..., 0] + offset


class AffineGenerator(nn.Module):
    """The velocity by which one step from `t = 1` on rectified flow gives `mean + matrix z`, a
    Gaussian of known moments."""

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.mean, self.matrix = nn.Parameter(mean.clone()), nn.Parameter(matrix.clone())

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return x_t - (self.mean + x_t @ self.matrix.T)


class ScoreOf(nn.Module):
    """The exact velocity of what an `AffineGenerator` generates now: a critic without error or lag."""

    def __init__(self, generator: AffineGenerator) -> None:
        super().__init__()
        # In a list, so that the generator's parameters are not this network's.
        self.generators = [generator]

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        mean, matrix = self.generators[0].mean.detach(), self.generators[0].matrix.detach()
        return GaussianMixture.gaussian(mean, matrix @ matrix.T).predict(x_t, t, FLOW, Prediction.VELOCITY)


def exact(data: GaussianMixture, process: Process = FLOW, prediction: Prediction = Prediction.VELOCITY) -> ExactTeacher:
    return ExactTeacher(data, process, prediction)


def null(labels: int = 3) -> Labels:
    """The conditioning without a label, of one sample."""
    return Labels(torch.tensor([labels]))


def two_classes() -> GaussianMixture:
    """Two broad Gaussians, each with its label: a guided field that a small network learns in
    seconds."""
    means = torch.tensor([[-0.8, 0.3], [0.7, -0.5]], dtype=torch.float64)
    covariances = torch.tensor([[[0.5, 0.1], [0.1, 0.3]], [[0.3, -0.1], [-0.1, 0.4]]], dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.4, 0.6], dtype=torch.float64), means, covariances)


def batch_of(data: GaussianMixture | None = None, size: int = 8, *, seed: int = 0) -> LatentBatch:
    """Labelled draws of `data`, by default of the mixture, in float64."""
    x_0, labels = (mixture() if data is None else data).draw(size, generator(seed))
    return LatentBatch(latents=x_0, conditioning=Labels(labels))


def pairs_of(size: int = 16) -> PairBatch:
    """Labelled draws of the mixture with noise that has nothing to do with them."""
    batch = batch_of(size=size)
    noise = torch.randn(size, 2, generator=generator(9)).double()
    return PairBatch(latents=batch.latents, conditioning=batch.conditioning, noise=noise)


def batches_of(data: GaussianMixture, size: int) -> Callable[[int, torch.Generator], LatentBatch]:
    def batch(step: int, rng: torch.Generator) -> LatentBatch:
        x_0, labels = data.draw(size, rng)
        return LatentBatch(latents=x_0, conditioning=Labels(labels))

    return batch


def unlabelled(size: int) -> Callable[[int, torch.Generator], LatentBatch]:
    """Batches for methods that need no data."""
    return lambda step, rng: LatentBatch(latents=torch.zeros(size, 2, dtype=torch.float64), conditioning=Labels(None))


def unlabelled_draws(data: GaussianMixture, size: int) -> Callable[[int, torch.Generator], LatentBatch]:
    return lambda step, rng: LatentBatch(latents=data.draw(size, rng)[0], conditioning=Labels(None))


def pair_batches(pool: PairPool, size: int) -> Callable[[int, torch.Generator], PairBatch]:
    """Batches of `pool` in float64."""

    def batch(step: int, rng: torch.Generator) -> PairBatch:
        pairs = pool.batch(size, rng)
        return replace(pairs, noise=pairs.noise.double(), latents=pairs.latents.double())

    return batch


def sampled(student: nn.Module, times: Tensor, count: int = 20_000, *, stochastic: bool = False) -> Tensor:
    """Samples of a velocity network by diffusers' `FlowMatchEulerDiscreteScheduler` at `times`."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=times.tolist())
    predictor = Predictor(
        function=lambda x_t, t: student(x_t.double(), t), process=FLOW, prediction=Prediction.VELOCITY
    )
    return run(predictor, scheduler, quasi_random_noise(count), generator())


def assert_moments(samples: Tensor, data: GaussianMixture, tolerance: float) -> None:
    """Mean and covariance of `samples` (N, D) are those of `data`, to an absolute `tolerance` per
    entry."""
    torch.testing.assert_close(samples.double().mean(0), data.mean(), atol=tolerance, rtol=0)
    torch.testing.assert_close(samples.double().T.cov(), data.covariance(), atol=tolerance, rtol=0)


def gradients(loss: Tensor, network: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


_TRAINABLE: WeakKeyDictionary[Any, dict[str, list[nn.Parameter]]] = WeakKeyDictionary()


def loss_of(method: Method, role: str, batch: Any, rng: torch.Generator) -> Loss:
    """Loss of `role` in its turn, as the trainer calls it: gradients are left to what was trainable
    at the first call."""
    if method not in _TRAINABLE:
        _TRAINABLE[method] = {
            name: [p for p in method.networks[name].parameters() if p.requires_grad] for name in method.trains
        }
    give_turn(role, _TRAINABLE[method])
    return method.loss(role, batch, rng)


def assert_same_gradient(
    method: Method, role: str, batch: Any, formula: Callable[[torch.Generator], Tensor], seed: int = 1
) -> None:
    """`method`'s loss of `role` and its gradients are those of `formula`, up to float64's rounding,
    and no other role has any."""
    loss = loss_of(method, role, batch, generator(seed)).total
    loss.backward()
    found = {name: p.grad for name, p in method.networks[role].named_parameters()}
    for other, network in method.networks.items():
        if other != role:
            assert all(p.grad is None for p in network.parameters()), f"the loss of {role} touches {other}"
    method.networks[role].requires_grad_(True)
    expected = formula(generator(seed))
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
    for name, gradient in gradients(expected, method.networks[role]).items():
        assert gradient is not None, name
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert float(gradient.abs().max()) > 0, name


def train(method: Method, batches: Any, folder: Path, *, steps: int, learning_rate: float, **options: Any) -> Trainer:
    config = TrainConfig(
        **({"steps": steps, "learning_rate": learning_rate, "warmup_steps": 10, "clip_norm": 1e9} | options)
    )
    trainer = Trainer(method, batches, config, folder)
    trainer.fit()
    return trainer


def column(t: Tensor) -> Tensor:
    return t[:, None].double()


def randn(rng: torch.Generator, count: int = 8) -> Tensor:
    return torch.randn(count, 2, generator=rng).double()


def rollout(
    method: DMD2 | TDM, batch: Any, rng: torch.Generator, index: int, *, sde: bool = False, data: bool = False
) -> tuple[Tensor, Tensor]:
    """`x_t` and `t` by hand."""
    student, labels = method.networks["student"], batch.conditioning.labels
    assert int(torch.randint(2, (1,), generator=rng)) == index
    torch.rand(1, generator=rng)
    noise, times = randn(rng), method.times.double()
    if data:
        return (1 - times[index]) * batch.latents + times[index] * noise, times[index].float().expand(8)
    x = noise
    if index == 1:
        velocity = student(noise, torch.ones(8), labels).detach()
        x = (1 - times[1]) * (noise - velocity) + times[1] * randn(rng) if sde else noise + (times[1] - 1) * velocity
    return x, times[index].float().expand(8)
