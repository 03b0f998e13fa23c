"""Parts of a block that a user has replaced compute as the user wrote them, also under the names of
the classes that they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import normalization
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from fastdistill.models.patch import patched
from tests.tiny_families import flux2_inputs, flux_inputs, qwen_image_inputs, run, seeded, tiny_flux, tiny_flux2
from tests.tiny_families import tiny_qwen_image as tiny_qwen


class FluxAttnProcessor(transformer_flux.FluxAttnProcessor):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().__call__(*arguments, **keywords)
        return 2 * result if isinstance(result, Tensor) else tuple(2 * part for part in result)


class RMSNorm(nn.RMSNorm):
    """Norm whose weight is the distance from one, as in Gemma."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


class AdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, gate = super().forward(x, emb)
        return x, -gate


class Activation(nn.Module):
    approximate = "tanh"

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def processor(model: Any) -> None:
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(FluxAttnProcessor())


def query_norm(model: Any) -> None:
    for block in model.transformer_blocks:
        norm = block.attn.norm_q
        block.attn.norm_q = RMSNorm(norm.weight.shape, eps=norm.eps)


def layer_norm(model: Any) -> None:
    for block in model.transformer_blocks:
        block.norm2 = LayerNorm(block.norm2.normalized_shape, eps=1e-6, elementwise_affine=False)


def single_norm(model: Any) -> None:
    for block in model.single_transformer_blocks:
        block.norm.__class__ = AdaLayerNormZeroSingle


def single_activation(model: Any) -> None:
    for block in model.single_transformer_blocks:
        block.act_mlp = Activation()


@pytest.mark.parametrize("replace", [processor, query_norm, layer_norm, single_norm, single_activation])
def test_a_part_of_flux_is_called(replace: Callable[[Any], None]) -> None:
    check(seeded(tiny_flux).eval(), flux_inputs(), replace)


def gate(model: Any) -> None:
    for block in model.transformer_blocks:
        block.ff.act_fn.gate_fn = nn.Tanh()
    for block in model.single_transformer_blocks:
        block.attn.mlp_act_fn.gate_fn = nn.Tanh()


def test_the_gate_of_flux2_is_called() -> None:
    check(seeded(tiny_flux2).eval(), flux2_inputs(), gate)


def check(model: Any, inputs: dict[str, Any], replace: Callable[[Any], None]) -> None:
    with torch.no_grad():
        before = run(model, inputs)
        replace(model)
        stock = run(model, inputs)
        with patched(model) as report:
            fast = run(model, inputs)
    assert not torch.allclose(stock, before, atol=1e-3)
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5)
    assert report.stepped_aside


def test_streams_that_are_swapped_are_refused_as_the_stock_block_refuses_them() -> None:
    """A block returns text and image streams; a hook that swaps them leaves tables of other
    lengths."""
    model, inputs = seeded(tiny_qwen), qwen_image_inputs()
    model.transformer_blocks[0].register_forward_hook(lambda module, arguments, output: output[::-1])
    for patch in (False, True):
        if patch:
            patched(model)
        with pytest.raises(RuntimeError, match="must match"), torch.no_grad():
            run(model, inputs)
