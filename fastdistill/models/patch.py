"""`patched(model)`: run a diffusers transformer on the fused operators, and undo it to the bit.

Only the instance is touched: every patched module gets a `forward` of its own, and loses it again
on undo. Classes, parameters, hooks and `state_dict` keys stay as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, get_args

import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.models.patches import PATCHES, fused_forms
from fastdistill.models.patches.forwards import keeps_own_forward, link_of, put, take_off
from fastdistill.models.patches.fusions import FUSED_OPERATORS, Fusions
from fastdistill.ops.attention import attention_names, choose_attention
from fastdistill.ops.backend import Request, choose, requested

log = logging.getLogger("fastdistill")


class Patches:
    """Report of what was patched and what runs it: also a context manager that undoes itself.

    Attributes:
        counts: patched modules by class name.
        stepped_aside: calls that ran as the stock model does, by module class and reason.
        fusions: the operators that the patched modules call.
    """

    def __init__(self, fusions: Fusions) -> None:
        self.counts: Counter[str] = Counter()
        self.stepped_aside: Counter[str] = Counter()
        self.fusions = fusions
        self._modules: list[nn.Module] = []

    @property
    def runs_on(self) -> tuple[torch.device, torch.dtype] | None:
        """Device and dtype of the latest call.

        Before the first call they are those of the parameters, as far as these tell: None where all
        are quantised, or hold no data yet.
        """
        if self.fusions.seen is not None:
            return self.fusions.seen
        parameters = (p for module in self._modules for p in module.parameters())
        known = (p for p in parameters if p.is_floating_point() and p.itemsize > 1 and not p.is_meta)
        return next(((p.device, p.dtype) for p in known), None)

    @property
    def operators(self) -> dict[str, str]:
        """Backend of every operator on the device and in the dtype of `runs_on`.

        The reason takes the place of a backend that was asked for and cannot run; without
        `runs_on`, nothing is known.
        """
        if self.runs_on is None:
            return {}
        device, dtype = self.runs_on
        return {name: self._backend(name, device, dtype) for name in FUSED_OPERATORS}

    def _backend(self, name: str, device: torch.device, dtype: torch.dtype) -> str:
        try:
            return str(choose(name, self.fusions.backend or requested(), device.type, dtype))
        except RuntimeError as error:
            return str(error)

    @property
    def attention(self) -> str:
        """Attention backend on the device and in the dtype of `runs_on`, with gradients.

        A model's own `set_attention_backend` takes precedence.
        """
        if self.fusions.attention != "auto" or self.runs_on is None:
            return self.fusions.attention
        return choose_attention(*self.runs_on, needs_grad=True)

    def take(self, module: nn.Module) -> None:
        """Add a module that is patched from now on."""
        self._modules.append(module)
        self.counts[type(module).__name__] += 1

    def record(self, module: nn.Module, reason: str) -> None:
        """Count a call of `module` that runs as its class does."""
        entry = f"{type(module).__name__}: {reason}"
        if entry not in self.stepped_aside:
            log.info("patched: %s runs as it always did", entry)
        self.stepped_aside[entry] += 1

    def undo(self) -> None:
        """Give every module its class's `forward` again; calling it twice does no harm.

        Hooks that were set since then stay, and call the class's `forward`. A copy of the model
        stays as it is.
        """
        for module in self._modules:
            link = link_of(module)
            if link is None or link.patches is self:
                take_off(module)
        self._modules.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Patches:
        """Report of a copy, which takes in the copied modules one by one."""
        return Patches(self.fusions.copy())

    def __enter__(self) -> Patches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "in place" if self._modules else "undone"
        return f"<Patches of {self._modules_in_words()}; {state}; print it for a report>"

    def __str__(self) -> str:
        lines = [f"patched: {self._modules_in_words()}"]
        if self.runs_on is None:
            lines.append("device and dtype: known after the first call")
        else:
            device, dtype = self.runs_on
            verb = "ran" if self.fusions.seen else "to run"
            lines.append(f"{verb} on {device} in {str(dtype).removeprefix('torch.')}")
        lines.append(f"attention: {self.attention}")
        lines += [f"{name}: {backend}" for name, backend in self.operators.items()]
        lines += [f"stepped aside {count} times for {reason}" for reason, count in sorted(self.stepped_aside.items())]
        return "\n".join(lines)

    def _modules_in_words(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())) or "nothing"


def patched(model: Any, *, backend: Request | None = None, attention: str = "auto") -> Patches:
    """Run the blocks of a diffusers transformer on fused operators, in inference and training.

    `with patched(transformer) as report: ...` undoes it at the end of the block. `report =
    patched(transformer)` keeps it until `report.undo()`. `print(report)` says what runs on which
    backend. docs/patching.md says what becomes of copies, files, hooks and wrappers.

    Gradient checkpointing, torch.compile, LoRA, fused projections, masks, ControlNet and IP-Adapter
    work as on the stock model. A call that cannot be fused runs as the module's class does, and the
    report counts it with the reason. Under torch.compile only the fusions that gain there are kept.

    Args:
        model: a network that holds blocks of the classes in `fastdistill.models.patches.PATCHES`:
            a transformer or a ControlNet, wrapped or not, or a pipeline, whose networks are all
            patched. Weights may be of any dtype, quantised, offloaded or not loaded yet.
        backend: of the operators: `eager`, `native`, `triton` or `auto`. By default each operator
            takes the best for its device and shape.
        attention: an attention backend of diffusers by name, or `auto`: the best that is installed,
            for the device and dtype.

    Raises:
        UserError: the model has no block that is covered (the message lists those that are), or
            there is no backend, or no attention backend, of this name.
        RuntimeError: the model is patched already; the earlier patch stays.
    """
    if backend is not None and backend not in get_args(Request):
        raise UserError(f"unknown backend {backend!r}; choose one of {', '.join(get_args(Request))}")
    if attention != "auto" and attention not in attention_names():
        raise UserError(f"attention: expected auto or one of {', '.join(attention_names())}, got {attention!r}")
    network = _network(model)
    if is_patched(network):
        raise RuntimeError(
            f"{type(model).__name__} is patched already: undo the earlier patch first, by its report or `unpatch`"
        )
    forms = list(fused_forms(network))
    if not forms:
        raise UserError(
            f"{type(model).__name__} has no block with a fused form; "
            f"covered are models of diffusers with {', '.join(PATCHES)}"
        )
    report = Patches(Fusions(backend, attention))
    for module, patch in forms:
        if patch is None:
            report.record(module, "its class is derived from one with a fused form, and changes it")
        elif keeps_own_forward(module):
            # Hooks that are there already wrap the class's forward.
            report.record(module, "a hook wraps it since before the patch; patch first to fuse it")
        else:
            put(module, patch, report)
    return report


def is_patched(model: Any) -> bool:
    """Whether a part of a model, or of a pipeline, is patched now."""
    return any(link_of(module) is not None for module in _network(model).modules())


def unpatch(model: Any) -> None:
    """Undo whatever patch a model or a pipeline has, as a copy of a patched model does."""
    for module in _network(model).modules():
        take_off(module)


def _network(model: Any) -> nn.Module:
    """The model itself, or all networks of a pipeline, which may share modules."""
    if isinstance(model, nn.Module):
        return model
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise UserError(f"expected a model or a pipeline of diffusers, got {type(model).__name__}")
    return nn.ModuleList(component for component in components.values() if isinstance(component, nn.Module))
