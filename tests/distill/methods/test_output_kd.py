"""Output distillation and guidance distillation: the formula, the guided field of exact teachers,
and FLUX's guidance embedder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import LinearVariancePreserving
from fastdistill.distill.methods.guidance import GuidanceDistillation, GuidanceOptions
from fastdistill.distill.methods.output_kd import OutputKD, OutputKDOptions
from fastdistill.errors import UserError
from fastdistill.models.families import family_of
from fastdistill.models.guidance_embedder import embeds_guidance, with_guidance_embedder
from tests.distill.methods.toys import (
    LabelFamily,
    Perceptron,
    assert_same_gradient,
    batch_of,
    batches_of,
    column,
    exact,
    loss_of,
    null,
    train,
    two_classes,
)
from tests.tiny import mixing_transformer, tiny_inputs
from tests.toy import generator, mixture


def logit_normal(rng: torch.Generator, size: int, shift: float) -> Tensor:
    t = torch.sigmoid(torch.randn(size, generator=rng))
    return shift * t / (1 + (shift - 1) * t)


def test_the_gradient_is_that_of_the_velocity_error() -> None:
    """Rectified flow, shift 2, a teacher of x_0 under classifier-free guidance of 3."""
    student, teacher, batch = Perceptron(seed=1), exact(mixture(), prediction=Prediction.X0), batch_of()
    method = OutputKD(
        OutputKDOptions(true_cfg_scale=3.0),
        student=student, teacher=teacher, family=LabelFamily(), steps=4, shift=2.0, unconditional=null(),
        teacher_prediction=Prediction.X0,
    )  # fmt: skip

    def formula(rng: torch.Generator) -> Tensor:
        noise, t = torch.randn(8, 2, generator=rng).double(), logit_normal(rng, 8, 2.0)
        x_t = (1 - column(t)) * batch.latents + column(t) * noise
        labels = batch.conditioning.labels
        x_0 = teacher(x_t, t) + 3 * (teacher(x_t, t, labels) - teacher(x_t, t))
        return (student(x_t, t, labels) - (x_t - x_0) / column(t)).square().mean()

    assert_same_gradient(method, "student", batch, formula)


def test_student_and_teacher_may_predict_different_things() -> None:
    """Variance preserving: the teacher predicts the noise, the student v, and they are compared in
    x_0."""
    process, student, batch = LinearVariancePreserving(), Perceptron(seed=1), batch_of()
    teacher = exact(mixture(), process, Prediction.EPSILON)
    method = OutputKD(
        OutputKDOptions(error_in="x0"),
        student=student, teacher=teacher, family=LabelFamily(), steps=4, process=process,
        teacher_prediction=Prediction.EPSILON, student_prediction=Prediction.V,
    )  # fmt: skip

    def formula(rng: torch.Generator) -> Tensor:
        noise, t = torch.randn(8, 2, generator=rng).double(), logit_normal(rng, 8, 1.0)
        alpha, sigma = process.alpha(column(t)), process.sigma(column(t))
        x_t = alpha * batch.latents + sigma * noise
        labels = batch.conditioning.labels
        of_student = alpha * x_t - sigma * student(x_t, t, labels)
        return (of_student - (x_t - sigma * teacher(x_t, t, labels)) / alpha).square().mean()

    assert_same_gradient(method, "student", batch, formula)


def test_the_gradient_of_guidance_distillation() -> None:
    student, teacher, batch = Perceptron(guidance=True), exact(mixture()), batch_of()
    method = GuidanceDistillation(
        GuidanceOptions(guidance_range=(1.0, 5.0)),
        student=student,
        teacher=teacher,
        family=LabelFamily(),
        steps=4,
        unconditional=null(),
    )

    def formula(rng: torch.Generator) -> Tensor:
        noise, t = torch.randn(8, 2, generator=rng).double(), logit_normal(rng, 8, 1.0)
        w = (1 + 4 * torch.rand(8, generator=rng)).double()
        x_t, labels = (1 - column(t)) * batch.latents + column(t) * noise, batch.conditioning.labels
        target = (1 - w[:, None]) * teacher(x_t, t) + w[:, None] * teacher(x_t, t, labels)
        return (student(x_t, t, labels, guidance=w) - target).square().mean()

    assert_same_gradient(method, "student", batch, formula)


@pytest.mark.slow
def test_one_network_has_the_guided_field_of_every_scale(tmp_path: Path) -> None:
    """`E |v_S - v_w|^2 < 1 %` of `E |v_w|^2`: 0.58 % at `w = 1`, the end of the range, 0.03 % at
    2.5 and 0.06 % at 4."""
    data, student = two_classes(), Perceptron(labels=2, width=64, guidance=True)
    teacher = exact(data)
    method = GuidanceDistillation(
        GuidanceOptions(guidance_range=(1.0, 4.0)),
        student=student,
        teacher=teacher,
        family=LabelFamily(),
        steps=4,
        unconditional=null(2),
    )
    trainer = train(method, batches_of(data, 256), tmp_path, steps=1500, learning_rate=1e-2, ema_decay=0.98)
    trainer.emas["student"].copy_to(student)
    x_0, labels = data.draw(2000, generator(5))
    t = logit_normal(generator(7), 2000, 1.0)
    x_t = (1 - column(t)) * x_0 + column(t) * torch.randn(2000, 2, generator=generator(6)).double()
    for scale in (1.0, 2.5, 4.0):
        guided = teacher(x_t, t) + scale * (teacher(x_t, t, labels) - teacher(x_t, t))
        with torch.no_grad():
            error = student(x_t, t, labels, guidance=torch.full((2000,), scale)) - guided
        assert float(error.square().mean() / guided.square().mean()) < 0.01


def test_a_sibling_with_a_guidance_embedder_starts_as_its_source() -> None:
    source = mixing_transformer()
    sibling = with_guidance_embedder(source)
    assert type(sibling) is type(source)
    assert embeds_guidance(sibling)
    assert not embeds_guidance(source)
    x_t, t, conditioning = tiny_inputs(source)
    family = family_of(source)
    expected = family.predict(source, x_t, t, conditioning)
    _, _, with_guidance = tiny_inputs(sibling)
    assert torch.equal(family.predict(sibling, x_t, t, with_guidance), expected)
    assert all(
        parameter.data_ptr() not in {p.data_ptr() for p in source.parameters()} for parameter in sibling.parameters()
    )


def test_a_sibling_is_saved_and_loaded_by_diffusers(tmp_path: Path) -> None:
    sibling = with_guidance_embedder(mixing_transformer())
    torch.nn.init.normal_(sibling.time_text_embed.guidance_embedder.linear_2.weight)
    sibling.save_pretrained(tmp_path)
    loaded = type(sibling).from_pretrained(tmp_path)
    x_t, t, conditioning = tiny_inputs(sibling)
    family = family_of(sibling)
    assert torch.equal(family.predict(loaded, x_t, t, conditioning), family.predict(sibling, x_t, t, conditioning))


def test_flux_learns_guidance_through_its_embedder() -> None:
    """The teacher is called without the scale, the student with it; at the start only the student's
    new layer tells them apart."""
    teacher = mixing_transformer()
    student = with_guidance_embedder(teacher)
    x_t, _, conditioning = tiny_inputs(teacher)
    _, _, empty = tiny_inputs(teacher, batch=1, seed=7)
    method = GuidanceDistillation(
        GuidanceOptions(), student=student, teacher=teacher, family=family_of(teacher), steps=4, unconditional=empty
    )
    teacher.requires_grad_(False)
    loss_of(method, "student", LatentBatch(latents=x_t, conditioning=conditioning), generator()).total.backward()
    assert float(student.time_text_embed.guidance_embedder.linear_2.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": OutputKDOptions(true_cfg_scale=2.0)}, "unconditional="),
        ({"options": OutputKDOptions(guidance_range=(1.0, 2.0)), "unconditional": null()}, "with_guidance_embedder"),
        ({"options": OutputKDOptions(guidance_range=(1.0, 2.0))}, "unconditional="),
        ({"steps": 0}, "at least one step"),
    ],
)
def test_impossible_combinations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OutputKD(
            **{
                "options": OutputKDOptions(),
                "student": Perceptron(),
                "teacher": exact(mixture()),
                "family": LabelFamily(),
                "steps": 4,
                **changes,
            }
        )


def test_guidance_needs_a_range_and_a_network_that_lacks_the_embedder() -> None:
    with pytest.raises(UserError, match="guidance_range"):
        GuidanceDistillation(
            GuidanceOptions(guidance_range=None),
            student=Perceptron(),
            teacher=exact(mixture()),
            family=LabelFamily(),
            steps=1,
        )
    with pytest.raises(UserError, match="already"):
        with_guidance_embedder(mixing_transformer(guidance_embeds=True))
    with pytest.raises(UserError, match="FluxTransformer2DModel"):
        with_guidance_embedder(type("Other", (), {"config": {}})())
    with pytest.raises(UserError, match="low to high"):
        GuidanceOptions(guidance_range=(3.0, 1.0))
