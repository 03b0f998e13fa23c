"""DMD loss: agreement with the published trainers, options, messages and failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import ops
from fastdistill.ops import backend as backends
from fastdistill.ops.op import Operator

OP: Operator = ops.OPERATORS["dmd_loss"]
SHAPE = (3, 4, 6, 5)
BACKENDS = ("eager", "native", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.why_not(OP.name, request.param, "cpu", torch.float32):
        pytest.skip(reason)
    return str(request.param)


def draw(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=dtype) for _ in range(count)]


def value_and_gradient(x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = ops.dmd_loss(x, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def published(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Loss that all published trainers make of the distribution matching gradient."""
    x = x.detach().double().requires_grad_()
    loss = 0.5 * F.mse_loss(x, (x - grad).detach())
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-7)


def test_dmd2(backend: str) -> None:
    """DMD2, main/sd_guidance.py: p = x - x0, grad = (p_real - p_fake) / mean |p_real|.

    Guidance u + w (c - u).
    """
    x, noise, cond, uncond, critic = draw(5)
    X, C, U, Y = (t.double() for t in (x, cond, uncond, critic))
    p_real, p_fake = X - (U + 8.0 * (C - U)), X - Y
    grad = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    assert_same(
        value_and_gradient(x, noise, cond, uncond, critic, guidance=8.0, prediction="x0", backend=backend),
        published(x, torch.nan_to_num(grad)),
    )


def test_self_forcing(backend: str) -> None:
    """Self-Forcing, model/dmd.py: grad = fake - real, divided by the mean |x - real| of a sample.

    Guidance c + w (c - u), and a gradient mask.
    """
    x, noise, cond, uncond, critic = draw(5)
    mask = torch.rand(SHAPE) < 0.6
    X, C, U, Y = (t.double() for t in (x, cond, uncond, critic))
    real = C + (C - U) * 3.0
    grad = (Y - real) / (X - real).abs().mean(dim=[1, 2, 3], keepdim=True)
    wide = X.requires_grad_()
    loss = 0.5 * F.mse_loss(wide[mask], (wide - grad)[mask].detach())
    expected = loss.detach(), torch.autograd.grad(loss, wide)[0]
    options = {"guidance": 3.0, "guidance_form": "cond", "prediction": "x0", "mask": mask, "backend": backend}
    assert_same(value_and_gradient(x, noise, cond, uncond, critic, **options), expected)


def test_fastgen_and_fastvideo(backend: str) -> None:
    """FastGen: 1 / (mean of a sample + 1e-6); FastVideo: the mean over the batch."""
    x, noise, cond, uncond, critic = draw(5)
    X, C, U, Y = (t.double() for t in (x, cond, uncond, critic))
    real = U + 2.0 * (C - U)
    distance = (X - real).abs()
    for options, mean in (
        ({"eps": 1e-6}, distance.mean(dim=[1, 2, 3], keepdim=True) + 1e-6),
        ({"normaliser": "batch"}, distance.mean()),
        ({"normaliser": "none"}, torch.ones(())),
    ):
        actual = value_and_gradient(
            x, noise, cond, uncond, critic, guidance=2.0, prediction="x0", backend=backend, **options
        )
        assert_same(actual, published(x, (Y - real) / mean))


