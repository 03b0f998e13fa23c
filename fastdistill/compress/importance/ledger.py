"""Scores that survive a kill: every finished piece of a scoring is a line in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdistill.run.files import read_text, write_text

Tick = Callable[[float], None]
"""Called with the share of the work that is done, for the progress bar."""


class Ledger:
    """The finished pieces of one scoring by name, each a JSON value.

    A piece is what a criterion would not want to compute twice: the error without one block on one
    chunk of the points, or a pass over one chunk. It is written before the next one begins, so that
    a scoring that is started again goes on where it was.
    """

    def __init__(self, path: Path | None = None, tick: Tick = lambda _: None) -> None:
        """Read the pieces of an earlier run from `path`; without one, nothing is kept."""
        self._path, self._tick = path, tick
        self._pieces: dict[str, Any] = {}
        self._expected = 1
        if path is not None and path.exists():
            lines = read_text(path).splitlines(keepends=True)
            # A kill in the middle of a write leaves half a line, and the next one must not continue
            # it.
            whole = [line for line in lines if line.endswith("\n")]
            if len(whole) < len(lines):
                write_text(path, "".join(whole))
            for line in whole:
                self._pieces.update(json.loads(line))

    def expect(self, pieces: int) -> None:
        """Say how many pieces there will be."""
        self._expected = pieces

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def __getitem__(self, name: str) -> Any:
        return self._pieces[name]

    @property
    def folder(self) -> Path | None:
        """For what is no JSON value, such as the state of a training; None where nothing is kept."""
        return None if self._path is None else self._path.with_suffix("")

    def keep(self, name: str, value: Any) -> None:
        self._pieces[name] = value
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({name: value}) + "\n")
        self._tick(min(1.0, len(self._pieces) / self._expected))
