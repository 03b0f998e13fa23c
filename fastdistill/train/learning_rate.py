"""Learning rate over a run."""

from __future__ import annotations

import math

from fastdistill.train.config import RoleConfig

WSD_DECAY = 0.25


def learning_rate(config: RoleConfig, step: int, steps: int, since: int = 0) -> float:
    """Learning rate of optimizer step `step`, counted from 0, in a run of `steps`.

    `RoleConfig.schedule` says how it changes. A run that is trained on after its end is warmed up
    again, from step `since`, and is on the schedule of the longer run then.
    """
    warm = min(1.0, (step - since + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warm
    if config.schedule == "wsd":
        return config.learning_rate * warm * min(1.0, (steps - step) / (WSD_DECAY * steps))
    done = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
