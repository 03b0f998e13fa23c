"""Files that are written whole or not at all, text in whatever form of Unicode editors save it, and
short names for settings."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastdistill.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# A mark of UTF-32 begins with that of UTF-16.
ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and the encoding of a text that begins with one."""
MARK = "\ufeff"
HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which stands for nothing, and which no encoding of Unicode has."""


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


def read_text(path: Path) -> str:
    """Read a text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Lines end with a newline, whatever they end with in the file. No byte order mark is left, not
    even in the middle, where joining two files puts one.

    Raises:
        UserError: the file cannot be read, or is no such text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    encoding = next((encoding for mark, encoding in ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        return checked_text(text).replace("\r\n", "\n").replace("\r", "\n")
    except UserError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error


def checked_text(text: str) -> str:
    """Return `text` without byte order marks.

    JSON may hold, as escapes, characters that its file does not show.

    Raises:
        UserError: it holds characters that belong to no text.
    """
    if "\0" in text:
        raise UserError("it holds NUL characters")
    if HALF.search(text):
        raise UserError("it holds halves of surrogate pairs")
    return text.replace(MARK, "")


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text without the white space around them, and without empty ones.

    Only a line's end in an editor ends a line: `str.splitlines` also breaks at form feeds and at
    Unicode's separators, which stand within texts that were copied from elsewhere.

    Raises:
        UserError: as `read_text`.
    """
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_json(path: Path) -> Any:
    """Read a JSON value from a text.

    Raises:
        UserError: as `read_text`, or the text is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); correct it, or get a sound copy") from error


def begins_with_mark(path: Path) -> bool:
    """Whether the file begins with a byte order mark, which diffusers and transformers do not
    read."""
    return path.read_bytes()[:4].startswith(tuple(mark for mark, _ in ENCODINGS))


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


def without_folders(value: Any, paths: Iterable[str]) -> Any:
    """Replace `paths` in the texts of a JSON value by their last names.

    A name without folders stays, and so does what is no text.
    """
    # A path may be the beginning of another.
    long = sorted((path for path in paths if "/" in path or os.sep in path), key=len, reverse=True)
    if isinstance(value, Mapping):
        return {name: without_folders(held, long) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(held, long) for held in value]
    if isinstance(value, str):
        for path in long:
            value = value.replace(path, Path(path).name)
    return value


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in `folder` and its subfolders; of a link, the file that it stands for."""
    return sum(map(_bytes, folder.rglob("*")))


def digest(settings: Mapping[str, Any]) -> str:
    """Short name for what was made with `settings`, any JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # removed meanwhile
        return 0
