"""Reflow: its gradient, its pairs, and the straight flow that one round makes of a Gaussian's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import LinearVariancePreserving
from fastdistill.diffusion.straightness import straightness
from fastdistill.distill.methods.reflow import Reflow, ReflowOptions
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
    loss_of,
    null,
    pair_batches,
    pairs_of,
    sampled,
    train,
)
from tests.toy import gaussian, generator, mixture, quasi_random_noise


@pytest.mark.parametrize("distilling", [False, True])
def test_the_gradient_along_the_pairs(distilling: bool) -> None:
    student, batch = Perceptron(), pairs_of()
    method = Reflow(
        ReflowOptions(straighten=0 if distilling else 10),
        student=student,
        teacher=exact(mixture()),
        family=LabelFamily(),
        steps=2,
        shift=2.0,
    )

    def formula(rng: torch.Generator) -> Tensor:
        if distilling:
            t = torch.tensor([1.0, 2 / 3])[torch.randint(2, (16,), generator=rng)]
        else:
            t = torch.rand(16, generator=rng)
            t = 2 * t / (1 + t)
        x_t = (1 - column(t)) * batch.latents + column(t) * batch.noise
        return (student(x_t, t, batch.conditioning.labels) - (batch.noise - batch.latents)).square().mean()

    assert_same_gradient(method, "student", batch, formula)


def test_pairs_are_the_guided_teachers_samples(tmp_path: Path) -> None:
    """Euler by hand under a scale per pair; the prompts are those of the pairs; a second call reads
    what the first has made."""
    teacher, prompts = exact(mixture()), Labels(torch.tensor([0, 1, 2]))
    method = Reflow(
        ReflowOptions(guidance_range=(1.0, 3.0)), student=Perceptron(guidance=True), teacher=teacher,
        family=LabelFamily(), steps=2,
        unconditional=null(),
    )  # fmt: skip
    made: list[int] = []
    options = PairOptions(count=20, steps=5, batch=8)
    pool = teacher_pairs(method, tmp_path, options, conditioning=prompts, shape=(2,), tick=made.append)
    assert made == [8, 8, 4]
    assert pool.scale is not None
    x, labels = pool.noise.double(), pool.prompts
    for i in range(5):
        t = torch.full((20,), 1 - i / 5)
        unconditional = teacher(x, t)
        x = x - (unconditional + column(pool.scale) * (teacher(x, t, labels) - unconditional)) / 5
    torch.testing.assert_close(pool.latents.double(), x, atol=1e-5, rtol=1e-5)
    again = teacher_pairs(method, tmp_path, options, conditioning=prompts, shape=(2,), tick=made.append)
    assert torch.equal(again.latents, pool.latents)
    assert made == [8, 8, 4]
    with pytest.raises(UserError, match="another model"):
        teacher_pairs(method, tmp_path, options, conditioning=prompts, shape=(2,), settings={"model": "another"})
    batch = pool.batch(4, generator())
    loss_of(method, "student", replace(batch, latents=batch.latents.double(), noise=batch.noise.double()), generator())


@pytest.mark.slow
def test_one_round_straightens_the_flow_of_a_gaussian(flow_of_the_teacher: AffineFlow, tmp_path: Path) -> None:
    """`int E |(x_1 - x_0) - v|^2 dt` falls from 50 % to 0.001 % of `E |x_1 - x_0|^2`; one Euler
    step is the flow to 2e-6."""
    data, student = gaussian(), copy.deepcopy(flow_of_the_teacher)
    teacher = exact(data)
    method = Reflow(ReflowOptions(straighten=600), student=student, teacher=teacher, family=LabelFamily(), steps=1)
    options = PairOptions(count=4096, steps=32, sampler="ode_heun", batch=2048)
    pool = teacher_pairs(
        method, tmp_path / "pairs", options, conditioning=Labels(torch.zeros(1, dtype=torch.long)), shape=(2,)
    )
    trainer = train(method, pair_batches(pool, 256), tmp_path, steps=800, learning_rate=5e-3, ema_decay=0.95)
    assert method.distilling
    trainer.emas["student"].copy_to(student)

    def bent(network: torch.nn.Module) -> float:
        predictor = Predictor(function=lambda x_t, t: network(x_t, t), process=FLOW, prediction=Prediction.VELOCITY)
        return straightness(predictor, quasi_random_noise(2000))

    noise = quasi_random_noise(20_000)
    x = sampled(student, method.times)
    error = (x - data.flow_map(noise, torch.ones(20_000), torch.zeros(20_000), FLOW)).square().mean()
    assert bent(teacher) > 0.5
    assert bent(student) < 1e-3
    assert float(error) < 1e-4 * float(data.covariance().trace()) / 2
    assert_moments(x, data, 0.01)


def test_it_distils_after_straightening_and_keeps_that() -> None:
    def method() -> Reflow:
        return Reflow(
            ReflowOptions(straighten=2), student=Perceptron(), teacher=exact(mixture()), family=LabelFamily(), steps=2
        )

    first, phases = method(), []
    for step in range(4):
        phases.append(first.distilling)
        first.after_step(step)
    assert phases == [False, False, True, True]
    second = method()
    second.load_state_dict(first.state_dict())
    assert second.distilling


def test_impossible_combinations_are_refused(tmp_path: Path) -> None:
    process = LinearVariancePreserving()
    with pytest.raises(UserError, match="progressive or consistency"):
        Reflow(
            ReflowOptions(),
            student=Perceptron(),
            teacher=exact(mixture(), process),
            family=LabelFamily(),
            steps=2,
            process=process,
        )
    method = Reflow(
        ReflowOptions(),
        student=Perceptron(),
        teacher=exact(mixture()),
        family=LabelFamily(),
        steps=2,
        teacher_prediction=Prediction.EPSILON,
    )
    with pytest.raises(UserError, match="teacher_pairs"):
        loss_of(method, "student", batch_of(), generator())
    with pytest.raises(UserError, match="the teacher predicts epsilon"):
        teacher_pairs(method, tmp_path, PairOptions(), conditioning=null(), shape=(2,))
