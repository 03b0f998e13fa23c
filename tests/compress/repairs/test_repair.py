"""Repairs in closed form: against a float64 solution by the book, at every kind of gap, and what
they must not touch."""

import pytest
import torch

from fastdistill.compress.repairs import REPAIRS, ridge
from fastdistill.compress.repairs.damage import Damage
from fastdistill.compress.repairs.rows import linears, watch
from fastdistill.compress.surgery import boundary_map, cut
from fastdistill.data.latents import LatentPool
from fastdistill.models.blocks import block, block_ids
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.patch import patched
from tests.tiny import mixing_transformer, tiny_inputs

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
GAPS = {
    "between singles": [(SINGLE, 1)],
    "two in a row": [(SINGLE, 1), (SINGLE, 2)],
    "between doubles": [(DOUBLE, 1)],
    "over the border": [(DOUBLE, 2), (SINGLE, 0)],
    "at the start": [(DOUBLE, 0)],
    "at the end": [(SINGLE, 3)],
    "apart": [(DOUBLE, 1), (SINGLE, 0), (SINGLE, 2)],
}


def damaged(gap, teacher=None, points=96, batch=16, **options):
    teacher = teacher or mixing_transformer(num_layers=3, num_single_layers=4)
    teacher.requires_grad_(False)
    family = family_of(teacher)
    drop = [BlockId(stack=stack, index=index) for stack, index in GAPS[gap]]
    x_t, _, conditioning = tiny_inputs(teacher, batch=24)
    pool = LatentPool(latents=x_t[:23], prompts=torch.arange(23), conditioning=conditioning)
    return Damage(
        student=cut(teacher, drop),
        teacher=teacher,
        family=family,
        boundaries=boundary_map(block_ids(teacher, family), drop),
        pool=pool,
        points=points,
        batch=batch,
        **options,
    )


def missing_square(damage):
    """Error of the block before the first gap, over all its streams."""
    return sum(float(rows.missing.square().sum()) for chunk in watch(damage, damage.spans()[0]) for rows in chunk)


@pytest.mark.slow_but_first("kind")
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("kind", ["ridge", "scale"])
def test_a_closed_form_repair_brings_the_block_before_the_gap_closer(gap, kind):
    damage = damaged(gap)
    before = missing_square(damage)
    REPAIRS[kind](damage)
    assert missing_square(damage) < 0.97 * before


@pytest.mark.slow_but_first
@pytest.mark.parametrize("gap", ["between doubles", "between singles", "at the end"])
def test_ridge_is_the_gate_weighted_solution_of_every_row(gap, monkeypatch):
    """Against one Gram matrix a row and a direct solve, in float64."""
    damage = damaged(gap, points=40)
    (span,) = damage.spans()
    chunks = list(watch(damage, span))
    expected = []
    for place, layer in enumerate(linears(damage, span)):
        z = torch.cat([chunk[place].z for chunk in chunks]).double()
        z = torch.cat([z, torch.ones_like(z[..., :1])], dim=-1)
        gate = torch.cat([chunk[place].gate for chunk in chunks]).double()
        missing = torch.cat([chunk[place].missing for chunk in chunks]).double()
        shared = torch.einsum("b,bsk,bsl->kl", gate.square().mean(dim=1), z, z)
        strength = ridge.RIDGE * shared.diagonal().mean() * gate.square().sum(dim=0) / gate.square().sum(dim=0).mean()
        rows = []
        for row in range(layer.out_features):
            weighted = gate[:, row, None, None] * z
            gram = torch.einsum("bsk,bsl->kl", weighted, weighted) + strength[row] * torch.eye(
                z.shape[-1], dtype=torch.float64
            )
            rows.append(torch.linalg.solve(gram, torch.einsum("bsk,bs->k", weighted, missing[..., row])))
        before = torch.cat([layer.weight, layer.bias[:, None]], dim=1)
        expected.append(before + torch.stack(rows))
    monkeypatch.setattr(ridge, "ITERATIONS", 30)
    ridge.repair(damage)
    for layer, wanted in zip(linears(damage, span), expected, strict=True):
        torch.testing.assert_close(
            torch.cat([layer.weight, layer.bias[:, None]], dim=1).double(), wanted, rtol=1e-3, atol=1e-4
        )


