"""Make a diffusers transformer smaller.

From Python: `calibrate`, `score`, `select`, `cut`, `repair`. End to end:
`Compression(CompressConfig(...)).run()`, or `Sweep` for several sizes, or `python -m
fastdistill.compress`.
"""

from typing import TYPE_CHECKING

from fastdistill.lazy import lazily

if TYPE_CHECKING:
    from fastdistill.compress.api import calibrate as calibrate
    from fastdistill.compress.api import repair as repair
    from fastdistill.compress.api import score as score
    from fastdistill.compress.api import select as select
    from fastdistill.compress.config import CompressConfig as CompressConfig
    from fastdistill.compress.job import Compression as Compression
    from fastdistill.compress.surgery import cut as cut
    from fastdistill.compress.sweep import Sweep as Sweep

_LAZY = {
    "CompressConfig": "fastdistill.compress.config",
    "Compression": "fastdistill.compress.job",
    "Sweep": "fastdistill.compress.sweep",
    "calibrate": "fastdistill.compress.api",
    "cut": "fastdistill.compress.surgery",
    "repair": "fastdistill.compress.api",
    "score": "fastdistill.compress.api",
    "select": "fastdistill.compress.api",
}

__all__ = [*_LAZY]
__getattr__, __dir__ = lazily(__name__, _LAZY)
