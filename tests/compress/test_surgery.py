"""Cutting, for every family: the result is the full model with those blocks skipped, and a stock
diffusers checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, FluxTransformer2DModel
from safetensors.torch import load_file

from fastdistill.compress import cut
from fastdistill.compress.surgery import boundary_map
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import FAMILIES, anatomy_of, family_of
from fastdistill.models.families.chroma import kept_rows, renumbered, row_embedding
from fastdistill.models.families.family import BlockId
from fastdistill.models.hooks import skipped
from tests import tiny_families as tiny

DOUBLE, SINGLE, BLOCKS = "transformer_blocks", "single_transformer_blocks", "transformer_blocks"
IMAGE, REFERENCE, TEXT = "mode_blocks.image", "mode_blocks.image_cond", "txt_mode_blocks"
NOISE, CONTEXT, SIGLIP, LAYERS = "noise_refiner", "context_refiner", "siglip_refiner", "layers"
Drop = dict[str, list[int]]
REFITTED = "distilled_guidance_layer.in_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Case:
    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    cuts: tuple[Drop, ...]
    config: dict[str, Any] = field(default_factory=dict)
    """Changes of the model after the first cut."""


def two_stacks(make: Callable[[], Any], inputs: Callable[[], dict[str, Any]]) -> Case:
    return Case(
        make=make,
        inputs=inputs,
        cuts=({DOUBLE: [0], SINGLE: [1]}, {SINGLE: [0, 2]}, {DOUBLE: [0, 1]}, {SINGLE: [0, 1, 2]}),
        config={"num_layers": 1, "num_single_layers": 2},
    )


def one_stack(make: Callable[[], Any], inputs: Callable[[], dict[str, Any]], **config: Any) -> Case:
    return Case(
        make=make,
        inputs=inputs,
        cuts=({BLOCKS: [0]}, {BLOCKS: [1]}, {BLOCKS: [0, 2]}),
        config={"num_layers": 2, **config},
    )


CASES = {
    "flux": two_stacks(tiny.tiny_flux, tiny.flux_inputs),
    "flux2": two_stacks(tiny.tiny_flux2, tiny.flux2_inputs),
    "flux3": Case(
        make=tiny.tiny_flux3,
        inputs=tiny.flux3_inputs,
        cuts=(
            {TEXT: [0], IMAGE: [1], REFERENCE: [0], SINGLE: [1]},
            {SINGLE: [2]},
            {TEXT: [0, 1], IMAGE: [0, 1], REFERENCE: [0, 1]},
        ),
        config={"num_layers": 1, "num_single_layers": 2},
    ),
    "chroma": two_stacks(tiny.tiny_chroma, tiny.chroma_inputs),
    # With a second attention in the first, or in the second and the last block.
    "sd3": one_stack(tiny.tiny_sd3, tiny.sd3_inputs, dual_attention_layers=()),
    "sd3-dual": Case(
        make=lambda: tiny.tiny_sd3(4, dual_attention_layers=(1, 3)),
        inputs=tiny.sd3_inputs,
        cuts=({BLOCKS: [0]}, {BLOCKS: [3]}, {BLOCKS: [2, 3]}, {BLOCKS: [1]}),
        config={"num_layers": 3, "dual_attention_layers": (0, 2)},
    ),
    "qwen_image": one_stack(tiny.tiny_qwen_image, tiny.qwen_image_inputs),
    "z_image": Case(
        make=lambda: tiny.tiny_z_image(3, n_refiner_layers=2),
        inputs=tiny.z_image_inputs,
        cuts=({LAYERS: [1]}, {NOISE: [0], CONTEXT: [1], LAYERS: [2]}, {NOISE: [0, 1], CONTEXT: [0, 1]}),
        config={"n_layers": 2},
    ),
    "z_image-omni": Case(
        make=lambda: tiny.tiny_z_image(2, n_refiner_layers=2, siglip_feat_dim=8),
        inputs=tiny.omni_inputs,
        cuts=({NOISE: [0], CONTEXT: [0], SIGLIP: [1], LAYERS: [0]},),
        config={"n_layers": 1, "n_refiner_layers": 1},
    ),
    "sana": one_stack(tiny.tiny_sana, tiny.cross_attention_inputs),
    "pixart": one_stack(tiny.tiny_pixart, tiny.cross_attention_inputs),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More threads have nothing to do on tiny models, but wait for each other where cores are
    shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(drop: Drop) -> list[BlockId]:
    return [BlockId(stack=stack, index=index) for stack, indices in drop.items() for index in indices]


@torch.no_grad()
def run_skipped(transformer: Any, drop: Drop, inputs: dict[str, Any]) -> torch.Tensor:
    with skipped(transformer, anatomy_of(transformer), ids(drop)):
        return tiny.run(transformer, inputs)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """To a part of the largest element. All but Chroma, whose approximator adds more terms, are
    equal to the bit on most machines."""
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def old_name(name: str, drop: Drop, transformer: Any) -> str:
    """Name that a tensor of the cut model had."""
    for stack in anatomy_of(transformer).stacks:
        if name.startswith(stack.attribute + "."):
            index, _, rest = name[len(stack.attribute) + 1 :].partition(".")
            kept = [i for i in range(10) if i not in drop.get(stack.attribute, ())]
            return f"{stack.attribute}.{kept[int(index)]}.{rest}"
    return name


def test_every_family_is_tried() -> None:
    assert {type(case.make()).__name__ for case in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("case", "drop"),
    [pytest.param(case, drop, id=f"{name}-{drop}") for name, case in CASES.items() for drop in case.cuts],
)
def test_cut_equals_skipped(case: Case, drop: Drop) -> None:
    transformer, inputs = tiny.seeded(case.make), case.inputs()
    anatomy = anatomy_of(transformer)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    expected = run_skipped(transformer, drop, inputs)
    smaller = cut(transformer, drop)
    with torch.no_grad():
        assert_same(tiny.run(smaller, inputs), expected)
        whole = tiny.run(transformer, inputs)
    assert not torch.allclose(whole, expected, rtol=1e-3, atol=1e-3)
    assert type(smaller) is type(transformer)
    assert len(block_ids(smaller, anatomy)) == len(block_ids(transformer, anatomy)) - len(ids(drop))
    # The input is left alone, and shares no memory with the result.
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    assert torch.equal(tiny.run(transformer, inputs), whole)


@every_case
def test_config_follows(case: Case) -> None:
    transformer = case.make()
    smaller = cut(transformer, case.cuts[0])
    changed = {
        name: value
        for name, value in smaller.config.items()
        if value != transformer.config[name] and not name.startswith("_")
    }
    changed.pop("approximator_num_channels", None)
    assert changed == case.config


@every_case
def test_kept_weights_keep_every_bit_and_dtype(case: Case, tmp_path: Any) -> None:
    """Through the file, in bfloat16. The one exception is what SD3's new last block and Chroma's
    approximator have newly made."""
    transformer, drop = tiny.seeded(case.make).to(torch.bfloat16), case.cuts[0]
    cut(transformer, drop).save_pretrained(tmp_path)
    old, new = transformer.state_dict(), load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in new.values())
    assert all(
        torch.equal(value, old[old_name(name, drop, transformer)]) for name, value in new.items() if name != REFITTED
    )


LOAD = """
import sys
sys.modules["fastdistill"] = None
import diffusers, torch
from safetensors.torch import load_file
for name in sys.argv[1:]:
    saved = torch.load(f"{name}.pt", weights_only=True)
    model, info = getattr(diffusers, saved["class"]).from_pretrained(name, output_loading_info=True)
    assert not any(info.values()), (name, info)
    file = load_file(f"{name}/diffusion_pytorch_model.safetensors")
    assert file.keys() == model.state_dict().keys(), name
    assert all(torch.equal(model.state_dict()[key], value) for key, value in file.items()), name
    with torch.no_grad():
        out = model(**saved["inputs"], return_dict=False)[0]
    out = torch.cat([sample.flatten() for sample in out]) if isinstance(out, list) else out
    assert (out - saved["expected"]).abs().max() <= 1e-6 * saved["expected"].abs().max(), name
