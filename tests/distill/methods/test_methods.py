"""Suite that every method inherits: routing, repeatability, golden losses, and FLUX in all its
variants."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import tyro
from torch import Tensor, nn

from fastdistill.compress.surgery import cut
from fastdistill.data.pairs import PairBatch
from fastdistill.distill import METHODS
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.errors import UserError
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.guidance_embedder import embeds_guidance, with_guidance_embedder
from tests.distill.methods.cases import CASES, GOLDEN, build, losses
from tests.distill.methods.toys import loss_of, pairs_of
from tests.tiny import mixing_transformer, tiny_inputs
from tests.toy import generator

every_method = pytest.mark.parametrize("name", METHODS)
GUIDED = [name for name in METHODS if METHODS[name].Options().guidance_range is not None]
"""Methods whose student has to take a guidance scale."""


def test_every_method_has_options_and_a_case() -> None:
    assert list(METHODS) == list(CASES)
    for name, method in METHODS.items():
        assert type(build(name)) is method
        assert method.Options().training_data in ("pairs", "images", "prompts")


def test_names_need_no_torch() -> None:
    """`--help` answers at once."""
    code = (
        "import sys; from fastdistill.distill import METHODS; assert list(METHODS); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@every_method
def test_options_can_be_typed(name: str) -> None:
    assert tyro.cli(METHODS[name].Options, args=[]) == METHODS[name].Options()
    assert tyro.cli(METHODS[name].Options, args=["--guidance-range", "1", "4"]).guidance_range == (1.0, 4.0)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_make_no_sense_are_refused_at_once(name: str, value: float) -> None:
    options = METHODS[name].Options
    default = options(**CASES[name].flux_options)
    for option in dataclasses.fields(options):
        known = getattr(default, option.name)
        if isinstance(known, float) or option.name == "critic_learning_rate":
            with pytest.raises(UserError, match=option.name.replace("_", "-")):
                dataclasses.replace(default, **{option.name: value})
    with pytest.raises(UserError, match="guidance-range"):
        dataclasses.replace(default, guidance_range=(1.0, value))


@every_method
def test_the_losses_of_three_steps_are_the_golden_ones(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    for found, expected in zip(losses(name), golden, strict=True):
        # Noise and times are drawn in float32, whose last bit depends on the processor.
        assert found == pytest.approx(expected, rel=1e-6)


@every_method
def test_a_loss_touches_its_role_alone_and_all_of_it(name: str) -> None:
    method = build(name)
    assert set(method.trains) <= set(method.networks)
    for role in method.turns(0):
        loss_of(method, role, pairs_of(), generator()).total.backward()
        for other, network in method.networks.items():
            for parameter_name, parameter in network.named_parameters():
                assert (parameter.grad is not None) == (other == role), f"{role}: {other}.{parameter_name}"
            network.zero_grad()


@every_method
def test_a_frozen_parameter_stays_frozen(name: str) -> None:
    """As the base under an adapter, which the method must not thaw when a role's turn comes."""
    method = build(name)
    frozen = method.networks["student"].into.weight.requires_grad_(False)
    for role in method.turns(0):
        loss_of(method, role, pairs_of(), generator()).total.backward()
    assert frozen.grad is None
    assert not frozen.requires_grad


@every_method
def test_a_loss_is_a_function_of_its_generator(name: str) -> None:
    method, batch = build(name), pairs_of()
    torch.manual_seed(1)
    first = loss_of(method, "student", batch, generator(3)).total
    torch.manual_seed(2)
    assert torch.equal(loss_of(method, "student", batch, generator(3)).total, first)
    assert not torch.equal(loss_of(method, "student", batch, generator(4)).total, first)


@every_method
def test_state_is_what_a_checkpoint_can_hold(name: str) -> None:
    first, second = build(name), build(name)
    for step in range(2):
        first.after_step(step)
    state = first.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    second.load_state_dict(state)
    for key, value in second.state_dict().items():
        assert torch.equal(value, state[key]), key
    first.load_state_dict({})


