"""Options that several commands share. Imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from fastdistill.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to sample, where it should differ from the model's fastdistill.json (without one: FLUX.1-dev's defaults)."""

    num_inference_steps: int | None = None
    """Sampling steps."""
    true_cfg_scale: float | None = None
    """Classifier-free guidance with the empty prompt; 1 is off."""
    guidance_scale: float | None = None
    """Embedded guidance of a guidance-distilled model; others ignore it."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    max_sequence_length: int | None = None
    """T5 tokens."""

    def __post_init__(self) -> None:
        at_least(self, 1, *(field.name for field in fields(self) if "scale" not in field.name))


Sampling = Annotated[SamplingOptions, tyro.conf.arg(name="")]
"""As a field of a command's options: its own box in ``--help``, no prefix to type."""


def at_least(options: object, least: float, *names: str) -> None:
    """Raise :class:`UserError` for an option of ``names`` that is given and less than ``least``."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least:g}, got {value}")


def check_output(path: Path, overwrite: bool) -> None:
    """Raise :class:`UserError` if ``path`` cannot be written, before the work for it begins."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --output, or give --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for --output")
