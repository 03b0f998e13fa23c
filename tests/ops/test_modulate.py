"""Modulation: messages, instruction sets, long and large inputs, dynamic sizes."""

import pytest
import torch

from fastdistill import ops
from fastdistill.ops import backend as backends

x = torch.zeros(2, 5, 8)
m = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((x[0, 0], m, m), ValueError, r"x: expected \(B, S, D\) or \(S, D\), got \(8,\)"),
        (
            (x, m[:, :4], m),
            ValueError,
            r"scale: expected \(8,\), \(2, 8\), \(2, 1, 8\) or \(2, 5, 8\).*got \(2, 4\)",
        ),
        ((x, torch.zeros(3, 8), m), ValueError, "scale: expected"),
        ((x, torch.zeros(1, 5, 8), m), ValueError, "scale: expected"),
        ((x, m, m[:1]), ValueError, r"shift: expected the shape of scale, \(2, 8\), got \(1, 8\)"),
        ((x, m.half(), m), TypeError, "scale: expected the dtype of x, torch.float32.*torch.float16"),
        ((x.double(), m, m), TypeError, "scale: expected the dtype of x, torch.float64"),
        ((x, m, m.double()), TypeError, "shift: expected the dtype of scale"),
        ((x, m.to("meta"), m), ValueError, "scale: expected on the device of x, cpu, got .* on meta"),
        ((x, m, m.to("meta")), ValueError, "shift: expected on the device of scale, cpu, got .* on meta"),
        (
            (x.transpose(1, 2), x[:, 0, :5], x[:, 0, :5]),
            ValueError,
            r"x: expected a contiguous last dimension",
        ),
    ],
)
def test_messages_name_the_argument(arguments, error, message) -> None:
    for backend in ("eager", "auto"):
        with pytest.raises(error, match=message):
            ops.modulate(*arguments, backend=backend)


@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
def test_the_op_itself_reads_nothing_out_of_bounds() -> None:
    forward, backward = (
        torch.ops.fastdistill.modulate.default,
        torch.ops.fastdistill.modulate_backward.default,
    )
    for arguments in (
        (x, m[:, :4], m[:, :4]),
        (x, torch.zeros(3, 8), m),
        (x.transpose(1, 2), m, m),
        (x, m.half(), m),
    ):
        with pytest.raises(RuntimeError, match=r"expected|contiguous"):
            forward(*arguments, 1e-6)
    with pytest.raises(RuntimeError, match="stats"):
        backward(x, x, m, torch.zeros(2, 2, 4), True)
    with pytest.raises(RuntimeError, match="grad"):
        backward(x[:, :4], x, m, torch.zeros(2, 2, 5), True)


@pytest.mark.slow_but_first
@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set_agrees(capability: str) -> None:
    """Each instruction set in a process of its own, since the choice is made once."""
    import os
    import subprocess
    import sys

    code = """
import torch
from fastdistill.ops.modulate import MODULATE
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for case in MODULATE.cases():
        arguments = case.make(dtype, torch.device("cpu"))
        results = []
        upstream = torch.randn(arguments[0].shape).to(dtype)
        for backend in ("eager", "native"):
            out = MODULATE(*arguments, backend=backend)
            results.append((out, *torch.autograd.grad(out, arguments[:3], upstream)))
        for a, b in zip(*results):
            eps = torch.finfo(dtype).eps
            limit = 32 * eps * max(1.0, b.abs().max().item() if b.numel() else 0.0)
            if "offset100" in case.id: limit *= 100
            assert a.shape == b.shape and ((a - b).abs() <= limit).all(), (dtype, case.id, limit)
special = torch.tensor([[float("nan"), 1.0, float("inf"), 2.0]] * 3)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    zero = torch.zeros(4, dtype=dtype)
    assert MODULATE(special.to(dtype), zero, zero, 1e-6, backend="native").isnan().all()
"""
    environment = {**os.environ, "FASTDISTILL_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
def test_frozen_modulation_costs_no_gradient() -> None:
    leaf = torch.randn(2, 5, 8, requires_grad=True)
    scale, shift = torch.randn(2, 8), torch.randn(2, 8)
    results = [
        torch.autograd.grad(ops.modulate(leaf, scale, shift, backend=b).sum(), leaf)[0] for b in ("native", "eager")
    ]
    torch.testing.assert_close(*results)


@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
def test_many_chunks_of_tokens() -> None:
    """Long enough that every batch element is summed in many chunks, with a remainder in each."""
    arguments = [
        torch.randn(3, 1031, 40, requires_grad=True),
        torch.randn(40, requires_grad=True),
        torch.randn(40, requires_grad=True),
    ]
    wide = [a.detach().double().requires_grad_() for a in arguments]
    upstream = torch.randn(3, 1031, 40)
    actual = torch.autograd.grad(ops.modulate(*arguments, backend="native"), arguments, upstream)
    exact = torch.autograd.grad(ops.modulate(*wide, backend="eager"), wide, upstream.double())
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).abs().max() <= 2e-6 * e.abs().max()


@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_larger_than_the_cache(dtype: torch.dtype) -> None:
    """Results that streaming stores write; a row of three registers shows that none is left out."""
    tokens = (17 << 20) // (48 * dtype.itemsize)
    arguments = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((1, tokens, 48), (48,), (48,))]
    wide = [a.detach().double().requires_grad_() for a in arguments]
    upstream = torch.randn(1, tokens, 48, dtype=dtype)
    results = []
    for leaves, backend in ((arguments, "native"), (wide, "eager")):
        out = ops.modulate(*leaves, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))))
    for actual, exact in zip(*results, strict=True):
        assert (actual - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
def test_one_graph_serves_every_number_of_tokens() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: ops.modulate(*a, backend="native"), backend=count, fullgraph=True)
    for tokens in (5, 9, 33, 70):
        arguments = (torch.randn(2, tokens, 8), torch.randn(2, 8), torch.randn(2, 8))
        assert torch.equal(compiled(*arguments), ops.modulate(*arguments, backend="native"))
    assert len(graphs) <= 2, "one for the first size, one for all others"
