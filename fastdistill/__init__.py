"""fastdistill: a smaller, faster diffusion transformer out of a large one.

Three ways in: `fastdistill.ops` (fused operators), `fastdistill.patched(model)` (a diffusers
transformer that uses them), and the commands `fastdistill compress | distill | sample | evaluate |
info`.
"""

from typing import TYPE_CHECKING

from fastdistill.lazy import lazily

if TYPE_CHECKING:
    from fastdistill import ops as ops
    from fastdistill.info import info as info
    from fastdistill.models.patch import is_patched as is_patched
    from fastdistill.models.patch import patched as patched
    from fastdistill.models.patch import unpatch as unpatch
    from fastdistill.ops.backend import use_backend as use_backend

# Also the version of the distribution: the build reads this literal.
__version__ = "0.1.0"

_LAZY = {
    "ops": "fastdistill.ops",
    "info": "fastdistill.info",
    "is_patched": "fastdistill.models.patch",
    "patched": "fastdistill.models.patch",
    "unpatch": "fastdistill.models.patch",
    "use_backend": "fastdistill.ops.backend",
}

__all__ = ["__version__", *_LAZY]
__getattr__, __dir__ = lazily(__name__, _LAZY)
