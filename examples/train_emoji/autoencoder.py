"""Step 1 of the emoji FLUX: train an `AutoencoderKL` by the ELBO.

It has FLUX's geometry: 16 latent channels, factor 8.

    python examples/train_emoji/autoencoder.py --run runs/emoji/autoencoder

Run it again to resume. Writes `<run>/vae`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL

from fastdistill.data.emoji import Draws, Emoji
from fastdistill.train.config import TrainConfig
from fastdistill.train.method import Loss, StudentMethod
from fastdistill.train.trainer import Trainer

# Standard deviation of the pixel likelihood, in units of the [-1, 1] range: the code need not carry
# smaller differences.
PIXEL_SIGMA = 0.07


class Elbo(StudentMethod):
    """Method whose loss is the negative ELBO per pixel (Kingma & Welling 2014, equation 3).

    `mean (x - decode(z))^2 / (2 sigma^2) + KL(q(z|x) || N(0, 1)) / pixels`.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.networks = {"student": vae}
        self.vae = vae

    def loss(self, role: str, batch: Draws, rng: torch.Generator) -> Loss:
        posterior = self.vae.encode(batch.pixels).latent_dist
        decoded = self.vae.decode(posterior.sample(generator=rng)).sample
        error = (decoded.float() - batch.pixels).square().mean()
        kl = posterior.kl().float().mean() / batch.pixels[0].numel()
        return Loss(total=error / (2 * PIXEL_SIGMA**2) + kl, logs={"mse": error, "kl": kl})


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Path
    batch: int = 16
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=3600, learning_rate=1.5e-3, warmup_steps=100, ema_decay=0.995, precision="bf16", checkpoint_every=300
        )
    )


def build() -> AutoencoderKL:
    stages = 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@torch.no_grad()
def finish(vae: AutoencoderKL, data: Emoji) -> float:
    """Set the latents' shift and scale; return the PSNR on fresh draws.

    The diffusion model then sees zero mean and unit variance.
    """
    pixels = data.random(512, torch.Generator().manual_seed(1)).pixels
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(64)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    decoded = torch.cat([vae.decode(chunk).sample.clamp(-1, 1) for chunk in latents.split(64)])
    error = ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(error)).mean())


def main(config: Config) -> None:
    data = Emoji()
    torch.manual_seed(config.train.seed)
    vae = build()
    trainer = Trainer(Elbo(vae), lambda step, rng: data.random(config.batch, rng), config.train, config.run)
    trainer.fit("autoencoder")
    trainer.emas["student"].copy_to(vae)
    psnr = finish(vae.eval(), data)
    vae.save_pretrained(config.run / "vae")
    parameters = vae.num_parameters()
    print(f"{parameters / 1e6:.2f} M parameters, PSNR {psnr:.2f} dB on 512 fresh draws; wrote {config.run / 'vae'}")
    assert math.isfinite(psnr)


if __name__ == "__main__":
    main(tyro.cli(Config))
