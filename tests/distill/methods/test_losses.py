"""The losses against their formulas and limits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastdistill.distill.methods.losses import (
    discriminator_loss,
    generator_loss,
    pseudo_huber,
    softened_targets,
    weighted_mse,
)
from tests.toy import generator


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_pseudo_huber_is_quadratic_near_and_linear_far() -> None:
    zero = torch.zeros(4, 3, dtype=torch.float64)
    near, far = 1e-6 * normal(4, 3), 1e3 * normal(4, 3)
    torch.testing.assert_close(pseudo_huber(near, zero, 1e-3), near.square().mean() / 2e-3, rtol=1e-5, atol=0)
    torch.testing.assert_close(pseudo_huber(far, zero, 1e-3), far.abs().mean() - 1e-3, rtol=1e-9, atol=0)


def test_weights_are_per_sample() -> None:
    a, b, weight = normal(4, 3, 2), normal(4, 3, 2, seed=1), torch.tensor([0.0, 1.0, 2.0, 5.0])
    expected = (weight.double() * (a - b).square().mean(dim=(1, 2))).mean()
    torch.testing.assert_close(weighted_mse(a, b, weight), expected)


def test_non_saturating_losses_are_binary_cross_entropies() -> None:
    real, fake = normal(5, 7), normal(5, 7, seed=1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating"), bce(real, ones) + bce(fake, zeros))
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), bce(fake, ones))


def test_hinge_losses_stop_at_the_margin() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1) / 2)
    assert float(generator_loss(fake, "hinge")) == 1.5


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_targets_have_the_gradient_of_the_cross_entropy(temperature: float) -> None:
    """Hinton et al. 2015, equation 2, times `T^2`: `T (softmax(s / T) - softmax(t / T))` over the
    batch."""
    student, teacher = normal(6, 10).requires_grad_(), normal(6, 10, seed=1)
    (gradient,) = torch.autograd.grad(softened_targets(student, teacher, temperature), student)
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / 6
    torch.testing.assert_close(gradient, expected)
    entropy = cross_entropy(student / temperature, (teacher / temperature).softmax(1)) * temperature**2
    (of_cross_entropy,) = torch.autograd.grad(entropy, student)
    torch.testing.assert_close(gradient, of_cross_entropy)
    assert float(softened_targets(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)


def test_hot_targets_are_matched_logits() -> None:
    """Hinton et al. 2015, equation 4: for a large temperature and centred logits, the gradient is
    `(s - t) / classes`."""
    student, teacher = ((logits - logits.mean(1, keepdim=True)) for logits in (normal(6, 10), normal(6, 10, seed=1)))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(softened_targets(student, teacher, 1e4), student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / 10 / 6, rtol=1e-3, atol=1e-6)
