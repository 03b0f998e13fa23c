"""Sampling of a pipeline through diffusers, by defaults that are kept with its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import UserError
from fastdistill.models.checks import check_call, check_dtypes
from fastdistill.run.files import read_json, write_json
from fastdistill.run.options import at_least

FILE = "fastdistill.json"
PIXELS_AT_ONCE = 2**22
"""Pixels that are drawn at once: 4 images of 1024 x 1024 fill a GPU, and more only take its memory."""


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Arguments of the pipeline's call.

    The values here are FLUX.1-dev's; a folder's `fastdistill.json` overrides them.
    """

    num_inference_steps: int = 28
    true_cfg_scale: float = 1.0
    """Classifier-free guidance with the empty prompt, `u + w (c - u)`; 1 is off."""
    guidance_scale: float = 3.5
    """Embedded guidance of a guidance-distilled model; others ignore it."""
    height: int = 1024
    """Pixels."""
    width: int = 1024
    """Pixels."""
    max_sequence_length: int = 512
    """T5 tokens."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_inference_steps", "true_cfg_scale", "height", "width", "max_sequence_length")
        at_least(self, 0, "guidance_scale")

    @classmethod
    def load(cls, folder: Path) -> SamplingDefaults:
        """Read the defaults of `folder`, or FLUX.1-dev's if the folder has none.

        diffusers ignores the file.

        Raises:
            UserError: the file is not JSON, or holds names of no field, or values that a field
                cannot have.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        content, names = read_json(path), [field.name for field in dataclasses.fields(cls)]
        wrong = [name for name in content if name not in names] if isinstance(content, dict) else ["no JSON object"]
        if wrong:
            raise UserError(
                f"{path} holds {', '.join(wrong)}; it is a JSON object of {', '.join(names)}, or may be deleted"
            )
        try:
            return cls(**content)
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}") from error

    def replaced(self, options: Any) -> SamplingDefaults:
        """Defaults with the values of equally named attributes of `options` that are not None."""
        given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

    def save(self, folder: Path) -> None:
        """Write the file that `load` reads."""
        write_json(folder / FILE, dataclasses.asdict(self))


def images_at_once(batch: int, sampling: SamplingDefaults) -> int:
    """Number of images to draw at once: `batch`, or fewer where images are large."""
    return max(1, min(batch, PIXELS_AT_ONCE // (sampling.height * sampling.width)))


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: Sequence[str],
    sampling: SamplingDefaults,
    *,
    seeds: Sequence[int],
    batch: int,
    tick: Callable[[float], None] = lambda count: None,
) -> Tensor:
    """Draw images (N, 3, H, W) in [-1, 1] of `prompts`.

    Image `i` begins with the noise of `seeds[i]`, for every model and batch size.

    Args:
        seeds: one for each prompt.
        batch: images at once.
        tick: called after each step with the number of images that the step is worth.

    Raises:
        UserError: diffusers cannot sample the pipeline in this way, or its parts have different
            dtypes.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"one seed per prompt: {len(prompts)} prompts, {len(seeds)} seeds")
    check_call(pipeline, sampling)
    check_dtypes(pipeline)
    images = []
    guided = {"negative_prompt": ""} if sampling.true_cfg_scale > 1 else {}
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        share = len(generators) / sampling.num_inference_steps

        def told(_pipeline: Any, _step: int, _time: Any, tensors: Any, share: float = share) -> Any:
            tick(share)
            return tensors

        output = pipeline(
            prompt=list(prompts[part]),
            **{name: [text] * len(generators) for name, text in guided.items()},
            generator=generators,
            num_inference_steps=sampling.num_inference_steps,
            true_cfg_scale=sampling.true_cfg_scale,
            guidance_scale=sampling.guidance_scale,
            height=sampling.height,
            width=sampling.width,
            max_sequence_length=sampling.max_sequence_length,
            output_type="pt",
            callback_on_step_end=told,
        )
        images.append(output.images.float().cpu() * 2 - 1)
    # The decoder may answer in channels-last order.
    return torch.cat(images).contiguous()
