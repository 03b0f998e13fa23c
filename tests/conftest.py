"""Before anything imports triton: without a GPU its kernels run in Triton's interpreter, on CPU
tensors."""

import os
from pathlib import Path
from uuid import uuid4

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def no_common_cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins without results of other runs, the user's among them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches / uuid4().hex))


# Before pytest's own hook, which deselects by marker.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    have_fast_case: set[tuple[str, ...]] = set()
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
        if (marker := item.get_closest_marker("slow_but_first")) and isinstance(item, pytest.Function):
            family = (item.nodeid.partition("[")[0], *(str(item.callspec.params[name]) for name in marker.args))
            if family in have_fast_case:
                item.add_marker(pytest.mark.slow)
            have_fast_case.add(family)
