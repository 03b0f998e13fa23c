"""Make a diffusers transformer smaller: ``score``, ``select``, ``cut``, ``repair``, or ``python -m fastdistill.compress`` end to end."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistill.compress.api import repair as repair
    from fastdistill.compress.api import score as score
    from fastdistill.compress.api import scorer as scorer
    from fastdistill.compress.api import select as select
    from fastdistill.compress.surgery import cut as cut

# `python -m fastdistill.compress --help` comes through here and must answer at once, so torch loads on first use.
_LAZY = {
    "repair": "fastdistill.compress.api",
    "score": "fastdistill.compress.api",
    "scorer": "fastdistill.compress.api",
    "select": "fastdistill.compress.api",
    "cut": "fastdistill.compress.surgery",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
