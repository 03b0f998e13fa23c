"""All measurements of a pipeline: on the emoji testbed against the known truth, on any model against a reference model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.emoji import Emoji
from fastdistill.evaluation.background_coverage import backgrounds, expected_total_variation, purity, total_variation
from fastdistill.evaluation.classifier import Classifier, predict
from fastdistill.evaluation.frechet import features, frechet_distance
from fastdistill.evaluation.psnr import psnr
from fastdistill.evaluation.statistics import spread, wilson_interval
from fastdistill.models.sampling import SamplingDefaults, sample

SEED_STRIDE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Measurements as JSON, and the images they were taken from, (seeds * N, 3, H, W)."""

    metrics: dict[str, Any]
    images: Tensor


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

    ``reference`` holds another model's images of the same prompts and seeds, from :attr:`Evaluated.images`.
    """
    began = time.perf_counter()
    images = torch.cat(
        [
            sample(pipeline, prompts, sampling, seeds=[seed * SEED_STRIDE + i for i in range(len(prompts))], batch=batch, tick=tick)
            for seed in seeds
        ]
    )
    metrics: dict[str, Any] = {
        "transformer_parameters": pipeline.transformer.num_parameters(),
        "images": len(images),
        "seeds": list(seeds),
        "steps": sampling.num_inference_steps,
        "seconds_per_image": (time.perf_counter() - began) / len(images),
    }
    data = Emoji()
    known = {caption: index for index, caption in enumerate(data.captions)}
    if all(prompt in known for prompt in prompts):
        truth = torch.tensor([known[prompt] for prompt in prompts])
        metrics |= _against_truth(pipeline, data, images, truth, len(seeds))
    if reference is not None:
        # Identical images have no finite ratio.
        values = psnr(images, reference)
        finite = values[values.isfinite()]
        metrics["psnr_to_reference"] = float(finite.mean()) if len(finite) else None
        if len(finite) == len(values):
            metrics |= _over_seeds("psnr_to_reference", [float(part.mean()) for part in values.view(len(seeds), -1)])
        if len(images) > 1:
            found, wanted = (features(pipeline.vae, each) for each in (images, reference))
            metrics["frechet_distance_to_reference"] = frechet_distance(found, wanted)
    return Evaluated(metrics=metrics, images=images)


def _against_truth(pipeline: Any, data: Emoji, images: Tensor, truth: Tensor, seeds: int) -> dict[str, Any]:
    pixels = torch.nn.functional.interpolate(images, size=(64, 64)) if images.shape[-1] != 64 else images
    right = predict(Classifier.load(len(data)), pixels).view(seeds, -1) == truth
    colours = backgrounds(pixels)
    draws = [data.draw(truth.repeat(seeds), torch.Generator().manual_seed(seed)).pixels for seed in (4, 7)]
    return {
        "caption_accuracy": float(right.double().mean()),
        "caption_accuracy_interval": wilson_interval(int(right.sum()), right.numel()),
        **_over_seeds("caption_accuracy", right.double().mean(dim=1).tolist()),
        "background_total_variation": total_variation(colours),
        "background_total_variation_of_truth": expected_total_variation(len(colours)),
        **_over_seeds("background_total_variation", [total_variation(part) for part in colours.view(seeds, -1)]),
        "background_purity": purity(pixels),
        "background_purity_of_truth": purity(draws[0]),
        **_over_seeds("background_purity", [purity(part) for part in pixels.chunk(seeds)]),
        **(_frechet_distances(pipeline.vae, pixels, draws, seeds) if len(truth) > 1 else {}),
    }


def _frechet_distances(vae: Any, pixels: Tensor, draws: Sequence[Tensor], seeds: int) -> dict[str, Any]:
    """To fresh draws of the same captions; beside it the distance between two sets of draws, which is all that so few images can show."""
    sampled, real, again = (features(vae, images) for images in (pixels, *draws))
    parts = zip(sampled.chunk(seeds), real.chunk(seeds), strict=True)
    return {
        "frechet_distance": frechet_distance(sampled, real),
        "frechet_distance_of_truth": frechet_distance(again, real),
        **_over_seeds("frechet_distance", [frechet_distance(*part) for part in parts]),
    }


def _over_seeds(name: str, values: list[float]) -> dict[str, Any]:
    """The value of each seed and how far they lie apart. A distance of few images is biased upwards, so these may lie above the whole."""
    return {f"{name}_by_seed": values, f"{name}_spread": spread(values)} if len(values) > 1 else {}


@torch.no_grad()
def autoencoder_psnr(vae: Any, draws: int = 512, seed: int = 5, batch: int = 64) -> float:
    """Mean PSNR in dB of the autoencoder's reconstruction of fresh emoji draws."""
    pixels = Emoji().random(draws, torch.Generator().manual_seed(seed)).pixels
    decoded = [
        vae.decode(vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist.mean).sample.float().cpu() for chunk in pixels.split(batch)
    ]
    return float(psnr(torch.cat(decoded), pixels).mean())
