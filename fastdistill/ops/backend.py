"""Choice of the backend that runs an operator: `eager`, `native` (C++ or CUDA C++) or `triton`.

The order of precedence is the `backend=` argument, then the innermost `with use_backend(...)`, then
`auto`. A backend asked for by name runs or raises; only `auto` falls back, and says so once in the
log.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

Backend = Literal["eager", "native", "triton"]
Request = Literal["auto", "eager", "native", "triton"]

NAMESPACE = "fastdistill"
BACKENDS: tuple[Backend, ...] = get_args(Backend)
PREFERENCE: tuple[Backend, ...] = ("native", "triton", "eager")
LIBRARY = Path(__file__).parents[1] / "_native.so"

log = logging.getLogger("fastdistill")

# One value for the whole process, like torch.set_default_dtype: torch.compile guards on a module
# global, while a context variable would let a graph captured under one backend be reused under
# another.
_requested: Request = "auto"


@contextmanager
def use_backend(backend: Request) -> Iterator[None]:
    """Run every operator in the block on `backend`; a backward pass follows its forward pass.

    The choice holds for the whole process, not for one thread. An operator that the backend cannot
    serve raises `RuntimeError` with the reason when it is called.

    Raises:
        ValueError: there is no backend of this name.
    """
    global _requested
    if backend not in get_args(Request):
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(get_args(Request))}")
    previous, _requested = _requested, backend
    try:
        yield
    finally:
        _requested = previous


def requested() -> Request:
    """Backend that the innermost `use_backend` asks for, else `auto`."""
    return _requested


@functools.cache
def load_native() -> str | None:
    """Load the compiled library once; None, or the reason why there is none."""
    if not LIBRARY.exists():
        return "the compiled library is not installed (reinstall with a C++17 compiler: see `pip install -v .`)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the compiled library does not load: {error.__cause__ or error}"
    return None


def triton_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors.

    It does so when TRITON_INTERPRET=1 was set before its import.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def load_triton(module: str) -> str | None:
    """Import the Triton kernels of one operator; None, or the reason why there are none."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed (it has no wheel for {platform.system()} {platform.machine()}?)"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"triton kernels do not import: {error}"
    return None


@dataclass(frozen=True, kw_only=True)
class Served:
    """Facts of an operator by which a backend is chosen.

    Attributes:
        triton_module: module of its Triton kernels.
        dtypes: the dtypes that it takes, for a backend and a device type.
    """

    triton_module: str
    dtypes: Callable[[Backend, str], tuple[torch.dtype, ...]]


_SERVED: dict[str, Served] = {}


def register(name: str, served: Served) -> None:
    """Make operator `name` known to `choose` and `why_not`."""
    _SERVED[name] = served


@functools.cache
def why_not(name: str, backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    """Reason why `backend` cannot serve operator `name` for this device type and dtype, or None."""
    op = _SERVED[name]
    if dtype not in op.dtypes(backend, device):
        return f"{name} on {backend} {device} does not take {dtype}"
    if backend == "native":
        return load_native() or _kernel_missing(name, device)
    if backend == "triton":
        if device != "cuda" and not (device == "cpu" and triton_interpreted()):
            return f"triton compiles for GPUs, not for {device} (TRITON_INTERPRET=1 runs it on cpu, slowly)"
        return load_triton(op.triton_module)
    return None


def _kernel_missing(name: str, device: str) -> str | None:
    if device in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::{name}", device.upper()
    ):
        return None
    return f"the compiled library holds no {device} kernel for {name}"


@torch.compiler.assume_constant_result
def choose(name: str, request: Request, device: str, dtype: torch.dtype) -> Backend:
    """Backend that runs operator `name`.

    The operator is given by name, so that torch.compile may bake the answer in as a constant.
    """
    chosen = _CHOICES.get((name, request, device, dtype))
    if chosen is None:
        chosen = _CHOICES[name, request, device, dtype] = _choose(name, request, device, dtype)
    return chosen


_CHOICES: dict[tuple[str, str, str, torch.dtype], Backend] = {}


def _choose(name: str, request: Request, device: str, dtype: torch.dtype) -> Backend:
    if request != "auto":
        if request not in BACKENDS:
            raise ValueError(f"unknown backend {request!r}; choose one of {', '.join(get_args(Request))}")
        reason = why_not(name, request, device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {request!r} was asked for, but {reason}")
        return request

    reasons: list[str] = []
    for backend in PREFERENCE:
        # The interpreter is for tests: never the best choice, so never the automatic one.
        reason = (
            "the interpreter is never chosen automatically"
            if backend == "triton" and device == "cpu"
            else why_not(name, backend, device, dtype)
        )
        if reason is None:
            if reasons:
                log.info("%s on %s %s runs on %s: %s", name, device, dtype, backend, "; ".join(reasons))
            return backend
        reasons.append(reason)
    raise RuntimeError(f"no backend serves {name}: {'; '.join(reasons)}")
