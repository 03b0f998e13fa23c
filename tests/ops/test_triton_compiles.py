import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdistill.ops import OPERATORS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.ops.compile_triton", "90"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines() == [f"{name}: compiled" for name in OPERATORS]
