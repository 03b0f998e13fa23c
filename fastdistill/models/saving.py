"""A pipeline with another transformer: to sample it, and to save it as stock diffusers loads it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastdistill.models.sampling import SamplingDefaults


@contextmanager
def swapped(pipeline: Any, transformer: nn.Module, scheduler: Any = None) -> Iterator[None]:
    """The pipeline with another transformer, and another scheduler if one is given, inside the block."""
    earlier = pipeline.transformer, pipeline.scheduler
    pipeline.transformer, pipeline.scheduler = transformer, scheduler or pipeline.scheduler
    try:
        yield
    finally:
        pipeline.transformer, pipeline.scheduler = earlier


def save(pipeline: Any, transformer: nn.Module, folder: Path, sampling: SamplingDefaults, prompts: Sequence[str]) -> None:
    """Write the pipeline with ``transformer``, sampling defaults and prompts, whole or not at all; what is in ``folder`` already stays."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    with swapped(pipeline, transformer):
        pipeline.save_pretrained(unfinished)
    sampling.save(unfinished)
    (unfinished / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    unfinished.replace(folder)
