"""FLUX.1: `FluxTransformer2DModel` in `FluxPipeline`.

Its blocks are double (text and image apart) and single (joint).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.models.families.family import Closing, Conditioning, Family, Stack, Workload, both_streams, noise

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """Pack latents (B, C, H, W) into tokens (B, H/2 * W/2, 4 C).

    The order is that of `FluxPipeline`, channel-major within a patch.
    """
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack` for latents of `height` x `width`."""
    batch, _, dim = tokens.shape
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, dim // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, dim // PATCH**2, height, width)


@lru_cache(maxsize=32)
def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Position ids (H/2 * W/2, 3) of the image tokens: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float().to(device)


class Flux(Family):
    """FLUX.1-dev, FLUX.1-schnell and models of their class."""

    name = "flux"
    stacks = (
        Stack(
            attribute="transformer_blocks",
            config_field="num_layers",
            short="double",
            pass_through=both_streams,
            closings=(
                Closing(linear="ff.net.2", norm="norm1", gate=4, streams=("image",)),
                Closing(linear="ff_context.net.2", norm="norm1_context", gate=4, streams=("text",)),
            ),
        ),
        Stack(
            attribute="single_transformer_blocks",
            config_field="num_single_layers",
            short="single",
            pass_through=both_streams,
            closings=(Closing(linear="proj_out", norm="norm", gate=1, streams=("text", "image")),),
        ),
    )

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        rows, columns, batch = workload.height // PATCH, workload.width // PATCH, workload.batch
        return {
            "hidden_states": noise(network, batch, rows * columns, network.config.in_channels),
            "encoder_hidden_states": noise(network, batch, workload.text_tokens, network.config.joint_attention_dim),
            "pooled_projections": noise(network, batch, network.config.pooled_projection_dim),
            "timestep": noise(network, batch),
            "img_ids": image_ids(PATCH * rows, PATCH * columns, network.device),
            "txt_ids": noise(network, workload.text_tokens, 3).zero_(),
            "guidance": noise(network, batch) if network.config.guidance_embeds else None,
        }

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: Any, prompts: list[str], guidance_scale: float, max_sequence_length: int
    ) -> Conditioning:
        prompt_embeds, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, max_sequence_length=max_sequence_length, device=pipeline.transformer.device
        )
        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((len(prompts),), guidance_scale, device=prompt_embeds.device)
        # transformers loads text encoders in the dtype of their files, diffusers the transformer in float32.
        dtype = pipeline.transformer.dtype
        return Conditioning(
            prompt_embeds=prompt_embeds.to(dtype), pooled_prompt_embeds=pooled.to(dtype), guidance=guidance
        )

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        scaled: Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        # The encoder may answer in channels-last order.
        return scaled.contiguous()

    @torch.no_grad()
    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        unscaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(unscaled, return_dict=False)[0]
        return images.contiguous()

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x_t.shape[-2:]
        text_tokens = conditioning.prompt_embeds.shape[1]
        dtype = next(network.parameters()).dtype
        (velocity,) = network(
            hidden_states=pack(x_t).to(dtype),
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            pooled_projections=conditioning.pooled_prompt_embeds.to(dtype),
            timestep=t,
            img_ids=image_ids(height, width, x_t.device),
            txt_ids=x_t.new_zeros(text_tokens, 3),
            guidance=conditioning.guidance,
            return_dict=False,
        )
        return unpack(velocity, height, width).to(x_t.dtype)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        # Rounded down to whole patches, as FluxPipeline.prepare_latents does.
        step = pipeline.vae_scale_factor * PATCH
        return pipeline.transformer.config.in_channels // PATCH**2, PATCH * (height // step), PATCH * (width // step)

    @torch.no_grad()
    def trajectory(
        self,
        pipeline: Any,
        noise: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        *,
        steps: int,
        true_cfg_scale: float,
        guidance_scale: float,
    ) -> tuple[list[Tensor], Tensor]:
        height, width = noise.shape[-2:]
        states = [noise]

        def keep(_pipeline: Any, _step: int, _time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            states.append(unpack(tensors["latents"], height, width))
            return tensors

        negative = {}
        if unconditional is not None and true_cfg_scale > 1:
            negative = {
                "negative_prompt_embeds": unconditional.prompt_embeds,
                "negative_pooled_prompt_embeds": unconditional.pooled_prompt_embeds,
            }
        pipeline(
            prompt_embeds=conditioning.prompt_embeds,
            pooled_prompt_embeds=conditioning.pooled_prompt_embeds,
            **negative,
            latents=pack(noise),
            height=height * pipeline.vae_scale_factor,
            width=width * pipeline.vae_scale_factor,
            num_inference_steps=steps,
            true_cfg_scale=true_cfg_scale,
            guidance_scale=guidance_scale,
            output_type="latent",
            callback_on_step_end=keep,
        )
        return states, pipeline.scheduler.sigmas.to(noise)

    def streams(self, block_output: Any) -> Mapping[str, Tensor]:
        text, image = block_output
        return {"image": image, "text": text}
