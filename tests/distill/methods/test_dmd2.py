"""DMD2: its gradients, the closed form on a Gaussian, and where it converges to."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from fastdistill.compress.surgery import cut
from fastdistill.data.closed_form import GaussianMixture
from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import LinearVariancePreserving
from fastdistill.distill.methods.discriminator import Heads, blocks_at
from fastdistill.distill.methods.dmd2 import DMD2, DMD2Options
from fastdistill.errors import UserError
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId
from tests.distill.methods.toys import (
    FLOW,
    SEED_OF_INDEX,
    AffineFlow,
    AffineGenerator,
    LabelFamily,
    Perceptron,
    ScoreOf,
    assert_moments,
    assert_same_gradient,
    batch_of,
    column,
    exact,
    loss_of,
    null,
    randn,
    rollout,
    sampled,
    train,
    unlabelled,
    unlabelled_draws,
)
from tests.tiny import mixing_transformer, tiny_flux_pipeline, tiny_inputs
from tests.toy import gaussian, generator, mixture


def opinionated(heads: int = 1) -> Heads:
    """Heads that do not start at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        discriminator = Heads(16, heads).double()
        for head in discriminator.heads:
            nn.init.normal_(head.out.weight)
    return discriminator


def flow_method(**options: Any) -> DMD2:
    """Two steps with shift 2 (1 and 2/3) against a guided velocity teacher."""
    return DMD2(
        DMD2Options(**({"true_cfg_scale": 3.0} | options)),
        student=Perceptron(seed=1), teacher=exact(mixture()), family=LabelFamily(), steps=2, shift=2.0,
        unconditional=null(),
        critic=Perceptron(seed=2), heads=opinionated() if options.get("gan_weight", 1) else None,
    )  # fmt: skip


def matching(x_0: Tensor, labels: Tensor, method: DMD2, rng: torch.Generator, **told: Tensor) -> Tensor:
    """Half the mean of `(x - sg(x - g))^2`, of which DMD2's code takes the gradient."""
    noise, t = randn(rng), 0.02 + 0.96 * torch.rand(8, generator=rng)
    x_t = ((1 - column(t)) * x_0 + column(t) * noise).detach()
    teacher = method.networks["teacher"]
    real = teacher(x_t, t) + 3 * (teacher(x_t, t, labels) - teacher(x_t, t))
    x_0_real, x_0_critic = x_t - column(t) * real, x_t - column(t) * method.networks["critic"](x_t, t, labels, **told)
    g = (x_0_critic - x_0_real) / (x_0 - x_0_real).abs().mean(dim=1, keepdim=True)
    return 0.5 * (x_0 - (x_0 - g).detach()).square().mean()


def logits(x_0: Tensor, labels: Tensor, method: DMD2, rng: torch.Generator, guidance: Tensor | None = None) -> Tensor:
    noise, t = randn(rng), torch.rand(8, generator=rng)
    critic, head = method.networks["critic"], method.networks["discriminator"].heads[0]
    features = critic.layers[0](critic.embed((1 - column(t)) * x_0 + column(t) * noise, t, labels, guidance))
    return head.out(silu(head.into(head.norm(features))))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("inputs", ["ode", "sde", "data"])
def test_the_gradient_of_the_student(index: int, inputs: str) -> None:
    """Matching, GAN and intra-segment guidance, at both times, on states of either way of sampling
    or on noised data."""
    method = flow_method(
        gan_weight=0.1,
        isg_weight=0.5,
        rollout="sde" if inputs == "sde" else "ode",
        backward_simulation=float(inputs != "data"),
    )
    batch, student, times = batch_of(), method.networks["student"], [1.0, float(method.times[1]), 0.0]
    labels = batch.conditioning.labels

    def formula(rng: torch.Generator) -> Tensor:
        x_t, t = rollout(method, batch, rng, index, sde=inputs == "sde", data=inputs == "data")
        velocity = student(x_t, t, labels)
        x_0 = x_t - column(t) * velocity
        loss = matching(x_0, labels, method, rng) + 0.1 * softplus(-logits(x_0, labels, method, rng)).mean()
        start, end = times[index], times[index + 1]
        middle = torch.full((8,), end) + 0.02 + (start - end - 0.04) * torch.rand(8, generator=rng)
        teacher = method.networks["teacher"]
        guided = teacher(x_t, t) + 3 * (teacher(x_t, t, labels) - teacher(x_t, t))
        x_middle = x_t + (column(middle) - start) * guided
        target = x_middle + (end - column(middle)) * student(x_middle, middle, labels)
        difference = x_t + (end - start) * velocity - target.detach()
        return loss + 0.5 * ((difference**2 + 1e-6).sqrt() - 1e-3).mean()

    assert_same_gradient(method, "student", batch, formula, seed=SEED_OF_INDEX[index])