def flux_method(name: str, student: nn.Module, teacher: nn.Module, **options: Any) -> Distillation:
    teacher.requires_grad_(False)
    _, _, empty = tiny_inputs(mixing_transformer(), batch=1, seed=5)
    return METHODS[name](
        METHODS[name].Options(**{**CASES[name].flux_options, **options}),
        student=student, teacher=teacher, family=family_of(teacher), steps=CASES[name].steps, unconditional=empty,
    )  # fmt: skip


def flux_pairs() -> PairBatch:
    x, _, conditioning = tiny_inputs(mixing_transformer())
    return PairBatch(latents=x, conditioning=conditioning, noise=torch.randn(x.shape, generator=generator(8)))


def check_flux(method: Distillation) -> None:
    for role in method.turns(0):
        loss = loss_of(method, role, flux_pairs(), generator()).total
        loss.backward()
        assert bool(loss.isfinite())
        for other, network in method.networks.items():
            assert any(parameter.grad is not None for parameter in network.parameters()) == (other == role)
            network.zero_grad()


@every_method
def test_a_cut_flux_learns_from_the_guided_whole(name: str) -> None:
    teacher = mixing_transformer()
    student = cut(teacher, [BlockId(stack="single_transformer_blocks", index=1)]).requires_grad_(True)
    options = {"guidance_range": None, "true_cfg_scale": 3.0}
    if name in GUIDED:
        student, options = with_guidance_embedder(student), {}
    check_flux(flux_method(name, student, teacher, **options))


@every_method
def test_flux_dev_teaches_flux_dev(name: str) -> None:
    """Guidance is embedded in both, and drawn for both."""
    teacher = mixing_transformer(guidance_embeds=True)
    student = mixing_transformer(guidance_embeds=True, seed=1)
    method = flux_method(name, student, teacher, guidance_range=(1.0, 8.0))
    seen: dict[str, list[Tensor | None]] = {"student": [], "teacher": []}
    for role, scales in seen.items():
        method.networks[role].register_forward_pre_hook(
            lambda module, args, kwargs, scales=scales: scales.append(kwargs["guidance"]), with_kwargs=True
        )
    pairs = flux_pairs()
    if METHODS[name].Options().training_data == "pairs":
        pairs = PairBatch(
            latents=pairs.latents, conditioning=pairs.conditioning, noise=pairs.noise, scale=torch.tensor([2.0, 5.0])
        )
    loss_of(method, "student", pairs, generator()).total.backward()
    called = [scale for scales in seen.values() for scale in scales]
    assert called
    assert all(scale is not None and torch.equal(scale, called[0]) for scale in called)
    assert float(called[0].diff().abs()) > 0
    assert embeds_guidance(method.networks["student"])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in GUIDED])
def test_flux_dev_teaches_a_student_without_an_embedder(name: str) -> None:
    """As SenseFlow's student: the teacher gets `guidance_scale`, the student learns it as its own
    field."""
    method = flux_method(name, mixing_transformer(seed=1), mixing_transformer(guidance_embeds=True), guidance_scale=2.5)
    check_flux(method)
    taught: list[Tensor] = []
    method.networks["teacher"].register_forward_pre_hook(
        lambda module, args, kwargs: taught.append(kwargs["guidance"]), with_kwargs=True
    )
    loss_of(method, "student", flux_pairs(), generator())
    assert all(torch.equal(scale, torch.full((2,), 2.5)) for scale in taught)
    assert taught or METHODS[name].Options().training_data == "pairs"


@every_method
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    """Networks that a loss only leads through are recomputed in the backward pass, too."""
    found = []
    for checkpointing in (False, True):
        teacher = mixing_transformer()
        student = with_guidance_embedder(mixing_transformer(seed=1)) if name in GUIDED else mixing_transformer(seed=1)
        method = flux_method(name, student, teacher)
        for role in method.trains:
            network = method.networks[role].train()
            if checkpointing and role != "discriminator":
                network.enable_gradient_checkpointing()
            if role == "discriminator":
                for number, parameter in enumerate(network.parameters()):
                    nn.init.normal_(parameter, std=0.1, generator=generator(number))
        gradients = {}
        for role in method.turns(0):
            loss_of(method, role, flux_pairs(), generator()).total.backward()
            gradients |= {
                f"{role}.{key}": p.grad for key, p in method.networks[role].named_parameters() if p.grad is not None
            }
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=lambda message, key=key: f"{key}: {message}")
