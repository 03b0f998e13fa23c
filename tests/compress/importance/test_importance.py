"""Pruning criteria: planted blocks, repeatability, scorings that are killed, and what they cost."""

import pytest
import torch
from rich.console import Console

from fastdistill.compress.importance import CRITERIA, DEPEND_ON_DROPS, learned
from fastdistill.compress.importance.calibrate import Amount, calibrated
from fastdistill.compress.importance.cka import Grams, distance
from fastdistill.compress.importance.criterion import CalibrationPoints, Material, SamplingRuns
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.compress.importance.output_error import OutputError, predictions, time_weight
from fastdistill.compress.importance.probe import intervals, probe
from fastdistill.compress.importance.trajectory import ends, shortened
from fastdistill.data.trajectories import Source
from fastdistill.models.blocks import block, block_ids
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.hooks import one_out, skipped
from fastdistill.models.patch import patched
from fastdistill.models.sampling import SamplingDefaults
from tests.tiny import mixing_transformer, tiny_flux_pipeline, tiny_inputs

USELESS = BlockId(stack="single_transformer_blocks", index=1)
VITAL = BlockId(stack="single_transformer_blocks", index=0)
INFORMED = [name for name in CRITERIA if name != "random"]


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of tiny forward passes: a second thread gives them nothing, and waiting for it on a
    busy machine takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    """Planted blocks are learned in few steps at a high rate."""
    monkeypatch.setattr(learned, "STEPS", 24)
    monkeypatch.setattr(learned, "STEPS_A_PIECE", 6)
    monkeypatch.setattr(learned, "LOGIT_RATE", 2.0)


@pytest.fixture
def transformer():
    return mixing_transformer()


@pytest.fixture
def planted(transformer):
    with torch.no_grad():
        useless, vital = (block(transformer, block_id) for block_id in (USELESS, VITAL))
        useless.proj_out.weight.mul_(1e-4)
        useless.proj_out.bias.zero_()
        vital.proj_out.weight.mul_(20)
    return transformer


def material(transformer, count=6, batch=4, **options):
    x_t, t, conditioning = tiny_inputs(transformer, batch=count)
    points = CalibrationPoints(x_t=x_t, t=t, conditioning=conditioning)
    runs = SamplingRuns(noise=x_t, times=torch.linspace(1, 0, 9), conditioning=conditioning)
    return Material(points=points, runs=runs, batch=batch, **options)


def scored(criterion, transformer, *, ledger=None, **options):
    return CRITERIA[criterion](
        transformer, family_of(transformer), material(transformer, **options), ledger or Ledger()
    )


def block_calls(transformer):
    """Counts the blocks that do their work: their first module is called."""
    calls = []
    for block_id in block_ids(transformer, family_of(transformer)):
        inner = block(transformer, block_id)
        norm = inner.norm1 if hasattr(inner, "norm1") else inner.norm
        norm.linear.register_forward_hook(lambda *_, block_id=block_id: calls.append(block_id))
    return calls


@pytest.mark.parametrize("criterion", INFORMED)
def test_a_planted_useless_block_scores_lowest_and_a_vital_one_highest(planted, criterion):
    shares = []
    # Masks are learned for a number of drops: of more than one, others would score as low.
    drops = 1 if criterion == "learned" else None
    scores = scored(criterion, planted, ledger=Ledger(tick=shares.append), drops=drops)
    assert list(scores) == block_ids(planted, family_of(planted))
    assert shares == sorted(shares)
    assert shares[-1] == 1
    others = [value for block_id, value in scores.items() if block_id != USELESS]
    assert scores[USELESS] < 0.01 * min(others)
    assert scores[VITAL] == max(others)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_seed_gives_the_same_scores_and_the_batch_none_other(transformer, criterion):
    first, second = (scored(criterion, transformer, batch=6, seed=3) for _ in range(2))
    assert first == second
    # A training makes much of a rounding: of `learned`, a test of its own compares a single step.
    if criterion != "learned":
        smaller = scored(criterion, transformer, batch=2, seed=3)
        assert list(smaller.values()) == pytest.approx(list(first.values()), rel=1e-4, abs=1e-7)
    if criterion in ("random", "taylor", "learned"):
        assert scored(criterion, transformer, batch=6, seed=4) != first


