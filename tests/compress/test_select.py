"""Reading ``--drop-blocks`` and choosing by score."""

import pytest

from fastdistill.compress.select import choose, parse, spell
from fastdistill.errors import UserError
from fastdistill.models.family import BlockId
from fastdistill.models.flux import Flux


def double(*indices):
    return [BlockId(stack="transformer_blocks", index=index) for index in indices]


def single(*indices):
    return [BlockId(stack="single_transformer_blocks", index=index) for index in indices]


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        (["double:1,2", "single:0,5-7"], double(1, 2) + single(0, 5, 6, 7)),
        (["single:3"], single(3)),
        (["transformer_blocks:0-2"], double(0, 1, 2)),
    ],
)
def test_lists(words, blocks):
    request = parse(words, Flux())
    assert request.count is None
    assert sorted(request.blocks) == sorted(blocks)
    assert sorted(choose(request, {})) == sorted(blocks)


def test_spelling_reads_back():
    blocks = double(0, 3) + single(1, 2)
    assert spell(blocks, Flux()) == "double:0,3 single:1,2"
    assert sorted(parse(spell(blocks, Flux()).split(), Flux()).blocks) == sorted(blocks)


@pytest.mark.parametrize(
    "words", [["0"], ["-1"], ["four"], ["double"], ["double:"], ["triple:1"], ["double:1,,2"], ["4", "5"], ["single:7-5"]]
)
def test_nonsense_is_refused_with_an_example(words):
    with pytest.raises(UserError, match=r"double:1,2|low to high|--drop-blocks"):
        parse(words, Flux())


def test_a_block_named_twice_is_refused():
    with pytest.raises(UserError, match="twice"):
        parse(["double:1", "double:0-2"], Flux())


def test_the_lowest_scores_go_and_ties_go_to_the_later_block():
    scores = dict(zip(double(0, 1, 2) + single(0, 1), [3.0, 1.0, 2.0, 1.0, 9.0], strict=True))
    assert choose(parse(["2"], Flux()), scores) == sorted(double(1) + single(0))
    assert choose(parse(["1"], Flux()), scores) == single(0)
