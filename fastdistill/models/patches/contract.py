"""Contract of a patch: which calls of a diffusers module run fused, and what runs in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Reason that no report counts: the class's own forward is as fast.
NOTHING_TO_GAIN = "nothing to gain"


@dataclass(frozen=True)
class Patch:
    """Fused form of one class of diffusers' modules.

    Both functions take the arguments of the class's `forward` after the slash.

    Attributes:
        why_not: `why_not(module, /, ...)` returns why this call has to run as the module's class
            does, or None. It is asked before anything is computed, and computes nothing itself.
        forward: `forward(module, fusions, /, ...)` returns what the class's `forward` returns. Only
            calls without a reason reach this function.
    """

    why_not: Callable[..., str | None]
    forward: Callable[..., Any]