class Kill(Exception):
    pass


@pytest.mark.slow_but_first
@pytest.mark.parametrize("criterion", [name for name in INFORMED if name not in ("cka", "probe")])
def test_a_killed_scoring_goes_on_with_the_next_piece(transformer, tmp_path, criterion):
    # A piece is a chunk of the points, but for a training.
    path, shares, batch = tmp_path / "scores.jsonl", [], 6 if criterion == "learned" else 1
    expected = scored(criterion, transformer, batch=batch, ledger=Ledger(tick=shares.append))
    pieces = len(shares)
    kept = pieces * 2 // 3

    def kill(share):
        if share >= kept / pieces:
            raise Kill

    with pytest.raises(Kill):
        scored(criterion, transformer, batch=batch, ledger=Ledger(path, kill))
    # Killed in the middle of a line.
    with path.open("a") as file:
        file.write('{"half')
    again = []
    assert scored(criterion, transformer, batch=batch, ledger=Ledger(path, again.append)) == expected
    assert len(again) == pieces - kept
    calls = block_calls(transformer)
    assert scored(criterion, transformer, batch=batch, ledger=Ledger(path)) == expected
    # References at most: nothing that is in the ledger is computed again.
    assert len(calls) <= 6 * len(expected)
    assert not any("forward" in module.__dict__ for module in transformer.modules())


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "patched"])
def test_sharing_the_prefix_gives_the_scores_of_plain_skipping(transformer, fused):
    family, points = family_of(transformer), material(transformer).points
    if fused:
        patched(transformer)
    forwards = {name: module.__dict__.get("forward") for name, module in transformer.named_modules()}
    error = OutputError(transformer, family, points, 4)
    scores = scored("output", transformer)
    for block_id, value in scores.items():
        assert value == pytest.approx(error.without([block_id]), rel=1e-6)
    assert {name: module.__dict__.get("forward") for name, module in transformer.named_modules()} == forwards


@pytest.mark.parametrize("first", [0, 1, 3])
def test_one_out_with_other_blocks_skipped_equals_skipping_both(transformer, first):
    family = family_of(transformer)
    x, t, conditioning = tiny_inputs(transformer)
    gone = BlockId(stack="transformer_blocks", index=1)
    left = [block_id for block_id in block_ids(transformer, family) if block_id != gone]

    def run():
        return family.predict(transformer, x, t, conditioning)

    with torch.no_grad():
        with skipped(transformer, family, [gone]):
            results = list(one_out(transformer, family, left, run, first))
        for block_id, result in zip(left[first:], results, strict=True):
            with skipped(transformer, family, [gone, block_id]):
                torch.testing.assert_close(result, run(), rtol=1e-6, atol=1e-6)


def test_one_out_runs_half_of_the_blocks():
    transformer = mixing_transformer(num_layers=4, num_single_layers=6)
    n, family = 10, family_of(transformer)
    x, t, conditioning = tiny_inputs(transformer)
    calls = block_calls(transformer)
    with torch.no_grad():
        for index, _ in enumerate(
            one_out(
                transformer,
                family,
                block_ids(transformer, family),
                lambda: family.predict(transformer, x, t, conditioning),
            )
        ):
            assert not any("forward" in module.__dict__ for module in transformer.modules()), index
    assert len(calls) == n * (n + 1) // 2 - 1
    calls.clear()
    scored("output", transformer, count=2, batch=2)
    assert len(calls) == n + n * (n + 1) // 2 - 1


def test_one_out_undoes_itself_when_a_run_fails(transformer):
    family = family_of(transformer)

    def run():
        raise Kill

    with pytest.raises(Kill):
        next(one_out(transformer, family, block_ids(transformer, family), run))
    assert not any("forward" in module.__dict__ for module in transformer.modules())


def test_early_times_weigh_more():
    weights = time_weight(torch.tensor([1.0, 0.5, 0.0]))
    assert weights[[0, 2]].tolist() == pytest.approx([1.2, 0.8])
    assert 0.8 < weights[1] < 1.0


