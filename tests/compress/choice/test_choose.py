"""Reading `--drop-blocks`, choosing by score and budget, and verifying the choice."""

import pytest
import torch

from fastdistill.compress.choice.budget import parse_budget
from fastdistill.compress.choice.choose import Evidence, Request, Trial, choose, limit_of, parse, spell
from fastdistill.compress.choice.costs import Cost, flops, sizes
from fastdistill.compress.choice.verify import Verified, additivity, intervals
from fastdistill.compress.importance.criterion import CalibrationPoints
from fastdistill.compress.importance.output_error import OutputError
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Workload
from fastdistill.models.families.flux import Flux
from tests.tiny import tiny_flux_pipeline, tiny_inputs


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


def test_spelling_reads_back():
    blocks = double(0, 3) + single(1, 2)
    assert spell(blocks, Flux()) == "double:0,3 single:1,2"
    assert sorted(parse(spell(blocks, Flux()).split(), Flux()).blocks) == sorted(blocks)


@pytest.mark.parametrize(
    "words",
    [["0"], ["-1"], ["four"], ["double"], ["double:"], ["triple:1"], ["double:1,,2"], ["4", "5"], ["single:7-5"]],
)
def test_nonsense_is_refused_with_an_example(words):
    with pytest.raises(UserError, match=r"double:1,2|low to high|--drop-blocks"):
        parse(words, Flux())


def test_a_block_named_twice_is_refused():
    with pytest.raises(UserError, match="twice"):
        parse(["double:1", "double:0-2"], Flux())


TINY = double(0, 1) + single(0, 1, 2)


def chosen(request, costs, errors, best=1, joint=None, runs=None):
    """`joint` is the error of a set of positions; by default errors add up."""
    scores = dict(zip(TINY, errors, strict=True))
    adds_up = joint or (lambda positions: sum(errors[position] for position in positions))
    return choose(request, costs, Evidence(scores=scores, intervals=runs), Trial(joint=adds_up, sets=best))


def count_costs():
    return {"blocks": Cost(blocks=dict.fromkeys(TINY, 1), outside=0)}


def test_the_lowest_scores_go_and_ties_go_to_the_later_block():
    errors = [3.0, 1.0, 2.0, 1.0, 9.0]
    assert chosen(parse(["2"], Flux()), count_costs(), errors).dropped == double(1) + single(1)
    assert chosen(parse(["1"], Flux()), count_costs(), errors).dropped == single(1)


def test_named_blocks_go_and_nothing_is_measured():
    selection = chosen(parse(["single:2", "double:0"], Flux()), count_costs(), [9.0, 1, 1, 1, 9.0])
    assert selection.dropped == double(0) + single(2)
    assert (selection.quantity, selection.full, selection.limit) == ("blocks", 5, 3)
    assert selection.verified == selection.front == []


@pytest.fixture(scope="module")
def tiny_costs():
    """Costs of a real transformer: by parameters a double block is 2.4 single ones, by operations
    one; by time, say, one too."""
    transformer = tiny_flux_pipeline().transformer
    costs = sizes(transformer, Flux(), 2)
    costs["flops"] = flops(transformer, Flux(), Workload(height=8, width=8, text_tokens=5))
    costs["latency"] = Cost(blocks=dict.fromkeys(block_ids(transformer, Flux()), 10**6), outside=10**5)
    return costs


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("memory=0.75", double(1)),
        ("params=0.75", double(1)),
        ("latency=0.65", single(1, 2)),
        ("flops=0.65", single(1, 2)),
    ],
)
def test_the_type_of_the_budget_changes_the_choice(tiny_costs, budget, expected):
    # One double block saves more memory than two single ones and errs less than they do together;
    # in time one block is too few.
    assert tiny_costs["params"].blocks[TINY[0]] > 2 * tiny_costs["params"].blocks[TINY[4]]
    selection = chosen(Request(budget=parse_budget(budget)), tiny_costs, [5.0, 1.6, 5.0, 1.0, 1.0])
    assert selection.dropped == expected
    left = tiny_costs[selection.quantity].left(selection.dropped)
    assert left <= selection.limit < tiny_costs[selection.quantity].total
    assert selection.front[0].dropped == ()
    assert len(selection.front) > 3


