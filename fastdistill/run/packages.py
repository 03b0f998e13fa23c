"""Optional packages: asked for before work begins, with the command that installs them."""

from __future__ import annotations

from importlib.util import find_spec

from fastdistill.errors import UserError


def require_package(package: str, what: str) -> None:
    """Raise `UserError` if `package`, which `what` needs, is not installed."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs {package}: pip install {package}, or leave the option out")
