"""Networks as methods call them: with the meaning of their output, and the teacher under its
guidance."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.diffusion.guidance import guide
from fastdistill.diffusion.prediction import Prediction, convert
from fastdistill.diffusion.process import Process
from fastdistill.errors import UserError
from fastdistill.models.families.family import Predicts
from fastdistill.models.guidance_embedder import embeds_guidance, with_scale


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoiser:
    """Network of one role, and what its output means."""

    role: str
    """Name among the networks of the method."""
    network: nn.Module
    prediction: Prediction
    """Meaning of the network's output."""
    family: Predicts
    """Calls the network."""
    process: Process
    guidance_scale: float
    """Embedded guidance of a network that takes it, where a call gives none."""

    def predict(
        self, x_t: Tensor, t: Tensor, conditioning: Any, prediction: Prediction, scale: Tensor | None = None
    ) -> Tensor:
        """Output at `x_t` (B, ...) and `t` (B,), converted to `prediction`; `scale` (B,) is the
        embedded guidance."""
        conditioning = self.with_guidance(conditioning, x_t, scale)
        return convert(
            self.family.predict(self.network, x_t, t, conditioning), x_t, t, self.process, self.prediction, prediction
        )

    def copy(self, role: str) -> Denoiser:
        """Frozen copy of the network in another role, as a target."""
        return replace(self, role=role, network=copy.deepcopy(self.network).requires_grad_(False))

    def with_guidance(self, conditioning: Any, like: Tensor, scale: Tensor | None) -> Any:
        """Conditioning as the network takes it for the samples of `like` (B, ...), with `scale`
        (B,) or `guidance_scale`."""
        default = torch.full((like.shape[0],), self.guidance_scale, device=like.device)
        return with_scale(conditioning, self.network, default if scale is None else scale)

    def check_determined(self, times: Tensor) -> None:
        """Raise `UserError` if the output does not determine `x_0` at one of `times`."""
        times = times.double()
        a, b = self.prediction.coefficients(self.process, times)
        if not bool((a * self.process.sigma(times) - b * self.process.alpha(times)).all()):
            raise UserError(
                f"the {self.role} predicts {self.prediction.value}, which says nothing about the data where there is "
                f"only noise, as at t = 1 of {type(self.process).__name__}; "
                "few-step sampling starts there, so it has to predict the velocity, v or x0"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher(Denoiser):
    """The frozen network that methods learn from, under classifier-free or embedded guidance."""

    true_cfg_scale: float
    guidance_range: tuple[float, float] | None
    """Range of the scale of each sample, embedded if the network takes it; None: one scale for all."""
    unconditional: Any
    """Conditioning of the empty prompt, of one sample."""

    @property
    def guided_by_rule(self) -> bool:
        """Whether guidance takes a second call of the network, for the empty prompt."""
        return self.true_cfg_scale != 1 or (self.guidance_range is not None and not embeds_guidance(self.network))

    def guided(
        self, x_t: Tensor, t: Tensor, conditioning: Any, prediction: Prediction, scale: Tensor | None = None
    ) -> Tensor:
        """Guided `prediction` (B, ...) without a gradient, `u + w (c - u)`."""
        conditional, unconditional, weight = self.apart(x_t, t, conditioning, prediction, scale)
        return conditional if unconditional is None else guide(unconditional, conditional, weight)

    @torch.no_grad()
    def apart(
        self, x_t: Tensor, t: Tensor, conditioning: Any, prediction: Prediction, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, float | Tensor]:
        """Conditional and unconditional prediction `c` and `u`, and the `w` that combines them: `u
        + w (c - u)`.

        Args:
            scale: (B,), from `draw_scale`; by default the scales of the teacher.
        """
        embedded, weight = scale, self.true_cfg_scale if scale is None or embeds_guidance(self.network) else scale
        conditional = self.predict(x_t, t, conditioning, prediction, embedded)
        if not isinstance(weight, Tensor) and weight == 1:
            return conditional, None, weight
        rows = torch.zeros(x_t.shape[0], dtype=torch.long, device=x_t.device)
        return conditional, self.predict(x_t, t, self.unconditional[rows], prediction, embedded), weight

    def draw_scale(self, like: Tensor, rng: torch.Generator) -> Tensor | None:
        """Guidance scale for each sample of `like` (B, ...), if there is a range to draw from."""
        if self.guidance_range is None:
            return None
        low, high = self.guidance_range
        return (low + (high - low) * torch.rand(like.shape[0], generator=rng, device=rng.device)).to(like.device)
