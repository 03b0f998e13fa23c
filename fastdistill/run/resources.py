"""Checks that disk and memory suffice, before a run spends an hour on calibration."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from fastdistill.errors import UserError

GIB = 2**30


def require_disk(output: Path, needed_bytes: int) -> None:
    """Raise `UserError` if the disk of `output` has less than `needed_bytes` left.

    `output` need not exist yet.
    """
    folder = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{output} needs about {needed_bytes / GIB:.1f} GiB and its disk has {free / GIB:.1f} GiB free; "
            "free some space, or choose an --output on another disk"
        )


def require_memory(device: torch.device, needed_bytes: int, what: str, remedy: str) -> None:
    """Raise `UserError`, with the `remedy`, if `device` has less than `needed_bytes` for `what`."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if free < needed_bytes:
        raise UserError(
            f"{what} needs about {needed_bytes / GIB:.1f} GiB and {device} has {free / GIB:.1f} GiB free; {remedy}"
        )
