"""Suite of every metric: declared values, readable, and best for a perfect model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastdistill.evaluation.metrics import METRICS
from fastdistill.evaluation.metrics.metric import Need, SampledImages
from fastdistill.evaluation.table import labelled_values, rows
from tests.evaluation.cases import CASES, SEEDS, Case

every_case = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)


def without(sampled: SampledImages, need: Need) -> SampledImages:
    match need:
        case "truth":
            return dataclasses.replace(sampled, known_truth=None)
        case "reference":
            return dataclasses.replace(sampled, given_reference=None)
        case "several prompts":
            return dataclasses.replace(sampled, images=sampled.images[:SEEDS])
        case "several images":
            return dataclasses.replace(sampled, images=sampled.images[:1], seeds=1)


def test_every_metric_has_a_case_and_every_value_one_metric() -> None:
    assert set(CASES) == set(METRICS)
    keys = [value.key for metric in METRICS.values() for value in metric.values]
    assert len(keys) == len(set(keys))


@every_case
def test_the_values_are_the_declared_ones_and_are_json(name: str, case: Case) -> None:
    metric = METRICS[name]
    perfect, poor = metric(case.perfect()), metric(case.poor())
    assert perfect.keys() | poor.keys() == {value.key for value in metric.values}
    json.dumps([perfect, poor])


@every_case
def test_people_can_read_the_values(name: str, case: Case) -> None:
    measured = METRICS[name](case.poor())
    labelled = [value for value in labelled_values() if value.key in measured]
    assert labelled
    shown = dict(rows([measured]))
    for value in labelled:
        assert value.form.format(measured[value.key]) in shown[value.label]


@every_case
def test_a_perfect_model_has_the_best_values_and_a_poor_one_has_not(name: str, case: Case) -> None:
    perfect, poor = METRICS[name](case.perfect()), METRICS[name](case.poor())
    for key, best in case.best.items():
        assert perfect[key] == (best if best is None else pytest.approx(best, abs=1e-6))
    first = next(iter(case.best))
    assert poor[first] != pytest.approx(case.best[first], abs=0.01)


@every_case
def test_a_metric_that_does_not_apply_gives_nothing(name: str, case: Case) -> None:
    for need in METRICS[name].needs:
        assert METRICS[name](without(case.perfect(), need)) == {}


@every_case
def test_a_single_seed_has_no_spread(name: str, case: Case) -> None:
    measured = METRICS[name](dataclasses.replace(case.poor(), seeds=1))
    assert not [key for key in measured if key.endswith(("_by_seed", "_spread"))]


def test_a_metric_cannot_measure_from_what_it_does_not_name() -> None:
    sampled = without(CASES["psnr_to_reference"].perfect(), "reference")
    with pytest.raises(LookupError, match="no reference"):
        METRICS["psnr_to_reference"].measure(sampled)
