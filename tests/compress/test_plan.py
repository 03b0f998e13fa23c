"""`--dry-run` and what blocks cost: FLUX.1-dev's published figures from its config alone."""

import functools
import json
from dataclasses import replace

import pytest
import torch

from fastdistill.compress import plan as plan_module
from fastdistill.compress.choice.costs import flops, kinds, latency, sizes, workload
from fastdistill.compress.config import CompressConfig
from fastdistill.compress.plan import plan
from fastdistill.compress.surgery import cut
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import anatomy_of, family_of
from fastdistill.models.families.family import BlockId, Workload
from fastdistill.models.skeleton import read_config
from fastdistill.run.options import RunOptions
from tests.tiny import tiny_flux_pipeline

# FLUX.1-dev's config where it differs from the class's defaults.
FLUX_DEV = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
SD35_LARGE = {
    "_class_name": "SD3Transformer2DModel", "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
    "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13)),
}  # fmt: skip
# Shallow, so that their operations are counted quickly.
TWO_LISTS = {"num_layers": 2, "num_single_layers": 2}
SKELETONS = {
    "FLUX.2": {"_class_name": "Flux2Transformer2DModel", **TWO_LISTS},
    "FLUX.3": {"_class_name": "Flux3Transformer2DModel", **TWO_LISTS},
    "Chroma": {"_class_name": "ChromaTransformer2DModel", **TWO_LISTS},
    "SD3.5": SD35_LARGE | {"num_layers": 3},
    "Qwen-Image": {"_class_name": "QwenImageTransformer2DModel", "num_layers": 3},
    "Z-Image": {"_class_name": "ZImageTransformer2DModel", "n_layers": 4},
    "Sana": {"_class_name": "SanaTransformer2DModel", "num_layers": 3},
    "PixArt": {"_class_name": "PixArtTransformer2DModel", "num_layers": 3, "caption_channels": 4096},
}
DOUBLE, SINGLE = BlockId(stack="transformer_blocks", index=0), BlockId(stack="single_transformer_blocks", index=0)


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "config.json"
    path.write_text(json.dumps(FLUX_DEV))
    counted = functools.cache(lambda: flops_of_flux_dev(str(path)))
    with pytest.MonkeyPatch.context() as patch:
        # The same every time, and three seconds of dispatching.
        of_others = plan_module.flops
        patch.setattr(
            plan_module, "flops", lambda network, *args: counted() if is_flux(network) else of_others(network, *args)
        )
        yield str(path)


def is_flux(network):
    return type(network).__name__ == FLUX_DEV["_class_name"]


def flops_of_flux_dev(path):
    network, sampling, vae_scale_factor = read_config(path)
    return flops(network, anatomy_of(network), workload(sampling, vae_scale_factor))


