"""Shift of the times of a pipeline's scheduler, and the scheduler of a few-step student."""

from __future__ import annotations

import math
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from fastdistill.diffusion.timesteps import flux_shift


def shift_of(scheduler: Any, image_tokens: int) -> float:
    """Shift of a pipeline's `scheduler` for an image of `image_tokens` tokens.

    A shift above 1 moves times towards noise.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    # Where a scheduler has no such field, FluxPipeline takes these.
    tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    shift = flux_shift(image_tokens, tokens, (config.get("base_shift", 0.5), config.get("max_shift", 1.15)))
    return math.log(shift) if config.get("time_shift_type") == "linear" else shift


def few_step_scheduler(shift: float, *, stochastic_sampling: bool) -> Any:
    """Scheduler that visits `few_step_times(steps, shift)` in a `FluxPipeline`, for any image size."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic_sampling)
