"""Classifier of emoji images by caption, trained by `examples/train_emoji/classifier.py`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdistill.data.emoji import assets

FILE = "classifier.safetensors"


class Classifier(nn.Module):
    """Map pixels (B, 3, 64, 64) in [-1, 1] to logits (B, captions).

    Place and scale of an image vary little, so that 4x4 cells stay apart and nothing is pooled.
    """

    def __init__(self, captions: int, width: int = 24) -> None:
        super().__init__()
        stages = []
        channels = 3
        for out in (width, 2 * width, 3 * width, 3 * width):
            stages += [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.features = nn.Sequential(*stages)
        self.reduce = nn.Conv2d(channels, 32, 1)
        self.head = nn.Linear(32 * 16, captions)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(F.silu(self.reduce(self.features(pixels)).flatten(1)))
        return logits

    @classmethod
    def load(cls, captions: int, folder: Path | None = None) -> Classifier:
        """Load the shipped classifier, in float32."""
        network = cls(captions)
        network.load_state_dict({name: value.float() for name, value in load_file((folder or assets()) / FILE).items()})
        return network.eval()


@torch.no_grad()
def predict(network: Classifier, pixels: Tensor, batch: int = 256) -> Tensor:
    """Predict the caption index of every image, (N,)."""
    return torch.cat([network(chunk).argmax(dim=1) for chunk in pixels.split(batch)])
