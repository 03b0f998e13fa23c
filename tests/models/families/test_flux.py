"""The FLUX family against diffusers' own pipeline, and what steps into the network: captures and
skips.
"""

import itertools

import pytest
import torch
from diffusers import FluxPipeline

from fastdistill.models.blocks import block_ids
from fastdistill.models.families import family_of
from fastdistill.models.families.flux import Flux, image_ids, pack, unpack
from fastdistill.models.hooks import captured, captured_inputs, skipped
from tests.tiny import tiny_flux_pipeline, tiny_inputs


@pytest.fixture
def transformer():
    return tiny_flux_pipeline().transformer


def test_packing_is_the_pipelines():
    latents = torch.randn(2, 16, 6, 10)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack(tokens, 6, 10), latents)
    assert torch.equal(
        image_ids(6, 10, latents.device), FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    )


def test_trajectory_follows_the_predicted_velocity():
    """Euler over the pipeline's own times with `predict` and guidance gives the states that the
    pipeline visits.
    """
    pipeline, family = tiny_flux_pipeline(), Flux()
    conditioning = family.encode_prompts(pipeline, ["a cat", "a dog", ""], 3.5, 8)
    conditional, unconditional = conditioning[:2], conditioning[2:][torch.tensor([0, 0])]
    noise = torch.randn(2, *family.latent_shape(pipeline, 64, 64))
    states, times = family.trajectory(
        pipeline, noise, conditional, unconditional, steps=3, true_cfg_scale=2.0, guidance_scale=3.5
    )
    assert len(states) == len(times) == 4
    x = noise
    for state, t, t_next in zip(states[1:], times, times[1:], strict=False):
        with torch.no_grad():
            v_c, v_u = (
                family.predict(pipeline.transformer, x, t.expand(2), part) for part in (conditional, unconditional)
            )
        x = x + (t_next - t) * (v_u + 2.0 * (v_c - v_u))
        torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-5)


def test_images_are_encoded_to_what_the_pipeline_decodes():
    pipeline, pixels = tiny_flux_pipeline(), torch.rand(2, 3, 64, 48) * 2 - 1
    latents = Flux().encode_images(pipeline, pixels)
    assert latents.shape == (2, *Flux().latent_shape(pipeline, 64, 48))
    # FluxPipeline.__call__ decodes `latents / scaling_factor + shift_factor`.
    vae = pipeline.vae
    mode = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, mode)
    assert not latents.requires_grad


def test_skipping_every_block_leaves_only_the_ends(transformer):
    x, t, conditioning = tiny_inputs(transformer)
    family = family_of(transformer)
    blocks = block_ids(transformer, family)
    before = family.predict(transformer, x, t, conditioning)
    with skipped(transformer, family, blocks), captured(transformer, family, blocks) as outputs:
        without = family.predict(transformer, x, t, conditioning)
    assert all(torch.equal(outputs[block]["image"], outputs[blocks[0]]["image"]) for block in blocks)
    assert not torch.allclose(without, before)
    assert torch.equal(family.predict(transformer, x, t, conditioning), before)


def test_captured_outputs_are_the_next_blocks_inputs(transformer):
    x, t, conditioning = tiny_inputs(transformer)
    family = family_of(transformer)
    blocks = block_ids(transformer, family)
    with captured(transformer, family, blocks) as outputs, captured_inputs(transformer, family, blocks) as inputs:
        family.predict(transformer, x, t, conditioning)
    for block, following in itertools.pairwise(blocks):
        for stream in ("image", "text"):
            assert torch.equal(outputs[block][stream], inputs[following][stream])
