"""Consistency distillation (CD; Song et al. 2023, arXiv 2303.01469) and latent consistency models (LCM; Luo et al. 2023, 2310.04378)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction, convert
from fastdistill.diffusion.process import expand_time, noise_like
from fastdistill.diffusion.timesteps import few_step_times
from fastdistill.distill.methods.distillation import Distillation, Setup, follow, without_prefix
from fastdistill.distill.methods.losses import pseudo_huber
from fastdistill.distill.options import ConsistencyOptions
from fastdistill.train.method import Loss


class ConsistencyDistillation(Distillation):
    """``L = E d(f(x_t, t), f_target(x_s, s))``: neighbours on a trajectory have one end (CD, equation 7; LCM, equation 15).

    ``t = grid[n]`` for a random ``n``, and ``s = grid[n + skip]``, closer to the data, where one step of the guided teacher leads from
    ``x_t``. ``d`` is the pseudo-Huber loss or the squared error, ``f_target`` a moving average of the student (the role ``target``).

    ``f`` is the network's ``x_0``, taken to ``t = 0`` as a sampler's last step does::

        f(x, t) = c_skip x + c_out x_0        c_skip = sigma(0) / sigma(t)        c_out = alpha(0) - c_skip alpha(t)

    The boundary condition ``f(x, 0) = x`` holds exactly: there, the target is ``x_s`` itself. On rectified flow ``c_skip`` is 0, and
    ``f`` is ``x - t v``, which is what samplers see in the student; LCM's scalings would have to be applied by the sampler, too.

    Several steps are taken by stochastic sampling: to ``f``, and back to the next time with new noise (CD, algorithm 1).
    """

    stochastic_sampling = True

    def __init__(self, options: ConsistencyOptions = ConsistencyOptions(), **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        self.options = options
        self.grid = torch.cat([few_step_times(options.grid_steps, self.shift), torch.zeros(1)])
        self.check_determined("teacher", self.grid[:-1])
        if options.target_decay:
            self.networks["target"] = copy.deepcopy(self.networks["student"]).requires_grad_(False)
            self.predictions["target"] = self.predictions["student"]

    def after_step(self, step: int) -> None:
        if "target" in self.networks:
            follow(self.networks["target"], self.networks["student"], self.options.target_decay)

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.networks["target"].state_dict(prefix="target.") if "target" in self.networks else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.networks["target"].load_state_dict(without_prefix(state, "target."))

    def role_loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_0, conditioning = batch.latents, batch.conditioning
        noise = noise_like(x_0, rng)
        n = torch.randint(self.options.grid_steps, (len(x_0),), generator=rng, device=rng.device).cpu()
        t, s = (self.grid[index].to(x_0.device) for index in (n, (n + self.options.skip).clamp(max=self.options.grid_steps)))
        scale = self.draw_scale(x_0, rng)
        x_t = self.process.add_noise(x_0, noise, t)
        with torch.no_grad():
            x_s, last = self._teacher_step(x_t, t, s, conditioning, scale), s == 0
            # A network need not be defined at t = 0, and its value there is not used.
            end = self._end("target" if "target" in self.networks else "student", x_s, torch.where(last, t, s), conditioning, scale)
            target = _where(last, x_s, end)
        found = self._end("student", x_t, t, conditioning, scale)
        if self.options.loss == "mse":
            return Loss(total=(found - target).square().mean())
        return Loss(total=pseudo_huber(found, target, self.options.huber_c))

    def _end(self, role: str, x_t: Tensor, t: Tensor, conditioning: Any, scale: Tensor | None) -> Tensor:
        """``f(x_t, t)`` by the network of ``role``."""
        x_0 = self.predict(role, x_t, t, conditioning, Prediction.X0, scale)
        return self.process.ddim_step(x_t, x_0, t, torch.zeros_like(t))

    def _teacher_step(self, x_t: Tensor, t: Tensor, s: Tensor, conditioning: Any, scale: Tensor | None) -> Tensor:
        x_0 = self.teach(x_t, t, conditioning, Prediction.X0, scale)
        x_s = self.process.ddim_step(x_t, x_0, t, s)
        if self.options.solver == "ddim":
            return x_s
        # Heun's second call, but not at t = 0, where a velocity may be infinite (Karras et al. 2022, algorithm 1).
        last = s == 0
        velocity = convert(x_0, x_t, t, self.process, Prediction.X0, Prediction.VELOCITY)
        step = (expand_time(s, x_t) - expand_time(t, x_t)).to(x_t.dtype)
        euler, s = x_t + step * velocity, torch.where(last, t, s)
        corrected = x_t + step * (velocity + self.teach(euler, s, conditioning, Prediction.VELOCITY, scale)) / 2
        return _where(last, x_s, corrected)


def _where(condition: Tensor, chosen: Tensor, otherwise: Tensor) -> Tensor:
    """By sample: ``condition`` (B,), the others (B, ...)."""
    return torch.where(condition.view(-1, *[1] * (chosen.ndim - 1)), chosen, otherwise)
