"""TDM: its gradients, DMD2 as its case of one step, and where it converges to."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.process import LinearVariancePreserving, Process, VarianceExploding
from fastdistill.distill.methods.dmd2 import DMD2, DMD2Options
from fastdistill.distill.methods.rollout import Visit
from fastdistill.distill.methods.tdm import TDM, TDMOptions
from fastdistill.errors import UserError
from tests.distill.methods.toys import (
    FLOW,
    SEED_OF_INDEX,
    AffineFlow,
    LabelFamily,
    Perceptron,
    assert_same_gradient,
    batch_of,
    column,
    exact,
    loss_of,
    null,
    randn,
    rollout,
    sampled,
    train,
    unlabelled,
)
from tests.toy import gaussian, generator, mixture


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize(("role", "target"), [("student", "x_0"), ("critic", "x_0"), ("critic", "score")])
def test_the_gradients(role: str, target: str, sde: bool, index: int) -> None:
    """Two steps at 1 and 2/3: scores are compared between 2/3 and 1, and between 0 and 2/3."""
    method = TDM(
        TDMOptions(true_cfg_scale=3.0, critic_target=target, rollout="sde" if sde else "ode"),
        student=Perceptron(seed=1), teacher=exact(mixture()), family=LabelFamily(), steps=2, shift=2.0,
        unconditional=null(),
        critic=Perceptron(seed=2),
    )  # fmt: skip
    batch = batch_of()
    labels, times = batch.conditioning.labels, [*method.times.double(), torch.zeros(()).double()]
    student, teacher, critic = (method.networks[name] for name in ("student", "teacher", "critic"))

    def formula(rng: torch.Generator) -> Tensor:
        x_t, t = rollout(method, batch, rng, index, sde=sde)
        start, end = times[index], times[index + 1]
        velocity = student(x_t, t, labels)
        x_0, x_s = x_t - start * velocity, (x_t + (end - start) * velocity).detach()
        fresh = randn(rng)
        u = end.float() + (start - end).float() * (0.02 + 0.96 * torch.rand(8, generator=rng))
        mean, variance = (1 - column(u)) / (1 - end) * x_s, column(u) ** 2 - ((1 - column(u)) / (1 - end) * end) ** 2
        x_u, known = mean + variance.sqrt() * fresh, x_0.detach()
        if sde:
            x_u = (1 - column(u)) * known + column(u) * fresh
        if role == "critic" and (target == "x_0" or sde):
            return (critic(x_u, u, labels) - (x_u - known) / column(u)).square().mean()
        if role == "critic":
            # Tweedie's formula, with the score that x_u has given x_s.
            data = (x_u + column(u) ** 2 * (mean - x_u) / variance) / (1 - column(u))
            of_fresh = (data - x_s / (1 - end)) / fresh
            weight = 1 / (1 + of_fresh.mean(dim=1, keepdim=True) ** 2)
            return (weight * (critic(x_u, u, labels) - (x_u - data) / column(u)).square()).mean()
        real = teacher(x_u, u) + 3 * (teacher(x_u, u, labels) - teacher(x_u, u))
        x_0_real, x_0_critic = x_u - column(u) * real, x_u - column(u) * critic(x_u, u, labels)
        g = (x_0_critic - x_0_real) / (known - x_0_real).abs().mean(dim=1, keepdim=True)
        return 0.5 * (x_0 - (known - g).detach()).square().mean()

    assert_same_gradient(method, role, batch, formula, seed=SEED_OF_INDEX[index])


def test_in_one_step_it_is_dmd2_without_a_gan() -> None:
    setup = {
        "student": Perceptron(seed=1),
        "teacher": exact(mixture()),
        "family": LabelFamily(),
        "steps": 1,
        "critic": Perceptron(seed=2),
    }
    one, other = TDM(TDMOptions(), **setup), DMD2(DMD2Options(gan_weight=0.0), **setup)
    losses = [loss_of(method, "student", batch_of(), generator()).total for method in (one, other)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", [FLOW, LinearVariancePreserving(), VarianceExploding(sigma_max=5.0)])
def test_states_of_the_teacher_stay_the_teachers_behind_noise(process: Process) -> None:
    """The exact `x_s` of a Gaussian, noised as the process goes on, have the moments of its `x_u`."""
    data, count = gaussian(), 200_000
    method = TDM(
        TDMOptions(),
        student=exact(data, process),
        teacher=exact(data, process),
        family=LabelFamily(),
        steps=2,
        process=process,
        critic=Perceptron(),
    )
    s, t = (time.float().expand(count) for time in (method.times[1], method.times[0]))
    x_0 = data.draw(count, generator(2))[0]
    visit = Visit(x_t=process.add_noise(x_0, randn(generator(3), count), t), t=t, index=0, scale=None)
    found = method.between(visit, x_0, generator(1))
    assert bool((found.u < t).all() and (found.u > s).all())
    of_data, of_noise = process.alpha(column(found.u)), process.sigma(column(found.u))
    centred = found.x_u - of_data * data.mean()
    expected = (of_data**2).mean() * data.covariance() + (of_noise**2).mean() * torch.eye(2)
    torch.testing.assert_close(centred.T.cov(), expected, rtol=0.02, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "excess"), [("x_0", 0.17), ("score", -0.02)])
def test_in_four_steps_with_a_learned_critic(
    flow_of_the_teacher: AffineFlow, tmp_path: Path, target: str, excess: float
) -> None:
    """The moments of its samples are the teacher's, but for the bias of the critic that learns the
    mean of `x_0`."""
    student = copy.deepcopy(flow_of_the_teacher)
    options = TDMOptions(critic_target=target, critic_updates=2)
    method = TDM(options, student=student, teacher=exact(gaussian()), family=LabelFamily(), steps=4)
    trainer = train(
        method, unlabelled(128), tmp_path, steps=1000, learning_rate=3e-3, betas=(0.0, 0.99), ema_decay=0.98
    )
    trainer.emas["student"].copy_to(student)
    samples, data = sampled(student, method.times), gaussian()
    torch.testing.assert_close(samples.mean(0), data.mean(), atol=0.03, rtol=0)
    assert float(samples.T.cov().trace() / data.covariance().trace()) == pytest.approx(1 + excess, abs=0.04)


def test_noise_is_needed_to_compare_scores() -> None:
    with pytest.raises(UserError, match="--time-low above 0"):
        TDMOptions(time_low=0.0)
