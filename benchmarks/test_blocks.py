"""FLUX.1-dev's blocks, forward and backward, and the emoji FLUX in training and sampling.

`python -m benchmarks.run` runs this file; the contenders (stock, compiled, patched) take turns.
Ratios
are of models, not of operators: most of the time is matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import fastdistill
from benchmarks import flux_models
from benchmarks.turns import peak_mib, take_turns
from fastdistill.models.families.flux import Flux
from fastdistill.models.patch import patched

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TEXT, IMAGE = (512, 4096) if GPU else (128, 1024)
CONTENDERS = {
    "stock": (False, False),
    "stock compiled": (False, True),
    "patched": (True, False),
    "patched compiled": (True, True),
}
EMOJI = Path(fastdistill.__file__).parent / "assets" / "emoji" / "pipeline"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_block(benchmark: Any, kind: str, dtype: torch.dtype) -> None:
    inputs = flux_models.block_inputs(TEXT, IMAGE, DEVICE, dtype)
    streams = [inputs["encoder_hidden_states"], inputs["hidden_states"]]
    upstream = [torch.randn_like(stream) for stream in streams]

    def both_ways(patch: bool, compiled: bool) -> Callable[[], Any]:
        model = flux_models.transformer(DEVICE, dtype, doubles=kind == "double", singles=kind == "single")
        if patch:
            patched(model)
        (block,) = (*model.transformer_blocks, *model.single_transformer_blocks)
        run = torch.compile(block, fullgraph=True) if compiled else block
        wanted = [*streams, *block.parameters()]
        return lambda: torch.autograd.grad(run(**inputs), wanted, upstream)

    contenders = {name: both_ways(*options) for name, options in CONTENDERS.items()}
    benchmark.extra_info.update(
        op=f"flux {kind} block",
        workload=f"T{TEXT}-I{IMAGE}-D{flux_models.WIDTH}",
        dtype=str(dtype).removeprefix("torch."),
        mode="both",
        flops=3 * flux_models.block_flops(TEXT + IMAGE),
        turns=take_turns(contenders, rounds=15 if GPU else 3, warmup=3 if GPU else 1),
        peak_mib={name: peak_mib(run) for name, run in contenders.items()},
    )
    torch._dynamo.reset()
    benchmark.pedantic(contenders["patched"], rounds=1)


@pytest.mark.skipif(GPU, reason="a model for CPUs")
@pytest.mark.parametrize("mode", ["training step", "sampling, 4 steps"])
def test_emoji_flux(benchmark: Any, mode: str) -> None:
    batch = 32

    def contender(patch: bool) -> Callable[[], Any]:
        pipeline = FluxPipeline.from_pretrained(EMOJI, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        transformer, family = pipeline.transformer, Flux()
        if patch:
            patched(transformer)
        conditioning = family.encode_prompts(pipeline, ["grinning face"] * batch, 1.0, 24)
        torch.manual_seed(0)
        x = torch.randn(batch, *family.latent_shape(pipeline, 64, 64))
        t = torch.rand(batch)
        embeds = {
            "prompt_embeds": conditioning.prompt_embeds,
            "pooled_prompt_embeds": conditioning.pooled_prompt_embeds,
        }

        def train() -> None:
            transformer.zero_grad(set_to_none=True)
            family.predict(transformer, x, t, conditioning).square().mean().backward()

        def sample() -> None:
            pipeline(**embeds, height=64, width=64, num_inference_steps=4, output_type="latent")

        return train if mode == "training step" else sample

    contenders = {"stock": contender(False), "patched": contender(True)}
    benchmark.extra_info.update(
        op="emoji FLUX",
        workload=f"B{batch}",
        dtype="float32",
        mode=mode,
        turns=take_turns(contenders, rounds=25, warmup=3),
    )
    benchmark.pedantic(contenders["patched"], rounds=1)
