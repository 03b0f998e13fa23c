"""Signals that end a process in order, and the second one that does not wait."""

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from fastdistill.run.signals import Stopped, stop_if_asked, stopping_in_order

SCRIPT = """
import sys, time
from fastdistill.run.signals import Stopped, held_back, stopping_in_order
try:
    with stopping_in_order():
        if "held" in sys.argv:
            with held_back():
                print("ready", flush=True)
                time.sleep(1)
                print("whole", flush=True)
        else:
            print("ready", flush=True)
            time.sleep(60)
except Stopped as stop:
    print("stopped", flush=True)
    if "slow" in sys.argv:
        time.sleep(60)
    sys.exit(stop.exit_code)
"""


def begun(*options: str, before: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", before + SCRIPT, *options], stdout=subprocess.PIPE, text=True)
    assert said(process) == "ready"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=["TERM", "INT", "HUP"]
)
def test_the_first_signal_ends_in_order_and_the_second_at_once(number: signal.Signals, code: int) -> None:
    process = begun()
    process.send_signal(number)
    assert said(process) == "stopped"
    assert process.wait(10) == code
    process = begun("slow")
    process.send_signal(number)
    assert said(process) == "stopped"
    process.send_signal(number)
    assert process.wait(10) == -number


def test_what_is_held_back_is_done_whole() -> None:
    process = begun("held")
    process.send_signal(signal.SIGTERM)
    assert said(process) == "whole"
    assert said(process) == "stopped"
    assert process.wait(10) == 143
    process = begun("held")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) < 0


def test_an_ignored_signal_stays_ignored() -> None:
    process = begun(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


def test_a_signal_is_an_interruption_to_whoever_knows_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        raise Stopped(signal.SIGTERM)


def turned() -> None:
    with stopping_in_order():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None


def dropped() -> None:
    with stopping_in_order():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        stop_if_asked()


@pytest.mark.parametrize("code", [turned, dropped])
def test_code_that_turns_the_interruption_into_an_error_or_drops_it(code: Callable[[], None]) -> None:
    with pytest.raises(Stopped, match="SIGTERM"):
        code()
    stop_if_asked()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="its own"), stopping_in_order():
        raise ValueError("its own")
