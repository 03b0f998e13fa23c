"""Gated residual, alone and before the norm: messages and the float16 clip."""

import math

import pytest
import torch

from fastdistill import ops
from fastdistill.ops import backend as backends
from fastdistill.ops.op import Operator

x = torch.zeros(2, 5, 8)
m = torch.zeros(2, 8)
needs_library = pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((x[0, 0], x, m), ValueError, r"x: expected \(B, S, D\) or \(S, D\), got \(8,\)"),
        ((x, x[:1], m), ValueError, r"y: expected the shape and device of x, \(2, 5, 8\) on cpu, got \(1, 5, 8\)"),
        ((x, x.half(), m), TypeError, "y: expected the dtype of x, torch.float32"),
        ((x, x.to("meta"), m), ValueError, "y: expected the shape and device of x.* on meta"),
        ((x, x, m[:, :4]), ValueError, r"gate: expected \(8,\), \(2, 8\), \(2, 1, 8\) or \(2, 5, 8\).*got \(2, 4\)"),
        ((x, x, m.half()), TypeError, "gate: expected the dtype of x, torch.float32.*torch.float16"),
        ((x, torch.zeros(2, 8, 5).transpose(1, 2), m), ValueError, "y: expected a contiguous last dimension"),
    ],
)
def test_messages_name_the_argument(arguments, error, message) -> None:
    for backend in ("eager", "auto"):
        with pytest.raises(error, match=message):
            ops.gated_residual(*arguments, backend=backend)
        with pytest.raises(error, match=message):
            ops.gated_residual_modulate(*arguments, m, m, backend=backend)
    with pytest.raises(ValueError, match="scale: expected the shape of gate"):
        ops.gated_residual_modulate(x, x, m, m[:1], m)


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_clip_is_that_of_diffusers_in_float16(backend: str) -> None:
    """Values over the range become +-65504 instead of infinity, and pass no gradient."""
    if reason := backends.why_not("gated_residual", backend, "cpu", torch.float16):
        pytest.skip(reason)
    leaves = [torch.randn(2, 7, 24).half(), torch.randn(2, 7, 24).half(), torch.randn(2, 1, 24).half()]
    leaves[0][0, 3, 5], leaves[1][0, 3, 5], leaves[2][0, 0, 5] = 60000, 6000, 3
    leaves[0][1, 2, 7], leaves[1][1, 2, 7], leaves[2][1, 0, 7] = -60000, 6000, -3
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = torch.randn(2, 7, 24).half()
    results = []
    for run in (
        lambda: (leaves[0] + leaves[2] * leaves[1]).clip(-65504, 65504),
        lambda: ops.gated_residual(*leaves, clip=True, backend=backend),
    ):
        h = run()
        results.append((h, *torch.autograd.grad(h, leaves, upstream)))
    assert results[1][0][0, 3, 5] == 65504
    assert results[1][0][1, 2, 7] == -65504
    assert results[1][1][0, 3, 5] == 0
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=4e-3, atol=1e-2)
    assert not ops.gated_residual(*leaves, backend=backend).isfinite().all()

    modulation = [torch.randn(2, 1, 24).half().requires_grad_() for _ in range(2)]
    h, _ = ops.gated_residual_modulate(*leaves, *modulation, clip=True, backend=backend)
    torch.testing.assert_close(h, results[0][0], rtol=4e-3, atol=1e-2)
    # Through h alone the norm contributes nothing, so the gradients are the residual's.
    for actual, expected in zip(torch.autograd.grad(h, leaves, upstream), results[0][1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=4e-3, atol=1e-2)


def test_the_chain_is_its_two_operators() -> None:
    leaves = [torch.randn(2, 5, 64).bfloat16() for _ in range(2)] + [torch.randn(2, 64).bfloat16() for _ in range(3)]
    h, out = ops.gated_residual_modulate(*leaves)
    assert torch.equal(h, ops.gated_residual(*leaves[:3]))
    assert torch.equal(out, ops.modulate(h, *leaves[3:]))


@needs_library
@pytest.mark.parametrize(
    "op", [ops.OPERATORS["gated_residual"], ops.OPERATORS["gated_residual_modulate"]], ids=lambda op: op.name
)
@pytest.mark.parametrize("shape", [(3, 1031, 40), (1, 6000, 768)], ids=["many chunks", "larger than the cache"])
def test_long(op: Operator, shape: tuple[int, int, int]) -> None:
    """Many chunks with a remainder in each, and results that only streaming stores write."""
    modulations, options = (1, [math.inf]) if op.name == "gated_residual" else (3, [1e-6, math.inf])
    leaves = [torch.randn(s, requires_grad=True) for s in [shape, shape] + [shape[-1:]] * modulations]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for arguments, backend in ((leaves, "native"), (wide, "eager")):
        outputs = op(*arguments, *options, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        upstream = [torch.randn(shape).to(o.dtype) for o in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, arguments, upstream)))
    for actual, exact in zip(*results, strict=True):
        assert (actual - exact).abs().max() <= 4e-6 * exact.abs().max()


@needs_library
def test_the_ops_themselves_read_nothing_out_of_bounds() -> None:
    single, chain = torch.ops.fastdistill.gated_residual.default, torch.ops.fastdistill.gated_residual_modulate.default
    for y, gate in ((x[:, :4], m), (x.half(), m), (x, m[:, :4]), (x, m.half()), (x.transpose(1, 2), m)):
        with pytest.raises(RuntimeError, match=r"expected|contiguous"):
            single(x, y, gate, 1.0)
        with pytest.raises(RuntimeError, match=r"expected|contiguous"):
            chain(x, y, gate, m, m, 1e-6, 1.0)
