"""Pipeline with another transformer, to sample it, and to save it for stock diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

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

    An existing `folder` stays as it is.
    """
    if folder.exists():
        return
    # One name for all attempts: models are large, and a killed process cannot clean up after
    # itself.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with swapped(pipeline, transformer):
            pipeline.save_pretrained(partial)
        sampling.save(partial)
        write_text(partial / PROMPTS_FILE, "\n".join(prompts) + "\n")
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
