"""Step 3 of the emoji FLUX: train the transformer, and write the stock `FluxPipeline`.

    python examples/train_emoji/transformer.py --run runs/emoji

Hours on two cores, minutes on a GPU; run it again to resume, and with `--assemble-only` to write
the pipeline of the newest checkpoint. Reads `<run>/autoencoder/vae` and `<run>/text`; writes
`<run>/pipeline`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from text_encoders import CLIP_TOKENS, T5_TOKENS, WIDTH, ids
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from fastdistill.data.emoji import BACKGROUNDS, Emoji
from fastdistill.data.latents import LatentPool
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.diffusion.timesteps import LogitNormal
from fastdistill.models.families.family import Conditioning
from fastdistill.models.families.flux import Flux
from fastdistill.run.files import atomic_write
from fastdistill.train import checkpoint
from fastdistill.train.config import TrainConfig
from fastdistill.train.denoising import Denoising
from fastdistill.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Path
    heads: int = 4
    batch: int = 64
    draws: int = 128
    """Cached draws of each caption."""
    time_mean: float = 0.0
    """Location of the logit-normal training times; above 0, more times near noise, where the
    background is decided."""
    assemble_only: bool = False
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=14000,
            learning_rate=1e-3,
            schedule="wsd",
            warmup_steps=200,
            ema_decay=0.999,
            checkpoint_every=250,
            log_every=50,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of the pipeline that are trained before the transformer."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast

    @classmethod
    def load(cls, run: Path) -> Parts:
        text = run / "text"
        return cls(
            vae=AutoencoderKL.from_pretrained(run / "autoencoder" / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder"),
            text_encoder_2=T5EncoderModel.from_pretrained(text / "text_encoder_2"),
            tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
            tokenizer_2=T5TokenizerFast.from_pretrained(text / "tokenizer_2"),
        )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning(
            prompt_embeds=self.text_encoder_2(ids(self.tokenizer_2, prompts, T5_TOKENS)).last_hidden_state,
            pooled_prompt_embeds=self.text_encoder(ids(self.tokenizer, prompts, CLIP_TOKENS)).pooler_output,
        )


def build(heads: int) -> FluxTransformer2DModel:
    head_dim = 32
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


@torch.no_grad()
def cached_latents(path: Path, vae: AutoencoderKL, data: Emoji, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of `draws` draws of each caption, in the transformer's scale, and their captions."""
    if not path.exists():
        generator = torch.Generator().manual_seed(3)
        captions = torch.arange(len(data)).repeat(draws)
        latents = torch.cat(
            [vae.encode(data.draw(chunk, generator).pixels).latent_dist.mean.half() for chunk in captions.split(100)]
        )
        with atomic_write(path) as partial:
            save_file({"latents": latents.contiguous(), "captions": captions}, partial)
    cached = load_file(path)
    return (cached["latents"].float() - vae.config.shift_factor) * vae.config.scaling_factor, cached["captions"]


def assemble(parts: Parts, transformer: FluxTransformer2DModel, folder: Path) -> None:
    """Write a stock `FluxPipeline` in float16."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.text_encoder_2,
        tokenizer_2=parts.tokenizer_2,
        transformer=transformer,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    print(f"wrote {folder}")


def main(config: Config) -> None:
    data, parts = Emoji(), Parts.load(config.run)
    torch.manual_seed(config.train.seed)
    transformer = build(config.heads)
    print(f"{transformer.num_parameters() / 1e6:.2f} M parameters in the transformer")
    run = config.run / "transformer"
    if config.assemble_only:
        newest = checkpoint.latest(run)
        if newest is None:
            raise SystemExit(f"{run} has no checkpoint yet")
        transformer.load_state_dict(
            load_file(newest / "student.safetensors") | load_file(newest / "student.ema.safetensors")
        )
    else:
        assert config.draws >= len(BACKGROUNDS)
        latents, captions = cached_latents(config.run / "latents.safetensors", parts.vae, data, config.draws)
        pool = LatentPool(latents=latents, prompts=captions, conditioning=parts.encode([*data.captions, ""]))
        method = Denoising(
            transformer, Flux(), RectifiedFlow(), Prediction.VELOCITY, LogitNormal(mean=config.time_mean)
        )
        trainer = Trainer(method, lambda step, rng: pool.batch(config.batch, rng), config.train, run)
        trainer.fit("transformer")
        trainer.emas["student"].copy_to(transformer)
    assemble(parts, transformer, config.run / "pipeline")


if __name__ == "__main__":
    main(tyro.cli(Config))
