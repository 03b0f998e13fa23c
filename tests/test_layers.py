"""Imports point down: the layers of docs/architecture.md, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastdistill"
LAYERS = {
    "ops": 1,
    "diffusion": 1,
    "models": 2,
    "data": 3,
    "train": 4,
    "compress": 5,
    "distill": 5,
    "evaluation": 5,
}
# External packages that only one folder may import.
CONFINED = {"triton": "ops", "torch.distributed": "train"}

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


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    folder = folder_of(path)
    if folder in LAYERS and path.name != "__main__.py":
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "fastdistill" or len(parts) < 2 or parts[1] == folder:
                continue
            assert parts[1] not in ("recipes", "info", "patched"), f"{name}: a layer imports the top"
            below = LAYERS.get(parts[1])
            assert below is None or below < LAYERS[folder], f"{folder} (layer {LAYERS[folder]}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_confined_packages(path: Path) -> None:
    for package, folder in CONFINED.items():
        if folder_of(path) != folder:
            found = {n for n in imports(path) if n == package or n.startswith(package + ".")}
            assert not found, f"{package} may be imported only under {folder}/"


def test_triton_is_imported_only_by_its_kernels() -> None:
    for path in FILES:
        if path.parent != PACKAGE / "ops" / "triton":
            assert not any(n == "triton" or n.startswith("triton.") for n in imports(path)), path
