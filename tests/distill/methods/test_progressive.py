"""Progressive distillation: its gradients, its phases, and the linear flow of a Gaussian."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import LinearVariancePreserving, RectifiedFlow, TrigFlow
from fastdistill.diffusion.sampler import sample
from fastdistill.diffusion.timesteps import few_step_times
from fastdistill.distill.methods.losses import error_weight
from fastdistill.distill.methods.progressive import ProgressiveDistillation, ProgressiveOptions
from fastdistill.errors import UserError
from tests.distill.methods.toys import (
    FLOW,
    AffineFlow,
    LabelFamily,
    Perceptron,
    assert_same_gradient,
    batch_of,
    column,
    exact,
    null,
    sampled,
    train,
    unlabelled_draws,
)
from tests.toy import gaussian, generator, mixture, quasi_random_noise


@pytest.mark.parametrize("phase", [0, 1])
def test_the_gradient_on_rectified_flow(phase: int) -> None:
    """The velocity of one step is the mean of the teacher's two, guided in the first phase; in the
    second the teacher is a student."""
    student, teacher, batch = Perceptron(seed=1), exact(mixture()), batch_of(size=32)
    method = ProgressiveDistillation(
        ProgressiveOptions(teacher_steps=8, phase_length=1, true_cfg_scale=2.0),
        student=student, teacher=teacher, family=LabelFamily(), steps=2, unconditional=null(),
    )  # fmt: skip
    labels, earlier = batch.conditioning.labels, Perceptron(seed=5)
    if phase:
        method.after_step(0)
        method.networks["target"].load_state_dict(earlier.state_dict())

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if phase:
            return earlier(x, t, labels).detach()
        return 2 * teacher(x, t, labels) - teacher(x, t)

    def formula(rng: torch.Generator) -> Tensor:
        steps = (4, 2)[phase]
        noise, index = torch.randn(32, 2, generator=rng).double(), torch.randint(steps, (32,), generator=rng)
        t, half = 1 - index / steps, 0.5 / steps
        x_t = (1 - column(t)) * batch.latents + column(t) * noise
        first = velocity(x_t, t)
        second = velocity(x_t - half * first, t - half)
        return (student(x_t, t, labels) - (first + second) / 2).square().mean()

    assert_same_gradient(method, "student", batch, formula)


@pytest.mark.parametrize("weighting", ["x0", "truncated_snr", "snr_plus_one"])
def test_the_gradient_on_a_variance_preserving_process(weighting: Any) -> None:
    """DDIM in the noise, as in the paper's appendix; the larger of the errors of x_0 and the noise,
    or the error of v."""
    process, student, batch = LinearVariancePreserving(), Perceptron(seed=1), batch_of(size=32)
    teacher, labels = exact(mixture(), process, Prediction.EPSILON), batch.conditioning.labels
    method = ProgressiveDistillation(
        ProgressiveOptions(teacher_steps=4, weighting=weighting),
        student=student, teacher=teacher, family=LabelFamily(), steps=2, process=process,
        teacher_prediction=Prediction.EPSILON, student_prediction=Prediction.V,
    )  # fmt: skip

    def step(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        alpha_t, sigma_t, alpha_s, sigma_s = (
            f(column(time)) for time in (t, s) for f in (process.alpha, process.sigma)
        )
        noise = teacher(x, t, labels)
        return alpha_s * (x - sigma_t * noise) / alpha_t + sigma_s * noise

    def formula(rng: torch.Generator) -> Tensor:
        noise, index = torch.randn(32, 2, generator=rng).double(), torch.randint(2, (32,), generator=rng)
        t = 1 - index / 2
        alpha, sigma = process.alpha(column(t)), process.sigma(column(t))
        x_t = alpha * batch.latents + sigma * noise
        x_s = step(step(x_t, t, t - 0.25), t - 0.25, t - 0.5)
        ratio = process.sigma(column(t - 0.5)) / sigma
        x_0 = (x_s - ratio * x_t) / (process.alpha(column(t - 0.5)) - ratio * alpha)
        v = student(x_t, t, labels)
        of_x_0 = (alpha * x_t - sigma * v - x_0).square()
        of_noise = (sigma * x_t + alpha * v - (x_t - alpha * x_0) / sigma).square()
        if weighting == "truncated_snr":
            return torch.maximum(of_x_0, of_noise).mean()
        return of_x_0.mean() if weighting == "x0" else (v - (alpha * x_t - x_0) / sigma).square().mean()

    assert_same_gradient(method, "student", batch, formula)


@pytest.mark.parametrize("process", [RectifiedFlow(), LinearVariancePreserving(), TrigFlow()])
def test_the_weight_of_the_velocity_is_its_error(process: Any) -> None:
    t = torch.linspace(0.05, 0.95, 7)
    x_t, x_0, other = (torch.randn(7, 2, generator=generator(seed)).double() for seed in range(3))
    alpha, sigma = process.alpha(column(t)), process.sigma(column(t))
    velocities = [
        process.alpha_dot(column(t)) * data + process.sigma_dot(column(t)) * (x_t - alpha * data) / sigma
        for data in (x_0, other)
    ]
    weight = error_weight(process, t, "velocity")[:, None]
    torch.testing.assert_close(weight * (x_0 - other).square(), (velocities[0] - velocities[1]).square())


@pytest.mark.slow
def test_one_step_equals_the_teachers_sixteen(flow_of_the_teacher: AffineFlow, tmp_path: Path) -> None:
    """Four phases on a Gaussian. The student is the teacher's sixteen Euler steps, to 1e-6 of the
    variance, and those the flow to 0.7 %."""
    data, student = gaussian(), copy.deepcopy(flow_of_the_teacher)
    teacher = exact(data)
    method = ProgressiveDistillation(
        ProgressiveOptions(teacher_steps=16, phase_length=250),
        student=student,
        teacher=teacher,
        family=LabelFamily(),
        steps=1,
    )
    assert method.total_steps == 1000
    train(method, unlabelled_draws(data, 128), tmp_path, steps=1000, learning_rate=3e-3, schedule="wsd")
    assert method.student_steps == 1
    noise = quasi_random_noise(4000)
    found = sampled(student, method.times, 4000)
    taught = sample(teacher.predictor(), noise, few_step_times(16), sampler="flow_euler")
    exactly = data.flow_map(noise, torch.ones(4000), torch.zeros(4000), FLOW)
    variance = float(data.covariance().trace()) / 2
    assert float((found - taught).square().mean()) < 1e-4 * variance
    assert float((found - exactly).square().mean()) < 1e-2 * variance


def test_phases_halve_the_steps_and_are_kept() -> None:
    def method() -> ProgressiveDistillation:
        return ProgressiveDistillation(
            ProgressiveOptions(teacher_steps=16, phase_length=3),
            student=Perceptron(seed=1),
            teacher=exact(mixture()),
            family=LabelFamily(),
            steps=2,
        )

    first = method()
    steps = []
    for step in range(12):
        steps.append(first.student_steps)
        with torch.no_grad():
            first.networks["student"].out.bias.add_(1)
        first.after_step(step)
    assert steps == [8] * 3 + [4] * 3 + [2] * 6
    second = method()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert second.student_steps == 2
    kept = second.networks["target"].state_dict()
    for name, value in first.networks["target"].state_dict().items():
        assert torch.equal(value, kept[name])
    third = method()
    third.load_state_dict({})
    assert third.student_steps == 8


@pytest.mark.parametrize(("teacher_steps", "steps", "instead"), [(30, 4, 32), (4, 4, 8), (2, 4, 8)])
def test_steps_that_do_not_halve_are_refused(teacher_steps: int, steps: int, instead: int) -> None:
    with pytest.raises(UserError, match=f"such as {instead}"):
        ProgressiveDistillation(
            ProgressiveOptions(teacher_steps=teacher_steps),
            student=Perceptron(),
            teacher=exact(mixture()),
            family=LabelFamily(),
            steps=steps,
        )
