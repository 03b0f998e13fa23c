"""Needs of the compiled library, and where this machine has them. Imports neither torch nor
setuptools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

OLDEST_TORCH = (2, 10)
# Native code for Ampere to Blackwell data centre GPUs; Ada runs Ampere's code, newer chips compile
# the PTX.
DEFAULT_CUDA_ARCHITECTURES = "80-real;90-real;100"
CUDA_ARCHITECTURES_BEFORE_12_8 = "80-real;90"


class BuildError(Exception):
    """The build cannot go on; the message says what to do."""


def find_compiler(env: Mapping[str, str] = os.environ) -> str | None:
    for name in (env.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name, path=env.get("PATH"))):
            return path
    return None


def find_nvcc(env: Mapping[str, str] = os.environ) -> str | None:
    homes = [Path(env[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    for name in (env.get("CUDACXX"), *map(str, homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and (path := shutil.which(name, path=env.get("PATH"))):
            return path
    return None


def cuda_compiler(env: Mapping[str, str] = os.environ) -> str | None:
    """nvcc when CUDA kernels are to be built. Asks for no GPU, as the machine that builds often has
    none."""
    wanted = env.get("FASTDISTILL_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildError(
            f"FASTDISTILL_CUDA={wanted!r}: expected auto (build CUDA where nvcc is found), 0 or 1"
        )
    if wanted == "0":
        return None
    nvcc = find_nvcc(env)
    if nvcc is None and wanted == "1":
        raise BuildError(
            "FASTDISTILL_CUDA=1, but no nvcc is on PATH or in CUDA_HOME; install the CUDA toolkit"
        )
    return nvcc


def cuda_architectures(nvcc: str, env: Mapping[str, str] = os.environ) -> str:
    """`TORCH_CUDA_ARCH_LIST` ("8.0 9.0a 10.0+PTX") in CMake's words ("80-real;90a-real;100")."""
    listed = env.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if not listed:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", version)
        new = release is not None and (int(release[1]), int(release[2])) >= (12, 8)
        return DEFAULT_CUDA_ARCHITECTURES if new else CUDA_ARCHITECTURES_BEFORE_12_8
    architectures = []
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: cannot read {entry!r}; expected entries such as 8.0, 9.0a, 10.0+PTX"
            )
        architectures.append(match[1] + match[2] + ("" if match[3] else "-real"))
    return ";".join(architectures)


def jobs(env: Mapping[str, str] = os.environ) -> int:
    value = env.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not value.isdecimal() or int(value) < 1:
        raise BuildError(f"MAX_JOBS={value!r}: expected a positive number")
    return int(value)


def find_torch() -> Path | None:
    """Folder of an installed torch that is new enough. Does not import torch.

    An isolated build hides the packages of the environment that it builds for, but sysconfig still
    names their folder. The library is then built with the headers of the torch that will load it,
    and no second torch is downloaded.
    """
    spec = find_spec("torch")
    places = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    places += [Path(sysconfig.get_path(scheme), "torch") for scheme in ("platlib", "purelib")]
    for place in places:
        version = _torch_version(place)
        if version is not None and version >= OLDEST_TORCH:
            return place
    return None


def _torch_version(place: Path) -> tuple[int, int] | None:
    version_file = place / "version.py"
    if not version_file.is_file():
        return None
    match = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", version_file.read_text())
    return (int(match[1]), int(match[2])) if match else None


def build_requirements(env: Mapping[str, str] = os.environ) -> list[str]:
    """Packages that an isolated build has to install in addition to setuptools."""
    if find_compiler(env) is None:
        return []
    requirements = [] if find_torch() else [f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"]
    if not _runs("cmake", env):
        requirements.append("cmake>=3.18")
    if not _runs("ninja", env):
        requirements.append("ninja")
    return requirements


def _runs(tool: str, env: Mapping[str, str]) -> bool:
    """Whether `tool` runs, for which being on PATH is not enough.

    Installed by pip into a virtual environment, cmake and ninja are scripts that import a module
    which an isolated build does not see.
    """
    path = shutil.which(tool, path=env.get("PATH"))
    if path is None:
        return False
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
