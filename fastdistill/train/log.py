"""What a run says: one JSON object per logged step, and its progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from rich.console import Console

from fastdistill.progress import bar


class Log:
    """Appends metrics to ``path`` and shows the progress from step ``start`` to ``total``."""

    def __init__(self, path: Path, describe: str, *, start: int, total: int) -> None:
        self.path, self.describe, self.start, self.total = path, describe, start, total

    def __enter__(self) -> Log:
        # Steps after the checkpoint that is resumed from are run and logged again: drop their old lines.
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= self.start]
            self.path.write_text("".join(line + "\n" for line in lines))
        with ExitStack() as stack:
            self.file = stack.enter_context(self.path.open("a"))
            self.advance_bar = stack.enter_context(bar(Console(file=sys.stderr), self.describe, self.total, start=self.start))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stack.close()

    def advance(self, step: int, logs: Mapping[str, float], *, write: bool) -> None:
        self.advance_bar(1, f"loss {logs['loss']:.4f}" if "loss" in logs else "")
        if write:
            self.file.write(json.dumps({"step": step, **logs}) + "\n")
            self.file.flush()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")  # the process was killed while it wrote the line
