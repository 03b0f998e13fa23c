"""The teacher's samples as training data: pairs of noise and where its flow ends, for reflow and
for DMD's regression."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.data.pairs import PairBatch, PairPool
from fastdistill.data.shards import cached_shards
from fastdistill.diffusion.prediction import Predictor
from fastdistill.diffusion.sampler import sample
from fastdistill.diffusion.timesteps import few_step_times
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.errors import UserError
from fastdistill.run.options import at_least


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Sampling of the teacher for reflow and dmd."""

    count: int = 4096
    """Pairs of noise and sample."""
    steps: int = 28
    """Sampling steps of the teacher."""
    sampler: Literal["flow_euler", "ode_heun"] = "flow_euler"
    """As FLUX is sampled, or with twice the calls and an error of second order."""
    batch: int = 64
    """Pairs at once, which are kept when a run is interrupted."""

    def __post_init__(self) -> None:
        at_least(self, 1, "count", "steps", "batch")


def teacher_pairs(
    method: Distillation,
    folder: Path,
    options: PairOptions,
    *,
    conditioning: Any,
    shape: tuple[int, ...],
    seed: int = 0,
    device: torch.device | None = None,
    settings: Mapping[str, Any] | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> PairPool:
    """Pairs of `method`'s guided teacher, each under a prompt drawn from `conditioning` (P, ...),
    cached in `folder`.

    Args:
        shape: of one sample, without the batch.
        device: where the teacher is; by default the CPU.
        settings: what else the pairs depend on, such as the teacher's name. Other settings than
            those in the folder are refused.
        tick: called with the number of pairs after each batch that had to be made.

    Raises:
        UserError: the folder holds pairs of other settings, or the teacher cannot start from noise.
    """
    device = torch.device("cpu") if device is None else device
    times = few_step_times(options.steps, method.shift)
    method.teacher.check_determined(times)
    teacher = method.teacher

    def make(size: int, generator: torch.Generator) -> dict[str, Tensor]:
        prompts = torch.randint(len(conditioning), (size,), generator=generator)
        noise = torch.randn(size, *shape, generator=generator)
        scale = teacher.draw_scale(noise, generator)
        chosen, on_device = conditioning[prompts.to(device)], None if scale is None else scale.to(device)
        predictor = Predictor(
            function=lambda x_t, t: teacher.guided(x_t, t, chosen, teacher.prediction, on_device),
            process=teacher.process,
            prediction=teacher.prediction,
        )
        latents = sample(predictor, noise.to(device), times, sampler=options.sampler)
        tick(size)
        return {"noise": noise, "latents": latents, "prompts": prompts, **({} if scale is None else {"scale": scale})}

    described = {
        **dataclasses.asdict(options),
        **{name: getattr(teacher, name) for name in ("true_cfg_scale", "guidance_scale", "guidance_range")},
        "shift": method.shift,
        "shape": shape,
        "prompts": len(conditioning),
        **(settings or {}),
    }
    tensors = cached_shards(folder, count=options.count, shard=options.batch, seed=seed, settings=described, make=make)
    return PairPool(
        noise=tensors["noise"],
        latents=tensors["latents"],
        prompts=tensors["prompts"],
        scale=tensors.get("scale"),
        conditioning=conditioning,
        device=device,
    )


def require_pairs(batch: Any, method: str) -> PairBatch:
    """`batch`, which has to be one of pairs."""
    if not isinstance(batch, PairBatch):
        raise UserError(
            f"{method} trains on pairs of noise and the teacher's samples: make them with "
            "fastdistill.distill.methods.teacher_pairs.teacher_pairs"
        )
    return batch
