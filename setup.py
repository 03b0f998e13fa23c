"""Compiles csrc/ through CMake into fastdistill/_native.so, one library for every Python and every
torch >= 2.10.

Environment: `FASTDISTILL_CUDA=auto|0|1`, `TORCH_CUDA_ARCH_LIST`, `MAX_JOBS`, `CXX`, `CUDACXX`,
`CUDA_HOME` and `CUDA_PATH`. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "_build"))

import native  # noqa: E402  (found by the line above, also when pip did not read backend-path)


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # No Python version in the name: the library holds no Python module.
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = native.find_torch()
        cmake = shutil.which("cmake")
        if torch is None or cmake is None:
            raise SystemExit(
                f"fastdistill: {'torch >= 2.10' if torch is None else 'cmake'} was not found to build with. "
                "Install it, or leave out --no-build-isolation and pip fetches it."
            )
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_folder = Path(self.build_temp).resolve()
        build_folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)

        arguments = [
            f"-DTORCH_DIR={torch}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}",
        ]
        if compiler := native.find_compiler():
            arguments.append(f"-DCMAKE_CXX_COMPILER={compiler}")
        if nvcc := native.cuda_compiler():
            architectures = native.cuda_architectures(nvcc)
            arguments += [
                "-DFASTDISTILL_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
            ]
        if ninja := shutil.which("ninja"):
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        print(f"fastdistill: torch headers from {torch}; CUDA {architectures if nvcc else 'off'}", flush=True)
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build_folder), *arguments], check=True)
        subprocess.run([cmake, "--build", str(build_folder), "--parallel", str(native.jobs())], check=True)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def extensions() -> list[Extension]:
    try:
        native.cuda_compiler()
        native.jobs()
    except native.BuildError as error:
        raise SystemExit(f"fastdistill: {error}") from None
    if native.find_compiler() is not None:
        return [Extension("fastdistill._native", sources=[])]
    print(
        "fastdistill: WARNING: no C++ compiler was found, so the compiled kernels are left out: operators "
        "run on eager PyTorch, and on Triton where there is a GPU. To have them, install g++ (Debian: apt "
        "install g++) and install fastdistill again.",
        file=sys.stderr,
    )
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
