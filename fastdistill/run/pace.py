"""Line of a whole run at the beginning of each stage: which of how many, and how long in all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

LEAST_SECONDS = 1.0
"""Time below which a stage says nothing of the pace: its result was there, or it does not matter."""


class Pace:
    """Stages of a run in order, each with its work in any unit; what they take is learned from
    those that are done.

    Args:
        work: of each stage by its words, such as `{"calibrate": 11200, "score": 3000}`; 0 for one
            that says nothing of the pace of others.
    """

    def __init__(self, work: Mapping[str, float], console: Console) -> None:
        self.work, self.console = dict(work), console
        self.began = time.monotonic()
        self.left = list(self.work)
        self._seconds = self._done = 0.0

    @contextmanager
    def stage(self, words: str) -> Iterator[None]:
        """Say that the stage begins, and time it."""
        number = list(self.work).index(words) + 1
        self.left = list(self.work)[number - 1 :]
        self.console.print(f"stage {number} of {len(self.work)}: {words}{self._forecast()}", soft_wrap=True)
        began = time.monotonic()
        yield
        taken = time.monotonic() - began
        if taken >= LEAST_SECONDS and self.work[words]:
            self._seconds += taken
            self._done += self.work[words]
        self.left = self.left[1:]

    def _forecast(self) -> str:
        spent = time.monotonic() - self.began
        if not self._done:
            return ""
        in_all = spent + self._seconds / self._done * sum(self.work[words] for words in self.left)
        return f" · {duration(spent)} of about {duration(in_all)}"


def duration(seconds: float) -> str:
    """A time for people: `40 s`, `6 min`, `2 h 10 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
