"""Operators on features: published formulas, precision where features almost agree, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import ops
from fastdistill.ops import backend as backends
from fastdistill.ops.feature_kd_loss import KINDS

x = torch.zeros(2, 5, 8)


@pytest.fixture(params=["eager", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.why_not("feature_kd_loss", request.param, "cpu", torch.float32):
        pytest.skip(reason)
    return str(request.param)


def loss(kind: str, student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    return ops.feature_kd_loss(student, teacher, kind=kind, backend=backend)  # type: ignore[arg-type]


def test_the_published_formulas(backend: str) -> None:
    s, t = torch.randn(3, 10, 24), 2 * torch.randn(3, 10, 24)
    t[0, 0, 0], s[1, 2, 3] = 300, -400  # massive activations
    torch.testing.assert_close(loss("mse", s, t, backend), F.mse_loss(s, t))
    torch.testing.assert_close(loss("relative_mse", s, t, backend), (s - t).norm() ** 2 / t.norm() ** 2)
    torch.testing.assert_close(loss("cosine", s, t, backend), (2 - 2 * F.cosine_similarity(s, t, dim=-1)).mean())

    def kept(f: Tensor) -> Tensor:
        mean, deviation = f.mean(dim=(1, 2), keepdim=True), f.std(dim=(1, 2), keepdim=True, correction=0)
        return f * ((f - mean).abs() < 2 * deviation)

    masked = loss("masked_mse", s, t, backend)
    torch.testing.assert_close(masked, F.mse_loss(kept(s), kept(t)))
    assert masked < F.mse_loss(s, t) / 10, "the massive activations must be left out"


@pytest.mark.parametrize("kind", KINDS)
def test_equal_features_have_no_distance(kind: str, backend: str) -> None:
    s = torch.randn(2, 7, 40).requires_grad_()
    value = loss(kind, s, s.detach().clone(), backend)
    assert value < 1e-13
    assert torch.autograd.grad(value, s)[0].abs().max() < 1e-7


@pytest.mark.parametrize("name", ["native", "triton"])
def test_cosine_is_exact_where_features_almost_agree(name: str) -> None:
    """2 - 2 cos in float32 is off by 1e-7, a hundredth of the value here."""
    if reason := backends.why_not("feature_kd_loss", name, "cpu", torch.float32):  # type: ignore[arg-type]
        pytest.skip(reason)
    t = 100 + torch.randn(1, 6, 300)
    s = (t * 1.02 * (1 + 3e-3 * torch.randn_like(t))).requires_grad_()
    exact = loss("cosine", s.double(), t.double(), "eager")
    (exact_grad,) = torch.autograd.grad(exact, s)
    value = loss("cosine", s, t, name)
    (grad,) = torch.autograd.grad(value, s)
    assert abs(value.item() / exact.item() - 1) < 3e-4
    assert (grad - exact_grad).abs().max() < 1e-3 * exact_grad.abs().max()
    cosine = ops.block_statistics(s, t, backend=name).cosine  # type: ignore[arg-type]
    torch.testing.assert_close(
        cosine, F.cosine_similarity(s.double(), t.double(), dim=-1).mean(dim=-1).float(), rtol=0, atol=2e-7
    )


def test_tokens_of_zeros(backend: str) -> None:
    s, t = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    s[0, 0], t[0, 1] = 0, 0
    for kind in KINDS:
        leaf = s.clone().requires_grad_()
        value = loss(kind, leaf, t, backend)
        assert value.isfinite()
        assert torch.autograd.grad(value, leaf)[0].isfinite().all()


def test_block_statistics(backend: str) -> None:
    before, after = torch.randn(2, 9, 20), torch.randn(2, 9, 20)
    statistics = ops.block_statistics(before, after, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(statistics.cosine, F.cosine_similarity(before, after, dim=-1).mean(dim=1))
    torch.testing.assert_close(statistics.mse, (before - after).square().mean(dim=(1, 2)))
    torch.testing.assert_close(statistics.norm_before, before.norm(dim=-1).mean(dim=1))
    torch.testing.assert_close(statistics.norm_after, after.norm(dim=-1).mean(dim=1))
    single = ops.block_statistics(before[0], after[0], backend=backend)  # type: ignore[arg-type]
    assert all(torch.equal(a, b[0]) for a, b in zip(single, statistics, strict=True))
    assert ops.block_statistics(before.requires_grad_(), after).cosine.requires_grad is False


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((x[0, 0], x), ValueError, r": expected \(B, S, D\) or \(S, D\), got \(8,\)"),
        (
            (x, x[:1]),
            ValueError,
            r": expected the shape and device of (student|before), \(2, 5, 8\) on cpu, got \(1, 5, 8\)",
        ),
        ((x, x.half()), TypeError, ": expected the dtype of (student|before), torch.float32"),
        ((x, torch.zeros(2, 8, 5).transpose(1, 2)), ValueError, ": expected a contiguous last dimension"),
    ],
)
def test_messages_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="(student|teacher)" + message):
        ops.feature_kd_loss(*arguments)
    with pytest.raises(error, match="(before|after)" + message):
        ops.block_statistics(*arguments)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind: expected one of mse, relative_mse, cosine, masked_mse, got 'l2'"):
        ops.feature_kd_loss(x, x, kind="l2")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_many_chunks_with_a_remainder(kind: str) -> None:
    if reason := backends.why_not("feature_kd_loss", "native", "cpu", torch.float32):
        pytest.skip(reason)
    s, t = (3 + torch.randn(3, 1031, 40) for _ in range(2))
    s.requires_grad_()
    exact = loss(kind, s.double(), t.double(), "eager")
    value = loss(kind, s, t, "native")
    assert abs(value.item() / exact.item() - 1) < 1e-6
    torch.testing.assert_close(torch.autograd.grad(value, s), torch.autograd.grad(exact, s), rtol=2e-5, atol=1e-12)
