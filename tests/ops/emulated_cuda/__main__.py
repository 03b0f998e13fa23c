"""Run the operator suite on the CUDA kernels without a GPU.

    python -m tests.ops.emulated_cuda BUILD_FOLDER [pytest arguments]

The sources under csrc/cuda are compiled as plain C++ against the headers of this folder, which make
a block's threads fibers, and are registered for CPU tensors in place of the compiled library. The
suite then shows that the kernels compute the right numbers, write every element, read nothing
uninitialised in shared memory, do not depend on the order of threads and blocks, and meet at their
barriers. It cannot show speed, nor the effects of a real memory system.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastdistill.ops import backend as backends

HERE = Path(__file__).parent
CUDA = HERE.parents[2] / "csrc" / "cuda"


def build(folder: Path) -> Path:
    """Compile the CUDA sources, in two processes, and link the objects."""
    torch_folder = Path(torch.__file__).parent
    headers = ["-I", str(HERE), "-isystem", str(torch_folder / "include")]
    versions = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", *headers, *versions]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        prelude = ["-include", str(HERE / "prelude.h")] if source.suffix == ".cu" else []
        subprocess.run(["g++", *flags, *prelude, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sorted(CUDA.glob("*.cu")), HERE / "scheduler.cpp"]))
    library = folder / "emulated.so"
    subprocess.run(
        ["g++", "-shared", "-o", str(library), *objects, "-L", str(torch_folder / "lib"), "-ltorch_cpu"], check=True
    )
    return library


if __name__ == "__main__":
    backends.LIBRARY = build(Path(sys.argv[1]))
    sys.exit(pytest.main(sys.argv[2:]))
