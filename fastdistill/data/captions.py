"""Captions of the images in a folder, in the layouts that trainers and data sets have.
docs/images.md has the table."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdistill.errors import UserError
from fastdistill.run.files import read_json, read_lines, read_text

TEXTS = (".txt", ".caption")
"""Endings of files that hold the caption of one image, the first before the second."""
TABLES = (".jsonl", ".csv", ".tsv", ".json")
"""Endings of files that hold the captions of many images; the last may be of one image, too."""
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
"""Columns of a table that hold captions, the first before the others; besides, whatever ends in
`_text` or `_caption`."""
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "image_file", "path")
"""Columns of a table that name an image; besides, whatever ends in `_file_name`."""
METADATA = "metadata"
"""Name of a table that has to be readable, whatever its ending."""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Caption of one image, and where it is from."""

    file: Path
    kind: str
    """Ending of a file of one image; name of a table."""
    order: tuple[int, str]
    """Place among the captions of the same image, of which the first is used."""
    known: str | None = None
    """The caption, if it is a part of the file."""

    @cached_property
    def text(self) -> str:
        # A folder may hold many more captions than a run takes.
        return _one_line(read_text(self.file)) if self.known is None else self.known


@dataclass(kw_only=True)
class Captions:
    """Every caption that a folder holds."""

    by_image: dict[Path, list[Caption]] = field(default_factory=dict)
    """Captions of each image that has one, the one to use first."""
    without_image: list[Path] = field(default_factory=list)
    """Files that look like a caption of one image, which is not there."""
    unread: list[Path] = field(default_factory=list)
    """Other files, of which nothing is read."""
    remarks: list[str] = field(default_factory=list)
    """Sentences for the user about the tables."""

    def add(self, image: Path, caption: Caption) -> None:
        self.by_image.setdefault(image, []).append(caption)


class Names:
    """Images by their path with or without suffix, in any case and Unicode form of the letters.

    Names that are equal to the letter come first: they alone are found if there are some.
    """

    def __init__(self, images: Sequence[Path]) -> None:
        self._found: dict[str, list[Path]] = {}
        for image in images:
            for name in dict.fromkeys((os.path.abspath(image), os.path.abspath(image.with_suffix("")))):
                for key in dict.fromkeys((name, _folded(name))):
                    self._found.setdefault(key, []).append(image)

    def __getitem__(self, path: Path) -> list[Path]:
        name = os.path.abspath(path)
        return self._found.get(name) or self._found.get(_folded(name), [])


def find_captions(images: Sequence[Path], others: Sequence[Path]) -> Captions:
    """Find captions of `images` in the files `others`.

    Raises:
        UserError: a file that belongs to an image, or is called `metadata`, cannot be read.
    """
    captions, names = Captions(), Names(images)
    for path in others:
        suffix = path.suffix.lower()
        owners = names[path.with_suffix("")] if suffix in (*TEXTS, ".json") else []
        if suffix in TEXTS and not owners:
            captions.without_image.append(path)
        elif owners:
            known = _caption_of(read_json(path)) if suffix == ".json" else None
            if suffix == ".json" and known is None:
                captions.unread.append(path)
                continue
            # a.png.txt belongs to a.png alone, a.txt to a.jpg, too.
            specific = _folded(path.stem) == _folded(owners[0].name)
            order = 0 if specific else 1 + [*TEXTS, ".json"].index(suffix)
            for owner in owners:
                captions.add(owner, Caption(file=path, kind=suffix, order=(order, path.name), known=known))
        elif suffix not in TABLES or not _read_table(path, names, captions):
            captions.unread.append(path)
            if path.stem.lower() == METADATA:
                captions.remarks.append(f"{path.name} is not read; save it as {METADATA}.jsonl or {METADATA}.csv")
    for found in captions.by_image.values():
        found.sort(key=lambda caption: caption.order)
    return captions


