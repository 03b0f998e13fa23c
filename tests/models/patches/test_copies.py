"""Copies of a patched model run weights of their own, and are undone for themselves."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import fastdistill
from fastdistill.models.patch import is_patched, patched, unpatch
from tests.distill.methods.test_methods import flux_method, flux_pairs, loss_of
from tests.tiny import mixing_transformer
from tests.tiny_families import FUSED, flux_inputs, run, seeded, tiny_flux
from tests.toy import generator

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "average": lambda model: AveragedModel(model).module,
    "in-a-list": lambda model: copy.deepcopy(nn.ModuleDict({"student": model}))["student"],
    "deepcopy-of-a-copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}
FILES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
    "processes": lambda model: pickle.loads(ForkingPickler.dumps(model)),
}


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@torch.no_grad()
def changed(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.25)


@torch.no_grad()
def stock_output(model: Any, inputs: dict[str, Any], weights: Any) -> Tensor:
    """Output of an unpatched model of the same class and config with these weights."""
    plain = type(model).from_config(model.config)
    plain.load_state_dict(weights)
    return run(plain, inputs)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("how", COPIES)
@torch.no_grad()
def test_a_copy_runs_its_own_weights(name: str, how: str) -> None:
    make, make_inputs = FUSED[name]
    model, inputs = seeded(make), make_inputs()
    original = run(model, inputs)
    report = patched(model, backend="native")
    twin = COPIES[how](model)
    changed(twin)
    assert is_patched(twin)
    expected = stock_output(model, inputs, twin.state_dict())
    assert float((expected - original).abs().max()) > 1e-2
    assert_same(run(twin, inputs), expected)
    assert_same(run(model, inputs), original)

    report.undo()
    assert not is_patched(model)
    assert is_patched(twin)
    assert run(model, inputs).equal(original)
    assert_same(run(twin, inputs), expected)

    unpatch(twin)
    assert not is_patched(twin)
    assert run(twin, inputs).equal(expected)
    with patched(twin, backend="native"):
        assert_same(run(twin, inputs), expected)


@pytest.mark.parametrize("how", COPIES)
def test_undoing_a_copy_leaves_the_original_patched(how: str) -> None:
    model = seeded(tiny_flux)
    with patched(model) as report:
        twin = COPIES[how](model)
        fastdistill.unpatch(twin)
        assert not is_patched(twin)
        assert not any("forward" in vars(module) for module in twin.modules())
        with torch.no_grad():
            run(model, flux_inputs())
        assert report.counts["FluxTransformerBlock"] == 2
        assert is_patched(model)
    assert not is_patched(model)


def test_a_copy_of_one_block_is_a_copy_of_one_block() -> None:
    """It takes along neither the model nor the other blocks."""
    model = seeded(tiny_flux)
    arguments = torch.randn(2, 9, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    with patched(model):
        twin = copy.deepcopy(model.single_transformer_blocks[1])
    with torch.no_grad():
        expected = model.single_transformer_blocks[1](*arguments)
        assert is_patched(twin)
        changed(model)
        for actual, stock in zip(twin(*arguments), expected, strict=True):
            assert_same(actual, stock)


def test_gradients_of_a_copy_stay_in_the_copy() -> None:
    model, inputs = seeded(tiny_flux), flux_inputs()
    with patched(model):
        twin = copy.deepcopy(model)
    run(twin, inputs).square().mean().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["dmd2", "consistency", "progressive"])
def test_methods_copy_a_patched_student(name: str) -> None:
    """Their critics and targets are trained, or followed, as those of a stock student."""

    def gradients(patch: bool) -> dict[str, dict[str, Tensor]]:
        student = mixing_transformer(seed=1)
        if patch:
            patched(student)
        method = flux_method(name, student, mixing_transformer())
        for role in dict.fromkeys(method.turns(0)):
            loss_of(method, role, flux_pairs(), generator()).total.backward()
        return {
            role: {key: p.grad.clone() for key, p in method.networks[role].named_parameters() if p.grad is not None}
            for role in dict.fromkeys(method.turns(0))
        }

    fast, stock = gradients(True), gradients(False)
    for role, expected in stock.items():
        assert expected.keys() == fast[role].keys(), role
        floor = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values())
        for key, gradient in expected.items():
            torch.testing.assert_close(
                fast[role][key], gradient, rtol=0, atol=1e-3 * max(float(gradient.abs().max()), floor), msg=key
            )


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("how", FILES)
@torch.no_grad()
def test_a_file_holds_the_plain_model(name: str, how: str) -> None:
    make, make_inputs = FUSED[name]
    model, inputs = seeded(make), make_inputs()
    stock = run(model, inputs)
    with patched(model):
        twin = FILES[how](model)
        assert is_patched(model)
    assert not is_patched(twin)
    assert run(twin, inputs).equal(stock)
    with patched(twin) as report:
        assert_same(run(twin, inputs), stock)
        assert not report.stepped_aside
    assert run(twin, inputs).equal(stock)


@pytest.mark.slow
def test_a_file_loads_without_fastdistill(tmp_path: Path) -> None:
    model = seeded(tiny_flux)
    with patched(model):
        torch.save(model, tmp_path / "model.pt")
    load = (
        "import sys, torch; sys.modules['fastdistill'] = None;"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "FluxTransformer2DModel"


@pytest.mark.parametrize("order", ["hook-patch", "patch-hook"])
@torch.no_grad()
def test_a_copy_of_a_model_with_hooks_of_accelerate(order: str) -> None:
    """Hooks of accelerate call what they find in their own module; diffusers' call the original's."""
    model, inputs = seeded(tiny_flux), flux_inputs()
    steps = {
        "patch": lambda: patched(model, backend="native"),
        "hook": lambda: [add_hook_to_module(block, ModelHook()) for block in model.transformer_blocks],
    }
    for step in order.split("-"):
        steps[step]()
    twin = copy.deepcopy(model)
    changed(twin)
    expected = stock_output(model, inputs, twin.state_dict())
    unpatch(model)
    assert is_patched(twin)
    assert_same(run(twin, inputs), expected)
    unpatch(twin)
    assert run(twin, inputs).equal(expected)


@torch.no_grad()
def test_a_shallow_copy_shares_what_it_shares() -> None:
    """Its submodules are the original's, and so are their patches."""
    model, inputs = seeded(tiny_flux), flux_inputs()
    stock = run(model, inputs)
    with patched(model):
        twin = copy.copy(model)
        assert is_patched(twin)
        assert_same(run(twin, inputs), stock)
        changed(twin)
    assert not is_patched(twin)
    assert run(twin, inputs).equal(run(model, inputs))


@torch.no_grad()
def test_weights_that_are_swapped_for_a_call_are_those_that_run() -> None:
    model, inputs = seeded(tiny_flux), flux_inputs()
    others = {name: 1.25 * parameter for name, parameter in model.named_parameters()}
    expected = stock_output(model, inputs, others)
    with patched(model):
        out = functional_call(model, others, kwargs={**inputs, "return_dict": False})[0]
    assert_same(out, expected)


@torch.no_grad()
def test_weights_may_come_after_the_patch() -> None:
    """As `to_empty` and `load_state_dict(assign=True)` bring them to a model on the meta device."""
    full, inputs = seeded(tiny_flux), flux_inputs()
    stock = run(full, inputs)
    with torch.device("meta"):
        empty = tiny_flux()
    with patched(empty) as report:
        assert "after the first call" in str(report)
        twin = copy.deepcopy(empty).to_empty(device="cpu")
        empty.load_state_dict(full.state_dict(), assign=True)
        twin.load_state_dict(full.state_dict())
        assert_same(run(empty, inputs), stock)
        assert_same(run(twin, inputs), stock)
        assert not report.stepped_aside
        assert report.operators.keys() >= {"modulate", "qk_norm_rope"}
