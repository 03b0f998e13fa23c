"""`compile_repeated_blocks` on a patched model: as many sizes as on the stock one, fewer graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import FailOnRecompileLimitHit

from fastdistill.models.patch import patched
from tests.tiny_families import flux_inputs, run, seeded, tiny_flux, tiny_sd3

# Tokens of an image, one size after the other.
SIZES = (9, 4, 6, 12, 2, 8, 10)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def of_size(tokens: int, batch: int) -> dict[str, Any]:
    inputs = flux_inputs(batch)
    return inputs | {
        "hidden_states": torch.randn(batch, tokens, 8),
        "img_ids": torch.arange(3 * tokens).view(tokens, 3) % 5,
    }


def graphs_by_size(patch: bool, batch: int, **options: Any) -> list[int]:
    """Graphs that were compiled up to each size, as far as torch compiles."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model, counts = seeded(tiny_flux), []
    torch._dynamo.reset()
    with torch.no_grad(), patched(model) if patch else nullcontext():
        model.compile_repeated_blocks(fullgraph=True, backend=count, **options)
        for tokens in SIZES:
            try:
                run(model, of_size(tokens, batch))
            except FailOnRecompileLimitHit:
                break
            counts.append(len(graphs))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_as_many_sizes_as_stock_with_fewer_graphs(batch: int) -> None:
    """Sizes that are all compiled for themselves, until torch stops.

    Stock compiles a single block twice for each size: the first one sees other strides.
    """
    stock, fast = graphs_by_size(False, batch, dynamic=False), graphs_by_size(True, batch, dynamic=False)
    assert stock == [3, 6, 9, 12]
    assert fast == [2, 4, 6, 8, 10, 12, 14]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_that_become_dynamic(batch: int) -> None:
    stock, fast = graphs_by_size(False, batch), graphs_by_size(True, batch)
    assert stock == [3] + 6 * [7]
    assert fast == [2] + 6 * [5]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by-blocks"])
@torch.no_grad()
def test_a_model_may_be_patched_after_it_was_compiled(whole: bool) -> None:
    fused: set[str] = set()

    def inspect(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        fused.update(
            node.target.name()
            for node in graph.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fastdistill"
        )
        return graph.forward

    model, inputs = seeded(tiny_flux), of_size(9, 2)
    stock = run(model, inputs)
    backend = aot_autograd(fw_compiler=inspect)
    if whole:
        model = torch.compile(model, backend=backend)
    else:
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(run(model, inputs), stock)
    assert not fused
    with patched(model):
        torch.testing.assert_close(run(model, inputs), stock, rtol=0, atol=1e-5 * float(stock.abs().max()))
    assert {"fastdistill::qk_norm_rope", "fastdistill::gated_residual_modulate"} <= fused
    fused.clear()
    torch.testing.assert_close(run(model, inputs), stock)
    assert not fused


def test_classes_have_code_of_their_own() -> None:
    """torch counts recompilations by code object, and keeps the count over all models of a class."""
    flux, sd3 = seeded(tiny_flux), seeded(tiny_sd3)
    with patched(flux), patched(sd3):
        modules = [m for model in (flux, sd3) for m in model.modules() if "forward" in vars(m)]
        codes = {(type(m).__name__, m.forward.__func__.__code__) for m in modules}
        first = {type(m): m.forward.__func__.__code__ for m in flux.modules() if "forward" in vars(m)}
    assert len({code for _, code in codes}) == len(codes)
    with patched(flux):
        assert all(m.forward.__func__.__code__ is first[type(m)] for m in flux.modules() if type(m) in first)
