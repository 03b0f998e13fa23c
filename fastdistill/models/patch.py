"""`patched(model)`: run a diffusers transformer on the fused operators, and undo it to the bit.

Only the instance is touched: every patched module gets a `forward` of its own, and loses it again
on undo. Classes, parameters, hooks and `state_dict` keys stay as they are.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.models.patches import PATCHES
from fastdistill.models.patches.contract import NOTHING_TO_GAIN, PATCH_MARK, Patch, is_patch
from fastdistill.models.patches.fusions import FUSED_OPERATORS, Fusions
from fastdistill.ops.attention import choose_attention
from fastdistill.ops.backend import Request, choose, requested

log = logging.getLogger("fastdistill")


class Patches:
    """Report of what was patched and what runs it: also a context manager that undoes itself.

    Attributes:
        counts: patched modules by class name.
        stepped_aside: calls that ran as the stock model does, by module class and reason.
        operators: the backend of every operator, for the model's device and dtype at the time of
            patching.
        attention: the attention backend, for the model's device and dtype. A model's own
            `set_attention_backend` takes precedence.
    """

    def __init__(self, fusions: Fusions, model: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        self.stepped_aside: Counter[str] = Counter()
        self._fusions = fusions
        self._modules: list[nn.Module] = []
        self._active = True
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        request = fusions.backend or requested()
        self.operators = {name: choose(name, request, device.type, dtype) for name in FUSED_OPERATORS}
        self.attention = (
            choose_attention(device, dtype, needs_grad=True) if fusions.attention == "auto" else fusions.attention
        )

    def _replace(self, module: nn.Module, patch: Patch) -> None:
        stock = type(module).forward
        why_not, fused, fusions = patch.why_not, patch.forward, self._fusions

        @functools.wraps(stock)
        def forward(*arguments: Any, **keywords: Any) -> Any:
            # A hook that was put around this since then keeps calling it after undo.
            if self._active:
                reason = why_not(module, *arguments, **keywords)
                if reason is None:
                    return fused(module, fusions, *arguments, **keywords)
                if reason != NOTHING_TO_GAIN and not torch.compiler.is_compiling():
                    self._record(module, reason)
            return stock(module, *arguments, **keywords)

        setattr(forward, PATCH_MARK, True)
        module.forward = forward
        self._modules.append(module)
        self.counts[type(module).__name__] += 1

    def _record(self, module: nn.Module, reason: str) -> None:
        entry = f"{type(module).__name__}: {reason}"
        if entry not in self.stepped_aside:
            log.info("patched: %s runs as it always did", entry)
        self.stepped_aside[entry] += 1

    def undo(self) -> None:
        """Give every module its class's `forward` again; calling it twice does no harm."""
        self._active = False
        for module in self._modules:
            if is_patch(module.__dict__.get("forward")):
                del module.forward
        self._modules.clear()

    def __enter__(self) -> Patches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        modules = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())) or "nothing"
        lines = [f"patched: {modules}", f"attention: {self.attention}"]
        lines += [f"{name}: {backend}" for name, backend in self.operators.items()]
        lines += [f"stepped aside {count} times for {reason}" for reason, count in sorted(self.stepped_aside.items())]
        return "\n".join(lines)


def patched(model: nn.Module, *, backend: Request | None = None, attention: str = "auto") -> Patches:
    """Run the blocks of a diffusers transformer on fused operators, in inference and training.

    `with patched(transformer) as report: ...` undoes it at the end of the block. `report =
    patched(transformer)` keeps it until `report.undo()`. `print(report)` says what runs on which
    backend.

    Gradient checkpointing, torch.compile, LoRA, fused projections, masks, ControlNet and IP-Adapter
    work as on the stock model. A call that cannot be fused runs as the module's class does, and the
    report counts it with the reason. Under torch.compile only the fusions that gain there are kept.

    Args:
        model: a transformer of one of the classes in `fastdistill.models.patches.PATCHES`.
        backend: of the operators: `eager`, `native`, `triton` or `auto`. By default each operator
            takes the best for its device and shape.
        attention: an attention backend of diffusers by name, or `auto`: the best that is installed,
            for the device and dtype.

    Raises:
        UserError: the model's class is not covered; the message lists the classes that are.
        RuntimeError: the model is patched already; the earlier patch stays.
    """
    patches = PATCHES.get(type(model).__name__)
    if patches is None:
        raise UserError(f"{type(model).__name__} has no fused form; covered are {', '.join(PATCHES)}")
    report = Patches(Fusions(backend, attention), model)
    for name, module in model.named_modules():
        patch = patches.get(type(module).__name__)
        # torch has a GELU as well.
        if patch is None or not type(module).__module__.startswith("diffusers."):
            continue
        if "forward" not in module.__dict__:
            report._replace(module, patch)
        elif is_patch(module.__dict__["forward"]):
            report.undo()
            raise RuntimeError(f"{name} is patched already: undo the earlier patch first")
        else:
            # Offloading hooks wrap a module's forward; it then stays as it is.
            report._record(module, "it has a forward of its own, an offloading hook perhaps")
    return report


def is_patched(model: nn.Module) -> bool:
    return any(is_patch(module.__dict__.get("forward")) for module in model.modules())
