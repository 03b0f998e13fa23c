"""Pipeline with another transformer, to sample it, and to save it for stock diffusers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastdistill.models.copying import copy_part, forget_origins
from fastdistill.models.loading import PROMPTS_FILE
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run.files import write_text


@contextmanager
def swapped(pipeline: Any, transformer: nn.Module, scheduler: Any = None) -> Iterator[None]:
    """Give the pipeline another transformer, and perhaps another scheduler, inside the block."""
    earlier = pipeline.transformer, pipeline.scheduler
    pipeline.transformer, pipeline.scheduler = transformer, scheduler or pipeline.scheduler
    try:
        yield
    finally:
        pipeline.transformer, pipeline.scheduler = earlier


def save(
    pipeline: Any, transformer: nn.Module, folder: Path, sampling: SamplingDefaults, prompts: Sequence[str]
) -> None:
    """Write the pipeline with `transformer`, sampling defaults and prompts, whole or not at all.

    Models and tokenizers that are as the files that they were loaded from are copied from there,
    byte for byte. Nothing that is written says where on this machine anything was loaded from. An
    existing `folder` stays as it is.
    """
    if folder.exists():
        return
    # One name for all attempts: models are large, and a killed process cannot clean up after
    # itself.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with swapped(pipeline, transformer):
            for name, part in pipeline.components.items():
                if part is not None and (part is transformer or not copy_part(part, name, partial / name)):
                    _save_part(part, partial / name)
            pipeline.save_config(partial)
        forget_origins(partial)
        sampling.save(partial)
        # A prompt is a line there.
        lines = (re.sub(r"\s*[\r\n]\s*", " ", prompt).strip() for prompt in prompts)
        write_text(partial / PROMPTS_FILE, "".join(f"{line}\n" for line in lines))
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _save_part(part: Any, folder: Path) -> None:
    from transformers import PreTrainedModel

    # With adapters' own names of weights, stock libraries would not load them.
    part.save_pretrained(folder, **({"save_peft_format": False} if isinstance(part, PreTrainedModel) else {}))