def test_sizes_of_flux_dev(flux_dev):
    network, sampling, scale_factor = read_config(flux_dev)
    assert next(network.parameters()).is_meta
    assert (sampling.height, sampling.max_sequence_length, scale_factor) == (1024, 512, 8)
    costs = sizes(network, family_of(network), 2)
    assert costs["params"].total / 1e9 == pytest.approx(11.901, abs=5e-4)
    assert costs["params"].blocks[DOUBLE] / 1e6 == pytest.approx(339.83, abs=5e-3)
    assert costs["params"].blocks[SINGLE] / 1e6 == pytest.approx(141.59, abs=5e-3)
    assert costs["memory"].total == 2 * costs["params"].total


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        ({"_class_name": "Flux2Transformer2DModel"}, 32.22),
        ({"_class_name": "QwenImageTransformer2DModel"}, 20.43),
        ({"_class_name": "ChromaTransformer2DModel"}, 8.90),
        ({"_class_name": "ZImageTransformer2DModel"}, 6.15),
        (SD35_LARGE, 8.06),
        (SD35_MEDIUM, 2.24),
        ({"_class_name": "SanaTransformer2DModel"}, 1.60),
        ({"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096}, 0.611),
    ],
    ids=lambda value: value["_class_name"].removesuffix("Transformer2DModel") if isinstance(value, dict) else None,
)
def test_published_sizes(tmp_path, config, billions):
    """FLUX.2-dev 32 B, Qwen-Image 20 B, Chroma 8.9 B, Z-Image 6 B, SD3.5 large 8.1 B and medium 2.2
    B, Sana 1.6 B, PixArt 0.6 B."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    network, _, _ = read_config(str(tmp_path))
    assert sizes(network, anatomy_of(network), 2)["params"].total / 1e9 == pytest.approx(billions, abs=5e-3)


def rows_of(tmp_path, config, **options):
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = plan(CompressConfig(run=RunOptions(model=str(tmp_path)), **options))
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("name", SKELETONS)
def test_every_family_is_planned(tmp_path, name):
    whole, *cuts = rows_of(tmp_path, SKELETONS[name], drop_blocks=("2",))[1:]
    assert cuts
    assert all(0 < float(share.split("(")[1][:5]) <= 1 for cut_row in cuts for share in cut_row[1:])
    assert sum(map(int, whole[0].split(" + "))) - sum(map(int, cuts[0][0].split(" + "))) == 2


def test_a_plan_takes_equally_many_from_lists_that_share_a_count(tmp_path):
    config = SKELETONS["Z-Image"]
    left = [row[0] for row in rows_of(tmp_path, config, drop_blocks=("2",))[2:]]
    assert left == ["2 + 2 + 2", "1 + 1 + 4"]
    # One block more in either of them would be within the budget for the first, but is no model.
    for row in rows_of(tmp_path, config, budget="params=0.6")[2:]:
        noise, context, _ = row[0].split(" + ")
        assert noise == context
    with pytest.raises(UserError, match="noise and context have one count"):
        rows_of(tmp_path, config, drop_blocks=("noise:0",))
    with pytest.raises(UserError, match="no 1 blocks can go together: noise and context must lose equally many"):
        rows_of(tmp_path, config | {"n_layers": 0}, drop_blocks=("1",))


def test_the_plan_of_flux_lite(flux_dev):
    """8 double and 38 single blocks: flux.1-lite-8B, published as 8.16 B."""
    text = plan(CompressConfig(run=RunOptions(model=flux_dev), drop_blocks=("double:4-14",)))
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
        text = plan(CompressConfig(run=RunOptions(model=flux_dev), **options))
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
        (
            '{"_class_name": "UNet2DConditionModel"}',
            "UNet2DConditionModel is not a supported transformer; supported: Flux",
        ),
        (
            '{"_class_name": "FluxTransformer2DModel", "num_layers": "many"}',
            "does not describe a FluxTransformer2DModel",
        ),
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
    load = Workload(height=8, width=8, text_tokens=5)
    cost = flops(transformer, family, load)
    double, single = cost.blocks[DOUBLE], cost.blocks[SINGLE]
    width, tokens = 32, 5 + 16
    products, attention = 2 * 12 * width**2 * tokens, 4 * width * tokens**2
    assert double - 2 * 12 * width**2 == single - 2 * 3 * width**2 == products + attention
    smaller = cut(transformer, [DOUBLE])
    assert flops(smaller, family, load).total == cost.left([DOUBLE])
    assert flops(transformer, family, replace(load, batch=2)).total == 2 * cost.total


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_latency_is_measured_and_leaves_the_model_alone(dtype):
    transformer = tiny_flux_pipeline().transformer
    family = family_of(transformer)
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    cost = latency(transformer, family, Workload(height=8, width=8, text_tokens=5, batch=2), dtype)
    assert list(cost.blocks) == block_ids(transformer, family)
    assert all(value > 1000 for value in cost.blocks.values())
    assert cost.outside > 1000
    for kind in kinds(transformer, family):
        assert len({cost.blocks[block_id] for block_id in kind}) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
    assert all(
        torch.equal(value, weights[name]) and value.dtype == torch.float32
        for name, value in transformer.state_dict().items()
    )
