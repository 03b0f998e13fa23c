"""`--budget params=0.66 | memory=8GiB | latency=0.7 | flops=0.8`: what the smaller model may cost.
Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from fastdistill.errors import UserError

UNITS: dict[str, dict[str, int]] = {
    "params": {"K": 10**3, "M": 10**6, "B": 10**9},
    "memory": {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30},
    "latency": {"us": 10**3, "ms": 10**6, "s": 10**9},
    "flops": {"G": 10**9, "T": 10**12},
}
"""Units of each quantity, in what costs are counted in: parameters, bytes, nanoseconds,
floating-point operations."""

EXAMPLES = (
    "params=0.66 (of the full model's) or params=8B, memory=8GiB, latency=0.7 or latency=40ms, flops=0.8 or flops=60T"
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Largest cost of a transformer: `amount` of `quantity`, or that part of the full model's if
    `relative`."""

    quantity: str
    amount: Fraction
    relative: bool

    def limit(self, full: int) -> int:
        """The largest cost that is allowed where the full model costs `full`. Exact: 0.7 is seven
        tenths, not the float near it."""
        return math.floor(self.amount * full if self.relative else self.amount)


def parse_budget(text: str) -> Budget:
    """Read `params=0.66` (a fraction of the full model) or `memory=8GiB` (a number with a unit).

    Raises:
        UserError: anything else, with what is expected.
    """
    quantity, _, value = text.partition("=")
    if quantity not in UNITS:
        raise UserError(f"cannot read --budget {text!r}; give {EXAMPLES}")
    units = {unit.lower(): size for unit, size in UNITS[quantity].items()}
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)", value)
    if not found or found[2].lower() not in ("", *units):
        expected = f"a fraction between 0 and 1, or a number with {', '.join(UNITS[quantity])}"
        raise UserError(f"cannot read --budget {text!r}; {quantity} takes {expected}: {EXAMPLES}")
    number, unit = Fraction(found[1]), found[2].lower()
    if not unit and not 0 < number < 1:
        named = ", ".join(f"{found[1]}{unit}" for unit in UNITS[quantity])
        raise UserError(
            f"--budget {text}: a number without a unit is a fraction of the full model, between 0 and 1; "
            f"else give {named}"
        )
    if number == 0:
        raise UserError(f"--budget {text} leaves nothing; give {EXAMPLES}")
    return Budget(quantity=quantity, amount=number * units.get(unit, 1), relative=not unit)


def show(quantity: str, cost: float) -> str:
    """A cost with its unit: `8.16 B`, `15.20 GiB`, `12.3 ms`, `60.0 TFLOP`, `6 blocks`."""
    if quantity == "params":
        return f"{cost / 1e9:.3f} B" if cost >= 1e9 else f"{cost / 1e6:.3f} M"
    if quantity == "memory":
        return f"{cost / 2**30:.2f} GiB" if cost >= 2**30 else f"{cost / 2**20:.2f} MiB"
    if quantity == "latency":
        return f"{cost / 1e6:.2f} ms"
    if quantity == "flops":
        return f"{cost / 1e12:.3f} TFLOP" if cost >= 1e12 else f"{cost / 1e9:.3f} GFLOP"
    return f"{cost:g} {quantity}"
