"""Reading `--budget`."""

import pytest

from fastdistill.compress.choice.budget import parse_budget, show
from fastdistill.errors import UserError


@pytest.mark.parametrize(
    ("text", "full", "limit"),
    [
        ("params=0.66", 100, 66),
        ("latency=0.7", 10**9, 7 * 10**8),
        ("params=8B", 0, 8 * 10**9),
        ("params=8.163b", 0, 8_163_000_000),
        ("memory=8GiB", 0, 8 * 2**30),
        ("memory=500MB", 0, 5 * 10**8),
        ("latency=40ms", 0, 40 * 10**6),
        ("latency=1.5 s", 0, 15 * 10**8),
        ("flops=60T", 0, 6 * 10**13),
        ("flops=.5", 3, 1),
    ],
)
def test_budgets(text, full, limit):
    assert parse_budget(text).limit(full) == limit


def test_fractions_are_exact():
    # In floats 0.29 * 100 is below 29.
    assert parse_budget("params=0.29").limit(100) == 29


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.66", "params=0.66"),
        ("size=3", "params=0.66"),
        ("params", "params takes a fraction"),
        ("params=", "params takes a fraction"),
        ("params=8GiB", "K, M, B"),
        ("memory=-1GiB", "MiB, GB, GiB"),
        ("latency=40", "40ms"),
        ("params=1", "between 0 and 1"),
        ("params=0", "between 0 and 1"),
        ("params=0B", "leaves nothing"),
    ],
)
def test_nonsense_is_refused_with_an_example(text, message):
    with pytest.raises(UserError) as refused:
        parse_budget(text)
    assert message in str(refused.value)


def test_costs_are_shown_with_their_unit():
    shown = [
        show("params", 8.163e9),
        show("memory", 2**29),
        show("latency", 1_234_567),
        show("flops", 6e13),
        show("blocks", 6),
    ]
    assert shown == ["8.163 B", "512.00 MiB", "1.23 ms", "60.000 TFLOP", "6 blocks"]
