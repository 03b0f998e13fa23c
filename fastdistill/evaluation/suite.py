"""All measurements of a pipeline: on the emoji testbed against the known truth, on any model against a reference model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.emoji import Emoji
from fastdistill.evaluation.background_coverage import backgrounds, expected_total_variation, total_variation
from fastdistill.evaluation.classifier import Classifier, predict
from fastdistill.evaluation.frechet import features, frechet_distance
from fastdistill.evaluation.psnr import psnr
from fastdistill.evaluation.statistics import spread, wilson_interval
from fastdistill.models.sampling import SamplingDefaults, sample

SEED_STRIDE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Measurements as JSON, and the pictures they were taken from, (seeds * N, 3, H, W)."""

    metrics: dict[str, Any]
    pictures: Tensor


def evaluate(
    pipeline: Any,
    prompts: Sequence[str],
    sampling: SamplingDefaults,
    *,
    seeds: Sequence[int],
    batch: int,
    reference: Tensor | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> Evaluated:
    """Sample every prompt once for each seed and measure. Where all prompts are emoji captions, the truth is known and used.

    ``reference`` holds another model's pictures of the same prompts and seeds, from :attr:`Evaluated.pictures`.
    """
    began = time.perf_counter()
    pictures = torch.cat(
        [
            sample(pipeline, prompts, sampling, seeds=[seed * SEED_STRIDE + i for i in range(len(prompts))], batch=batch, tick=tick)
            for seed in seeds
        ]
    )
    metrics: dict[str, Any] = {
        "pictures": len(pictures),
        "seeds": list(seeds),
        "steps": sampling.num_inference_steps,
        "seconds_per_picture": (time.perf_counter() - began) / len(pictures),
    }
    data = Emoji()
    known = {caption: index for index, caption in enumerate(data.captions)}
    if all(prompt in known for prompt in prompts):
        truth = torch.tensor([known[prompt] for prompt in prompts])
        metrics |= _against_truth(pipeline, data, pictures, truth, len(seeds))
    if reference is not None:
        values = psnr(pictures, reference)
        metrics["psnr_to_reference"] = float(values[values.isfinite()].mean()) if values.isfinite().any() else None
    return Evaluated(metrics=metrics, pictures=pictures)


def _against_truth(pipeline: Any, data: Emoji, pictures: Tensor, truth: Tensor, seeds: int) -> dict[str, Any]:
    pixels = torch.nn.functional.interpolate(pictures, size=(64, 64)) if pictures.shape[-1] != 64 else pictures
    right = predict(Classifier.load(len(data)), pixels).view(seeds, -1) == truth
    colours = backgrounds(pixels)
    real = data.draw(truth.repeat(seeds), torch.Generator().manual_seed(4)).pixels
    by_seed = right.double().mean(dim=1).tolist()
    return {
        "caption_accuracy": float(right.double().mean()),
        "caption_accuracy_interval": wilson_interval(int(right.sum()), right.numel()),
        "caption_accuracy_by_seed": by_seed,
        "caption_accuracy_spread": spread(by_seed),
        "background_total_variation": total_variation(colours),
        "background_total_variation_of_truth": expected_total_variation(len(colours)),
        "background_total_variation_by_seed": [total_variation(part) for part in colours.view(seeds, -1)],
        "frechet_distance": frechet_distance(features(pipeline.vae, pixels), features(pipeline.vae, real)),
    }


@torch.no_grad()
def autoencoder_psnr(vae: Any, draws: int = 512, seed: int = 5, batch: int = 64) -> float:
    """Mean PSNR in dB of the autoencoder's reconstruction of fresh emoji draws."""
    pixels = Emoji().random(draws, torch.Generator().manual_seed(seed)).pixels
    decoded = [
        vae.decode(vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist.mean).sample.float().cpu() for chunk in pixels.split(batch)
    ]
    return float(psnr(torch.cat(decoded), pixels).mean())