@pytest.mark.slow
def test_two_iterations_leave_little_of_what_a_converged_ridge_gains(monkeypatch):
    errors = {}
    for iterations in (0, ridge.ITERATIONS, 30):
        damage = damaged("apart")
        monkeypatch.setattr(ridge, "ITERATIONS", iterations)
        ridge.repair(damage)
        errors[iterations] = missing_square(damage)
    gained = errors[0] - errors[30]
    assert gained > 0
    assert errors[ridge.ITERATIONS] - errors[30] < 0.05 * gained


def test_scale_solves_its_two_unknowns_a_channel():
    """Nothing is left that a further factor or offset of a channel could explain."""
    damage = damaged("between singles")
    (span,) = damage.spans()
    REPAIRS["scale"](damage)
    (layer,) = linears(damage, span)
    left = torch.zeros(2, layer.out_features, dtype=torch.float64)
    size = torch.zeros_like(left)
    for (rows,) in watch(damage, span):
        u = torch.nn.functional.linear(rows.z, layer.weight, layer.bias)
        g = rows.gate[:, None].expand_as(u)
        for place, column in enumerate((g * u, g)):
            left[place] += (column * rows.missing).sum(dim=(0, 1))
            size[place] += column.square().sum(dim=(0, 1)).sqrt() * rows.missing.square().sum(dim=(0, 1)).sqrt()
    assert (left.abs() < 1e-4 * size).all()


def test_average_is_the_mean_over_the_dropped_blocks_of_the_same_kind():
    damage = damaged("two in a row")
    expected = {
        name: torch.stack(
            [block(damage.teacher, BlockId(stack=SINGLE, index=index)).get_parameter(name) for index in range(3)]
        ).mean(dim=0)
        for name, _ in damage.teacher.single_transformer_blocks[0].named_parameters()
    }
    REPAIRS["average"](damage)
    for name, parameter in damage.student.single_transformer_blocks[0].named_parameters():
        torch.testing.assert_close(parameter, expected[name])


@pytest.mark.parametrize("kind", REPAIRS)
def test_a_repair_changes_what_it_refits_and_nothing_else(kind):
    damage = damaged("apart")
    student = {name: tensor.clone() for name, tensor in damage.student.state_dict().items()}
    teacher = {name: tensor.clone() for name, tensor in damage.teacher.state_dict().items()}
    REPAIRS[kind](damage)
    changed = {name for name, tensor in damage.student.state_dict().items() if not torch.equal(tensor, student[name])}
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in damage.teacher.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in damage.student.modules())
    assert all("forward" not in vars(module) for module in damage.student.modules())
    if kind != "average":
        layers = {
            f"{DOUBLE}.0.ff.net.2",
            f"{DOUBLE}.0.ff_context.net.2",
            f"{DOUBLE}.1.ff.net.2",
            f"{DOUBLE}.1.ff_context.net.2",
            f"{SINGLE}.0.proj_out",
        }
        assert changed == {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}


@pytest.mark.parametrize("kind", ["ridge", "scale"])
def test_the_size_of_a_chunk_and_a_patched_teacher_change_nothing_but_rounding(kind):
    first, second = damaged("apart", batch=96), damaged("apart", batch=96)
    REPAIRS[kind](first)
    with patched(second.teacher):
        REPAIRS[kind](second)
    for one, other in zip(first.student.parameters(), second.student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_nothing_after_the_gap_runs():
    damage = damaged("between singles", points=16)
    (span,) = damage.spans()
    after = []
    damage.student.single_transformer_blocks[1].proj_mlp.register_forward_hook(lambda *_: after.append("cut"))
    damage.teacher.single_transformer_blocks[2].proj_mlp.register_forward_hook(lambda *_: after.append("full"))
    list(watch(damage, span))
    assert after == []


def test_progress_ends_at_the_whole():
    for kind in REPAIRS:
        shares = []
        REPAIRS[kind](damaged("apart", tick=shares.append))
        assert shares == sorted(shares)
        assert shares[-1] == 1
