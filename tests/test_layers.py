"""Imports point down: the layers of docs/architecture.md, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastdistill"
LAYERS = (
    {"errors", "lazy"},
    {"run"},
    {"ops", "diffusion"},
    {"models"},
    {"data"},
    {"train", "evaluation"},
    {"job"},
    {"compress", "distill"},
    {"info", "sample", "evaluate"},
)
"""By folder, or file of the root. A member imports from earlier layers and from itself."""
# The version stands in the root, and these rooms have it there.
ROOT_NAMES = {"fastdistill", "fastdistill.__version__"}
# External packages that only one folder may import.
CONFINED = {"triton": "ops", "torch.distributed": "train"}
# What `--help` reads. No heavy package on the way.
LIGHT = (
    "fastdistill",
    "fastdistill.run",
    "fastdistill.run.cli",
    "fastdistill.run.options",
    "fastdistill.compress.config",
    "fastdistill.distill.config",
)
HEAVY = ("torch", "diffusers", "transformers", "matplotlib")

FILES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    package = ("fastdistill", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return names


def room_of(path: Path) -> str:
    """The folder of the package that a file is in, or the file itself where it lies in the root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(room: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def test_every_room_has_a_layer_and_every_layer_exists() -> None:
    assert {room_of(path) for path in FILES} - {"__init__", "__main__"} == set().union(*LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    # The command of a folder stands above everything, and brings it together.
    top = len(LAYERS) if path.name == "__main__.py" else layer_of(room)
    for name in imports(path):
        if name in ROOT_NAMES or not name.startswith("fastdistill."):
            continue
        other = name.split(".")[1]
        assert other == room or layer_of(other) < top, f"{room} (layer {top}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_confined_packages(path: Path) -> None:
    for package, folder in CONFINED.items():
        if room_of(path) != folder:
            found = {n for n in imports(path) if n == package or n.startswith(package + ".")}
            assert not found, f"{package} may be imported only under {folder}/"


def test_triton_is_imported_only_by_its_kernels() -> None:
    for path in FILES:
        if path.parent != PACKAGE / "ops" / "triton":
            assert not any(n == "triton" or n.startswith("triton.") for n in imports(path)), path


def reads_text(node: ast.AST) -> bool:
    """Whether a call reads text by a way of its own: by `read_text` of a path, `json.load`, or
    `open` for reading."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if isinstance(node.func, ast.Name) and name != "open":
        return False
    if name == "open":
        # The mode is the first argument of a path's method, the second of the function.
        owner = getattr(getattr(node.func, "value", None), "id", "")
        modes = [*node.args[0 if isinstance(node.func, ast.Attribute) else 1 :], *(key.value for key in node.keywords)]
        given = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
        return owner not in ("Image", "os") and not any(letter in mode for mode in given for letter in "awxb")
    return name == "read_text" or (name == "load" and getattr(node.func.value, "id", "") in ("json", "csv"))


def test_text_is_read_by_one_function() -> None:
    """`run/files.py` alone knows of byte order marks and encodings."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in FILES
        if path != PACKAGE / "run" / "files.py"
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if reads_text(node)
    ]
    assert not found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("path.read_text(encoding='utf-8')", True),
        ("json.load(file)", True),
        ("open(path)", True),
        ("path.open()", True),
        ("open(path, encoding='utf-8')", True),
        ("read_text(path)", False),
        ("path.open('a')", False),
        ("open(path, 'rb')", False),
        ("Image.open(path)", False),
        ("checkpoint.load(path)", False),
    ],
)
def test_ways_to_read_text_are_told_apart(code: str, expected: bool) -> None:
    assert reads_text(ast.parse(code, mode="eval").body) == expected


@pytest.mark.parametrize("module", LIGHT)
def test_help_waits_for_no_heavy_package(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not found, f"importing {module} imports {', '.join(found)}"
