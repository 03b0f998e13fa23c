"""Checks that disk and memory suffice, before a run spends an hour on calibration."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import psutil

from fastdistill.errors import UserError

if TYPE_CHECKING:
    import torch

GIB, MIB = 2**30, 2**20


def require_writable(output: Path, option: str = "--output") -> None:
    """Raise `UserError` if `output`, which need not exist yet, cannot be written."""
    folder = _existing(output)
    if not folder.is_dir():
        if folder == output:
            raise UserError(f"{option} {output} is a file; name a folder")
        raise UserError(f"{output} cannot be made, as {folder} is a file; choose another {option}")
    try:
        # Permissions do not tell: a disk may be read-only, and root passes every check.
        TemporaryFile(dir=folder).close()
    except OSError as error:
        reasons = {errno.EROFS: f"the disk of {folder} is read-only", errno.EACCES: f"you may not write to {folder}"}
        reason = reasons.get(error.errno or 0, f"{folder}: {error.strerror}")
        raise UserError(f"{output} cannot be written: {reason}; choose another {option}") from error


def require_disk(output: Path, needed_bytes: int, option: str = "--output") -> None:
    """Raise `UserError` if the disk of `output` has less than `needed_bytes` left.

    `output` need not exist yet.
    """
    free = shutil.disk_usage(_existing(output)).free
    if free < needed_bytes:
        raise UserError(
            f"{output} needs about {show(needed_bytes)}, and the disk of {_existing(output)} has "
            f"{show(free, math.floor)} free; free some space, or choose another {option}"
        )


def require_memory(device: torch.device, needed_bytes: int, what: str, remedy: str) -> None:
    """Raise `UserError`, with the `remedy`, if `device` has less than `needed_bytes` for `what`."""
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if free < needed_bytes:
        raise UserError(
            f"{what} needs about {show(needed_bytes)} and {device} has {show(free, math.floor)} free; {remedy}"
        )


def show(size: int, rounded: Callable[[float], int] = math.ceil) -> str:
    """Size in whole MiB, or from a GiB on in GiB with a decimal."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{rounded(size / MIB)} MiB"


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
