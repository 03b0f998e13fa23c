"""The speed of two models, timed in turns: what the machine does meanwhile does not take sides."""

import time

import pytest
import torch

from fastdistill.compress import speed as module
from fastdistill.compress.report import faster
from fastdistill.compress.speed import ROUNDS, Speed, speed
from fastdistill.models.families.family import Workload


class Network:
    device = torch.device("cpu")

    def __init__(self, seconds, machine):
        self.seconds, self.machine = seconds, machine

    def __call__(self, **arguments):
        assert not torch.is_grad_enabled()
        self.machine.pass_of(self.seconds)


class Machine:
    """Clock of a machine that slows down more and more."""

    def __init__(self, slower=1.0):
        self.now, self.slower, self.factor = 0.0, slower, 1.0

    def pass_of(self, seconds):
        self.now += seconds * self.factor
        self.factor *= self.slower


class Anatomy:
    @staticmethod
    def example(network, load):
        return {}


@pytest.mark.parametrize("slower", [1.0, 1.05, 1.2])
def test_a_busy_machine_changes_times_and_not_their_ratio(monkeypatch, slower):
    machine = Machine(slower)
    monkeypatch.setattr(module.time, "perf_counter", lambda: machine.now)
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    load = Workload(height=8, width=8, text_tokens=4)
    found = speed(Network(0.012, machine), Network(0.010, machine), Anatomy(), load).as_json()
    low, high = found["times_faster_between"]
    assert low <= found["times_faster"] <= high
    # Who comes first in a round changes, so that each has its turn in the slower place.
    assert found["times_faster"] == pytest.approx(1.2, rel=slower - 1 + 1e-9)
    assert low <= 1.2 * (1 + 1e-9)
    assert high >= 1.2 * (1 - 1e-9)
    assert found["rounds"] == ROUNDS


def test_slow_models_are_timed_less_often(monkeypatch):
    machine = Machine()
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: machine.now)
    load = Workload(height=8, width=8, text_tokens=4)
    found = speed(Network(20.0, machine), Network(10.0, machine), Anatomy(), load).as_json()
    assert found["rounds"] == 3
    assert found["times_faster"] == pytest.approx(2)


def test_doubt_is_told_in_place_of_a_speed():
    sure = Speed(full=[12.0, 12.1, 12.2], compressed=[10.0, 10.1, 10.0]).as_json()
    unsure = Speed(full=[12.0, 9.0, 12.2], compressed=[10.0, 12.1, 12.3]).as_json()
    assert faster(sure) == "1.21 times as fast (1.20 to 1.22)"
    assert faster(unsure) == "no sure difference (0.74 to 1.20 times as fast)"


def test_the_ratio_is_that_of_the_times_next_to_it():
    """On a busy machine a round's ratio may say the opposite of the medians."""
    found = Speed(full=[4.0, 4.1, 9.0, 3.9, 8.0], compressed=[6.0, 2.0, 6.1, 6.2, 2.1]).as_json()
    assert found["times_faster"] == found["full_ms"] / found["compressed_ms"] == 4.1 / 6.0
    low, high = found["times_faster_between"]
    assert low <= found["times_faster"] <= high
