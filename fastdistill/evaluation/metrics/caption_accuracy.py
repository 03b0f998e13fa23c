"""Share of images that the classifier reads as their caption.

Measured from the images and their captions.
"""

from __future__ import annotations

from typing import Any

from fastdistill.evaluation.classifier import Classifier, predict
from fastdistill.evaluation.metrics.metric import Metric, SampledImages, Value, by_seed, values_by_seed
from fastdistill.evaluation.statistics import wilson_interval


def measure(sampled: SampledImages) -> dict[str, Any]:
    truth = sampled.truth
    right = (predict(Classifier.load(len(truth.data)), sampled.emoji_pixels) == truth.captions).view(sampled.seeds, -1)
    return {
        "caption_accuracy": float(right.double().mean()),
        "caption_accuracy_interval": wilson_interval(int(right.sum()), right.numel()),
        **by_seed("caption_accuracy", right.double().mean(dim=1).tolist()),
    }


METRIC = Metric(
    values=(
        Value("caption_accuracy", "caption accuracy", "{:.1%}", headline=True),
        Value("caption_accuracy_interval", "  95 % interval", "{0[0]:.1%} to {0[1]:.1%}"),
        *values_by_seed("caption_accuracy", "{:.2%}"),
    ),
    measure=measure,
    needs=("truth",),
)
