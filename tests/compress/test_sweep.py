"""Sizes that are asked for together, and which of their models is not surpassed."""

import numpy as np
import pytest

from fastdistill.compress import CompressConfig
from fastdistill.compress.sweep import front
from fastdistill.errors import UserError


def record(parameters, distance):
    return {"parameters": {"compressed": parameters}, "saved": "cut", "distances": {"cut": distance}}


def test_the_front_of_size_and_quality():
    records = {
        "a": record(10, 0.1),
        "b": record(8, 0.2),
        "c": record(9, 0.3),
        "d": record(8, 0.2),
        "e": record(10, 0.1),
    }
    assert front(records) == ["a", "b", "d", "e"]
    assert front({"a": record(10, 0.1), "b": record(8, 0.05)}) == ["b"]


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({"drop_blocks": 4}, [("4",)]),
        ({"drop_blocks": np.int64(4)}, [("4",)]),
        ({"drop_blocks": (2, 4, 6)}, [("2",), ("4",), ("6",)]),
        ({"drop_blocks": "2 4"}, [("2",), ("4",)]),
        ({"drop_blocks": ("double:1", "single:0")}, [("double:1", "single:0")]),
        ({"budget": "params=0.8"}, [("params=0.8",)]),
        ({"budget": ["params=0.8", "memory=1MiB"]}, [("params=0.8",), ("memory=1MiB",)]),
    ],
)
def test_sizes(asked, sizes):
    config = CompressConfig(**asked)
    assert config.sizes == sizes
    assert all(CompressConfig(**{next(iter(asked)): words}).sizes == [words] for words in sizes)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"drop_blocks": (2, 2)}, "--drop-blocks 2 2 asks for the same size twice"),
        ({"budget": ("params=0.8", "params=2")}, "fraction of the full model"),
        ({"drop_blocks": True}, "whole number"),
        ({"drop_blocks": 2.0}, "whole number"),
        ({"drop_blocks": 2, "budget": "params=0.8"}, "give either"),
        ({"drop_blocks": (), "budget": None}, "give either"),
    ],
)
def test_sizes_that_are_none(asked, message):
    with pytest.raises(UserError, match=message):
        CompressConfig(**asked)