print("loaded", len(sys.argv) - 1)
"""


@pytest.mark.slow
def test_saved_cuts_load_where_fastdistill_cannot_be_imported(tmp_path: Any) -> None:
    """And compute there, with buffers that no file holds, what the full model does without the
    dropped blocks."""
    for name, case in CASES.items():
        transformer, inputs, drop = tiny.seeded(case.make), case.inputs(), case.cuts[0]
        cut(transformer, drop).save_pretrained(tmp_path / name)
        saved = {
            "class": type(transformer).__name__,
            "inputs": inputs,
            "expected": run_skipped(transformer, drop, inputs),
        }
        torch.save(saved, tmp_path / f"{name}.pt")
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *CASES], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["loaded", str(len(CASES))]


@pytest.mark.parametrize("name", [name for name in CASES if name != "z_image-omni"])
def test_a_cut_model_can_be_cut_again(name: str) -> None:
    transformer, inputs = tiny.seeded(CASES[name].make), CASES[name].inputs()
    stack = anatomy_of(transformer).stacks[-1].attribute
    smaller = cut(cut(transformer, {stack: [0]}), {stack: [1]})
    with torch.no_grad():
        expected = run_skipped(transformer, {stack: [0, 2]}, inputs)
        assert_same(tiny.run(smaller, inputs), expected)


@every_case
def test_buffers_follow_the_dtype(case: Case) -> None:
    transformer = case.make().double()
    smaller = cut(transformer, case.cuts[0])
    assert {buffer.dtype for buffer in smaller.buffers()} == {buffer.dtype for buffer in transformer.buffers()}
    assert {tensor.device.type for tensor in (*smaller.buffers(), *smaller.parameters())} == {"cpu"}


def test_counts_that_were_defaults_are_cut_too() -> None:
    """diffusers keeps a record of the fields that nobody gave, and restores their defaults."""
    transformer = FluxTransformer2DModel(
        in_channels=4,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=4,
        pooled_projection_dim=4,
        axes_dims_rope=(2, 2, 4),
    )
    smaller = cut(transformer, {"double": range(1, 19), "single": range(38)})
    assert (smaller.config.num_layers, smaller.config.num_single_layers) == (1, 0)


def test_an_empty_cut_is_a_copy() -> None:
    transformer = tiny.seeded(tiny.tiny_chroma)
    copied = cut(transformer, {})
    assert {
        name: copied.config[name] for name in transformer.config if not name.startswith("_")
    }.items() <= transformer.config.items()
    assert all(torch.equal(value, transformer.state_dict()[name]) for name, value in copied.state_dict().items())


def test_training_mode_is_kept() -> None:
    transformer = tiny.tiny_flux2().train()
    assert cut(transformer, {DOUBLE: [0]}).training
    assert not cut(transformer.eval(), {DOUBLE: [0]}).training


def with_adapter() -> Any:
    transformer = tiny.tiny_flux()
    transformer.transformer_blocks[0].attn.to_q.register_parameter("lora", torch.nn.Parameter(torch.zeros(1)))
    return transformer


@pytest.mark.parametrize(
    ("make", "drop", "message"),
    [
        (tiny.tiny_flux, {DOUBLE: [2]}, "no block double:2.*double: 0-1, single: 0-2"),
        (tiny.tiny_flux, {"blocks": [0]}, "no block blocks:0"),
        (tiny.tiny_flux, {DOUBLE: [0, 1], SINGLE: [0, 1, 2]}, "leaves no model"),
        (tiny.tiny_sd3, {"block": [0, 1, 2]}, "leaves no model"),
        (tiny.tiny_z_image, {"siglip": [0]}, "no block siglip:0; this model has noise: 0-0, context: 0-0, layer: 0-1"),
        (
            tiny.tiny_z_image,
            {"noise": [0]},
            "noise and context have one count, n_refiner_layers; .*noise: 0, context: 1",
        ),
        (tiny.tiny_flux3, {"text": [0], "image": [1]}, "text and image and reference have one count, num_layers"),
        (with_adapter, {SINGLE: [0]}, "does not account for transformer_blocks.0.attn.to_q.lora"),
        (
            lambda: AuraFlowTransformer2DModel(
                num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2
            ),
            {},
            "AuraFlowTransformer2DModel is not a supported",
        ),
    ],
)  # fmt: skip
def test_impossible_cuts_are_refused(make: Callable[[], Any], drop: Drop, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut(make(), drop)


def test_a_family_that_can_only_be_cut_says_so() -> None:
    with pytest.raises(
        UserError, match=r"SD3Transformer2DModel can only be cut, from Python: fastdistill\.compress\.cut"
    ):
        family_of(tiny.tiny_sd3())


def test_chroma_is_exact_where_rounding_is_small() -> None:
    transformer, inputs, drop = tiny.seeded(tiny.tiny_chroma).double(), tiny.chroma_inputs(), {DOUBLE: [0], SINGLE: [1]}
    inputs = {name: value.double() for name, value in inputs.items()}
    with torch.no_grad():
        assert_same(tiny.run(cut(transformer, drop), inputs), run_skipped(transformer, drop, inputs), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chromas_approximator_at_its_real_size(dtype: torch.dtype) -> None:
    """19 double and 38 single blocks, a third of them dropped: every row gets what it got under its
    old number."""
    torch.manual_seed(0)
    weight = (torch.randn(64, 64) / 8).to(dtype)
    rows = kept_rows([i for i in range(19) if i % 3], [i for i in range(38) if i % 3 != 1], 19, 38)
    fitted = renumbered(weight, rows)
    old, new = (part.double()[:, part.shape[1] // 2 :] for part in (weight, fitted))
    expected = row_embedding(19 * 12 + 38 * 3 + 2, old.shape[1])[rows] @ old.T
    actual = row_embedding(len(rows), new.shape[1]) @ new.T
    assert fitted.dtype == dtype
    assert float((actual - expected).norm() / expected.norm()) < torch.finfo(dtype).eps
    # Less than the five pairs of 5120 x 5120 layers after it by far.
    assert fitted.shape[1] == 1024


def test_boundaries_cover_the_dropped_span() -> None:
    blocks = [BlockId(stack="a", index=index) for index in range(6)]
    mapping = boundary_map(blocks, [blocks[0], blocks[2], blocks[3]])
    assert mapping == {blocks[1]: blocks[3], blocks[4]: blocks[4], blocks[5]: blocks[5]}
    assert boundary_map(blocks, [blocks[5]])[blocks[4]] == blocks[5]
    assert boundary_map(blocks, []) == {block: block for block in blocks}
