"""fastdistill: a smaller, faster diffusion transformer out of a large one.

Three doors: `fastdistill.ops` (fused operators), `fastdistill.patched(model)` (a diffusers transformer that
uses them), and the commands `python -m fastdistill.compress | sample | evaluate | info`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistill import ops as ops
    from fastdistill.info import info as info
    from fastdistill.models.patch import patched as patched
    from fastdistill.ops.backend import use_backend as use_backend

__version__ = "0.1.0"

# `import fastdistill` and `--help` must answer at once, so torch and diffusers load on first use.
_LAZY = {
    "ops": ("fastdistill.ops", None),
    "info": ("fastdistill.info", "info"),
    "patched": ("fastdistill.models.patch", "patched"),
    "use_backend": ("fastdistill.ops.backend", "use_backend"),
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
