"""Learned masks: groups, draws, gates and updates on a network that stays as it was. Their scores:
test_importance.py."""

import contextlib
import dataclasses
from math import comb

import pytest
import torch

from fastdistill.compress.importance.criterion import CalibrationPoints, Material, SamplingRuns
from fastdistill.compress.importance.learned import Masks, Objective, Search, learned, partition
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.compress.importance.output_error import OutputError, predictions
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import family_of
from fastdistill.models.hooks import skipped
from fastdistill.models.patch import patched
from tests.tiny import mixing_transformer, tiny_inputs

DROPS = 2


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def transformer():
    return mixing_transformer()


def points_of(transformer, count=6):
    x_t, t, conditioning = tiny_inputs(transformer, batch=count)
    return CalibrationPoints(x_t=x_t, t=t, conditioning=conditioning)


def search_of(transformer, seed=0):
    """A search with an update that does something: a trained one is not zero."""
    rng = torch.Generator().manual_seed(seed)
    search = Search(transformer, family_of(transformer), DROPS, rng)
    with torch.no_grad():
        for update in search.updates:
            update.b.normal_(0, 0.02, generator=rng)
    return search


def objective_of(transformer, batch=6):
    family, points = family_of(transformer), points_of(transformer)
    reference = predictions(transformer, family, points, 6)
    return Objective(network=transformer, family=family, points=points, reference=reference, batch=batch)


def state_of(transformer):
    """Everything that a search could leave changed."""
    return (
        {name: value.clone() for name, value in transformer.state_dict().items()},
        {name: (parameter.requires_grad, parameter.grad) for name, parameter in transformer.named_parameters()},
        {name: module.__dict__.get("forward") for name, module in transformer.named_modules()},
        {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in transformer.named_modules()
        },
    )


def assert_untouched(transformer, before):
    weights, *rest = state_of(transformer)
    assert weights.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
    assert rest == list(before[1:])


@pytest.mark.parametrize(
    ("blocks", "drops"), [(12, 4), (12, 6), (12, 11), (57, 19), (57, 28), (57, 50), (99, 2), (5, 2), (1, 0)]
)
def test_groups_share_blocks_and_drops_evenly(blocks, drops):
    groups = partition(blocks, drops)
    kept, dropped = zip(*groups, strict=True)
    assert (sum(kept), sum(dropped)) == (blocks - drops, drops)
    assert max(kept) - min(kept) <= 1
    assert max(dropped) - min(dropped) <= 1
    if drops:
        assert min(kept + dropped) >= 1
    # Where a group needs more than 500 patterns, no more groups would have something to choose
    # each.
    assert max(comb(k + d, d) for k, d in groups) <= 500 or len(groups) == min(drops, blocks - drops)


def test_groups_are_as_large_as_500_patterns_allow():
    assert partition(12, 4) == [(8, 4)]
    assert partition(12, 6) == [(3, 3), (3, 3)]


@pytest.mark.parametrize("temperature", [4.0, 0.1])
def test_draws_are_patterns_as_often_as_their_probability(temperature):
    masks = Masks(12, 6)
    with torch.no_grad():
        masks.logits[0][3], masks.logits[1][5] = 3.0, -1.0
    gates = masks.draw(4000, temperature, torch.Generator().manual_seed(0))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert (gates[:, :6].sum(dim=1) == 3).all()
    assert (gates[:, 6:].sum(dim=1) == 3).all()
    assert gates.mean(dim=0).tolist() == pytest.approx(masks.kept(), abs=0.04)
    assert sum(masks.kept()) == pytest.approx(6)


