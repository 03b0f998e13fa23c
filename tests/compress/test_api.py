"""`calibrate`, `score`, `select`, `cut` and `repair` from Python."""

import math
import subprocess
import sys
from pathlib import Path

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
    with pytest.raises(UserError, match=r'as \{"double": \[1, 2\]\}'):
        cut(pipeline.transformer, "double:1")
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


def test_a_repair_of_something_else_is_refused(pipeline):
    calibration = calibrate(pipeline, ["a cat"], **SMALL)
    smaller = cut(pipeline.transformer, {"single": [1]})
    with pytest.raises(UserError, match="there is no repair 'glue'; there are ridge, scale, average"):
        repair(calibration, smaller, {"single": [1]}, kind="glue")
    with pytest.raises(UserError, match="the smaller model has 4 blocks, and without these 3 would be left"):
        repair(calibration, smaller, {"single": [1, 2]})