@pytest.mark.parametrize("index", [0, 1])
def test_the_gradients_of_the_critic_and_of_the_heads(index: int) -> None:
    batch = batch_of()
    labels = batch.conditioning.labels

    def gan(method: DMD2, x_0: Tensor, rng: torch.Generator) -> Tensor:
        of_critic = logits(x_0, labels, method, rng)
        return softplus(of_critic).mean() + softplus(-logits(batch.latents, labels, method, rng)).mean()

    def generated(method: DMD2, rng: torch.Generator) -> Tensor:
        x_t, t = rollout(method, batch, rng, index)
        return (x_t - column(t) * method.networks["student"](x_t, t, labels)).detach()

    def of_critic(rng: torch.Generator) -> Tensor:
        x_0 = generated(method, rng)
        noise, t = randn(rng), torch.rand(8, generator=rng)
        velocity = method.networks["critic"]((1 - column(t)) * x_0 + column(t) * noise, t, labels)
        return (velocity - (noise - x_0)).square().mean() + 0.3 * gan(method, x_0, rng)

    method = flow_method(gan_critic_weight=0.3)
    assert_same_gradient(method, "critic", batch, of_critic, seed=SEED_OF_INDEX[index])
    method = flow_method()
    assert_same_gradient(
        method, "discriminator", batch, lambda rng: gan(method, generated(method, rng), rng), seed=SEED_OF_INDEX[index]
    )


@pytest.mark.parametrize("index", [0, 1])
def test_the_gradients_with_a_critic_that_knows_the_step(index: int) -> None:
    """It is given the time of the student's step as guidance, by matching, by its own loss, and by
    the heads."""
    batch = batch_of()
    labels = batch.conditioning.labels

    def told() -> DMD2:
        return DMD2(
            DMD2Options(true_cfg_scale=3.0, gan_weight=0.1, gan_critic_weight=0.3, critic_knows_step=True),
            student=Perceptron(seed=1), teacher=exact(mixture()), family=LabelFamily(), steps=2, shift=2.0,
            unconditional=null(),
            critic=Perceptron(seed=2, guidance=True), heads=opinionated(),
        )  # fmt: skip

    def of_student(rng: torch.Generator) -> Tensor:
        x_t, t = rollout(method, batch, rng, index)
        x_0 = x_t - column(t) * method.networks["student"](x_t, t, labels)
        return (
            matching(x_0, labels, method, rng, guidance=t) + 0.1 * softplus(-logits(x_0, labels, method, rng, t)).mean()
        )

    def of_critic(rng: torch.Generator) -> Tensor:
        x_t, step = rollout(method, batch, rng, index)
        x_0 = (x_t - column(step) * method.networks["student"](x_t, step, labels)).detach()
        noise, t = randn(rng), torch.rand(8, generator=rng)
        velocity = method.networks["critic"]((1 - column(t)) * x_0 + column(t) * noise, t, labels, guidance=step)
        judged = (
            softplus(logits(x_0, labels, method, rng, step)).mean()
            + softplus(-logits(batch.latents, labels, method, rng, step)).mean()
        )
        return (velocity - (noise - x_0)).square().mean() + 0.3 * judged

    for role, formula in (("student", of_student), ("critic", of_critic)):
        method = told()
        assert_same_gradient(method, role, batch, formula, seed=SEED_OF_INDEX[index])


