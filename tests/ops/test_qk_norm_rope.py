"""Query-key norm with rotation: agreement with diffusers, forms of the tables, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import FluxPosEmbed, apply_rotary_emb
from torch import Tensor

from fastdistill import ops
from fastdistill.ops import backend as backends
from fastdistill.ops.op import Operator

OP: Operator = ops.OPERATORS["qk_norm_rope"]


@pytest.fixture(params=["eager", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.why_not(OP.name, request.param, "cpu", torch.float32):
        pytest.skip(reason)
    return str(request.param)


def flux_tables(S: int) -> tuple[Tensor, Tensor]:
    ids = torch.stack((torch.zeros(S), torch.arange(S) // 4, torch.arange(S) % 4), dim=1)
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(ids)
    return cos, sin


def test_it_is_that_of_a_flux_block(backend: str) -> None:
    B, S, H, d = 2, 10, 3, 128
    q, k = torch.randn(B, S, H, d), torch.randn(B, S, H, d)
    norms = [torch.nn.RMSNorm(d, eps=1e-6) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    tables = flux_tables(S)
    expected = [apply_rotary_emb(norm(x), tables, sequence_dim=1) for norm, x in zip(norms, (q, k), strict=True)]
    actual = ops.qk_norm_rope(q, k, norms[0].weight, norms[1].weight, *tables, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_half_pairing_is_that_of_diffusers(backend: str) -> None:
    q, weight = torch.randn(1, 5, 2, 8), torch.ones(8)
    angles = torch.randn(5, 4)
    full = torch.cat((angles, angles), dim=-1)
    normed = torch.nn.functional.rms_norm(q, (8,), weight, 1e-6)
    expected = apply_rotary_emb(normed, (full.cos(), full.sin()), use_real_unbind_dim=-2, sequence_dim=1)
    actual, _ = ops.qk_norm_rope(q, q, weight, weight, angles.cos(), angles.sin(), pairing="half", backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairing", ["adjacent", "half"])
def test_compact_tables_are_full_ones(pairing: Any, backend: str) -> None:
    q, k, weight = torch.randn(1, 5, 2, 12), torch.randn(1, 5, 2, 12), torch.randn(12)
    angles = torch.randn(5, 6)
    full = angles.repeat_interleave(2, dim=1) if pairing == "adjacent" else torch.cat((angles, angles), dim=1)
    results = [
        ops.qk_norm_rope(q, k, weight, weight, t.cos(), t.sin(), pairing=pairing, backend=backend)
        for t in (angles, full)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_rotation_keeps_the_norm_and_depends_on_distance_alone(backend: str) -> None:
    """Equations 11 and 34 of RoFormer: norms are kept, and <q_m, k_n> is a function of n - m."""
    d, S = 16, 9
    weight = torch.ones(d)
    q, k = (torch.randn(1, 1, 1, d).expand(1, S, 1, d) for _ in range(2))
    angles = torch.arange(S)[:, None] * 10000.0 ** (-torch.arange(d // 2) / (d // 2))
    turned_q, turned_k = ops.qk_norm_rope(q, k, weight, weight, angles.cos(), angles.sin(), backend=backend)
    torch.testing.assert_close(turned_q.norm(dim=-1), torch.full((1, S, 1), d**0.5), rtol=1e-4, atol=1e-4)
    products = turned_q[0, :, 0] @ turned_k[0, :, 0].T
    for distance in range(1 - S, S):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-3, atol=1e-3)


def test_only_what_is_needed_is_differentiated(backend: str) -> None:
    q, k, weight = torch.randn(1, 3, 2, 8, requires_grad=True), torch.randn(1, 3, 2, 8), torch.randn(8)
    tables = torch.randn(3, 4), torch.randn(3, 4)
    out, _ = ops.qk_norm_rope(q, k, weight, weight, *tables, backend=backend)
    out.sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert weight.grad is None


q, k, w, t = torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 1, 8), torch.zeros(8), torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((q[0], k, w, w, t, t), ValueError, r"q: expected \(B, S, H, d\), got \(5, 3, 8\)"),
        ((q[..., :7], k, w, w, t, t), ValueError, "q: expected an even head size of at most 512"),
        ((torch.zeros(1, 1, 1, 514), k, w, w, t, t), ValueError, "q: expected an even head size of at most 512"),
        ((q, k[:, :4], w, w, t, t), ValueError, r"k: expected \(2, 5, H, 8\) on cpu as q, got \(2, 4, 1, 8\)"),
        ((q, k.half(), w, w, t, t), TypeError, "k: expected the dtype of q, torch.float32"),
        (
            (q.transpose(2, 3).contiguous().transpose(2, 3), k, w, w, t, t),
            ValueError,
            "q: expected a contiguous last dimension",
        ),
        ((q, k, w[:4], w, t, t), ValueError, r"q_weight: expected \(8,\) on cpu, got \(4,\)"),
        ((q, k, w, w.half(), t, t), TypeError, "k_weight: expected the dtype of q, torch.float32"),
        ((q.half(), k.half(), w.half(), w, t, t), TypeError, "k_weight: expected the dtype of q_weight, torch.float16"),
        ((q, k, w, w, t[:4], t[:4]), ValueError, r"cos: expected \(5, 8\) or \(5, 4\)"),
        ((q, k, w, w, t, t[:, :4]), ValueError, r"sin: expected \(5, 8\) or \(5, 4\), cos and sin the same"),
        ((q, k, w, w, t.double(), t), TypeError, "cos: expected torch.float32 for q of torch.float32"),
        ((q, k, w, w, t, t.clone().requires_grad_()), ValueError, "sin: expected a constant"),
    ],
)
def test_messages_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    for name in ("eager", "auto"):
        with pytest.raises(error, match=message):
            ops.qk_norm_rope(*arguments, backend=name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pairing: expected adjacent or half, got 'neox'"):
        ops.qk_norm_rope(q, k, w, w, t, t, pairing="neox")  # type: ignore[arg-type]


def test_the_op_itself_reads_nothing_out_of_bounds() -> None:
    if reason := backends.why_not(OP.name, "native", "cpu", torch.float32):
        pytest.skip(reason)
    op = torch.ops.fastdistill.qk_norm_rope.default
    for change in (
        (q[0], k, w, w, t, t),
        (q, k[:1], w, w, t, t),
        (q, k, w[:4], w, t, t),
        (q, k, w, w, t[:4], t[:4]),
        (q, k, w, w, t, t[:, :4]),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            op(*change, 1e-6, True)


def test_many_chunks_with_a_remainder() -> None:
    """Long enough that every thread sums several chunks, which the weight's gradient shows."""
    if reason := backends.why_not(OP.name, "native", "cpu", torch.float32):
        pytest.skip(reason)
    q, k = (torch.randn(2, 1031, heads, 40, requires_grad=True) for heads in (3, 1))
    weights = [torch.randn(40, requires_grad=True) for _ in range(2)]
    tables = [torch.randn(1031, 40) for _ in range(2)]
    leaves = [q, k, *weights]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = [torch.randn_like(q), torch.randn_like(k)]
    actual = torch.autograd.grad(ops.qk_norm_rope(*leaves, *tables, backend="native"), leaves, upstream)
    exact = torch.autograd.grad(
        ops.qk_norm_rope(*wide, *(t.double() for t in tables), backend="eager"), wide, [u.double() for u in upstream]
    )
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).abs().max() <= 4e-6 * e.abs().max()
