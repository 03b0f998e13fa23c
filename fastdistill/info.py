"""Facts of this installation: printed by `fastdistill info`, as a dict from `fastdistill.info()`."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastdistill.run.cli import run
from fastdistill.run.resources import show
from fastdistill.run.store import Store, default_folder

PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao", "bitsandbytes", "xformers")


def info() -> dict[str, Any]:
    """Versions, devices and backends of this installation.

    `operators[op][device][dtype]` is `{"auto": backend, "refused": {backend: reason}}`: the backend
    that `auto` picks, and why it picks no other. `attention[device][dtype]` is the backend of
    diffusers that follows the operators. `library` is None, or why the compiled library cannot be
    used.
    """
    import torch

    from fastdistill import __version__
    from fastdistill.ops import OPERATORS
    from fastdistill.ops.backend import load_native

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "fastdistill": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "kernels": _cpu_capability()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cache": {"folder": str(default_folder()), "bytes": Store(default_folder()).size()},
        "library": load_native(),
        "operators": {name: {device: _backends(op, device) for device in devices} for name, op in OPERATORS.items()},
        "attention": {device: _attention(torch.device(device)) for device in devices},
    }


def _attention(device: Any) -> dict[str, str]:
    from fastdistill.ops.attention import choose_attention
    from fastdistill.ops.op import FLOATS

    return {str(dtype).removeprefix("torch."): choose_attention(device, dtype, needs_grad=True) for dtype in FLOATS}


def _backends(op: Any, device: str) -> dict[str, Any]:
    from fastdistill.ops.backend import BACKENDS, choose, why_not

    table = {}
    for dtype in op.dtypes("eager", device):
        reasons = {backend: why_not(op.name, backend, device, dtype) for backend in BACKENDS}
        table[str(dtype).removeprefix("torch.")] = {
            "auto": choose(op.name, "auto", device, dtype),
            "refused": {backend: reason for backend, reason in reasons.items() if reason},
        }
    return table


def _cpu_capability() -> str | None:
    """The instruction set of the compiled CPU kernels, or None without them."""
    from fastdistill.ops.backend import LIBRARY, load_native

    if load_native() is not None:
        return None
    function = ctypes.CDLL(str(LIBRARY)).fastdistill_cpu_capability
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Say what this installation can do: versions, devices, and the backend that serves each
    operator."""

    all: bool = False
    """Print a row for every operator, device and dtype, and why other backends do not serve it."""
    json: bool = False
    """Print everything as JSON."""


def main(config: InfoConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = info()
    if config.json:
        print(json.dumps(facts, indent=1))
        return
    packages = ", ".join(f"{name} {version or '-'}" for name, version in facts["packages"].items())
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"fastdistill {facts['fastdistill']}, Python {facts['python']}, {facts['platform']}")
    console.print(packages)
    cpu = facts["cpu"]
    console.print(f"cpu: {cpu['cores']} cores, {cpu['threads']} threads, kernels: {cpu['kernels'] or 'none'}")
    console.print(f"gpu: {', '.join(facts['gpus']) or 'none'}")

    cache = facts["cache"]
    console.print(f"cache: {cache['folder']}, {show(cache['bytes'])}; it may be removed at any time")
    console.print(verdict(facts))
    for line in summary(facts):
        console.print(line)
    if not config.all:
        console.print("each operator, and why not on other backends: --all")
        return
    table = Table("operator", "device", "dtype", "runs on", "not on")
    for name, devices in facts["operators"].items():
        for device, dtypes in devices.items():
            for dtype, row in dtypes.items():
                table.add_row(name, device, dtype, row["auto"], ", ".join(row["refused"]))
    console.print(table)
    reasons = {
        (backend, reason): None
        for devices in facts["operators"].values()
        for dtypes in devices.values()
        for row in dtypes.values()
        for backend, reason in row["refused"].items()
    }
    for backend, reason in reasons:
        console.print(f"not on {backend}: {reason}")


def verdict(facts: dict[str, Any]) -> str:
    """Line that says whether `facts` of `info` are as they should be, or what is amiss."""
    if facts["library"] is None:
        return "all is well"
    return f"slower than it could be: {facts['library']}"


def summary(facts: dict[str, Any]) -> list[str]:
    """Lines that say what runs where, for each device: operators that run alike share a line."""
    lines = []
    for device, attention in facts["attention"].items():
        groups: dict[str, list[str]] = {}
        for name, devices in facts["operators"].items():
            groups.setdefault(_by_dtype({dtype: row["auto"] for dtype, row in devices[device].items()}), []).append(
                name
            )
        for where, names in sorted(groups.items(), key=lambda group: -len(group[1])):
            who = ", ".join(names) if len(names) < 4 else f"{len(names)} of {len(facts['operators'])} operators"
            lines.append(f"on {device}: {who} on {where}")
        lines.append(f"on {device}: attention on {_by_dtype(attention)}")
    return lines


def _by_dtype(backends: dict[str, str]) -> str:
    """Backends by dtype in words: one name, if all are the same."""
    names = list(dict.fromkeys(backends.values()))
    if len(names) == 1:
        return names[0]
    return ", ".join(
        f"{name} ({', '.join(dtype for dtype, backend in backends.items() if backend == name)})" for name in names
    )


class _CallableModule(ModuleType):
    """Lets `fastdistill.info` be both this module, once anything imports it, and the function that
    users call."""

    def __call__(self) -> dict[str, Any]:
        return info()


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    run(InfoConfig, main, prog="python -m fastdistill.info")
