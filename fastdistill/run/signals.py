"""Signals that ask a process to end, as Ctrl-C does: schedulers of clusters send SIGTERM, a closed
terminal SIGHUP."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


_asked: list[int] = []
"""Signals that came inside `stopping_in_order`."""


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """Raise `Stopped` at the first signal inside the block, so that it is left in order; a second
    signal ends the process at once. An ignored signal stays ignored, as under nohup.

    Code in C that was interrupted may raise an error of its own instead, for which `Stopped` is
    raised, too; or it may drop `Stopped`, for which long work calls `stop_if_asked`.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        _asked.append(number)
        raise Stopped(number)

    try:
        with _handled(stop, [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]):
            yield
    except Exception as error:
        if _asked:
            raise Stopped(_asked[0]) from error
        raise
    finally:
        _asked.clear()


def stop_if_asked() -> None:
    """Raise `Stopped` if a signal has come inside `stopping_in_order`."""
    if _asked:
        raise Stopped(_asked[0])


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back a signal that would raise inside the block, to its end; a second one ends the
    process at once."""
    earlier = {number: signal.getsignal(number) for number in ENDING}
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if came:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        came.append(number)

    with _handled(hold, [number for number, handler in earlier.items() if callable(handler)]):
        yield
    if came:
        os.kill(os.getpid(), came[0])


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any], numbers: list[signal.Signals]) -> Iterator[None]:
    """Handle signals inside the block; only the main thread can, and others leave them as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)
