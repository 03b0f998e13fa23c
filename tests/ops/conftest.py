"""Memory that starts as NaN for every test of an operator, so that an unwritten element shows."""

from collections.abc import Iterator

import pytest
import torch

# Tests of the inherited suite that take a second or more for a case, whatever the backend.
COMPILING = ("test_compiles_whole", "test_opcheck")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what compiles, is interpreted or is about the reference alone. One case of every
    operator stays fast."""
    seen = set()
    for item in items:
        if (
            not isinstance(item, pytest.Function)
            or item.path.name != "test_inherited.py"
            or not hasattr(item, "callspec")
        ):
            continue
        operator, backend, device, *_ = item.callspec.id.split("-")
        first = (item.originalname, operator, backend, device) not in seen
        seen.add((item.originalname, operator, backend, device))
        if backend == "eager":
            fast = False
        elif backend == "triton" and device == "cpu":
            fast = first and "against_float64" in item.originalname
        else:
            fast = first or item.originalname not in COMPILING
        if not fast:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    # torch itself fills what empty() returns with NaN in this mode, for callers in Python and in
    # C++.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
