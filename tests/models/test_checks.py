"""Calls that diffusers would refuse late, or change in silence, are refused before the work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    UniPCMultistepScheduler,
)

from fastdistill.compress import calibrate
from fastdistill.errors import Notice, UserError
from fastdistill.models.checks import check_call, check_pipeline, tell_of_long_prompts
from fastdistill.models.sampling import SamplingDefaults, sample
from tests.tiny import tiny_flux_pipeline

SMALL = {"height": 64, "width": 64, "max_sequence_length": 8, "points": 2, "steps": 2}
SAMPLING = SamplingDefaults(num_inference_steps=2, height=64, width=64, max_sequence_length=8)


@pytest.fixture(scope="module")
def shared() -> FluxPipeline:
    return tiny_flux_pipeline()


def refused(pipeline: Any, **changes: Any) -> str:
    """Message of the refusal, which comes from every way in."""
    sampling = SamplingDefaults(**{"num_inference_steps": 2, "height": 64, "width": 64, **changes})
    with pytest.raises(UserError) as refusal:
        check_call(pipeline, sampling)
    with pytest.raises(UserError) as from_sample:
        sample(pipeline, ["a cat"], sampling, seeds=[0], batch=1)
    options = {name: value for name, value in changes.items() if name != "num_inference_steps"}
    with pytest.raises(UserError) as from_calibrate:
        calibrate(pipeline, ["a cat"], **{**SMALL, **options})
    assert str(refusal.value) == str(from_sample.value) == str(from_calibrate.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 8}, "--height 8 is not a multiple of 16 pixels; give 16"),
        ({"width": 8, "height": 32}, "--width 8 is not a multiple of 16 pixels; give 16"),
        ({"height": 72}, "--height 72 is not a multiple of 16 pixels; give 64 or 80"),
        ({"width": 1000}, "--width 1000 is not a multiple of 16 pixels; give 992 or 1008"),
        ({"max_sequence_length": 600}, "cannot be greater than 512 but is 600"),
    ],
)
def test_calls_that_diffusers_refuses_or_rounds(shared: FluxPipeline, changes: dict[str, int], message: str) -> None:
    assert message in refused(shared, **changes)


def with_scheduler(pipeline: FluxPipeline, scheduler: Any) -> FluxPipeline:
    return FluxPipeline(**{**pipeline.components, "scheduler": scheduler})


@pytest.mark.parametrize(
    "make",
    [
        FlowMatchHeunDiscreteScheduler,
        DPMSolverMultistepScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        UniPCMultistepScheduler,
    ],
)
def test_schedulers_that_cannot_sample(shared: FluxPipeline, make: Callable[[], Any]) -> None:
    pipeline = with_scheduler(shared, make())
    message = refused(pipeline)
    assert type(pipeline.scheduler).__name__ in message
    assert "give the pipeline a FlowMatchEulerDiscreteScheduler" in message
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        lambda: FlowMatchLCMScheduler(shift=2.0),
        lambda: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
        ),
        lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
        ),
    ],
)
def test_schedulers_that_can_sample_do(shared: FluxPipeline, make: Callable[[], Any]) -> None:
    pipeline = with_scheduler(shared, make())
    pipeline.set_progress_bar_config(disable=True)
    state = dict(vars(pipeline.scheduler))
    check_call(pipeline, SAMPLING)
    assert vars(pipeline.scheduler) == state, "the check works on a copy"
    assert sample(pipeline, ["a cat"], SAMPLING, seeds=[0], batch=1).isfinite().all()


def controlnet(parts: dict[str, Any]) -> FluxControlNetPipeline:
    network = FluxControlNetModel.from_transformer(
        parts["transformer"], num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    return FluxControlNetPipeline(**parts, controlnet=network)


@pytest.mark.parametrize(
    "make",
    [
        lambda parts: FluxImg2ImgPipeline(**parts),
        lambda parts: FluxInpaintPipeline(**parts),
        lambda parts: FluxKontextPipeline(**parts),
        controlnet,
    ],
)
def test_other_pipelines_of_flux_are_told_apart(shared: FluxPipeline, make: Callable[[dict[str, Any]], Any]) -> None:
    pipeline = make(shared.components)
    with pytest.raises(UserError, match=f"a {type(pipeline).__name__} does not draw from a prompt alone.*from_pipe"):
        calibrate(pipeline, ["a cat"], **SMALL)
    # What the message advises works.
    calibrate(FluxPipeline.from_pipe(pipeline), ["a cat"], **SMALL)


def test_a_transformer_that_reads_more_than_noise_can_only_be_cut() -> None:
    parts = dict(tiny_flux_pipeline().components)
    for optional in ("image_encoder", "feature_extractor"):
        del parts[optional]
    options = {**parts["transformer"].config, "in_channels": 384, "out_channels": 64}
    parts["transformer"] = type(parts["transformer"]).from_config(options)
    with pytest.raises(UserError, match=r"a FluxFillPipeline does not draw from a prompt alone.* can only be cut"):
        calibrate(FluxFillPipeline(**parts), ["a cat"], **SMALL)
    with pytest.raises(UserError, match="reads 384 channels, and 2 x 2 latents of the autoencoder have 64"):
        calibrate(FluxPipeline(**parts), ["a cat"], **SMALL)


def test_a_subclass_is_a_pipeline_like_its_parent(shared: FluxPipeline) -> None:
    class MyPipeline(FluxPipeline):
        pass

    check_pipeline(MyPipeline(**shared.components))


def test_a_pipeline_without_a_part_says_which(shared: FluxPipeline) -> None:
    pipeline = FluxPipeline(**{**shared.components, "text_encoder_2": None, "vae": shared.vae})
    with pytest.raises(UserError, match="this FluxPipeline has no text_encoder_2; load the whole pipeline"):
        calibrate(pipeline, ["a cat"], **SMALL)


def test_text_encoders_of_another_dtype_are_cast_where_the_pipeline_is_calibrated() -> None:
    pipeline = tiny_flux_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    expected = calibrate(pipeline, ["a cat"], **SMALL)
    pipeline.text_encoder.bfloat16()
    pipeline.text_encoder_2.bfloat16()
    found = calibrate(pipeline, ["a cat"], **SMALL)
    assert found.points.x_t.dtype == torch.float32
    torch.testing.assert_close(found.points.x_t, expected.points.x_t, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae", "transformer"])
def test_parts_of_different_dtypes_are_named(part: str) -> None:
    pipeline = tiny_flux_pipeline()
    getattr(pipeline, part).half()
    with pytest.raises(UserError, match=rf"different dtypes \(.*{part}: float16.*from_pretrained\(folder, dtype="):
        sample(pipeline, ["a cat"], SAMPLING, seeds=[0], batch=1)


def notices(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if issubclass(warning.category, Notice)]


def test_long_prompts_are_counted(shared: FluxPipeline) -> None:
    # A letter is a token of the tiny tokenizer, and so are the beginning and the end of a prompt.
    lengths = [len(ids) for ids in shared.tokenizer_2(["a cat", "a dog", "a" * 30]).input_ids]
    assert lengths[0] < 8 < lengths[2]
    prompts = ["a cat", "a dog", "a" * 30, "b" * 20]
    (text,) = notices(lambda: tell_of_long_prompts(shared, prompts, 8))
    assert text == (
        f"2 of 4 prompts are longer than the 8 tokens of --max-sequence-length; the longest has {lengths[2]}: "
        "what follows is ignored"
    )
    assert notices(lambda: tell_of_long_prompts(shared, prompts, lengths[2])) == []
    (text,) = notices(lambda: tell_of_long_prompts(shared, prompts, lengths[2] - 1))
    assert text.startswith("1 of 4 prompts is longer")


def test_calibration_tells_of_long_prompts(shared: FluxPipeline) -> None:
    shared.set_progress_bar_config(disable=True)
    (text,) = notices(lambda: calibrate(shared, ["a cat", "a cat in a hat"], **SMALL))
    assert text.startswith("1 of 2 prompts is longer than the 8 tokens")
    assert notices(lambda: calibrate(shared, ["a cat"], **SMALL)) == []
