"""FLUX.1-dev's whole geometry on a GPU with random weights: attention alone, inference, recovery.

1024 x 1024 pixels, 4096 + 512 tokens, batch size 1, bfloat16; the peak of a matrix product is
measured first, for comparison. All measurements are plain functions of a geometry, so that a test
can run them on a CPU at a tiny one.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import flux_models
from benchmarks.turns import peak_mib, take_turns
from fastdistill import ops
from fastdistill.compress.recovery import Recovery, RecoveryWeights
from fastdistill.compress.surgery import CutModel
from fastdistill.data.latents import LatentBatch
from fastdistill.models.families.family import BlockId, Conditioning
from fastdistill.models.families.flux import Flux
from fastdistill.models.patch import patched
from fastdistill.ops.attention import LIMITS, attend, why_not_attention

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """FLUX transformer and the size of its inputs; `config` replaces FLUX.1-dev's."""

    device: torch.device
    text: int
    image: int
    doubles: int
    singles: int
    config: dict[str, Any]
    rounds: int

    @property
    def workload(self) -> str:
        return f"T{self.text}-I{self.image}-{self.doubles}+{self.singles} blocks"

    def transformer(self, doubles: int | None = None, singles: int | None = None) -> nn.Module:
        return flux_models.transformer(
            self.device,
            DTYPE,
            self.doubles if doubles is None else doubles,
            self.singles if singles is None else singles,
            **self.config,
        )

    def flops(self) -> int:
        return (self.doubles + self.singles) * flux_models.block_flops(self.text + self.image)


FLUX_DEV = Geometry(device=torch.device("cuda"), text=512, image=4096, doubles=19, singles=38, config={}, rounds=8)


@needs_gpu
def test_matrix_product(benchmark: Any) -> None:
    """Peak of the matrix product with which the models' times are compared."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=DTYPE) for _ in range(2))
    benchmark.extra_info.update(
        op="matrix product",
        workload=f"{n}^3",
        dtype="bfloat16",
        mode="forward",
        flops=2 * n**3,
        turns=take_turns({"torch": lambda: a @ b}, 20, 5),
    )
    benchmark.pedantic(lambda: a @ b, rounds=1)


@needs_gpu
@pytest.mark.parametrize("mode", ["forward", "both"])
def test_attention(benchmark: Any, mode: str) -> None:
    contenders = attention_contenders(torch.device("cuda"), tokens=4608, heads=24, head_size=128, mode=mode)
    flops = 4 * 4608**2 * 24 * 128
    benchmark.extra_info.update(
        op="attention",
        workload="B1-S4608-H24-d128",
        dtype="bfloat16",
        mode=mode,
        # The backward pass has five matrix products to the forward's two.
        flops=flops if mode == "forward" else flops * 7 // 2,
        turns=take_turns(contenders, 20, 5),
    )
    benchmark.pedantic(contenders["native"], rounds=1)


def attention_contenders(
    device: torch.device, tokens: int, heads: int, head_size: int, mode: str
) -> dict[str, Callable[[], object]]:
    """Every attention backend that can run here, and both forms of `rope_attention`: on the best
    backend, and in one kernel."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, head_size, device=device, dtype=DTYPE, requires_grad=True) for _ in range(3)
    )
    weights = [torch.ones(head_size, device=device, dtype=DTYPE, requires_grad=True) for _ in range(2)]
    tables = [torch.randn(tokens, head_size, device=device) for _ in range(2)]
    upstream = torch.randn_like(q)

    def contender(attention: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return attention()

        return forward if mode == "forward" else lambda: torch.autograd.grad(attention(), leaves, upstream)

    def rope(attention: str, backend: Any = None) -> Callable[[], object]:
        return contender(
            lambda: ops.rope_attention(q, k, v, *weights, *tables, attention=attention, backend=backend),
            [q, k, v, *weights],
        )

    able = [name for name in LIMITS if why_not_attention(name, device, DTYPE, mode == "both", head_size) is None]
    chosen = {
        name: contender(lambda name=name: attend(q, k, v, name), [q, k, v]) for name in able if "sage" not in name
    }
    chosen["rope_attention"] = rope("auto")
    if device.type == "cuda":
        chosen["rope_attention in one kernel"] = rope("fused", "triton")
    return chosen


@needs_gpu
def test_inference(benchmark: Any) -> None:
    benchmark.extra_info.update(measure_inference(FLUX_DEV))
    benchmark.pedantic(lambda: None, rounds=1)


def measure_inference(geometry: Geometry) -> dict[str, Any]:
    """One denoising step of the transformer: stock, compiled, patched, and patched with float8
    linear layers."""
    model = geometry.transformer()
    inputs = flux_models.inputs(model, geometry.text, geometry.image)
    outputs: dict[str, Tensor] = {}

    def step(name: str, patch: bool) -> Callable[[], None]:
        @torch.no_grad()
        def once() -> None:
            with patched(model) if patch else nullcontext():
                (outputs[name],) = model(**inputs)

        return once

    turns: dict[str, list[float]] = {}
    peaks: dict[str, float | None] = {}

    def measure(**contenders: Callable[[], None]) -> None:
        named = {name.replace("_", " "): run for name, run in contenders.items()}
        turns.update(take_turns(named, geometry.rounds, 2))
        peaks.update({name: peak_mib(run) for name, run in named.items()})

    measure(stock=step("stock", False), patched=step("patched", True))
    # Block by block, as diffusers advises: two compilations instead of fifty-seven blocks in one.
    model.compile_repeated_blocks(fullgraph=True)
    measure(stock_compiled=step("stock compiled", False), patched_compiled=step("patched compiled", True))
    if float8_is_here(geometry.device):
        quantised(model)
        torch._dynamo.reset()
        measure(patched_compiled_float8=step("patched compiled float8", True))
    notes = {}
    for name in turns:
        if name != "stock":
            difference = (outputs[name].float() - outputs["stock"].float()).norm() / outputs["stock"].float().norm()
            notes[name] = f"output {float(difference):.1e} from stock"
    torch._dynamo.reset()
    return {
        "op": "FLUX.1-dev",
        "workload": geometry.workload,
        "dtype": "bfloat16",
        "mode": "inference step",
        "flops": geometry.flops(),
        "turns": turns,
        "peak_mib": peaks,
        "notes": notes,
    }


def float8_is_here(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 9)
        and importlib.util.find_spec("torchao") is not None
    )


