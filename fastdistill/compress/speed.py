"""Speed of a smaller model next to the full one's, both timed in turns: whatever else the machine
does, it does to both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastdistill.models.families.family import Anatomy, Workload

WARM_UP, ROUNDS, FEWEST_ROUNDS = 2, 15, 3
SECONDS = 60.0
"""Time after which no further round begins, once there are enough."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Milliseconds of one forward pass of each transformer, round by round."""

    full: list[float]
    compressed: list[float]

    @property
    def ratios(self) -> list[float]:
        """Speed of the smaller model in that of the full one, by round."""
        return [full / compressed for full, compressed in zip(self.full, self.compressed, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Medians, and the middle half of the ratios."""
        low, middle, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return {
            "full_ms": statistics.median(self.full),
            "compressed_ms": statistics.median(self.compressed),
            "times_faster": middle,
            "times_faster_between": [low, high],
            "rounds": len(self.full),
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


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
