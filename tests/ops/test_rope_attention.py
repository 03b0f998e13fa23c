"""Attention with norms and rotation: agreement of both forms, choice of the backend, messages."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

from fastdistill import ops
from fastdistill.ops import attention
from fastdistill.ops import backend as backends
from fastdistill.ops.attention import attend, choose_attention, why_not_attention
from fastdistill.ops.op import Operator

OP: Operator = ops.OPERATORS["rope_attention"]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def arguments(B: int, S: int, H: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as chunks of one projection, weights, and tables of angles."""
    q, k, v = torch.randn(B, S, 3, H, d).to(dtype).unbind(2)
    weights = [(1 + 0.3 * torch.randn(d)).to(dtype) for _ in range(2)]
    angles = torch.randn(S, d // 2)
    return [*(t.detach().requires_grad_() for t in (q, k, v, *weights)), angles.cos(), angles.sin()]


def results(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    out = run(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs[:5], grad.to(out.dtype))


def reference(*inputs: Tensor) -> Tensor:
    out: Tensor = OP.reference(*inputs, 1e-6, True)
    return out


def largest_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["auto", "native", "_native_math"])
def test_two_operators_are_the_formula(name: str, dtype: torch.dtype) -> None:
    inputs = arguments(2, 19, 3, 24, dtype)
    grad = torch.randn(2, 19, 3, 24)
    actual = results(lambda *a: ops.rope_attention(*a, attention=name), inputs, grad)
    eager = results(reference, inputs, grad)
    exact = results(reference, [t.detach().double().requires_grad_(t.requires_grad) for t in inputs], grad.to(dtype))
    for a, e, x in zip(actual, eager, exact, strict=True):
        assert a.shape == e.shape
        assert a.dtype == dtype
        assert largest_error(a, x) <= 2 * largest_error(e, x) + torch.finfo(dtype).eps * x.abs().max()


def test_norms_without_a_rotation() -> None:
    q, k, v, q_weight, k_weight, *_ = arguments(1, 5, 2, 8)
    expected = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (F.rms_norm(q, (8,), q_weight, 1e-6), F.rms_norm(k, (8,), k_weight, 1e-6), v))
    )
    for form in ("auto", "fused"):
        actual = ops.rope_attention(q, k, v, q_weight, k_weight, None, None, attention=form)
        torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.fixture
def interpreted() -> None:
    if reason := backends.why_not(OP.name, "triton", "cpu", torch.float32):
        pytest.skip(reason)


def fused(*inputs: Tensor) -> Tensor:
    return ops.rope_attention(*inputs, attention="fused", backend="triton")  # type: ignore[arg-type]


@pytest.mark.usefixtures("interpreted")
def test_fused_over_several_blocks() -> None:
    """50 tokens: four blocks of 16 that a program owns, two steps of 32, none full at the end."""
    inputs, grad = arguments(2, 50, 2, 40), torch.randn(2, 50, 2, 40)
    actual, expected = results(fused, inputs, grad), results(reference, inputs, grad)
    assert actual[0].is_contiguous()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_fused_with_scores_beyond_the_exponents_of_float32(sign: float) -> None:
    """Every score is -128 or 128.

    A key outside of the sequence, whose score is 0, must neither count nor overflow.
    """
    x, v = torch.randn(1, 1, 1, 64).expand(1, 18, 1, 64), torch.randn(1, 18, 1, 64)
    weight = torch.full((64,), 4.0)
    inputs = [
        x.clone().requires_grad_(),
        (sign * x).clone().requires_grad_(),
        v.requires_grad_(),
        weight,
        weight.clone(),
    ]
    inputs = [t.detach().requires_grad_() for t in inputs] + [torch.ones(18, 32), torch.zeros(18, 32)]
    grad = torch.randn(1, 18, 1, 64)
    actual, expected = results(fused, inputs, grad), results(reference, inputs, grad)
    torch.testing.assert_close(actual[0], v.detach().mean(dim=1, keepdim=True).expand_as(v), rtol=1e-4, atol=1e-4)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("interpreted")
