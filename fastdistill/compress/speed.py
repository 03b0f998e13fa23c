"""Speed of a smaller model next to the full one's, both timed in turns: whatever else the machine
does, it does to both."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastdistill.models.families.family import Anatomy, Workload

WARM_UP, ROUNDS, FEWEST_ROUNDS = 2, 15, 3
SECONDS = 60.0
"""Time after which no further round begins, once there are enough."""
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Milliseconds of one forward pass of each transformer, round by round."""

    full: list[float]
    compressed: list[float]

    def as_json(self) -> dict[str, Any]:
        """Medians, their ratio, and its 95 % interval, by resampling whole rounds."""
        rounds = list(zip(self.full, self.compressed, strict=True))
        draw = random.Random(0)
        resampled = sorted(_ratio(draw.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
        return {
            "full_ms": statistics.median(self.full),
            "compressed_ms": statistics.median(self.compressed),
            "times_faster": _ratio(rounds),
            "times_faster_between": [resampled[RESAMPLES // 40], resampled[-1 - RESAMPLES // 40]],
            "rounds": len(rounds),
        }


@torch.no_grad()
def speed(full: Any, compressed: Any, anatomy: Anatomy, load: Workload) -> Speed:
    """Time both transformers on the same arguments, in turns that change their order.

    Both run as diffusers wrote them, where they are and in their dtypes.
    """
    arguments = anatomy.example(full, load)
    passes = [partial(network, **arguments, return_dict=False) for network in (full, compressed)]
    times: tuple[list[float], list[float]] = ([], [])
    began = time.monotonic()
    for number in range(WARM_UP + ROUNDS):
        if len(times[0]) >= FEWEST_ROUNDS and time.monotonic() - began > SECONDS:
            break
        for which in (0, 1) if number % 2 else (1, 0):
            taken = _milliseconds(passes[which], full.device)
            if number >= WARM_UP:
                times[which].append(taken)
    return Speed(full=times[0], compressed=times[1])


def _ratio(rounds: Sequence[tuple[float, float]]) -> float:
    """Median time of the full model in that of the smaller one."""
    full, compressed = zip(*rounds, strict=True)
    return float(statistics.median(full) / statistics.median(compressed))


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
