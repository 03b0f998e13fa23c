"""``patched(model)``: run a diffusers transformer on the fused operators, and undo it to the bit.

Only the instance is touched: every patched module gets a ``forward`` of its own, and loses it again on undo. Classes, parameters, hooks
and ``state_dict`` keys stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from fastdistill.models.registry import family_of
from fastdistill.ops import modulate
from fastdistill.ops.backend import Request

Forward = Callable[..., Any]


class Patches:
    """What was patched, by class name, and the way back. Also a context manager that undoes itself."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._modules: list[nn.Module] = []

    def replace(self, module: nn.Module, forward: Forward) -> None:
        module.forward = forward
        self._modules.append(module)
        self.counts[type(module).__name__] += 1

    def undo(self) -> None:
        """Give every module its class's ``forward`` again; calling it twice does no harm."""
        for module in self._modules:
            del module.forward
        self._modules.clear()

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())) or "nothing"


def patched(model: nn.Module, *, backend: Request | None = None) -> Patches:
    """Run the adaptive layer norms of ``model``, a diffusers transformer of a supported family, as one fused operator each.

    ``with patched(transformer): ...`` undoes it at the end of the block; ``handle = patched(transformer)`` keeps it until
    ``handle.undo()``. ``backend`` is passed to the operators; by default each takes the best for its device and shape.

    Raises:
        UserError: the model's family is not supported.
        RuntimeError: a module has a ``forward`` of its own already, an earlier patch perhaps; nothing is patched then.
    """
    family_of(model)
    patches = Patches()
    for name, module in model.named_modules():
        make = _PATCHES.get(type(module))
        if make is None or not _without_affine(module):
            continue
        if "forward" in module.__dict__:
            patches.undo()
            raise RuntimeError(f"{name} has a forward of its own already: undo the earlier patch first")
        patches.replace(module, make(module, backend))
    return patches


def _without_affine(module: nn.Module) -> bool:
    norm = module.norm
    return isinstance(norm, nn.LayerNorm) and not norm.elementwise_affine


def _modulated(module: Any, x: Tensor, scale: Tensor, shift: Tensor, backend: Request | None) -> Tensor:
    # Autocast computes the modulation in bfloat16 beside a float32 stream; the operator takes it in the stream's dtype or wider.
    if scale.dtype != x.dtype:
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    return modulate(x, scale, shift, module.norm.eps, backend=backend)


def _ada_layer_norm_zero(module: AdaLayerNormZero, backend: Request | None) -> Forward:
    def forward(x: Tensor, timestep: Any = None, class_labels: Any = None, hidden_dtype: Any = None, emb: Any = None) -> Any:
        if module.emb is not None:
            emb = module.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = module.linear(module.silu(emb)).chunk(6, dim=1)
        return _modulated(module, x, scale, shift, backend), gate, shift_mlp, scale_mlp, gate_mlp

    return forward


def _ada_layer_norm_zero_single(module: AdaLayerNormZeroSingle, backend: Request | None) -> Forward:
    def forward(x: Tensor, emb: Any = None) -> Any:
        shift, scale, gate = module.linear(module.silu(emb)).chunk(3, dim=1)
        return _modulated(module, x, scale, shift, backend), gate

    return forward


def _ada_layer_norm_continuous(module: AdaLayerNormContinuous, backend: Request | None) -> Forward:
    def forward(x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = module.linear(module.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return _modulated(module, x, scale, shift, backend)

    return forward


_PATCHES: dict[type[nn.Module], Callable[[Any, Request | None], Forward]] = {
    AdaLayerNormZero: _ada_layer_norm_zero,
    AdaLayerNormZeroSingle: _ada_layer_norm_zero_single,
    AdaLayerNormContinuous: _ada_layer_norm_continuous,
}
