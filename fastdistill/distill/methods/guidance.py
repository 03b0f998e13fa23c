"""Guidance distillation (Meng et al. 2023, arXiv 2210.03142, section 3.1): one network for the
guided field of every scale."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Unpack

from fastdistill.distill.methods.distillation import Setup
from fastdistill.distill.methods.output_kd import OutputKD, OutputKDOptions
from fastdistill.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions(OutputKDOptions):
    """Build classifier-free guidance of any scale into a student that takes the scale as an input."""

    guidance_range: tuple[float, float] | None = (1.0, 8.0)


class GuidanceDistillation(OutputKD):
    """`L = E |p_S(x_t, t, c, w) - (u + w (c - u))|^2`, `w ~ U[guidance_range]`, `c` and `u` the
    teacher's predictions.

    The student takes `w` as FLUX.1-dev takes its guidance: `with_guidance_embedder` makes one.
    (Meng et al., equation 5, whose `(1 + w) c - w u` counts `w` from 0.)
    """

    Options = GuidanceOptions
    options: GuidanceOptions

    def __init__(self, options: GuidanceOptions, **setup: Unpack[Setup]) -> None:
        if options.guidance_range is None:
            raise UserError("guidance distillation needs a guidance_range to draw scales from, such as 1 8")
        super().__init__(options, **setup)
