"""A random FluxPipeline of stock classes, small enough for a test."""

import functools
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from fastdistill.models.families.family import Conditioning
from fastdistill.models.loading import embedded_folder

WIDTH = 16


def tiny_flux_pipeline(
    seed: int = 0, guidance_embeds: bool = False, num_layers: int = 2, num_single_layers: int = 3
) -> FluxPipeline:
    """2 double and 3 single blocks of width 32, 64-pixel images from 8x8x16 latents."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.5,
    )
    tokenizer, tokenizer_2 = tokenizers()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def untrained_emoji_pipeline() -> FluxPipeline:
    """The emoji FLUX with a transformer that is small and random."""
    pipeline = FluxPipeline.from_pretrained(embedded_folder())
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "num_layers": 1, "num_single_layers": 1}
    pipeline.transformer = FluxTransformer2DModel.from_config(config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def mixing_transformer(**options: Any) -> FluxTransformer2DModel:
    """Transformer of a tiny pipeline, with strong modulation: a random network hardly mixes, and
    every block should matter."""
    transformer = tiny_flux_pipeline(**options).transformer
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" in name and name.endswith("linear.weight"):
                parameter.mul_(5)
    return transformer


@functools.cache
def tokenizers() -> tuple[Any, Any]:
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *characters, *(character + "</w>" for character in characters)]
    clip = CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=16)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return clip, T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=16)


def tiny_inputs(
    transformer: FluxTransformer2DModel, batch: int = 2, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """`x_t`, `t` and a conditioning that `transformer` takes."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(transformer.dtype)

    guidance = torch.full((batch,), 3.5) if transformer.config.guidance_embeds else None
    conditioning = Conditioning(
        prompt_embeds=randn(batch, 5, WIDTH), pooled_prompt_embeds=randn(batch, WIDTH), guidance=guidance
    )
    return randn(batch, 16, 8, 8), torch.rand(batch, generator=generator), conditioning
