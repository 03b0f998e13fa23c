"""Machine on which a time was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def machine(malloc: str) -> tuple[str, dict[str, Any]]:
    """Folder name of this machine, and facts: device, versions, commit."""
    import torch

    import fastdistill

    facts = fastdistill.info()
    gpu = facts["gpus"][0] if facts["gpus"] else None
    device = gpu or f"{cpu_name()} {os.cpu_count()} cores"
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True
    )
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"), {
        "device": device,
        **({} if gpu else {"malloc": "as the system has it" if malloc == "default" else "keeps freed memory"}),
        "threads": torch.get_num_threads(),
        "cpu_kernels": facts["cpu"]["kernels"],
        "python": facts["python"],
        "torch": torch.__version__,
        "triton": facts["packages"]["triton"],
        "diffusers": facts["packages"]["diffusers"],
        "fastdistill": facts["fastdistill"],
        "commit": git.stdout.strip() or "not committed",
    }
