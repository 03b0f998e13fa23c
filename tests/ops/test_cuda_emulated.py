"""CUDA kernels on machines without a GPU: see emulated_cuda/__main__.py."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdistill.ops import OPERATORS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++")
@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the sources")
def test_the_cuda_kernels_pass_the_suite(tmp_path: Path) -> None:
    chosen = "native and cpu and (against_float64 and (float32 or bfloat16) or repeatable and bfloat16)"
    command = [
        sys.executable,
        "-m",
        "tests.ops.emulated_cuda",
        str(tmp_path),
        "tests/ops/test_inherited.py",
        "-k",
        chosen,
    ]
    run = subprocess.run([*command, "-q", "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    on_cuda = [op for op in OPERATORS.values() if f'm.impl("{op.name}"' in sources()]
    assert int(passed[1]) >= 3 * sum(len(op.cases()) for op in on_cuda)


def sources() -> str:
    return "".join(path.read_text() for folder in ("common", "cuda") for path in (ROOT / "csrc" / folder).iterdir())
