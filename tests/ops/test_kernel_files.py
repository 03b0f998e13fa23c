"""Agreement of the kernel files with the `Kernels:` lines of the operators."""

import re
import sys
from pathlib import Path

import pytest

from fastdistill.ops import OPERATORS
from fastdistill.ops.op import Operator

ROOT = Path(__file__).parents[2]
CSRC, TRITON = ROOT / "csrc", ROOT / "fastdistill" / "ops" / "triton"
# Files that serve every family of kernels.
SHARED = {CSRC / "cpu" / "capability.cpp", CSRC / "cpu" / "host.cpp", TRITON / "__init__.py", TRITON / "rows.py"}

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="needs the sources")


def kernel_files(op: Operator) -> list[Path]:
    """Files that the docstring of an operator's module names."""
    lines = re.findall(r"^Kernels: (.+)$", sys.modules[type(op).__module__].__doc__ or "", re.MULTILINE)
    assert len(lines) == 1, f"{op.name}: expected one line 'Kernels: ...' in the docstring of its file"
    names = lines[0].split(", ")
    return [ROOT / name if name.startswith("csrc/") else ROOT / "fastdistill" / name for name in names]


def with_headers(source: Path) -> str:
    """Text of a source and of the headers of `csrc/common` that it includes."""
    text = source.read_text()
    return text + "".join((CSRC / "common" / name).read_text() for name in re.findall(r'"../common/(.+)"', text))


@pytest.mark.parametrize("op", OPERATORS.values(), ids=lambda op: op.name)
def test_the_named_files_hold_the_kernels(op: Operator) -> None:
    files = kernel_files(op)
    assert TRITON / f"{op.triton_module.rpartition('.')[2]}.py" in files
    for file in files:
        registers = f'register("{op.name}"' if file.suffix == ".py" else f'm.impl("{op.name}"'
        assert registers in with_headers(file), f"{file} does not implement {op.name}"


def test_every_kernel_file_is_named_by_an_operator() -> None:
    present = {*(CSRC / "cpu").glob("*.cpp"), *(CSRC / "cuda").glob("*.cu"), *TRITON.glob("*.py")}
    named = {file for op in OPERATORS.values() for file in kernel_files(op)}
    assert present - named == SHARED
