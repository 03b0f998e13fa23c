"""Output folder of a run: refused when it holds other files, continued after an interruption."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdistill.errors import UserError
from fastdistill.run.files import read_json, write_json


class Workspace:
    """Folder `output` with its folder `work`, where every finished stage leaves its result.

    A run that is started again reads the results.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], result: str) -> None:
        """Check that `output` is free for a run with `settings`, or holds that run, interrupted.

        Nothing is written before `claim`.

        Args:
            result: file that a run writes when it ends.

        Raises:
            UserError: the folder holds a finished run, another run, or other files.
        """
        self.output, self.work = output, output / "work"
        self.settings = settings = json.loads(json.dumps(settings, default=str))
        recorded = self.work / "settings.json"
        if (output / result).exists():
            raise UserError(f"{output} holds a finished run; see {output / 'report.md'}, or choose another --output")
        if recorded.exists():
            earlier = read_json(recorded)
            changed = sorted(
                name for name in settings.keys() | earlier.keys() if settings.get(name) != earlier.get(name)
            )
            if changed:
                names = ", ".join("--" + name.replace("_", "-") for name in changed)
                raise UserError(
                    f"{output} holds an interrupted run with another {names}; "
                    "repeat its options, or choose another --output"
                )
            self.resumed = True
            timed = self.work / "seconds.json"
            self.seconds: dict[str, float] = read_json(timed) if timed.exists() else {}
            return
        if self._holds_files():
            raise UserError(f"{output} exists and is not empty; choose another --output")
        self.resumed, self.seconds = False, {}

    def claim(self) -> None:
        """Make the folder that of this run."""
        # An empty one is left by a run that ended before it had written its settings.
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            write_json(self.work / "settings.json", self.settings)

    def _holds_files(self) -> bool:
        """Whether `output` is there and holds more than an empty `work`."""
        if not self.output.is_dir():
            return self.output.exists()
        others = [path for path in self.output.iterdir() if path != self.work or not path.is_dir()]
        return bool(others) or (self.work.is_dir() and any(self.work.iterdir()))

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the JSON value of stage `name`: read if it is there, else made and written."""
        path = self.work / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return read_json(path)

    def folder(self, name: str) -> Path:
        """Make a folder of its own in `work`."""
        path = self.work / name
        path.mkdir(exist_ok=True)
        return path

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the time inside the block to `seconds[stage]`, over all runs of the command."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
            write_json(self.work / "seconds.json", self.seconds)

    def finish(self) -> None:
        """Remove `work`, which only a restart would have needed."""
        shutil.rmtree(self.work)