def test_the_gradient_for_a_noise_predicting_teacher() -> None:
    """Variance preserving, a student of v: the difference of the noises, over the mean distance
    from the noise that was drawn."""
    process, batch = LinearVariancePreserving(), batch_of()
    method = DMD2(
        DMD2Options(gan_weight=0.0, normaliser="sample"),
        student=Perceptron(seed=1), teacher=exact(mixture(), process, Prediction.EPSILON),
        family=LabelFamily(), steps=1,
        process=process, teacher_prediction=Prediction.EPSILON, student_prediction=Prediction.V,
        critic=Perceptron(seed=2),
    )  # fmt: skip
    labels = batch.conditioning.labels

    def formula(rng: torch.Generator) -> Tensor:
        torch.randint(1, (1,), generator=rng), torch.rand(1, generator=rng)
        alpha, sigma = process.alpha(torch.ones(1).double()), process.sigma(torch.ones(1).double())
        x_1 = sigma * randn(rng)
        x_0 = alpha * x_1 - sigma * method.networks["student"](x_1, torch.ones(8), labels)
        noise, t = randn(rng), 0.02 + 0.96 * torch.rand(8, generator=rng)
        alpha, sigma = process.alpha(column(t)), process.sigma(column(t))
        x_t = (alpha * x_0 + sigma * noise).detach()
        real = method.networks["teacher"](x_t, t, labels)
        critic = sigma * x_t + alpha * method.networks["critic"](x_t, t, labels)
        g = ((real - critic) / (real - noise).abs().mean(dim=1, keepdim=True)).detach()
        return (x_0 * g).sum() / x_0.numel() + (0.5 * g**2 - x_0 * g).mean().detach()

    assert_same_gradient(method, "student", batch, formula)


TEACHER = GaussianMixture.gaussian(
    torch.tensor([1.3, 0.2]).double(), torch.diag(torch.tensor([0.7, 1.1]).double() ** 2)
)


@pytest.mark.parametrize(
    ("time", "of_mean", "of_scale"), [(0.1, -0.04178, 0.03164), (0.5, -1.14094, 0.62439), (0.9, -1.68978, 0.03940)]
)
def test_the_closed_form_on_a_gaussian(time: float, of_mean: float, of_scale: float) -> None:
    """For the teacher N(1.3, 0.7^2) and samples -0.4 + 1.6 z, the expected `x_0_critic - x_0_real`
    times `(1, z)`:

        (m - mu) t^2 / V_r            b (1 - t)^2 t^2 (b^2 - s^2) / (V_f V_r)            V = (1 - t)^2 (variance) + t^2

    The loss compares velocities, which are that over `t`, and takes the mean over two dimensions.
    """
    student = AffineGenerator(torch.tensor([-0.4, 0.2]).double(), torch.diag(torch.tensor([1.6, 1.1]).double()))
    method = DMD2(
        DMD2Options(gan_weight=0.0, normaliser="none", time_low=time, time_high=time + 1e-6),
        student=student, teacher=exact(TEACHER), family=LabelFamily(), steps=1, critic=ScoreOf(student),
    )  # fmt: skip
    loss_of(method, "student", unlabelled(1_000_000)(0, generator()), generator()).total.backward()
    assert 2 * time * float(student.mean.grad[0]) == pytest.approx(of_mean, abs=2e-3)
    assert 2 * time * float(student.matrix.grad[0, 0]) == pytest.approx(of_scale, abs=2e-3)
    # The second dimension has the teacher's moments already.
    assert float(student.mean.grad[1].abs() + student.matrix.grad[1, 1].abs()) < 2e-3


def start() -> AffineGenerator:
    return AffineGenerator(torch.tensor([-0.4, 0.8]).double(), torch.tensor([[1.6, 0.0], [0.3, 0.4]]).double())