def test_fused_without_eps() -> None:
    """Rows that fill up a block are zero, and their norm without eps would be 0 / 0."""
    inputs, grad = arguments(1, 5, 1, 16), torch.randn(1, 5, 1, 16)
    actual = results(lambda *a: ops.rope_attention(*a, eps=0.0, attention="fused", backend="triton"), inputs, grad)  # type: ignore[arg-type]
    expected = results(lambda *a: OP.reference(*a, 0.0, True), inputs, grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_fused_differentiates_only_what_is_needed() -> None:
    q, k, v, *constants = (t.detach() for t in arguments(1, 3, 2, 8))
    v.requires_grad_()
    fused(q, k, v, *constants).sum().backward()
    assert v.grad is not None
    assert all(t.grad is None for t in (q, k, *constants))


def test_fused_falls_back_to_eager_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    inputs = [t.detach() for t in arguments(1, 5, 2, 8)]
    backends._CHOICES.clear()
    with caplog.at_level(logging.INFO, "fastdistill"):
        assert torch.equal(ops.rope_attention(*inputs, attention="fused"), reference(*inputs))  # type: ignore[arg-type]
    assert "rope_attention on cpu torch.float32 runs on eager" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "_native_math"])
def test_two_operators_compile_whole(name: str) -> None:
    inputs, grad = arguments(2, 9, 2, 16), torch.randn(2, 9, 2, 16)

    def run(*a: Tensor) -> Tensor:
        return ops.rope_attention(*a, attention=name)  # type: ignore[arg-type]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, e in zip(results(compiled, inputs, grad), results(run, inputs, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# which attention runs


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[AttentionBackendName]:
    """Backends that diffusers was asked for."""
    asked: list[AttentionBackendName] = []
    real = attention_dispatch.dispatch_attention_fn

    def spy(*args: Any, backend: AttentionBackendName, **kwargs: Any) -> Tensor:
        asked.append(backend)
        return real(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", spy)
    return asked


@pytest.fixture
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_CHOICES", {})
    return


def test_auto_respects_what_the_user_of_diffusers_set(
    dispatched: list[AttentionBackendName], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(1, 4, 1, 8)
    attend(q, q, q)
    with attention_dispatch.attention_backend("_native_math"):
        attend(q, q, q)
        attend(q, q, q, "native")
    monkeypatch.setattr(attention, "choose_attention", lambda *_: pytest.fail("the environment says which"))
    monkeypatch.setattr(attention, "_IN_ENVIRONMENT", True)
    attend(q, q, q)
    assert [name.value for name in dispatched] == ["native", "_native_math", "native", "native"]


def test_a_compiled_auto_follows_the_user_of_diffusers() -> None:
    q, graphs = torch.randn(1, 4, 1, 8), []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count)
    for _ in range(2):
        compiled(q, q, q)
    assert len(graphs) == 1
    with attention_dispatch.attention_backend("_native_math"):
        compiled(q, q, q)
    assert len(graphs) == 2


def test_a_mask() -> None:
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[:, ..., 4:] = False
    torch.testing.assert_close(attend(q, k, v, attn_mask=mask), attend(q, k[:, :4], v[:, :4]), rtol=1e-5, atol=1e-5)


def test_native_on_a_cpu_and_in_float32() -> None:
    assert choose_attention(CPU, torch.bfloat16, True) == "native"
    assert why_not_attention("flash", CPU, torch.bfloat16, False) == "it runs on CUDA devices, not on cpu"


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize(
    ("capability", "packages", "options", "expected"),
    [
        ((9, 0), "3 2 cudnn", {}, "_flash_3"),
        ((9, 0), "3 2 cudnn", {"needs_grad": True}, "_native_cudnn"),
        ((9, 0), "3 2 cudnn", {"needs_grad": True, "head_size": 256}, "flash"),
        ((9, 0), "cudnn", {}, "_native_cudnn"),
        ((9, 0), "2", {}, "flash"),
        ((9, 0), "", {}, "_native_flash"),
        ((9, 0), "3 2 cudnn", {"head_size": 512}, "native"),
        ((9, 0), "3 2 cudnn", {"masked": True}, "_native_cudnn"),
        ((9, 0), "3 2 cudnn", {"dtype": torch.float32}, "native"),
        ((10, 0), "3 2 cudnn", {}, "_native_cudnn"),
        ((10, 3), "2 cudnn", {"needs_grad": True}, "_native_cudnn"),
        ((12, 0), "2", {}, "flash"),
        ((8, 0), "3 2 cudnn", {}, "flash"),
        ((8, 9), "cudnn xformers", {}, "_native_flash"),
        ((8, 6), "xformers", {"head_size": 512}, "xformers"),
        ((8, 6), "2 xformers", {"masked": True}, "native"),
        ((7, 5), "2 xformers cudnn", {"dtype": torch.float16}, "native"),
    ],
)
def test_the_table_of_preferences(
    capability: tuple[int, int], packages: str, options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = packages.split()
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", "3" in there)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", "2" in there)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", "xformers" in there)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: "cudnn" in there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose_attention(GPU, **{"dtype": torch.bfloat16, "needs_grad": False, **options}) == expected


def test_no_backend_without_gradients_or_from_afar_is_preferred() -> None:
    for _, names in attention.PREFERENCES:
        for name in names:
            assert not name.endswith("hub")
            assert "sage" not in name
    for name in attention.LIMITS:
        AttentionBackendName(name)  # raises ValueError for a name that diffusers does not have
        if "sage" in name:
            assert why_not_attention(name, GPU, torch.bfloat16, True) == "it has no backward pass in diffusers"


@pytest.mark.usefixtures("fresh_choices")
def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastdistill"):
        for _ in range(2):
            choose_attention(CPU, torch.bfloat16, True, 64)
    assert [record.getMessage() for record in caplog.records] == [
        "attention on cpu torch.bfloat16, head size 64, with gradients: native"
    ]


def test_a_name_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: False)
    inputs = arguments(1, 4, 1, 8)
    with pytest.raises(
        RuntimeError,
        match="'flash' was asked for, but it runs on CUDA devices, not on cpu; here run native, _native_math",
    ):
        ops.rope_attention(*inputs, attention="flash")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"'flash_hub' was asked for, but .*kernels"):
        ops.rope_attention(*inputs, attention="flash_hub")  # type: ignore[arg-type]
    with pytest.raises(
        RuntimeError, match=r"'_native_flash' was asked for, but it takes bfloat16 and float16, not torch.float32"
    ):
        ops.rope_attention(*inputs, attention="_native_flash")  # type: ignore[arg-type]


