"""Log of a run: one JSON object per logged step, the progress, and on request TensorBoard's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL.Image import Image
from rich.console import Console

from fastdistill.errors import UserError
from fastdistill.run.files import read_lines, write_image, write_text
from fastdistill.run.progress import bar


class Log:
    """Log that appends metrics to `run/metrics.jsonl`, keeps images, and shows the progress.

    Args:
        start: step at which the progress begins.
        total: step at which it ends.
        tensorboard: write `run/tensorboard`, too.
        console: where the progress is shown; by default standard error.
        silent: show and write nothing, for all processes but the first.
    """

    def __init__(
        self,
        run: Path,
        describe: str,
        *,
        start: int,
        total: int,
        tensorboard: bool = False,
        console: Console | None = None,
        silent: bool = False,
    ) -> None:
        self.run, self.describe, self.start, self.total, self.silent = run, describe, start, total, silent
        self.console = Console(stderr=True) if console is None else console
        self.writer: Any = _writer(run / "tensorboard", start) if tensorboard and not silent else None

    def __enter__(self) -> Log:
        if self.silent:
            return self
        path = self.run / "metrics.jsonl"
        # Steps after the checkpoint that is resumed from are run and logged again: drop their old
        # lines.
        if path.exists():
            lines = [line for line in read_lines(path) if _step(line) <= self.start]
            write_text(path, "".join(line + "\n" for line in lines))
        with ExitStack() as stack:
            self.file = stack.enter_context(path.open("a"))
            self.advance_bar = stack.enter_context(bar(self.console, self.describe, self.total, start=self.start))
            if self.writer:
                stack.callback(self.writer.close)
            self.stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.silent:
            self.stack.close()

    def advance(self, step: int, logs: Mapping[str, float], *, write: bool) -> None:
        """Show that `step` is done, and `write` its `logs`."""
        if self.silent:
            return
        loss = logs.get("loss", logs.get("student/loss"))
        self.advance_bar(1, "" if loss is None else f"loss {loss:.4f}")
        if write:
            self.file.write(json.dumps({"step": step, **logs}) + "\n")
            self.file.flush()
            if self.writer:
                for name, value in logs.items():
                    self.writer.add_scalar(name, value, step)

    def image(self, name: str, step: int, image: Image) -> None:
        """Keep `image` as `run/<name>/<step>.png`."""
        if self.silent:
            return
        path = self.run / name / f"{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        write_image(path, image)
        if self.writer:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


def _writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:  # installed, and not for this torch
        raise UserError(
            f"tensorboard cannot be imported ({error}): pip install tensorboard, or leave the option out"
        ) from error
    return SummaryWriter(folder, purge_step=start + 1)  # hides what a killed run has written after its checkpoint


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")  # the process was killed while it wrote the line