def test_with_the_exact_critic_it_converges_to_the_teacher(tmp_path: Path) -> None:
    student, data = start(), gaussian()
    method = DMD2(
        DMD2Options(gan_weight=0.0, critic_updates=1),
        student=student,
        teacher=exact(data),
        family=LabelFamily(),
        steps=1,
        critic=ScoreOf(student),
    )
    method.trains = ("student",)
    train(method, unlabelled(256), tmp_path, steps=300, learning_rate=3e-2)
    torch.testing.assert_close(student.mean.detach(), data.mean(), atol=1e-4, rtol=0)
    torch.testing.assert_close((student.matrix @ student.matrix.T).detach(), data.covariance(), atol=1e-4, rtol=0)


def distilled(start: AffineFlow, folder: Path, *, steps: int, **options: Any) -> DMD2:
    student = copy.deepcopy(start)
    options = {"gan_weight": 0.0} | options
    method = DMD2(DMD2Options(**options), student=student, teacher=exact(gaussian()), family=LabelFamily(), steps=steps)
    batches = unlabelled_draws(gaussian(), 128)
    trainer = train(method, batches, folder, steps=1000, learning_rate=3e-3, betas=(0.0, 0.99), ema_decay=0.98)
    trainer.emas["student"].copy_to(student)
    return method


def x_0_of_each_step(student: nn.Module, steps: int, rollout: str = "ode") -> list[Tensor]:
    """Data that the student sees at the states that its own sampling visits."""
    options = DMD2Options(gan_weight=0.0, rollout=rollout)
    method = DMD2(options, student=student, teacher=exact(gaussian()), family=LabelFamily(), steps=steps)
    batch, found = unlabelled(20_000)(0, generator()), {}
    for seed in range(30):
        method.before_step(0, generator(seed))
        visit = method.rollout.visit(batch, generator())
        with torch.no_grad():
            found[visit.index] = method.student.predict(visit.x_t, visit.t, batch.conditioning, Prediction.X0)
    return [found[index] for index in range(steps)]


@pytest.mark.slow
def test_with_a_learned_critic_it_reaches_the_same_limit(flow_of_the_teacher: AffineFlow, tmp_path: Path) -> None:
    """Student and critic start as the teacher, whose one step gives the mean alone. Errors of the
    moments: 0.01."""
    method = distilled(flow_of_the_teacher, tmp_path, steps=1)
    assert_moments(sampled(method.networks["student"], method.times), gaussian(), 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ["ode", "sde"])
def test_in_two_steps_what_the_critic_sees_is_the_teacher(
    flow_of_the_teacher: AffineFlow, tmp_path: Path, rollout: str
) -> None:
    """The moments of `x_0` over both steps together are the teacher's within 0.01.

    The critic is not told the step. This one, affine, sees no more than two moments, so that those
    of each step alone may differ from the teacher's, by 0.1 here. One that sees the whole
    distribution tells the mixture of two Gaussians from one, but takes its time.
    """
    student = distilled(flow_of_the_teacher, tmp_path, steps=2, rollout=rollout).networks["student"]
    assert_moments(torch.cat(x_0_of_each_step(student, 2, rollout)), gaussian(), 0.03)


class PerStep(nn.Module):
    """A critic that takes the time of the student's step as guidance: a network of its own for 1,
    and for all others."""

    def __init__(self, start: AffineFlow) -> None:
        super().__init__()
        self.config = SimpleNamespace(guidance_embeds=True)
        self.first, self.others = copy.deepcopy(start), copy.deepcopy(start)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance: Tensor) -> Tensor:
        assert bool((guidance == guidance[0]).all())
        return (self.first if guidance[0] == 1 else self.others)(x_t, t, labels)


