"""Contract of a metric: what it measures from, what it returns, and how people read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastdistill.data.emoji import SIZE, Emoji
from fastdistill.evaluation.statistics import spread

PartT = TypeVar("PartT")
Need = Literal["truth", "reference", "several prompts", "several images"]
"""Part of `SampledImages` that a metric cannot do without."""


class Value(NamedTuple):
    """JSON value that a metric returns.

    With a `label` the value is a row for people, in the format `form`.
    """

    key: str
    label: str = ""
    form: str = ""
    headline: bool = False
    """Whether a command names the value when it ends."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Known distribution of the images: emoji, with the caption index (S * N,) of each image."""

    data: Emoji
    captions: Tensor

    @cached_property
    def draws(self) -> tuple[Tensor, Tensor]:
        """Two independent sets of draws with the images' captions, each (S * N, 3, 64, 64)."""
        first, second = (self.data.draw(self.captions, torch.Generator().manual_seed(seed)).pixels for seed in (4, 7))
        return first, second


@dataclass(frozen=True, kw_only=True)
class SampledImages:
    """Images (S * N, 3, H, W) in [-1, 1] of one pipeline, of N prompts for each of S seeds."""

    pipeline: Any
    images: Tensor
    seeds: int
    known_truth: Truth | None = None
    given_reference: Tensor | None = None
    """Images of another model, of the same prompts and seeds."""

    @property
    def truth(self) -> Truth:
        return _present(self.known_truth, "truth")

    @property
    def reference(self) -> Tensor:
        return _present(self.given_reference, "reference")

    @cached_property
    def emoji_pixels(self) -> Tensor:
        """Images in the size of emoji, (S * N, 3, 64, 64)."""
        return (
            torch.nn.functional.interpolate(self.images, size=(SIZE, SIZE))
            if self.images.shape[-2:] != (SIZE, SIZE)
            else self.images
        )

    def has(self, need: Need) -> bool:
        match need:
            case "truth":
                return self.known_truth is not None
            case "reference":
                return self.given_reference is not None
            case "several prompts":
                return len(self.images) > self.seeds
            case "several images":
                return len(self.images) > 1


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Measurement of `SampledImages`."""

    values: tuple[Value, ...]
    """Values that `measure` may return, in the order in which people read them."""
    measure: Callable[[SampledImages], dict[str, Any]]
    """Returns values by key. A value that these images do not have is missing."""
    needs: tuple[Need, ...] = ()
    """`measure` is called for images that have all of these."""
    of_transformer: bool = True
    """Whether the value depends on the transformer. A job that compares transformers leaves out a
    metric of other parts."""

    def __call__(self, sampled: SampledImages) -> dict[str, Any]:
        """Measured values, or none where the metric does not apply."""
        return self.measure(sampled) if all(sampled.has(need) for need in self.needs) else {}


def values_by_seed(key: str, form: str) -> tuple[Value, Value]:
    """Values that `by_seed` returns: the spread is a row for people, the value of each seed is not."""
    return Value(f"{key}_spread", "  standard deviation over seeds", form), Value(f"{key}_by_seed")


def by_seed(key: str, values: Sequence[float]) -> dict[str, Any]:
    """Value of each seed and their sample standard deviation; nothing for a single seed.

    A distance of few images is biased upwards, so that the values of all seeds may lie above the
    value of all images.
    """
    return {f"{key}_by_seed": list(values), f"{key}_spread": spread(values)} if len(values) > 1 else {}


def _present(part: PartT | None, need: Need) -> PartT:
    if part is None:
        raise LookupError(f"these images have no {need}: a metric that measures from it says so in its `needs`")
    return part
