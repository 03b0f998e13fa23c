"""Judge of the emoji testbed: a classifier of captions, trained on fresh real draws only.

    python examples/train_emoji/classifier.py --run runs/emoji/classifier

Five minutes on two cores. Writes the classifier into the package's assets. Half of the draws are
blurred and noised a little, as an autoencoder does, so that the classifier judges the image and not
its sharpness.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file

from fastdistill.data.emoji import Draws, Emoji, assets
from fastdistill.evaluation.classifier import FILE, Classifier, predict
from fastdistill.run.files import atomic_write
from fastdistill.train.config import TrainConfig
from fastdistill.train.method import Loss, StudentMethod
from fastdistill.train.trainer import Trainer


class Classification(StudentMethod):
    """Method whose loss is the cross-entropy of the caption."""

    def __init__(self, network: Classifier) -> None:
        self.networks = {"student": network}

    def loss(self, role: str, batch: Draws, rng: torch.Generator) -> Loss:
        pixels = batch.pixels.clone()
        half = len(pixels) // 2
        blurred = F.avg_pool2d(pixels[:half], 3, stride=1, padding=1, count_include_pad=False)
        pixels[:half] = blurred + 0.1 * torch.randn(blurred.shape, generator=rng)
        logits = self.networks[role](pixels)
        accuracy = (logits.argmax(dim=1) == batch.captions).float().mean()
        return Loss(total=F.cross_entropy(logits, batch.captions, label_smoothing=0.05), logs={"accuracy": accuracy})


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Path
    batch: int = 128
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500, learning_rate=3e-3, warmup_steps=50, weight_decay=1e-2, ema_decay=0.99, checkpoint_every=250
        )
    )


def main(config: Config) -> None:
    data = Emoji()
    torch.manual_seed(config.train.seed)
    network = Classifier(len(data))
    trainer = Trainer(
        Classification(network), lambda step, rng: data.random(config.batch, rng), config.train, config.run
    )
    trainer.fit("classifier")
    trainer.emas["student"].copy_to(network)
    with atomic_write(assets() / FILE) as partial:
        save_file({name: value.half() for name, value in network.state_dict().items()}, partial)
    generator = torch.Generator().manual_seed(6)
    judge = Classifier.load(len(data))
    right = [
        (predict(judge, draws.pixels) == draws.captions).float()
        for draws in (data.random(1000, generator) for _ in range(20))
    ]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {torch.cat(right).mean():.2%} of 20,000 fresh draws right; wrote "
        f"{assets() / FILE}"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
