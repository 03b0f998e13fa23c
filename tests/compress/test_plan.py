"""``--dry-run`` and what blocks cost: FLUX.1-dev's published figures from its config alone."""

import functools
import json

import pytest
import torch

from fastdistill.compress import plan as plan_module
from fastdistill.compress.config import CompressConfig
from fastdistill.compress.costs import Inputs, as_dtype, flops, kinds, latency, sizes
from fastdistill.compress.plan import plan, read_config
from fastdistill.compress.surgery import cut
from fastdistill.errors import UserError
from fastdistill.models.family import BlockId
from fastdistill.models.features import block_ids
from fastdistill.models.registry import family_of
from tests.tiny import tiny_flux_pipeline, tiny_inputs

# What FLUX.1-dev's config says beside the class's defaults.
FLUX_DEV = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
DOUBLE, SINGLE = BlockId(stack="transformer_blocks", index=0), BlockId(stack="single_transformer_blocks", index=0)


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "config.json"
    path.write_text(json.dumps(FLUX_DEV))
    counted = functools.cache(lambda: flops_of_flux_dev(str(path)))
    with pytest.MonkeyPatch.context() as patch:
        # The same every time, and three seconds of dispatching.
        patch.setattr(plan_module, "flops", lambda *args: counted())
        yield str(path)


def flops_of_flux_dev(path):
    network, sampling, scale_factor = read_config(path)
    return flops(network, family_of(network), plan_module._inputs(network, family_of(network), sampling, scale_factor))


def inputs(transformer, **options):
    x_t, t, conditioning = tiny_inputs(transformer, **options)
    return Inputs(x_t=x_t, t=t, conditioning=conditioning)


def test_sizes_of_flux_dev(flux_dev):
    network, sampling, scale_factor = read_config(flux_dev)
    assert next(network.parameters()).is_meta
    assert (sampling.height, sampling.max_sequence_length, scale_factor) == (1024, 512, 8)
    costs = sizes(network, family_of(network), 2)
    assert costs["params"].total / 1e9 == pytest.approx(11.901, abs=5e-4)
    assert costs["params"].blocks[DOUBLE] / 1e6 == pytest.approx(339.83, abs=5e-3)
    assert costs["params"].blocks[SINGLE] / 1e6 == pytest.approx(141.59, abs=5e-3)
    assert costs["memory"].total == 2 * costs["params"].total


def test_the_plan_of_flux_lite(flux_dev):
    """8 double and 38 single blocks: flux.1-lite-8B, published as 8.16 B."""
    text = plan(CompressConfig(model=flux_dev, drop_blocks=("double:4-14",), dry_run=True))
    whole, cut_row = (line.split(" | ") for line in text.splitlines()[4:6])
    assert whole[0] == "| 19 + 38"
    assert whole[1] == "11.901 B"
    assert cut_row[0] == "| 8 + 38"
    assert cut_row[1] == "8.163 B (0.686)"
    assert cut_row[2].startswith("15.2")
    assert cut_row[3].endswith("TFLOP (0.807) |")
    # 57 blocks of 1.3046 T, and little else.
    assert float(whole[3].split()[0]) == pytest.approx(57 * 1.3046, rel=2e-3)


def test_the_plan_of_a_count_and_of_budgets(flux_dev):
    def rows(**options):
        text = plan(CompressConfig(model=flux_dev, dry_run=True, **options))
        return [line for line in text.splitlines() if line.startswith("| ")][2:]

    assert len(rows(drop_blocks=("6",))) == 7
    by_size, by_work = rows(budget="params=0.686"), rows(budget="flops=0.808")
    assert any(row.startswith("| 8 + 38 |") for row in by_size)
    assert any(row.startswith("| 8 + 38 |") for row in by_work)
    assert all(float(row.split("(")[1][:5]) <= 0.686 for row in by_size)
    # For operations every block is worth the same: eleven go, whichever they are.
    assert {sum(map(int, row.split(" | ")[0].strip("| ").split(" + "))) for row in by_work} == {46}
    assert len({sum(map(int, row.split(" | ")[0].strip("| ").split(" + "))) for row in by_size}) > 3
    with pytest.raises(UserError, match=r"flops=0\.7"):
        rows(budget="latency=0.7")
    with pytest.raises(UserError, match="cannot be met"):
        rows(budget="memory=100MiB")
    with pytest.raises(UserError, match="drops nothing"):
        rows(budget="params=12B")
    with pytest.raises(UserError, match="no block double:19"):
        rows(drop_blocks=("double:19",))
    with pytest.raises(UserError, match="all 57 blocks"):
        rows(drop_blocks=("57",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no diffusers config"),
        ("[]", "no diffusers config"),
        ('{"num_layers": 3}', "no diffusers config"),
        ('{"_class_name": "UNet2DConditionModel"}', "UNet2DConditionModel is not a supported transformer; supported: Flux"),
        ('{"_class_name": "FluxTransformer2DModel", "num_layers": "many"}', "does not describe a FluxTransformer2DModel"),
    ],
)
def test_a_config_that_is_none(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    for model in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(UserError, match=message):
            read_config(str(model))


def test_a_model_that_is_nowhere(tmp_path):
    for model in (tmp_path, tmp_path / "x.json", "flux"):
        with pytest.raises(UserError, match=r"no config\.json"):
            read_config(str(model))


def test_operations_follow_the_tokens_and_need_no_weights():
    transformer = tiny_flux_pipeline().transformer
    family = family_of(transformer)
    cost = flops(transformer, family, inputs(transformer, batch=1))
    double, single = cost.blocks[DOUBLE], cost.blocks[SINGLE]
    width, tokens = 32, 5 + 16
    products, attention = 2 * 12 * width**2 * tokens, 4 * width * tokens**2
    assert double - 2 * 12 * width**2 == single - 2 * 3 * width**2 == products + attention
    smaller = cut(transformer, [DOUBLE])
    assert flops(smaller, family, inputs(transformer, batch=1)).total == cost.left([DOUBLE])
    assert flops(transformer, family, inputs(transformer, batch=2)).total == 2 * cost.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latency_is_measured_and_leaves_the_model_alone(dtype):
    transformer = tiny_flux_pipeline().transformer
    family = family_of(transformer)
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    network, in_dtype = as_dtype(transformer, inputs(transformer), dtype)
    assert network.dtype == in_dtype.x_t.dtype == dtype
    cost = latency(network, family, in_dtype)
    assert list(cost.blocks) == block_ids(transformer, family)
    assert all(value > 1000 for value in cost.blocks.values())
    assert cost.outside > 1000
    for kind in kinds(transformer, family):
        assert len({cost.blocks[block_id] for block_id in kind}) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(value, weights[name]) and value.dtype == torch.float32 for name, value in transformer.state_dict().items())
