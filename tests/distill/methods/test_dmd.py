"""DMD: its gradients, and the teacher's distribution with and without matching, with and without
regression."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.distill.methods.dmd import DMD, DMDOptions
from fastdistill.distill.methods.teacher_pairs import PairOptions, teacher_pairs
from fastdistill.errors import UserError
from tests.distill.methods.toys import (
    FLOW,
    AffineFlow,
    LabelFamily,
    Labels,
    Perceptron,
    assert_moments,
    assert_same_gradient,
    batch_of,
    column,
    exact,
    pair_batches,
    pairs_of,
    randn,
    sampled,
    train,
)
from tests.toy import gaussian, generator, mixture, quasi_random_noise


@pytest.mark.parametrize("regression_loss", ["mse", "pseudo_huber"])
def test_the_gradients(regression_loss: Any) -> None:
    batch = pairs_of()
    labels, one = batch.conditioning.labels, torch.ones(16)

    def method() -> DMD:
        return DMD(
            DMDOptions(regression_weight=0.5, regression_loss=regression_loss),
            student=Perceptron(seed=1), teacher=exact(mixture()), family=LabelFamily(), steps=1,
            critic=Perceptron(seed=2),
        )  # fmt: skip

    def of_student(rng: torch.Generator) -> Tensor:
        student, z = networks["student"], randn(rng, 16)
        x = z - student(z, one, labels)
        noise, t = randn(rng, 16), 0.02 + 0.96 * torch.rand(16, generator=rng)
        x_t = ((1 - column(t)) * x + column(t) * noise).detach()
        real, critic = (x_t - column(t) * networks[role](x_t, t, labels) for role in ("teacher", "critic"))
        g = ((critic - real) / (x - real).abs().mean(dim=1, keepdim=True)).detach()
        difference = batch.noise - student(batch.noise, one, labels) - batch.latents
        error = difference.square() if regression_loss == "mse" else (difference**2 + 1e-6).sqrt() - 1e-3
        return 0.5 * (x - (x - g).detach()).square().mean() + 0.5 * error.mean()

    def of_critic(rng: torch.Generator) -> Tensor:
        z = randn(rng, 16)
        x = (z - networks["student"](z, one, labels)).detach()
        noise, t = randn(rng, 16), torch.rand(16, generator=rng)
        return (networks["critic"]((1 - column(t)) * x + column(t) * noise, t, labels) - (noise - x)).square().mean()

    for role, formula in (("student", of_student), ("critic", of_critic)):
        chosen = method()
        networks = chosen.networks
        assert_same_gradient(chosen, role, batch, formula)


@pytest.mark.slow
def test_it_reaches_the_teachers_distribution_and_its_map(flow_of_the_teacher: AffineFlow, tmp_path: Path) -> None:
    """Matching gives the moments (to 0.01), and regression, of the maps that have them, the
    teacher's (to 3e-4 of the variance)."""
    data, student = gaussian(), copy.deepcopy(flow_of_the_teacher)
    method = DMD(DMDOptions(), student=student, teacher=exact(data), family=LabelFamily(), steps=1)
    options = PairOptions(count=2048, steps=32, sampler="ode_heun", batch=2048)
    pool = teacher_pairs(
        method, tmp_path / "pairs", options, conditioning=Labels(torch.zeros(1, dtype=torch.long)), shape=(2,)
    )
    trainer = train(
        method, pair_batches(pool, 128), tmp_path, steps=1000, learning_rate=3e-3, betas=(0.0, 0.99), ema_decay=0.98
    )
    trainer.emas["student"].copy_to(student)
    x = sampled(student, method.times)
    expected = data.flow_map(quasi_random_noise(20_000), torch.ones(20_000), torch.zeros(20_000), FLOW)
    assert_moments(x, data, 0.03)
    assert float((x - expected).square().mean()) < 2e-3 * float(data.covariance().trace()) / 2


def test_turns_are_both_in_every_step() -> None:
    method = DMD(DMDOptions(), student=Perceptron(), teacher=exact(mixture()), family=LabelFamily(), steps=1)
    assert [tuple(method.turns(step)) for step in range(3)] == [("student", "critic")] * 3


def test_impossible_combinations_are_refused() -> None:
    with pytest.raises(UserError, match="choose tdm or dmd2"):
        DMD(DMDOptions(), student=Perceptron(), teacher=exact(mixture()), family=LabelFamily(), steps=4)
    with pytest.raises(UserError, match="teacher_pairs"):
        DMD(DMDOptions(), student=Perceptron(), teacher=exact(mixture()), family=LabelFamily(), steps=1).loss(
            "student", batch_of(), generator()
        )
    with pytest.raises(UserError, match="regression-weight"):
        DMDOptions(regression_weight=-1.0)
