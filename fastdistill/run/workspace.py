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
from fastdistill.run.inputs import Input, difference
from fastdistill.run.lock import FILE as LOCK
from fastdistill.run.lock import Lock, refuse_if_held
from fastdistill.run.resources import require_writable

SETTINGS = "settings.json"


class Workspace:
    """Folder `output` with its folder `work`, where every finished stage leaves its result.

    A run that is started again reads the results.

    Attributes:
        resumed: whether `output` holds this run, interrupted.
        trains_on: values of `more` at which the run was finished before; it goes on at the last.
        seconds: time of each stage, over all runs of the command.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], result: str, more: str | None = None) -> None:
        """Check that `output` is free for a run with `settings`, or holds that run, interrupted.

        Nothing is written before `claim`.

        Args:
            result: file that a run writes when it ends, with its options under `config`.
            more: option with a larger value of which a finished run is trained on.

        Raises:
            UserError: the folder holds a finished run, another run, or other files, another process
                works in it, or it cannot be written.
        """
        self.output, self.work, self.result, self.more = output, output / "work", result, more
        self.trains_on: list[int] = []
        self.settings = json.loads(json.dumps(settings, default=str))
        self._lock: Lock | None = None
        self._makes_output = False
        refuse_if_held(self.work)
        require_writable(output)
        self._check()

    def claim(self, inputs: Mapping[str, Input]) -> None:
        """Make the folder that of this process and this run, until `release`.

        Args:
            inputs: all that the run reads, each by a name that stays when the input is moved.

        Raises:
            UserError: another process works in the folder, or has finished a run there since, or
                the run that the folder holds began with other `inputs`.
        """
        current = {name: dict(found.items) for name, found in inputs.items()}
        self._makes_output = not self.output.exists()
        self._lock = Lock(self.work)
        try:
            self._check()
            if not self.resumed:
                begun = {"options": self.settings, "inputs": current, "trains_on": self.trains_on}
                write_json(self.work / SETTINGS, begun)
            earlier = read_json(self.work / SETTINGS)["inputs"]
            for name in current:
                if told := difference(earlier.get(name, {}), current[name]):
                    raise UserError(
                        f"{inputs[name].called} changed since the run in {self.output} began ({told}); "
                        "restore what was there, or choose another --output"
                    )
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Leave the folder to other processes, and remove `work` if it holds nothing."""
        if self._lock is not None:
            self._lock.release()
            if self.work.is_dir() and not any(self.work.iterdir()):
                self.work.rmdir()

    def withdraw(self) -> None:
        """Release the folder as it was before `claim`, unless something was done in it since."""
        begun = self.work.is_dir() and not self.resumed
        if begun and {path.name for path in self.work.iterdir()} == {SETTINGS, LOCK}:
            (self.work / SETTINGS).unlink()
        self.release()
        if self._makes_output and self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Release the folder at the end of the block; after an error, `withdraw` from it."""
        try:
            yield
        except Exception:
            self.withdraw()
            raise
        finally:
            self.release()

    def _check(self) -> None:
        """Raise `UserError` unless the folder is free or holds this run; note which."""
        recorded, timed = self.work / SETTINGS, self.work / "seconds.json"
        # A run that trains on a finished one has settings next to the earlier result.
        finished = (self.output / self.result).exists() and (self.more is None or not recorded.exists())
        if finished:
            self.trains_on = self._finished_with()
        self.resumed = recorded.exists()
        self.seconds: dict[str, float] = read_json(timed) if timed.exists() else {}
        if not self.resumed and not finished and self._holds_files():
            raise UserError(f"{self.output} exists and is not empty; choose another --output")
        if self.resumed:
            begun = read_json(recorded)
            earlier, self.trains_on = begun.get("options"), begun.get("trains_on", [])
            if earlier is None:
                raise UserError(
                    f"{self.output} holds an interrupted run of an earlier fastdistill; choose another --output"
                )
            changed = sorted(name for name in self.settings | earlier if self.settings.get(name) != earlier.get(name))
            if changed:
                names = ", ".join("--" + name.replace("_", "-") for name in changed)
                raise UserError(
                    f"{self.output} holds an interrupted run with another {names}; "
                    "repeat its options, or choose another --output"
                )

    def _finished_with(self) -> list[int]:
        """Values of `more` at which the run in the folder was finished, if this run is longer and
        else the same.

        Raises:
            UserError: it is another run, or not longer.
        """
        name = self.more or ""
        record = read_json(self.output / self.result)
        earlier = record.get("config", {})
        others = {each for each in self.settings if self.settings[each] != earlier.get(each)} - {name}
        reached = earlier.get(name)
        if not others and reached is not None and self.settings[name] > reached:
            return [*record.get("trained_on", []), reached]
        further = f", train it on with more --{name.replace('_', '-')} than {reached}" if name and not others else ""
        raise UserError(
            f"{self.output} holds a finished run; see {self.output / 'report.md'}{further}, or choose another --output"
        )

    def _holds_files(self) -> bool:
        """Whether `output` is there and holds more than a `work` that is empty but for a lock."""
        if not self.output.is_dir():
            return self.output.exists()
        others = [path for path in self.output.iterdir() if path != self.work or not path.is_dir()]
        left = {path.name for path in self.work.iterdir()} if self.work.is_dir() else set()
        return bool(others) or bool(left - {LOCK})

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
        """Remove `work`, which only a restart would have needed, and release the folder."""
        # First its name: a process that begins now must not find half of it.
        done = self.output / f"{self.work.name}.done"
        shutil.rmtree(done, ignore_errors=True)
        self.work.rename(done)
        self.release()
        shutil.rmtree(done)
