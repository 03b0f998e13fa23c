"""Progress bar with the time left on a terminal; elsewhere a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 10.0


@contextmanager
def bar(console: Console, describe: str, total: int, *, start: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(count, note="")`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    began = spoke = time.monotonic()
    done: float = start
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(describe, total=total, completed=start, note="")

        def advance(count: int, note: str = "") -> None:
            nonlocal done, spoke
            # Parts of a whole may be counted, whose sum is not exact.
            done = round(done + count, 6)
            progress.update(task, completed=done, note=note)
            now = time.monotonic()
            if not console.is_terminal and (now - spoke > PLAIN_EVERY_SECONDS or done >= total):
                spoke = now
                left = (now - began) / max(1e-6, done - start) * (total - done)
                console.print(
                    f"{describe}: {int(done)}/{total} {note}{',' if note else ''} {max(0.0, left):.0f} s left",
                    highlight=False,
                )

        yield advance


@contextmanager
def share_bar(console: Console, describe: str, total: int = 100) -> Iterator[Callable[[float], None]]:
    """Yield `tick(share)`, for work that knows the share that is done."""
    shown = 0
    with bar(console, describe, total) as advance:

        def tick(share: float) -> None:
            nonlocal shown
            reached = int(share * total)
            advance(reached - shown)
            shown = reached

        yield tick
