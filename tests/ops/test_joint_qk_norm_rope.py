"""Joint query-key norm: agreement with FLUX's and SD3's blocks, packed or not, and messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from fastdistill import ops
from fastdistill.ops import backend as backends
from fastdistill.ops.op import Operator

OP: Operator = ops.OPERATORS["joint_qk_norm_rope"]
B, T, S, H, D = 2, 3, 6, 2, 16


@pytest.fixture(params=["eager", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.why_not(OP.name, request.param, "cpu", torch.float32):
        pytest.skip(reason)
    return str(request.param)


def streams() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, 3, H, D, requires_grad=True), torch.randn(B, S, 3, H, D, requires_grad=True)


def weights() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(D), torch.randn(D)) for _ in range(2)]


@pytest.mark.parametrize("rotate", [True, False])
def test_it_is_that_of_a_block_of_diffusers(backend: str, rotate: bool) -> None:
    text, image = streams()
    of_text, of_image = weights()
    angles = torch.randn(T + S, D // 2).repeat_interleave(2, dim=1)
    tables = (angles.cos(), angles.sin()) if rotate else (None, None)
    expected = []
    for which in range(3):
        parts = [text[:, :, which], image[:, :, which]]
        if which < 2:
            parts = [
                torch.nn.functional.rms_norm(x, (D,), w[which], 1e-6)
                for x, w in zip(parts, (of_text, of_image), strict=True)
            ]
        joined = torch.cat(parts, dim=1)
        expected.append(apply_rotary_emb(joined, tables, sequence_dim=1) if rotate and which < 2 else joined)
    actual = ops.joint_qk_norm_rope(text, image, of_text, of_image, *tables, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_packed_and_separate_streams_give_the_same_bits(backend: str) -> None:
    angles = torch.randn(T + S, D // 2)
    text, image = streams()
    arguments = (*weights(), angles.cos(), angles.sin())
    results = []
    for packed in (True, False):
        pair = (text, image) if packed else (text.unbind(2), image.unbind(2))
        outs = ops.joint_qk_norm_rope(*pair, *arguments, backend=backend)
        torch.manual_seed(1)
        upstream = [torch.randn_like(out) for out in outs]
        results.append((*outs, *torch.autograd.grad(outs, (text, image), upstream)))
    for packed, separate in zip(*results, strict=True):
        assert torch.equal(packed, separate)


x = torch.zeros(B, S, H, D)
t = torch.zeros(B, T, H, D)
w = torch.zeros(D)
c = torch.zeros(T + S, D)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ((t, t), (x, x, x), (w, w), (w, w), c, c),
            ValueError,
            r"text: expected \(q, k, v\) or one packed tensor, got 2 tensors",
        ),
        (
            (t, (x, x, x), (w, w), (w, w), c, c),
            ValueError,
            r"text: expected \(q, k, v\) or one packed \(B, S, 3, H, d\), got \(2, 3, 2, 16\)",
        ),
        (((t, t, t), (x, x[:, 1:], x), (w, w), (w, w), c, c), ValueError, r"image k: expected \(2, 6, H, 16\)"),
        (((t, t, t), (x, x, x.half()), (w, w), (w, w), c, c), TypeError, "image v: expected the dtype of image q"),
        (
            ((t[:1], t[:1], t[:1]), (x, x, x), (w, w), (w, w), c, c),
            ValueError,
            r"text q: expected \(2, T, 2, 16\) on cpu as image q",
        ),
        (((t, t, t), (x, x, x), (w, w[1:]), (w, w), c, c), ValueError, r"text k weight: expected \(16,\)"),
        (((t, t, t), (x, x, x), (w, w), (w, w), c[1:], c), ValueError, r"cos: expected \(9, 16\) or \(9, 8\)"),
        (((t, t, t), (x, x, x), (w, w), (w, w), c, None), ValueError, "cos, sin: expected both or neither"),
        (((t, t, t), (x, x, x), (w, w), (w, w), c, c.double()), TypeError, "sin: expected torch.float32"),
    ],
)
def test_messages_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    for backend in ("eager", "auto"):
        with pytest.raises(error, match=message):
            ops.joint_qk_norm_rope(*arguments, backend=backend)


@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
def test_the_op_itself_reads_nothing_out_of_bounds() -> None:
    forward = torch.ops.fastdistill.joint_qk_norm_rope.default
    packed = torch.zeros(B, S, 3, H, D)
    for arguments in (
        (t, t, t, x, x[:, :4], x, w, w, w, w, c, c),
        (t, t, t, x[:, :, :1], x, x, w, w, w, w, c, c),
        (packed[:, :, :2], None, None, packed, None, None, w, w, w, w, None, None),
        (t, t, t, x, x, x, w, w, w, w[:4], c, c),
        (t, t, t, x, x, x, w, w, w, w, c[2:], c[2:]),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            forward(*arguments, 1e-6, True)
