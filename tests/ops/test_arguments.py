"""Wrong types: every tensor argument of every operator, with an error that names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdistill import ops
from tests.ops.trials import as_tuple

x, m, h, w, t = (torch.randn(shape) for shape in ((2, 3, 8), (2, 8), (2, 3, 2, 8), (8,), (3, 8)))
stream = {"q": h, "k": h, "v": h}

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor], set[str]]] = {
    "activation_concat": (ops.activation_concat, {"x": x, "y": x}, {"x"}),
    "block_statistics": (ops.block_statistics, {"before": x, "after": x}, set()),
    "dmd_loss": (
        lambda **a: ops.dmd_loss(a.pop("x"), a.pop("noise"), a.pop("cond"), a.pop("uncond"), a.pop("critic"), **a),
        dict.fromkeys(("x", "noise", "cond", "uncond", "critic"), x) | {"weight": w[:2], "mask": x > 0},
        {"uncond", "weight", "mask"},
    ),
    "dmd_loss of v": (
        lambda **a: ops.dmd_loss(x, x, x, x, x, prediction="v", **a),
        {"alpha": w[:2], "sigma": w[:2]},
        {"alpha", "sigma"},
    ),
    "feature_kd_loss": (ops.feature_kd_loss, {"student": x, "teacher": x}, set()),
    "gated_residual": (ops.gated_residual, {"x": x, "y": x, "gate": m}, set()),
    "gated_residual_modulate": (
        ops.gated_residual_modulate,
        {"x": x, "y": x, "gate": m, "scale": m, "shift": m},
        set(),
    ),
    "modulate": (ops.modulate, {"x": x, "scale": m, "shift": m}, set()),
    "modulate_for_two": (ops.modulate_for_two, {"x": x, "scale": m, "shift": m}, set()),
    "qk_norm_rope": (
        ops.qk_norm_rope,
        {"q": h, "k": h, "q_weight": w, "k_weight": w, "cos": t, "sin": t},
        {"cos", "sin"},
    ),
    "rope_attention": (
        ops.rope_attention,
        {**stream, "q_weight": w, "k_weight": w, "cos": t, "sin": t},
        {"cos", "sin"},
    ),
    "rope_attention, fused": (
        lambda **a: ops.rope_attention(**a, attention="fused"),
        {**stream, "q_weight": w, "k_weight": w, "cos": t, "sin": t},
        {"cos", "sin"},
    ),
    "joint_qk_norm_rope": (
        lambda cos, sin, **a: ops.joint_qk_norm_rope(
            tuple(a[f"text {name}"] for name in "qkv"),  # type: ignore[arg-type]
            tuple(a[f"image {name}"] for name in "qkv"),  # type: ignore[arg-type]
            (a["text_q_weight"], a["text_k_weight"]),
            (a["image_q_weight"], a["image_k_weight"]),
            cos,
            sin,
        ),
        {f"{name} {part}": h for name in ("text", "image") for part in "qkv"}
        | {f"{name}_{part}_weight": w for name in ("text", "image") for part in "qk"}
        | {"cos": torch.randn(6, 8), "sin": torch.randn(6, 8)},
        {"cos", "sin"},
    ),
}
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a numpy array": (lambda good: good.numpy(), "got numpy.ndarray"),
    "a list": (lambda good: good.tolist(), "got list"),
    "a number": (lambda good: 0.5, "got float"),
    "integers": (lambda good: good.to(torch.int32), r"got .*torch.int32"),
    "bools": (lambda good: good > 0, r"got .*torch.bool"),
    "complex numbers": (lambda good: good.to(torch.complex64), r"got .*torch.complex64"),
    "sparse": (lambda good: good.to_sparse(), "got .*layout"),
    "None": (lambda good: None, "got None"),
}


def test_every_operator_is_tried() -> None:
    assert {name.split(",")[0].split(" of ")[0] for name in CALLS} == set(ops.OPERATORS)


# For each sample one number, which is cast; PyTorch itself refuses sparse ones.
CAST = ("alpha", "sigma", "weight")


def is_wrong(operator: str, argument: str, wrong: str) -> bool:
    if wrong == "None":
        return argument not in CALLS[operator][2]
    if wrong in ("integers", "bools"):
        return argument not in CAST and (argument, wrong) != ("mask", "bools")
    return wrong != "sparse" or not (argument in CAST or argument.endswith("_weight"))


@pytest.mark.parametrize(
    ("operator", "argument", "wrong"),
    [
        (operator, argument, wrong)
        for operator, (_, good, _) in CALLS.items()
        for argument in good
        for wrong in WRONG
        if is_wrong(operator, argument, wrong)
    ],
)
def test_the_error_names_the_argument(operator: str, argument: str, wrong: str) -> None:
    call, good, _ = CALLS[operator]
    change, got = WRONG[wrong]
    with pytest.raises(TypeError) as caught:
        call(**{**good, argument: change(good[argument])})
    message = str(caught.value)
    assert message.partition(":")[0].replace("_", " ") == argument.replace("_", " "), message
    assert re.search(f"expected .*{got}", message), message


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("wrong", ["integers", "bools", "complex numbers"])
@pytest.mark.parametrize("operator", [name for name in CALLS if name not in ("dmd_loss of v", "joint_qk_norm_rope")])
def test_all_tensors_of_a_wrong_dtype(operator: str, wrong: str, backend: str) -> None:
    call, good, _ = CALLS[operator]
    change, _ = WRONG[wrong]
    with pytest.raises(TypeError, match=r"expected (float32, bfloat16, float16|the dtype|real numbers)"):
        call(**{name: change(value) for name, value in good.items() if name not in ("mask", "weight")}, backend=backend)


@pytest.mark.parametrize("streams", [np.zeros((2, 3, 3, 2, 8)), None, 1.0])
def test_a_stream_that_is_none(streams: Any) -> None:
    with pytest.raises(TypeError, match=r"text: expected \(q, k, v\) or one packed tensor, got"):
        ops.joint_qk_norm_rope(streams, (h, h, h), (w, w), (w, w), None, None)
    with pytest.raises(TypeError, match=r"text_weights: expected the weights of \(q, k\), got Tensor|torch.Tensor"):
        ops.joint_qk_norm_rope((h, h, h), (h, h, h), w, (w, w), None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", [name for name in CALLS if name in ops.OPERATORS])
def test_meta_tensors_give_shapes(operator: str) -> None:
    call, good, _ = CALLS[operator]
    values = as_tuple(call(**good))
    shapes = as_tuple(call(**{name: value.to("meta") for name, value in good.items()}))
    for value, shape in zip(values, shapes, strict=True):
        assert shape.device.type == "meta"
        assert (shape.shape, shape.dtype) == (value.shape, value.dtype)
