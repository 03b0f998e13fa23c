"""Make a diffusers transformer smaller: ``score``, ``select``, ``cut``, ``repair``, or ``python -m fastdistill.compress`` end to end."""

from typing import TYPE_CHECKING

from fastdistill.lazy import lazily

if TYPE_CHECKING:
    from fastdistill.compress.api import repair as repair
    from fastdistill.compress.api import score as score
    from fastdistill.compress.api import scorer as scorer
    from fastdistill.compress.api import select as select
    from fastdistill.compress.surgery import cut as cut

_LAZY = {
    "repair": "fastdistill.compress.api",
    "score": "fastdistill.compress.api",
    "scorer": "fastdistill.compress.api",
    "select": "fastdistill.compress.api",
    "cut": "fastdistill.compress.surgery",
}

__all__ = [*_LAZY]
__getattr__, __dir__ = lazily(__name__, _LAZY)
