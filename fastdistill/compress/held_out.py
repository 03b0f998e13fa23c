"""Held-out measure of a smaller model: the distance of its images to the full model's, of equal
noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistill.compress.importance.calibrate import Calibration
from fastdistill.compress.importance.criterion import SamplingRuns
from fastdistill.compress.importance.trajectory import ends
from fastdistill.models.families.family import Conditioning, Family
from fastdistill.models.patch import is_patched, patched
from fastdistill.run.files import atomic_write

IMAGES, FEWEST_IMAGES = 16, 4
SEED = 0x48_45_4C_44
"""Added to the seed of the run, so that no other part of the run draws the same noise."""
SHARE = 0.1
"""Largest share of the training that its measurements may take."""
MEASUREMENTS = 10
PASSES_OF_A_STEP = 4
"""Cost of a training step for each sample, in forward passes: the full model's, the student's, and
the student's backward pass, which costs two."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Sampling runs from noise that nothing is trained on, and where the full model's runs end.

    Final latents stand for images, so that no measurement needs the decoder.

    Attributes:
        reference: final latents of the full model, (N, C, H, W) float32.
    """

    family: Family
    runs: SamplingRuns
    reference: Tensor
    batch: int

    @classmethod
    def of(
        cls, calibration: Calibration, conditioning: Conditioning, shape: Sequence[int], cache: Path | None = None
    ) -> HeldOut:
        """Runs of the calibrated network on the schedule of the calibration, one for each row of
        `conditioning`, with latents of `shape` (C, H, W).

        Args:
            cache: folder of these very runs, where the reference is read or kept.
        """
        like = calibration.runs
        generator = torch.Generator().manual_seed(calibration.seed + SEED)
        runs = SamplingRuns(
            noise=torch.randn(len(conditioning), *shape, generator=generator).to(like.noise),
            times=like.times,
            conditioning=conditioning,
            unconditional=like.unconditional,
            true_cfg_scale=like.true_cfg_scale,
        )
        kept = None if cache is None else cache / "reference.safetensors"
        if kept is not None and kept.exists():
            reference = load_file(kept)["latents"].to(runs.noise.device)
        else:
            reference = _ends(calibration.network, calibration.family, runs, calibration.batch)
            if kept is not None:
                with atomic_write(kept) as partial:
                    save_file({"latents": reference.contiguous()}, partial)
        return cls(family=calibration.family, runs=runs, reference=reference, batch=calibration.batch)

    def distance(self, network: Any) -> float:
        """Mean over the images of `||z' - z||^2 / ||z||^2`, with the final latents `z'` of the
        network and `z` of the full model.

        A perfect model has 0, and only a perfect one.
        """
        squares = (_ends(network, self.family, self.runs, self.batch) - self.reference).double().square().flatten(1)
        norms = self.reference.double().square().flatten(1)
        return float((squares.sum(dim=1) / norms.sum(dim=1)).mean())


def images_for(steps: int, batch: int, passes: int) -> int:
    """Number of held-out images for a training of `steps`, where an image takes `passes`: as many
    as one measurement at the end can afford."""
    return max(FEWEST_IMAGES, min(IMAGES, _affordable(steps, batch, passes))) if steps else IMAGES


def steps_between(steps: int, batch: int, passes: int, images: int) -> int:
    """Training steps from one measurement of `images` to the next, so that all of them take a tenth
    of the training at most; the last step is always measured."""
    measurements = max(1, min(MEASUREMENTS, _affordable(steps, batch, passes) // images))
    return -(-steps // measurements)


def _affordable(steps: int, batch: int, passes: int) -> int:
    """Number of images, of `passes` each, that cost as much as the training may spend on them."""
    return int(SHARE * steps * batch * PASSES_OF_A_STEP) // passes


def _ends(network: Any, family: Family, runs: SamplingRuns, batch: int) -> Tensor:
    # A student in training is patched already.
    with nullcontext() if is_patched(network) else patched(network):
        parts = [ends(network, family, runs[start : start + batch]) for start in range(0, len(runs), batch)]
    return torch.cat(parts)