def test_messages_offer_what_is_taken() -> None:
    inputs = arguments(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"attention: expected auto or one of flash, .*, got 'fused'"):
        attend(*inputs[:3], "fused")
    with pytest.raises(ValueError, match=r"attention: expected fused, auto or one of flash, .*, got 'flash3'"):
        ops.rope_attention(*inputs, attention="flash3")  # type: ignore[arg-type]


@pytest.mark.slow
def test_importing_the_operators_leaves_diffusers_alone() -> None:
    code = "import fastdistill.ops, sys; print('diffusers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


# --------------------------------------------------------------------------------------------------
# messages

q, w, t = torch.zeros(2, 5, 3, 8), torch.zeros(8), torch.zeros(5, 8)
large, large_w, large_t = torch.zeros(1, 1, 1, 258), torch.zeros(258), torch.zeros(1, 258)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((q[0], q, q, w, w, t, t), ValueError, r"q: expected \(B, S, H, d\), got \(5, 3, 8\)"),
        ((q[..., :7], q, q, w, w, t, t), ValueError, "q: expected an even head size"),
        (
            (q, q[:, :, :1], q, w, w, t, t),
            ValueError,
            r"k: expected the shape and device of q, \(2, 5, 3, 8\) on cpu, got \(2, 5, 1, 8\)",
        ),
        (
            (q, q, q[:, :4], w, w, t, t),
            ValueError,
            r"v: expected the shape and device of q, \(2, 5, 3, 8\) on cpu, got \(2, 4, 3, 8\)",
        ),
        ((q, q.half(), q, w, w, t, t), TypeError, "k: expected the dtype of q, torch.float32"),
        ((q, q, q.half(), w, w, t, t), TypeError, "v: expected the dtype of q, torch.float32"),
        ((q, q, q.mT.contiguous().mT, w, w, t, t), ValueError, "v: expected a contiguous last dimension"),
        ((q, q, q, w[:4], w, t, t), ValueError, r"q_weight: expected \(8,\) on cpu, got \(4,\)"),
        ((q, q, q, w, w, t[:4], t[:4]), ValueError, r"cos: expected \(5, 8\) or \(5, 4\)"),
        ((q, q, q, w, w, t, t.clone().requires_grad_()), ValueError, "sin: expected a constant"),
        ((q, q, q, w, w, t, None), ValueError, "cos, sin: expected both or neither"),
    ],
)
def test_messages_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    for form in ("fused", "auto"):
        with pytest.raises(error, match=message):
            ops.rope_attention(*arguments, attention=form)


def test_more_messages() -> None:
    for form in ("fused", "auto"):
        with pytest.raises(ValueError, match="pairing: expected adjacent or half, got 'neox'"):
            ops.rope_attention(q, q, q, w, w, t, t, pairing="neox", attention=form)  # type: ignore[arg-type]


def test_a_head_size_beyond_the_fused_kernels() -> None:
    inputs = large, large, large, large_w, large_w, large_t, large_t
    with pytest.raises(ValueError, match=r"q: expected a head size of at most 256 for attention='fused', got .*258"):
        ops.rope_attention(*inputs, attention="fused")
    assert ops.rope_attention(*inputs).shape == large.shape