@pytest.mark.parametrize("prediction", ["velocity", "eps", "v"])
def test_every_prediction_gives_the_gradient_of_x0(prediction: str, backend: str) -> None:
    """The time cancels: converted predictions of the same networks give the same loss."""
    x, noise, real, critic = draw(4, torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = (1 - t, t) if prediction == "velocity" else (torch.cos(t), torch.sin(t))
    A, S = (c.reshape(-1, 1, 1, 1) for c in (alpha, sigma))
    x_t = A * x + S * noise

    def convert(x0: Tensor) -> Tensor:
        eps = (x_t - A * x0) / S
        return {"velocity": eps - x0, "eps": eps, "v": A * eps - S * x0}[prediction]

    single = [c.float() for c in (x, noise)]
    given = {"alpha": alpha.float(), "sigma": sigma.float()} if prediction == "v" else {}
    actual = value_and_gradient(
        *single, convert(real).float(), None, convert(critic).float(), prediction=prediction, backend=backend, **given
    )
    expected = value_and_gradient(x, noise, real, None, critic, prediction="x0", backend="eager")
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_counts_as_zero(backend: str) -> None:
    x, noise, cond, uncond, critic = draw(5)
    critic[0, 1, 2, 3], critic[0, 0, 0, 0] = torch.nan, torch.inf
    cond[1] = torch.nan  # a whole sample, and with it its normaliser
    loss, grad = value_and_gradient(x, noise, cond, uncond, critic, guidance=2.0, backend=backend)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad[0, 1, 2, 3] == 0
    assert grad[0, 0, 0, 0] == 0
    assert not grad[1].any()
    assert grad[0].any()
    assert grad[2].any()
    strict = value_and_gradient(x, noise, cond, uncond, critic, guidance=2.0, nan_to_zero=False, backend=backend)
    assert not strict[0].isfinite()
    assert strict[1][1].isnan().all()


def test_mask_and_weight(backend: str) -> None:
    x, noise, cond, uncond, critic = draw(5)
    whole = value_and_gradient(x, noise, cond, uncond, critic, guidance=2.0, backend=backend)
    everywhere = value_and_gradient(
        x,
        noise,
        cond,
        uncond,
        critic,
        guidance=2.0,
        mask=torch.ones(1, dtype=torch.bool),
        weight=torch.ones(3),
        backend=backend,
    )
    assert_same(everywhere, tuple(t.double() for t in whole))  # type: ignore[arg-type]
    nowhere = value_and_gradient(
        x, noise, cond, uncond, critic, mask=torch.zeros(SHAPE, dtype=torch.bool), backend=backend
    )
    assert nowhere[0] == 0
    assert not nowhere[1].any()
    _, weighted = value_and_gradient(
        x, noise, cond, uncond, critic, guidance=2.0, weight=torch.tensor([0.0, 1.0, 3.0]), backend=backend
    )
    torch.testing.assert_close(weighted, whole[1] * torch.tensor([0.0, 1.0, 3.0]).reshape(-1, 1, 1, 1))


def test_networks_receive_no_gradient(backend: str) -> None:
    x, noise, cond, uncond, critic = (t.requires_grad_() for t in draw(5))
    ops.dmd_loss(x, noise, cond, uncond, critic, guidance=2.0, backend=backend).backward()
    assert x.grad is not None
    assert all(t.grad is None for t in (noise, cond, uncond, critic))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prediction": "score"}, ValueError, "prediction: expected one of velocity, x0, eps, v, got 'score'"),
        ({"normaliser": "mean"}, ValueError, "normaliser: expected one of sample, batch, none, got 'mean'"),
        ({"guidance_form": "cfg"}, ValueError, "guidance_form: expected uncond or cond"),
        ({"prediction": "v"}, ValueError, "alpha, sigma: expected both with prediction='v'"),
        (
            {"alpha": torch.ones(3), "sigma": torch.ones(3)},
            ValueError,
            "alpha, sigma: expected both with prediction='v', and neither",
        ),
        (
            {"prediction": "v", "alpha": torch.ones(2), "sigma": torch.ones(3)},
            ValueError,
            r"alpha: expected \(3,\).*got \(2,\)",
        ),
        ({"weight": torch.ones(3, 1)}, ValueError, r"weight: expected \(3,\)"),
        ({"mask": torch.ones(3)}, TypeError, "mask: expected bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask: expected a shape that broadcasts to x"),
        ({"noise": torch.zeros(3, 4, 6)}, ValueError, r"noise: expected the shape and device of x, \(3, 4, 6, 5\)"),
        ({"critic": torch.zeros(SHAPE).half()}, TypeError, "critic: expected the dtype of x, torch.float32"),
        ({"x": torch.zeros(())}, ValueError, r"x: expected \(B, ...\)"),
    ],
)
def test_messages_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**dict(zip(("x", "noise", "cond", "uncond", "critic"), draw(5), strict=True)), **change}
    with pytest.raises(error, match=message):
        ops.dmd_loss(**arguments)  # type: ignore[arg-type]


def test_the_op_itself_reads_nothing_out_of_bounds() -> None:
    if reason := backends.why_not(OP.name, "native", "cpu", torch.float32):
        pytest.skip(reason)
    op = torch.ops.fastdistill.dmd_loss.default
    x, noise, cond, uncond, critic = draw(5)
    options = (3.5, -1.0, 1.0, 1.0, 0, 0.0, True)
    for change in (
        {"noise": noise[:, :2]},
        {"critic": critic[:1]},
        {"cond": cond.half()},
        {"x": x.transpose(1, 2)},
        {"uncond": uncond[0]},
    ):
        tensors = {"x": x, "noise": noise, "cond": cond, "uncond": uncond, "critic": critic, **change}
        with pytest.raises(RuntimeError, match="expected"):
            op(*tensors.values(), None, None, None, *options)
    with pytest.raises(RuntimeError, match="weight: expected"):
        op(x, noise, cond, uncond, critic, None, torch.ones(2), None, *options)
