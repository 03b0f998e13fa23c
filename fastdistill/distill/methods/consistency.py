"""Consistency distillation (CD; Song et al. 2023, arXiv 2303.01469) and latent consistency models
(LCM; Luo et al. 2023, 2310.04378)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction, convert
from fastdistill.diffusion.process import expand_time, noise_like
from fastdistill.diffusion.timesteps import few_step_times
from fastdistill.distill.methods.denoiser import Denoiser
from fastdistill.distill.methods.distillation import Distillation, Setup, follow, without_prefix
from fastdistill.distill.methods.losses import pseudo_huber
from fastdistill.distill.options import MethodOptions
from fastdistill.errors import UserError
from fastdistill.run.options import at_least, positive
from fastdistill.train.method import Loss


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions(MethodOptions):
    """Map every point of a trajectory of the teacher to its end. The result is sampled with
    stochastic_sampling."""

    grid_steps: int = 48
    """Steps into which the trajectory is cut; a multiple of the steps to sample in."""
    skip: int = 1
    """Steps of that grid that one step of the teacher spans."""
    solver: Literal["ddim", "heun"] = "ddim"
    """The teacher's step: one call (LCM), or two and of second order (consistency distillation)."""
    loss: Literal["pseudo_huber", "mse"] = "pseudo_huber"
    huber_c: float = 1e-3
    """Below this difference the pseudo-Huber loss is quadratic, above it linear."""
    target_decay: float = 0.95
    """Decay of the moving average that is the target network; 0: the target is the student itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "grid_steps", "skip")
        if not 0 <= self.target_decay < 1:
            raise UserError(f"--target-decay is at least 0 and less than 1, got {self.target_decay:g}")
        positive(self, "huber_c")

    def idle(self) -> Mapping[str, Sequence[str]]:
        return {"with --loss mse": ("huber_c",)} if self.loss == "mse" else {}

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        if self.grid_steps % steps:
            raise UserError(
                f"the times of {steps} steps are not among those of {self.grid_steps}: "
                "--grid-steps must be a multiple of the steps, such as "
                f"{steps * max(1, round(self.grid_steps / steps))}"
            )


class ConsistencyDistillation(Distillation):
    """`L = E d(f(x_t, t), f_target(x_s, s))`: neighbours on a trajectory have one end (CD, equation
    7; LCM, equation 15).

    `t = grid[n]` for a random `n`, and `s = grid[n + skip]`, closer to the data, where one step of
    the guided teacher leads from `x_t`. `d` is the pseudo-Huber loss or the squared error,
    `f_target` a moving average of the student (the role `target`).

    `f` is the network's `x_0`, taken to `t = 0` as a sampler's last step does:

        f(x, t) = c_skip x + c_out x_0        c_skip = sigma(0) / sigma(t)        c_out = alpha(0) - c_skip alpha(t)

    The boundary condition `f(x, 0) = x` holds exactly: there, the target is `x_s` itself. On
    rectified flow `c_skip` is 0, and `f` is `x - t v`, which is what samplers see in the student;
    LCM's scalings would have to be applied by the sampler, too.

    Several steps are taken by stochastic sampling: to `f`, and back to the next time with new noise
    (CD, algorithm 1).
    """

    Options = ConsistencyOptions
    options: ConsistencyOptions
    stochastic_sampling = True

    def __init__(self, options: ConsistencyOptions, **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        self.grid = torch.cat([few_step_times(options.grid_steps, self.shift), torch.zeros(1)])
        self.teacher.check_determined(self.grid[:-1])
        self.target = self.student
        if options.target_decay:
            self.target = self.student.copy("target")
            self.networks["target"] = self.target.network

    def after_step(self, step: int) -> None:
        if "target" in self.networks:
            follow(self.target.network, self.student.network, self.options.target_decay)

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.target.network.state_dict(prefix="target.") if "target" in self.networks else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.target.network.load_state_dict(without_prefix(state, "target."))

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_0, conditioning = batch.latents, batch.conditioning
        noise = noise_like(x_0, rng)
        n = torch.randint(self.options.grid_steps, (len(x_0),), generator=rng, device=rng.device).cpu()
        t, s = (
            self.grid[index].to(x_0.device) for index in (n, (n + self.options.skip).clamp(max=self.options.grid_steps))
        )
        scale = self.teacher.draw_scale(x_0, rng)
        x_t = self.process.add_noise(x_0, noise, t)
        with torch.no_grad():
            x_s, last = self._teacher_step(x_t, t, s, conditioning, scale), s == 0
            # A network need not be defined at t = 0, and its value there is not used.
            end = self._end(self.target, x_s, torch.where(last, t, s), conditioning, scale)
            target = _where(last, x_s, end)
        found = self._end(self.student, x_t, t, conditioning, scale)
        if self.options.loss == "mse":
            return Loss(total=(found - target).square().mean())
        return Loss(total=pseudo_huber(found, target, self.options.huber_c))

    def _end(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Any, scale: Tensor | None) -> Tensor:
        """`f(x_t, t)` by the network of `denoiser`."""
        x_0 = denoiser.predict(x_t, t, conditioning, Prediction.X0, scale)
        return self.process.ddim_step(x_t, x_0, t, torch.zeros_like(t))

    def _teacher_step(self, x_t: Tensor, t: Tensor, s: Tensor, conditioning: Any, scale: Tensor | None) -> Tensor:
        x_0 = self.teacher.guided(x_t, t, conditioning, Prediction.X0, scale)
        x_s = self.process.ddim_step(x_t, x_0, t, s)
        if self.options.solver == "ddim":
            return x_s
        # Heun's second call, but not at t = 0, where a velocity may be infinite (Karras et al.
        # 2022, algorithm 1).
        last = s == 0
        velocity = convert(x_0, x_t, t, self.process, Prediction.X0, Prediction.VELOCITY)
        step = (expand_time(s, x_t) - expand_time(t, x_t)).to(x_t.dtype)
        euler, s = x_t + step * velocity, torch.where(last, t, s)
        corrected = (
            x_t + step * (velocity + self.teacher.guided(euler, s, conditioning, Prediction.VELOCITY, scale)) / 2
        )
        return _where(last, x_s, corrected)


def _where(condition: Tensor, chosen: Tensor, otherwise: Tensor) -> Tensor:
    """`torch.where` by sample: `condition` (B,), the others (B, ...)."""
    return torch.where(condition.view(-1, *[1] * (chosen.ndim - 1)), chosen, otherwise)
