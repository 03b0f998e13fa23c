"""Checks of a `FluxPipeline` before it is sampled.

diffusers refuses some calls only after minutes of work, and changes others in silence.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastdistill.errors import UserError, first_line, notice
from fastdistill.models.families.flux import PATCH
from fastdistill.models.folder import PARTS, PIPELINES
from fastdistill.models.tokenizers import check_encoders
from fastdistill.models.weights import is_plain

if TYPE_CHECKING:
    from fastdistill.models.sampling import SamplingDefaults


def check_pipeline(pipeline: Any) -> None:
    """Raise `UserError` unless `pipeline` draws from a prompt alone, and has all its parts."""
    name = type(pipeline).__name__
    missing = [part for part in PARTS if getattr(pipeline, part, None) is None]
    if missing:
        raise UserError(f"this {name} has no {', '.join(missing)}; load the whole pipeline")
    check_encoders(pipeline)
    latents, channels = pipeline.vae.config.latent_channels, pipeline.transformer.config.in_channels
    if not any(class_.__name__ in PIPELINES for class_ in type(pipeline).__mro__):
        remedy = (
            "FluxPipeline.from_pipe(pipeline) makes one of its parts"
            if channels == latents * PATCH**2
            else "its transformer reads more than noise, and can only be cut: fastdistill.compress.cut"
        )
        raise UserError(f"a {name} does not draw from a prompt alone, as a {PIPELINES[0]} does; {remedy}")
    if channels != latents * PATCH**2:
        raise UserError(
            f"the transformer reads {channels} channels, and {PATCH} x {PATCH} latents of the autoencoder have "
            f"{latents * PATCH**2}; get transformer and autoencoder of one model"
        )


def check_call(pipeline: Any, sampling: SamplingDefaults) -> None:
    """Raise `UserError` if diffusers cannot sample `pipeline` by `sampling`, or would round a size."""
    step = pipeline.vae_scale_factor * PATCH
    for name in ("height", "width"):
        pixels = getattr(sampling, name)
        if pixels % step:
            below, above = pixels // step * step, -(-pixels // step) * step
            sizes = f"{below} or {above}" if below else str(above)
            raise UserError(f"--{name} {pixels} is not a multiple of {step} pixels; give {sizes}")
    try:
        pipeline.check_inputs(
            "", None, sampling.height, sampling.width, max_sequence_length=sampling.max_sequence_length
        )
    except ValueError as error:
        raise UserError(f"{type(pipeline).__name__} refuses these options: {error}") from error
    _check_scheduler(pipeline, sampling)


def check_dtypes(pipeline: Any) -> None:
    """Raise `UserError`, naming the parts, if parts of `pipeline` have different dtypes.

    Autocast and quantised layers bring theirs together, and diffusers does not.
    """
    dtypes: dict[torch.dtype, list[str]] = {}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and all(map(is_plain, part.parameters())):
            dtype: Any = part.dtype
            dtypes.setdefault(dtype, []).append(name)
    if len(dtypes) > 1 and not torch.is_autocast_enabled(pipeline.device.type):
        found = "; ".join(f"{', '.join(names)}: {str(dtype)[6:]}" for dtype, names in dtypes.items())
        raise UserError(
            f"the parts of this pipeline have different dtypes ({found}); load it with dtype=..., "
            "as in from_pretrained(folder, dtype=torch.float32)"
        )


def tell_of_long_prompts(pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> None:
    """Give a `Notice` of prompts that are longer than the tokens that the transformer reads.

    CLIP has a limit of its own. It gives one pooled embedding of the prompt, in which the end
    counts little.
    """
    lengths = [len(ids) for ids in pipeline.tokenizer_2(list(prompts), truncation=False, verbose=False).input_ids]
    longer = sum(length > max_sequence_length for length in lengths)
    if longer:
        notice(
            f"{longer} of {len(lengths)} prompts {'is' if longer == 1 else 'are'} longer than the "
            f"{max_sequence_length} tokens of --max-sequence-length; the longest has {max(lengths)}: "
            "what follows is ignored"
        )


def _check_scheduler(pipeline: Any, sampling: SamplingDefaults) -> None:
    """Raise `UserError` if `FluxPipeline` cannot sample by its scheduler: by setting the times of a
    copy, and taking a step."""
    from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

    scheduler = copy.deepcopy(pipeline.scheduler)
    name, remedy = type(scheduler).__name__, "give the pipeline a FlowMatchEulerDiscreteScheduler"
    if scheduler.config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise UserError(f"a {name} that is not set to flow_prediction does not fit a flow model; {remedy}")
    steps, nothing = sampling.num_inference_steps, torch.zeros(1, 1, 1)
    sigmas: Any = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    if sigmas is not None and "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise UserError(f"a FluxPipeline cannot sample by {name}, whose times cannot be set by sigmas; {remedy}")
    try:
        times, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=1.0)
        scheduler.set_begin_index(0)
        scheduler.step(nothing, times[0], nothing, return_dict=False)
    except Exception as error:  # each scheduler has its own
        raise UserError(f"a FluxPipeline cannot sample by {name} ({first_line(error)}); {remedy}") from error