def test_the_gradient_of_the_draws_turns_the_masks():
    masks = Masks(12, 6)
    optimizer = torch.optim.Adam(masks.parameters(), lr=0.5)
    harm = torch.arange(12.0)
    for step in range(60):
        loss = ((1 - masks.draw(16, 1.0, torch.Generator().manual_seed(step))) * harm).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = masks.kept()
    assert [position for position in range(12) if kept[position] < 0.1] == [0, 1, 2, 6, 7, 8]
    assert [position for position in range(12) if kept[position] > 0.9] == [3, 4, 5, 9, 10, 11]


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "patched"])
def test_every_sample_skips_the_blocks_of_its_own_gates(transformer, fused):
    family, points = family_of(transformer), points_of(transformer, count=3)
    blocks = block_ids(transformer, family)
    gates = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    with patched(transformer) if fused else contextlib.nullcontext():
        search = Search(transformer, family, DROPS, torch.Generator())
        with search.applied(gates):
            masked = predictions(transformer, family, points, 3)
        for row, sample in enumerate(points.chunks(1)):
            with skipped(
                transformer, family, [block_id for block_id, gate in zip(blocks, gates[row], strict=True) if not gate]
            ):
                expected = predictions(transformer, family, sample, 1)
            torch.testing.assert_close(masked[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_every_linear_layer_is_updated_patched_or_not(transformer):
    gradients = []
    for context in (contextlib.nullcontext(), patched(transformer)):
        with context:
            search, before = search_of(transformer), state_of(transformer)
            gates = search.masks.draw(6, 1.0, torch.Generator().manual_seed(0))
            value = objective_of(transformer).backward(search, torch.arange(6), gates)
            assert_untouched(transformer, before)
        gradients.append([torch.tensor(value), *(parameter.grad for parameter in search.parameters())])
    layers = sum(
        name.endswith(".weight") and value.dim() == 2
        for name, value in transformer.named_parameters()
        if "blocks." in name
    )
    assert len(search.updates) == layers
    silent = [index for index, gradient in enumerate(gradients[1]) if not gradient.any()]
    assert not silent
    for stock, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, stock, rtol=1e-3, atol=1e-5)


def test_a_step_is_the_same_in_any_batch(transformer):
    found = []
    for batch in (6, 4, 1):
        search = search_of(transformer)
        gates = search.masks.draw(6, 1.0, torch.Generator().manual_seed(0))
        value = objective_of(transformer, batch).backward(search, torch.tensor([3, 0, 5, 1, 4, 2]), gates)
        found.append([torch.tensor(value), *(parameter.grad for parameter in search.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-6)


def test_the_objective_is_the_joint_output_error_and_the_update_lowers_it(transformer):
    family, objective = family_of(transformer), objective_of(transformer)
    search = Search(transformer, family, DROPS, torch.Generator().manual_seed(0))
    gates = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], requires_grad=True).expand(6, 5)
    gone = [block_ids(transformer, family)[position] for position in (1, 4)]
    optimizer = search.optimizer()
    values = []
    for _ in range(12):
        values.append(objective.backward(search, torch.arange(6), gates))
        optimizer.step()
        optimizer.zero_grad()
    expected = OutputError(transformer, family, objective.points, 6).without(gone)
    assert values[0] == pytest.approx(expected, rel=1e-4)
    assert values[-1] < 0.9 * values[0]


def test_a_network_that_fails_is_left_as_it_was(transformer):
    before, objective, search = state_of(transformer), objective_of(transformer), search_of(transformer)
    objective = dataclasses.replace(objective, reference=objective.reference[:, :3])
    with pytest.raises(RuntimeError, match="size"):
        objective.backward(search, torch.arange(6), search.masks.draw(6, 1.0, torch.Generator()))
    assert_untouched(transformer, before)


def test_a_loss_that_is_not_finite_is_said(transformer):
    points = points_of(transformer)
    points.x_t[2] = torch.nan
    runs = SamplingRuns(noise=points.x_t, times=torch.linspace(1, 0, 3), conditioning=points.conditioning)
    with pytest.raises(UserError, match="not finite"):
        learned(transformer, family_of(transformer), Material(points=points, runs=runs, batch=6), Ledger())
