"""The line of a whole run: which stage, and how long in all."""

import io

import pytest
from rich.console import Console

from fastdistill.run import pace
from fastdistill.run.pace import Pace, duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def run(clock, work, taken):
    said = io.StringIO()
    whole = Pace(work, Console(file=said, width=200))
    for words in work:
        with whole.stage(words):
            clock[0] += taken[words]
    return said.getvalue().splitlines()


def test_time_in_all_follows_from_what_is_done(clock):
    lines = run(clock, {"draw": 10, "train": 80, "measure": 10}, {"draw": 30, "train": 200, "measure": 40})
    # 30 s for a tenth are 300 s; 230 s for nine tenths leave 26 s.
    assert lines == [
        "stage 1 of 3: draw",
        "stage 2 of 3: train · 30 s of about 5 min",
        "stage 3 of 3: measure · 4 min of about 4 min",
    ]


def test_a_result_that_was_there_says_nothing_of_the_pace(clock):
    lines = run(clock, {"draw": 10, "calibrate": 1000, "train": 100}, {"draw": 20, "calibrate": 0.1, "train": 200})
    assert lines[2] == "stage 3 of 3: train · 20 s of about 4 min"


def test_a_stage_without_work_says_nothing_of_the_pace(clock):
    lines = run(clock, {"first": 0, "draw": 10, "train": 90}, {"first": 50, "draw": 20, "train": 180})
    assert lines[1:] == ["stage 2 of 3: draw", "stage 3 of 3: train · 70 s of about 4 min"]


def test_without_any_pace_nothing_is_promised(clock):
    assert run(clock, {"a": 1, "b": 1}, {"a": 0.2, "b": 9})[1] == "stage 2 of 2: b"


def test_times_for_people():
    assert [duration(seconds) for seconds in (0.4, 89, 91, 360, 5369, 7800)] == [
        "0 s", "89 s", "2 min", "6 min", "89 min", "2 h 10 min"
    ]  # fmt: skip
