"""The shift of a pipeline's scheduler, whatever its class calls it."""

from __future__ import annotations

import math

import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from fastdistill.models.few_step_scheduler import shift_of

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def test_a_fixed_shift() -> None:
    assert shift_of(FlowMatchEulerDiscreteScheduler(shift=3.0), 64) == 3.0
    assert shift_of(DPMSolverMultistepScheduler(flow_shift=5.0, **FLOW), 64) == 5.0


@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_a_shift_by_resolution_is_that_of_the_pipeline(tokens: int) -> None:
    expected = pytest.approx(math.exp(calculate_shift(tokens)))
    assert shift_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), tokens) == expected
    assert shift_of(DPMSolverMultistepScheduler(use_dynamic_shifting=True, **FLOW), tokens) == expected
    assert shift_of(UniPCMultistepScheduler(use_dynamic_shifting=True, **FLOW), tokens) == expected