@pytest.mark.slow
def test_with_a_critic_that_knows_the_step_each_step_is_the_teacher(
    flow_of_the_teacher: AffineFlow, tmp_path: Path
) -> None:
    """The moments of `x_0` of either step, which are 0.1 off where the critic sees both steps as
    one distribution."""
    student = copy.deepcopy(flow_of_the_teacher)
    options = DMD2Options(gan_weight=0.0, critic_knows_step=True)
    setup = {"student": student, "teacher": exact(gaussian()), "family": LabelFamily(), "steps": 2}
    method = DMD2(options, **setup, critic=PerStep(flow_of_the_teacher))
    trainer = train(
        method,
        unlabelled_draws(gaussian(), 128),
        tmp_path,
        steps=1000,
        learning_rate=3e-3,
        betas=(0.0, 0.99),
        ema_decay=0.98,
    )
    trainer.emas["student"].copy_to(student)
    for x_0 in x_0_of_each_step(student, 2):
        assert_moments(x_0, gaussian(), 0.03)


def test_a_critic_that_knows_the_step_of_a_transformer() -> None:
    """It has an embedder of its own, and begins with the student's outputs; the student stays as it
    was."""
    pipeline = tiny_flux_pipeline()
    transformer = pipeline.transformer
    setup = {
        "student": copy.deepcopy(transformer),
        "teacher": transformer,
        "family": family_of(transformer),
        "steps": 2,
    }
    method = DMD2(DMD2Options(gan_weight=0.0, critic_knows_step=True), **setup)
    assert [method.networks[role].config.guidance_embeds for role in ("student", "critic")] == [False, True]
    with pytest.raises(UserError, match="--no-critic-knows-step"):
        DMD2Options(critic_knows_step=True, guidance_range=(1.0, 2.0))


@pytest.mark.slow
def test_a_student_of_noised_data_is_not_ready_for_its_own_states(
    flow_of_the_teacher: AffineFlow, tmp_path: Path
) -> None:
    """The variance over four steps, relative to the teacher's: 3 % too large with backward
    simulation, 72 % without."""
    spreads = {}
    for probability in (1.0, 0.0):
        student = distilled(
            flow_of_the_teacher, tmp_path / str(probability), steps=4, backward_simulation=probability
        ).networks["student"]
        x_0 = torch.cat(x_0_of_each_step(student, 4))
        spreads[probability] = float(x_0.T.cov().trace() / gaussian().covariance().trace())
    assert spreads[1.0] == pytest.approx(1, abs=0.06)
    assert spreads[0.0] > 1.4


def test_turns_follow_the_two_time_scales() -> None:
    method = flow_method(critic_updates=3)
    assert [tuple(method.turns(step)) for step in range(4)] == [
        ("student", "critic", "discriminator"),
        ("critic", "discriminator"),
        ("critic", "discriminator"),
        ("student", "critic", "discriminator"),
    ]
    assert tuple(flow_method(gan_weight=0.0).turns(1)) == ("critic",)


def test_all_losses_of_a_step_train_at_one_time_if_they_are_told_before() -> None:
    """As the parts of a batch and processes have to, whose generators differ."""
    method, batch = flow_method(), batch_of()
    assert len({method.rollout.visit(batch, generator(seed)).index for seed in range(10)}) == 2
    for step in range(4):
        method.before_step(step, generator(step))
        indices = {method.rollout.visit(batch, generator(seed)).index for seed in range(10)}
        assert indices == {int(torch.randint(2, (1,), generator=generator(step)))}


def test_critic_and_heads_judge_the_same_samples_of_a_step() -> None:
    method, batch, rng = flow_method(), batch_of(), generator()
    method.before_step(0, generator())
    (visit, x_0), (again, same) = (method.rollout.sample_to_judge(batch, rng) for _ in range(2))
    assert again is visit
    assert same is x_0
    assert method.rollout.sample_to_judge(batch_of(seed=1), rng)[1] is not x_0, "another part of the batch"
    method.before_step(1, generator(1))
    assert method.rollout.sample_to_judge(batch, rng)[1] is not x_0


def test_implicit_distribution_alignment_moves_the_critic_after_the_student() -> None:
    method = flow_method(ida_decay=0.9, critic_updates=2)
    critic, student = (dict(method.networks[role].named_parameters()) for role in ("critic", "student"))
    expected = {name: 0.9 * critic[name].detach() + 0.1 * student[name].detach() for name in critic}
    method.after_step(0)
    after = {name: parameter.detach().clone() for name, parameter in critic.items()}
    for name in critic:
        torch.testing.assert_close(after[name], expected[name])
    method.after_step(1)
    assert all(torch.equal(after[name], critic[name]) for name in critic)


