"""Shapes on which tests and benchmarks try every operator on rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.op import Case


@dataclass(frozen=True, kw_only=True)
class RowShapes:
    """Shapes of x and of its modulations."""

    id: str
    x: tuple[int, ...]
    modulation: tuple[int, ...] = ()
    strided: bool = False
    """Slices of wider tensors, like chunks of one projection."""
    wide: bool = False
    """Modulations in float32 for a narrower x."""
    offset: float = 0.0
    """Mean of x, in standard deviations."""

    def rows(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        x = self._draw(self.x, dtype, device)
        return (x.add(self.offset) if self.offset else x).requires_grad_()

    def modulations(self, count: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        kept = torch.float32 if self.wide and dtype != torch.float64 else dtype
        return [self._draw(self.modulation, kept, device).requires_grad_() for _ in range(count)]

    def _draw(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self.strided:
            return torch.randn(tuple(shape), device=device).to(dtype)
        *rows, D = shape
        return torch.randn(*rows, 3 * D, device=device).to(dtype)[..., D : 2 * D]


# Broadcasts, strides, odd and empty sizes.
SHAPES = (
    RowShapes(id="B2-S5-D7-D", x=(2, 5, 7), modulation=(7,)),
    RowShapes(id="B2-S5-D64-BD", x=(2, 5, 64), modulation=(2, 64)),
    RowShapes(id="B3-S37-D33-B1D", x=(3, 37, 33), modulation=(3, 1, 33)),
    RowShapes(id="B2-S9-D130-BSD", x=(2, 9, 130), modulation=(2, 9, 130)),
    RowShapes(id="B1-S70-D100-1D", x=(1, 70, 100), modulation=(1, 100)),
    RowShapes(id="B2-S3-D5-11D", x=(2, 3, 5), modulation=(1, 1, 5)),
    RowShapes(id="S6-D48-D", x=(6, 48), modulation=(48,)),
    RowShapes(id="S6-D19-SD", x=(6, 19), modulation=(6, 19)),
    RowShapes(id="B2-S1-D8-BD", x=(2, 1, 8), modulation=(2, 8)),
    RowShapes(id="B2-S0-D8-B1D", x=(2, 0, 8), modulation=(2, 1, 8)),
    RowShapes(id="B0-S4-D8-BD", x=(0, 4, 8), modulation=(0, 8)),
    RowShapes(id="B1-S4-D1-D", x=(1, 4, 1), modulation=(1,)),
    RowShapes(id="B2-S21-D96-B1D-strided", x=(2, 21, 96), modulation=(2, 1, 96), strided=True),
    RowShapes(id="B2-S21-D37-BSD-strided", x=(2, 21, 37), modulation=(2, 21, 37), strided=True),
    RowShapes(id="B2-S5-D64-BD-offset100", x=(2, 5, 64), modulation=(2, 64), offset=100.0),
    RowShapes(id="B2-S5-D64-B1D-float32", x=(2, 5, 64), modulation=(2, 1, 64), wide=True),
)
FLUX = tuple(RowShapes(id=f"B1-S{S}-D3072", x=(1, S, 3072), modulation=(1, 3072)) for S in (1152, 4608))

Make = Callable[[RowShapes, torch.dtype, torch.device], Sequence[Any]]


def cases(make: Make, several: Sequence[RowShapes] = SHAPES) -> tuple[Case, ...]:
    """One case of an operator for each of several shapes; `make` draws its arguments."""
    return tuple(Case(id=shapes.id, make=partial(make, shapes)) for shapes in several)
