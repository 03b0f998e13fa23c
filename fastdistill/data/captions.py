"""Captions of the images in a folder, in the layouts that trainers and data sets have.
docs/images.md has the table."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdistill.errors import UserError
from fastdistill.run.files import MARK, checked_text, read_json, read_lines, read_text

TEXTS = (".txt", ".caption")
"""Endings of files that hold the caption of one image, the first before the second."""
TABLES = (".jsonl", ".csv", ".tsv", ".json")
"""Endings of files that hold the captions of many images; the last may be of one image, too."""
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
"""Columns of a table that hold captions, the first before the others; besides, whatever ends in
`_text` or `_caption`."""
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "image_file", "path")
"""Columns of a table that name an image; besides, whatever ends in `_file_name`."""
TABLE_KINDS = ("JSON lines", "comma-separated", "JSON list", "JSON by name")
"""Kinds of tables, the first before the others."""
SEPARATOR = re.compile(r'"?sep=([^"])"?[,;\t]*', re.IGNORECASE)
"""Line before the header by which Excel tells what separates the columns."""
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
            known = _caption_of_one(path) if suffix == ".json" else None
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
        kind, records = _records(path)
        rows = [
            (file, names[path.parent / file], record, _caption_of(record))
            for record in records
            for file in _files(record)
        ]
        if must and not rows:
            raise UserError("no row has a column file_name")
    except (UserError, ValueError, csv.Error) as error:
        if must:
            raise UserError(f"{path} cannot be read as a table of captions ({error}); correct or remove it") from error
        captions.remarks.append(f"{path.name} is not read as a table of captions ({error})")
        return False
    lost = [file for file, found, _, _ in rows if not found]
    if len(lost) == len(rows) and not must:
        return False
    if lost:
        captions.remarks.append(f"{path.name} names {len(lost)} files that are not there ({listed(lost)})")
    without = {file: record for file, found, record, text in rows if found and text is None}
    if without:
        first, record = next(iter(without.items()))
        what = f"{listed(list(without))} ({first} has {_instead(record)})"
        captions.remarks.append(f"{path.name} has no caption of {what}")
    order = (len(TEXTS) + 2 + TABLE_KINDS.index(kind), path.name)
    for _, found, _, text in rows:
        for image in found:
            if text is not None:
                captions.add(image, Caption(file=path, kind=path.name, order=order, known=text))
    return True


def _files(record: Mapping[str, Any]) -> Iterator[str]:
    """Names of the images of a row, as the table spells them with slashes."""
    for name, value in _columns(record).items():
        if name in FILE_COLUMNS or name.endswith("_file_name"):
            for held in value if isinstance(value, list) else [value]:
                file = _spelled(held)
                if file and file.strip():
                    yield file.strip().replace("\\", "/")


def _records(path: Path) -> tuple[str, list[Mapping[str, Any]]]:
    """Kind of a table and its rows, each a mapping from columns to values."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "comma-separated", _spreadsheet(read_text(path))
    value = [_row(*row) for row in enumerate(read_lines(path), 1)] if suffix == ".jsonl" else read_json(path)
    kind = "JSON lines" if suffix == ".jsonl" else "JSON list"
    if isinstance(value, dict):
        # From the name of an image to its caption, or to a record.
        kind = "JSON by name"
        value = [
            {**(_with_tags(held) if isinstance(held, dict) else {"text": held}), "file": name}
            for name, held in value.items()
        ]
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise UserError("its rows are no JSON objects")
    return kind, value


def _row(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"row {number} is not JSON: {error}") from error


def _spreadsheet(text: str) -> list[Mapping[str, Any]]:
    lines = [*text.split("\n"), ""]
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    told = SEPARATOR.fullmatch(lines[first])
    first += told is not None
    # Spreadsheets write semicolons where the comma is the decimal sign.
    delimiter = told[1] if told else max(",;\t", key=lines[first].count)
    rows: list[Mapping[str, Any]] = list(csv.DictReader(io.StringIO("\n".join(lines[first:])), delimiter=delimiter))
    for number, row in enumerate(rows, first + 2):
        if None in row:
            raise UserError(f"row {number} has more fields than the header; put captions with commas in quotes")
    return rows


def _caption_of_one(path: Path) -> str | None:
    """Caption in a JSON file of one image, if it has one."""
    record = read_json(path)
    try:
        return _caption_of(record) if isinstance(record, dict) else None
    except UserError as error:
        raise UserError(f"{path}: {error}; correct its caption") from error


def _caption_of(record: Mapping[str, Any]) -> str | None:
    """Caption in the first column of captions that has one.

    Raises:
        UserError: it holds characters that belong to no text.
    """
    return next((_one_line(text) for text in map(_spelled, _captions(record).values()) if text is not None), None)


def _captions(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the columns of captions of a record, the one to use first; of a list, the first."""
    columns = _columns(record)
    others = (name for name in columns if name.endswith(("_text", "_caption")))
    held = {name: columns[name] for name in (*CAPTION_COLUMNS, *others) if name in columns}
    return {name: value[0] if isinstance(value, list) and value else value for name, value in held.items()}


def _instead(record: Mapping[str, Any]) -> str:
    """Value in the first column of captions of a record without a caption, in words."""
    for name, value in _captions(record).items():
        return f"{json.dumps(value, default=str)[:40]} in {name}"
    return f"none of the columns {', '.join(CAPTION_COLUMNS)}"


def _spelled(value: Any) -> str | None:
    """A text, or a number as a text, as a spreadsheet has it; None for all else."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return str(value) if isinstance(value, str | int | float) else None


def _with_tags(record: Mapping[str, Any]) -> dict[str, Any]:
    """Captions of a record, of which the first is followed by its tags, as kohya's trainers join
    them."""
    text, tags = _caption_of(record), _columns(record).get("tags")
    if isinstance(tags, list):
        tags = ", ".join(str(tag) for tag in tags)
    if not isinstance(tags, str):
        return _captions(record)
    return {"text": ", ".join(part for part in (text, tags) if part)}


def _columns(record: Mapping[Any, Any]) -> dict[str, Any]:
    """A record by the names of its columns, without regard to case."""
    return {str(name).replace(MARK, "").strip().lower(): value for name, value in record.items()}


def _one_line(text: str) -> str:
    return " ".join(checked_text(text).split())


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace(MARK, "")).casefold()


def listed(names: Sequence[str], at_most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = [f"{len(names) - at_most} more"] if len(names) > at_most else []
    return ", ".join([*names[:at_most], *more])