def test_it_trains_flux_with_all_that_it_has() -> None:
    """A smaller student under guidance of the full teacher: every role's loss reaches that role,
    and no other."""
    teacher = mixing_transformer().requires_grad_(False)
    student = cut(teacher, [BlockId(stack="single_transformer_blocks", index=1)]).requires_grad_(True)
    x, _, conditioning = tiny_inputs(teacher, batch=2)
    _, _, empty = tiny_inputs(teacher, batch=1, seed=5)
    method = DMD2(
        DMD2Options(true_cfg_scale=3.0, isg_weight=1.0, ida_decay=0.97, gan_depths=(0.5, 1.0)),
        student=student, teacher=teacher, family=family_of(teacher), steps=2, unconditional=empty,
    )  # fmt: skip
    for role in method.turns(0):
        loss_of(method, role, LatentBatch(latents=x, conditioning=conditioning), generator()).total.backward()
        for other, network in method.networks.items():
            assert (other == role) == any(parameter.grad is not None for parameter in network.parameters())
            network.zero_grad()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_backward_simulation_is_how_the_pipeline_samples(shift: float) -> None:
    """Every state that `FluxPipeline` passes through in four steps, from the same noise, and `x_0`
    at the last its result."""
    pipeline = tiny_flux_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    family, student = family_of(pipeline.transformer), pipeline.transformer.requires_grad_(False)
    x, _, conditioning = tiny_inputs(student, batch=2)
    method = DMD2(DMD2Options(), student=student, teacher=student, family=family, steps=4, shift=shift)
    noise = torch.randn(x.shape, generator=generator(6))
    states, _ = family.trajectory(pipeline, noise, conditioning, None, steps=4, true_cfg_scale=1.0, guidance_scale=1.0)
    batch, seen = LatentBatch(latents=x, conditioning=conditioning), set()
    for seed in range(12):
        method.before_step(0, generator(seed))
        visit = method.rollout.visit(batch, generator(6))
        seen.add(visit.index)
        torch.testing.assert_close(visit.x_t, states[visit.index], atol=1e-5, rtol=1e-5)
        if visit.index == 3:
            x_0 = method.student.predict(visit.x_t, visit.t, conditioning, Prediction.X0)
            torch.testing.assert_close(x_0, states[-1], atol=1e-5, rtol=1e-5)
    assert seen == {0, 1, 2, 3}


def test_blocks_are_chosen_by_relative_depth() -> None:
    transformer = mixing_transformer()
    chosen = blocks_at(transformer, family_of(transformer), (0.0, 0.5, 1.0))
    assert [(block.stack.split("_")[0], block.index) for block in chosen] == [
        ("transformer", 0),
        ("single", 0),
        ("single", 2),
    ]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"ida_decay": 0.97}, {"critic": Perceptron(width=8)}, "two equal networks"),
        ({}, {"student_prediction": Prediction.EPSILON}, "predict the velocity"),
        ({"isg_weight": 1.0}, {"teacher_prediction": Prediction.EPSILON}, "the teacher predicts epsilon"),
        ({}, {"critic": Perceptron(guidance=True)}, "takes guidance as the student does"),
    ],
)
def test_impossible_combinations_are_refused(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    networks = {
        "student": Perceptron(),
        "teacher": exact(mixture()),
        "family": LabelFamily(),
        "steps": 4,
        "process": FLOW,
    }
    with pytest.raises(UserError, match=message):
        DMD2(DMD2Options(gan_weight=0.0, **options), **(networks | changes))


@pytest.mark.parametrize(
    "options",
    [
        {"critic_updates": 0},
        {"backward_simulation": 1.5},
        {"ida_decay": 2.0},
        {"gan_depths": (2.0,)},
        {"time_low": 0.99},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options)).replace("_", "-")):
        DMD2Options(**options)