def quantised(model: nn.Module) -> None:
    """Make weights and activations of the blocks float8, scaled by row; layers before and after the
    blocks stay."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def in_a_block(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "blocks" in name and "norm" not in name

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=in_a_block)


@needs_gpu
def test_recovery_step(benchmark: Any) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    benchmark.extra_info.update(measure_recovery_step(FLUX_DEV))
    benchmark.pedantic(lambda: None, rounds=1)


def measure_recovery_step(geometry: Geometry) -> dict[str, Any]:
    """Recovery's loss on a model of two thirds of the blocks, forward and backward, with gradient
    checkpointing.

    The teacher's forward pass is included, the optimizer's step is not.
    """
    doubles, singles = max(1, 2 * geometry.doubles // 3), max(1, 2 * geometry.singles // 3)
    teacher = geometry.transformer().requires_grad_(False)
    student = geometry.transformer(doubles, singles)
    student.enable_gradient_checkpointing()
    student.train()
    boundaries = {
        BlockId(stack=stack, index=i): BlockId(stack=stack, index=i)
        for stack, count in (("transformer_blocks", doubles), ("single_transformer_blocks", singles))
        for i in range(count)
    }
    model = CutModel(student=student, teacher=teacher, family=Flux(), boundaries=boundaries)
    method = Recovery(model, RecoveryWeights(task=1.0, out=1.0, feat=0.1))
    side = 2 * round(geometry.image**0.5)
    embeds = torch.randn(1, geometry.text, teacher.config.joint_attention_dim, device=geometry.device, dtype=DTYPE)
    pooled = torch.randn(1, teacher.config.pooled_projection_dim, device=geometry.device, dtype=DTYPE)
    guidance = torch.full((1,), 3.5, device=geometry.device, dtype=DTYPE)
    conditioning = Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled, guidance=guidance)
    latents = torch.randn(1, teacher.config.in_channels // 4, side, side, device=geometry.device, dtype=DTYPE)
    batch = LatentBatch(latents=latents, conditioning=conditioning)

    def step(patch: bool, eager_loss: bool) -> Callable[[], None]:
        def once() -> None:
            student.zero_grad(set_to_none=True)
            with (
                patched(teacher) if patch else nullcontext(),
                patched(student) if patch else nullcontext(),
                ops.use_backend("eager" if eager_loss else "auto"),
            ):
                method.loss("student", batch, torch.Generator().manual_seed(0)).total.backward()

        return once

    contenders = {"stock, eager loss": step(False, True), "patched": step(True, False)}
    return {
        "op": "FLUX.1-dev",
        "workload": f"{geometry.workload} to {doubles}+{singles}",
        "dtype": "bfloat16",
        "mode": "recovery step",
        "turns": take_turns(contenders, max(2, geometry.rounds // 2), 1),
        "peak_mib": {name: peak_mib(run) for name, run in contenders.items()},
    }
