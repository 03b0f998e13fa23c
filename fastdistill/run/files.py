"""Files that are written whole or not at all, and short names for settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from PIL.Image import Image


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a file to write, which replaces `path` at the end of the block.

    If the block fails, the file is removed. Several threads and processes may write the same
    `path`: each has a file of its own until then, with the suffix of `path`.
    """
    partial = path.with_name(f"{path.stem}.partial-{uuid4().hex[:12]}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_image(path: Path, image: Image) -> None:
    """Write `image` in the format of the suffix of `path`, whole or not at all."""
    with atomic_write(path) as partial:
        image.save(partial)


def digest(settings: Mapping[str, Any]) -> str:
    """Short name for what was made with `settings`, any JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
