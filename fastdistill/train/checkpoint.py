"""Training state on disk: safetensors for tensors, JSON for the rest, written whole or not at all.

A checkpoint is a folder ``checkpoint-<step>`` with one file per role for weights, optimizer moments and averaged weights, and
``state.json``. It is written under a temporary name and renamed when complete: a process killed at any moment leaves the previous
checkpoint in place. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdistill.train.ema import EMA

PREFIX = "checkpoint-"


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    found = [path for path in run.glob(f"{PREFIX}*") if (path / "state.json").exists() and path.name[len(PREFIX) :].isdigit()]
    return max(found, key=lambda path: int(path.name[len(PREFIX) :]), default=None)


def save(
    run: Path,
    step: int,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    emas: Mapping[str, EMA],
    state: Mapping[str, Any],
    keep: int = 1,
) -> Path:
    """Write ``run/checkpoint-<step>`` and remove all but the ``keep`` newest.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target, partial = run / f"{PREFIX}{step}", run / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for role, optimizer in optimizers.items():
            save_file(_contiguous(networks[role].state_dict()), partial / f"{role}.safetensors")
            save_file(_flatten(optimizer), partial / f"{role}.optimizer.safetensors")
        for role, ema in emas.items():
            save_file(_contiguous(ema.shadow), partial / f"{role}.ema.safetensors")
        updates = {role: ema.updates for role, ema in emas.items()}
        (partial / "state.json").write_text(json.dumps({"step": step, "ema_updates": updates, **state}, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    older = sorted(run.glob(f"{PREFIX}*"), key=lambda path: int(path.name[len(PREFIX) :]))
    for path in older[:-keep]:
        shutil.rmtree(path)
    return target


def load(
    path: Path,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    emas: Mapping[str, EMA],
) -> dict[str, Any]:
    """Restore what :func:`save` wrote, in place, and return its ``state.json``."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    for role, optimizer in optimizers.items():
        networks[role].load_state_dict(load_file(path / f"{role}.safetensors"))
        _unflatten(optimizer, load_file(path / f"{role}.optimizer.safetensors"))
    for role, ema in emas.items():
        ema.shadow = {name: value.to(ema.shadow[name].device) for name, value in load_file(path / f"{role}.ema.safetensors").items()}
        ema.updates = state["ema_updates"][role]
    return state


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer moments as ``<parameter index>.<name>``; hyperparameters are the configuration's, not the checkpoint's."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value).contiguous() for index, slot in state.items() for name, value in slot.items()}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