def _read_table(path: Path, names: Names, captions: Captions) -> bool:
    """Add the captions of a table; return whether it names any of the images.

    A table that is not called `metadata` may be any other file, so that one that is damaged is left
    alone.
    """
    must = path.stem.lower() == METADATA
    try:
        rows = list(_rows(path))
        if must and not rows:
            raise UserError("no row has a column file_name")
    except (UserError, ValueError, csv.Error) as error:
        if must:
            raise UserError(f"{path} cannot be read as a table of captions ({error}); correct or remove it") from error
        captions.remarks.append(f"{path.name} is not read as a table of captions ({error})")
        return False
    named = [(image, names[path.parent / image], text) for image, text in rows]
    lost = [image for image, found, _ in named if not found]
    if len(lost) == len(named) and not must:
        return False
    if lost:
        captions.remarks.append(f"{path.name} names {len(lost)} files that are not there ({listed(lost)})")
    if all(text is None for _, _, text in named):
        captions.remarks.append(f"{path.name} has none of the columns {', '.join(CAPTION_COLUMNS)}")
    order = (len(TEXTS) + 2, path.name)
    for _, found, text in named:
        for image in found:
            if text is not None:
                captions.add(image, Caption(file=path, kind=path.name, order=order, known=text))
    return True


def _rows(path: Path) -> Iterator[tuple[str, str | None]]:
    """Name of an image, as the table at `path` spells it with slashes, and its caption, if any."""
    for record in _records(path):
        files = [
            value for name, value in _columns(record).items() if name in FILE_COLUMNS or name.endswith("_file_name")
        ]
        for value in files:
            for file in value if isinstance(value, list) else [value]:
                if isinstance(file, str) and file.strip():
                    yield file.strip().replace("\\", "/"), _caption_of(record)


def _records(path: Path) -> list[Mapping[str, Any]]:
    """Rows of a table, each a mapping from columns to values."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _spreadsheet(read_text(path))
    value = [_row(*row) for row in enumerate(read_lines(path), 1)] if suffix == ".jsonl" else read_json(path)
    if isinstance(value, dict):
        # From the name of an image to its caption, or to a record.
        value = [
            {"text": _with_tags(held) if isinstance(held, dict) else held, "file": name} for name, held in value.items()
        ]
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise UserError("its rows are no JSON objects")
    return value


def _row(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"row {number} is not JSON: {error}") from error


def _spreadsheet(text: str) -> list[Mapping[str, Any]]:
    header = text.partition("\n")[0]
    # Spreadsheets write semicolons where the comma is the decimal sign.
    delimiter = max(",;\t", key=header.count)
    rows: list[Mapping[str, Any]] = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    for number, row in enumerate(rows, 2):
        if None in row:
            raise UserError(f"row {number} has more fields than the header; put captions with commas in quotes")
    return rows


def _caption_of(record: Any) -> str | None:
    """Caption in the first column of captions that a record has; of a list, the first."""
    columns = _columns(record) if isinstance(record, dict) else {}
    others = (name for name in columns if name.endswith(("_text", "_caption")))
    values = (columns.get(name) for name in (*CAPTION_COLUMNS, *others))
    texts = (value[0] if isinstance(value, list) and value else value for value in values)
    return next((_one_line(text) for text in texts if isinstance(text, str)), None)


def _with_tags(record: Mapping[str, Any]) -> str | None:
    """Caption of a record followed by its tags, as kohya's trainers join them."""
    text, tags = _caption_of(record), _columns(record).get("tags")
    if isinstance(tags, list):
        tags = ", ".join(str(tag) for tag in tags)
    return ", ".join(part for part in (text, tags) if part) if isinstance(tags, str) else text


def _columns(record: Mapping[Any, Any]) -> dict[str, Any]:
    """A record by the names of its columns, without regard to case."""
    return {str(name).strip().lower(): value for name, value in record.items()}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def listed(names: Sequence[str], at_most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = [f"{len(names) - at_most} more"] if len(names) > at_most else []
    return ", ".join([*names[:at_most], *more])
