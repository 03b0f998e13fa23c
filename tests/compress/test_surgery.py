"""Cutting: the result is the full model with those blocks skipped, and a stock diffusers checkpoint."""

import subprocess
import sys

import pytest
import torch

from fastdistill.compress.surgery import boundary_map, cut
from fastdistill.errors import UserError
from fastdistill.models.family import BlockId
from fastdistill.models.features import block_ids, skipped
from fastdistill.models.registry import family_of
from tests.tiny import tiny_flux_pipeline, tiny_inputs

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


@pytest.fixture
def transformer():
    return tiny_flux_pipeline().transformer


CUTS = [
    {DOUBLE: [0]},
    {SINGLE: [0, 2]},
    {DOUBLE: [1], SINGLE: [1]},
    {DOUBLE: [0, 1]},
    {SINGLE: [0, 1, 2]},
]


@pytest.mark.parametrize("drop", CUTS, ids=str)
def test_cut_equals_skipped(transformer, drop):
    family = family_of(transformer)
    x, t, conditioning = tiny_inputs(transformer)
    dropped = [BlockId(stack=stack, index=index) for stack, indices in drop.items() for index in indices]
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    smaller = cut(transformer, drop)
    with torch.no_grad():
        with skipped(transformer, family, dropped):
            expected = family.predict(transformer, x, t, conditioning)
        torch.testing.assert_close(family.predict(smaller, x, t, conditioning), expected, rtol=1e-6, atol=1e-6)
    assert len(block_ids(smaller, family)) == len(block_ids(transformer, family)) - len(dropped)
    assert smaller.config.num_layers == len(smaller.transformer_blocks)
    assert smaller.config.num_single_layers == len(smaller.single_transformer_blocks)
    # The input is left alone, and shares no memory with the result.
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_saved_cut_loads_where_fastdistill_cannot_be_imported(transformer, tmp_path):
    smaller = cut(transformer, {DOUBLE: [0], SINGLE: [1]})
    _x, _t, _conditioning = tiny_inputs(transformer)
    smaller.save_pretrained(tmp_path / "transformer")
    script = f"""
import sys
sys.modules["fastdistill"] = None
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
model, info = FluxTransformer2DModel.from_pretrained({str(tmp_path / "transformer")!r}, output_loading_info=True)
assert not any(info.values()), info
saved = load_file({str(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")!r})
assert saved.keys() == model.state_dict().keys()
assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())
print(model.config.num_layers, model.config.num_single_layers)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1", "2"]


def test_kept_weights_keep_every_bit_and_dtype(transformer):
    transformer.to(torch.bfloat16)
    smaller = cut(transformer, {DOUBLE: [0], SINGLE: [0]})
    old, new = transformer.state_dict(), smaller.state_dict()
    assert all(value.dtype == torch.bfloat16 for value in new.values())
    renamed = {f"{DOUBLE}.0.": f"{DOUBLE}.1.", f"{SINGLE}.0.": f"{SINGLE}.1.", f"{SINGLE}.1.": f"{SINGLE}.2."}
    for name, value in new.items():
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        assert torch.equal(value, old[renamed.get(prefix, "") + name[len(prefix) :]]), name


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ({DOUBLE: [2]}, "no block double:2.*double: 0-1, single: 0-2"),
        ({"blocks": [0]}, "no block blocks:0"),
        ({DOUBLE: [0, 1], SINGLE: [0, 1, 2]}, "leaves no model"),
    ],
)
def test_impossible_cuts_are_refused(transformer, drop, message):
    with pytest.raises(UserError, match=message):
        cut(transformer, drop)


def test_boundaries_cover_the_dropped_span():
    blocks = [BlockId(stack="a", index=index) for index in range(6)]
    mapping = boundary_map(blocks, [blocks[0], blocks[2], blocks[3]])
    assert mapping == {blocks[1]: blocks[3], blocks[4]: blocks[4], blocks[5]: blocks[5]}
    assert boundary_map(blocks, [blocks[5]])[blocks[4]] == blocks[5]
    assert boundary_map(blocks, []) == {block: block for block in blocks}
