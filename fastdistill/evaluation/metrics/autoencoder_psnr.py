"""PSNR of the autoencoder's reconstruction of emoji draws.

Measured from the pipeline's autoencoder alone.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdistill.evaluation.metrics.metric import Metric, SampledImages, Value
from fastdistill.evaluation.psnr import psnr

DRAWS, SEED, BATCH = 512, 5, 64


@torch.no_grad()
def measure(sampled: SampledImages) -> dict[str, Any]:
    vae = sampled.pipeline.vae
    pixels = sampled.truth.data.random(DRAWS, torch.Generator().manual_seed(SEED)).pixels
    decoded = [
        vae.decode(vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist.mean).sample.float().cpu()
        for chunk in pixels.split(BATCH)
    ]
    return {"autoencoder_psnr": float(psnr(torch.cat(decoded), pixels).mean())}


METRIC = Metric(
    values=(Value("autoencoder_psnr", "PSNR of the autoencoder, dB", "{:.1f}"),),
    measure=measure,
    needs=("truth",),
    of_transformer=False,
)
