"""`calibrate`, `score`, `select`, `cut` and `repair` from Python."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from fastdistill.compress import calibrate, cut, repair, score, select
from fastdistill.compress.importance.calibrate import Calibration
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import anatomy_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.sampling import SamplingDefaults
from tests import tiny_families as tiny
from tests.tiny import mixing_transformer, tiny_flux_pipeline

SMALL = {"height": 64, "width": 64, "max_sequence_length": 8, "points": 4, "steps": 2}
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pipeline():
    pipeline = tiny_flux_pipeline()
    pipeline.transformer = mixing_transformer()
    return pipeline


def ids(**stacks):
    return [BlockId(stack=stack, index=index) for stack, indices in stacks.items() for index in indices]


def test_the_readme(tmp_path, monkeypatch):
    """Word for word, on a pipeline whose folder says how it is sampled."""
    tiny_flux_pipeline().save_pretrained(tmp_path)
    SamplingDefaults(num_inference_steps=2, height=64, width=64, max_sequence_length=8).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if "from fastdistill.compress import calibrate" in line)
    snippet = [line.strip() for line in lines[start : lines.index("", start)]]
    names = {"pipeline": DiffusionPipeline.from_pretrained(tmp_path)}
    names["pipeline"].set_progress_bar_config(disable=True)
    exec("\n".join(snippet), names)
    assert len(snippet) == 7
    assert len(names["drop"]) == 4
    worst = max(names["scores"], key=names["scores"].get)
    assert worst not in names["drop"]
    assert len(block_ids(names["smaller"], anatomy_of(names["smaller"]))) == 1
    assert (tmp_path / "smaller" / "config.json").exists()


@pytest.mark.slow
def test_importing_the_names_loads_no_torch():
    script = (
        "import sys, fastdistill.compress as c; assert 'select' in dir(c) and 'torch' not in sys.modules; "
        "assert callable(c.select)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_planted_useless_block_goes_and_the_pipeline_stays(pipeline):
    useless = pipeline.transformer.single_transformer_blocks[1]
    with torch.no_grad():
        useless.proj_out.weight.mul_(1e-4)
        useless.proj_out.bias.zero_()
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    scores = score(calibrate(pipeline, ["a cat", "a dog"], **SMALL))
    assert list(scores) == block_ids(pipeline.transformer, anatomy_of(pipeline.transformer))
    assert select(pipeline.transformer, scores, drop_blocks=1) == ids(single_transformer_blocks=[1])
    assert scores == score(calibrate(pipeline, ["a cat", "a dog"], **SMALL)), "the same seed, the same scores"
    assert scores != score(calibrate(pipeline, ["a cat", "a dog"], seed=1, **SMALL))
    assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())
    assert not any("forward" in module.__dict__ for module in pipeline.transformer.modules())


def test_one_calibration_scores_and_verifies(pipeline, monkeypatch):
    calibration = calibrate(pipeline, ["a cat"], **SMALL)
    scores = score(calibration, "bi", drop_blocks=2)
    tried, joint_error = [], Calibration.joint_error

    def look(self, dropped):
        dropped = list(dropped)
        tried.append((joint_error(self, dropped), dropped))
        return tried[-1][0]

    monkeypatch.setattr(Calibration, "joint_error", look)
    drop = select(pipeline.transformer, scores, drop_blocks=2, calibration=calibration, verify=10)
    assert len(tried) >= 10
    assert drop == min((found for found in tried if len(found[1]) == 2), key=lambda found: found[0])[1]


@pytest.mark.parametrize("budget", ["params=0.7", "memory=0.7", "flops=0.7", "latency=0.8"])
def test_budgets(budget):
    transformer = tiny.tiny_qwen_image(4)
    scores = dict(zip(block_ids(transformer, anatomy_of(transformer)), [3.0, 1.0, 2.0, 9.0], strict=True))
    drop = select(transformer, scores, budget=budget, height=64, width=64, max_sequence_length=5)
    assert drop[0] == BlockId(stack=DOUBLE, index=1)
    if not budget.startswith("latency"):
        assert drop == ids(transformer_blocks=[1, 2])


def test_a_block_of_infinite_score_stays():
    transformer = tiny.tiny_qwen_image(3)
    scores = dict.fromkeys(block_ids(transformer, anatomy_of(transformer)), 1.0)
    scores[BlockId(stack=DOUBLE, index=1)] = math.inf
    assert select(transformer, scores, drop_blocks=2) == ids(transformer_blocks=[0, 2])
    with pytest.raises(UserError, match="infinite score"):
        select(transformer, dict.fromkeys(scores, math.inf), drop_blocks=1)


@pytest.mark.parametrize("make", [lambda: tiny.tiny_flux3(3), lambda: tiny.tiny_z_image(3, n_refiner_layers=2)])
def test_lists_with_one_count_lose_equally_many(make):
    """The cheapest blocks by far are two of one list, which no cut takes alone."""
    transformer = make()
    anatomy = anatomy_of(transformer)
    blocks = block_ids(transformer, anatomy)
    scores = {block_id: float(10 + index) for index, block_id in enumerate(blocks)}
    scores |= dict.fromkeys(blocks[:2], 0.1)
    for count in range(1, len(blocks)):
        drop = select(transformer, scores, drop_blocks=count)
        assert len(drop) == count
        cut(transformer, drop)
    cut(transformer, select(transformer, scores, budget="params=0.9"))
    only = {block_id: 1.0 if block_id.stack == blocks[0].stack else math.inf for block_id in blocks}
    with pytest.raises(UserError, match="must lose equally many"):
        select(transformer, only, drop_blocks=1)


def scores_of(transformer):
    return dict.fromkeys(block_ids(transformer, anatomy_of(transformer)), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either drop_blocks"),
        ({"drop_blocks": 1, "budget": "params=0.5"}, "give either drop_blocks"),
        ({"drop_blocks": 0}, "drops nothing"),
        ({"drop_blocks": 3}, "dropping all 3 blocks"),
        ({"budget": "params=0.0001"}, "cannot be met"),
        ({"budget": "size=3"}, "params=0.66"),
        ({"budget": ""}, "params=0.66"),
    ],
)
def test_impossible_demands_are_refused(options, message):
    transformer = tiny.tiny_sd3()
    with pytest.raises(UserError, match=message):
        select(transformer, scores_of(transformer), **options)


def test_scores_of_another_model_are_refused():
    transformer = tiny.tiny_sd3()
    with pytest.raises(UserError, match="scores of 4 blocks, and not of the 3 of this SD3"):
        select(transformer, scores_of(tiny.tiny_sd3(4)), drop_blocks=1)
    with pytest.raises(UserError, match="not a number"):
        select(
            transformer, scores_of(transformer) | dict.fromkeys(ids(transformer_blocks=[1]), math.nan), drop_blocks=1
        )


def test_what_cannot_be_scored_is_refused_before_any_work(pipeline, monkeypatch):
    calibration = calibrate(pipeline, ["a cat"], **SMALL)
    with pytest.raises(UserError, match="no criterion 'entropy'; there are output, trajectory"):
        score(calibration, criterion="entropy")
    for drop_blocks, message in ((0, "at least 1"), (-1, "at least 1"), (99, "dropping all 5 blocks")):
        with pytest.raises(UserError, match=message):
            score(calibration, "greedy", drop_blocks=drop_blocks)
    monkeypatch.setattr("fastdistill.compress.api.calibrated", lambda *args, **kwargs: pytest.fail("calibrated"))
    with pytest.raises(UserError, match="needs the pipeline"):
        calibrate(pipeline.transformer, ["a cat"])
    with pytest.raises(UserError, match="a list of at least one"):
        calibrate(pipeline, "a cat")
    with pytest.raises(TypeError, match="heigth"):
        calibrate(pipeline, ["a cat"], heigth=64)
    with pytest.raises(UserError, match="points must be at least 1"):
        calibrate(pipeline, ["a cat"], points=0)
    with pytest.raises(UserError, match="height must be at least 1"):
        calibrate(pipeline, ["a cat"], height=0)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[3] = math.inf
    with pytest.raises(UserError, match=r"FluxTransformer2DModel weight proj_out\.bias has NaN or infinite"):
        calibrate(pipeline, ["a cat"])
    pipeline.transformer = tiny.tiny_sd3()
    with pytest.raises(UserError, match="SD3Transformer2DModel can only be cut"):
        calibrate(pipeline, ["a cat"])


def test_a_repair_brings_the_smaller_model_closer(pipeline):
    calibration = calibrate(pipeline, ["a cat", "a dog"], **SMALL)
    drop = ids(single_transformer_blocks=[1])
    smaller = cut(pipeline.transformer, drop)
    before = calibration.output_error(smaller)
    assert before == pytest.approx(calibration.joint_error(drop), rel=1e-4)
    repair(calibration, smaller, {"single": [1]}, points=64)
    assert calibration.output_error(smaller) < before


@pytest.fixture(scope="module")
def calibration():
    pipeline = tiny_flux_pipeline()
    pipeline.transformer = mixing_transformer()
    return calibrate(pipeline, ["a cat"], **SMALL)


@pytest.mark.parametrize(
    ("cut_away", "named", "is_really"),
    [
        ({"single": [0]}, {"single": [1]}, "single:1"),
        ({"single": [1]}, {"single": [2]}, "single:2"),
        ({"single": [1]}, {"single": [0]}, "single:0"),
        ({"double": [0]}, {"double": [1]}, "double:1"),
        ({"double": [0]}, {"single": [0]}, ""),
        ({"double": [0], "single": [1]}, {"double": [0], "single": [2]}, "single:2"),
    ],
)
def test_a_repair_of_another_cut_is_refused(calibration, cut_away, named, is_really):
    smaller = cut(calibration.network, cut_away)
    before = {name: value.clone() for name, value in smaller.state_dict().items()}
    with pytest.raises(UserError, match="give the blocks that were cut") as refused:
        repair(calibration, smaller, named, points=4)
    assert f"it is {is_really}" in str(refused.value) or not is_really
    assert all(torch.equal(value, before[name]) for name, value in smaller.state_dict().items())
    repair(calibration, smaller, cut_away, points=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_cast_model_is_compared_within_the_cast(calibration, dtype, cast):
    smaller = cut(calibration.network, {"single": [1]}).to(cast).to(dtype)
    repair(calibration, smaller, {"single": [1]}, kind="scale", points=4)
    with pytest.raises(UserError, match="give the blocks that were cut"):
        repair(calibration, smaller, {"single": [0]}, kind="scale", points=4)


def test_a_repaired_model_may_be_repaired_again(calibration):
    smaller = cut(calibration.network, {"single": [1]})
    repair(calibration, smaller, {"single": [1]}, points=8)
    once = calibration.output_error(smaller)
    repair(calibration, smaller, {"single": [1]}, points=64)
    assert calibration.output_error(smaller) < once


def trained(smaller):
    smaller.single_transformer_blocks[0].attn.to_q.weight.data.mul_(1.001)
    return smaller


def other_head(smaller):
    smaller.proj_out.weight.data.add_(0.01)
    return smaller


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (trained, "single:0 of the smaller model is not the full model's single:0"),
        (other_head, "proj_out.weight of the smaller model is not the full model's"),
        (lambda smaller: smaller.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda smaller: smaller.to("meta"), "not in memory"),
        (lambda smaller: tiny.tiny_sd3(), "a SD3Transformer2DModel; give the FluxTransformer2DModel"),
        (lambda smaller: None, "a NoneType"),
    ],
)
def test_a_repair_of_what_cut_did_not_return_is_refused(calibration, spoil, message):
    smaller = spoil(cut(calibration.network, {"single": [1]}))
    with pytest.raises(UserError, match=message):
        repair(calibration, smaller, {"single": [1]}, points=4)


WHOLE = [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3), torch.tensor(3, dtype=torch.int16)]
NOT_WHOLE = [True, np.True_, torch.tensor(True), 3.0, 2.5, "3", [3], np.float32(3), torch.tensor([3]), float("nan")]


@pytest.mark.parametrize("three", WHOLE, ids=repr)
def test_a_number_of_any_whole_type_is_that_number(calibration, pipeline, three):
    scores = score(calibration)
    assert select(calibration.network, scores, drop_blocks=three, verify=three, calibration=calibration) == select(
        calibration.network, scores, drop_blocks=3, verify=3, calibration=calibration
    )
    assert score(calibration, "greedy", drop_blocks=three) == score(calibration, "greedy", drop_blocks=3)
    assert len(block_ids(cut(tiny.tiny_sd3(5), {"transformer_blocks": [three]}), anatomy_of(tiny.tiny_sd3(5)))) == 4
    names = {"points": three, "steps": three, "batch": three, "seed": three, "height": three * 16}
    plain = {"points": 3, "steps": 3, "batch": 3, "seed": 3, "height": 48}
    fixed = {"width": 64, "max_sequence_length": 8}
    first, second = (calibrate(pipeline, ["a cat"], **amounts, **fixed) for amounts in (names, plain))
    assert torch.equal(first.points.x_t, second.points.x_t)
    assert first.points.x_t.shape[-2:] == (6, 8)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_refused(calibration, pipeline, value, monkeypatch):
    monkeypatch.setattr("fastdistill.compress.api.calibrated", lambda *args, **kwargs: pytest.fail("calibrated"))
    scores = dict.fromkeys(calibration.blocks, 1.0)
    smaller = cut(calibration.network, {"single": [1]})
    calls = [
        lambda: select(calibration.network, scores, drop_blocks=value),
        lambda: select(calibration.network, scores, drop_blocks=1, verify=value),
        lambda: select(calibration.network, scores, drop_blocks=1, width=value),
        lambda: score(calibration, drop_blocks=value),
        lambda: cut(calibration.network, {"single": [value]}),
        lambda: cut(calibration.network, [BlockId(stack=SINGLE, index=value)]),
        lambda: repair(calibration, smaller, {"single": [1]}, points=value),
        lambda: calibration.joint_error({"single": [value]}),
        *(
            lambda name=name: calibrate(pipeline, ["a cat"], **{**SMALL, name: value})
            for name in ("points", "steps", "batch", "seed", "height", "width", "max_sequence_length")
        ),
    ]
    for call in calls:
        with pytest.raises(UserError, match="whole number"):
            call()


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ({"tripel": [1]}, "no block tripel:1; this model has double: 0-1, single: 0-2"),
        ({"tripel": []}, "no list of blocks 'tripel'; this model has double, single"),
        ({"single": [-1]}, "no block single:-1"),
        ({"single": [3]}, "no block single:3; this model has double: 0-1, single: 0-2"),
        ({"single": [1, 1]}, "dropped twice"),
        ({"single": [1], "single_transformer_blocks": [1]}, "dropped twice"),
        (ids(single_transformer_blocks=[1, 1]), "dropped twice"),
        ({"single": 1}, r'as \{"single": \[1, 2\]\}'),
        ({"single": "1"}, r'as \{"single": \[1, 2\]\}'),
        (["double:2"], "no block double:2"),
        (1, "1 is a number of blocks"),
    ],
)
def test_blocks_that_cannot_be_dropped_are_named_everywhere(calibration, drop, message):
    smaller = cut(calibration.network, {"single": [1]})
    for call in (
        lambda: cut(calibration.network, drop),
        lambda: repair(calibration, smaller, drop),
        lambda: calibration.joint_error(drop),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_generators_are_read_once(calibration):
    blocks = ids(single_transformer_blocks=[0, 2])
    once = cut(calibration.network, (block_id for block_id in blocks))
    assert len(block_ids(once, anatomy_of(once))) == 3
    assert calibration.joint_error(block_id for block_id in blocks) == calibration.joint_error({"single": [0, 2]})
    repair(calibration, once, (block_id for block_id in blocks), points=4)
    assert calibration.joint_error({"single": (index for index in (0, 2))}) == calibration.joint_error(blocks)


def test_a_calibration_of_other_weights_is_refused(calibration):
    other = mixing_transformer(seed=1)
    scores = dict.fromkeys(calibration.blocks, 1.0)
    with pytest.raises(UserError, match="of another FluxTransformer2DModel, with other weights"):
        select(other, scores, drop_blocks=1, calibration=calibration)
    same = copy.deepcopy(calibration.network)
    assert select(same, scores, drop_blocks=1, calibration=calibration)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0] * 5, "not as a list"),
        ({f"single:{index}": 1.0 for index in range(5)}, "'single:0' is none of them"),
        (dict.fromkeys(ids(transformer_blocks=range(2), single_transformer_blocks=range(3)), "a"), "must be a number"),
        (dict.fromkeys(ids(transformer_blocks=range(2), single_transformer_blocks=range(3)), -math.inf), "minus inf"),
    ],
)
def test_scores_that_are_none_are_refused(calibration, scores, message):
    with pytest.raises(UserError, match=message):
        select(calibration.network, scores, drop_blocks=1)


def test_arguments_of_other_kinds_are_refused(calibration, pipeline):
    scores = {block_id: np.float32(index) for index, block_id in enumerate(calibration.blocks)}
    assert select(calibration.network, scores, drop_blocks=1) == calibration.blocks[:1]
    for call, message in (
        (lambda: select(calibration.network, scores, budget=0.66), "'params=0.66'"),
        (lambda: select(calibration.network, scores, drop_blocks=1, dtype="bfloat16"), "torch.bfloat16"),
        (lambda: select(calibration.network, scores, drop_blocks=1, calibration=pipeline), "what calibrate"),
        (lambda: score(pipeline), "what calibrate"),
        (lambda: repair(pipeline, None, {}), "what calibrate"),
        (lambda: calibrate(pipeline, ["a cat", None]), "must be a string"),
        (lambda: calibrate(pipeline, ["a cat"], seed=-1), "at least 0"),
        (lambda: calibrate(pipeline, ["a cat"], seed=2**32), "at most"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_repair_of_something_else_is_refused(pipeline):
    calibration = calibrate(pipeline, ["a cat"], **SMALL)
    smaller = cut(pipeline.transformer, {"single": [1]})
    with pytest.raises(UserError, match="there is no repair 'glue'; there are ridge, scale, average"):
        repair(calibration, smaller, {"single": [1]}, kind="glue")
    with pytest.raises(UserError, match="the smaller model has 4 blocks, and without these 3 would be left"):
        repair(calibration, smaller, {"single": [1, 2]})
