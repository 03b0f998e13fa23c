"""The recovery loss and its routing."""

import copy

import pytest
import torch

from fastdistill.compress.recovery import Recovery, RecoveryWeights, feature_loss
from fastdistill.compress.surgery import CutModel, cut_model
from fastdistill.data.latents import LatentBatch
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId
from tests.tiny import mixing_transformer, tiny_inputs

USELESS = BlockId(stack="single_transformer_blocks", index=1)


@pytest.fixture
def transformer():
    return mixing_transformer()


def recovery(transformer, weights, drop=USELESS):
    model = cut_model(copy.deepcopy(transformer).requires_grad_(False), family_of(transformer), [drop])
    # As the trainer does: what is cut out of a frozen model is frozen.
    model.student.requires_grad_(True)
    return Recovery(model, weights)


def batch(transformer, count=4):
    x, _, conditioning = tiny_inputs(transformer, batch=count)
    return LatentBatch(latents=x, conditioning=conditioning)


def test_the_loss_is_the_weighted_sum_of_its_terms(transformer):
    values = {}
    for name, weights in {
        "all": RecoveryWeights(task=0.5, out=2.0, feat=3.0),
        "no_feat": RecoveryWeights(task=0.5, out=2.0, feat=0.0),
    }.items():
        values[name] = recovery(transformer, weights).loss(
            "student", batch(transformer), torch.Generator().manual_seed(0)
        )
    logs = values["all"].logs
    torch.testing.assert_close(values["all"].total, 0.5 * logs["task"] + 2 * logs["out"] + 3 * logs["feat"])
    assert "feat" not in values["no_feat"].logs
    torch.testing.assert_close(values["no_feat"].total, 0.5 * logs["task"] + 2 * logs["out"])


def test_only_the_student_gets_a_gradient(transformer):
    method = recovery(transformer, RecoveryWeights(task=1, out=1, feat=1))
    method.loss("student", batch(transformer), torch.Generator().manual_seed(0)).total.backward()
    assert all(parameter.grad is None for parameter in method.networks["teacher"].parameters())
    assert all(parameter.grad is not None for name, parameter in method.networks["student"].named_parameters())


def test_nothing_to_recover_means_no_distillation_loss(transformer):
    """A student that is the teacher: output and feature terms vanish, the task term does not."""
    family = family_of(transformer)
    boundaries = {block_id: block_id for block_id in block_ids(transformer, family)}
    model = CutModel(student=transformer, teacher=copy.deepcopy(transformer), family=family, boundaries=boundaries)
    method = Recovery(model, RecoveryWeights(task=1, out=1, feat=1))
    logs = method.loss("student", batch(transformer), torch.Generator().manual_seed(0)).logs
    assert logs["out"] == 0
    assert logs["feat"] == 0
    assert logs["task"] > 0.1


def test_the_feature_loss_does_not_care_for_the_scale_of_a_pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        [
            {"image": torch.randn(2, 3, 4, generator=generator), "text": torch.randn(2, 5, 4, generator=generator)}
            for _ in range(2)
        ]
        for _ in range(2)
    )
    value = feature_loss(student, teacher)
    scaled = [[{name: x * 1000 for name, x in pair[0].items()}, pair[1]] for pair in (student, teacher)]
    torch.testing.assert_close(feature_loss(*scaled), value)
    # The text of the last pair feeds nothing and is left out: two images and one text.
    expected = sum(
        (student[i][s] - teacher[i][s]).square().mean() / teacher[i][s].square().mean()
        for i, s in [(0, "image"), (0, "text"), (1, "image")]
    )
    torch.testing.assert_close(value, expected / 3)


def test_gradient_checkpointing_changes_no_gradient(transformer):
    gradients = []
    for checkpointing in (False, True):
        method = recovery(transformer, RecoveryWeights(task=1, out=1, feat=1))
        student = method.networks["student"].train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        method.loss("student", batch(transformer), torch.Generator().manual_seed(0)).total.backward()
        gradients.append({name: parameter.grad for name, parameter in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda message, name=name: f"{name}: {message}")