def test_taylor_is_the_slope_of_a_fading_block(transformer):
    """Against finite differences: ||(v(1 + h) - v(1 - h)) / 2h||^2, of the last block, and within
    the spread of the draws."""
    family, points = family_of(transformer), material(transformer, count=64).points
    last = block(transformer, BlockId(stack="single_transformer_blocks", index=2))
    scores = scored("taylor", transformer, count=64, batch=64)
    outputs = []
    with torch.no_grad():
        for gate in (1.01, 0.99, 1.0):
            last.proj_out.weight.mul_(gate), last.proj_out.bias.mul_(gate)
            outputs.append(predictions(transformer, family, points, 64))
            last.proj_out.weight.div_(gate), last.proj_out.bias.div_(gate)
    slope = (outputs[0] - outputs[1]) / 0.02
    expected = float(slope.square().sum() / outputs[2].square().sum())
    assert scores[BlockId(stack="single_transformer_blocks", index=2)] == pytest.approx(expected, rel=0.3)


def test_greedy_sees_that_two_blocks_stand_for_each_other(transformer):
    """The addition of the second of two blocks depends on the first: the joint errors of greedy are
    those of skipping what it drops."""
    family, points = family_of(transformer), material(transformer).points
    scores = scored("greedy", transformer)
    error = OutputError(transformer, family, points, 4)
    order = sorted(scores, key=scores.__getitem__)
    highest = 0.0
    for count in range(1, len(order)):
        highest = max(highest, error.without(order[:count]))
        assert scores[order[count - 1]] == pytest.approx(highest, rel=1e-5)
    shorter = scored("greedy", transformer, drops=2)
    assert sorted(shorter, key=shorter.__getitem__)[:2] == order[:2]


def test_linear_cka_in_chunks_is_its_definition():
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64) + 3
    z = torch.randn(40, 6, dtype=torch.float64) * 0.3
    grams = Grams.of(x[:15], z[:15])
    grams.add(Grams.of(x[15:], z[15:]))
    x_c, y_c = (value - value.mean(dim=0) for value in (x, x + z))
    cka = (y_c.T @ x_c).square().sum() / ((x_c.T @ x_c).norm() * (y_c.T @ y_c).norm())
    assert distance(grams) == pytest.approx(float(1 - cka), rel=1e-9)
    assert distance(Grams.of(x, torch.zeros_like(x))) == 0
    # It sees neither a scale nor a rotation.
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert distance(Grams.of(x, 2 * x @ rotation - x)) == pytest.approx(0, abs=1e-12)


def test_a_probe_finds_a_linear_block():
    torch.manual_seed(0)
    x, w = torch.randn(200, 8), torch.randn(8, 8)
    torch.testing.assert_close(probe(x, x @ w), w, rtol=1e-4, atol=1e-4)


def test_an_interval_ends_where_it_gets_worse_faster():
    rows = {0: [0.1, 0.15, 0.18, 0.4], 3: [0.3, 0.5], 4: [0.2]}
    # From 0: 0.1, then 0.05, then 0.03 more, then 0.22. From 3: 0.3, then 0.2 more.
    assert intervals(5, lambda u: iter(rows[u])) == [range(0, 3), range(3, 5)]


@pytest.mark.parametrize("true_cfg_scale", [1.0, 2.5])
def test_a_trajectory_in_all_steps_is_the_pipelines_own(true_cfg_scale, tmp_path):
    pipeline = tiny_flux_pipeline()
    family = family_of(pipeline.transformer)
    sampling = SamplingDefaults(
        num_inference_steps=5, true_cfg_scale=true_cfg_scale, height=64, width=64, max_sequence_length=16
    )
    source = Source(pipeline=pipeline, prompts=["a", "b"], sampling=sampling)
    amount = Amount(images=4, steps=5, points=3, batch=2)
    calibration = calibrated(source, amount, cache=tmp_path / "calibration", console=Console(quiet=True))
    runs = calibration.runs
    torch.testing.assert_close(
        ends(pipeline.transformer, family, runs), calibration.pool.latents[:3], rtol=1e-4, atol=1e-4
    )
    assert len(shortened(runs, 2).times) == 3
    assert len(shortened(runs, 9).times) == 6


@pytest.mark.parametrize("criterion", CRITERIA)
def test_only_some_scores_depend_on_how_many_blocks_go(transformer, criterion):
    """The scores of the others are kept for every number."""
    few, many = (scored(criterion, transformer, drops=drops) for drops in (1, 3))
    assert (few != many) == (criterion in DEPEND_ON_DROPS)
