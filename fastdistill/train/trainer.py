"""The one training loop of the project. A method says what to learn (:mod:`fastdistill.train.method`); the loop does the rest.

Every step draws its batch and its noise from generators seeded by ``(seed, step)``. A run that is killed and started again therefore
repeats the same bits from its last checkpoint, without a snapshot of any generator.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.train import checkpoint
from fastdistill.train.ema import EMA
from fastdistill.train.log import Log
from fastdistill.train.method import Method

WSD_DECAY = 0.25

BatchSource = Callable[[int, torch.Generator], Any]
"""``(step, generator) -> batch``; all randomness from the generator."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; what to train is the method's."""

    steps: int
    """Optimizer steps."""
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """After warm-up: constant; cosine to zero at ``steps``; or constant and, over the last quarter, linear to zero (warm-up, stable,
    decay; Hu et al. 2024), which alone lets a run be resumed with another number of ``steps`` before its decay begins."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest gradient norm per role; larger gradients are scaled down."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the result of the run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` runs the forward pass under autocast; weights and optimizer stay float32."""
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError("learning_rate and clip_norm must be positive")


class Diverged(UserError):
    """The loss or a gradient is no longer finite."""


class Trainer:
    """Trains ``method`` on ``batches`` in the folder ``run``, from its newest checkpoint if it has one."""

    def __init__(self, method: Method, batches: BatchSource, config: TrainConfig, run: Path) -> None:
        self.method, self.batches, self.config, self.run = method, batches, config, run
        for role, network in method.networks.items():
            network.requires_grad_(role in method.trains)
        self.parameters = {role: [p for p in method.networks[role].parameters() if p.requires_grad] for role in method.trains}
        self.optimizers = {
            role: torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)
            for role, parameters in self.parameters.items()
        }
        self.emas = {role: EMA(method.networks[role], config.ema_decay) for role in method.trains}
        self.device = next(iter(self.parameters[method.trains[0]])).device
        self.step = 0

    def fit(self, describe: str = "train") -> None:
        """Run to ``config.steps``; called again after an interruption, from the newest checkpoint. Ctrl-C saves one first."""
        self.run.mkdir(parents=True, exist_ok=True)
        self._resume()
        with Log(self.run / "metrics.jsonl", describe, start=self.step, total=self.config.steps) as log:
            try:
                while self.step < self.config.steps:
                    logs = self._advance()
                    log.advance(self.step, logs, write=self.step % self.config.log_every == 0 or self.step == self.config.steps)
                    if self.step % self.config.checkpoint_every == 0 and self.step < self.config.steps:
                        self.save()
            except KeyboardInterrupt:
                self.save()
                raise
        self.save()

    def save(self) -> Path:
        state = {"config": dataclasses.asdict(self.config)}
        return checkpoint.save(self.run, self.step, self.method.networks, self.optimizers, self.emas, state)

    def _advance(self) -> dict[str, float]:
        began = time.perf_counter()
        batch = self.batches(self.step, self._generator(stream=0))
        rng = self._generator(stream=1)
        logs: dict[str, torch.Tensor] = {}
        for role in self.method.turns(self.step):
            optimizer = self.optimizers[role]
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate()
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss = self.method.loss(role, batch, rng)
            loss.total.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters[role], self.config.clip_norm)
            # Adam would carry one bad gradient into every later step, so it is better not to take it at all.
            if not torch.isfinite(norm):
                raise Diverged(
                    f"step {self.step}: the gradient of {role!r} is not finite. Lower the learning rate, or check the data; "
                    f"{self.run} holds the last good checkpoint"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.emas[role].update(self.method.networks[role])
            prefix = f"{role}/" if len(self.method.trains) > 1 else ""
            logs |= {f"{prefix}loss": loss.total.detach(), f"{prefix}gradient_norm": norm.detach()}
            logs |= {f"{prefix}{name}": value.detach() for name, value in loss.logs.items()}
        self.method.after_step(self.step)
        self.step += 1
        return {name: float(value) for name, value in logs.items()} | {
            "learning_rate": self._learning_rate(),
            "seconds": time.perf_counter() - began,
        }

    def _learning_rate(self) -> float:
        config = self.config
        warm = min(1.0, (self.step + 1) / max(1, config.warmup_steps))
        if config.schedule == "constant":
            return config.learning_rate * warm
        if config.schedule == "wsd":
            return config.learning_rate * warm * min(1.0, (config.steps - self.step) / (WSD_DECAY * config.steps))
        done = max(0, self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _generator(self, stream: int) -> torch.Generator:
        # A large odd stride keeps the seeds of different runs and streams apart.
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) * 2 + stream)

    def _resume(self) -> None:
        path = checkpoint.latest(self.run)
        if path is None:
            return
        recorded = json.loads((path / "state.json").read_text())["config"]
        current = json.loads(json.dumps(dataclasses.asdict(self.config)))
        free = {"log_every", "checkpoint_every"} | ({"steps"} if self.config.schedule == "wsd" else set())
        changed = {name for name in current if name not in free and recorded.get(name) != current[name]}
        if changed:
            raise UserError(
                f"{path} was written with another {', '.join(sorted(changed))}: use the recorded values to continue it, "
                "or another folder for a new run"
            )
        self.step = checkpoint.load(path, self.method.networks, self.optimizers, self.emas)["step"]