def test_budgets_that_cannot_be_met(tiny_costs):
    for quantity, cost in tiny_costs.items():
        if quantity != "blocks":
            least = cost.outside + min(cost.blocks.values())
            smallest = limit_of(parse_budget(f"{quantity}={least / cost.total + 1e-9:.12f}"), cost)
            assert smallest == least
            with pytest.raises(UserError, match=r"cannot be met.*ask for no less"):
                limit_of(parse_budget(f"{quantity}={least / cost.total - 1e-6:.12f}"), cost)
    with pytest.raises(UserError, match="drops nothing"):
        limit_of(parse_budget("params=900B"), tiny_costs["params"])


def test_the_best_measured_set_wins_though_it_was_not_predicted_to():
    errors = [1.0, 1.1, 1.2, 9.0, 9.0]
    measured = {(0, 1): 50.0, (0, 2): 4.0, (1, 2): 3.0}
    selection = chosen(
        Request(count=2), count_costs(), errors, best=3, joint=lambda positions: measured.get(positions, 100.0)
    )
    assert selection.dropped == double(1) + single(0)
    eligible = [found for found in selection.verified if found.eligible]
    assert [found.dropped for found in eligible] == [(0, 1), (0, 2), (1, 2)]
    # Sets of other sizes are there for the additivity only.
    assert len(selection.verified) > 3
    assert selection.additivity.sets == len(selection.verified)


def test_a_run_that_was_scored_counts_as_scored():
    errors = [1.0, 1.0, 1.5, 9.0, 9.0]
    assert chosen(Request(count=2), count_costs(), errors).dropped == double(0, 1)
    assert chosen(Request(count=2), count_costs(), errors, runs={(0, 1): 7.0}).dropped == double(1) + single(0)
    assert chosen(Request(count=2), count_costs(), errors, runs={(3, 4): 0.5}).dropped == single(1, 2)


def test_intervals():
    assert list(intervals(3, 2)) == [(0, 1), (1, 2)]
    assert list(intervals(3, 9)) == [(0, 1), (1, 2)], "all blocks are no candidate"
    assert list(intervals(3, 1)) == []


def verified(pairs):
    return [
        Verified(dropped=(index,), saved=1, score=expected, predicted=expected, joint=joint, eligible=True)
        for index, (expected, joint) in enumerate(pairs)
    ]


def test_additivity():
    assert additivity(verified([(1, 1), (2, 2), (4, 4)])).r2 == 1
    doubled = additivity(verified([(1, 2), (2, 4), (4, 8)]))
    assert doubled.r2_linear == pytest.approx(1)
    assert doubled.r2 == pytest.approx(1 - 21 / (56 / 3))
    assert additivity(verified([(1, 2), (2, 4)])).r2 is None
    assert additivity(verified([(1, 2), (2, 2), (3, 2)])).r2 is None
    assert additivity(verified([(1, 2), (1, 3), (1, 4)])).r2_linear is None


def test_on_a_real_network_the_choice_is_the_best_of_what_was_measured():
    transformer = tiny_flux_pipeline().transformer
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" in name and name.endswith("linear.weight"):
                parameter.mul_(5)
    x_t, t, conditioning = tiny_inputs(transformer, batch=4)
    points = CalibrationPoints(x_t=x_t, t=t, conditioning=conditioning)
    error = OutputError(transformer, Flux(), points, 4)

    def joint(positions):
        return error.without([TINY[position] for position in positions])

    errors = [joint((position,)) for position in range(5)]
    runs = {run: joint(tuple(range(run[0], run[1] + 1))) for run in intervals(5, 2)}
    selection = chosen(Request(count=2), count_costs(), errors, best=10, joint=joint, runs=runs)
    everything = {(i, j): joint((i, j)) for j in range(5) for i in range(j)}
    assert min(everything, key=everything.get) == tuple(TINY.index(block_id) for block_id in selection.dropped)
    assert 0 <= selection.additivity.r2_linear <= 1
