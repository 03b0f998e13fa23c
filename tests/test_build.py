"""The build decides by what it finds, says what is wrong, and makes a library that any torch >=
2.10 can load."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastdistill
from fastdistill.ops.backend import LIBRARY, load_native

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "_build"))

import native  # noqa: E402  (the build's own module, outside the package)

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="installed without a C++ compiler")


def dynamic_symbols() -> list[str]:
    listing = subprocess.run(["nm", "-DC", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    return [line[17:] for line in listing.splitlines()]


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_library_uses_only_the_stable_c_interface() -> None:
    undefined = [s[2:] for s in dynamic_symbols() if s.startswith(("U ", "w "))]
    assert any(s.startswith("aoti_torch_") for s in undefined)
    unstable = [s for s in undefined if re.search(r"\b(at|c10|torch)::", s)]
    assert not unstable
    ours = [s for s in undefined if not re.search(r"@|^(aoti_)?torch_|^_ITM_|^__cxa_finalize|^__gmon_start__", s)]
    assert not ours, "symbols that are neither libc's, libstdc++'s nor torch's C interface"


@needs_library
def test_library_is_no_python_module_and_knows_no_build_machine() -> None:
    assert not any("PyInit" in s for s in dynamic_symbols())
    if native.find_nvcc(os.environ) is None:  # nvcc has no prefix map: its error messages keep the headers' paths
        assert str(native.find_torch()).encode() not in LIBRARY.read_bytes(), "a path of the build machine"
    assert load_native() is None


def test_cuda_switch() -> None:
    assert native.cuda_compiler({"FASTDISTILL_CUDA": "0", "PATH": "/usr/local/bin"}) is None
    with pytest.raises(native.BuildError, match=r"FASTDISTILL_CUDA='yes': expected auto"):
        native.cuda_compiler({"FASTDISTILL_CUDA": "yes"})


def test_cuda_asked_for_without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_nvcc", lambda env: None)
    assert native.cuda_compiler({}) is None
    with pytest.raises(native.BuildError, match="no nvcc"):
        native.cuda_compiler({"FASTDISTILL_CUDA": "1"})


def test_nvcc_decides_and_not_a_gpu(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert native.cuda_compiler({"PATH": str(tmp_path)}) == str(nvcc)


def test_architecture_list() -> None:
    read = {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a;10.0+PTX"}
    assert native.cuda_architectures("nvcc", read) == "80-real;90a-real;100"
    with pytest.raises(native.BuildError, match="cannot read 'Hopper'"):
        native.cuda_architectures("nvcc", {"TORCH_CUDA_ARCH_LIST": "Hopper"})


def test_max_jobs() -> None:
    assert native.jobs({"MAX_JOBS": "3"}) == 3
    with pytest.raises(native.BuildError, match="MAX_JOBS"):
        native.jobs({"MAX_JOBS": "many"})


def test_torch_is_found_where_an_isolated_build_hides_it() -> None:
    """Build isolation takes site-packages off sys.path; the interpreter's prefix still tells where
    it is."""
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
        f"sys.path.insert(0, {str(ROOT / '_build')!r}); import native; print(native.find_torch())"
    )
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip(), "include").is_dir()


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the sources")
def test_the_version_is_read_from_the_package_without_importing_it() -> None:
    code = (
        "import sys; sys.modules['fastdistill'] = None; from setuptools.config.pyprojecttoml import "
        "apply_configuration;"
        "from setuptools import Distribution; print(apply_configuration(Distribution(), "
        "'pyproject.toml').get_version())"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fastdistill.__version__


def test_without_a_compiler_nothing_is_downloaded() -> None:
    assert native.build_requirements({"PATH": ""}) == []


@pytest.mark.skipif(sys.platform == "win32", reason="writes shell scripts")
def test_tools_that_do_not_run_are_installed_again(tmp_path: Path) -> None:
    """cmake from pip in an active virtual environment is on PATH, and fails in an isolated build."""
    for name, code in (("c++", 0), ("cmake", 1), ("ninja", 0)):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\nexit {code}\n")
        script.chmod(0o755)
    wanted = [r for r in native.build_requirements({"PATH": str(tmp_path)}) if not r.startswith("torch")]
    assert wanted == ["cmake>=3.18"]
