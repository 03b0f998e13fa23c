"""A stage that makes things worse is told and passed over, whatever made it worse."""

import io

import pytest
import torch
from rich.console import Console

from fastdistill.compress.stages import Stage, Stages, best, percent, verdict
from fastdistill.compress.surgery import cut_model
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId
from tests.tiny import mixing_transformer

SINGLE = "single_transformer_blocks"


def stage(name, distance):
    return Stage(name=name, distance=distance, output_error=0.5)


@pytest.fixture
def stages(tmp_path):
    teacher = mixing_transformer().requires_grad_(False)
    distances = {}
    said = io.StringIO()

    def judge(name, student):
        return stage(name, distances[name])

    def make():
        model = cut_model(teacher, family_of(teacher), [BlockId(stack=SINGLE, index=1)])
        return Stages(model, tmp_path, torch.bfloat16, judge, Console(file=said, width=200))

    return make, distances, said


def add(stages, value):
    def step():
        with torch.no_grad():
            stages.model.student.proj_out.weight.add_(value)

    return step


@pytest.mark.parametrize(
    ("measured", "chosen", "worse"),
    [
        ({"cut": 0.4, "repaired": 0.2, "recovered": 0.1}, "recovered", 0),
        ({"cut": 0.4, "repaired": 0.2, "recovered": 0.3}, "repaired", 1),
        ({"cut": 0.4, "repaired": 1.3, "recovered": 0.3}, "recovered", 1),
        ({"cut": 0.1, "repaired": 1.3, "recovered": 0.3}, "cut", 2),
        ({"cut": 0.4, "repaired": float("nan"), "recovered": float("inf")}, "cut", 2),
        ({"cut": float("nan"), "repaired": 0.2, "recovered": 0.2}, "repaired", 1),
    ],
)
def test_every_step_begins_with_the_best_stage(stages, measured, chosen, worse):
    make, distances, said = stages
    distances |= measured
    run = make()
    start = run.model.student.proj_out.weight.detach().clone()
    added = {"cut": 0.0, "repaired": 1.0, "recovered": 10.0}
    total, least = {"": 0.0}, ""
    for name, value in added.items():
        run.take(name, name, add(run, value) if value else lambda: None)
        total[name] = total[least] + value
        if not least or best([stage(least, measured[least]), stage(name, measured[name])]).name == name:
            least = name
    assert run.best.name == chosen == least
    run.restore(run.best)
    torch.testing.assert_close(run.model.student.proj_out.weight.detach(), start + total[chosen])
    assert said.getvalue().count("that is worse than the") == worse
    assert chosen in verdict(run.done)


def test_a_run_that_goes_on_takes_no_step_twice(stages):
    make, distances, _ = stages
    distances |= {"cut": 0.4, "repaired": 0.2, "recovered": 0.1}
    first = make()
    first.take("cut", "cut", lambda: None)
    first.take("repaired", "repaired", add(first, 1.0))
    again = make()
    again.take("cut", "cut", lambda: None)
    again.take("repaired", "repaired", lambda: pytest.fail("repaired again"))
    again.take("recovered", "recovered", add(again, 10.0))
    again.restore(again.done[1])
    first.restore(first.done[1])
    torch.testing.assert_close(again.model.student.proj_out.weight, first.model.student.proj_out.weight)


def test_what_is_judged_is_what_is_saved(stages):
    make, distances, _ = stages
    distances |= {"cut": 0.4}
    run = make()
    run.take("cut", "cut", lambda: None)
    weight = run.model.student.proj_out.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.bfloat16().float())


def test_a_distance_in_words():
    assert [percent(value) for value in (0, 0.5, 0.02413, 0.000123, 21.58, float("nan"), None)] == [
        "0 %", "50 %", "2.4 %", "0.012 %", "2158 %", "no images", "no images"
    ]  # fmt: skip
