"""What a result was made with."""

from __future__ import annotations

import platform

import diffusers
import torch
import transformers

from fastdistill import __version__


def versions() -> dict[str, str]:
    return {
        "fastdistill": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
