"""Consistency distillation: its gradient, its boundary, and the linear flow of a Gaussian."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import LinearVariancePreserving, VarianceExploding
from fastdistill.distill.methods.consistency import ConsistencyDistillation, ConsistencyOptions
from fastdistill.errors import UserError
from tests.distill.methods.toys import (
    FLOW,
    AffineFlow,
    LabelFamily,
    Perceptron,
    assert_moments,
    assert_same_gradient,
    batch_of,
    column,
    exact,
    loss_of,
    null,
    sampled,
    train,
    unlabelled_draws,
)
from tests.toy import gaussian, generator, mixture, quasi_random_noise


def pseudo_huber(difference: Tensor) -> Tensor:
    return ((difference**2 + 1e-6).sqrt() - 1e-3).mean()


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_the_gradient_on_rectified_flow(solver: str) -> None:
    """Shift 2, a skip of 2 of 8 steps, a range of guidance, and a target network that differs from
    the student."""
    student, teacher, batch = Perceptron(guidance=True), exact(mixture(), prediction=Prediction.X0), batch_of(size=64)
    method = ConsistencyDistillation(
        ConsistencyOptions(grid_steps=8, skip=2, solver=solver, guidance_range=(1.0, 5.0)),
        student=student, teacher=teacher, family=LabelFamily(), steps=4, shift=2.0, unconditional=null(),
        teacher_prediction=Prediction.X0,
    )  # fmt: skip
    target_network, labels = Perceptron(guidance=True, seed=4), batch.conditioning.labels
    method.networks["target"].load_state_dict(target_network.state_dict())

    def formula(rng: torch.Generator) -> Tensor:
        noise, n = torch.randn(64, 2, generator=rng).double(), torch.randint(8, (64,), generator=rng)
        w = 1 + 4 * torch.rand(64, generator=rng)
        u = 1 - torch.arange(9) / 8
        grid = (2 * u.double() / (1 + u.double())).float()
        t, s = grid[n], grid[(n + 2).clamp(max=8)]
        x_t = (1 - column(t)) * batch.latents + column(t) * noise

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            x_0 = teacher(x, time) + column(w) * (teacher(x, time, labels) - teacher(x, time))
            return (x - x_0) / column(time)

        first = velocity(x_t, t)
        x_s = x_t + (column(s) - column(t)) * first
        if solver == "heun":
            # The last step, to t = 0, stays Euler's.
            x_s = torch.where(column(s) > 0, x_t + (column(s) - column(t)) * (first + velocity(x_s, s)) / 2, x_s)
        target = torch.where(column(s) > 0, x_s - column(s) * target_network(x_s, s, labels, w), x_s)
        return pseudo_huber(x_t - column(t) * student(x_t, t, labels, w) - target.detach())

    assert_same_gradient(method, "student", batch, formula)


def test_the_gradient_where_some_noise_is_left_at_the_end() -> None:
    """Variance exploding: `f` is Karras' `c_skip x + c_out F` for a network of the noise; without a
    target network."""
    process, student, batch = VarianceExploding(), Perceptron(seed=1), batch_of(size=16)
    teacher = exact(mixture(), process, Prediction.SCORE)
    method = ConsistencyDistillation(
        ConsistencyOptions(grid_steps=4, loss="mse", target_decay=0.0),
        student=student, teacher=teacher, family=LabelFamily(), steps=2, process=process,
        teacher_prediction=Prediction.SCORE, student_prediction=Prediction.EPSILON,
    )  # fmt: skip
    labels = batch.conditioning.labels

    def formula(rng: torch.Generator) -> Tensor:
        noise, n = torch.randn(16, 2, generator=rng).double(), torch.randint(4, (16,), generator=rng)
        t, s = 1 - n / 4, 1 - (n + 1) / 4
        of_t, of_s = process.sigma(column(t)), process.sigma(column(s))
        x_t = batch.latents + of_t * noise
        x_s = x_t - (of_s - of_t) * of_t * teacher(x_t, t, labels)
        end = torch.where(column(s) > 0, x_s - (of_s - 0.01) * student(x_s, s, labels), x_s)
        return (x_t - (of_t - 0.01) * student(x_t, t, labels) - end.detach()).square().mean()

    assert_same_gradient(method, "student", batch, formula)


@pytest.mark.parametrize("process", [FLOW, LinearVariancePreserving(), VarianceExploding()])
def test_the_exact_consistency_function_has_no_loss(process: Any) -> None:
    """On a Gaussian, `f` of a network that predicts the end of the flow agrees with itself up to
    the error of the solver."""
    data = gaussian()

    class End(torch.nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            end = data.flow_map(x_t, t, torch.zeros_like(t), process)
            return process.ddim_data(x_t, end, t, torch.zeros_like(t))

    losses = []
    for grid_steps in (20, 40):
        method = ConsistencyDistillation(
            ConsistencyOptions(grid_steps=grid_steps, loss="mse", target_decay=0.0),
            student=End(), teacher=exact(data, process, Prediction.X0), family=LabelFamily(), steps=2, process=process,
            teacher_prediction=Prediction.X0, student_prediction=Prediction.X0,
        )  # fmt: skip
        losses.append(
            float(loss_of(method, "student", unlabelled_draws(data, 4000)(0, generator()), generator()).total)
        )
    # A step's error is of second order: its square falls sixteenfold with twice the steps, but for
    # the few steps next to the data.
    assert losses[1] < losses[0] / 6


@pytest.mark.slow
def test_a_student_hits_the_linear_flow(flow_of_the_teacher: AffineFlow, tmp_path: Path) -> None:
    """`E |f(x, t) - flow_map|^2` < 1e-4 of the data's variance (4e-6 to 2e-5) at three times; and
    diffusers' stochastic sampling."""
    data, student = gaussian(), copy.deepcopy(flow_of_the_teacher)
    method = ConsistencyDistillation(
        ConsistencyOptions(grid_steps=32, solver="heun", loss="mse", target_decay=0.9),
        student=student, teacher=exact(data), family=LabelFamily(), steps=2,
    )  # fmt: skip
    trainer = train(method, unlabelled_draws(data, 256), tmp_path, steps=1000, learning_rate=3e-3, ema_decay=0.95)
    trainer.emas["student"].copy_to(student)
    x_0, noise = data.draw(4000, generator(2))[0], quasi_random_noise(4000)
    for time in (1.0, 0.5, 0.25):
        t = torch.full((4000,), time)
        x_t = (1 - time) * x_0 + time * noise
        with torch.no_grad():
            error = x_t - time * student(x_t, t) - data.flow_map(x_t, t, torch.zeros(4000), FLOW)
        assert float(error.square().mean()) < 1e-4 * float(data.covariance().trace()) / 2
    for steps in (1, 2):
        assert_moments(sampled(student, method.grid[:-1][:: 32 // steps], stochastic=True), data, 0.03)


def test_the_target_network_follows_the_student_and_is_kept() -> None:
    method = ConsistencyDistillation(
        ConsistencyOptions(target_decay=0.75),
        student=Perceptron(),
        teacher=exact(mixture()),
        family=LabelFamily(),
        steps=4,
    )
    before = {name: value.clone() for name, value in method.networks["target"].state_dict().items()}
    with torch.no_grad():
        for parameter in method.networks["student"].parameters():
            parameter.add_(1)
    method.after_step(0)
    for name, value in method.networks["target"].state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.25)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    method.after_step(1)
    method.load_state_dict(state)
    for name, value in method.networks["target"].state_dict().items():
        assert torch.equal(value, state[f"target.{name}"])


def test_impossible_combinations_are_refused() -> None:
    networks: dict[str, Any] = {"student": Perceptron(), "teacher": exact(mixture()), "family": LabelFamily()}
    with pytest.raises(UserError, match="must be a multiple of the steps, such as 48"):
        ConsistencyDistillation(ConsistencyOptions(grid_steps=50), steps=4, **networks)
    with pytest.raises(UserError, match="the teacher predicts score"):
        ConsistencyDistillation(ConsistencyOptions(), steps=4, teacher_prediction=Prediction.SCORE, **networks)
    for name, value in {"huber_c": 0.0, "target_decay": 1.0, "skip": 0}.items():
        with pytest.raises(UserError, match=name.replace("_", "-")):
            ConsistencyOptions(**{name: value})
