"""Training state on disk: safetensors for tensors, JSON for the rest, written whole or not at all.

A checkpoint is a folder `checkpoint-<step>` with one file per role for weights, optimizer moments
and averaged weights, one file for the state of the method, and `state.json`. It is written under a
temporary name and renamed when complete: a process killed at any moment leaves the previous
checkpoint in place. Nothing is pickled.

The first process writes whole tensors of sharded networks, so that its host needs room for the
largest file. This file is an optimizer's: 8 bytes per parameter, 96 GB for 12 billion. Reading
takes one tensor at a time, in every process; all processes have to see the folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdistill.errors import UserError
from fastdistill.run.files import read_json
from fastdistill.train import parallel
from fastdistill.train.ema import EMA

PREFIX = "checkpoint-"
PARTIAL, REPLACED = ".partial-", ".replaced-"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Everything that training changes, by role, and the tensors of the method's own state."""

    networks: Mapping[str, nn.Module]
    """Networks; those with an optimizer are written."""
    optimizers: Mapping[str, torch.optim.Optimizer]
    emas: Mapping[str, EMA] = field(default_factory=dict)
    method_state: Mapping[str, Tensor] = field(default_factory=dict)


def latest(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, if there is one."""
    return max(_complete(run), key=_step, default=None)


def save(run: Path, step: int, trained: Trained, state: Mapping[str, Any], keep: int = 1) -> Path:
    """Write `run/checkpoint-<step>`, unless it is there with this `state`, and remove all but the
    `keep` newest.

    All processes call this together.

    Args:
        state: JSON values for `state.json`.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = run / f"{PREFIX}{step}"
    updates = {role: ema.updates for role, ema in trained.emas.items()}
    record = json.loads(json.dumps({"step": step, "ema_updates": updates, **state}))
    # A step has the same bits whenever it is reached, but may have been measured since.
    if target not in _complete(run) or read_json(target / "state.json") != record:
        files: dict[str, Mapping[str, Tensor]] = {}
        for role, optimizer in trained.optimizers.items():
            files[role] = trained.networks[role].state_dict()
            files[f"{role}.optimizer"] = _flatten(optimizer)
        for role, ema in trained.emas.items():
            files[f"{role}.ema"] = ema.shadow
        if trained.method_state:
            files["method"] = trained.method_state
        write(target, files, {"state": record})
    if parallel.rank() == 0:
        for path in sorted(_complete(run), key=_step)[:-keep]:
            _remove(path)
    parallel.wait()
    return target


def load(path: Path, trained: Trained) -> dict[str, Any]:
    """Restore networks, optimizers and averages from `path`, in place, and return its `state.json`.

    `load_method_state` reads the state of the method.

    Raises:
        UserError: the checkpoint is of other networks.
    """
    state: dict[str, Any] = read_json(path / "state.json")
    for role, optimizer in trained.optimizers.items():
        restore(trained.networks[role].state_dict(), path / f"{role}.safetensors")
        _unflatten(optimizer, path / f"{role}.optimizer.safetensors")
    for role, ema in trained.emas.items():
        restore(ema.shadow, path / f"{role}.ema.safetensors")
        ema.updates = state["ema_updates"][role]
    return state


def load_method_state(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of the method's state, sharded like the tensors of the same name in `like`."""
    file = path / "method.safetensors"
    if not file.exists():
        return {}
    kept = {}
    with safe_open(file, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            whole = stored.get_tensor(name)
            kept[name] = parallel.placed(whole, like[name]) if name in like else whole
    return kept


@torch.no_grad()
def restore(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy the tensors of `file` into `tensors` of the same name.

    Raises:
        UserError: names or shapes differ.
    """
    with safe_open(file, "pt") as stored:
        names = set(stored.keys())
        differing = names ^ tensors.keys()
        differing |= {
            name for name in names & tensors.keys() if stored.get_slice(name).get_shape() != list(tensors[name].shape)
        }
        if differing:
            raise UserError(
                f"{file} is of another network: {', '.join(sorted(differing)[:3])} differ; "
                "choose another folder for this run"
            )
        for name, tensor in tensors.items():
            tensor.copy_(parallel.placed(stored.get_tensor(name), tensor))


def write(target: Path, files: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any]) -> None:
    """Write a folder of safetensors and JSON files, by stem, in place of what was there.

    All processes call this together.
    """
    partial, replaced = (target.with_name(prefix + target.name) for prefix in (PARTIAL, REPLACED))
    first = parallel.rank() == 0
    if first:
        for path in (*target.parent.glob(f"{PARTIAL}*"), *target.parent.glob(f"{REPLACED}*")):
            shutil.rmtree(path)
        partial.mkdir(parents=True)
    try:
        for stem, tensors in files.items():
            whole = parallel.gathered(tensors)
            if first:
                save_file(_apart(whole), partial / f"{stem}.safetensors")
        if first:
            for stem, record in records.items():
                (partial / f"{stem}.json").write_text(json.dumps(record, indent=1))
            if target.exists():
                os.replace(target, replaced)
            os.replace(partial, target)
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    parallel.wait()


def _complete(run: Path) -> list[Path]:
    return [
        path for path in run.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit() and (path / "state.json").exists()
    ]


def _step(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def _remove(path: Path) -> None:
    # First its name: a process that is killed meanwhile leaves nothing that looks like a
    # checkpoint.
    replaced = path.with_name(REPLACED + path.name)
    os.replace(path, replaced)
    shutil.rmtree(replaced)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, none in the memory of another, as safetensors asks for.

    Tied weights and tables of quantisation may share memory.
    """
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.detach().clone() if place in seen else tensor.detach().contiguous()
        seen.add(place)
    return apart


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer moments as `<parameter index>.<name>`.

    Hyperparameters are the configuration's, not the checkpoint's.
    """
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, file: Path) -> None:
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    with safe_open(file, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            index, name = key.split(".", 1)
            parameter, value = parameters[int(index)], stored.get_tensor(key)
            slot = optimizer.state[parameter]
            if value.dtype == torch.int64:
                slot[name] = int(value)  # bitsandbytes counts its steps in Python
            else:
                slot[name] = (
                    parallel.placed(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)
                )


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
