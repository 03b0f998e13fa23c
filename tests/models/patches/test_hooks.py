"""Hooks of diffusers, accelerate and users on a patched model, set and unset in every order.

The reference is the stock model with the same hooks: equal values, and equally many calls of each
block's projection, so that a cache still caches and a skipped layer is still skipped.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, apply_layer_skip
from torch import Tensor, nn

from fastdistill.models.patch import Patches, is_patched, patched
from tests.tiny_families import FUSED, run, seeded

SAMPLING = (900, 800, 500, 200)
TIME = [0]
"""Timestep of the sampling's current step, for caches that ask."""
# Letters: (p)atch, (s)et, (u)nset, (o) undo; the model runs after each.
ORDERS = ("psou", "spuo", "psuo", "spou", "psopou", "psopuo", "pospuo", "psupo", "psoupo", "sppuo")
# For hooks that cannot be taken off.
ORDERS_THAT_STAY = ("pso", "spo", "psopo", "pospo")
# Families other than the first of a hook.
FEWER_ORDERS = 2


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A hook with its names in docs/patching.md."""

    set: Callable[[Any], Any]
    unset: Callable[[Any], Any] | None = None
    families: tuple[str, ...] = tuple(FUSED)
    changes: str = "values"
    """The effect to look for: on `values`, on `calls` of projections, or none."""


def cache(make: Callable[[], Any], *families: str) -> Hook:
    return Hook(
        set=lambda model: model.enable_cache(make()),
        unset=lambda model: model.disable_cache(),
        families=families,
        changes="calls",
    )


def offload(**options: Any) -> Hook:
    return Hook(set=lambda model: model.enable_group_offload(torch.device("cpu"), **options), changes="")


def unset(name: str) -> Callable[[Any], None]:
    return lambda model: HookRegistry.check_if_exists_or_initialize(model).remove_hook(name, recurse=True)


def skip(**options: Any) -> Callable[[Any], None]:
    return lambda model: apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn=stack_of(model), **options))


def stack_of(model: Any) -> str:
    return "layers" if hasattr(model, "layers") else "transformer_blocks"


def blocks_of(model: Any) -> dict[str, nn.Module]:
    pattern = re.compile(r"(single_)?(transformer_blocks|layers|noise_refiner|context_refiner)\.\d+")
    return {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}


class Doubles(ModelHook):
    """Hook of accelerate that changes a block's result."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return doubled(output)


def add_to_blocks(model: Any) -> None:
    for block in blocks_of(model).values():
        add_hook_to_module(block, Doubles())


def wrap_in_a_function(model: Any) -> None:
    """A user's own wrapper of `forward`, which tells nobody what is within."""
    for block in blocks_of(model).values():
        block.inner = block.forward
        block.forward = lambda *args, inner=block.inner, **kwargs: doubled(inner(*args, **kwargs))


def wrap_with_its_name(model: Any) -> None:
    for block in blocks_of(model).values():
        block.inner = block.forward
        block.forward = functools.wraps(block.inner)(
            lambda *args, inner=block.inner, **kwargs: doubled(inner(*args, **kwargs))
        )


def doubled(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(doubled(t) for t in output)
    return None if output is None else 2 * output


def unwrap(model: Any) -> None:
    for block in blocks_of(model).values():
        block.forward = block.__dict__.pop("inner")


def hook_blocks(model: Any) -> None:
    model.handles = [
        block.register_forward_hook(lambda _module, _args, output: doubled(output))
        for block in blocks_of(model).values()
    ]


def unhook_blocks(model: Any) -> None:
    for handle in model.handles:
        handle.remove()


TAYLOR: dict[str, Any] = {
    "cache_interval": 2,
    "disable_cache_before_step": 1,
    "max_order": 1,
    "taylor_factors_dtype": torch.float32,
}
HOOKS = {
    "first-block cache": cache(lambda: FirstBlockCacheConfig(threshold=0.5), "flux", "qwen_image"),
    "TaylorSeer": cache(
        lambda: TaylorSeerCacheConfig(**TAYLOR),
        "flux",
        "flux2",
        "qwen_image",
    ),
    "TaylorSeer lite": cache(
        lambda: TaylorSeerCacheConfig(**TAYLOR, use_lite_mode=True),
        "flux",
        "flux2",
    ),
    "MagCache": cache(
        lambda: MagCacheConfig(
            threshold=0.5, max_skip_steps=2, retention_ratio=0.25, num_inference_steps=4, mag_ratios=torch.ones(4)
        ),
        "flux",
        "flux2",
        "qwen_image",
    ),
    "pyramid attention broadcast": cache(
        lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
        "flux",
        "flux2",
        "qwen_image",
    ),
    "FasterCache": cache(
        lambda: FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 681),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: TIME[0],
            attention_weight_callback=lambda _module: 0.5,
            tensor_format="BCHW",
            is_guidance_distilled=True,
        ),
        "flux",
        "flux2",
    ),
    # By itself diffusers skips these in these families only.
    "layer skip": Hook(set=skip(), unset=unset("layer_skip_hook"), families=("flux", "flux2"), changes="calls"),
    "skipped attention": Hook(
        set=skip(skip_ff=False), unset=unset("layer_skip_hook"), families=("z_image",), changes="calls"
    ),
    "skipped attention scores": Hook(
        set=skip(skip_attention=False, skip_ff=False, skip_attention_scores=True),
        unset=unset("layer_skip_hook"),
        families=("z_image",),
    ),
    "skipped feed-forward": Hook(
        set=skip(skip_attention=False), unset=unset("layer_skip_hook"), families=("flux", "sd3", "qwen_image")
    ),
    "group offload, blocks": offload(offload_type="block_level", num_blocks_per_group=1),
    "group offload, leaves": offload(offload_type="leaf_level"),
    "layerwise casting": Hook(
        set=lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    ),
    "accelerate cpu_offload": Hook(
        set=lambda model: accelerate.cpu_offload(model, torch.device("cpu")),
        unset=lambda model: remove_hook_from_module(model, recurse=True),
        changes="",
    ),
    "accelerate hook": Hook(
        set=add_to_blocks, unset=lambda model: remove_hook_from_module(model, recurse=True)
    ),
    "forward hook": Hook(set=hook_blocks, unset=unhook_blocks),
    "wrapped forward": Hook(set=wrap_in_a_function, unset=unwrap),
    "wrapped forward with its name": Hook(set=wrap_with_its_name, unset=unwrap),
}  # fmt: skip


class Walk:
    """A model that is patched, hooked, run, unhooked and unpatched step by step."""

    def __init__(self, family: str, hook: Hook, fused: bool) -> None:
        make, make_inputs = FUSED[family]
        self.model, self.hook, self.fused = seeded(make), hook, fused
        torch.manual_seed(1)
        self.inputs = make_inputs()
        self.report: Patches | None = None
        self.calls: Counter[str] = Counter()
        for name, module in self.model.named_modules():
            if name.endswith((".to_q", ".to_qkv_mlp_proj", ".add_k_proj", ".to_out.0")):
                module.register_forward_pre_hook(lambda _module, _args, name=name: self.calls.update([name]))

    def do(self, letter: str) -> None:
        match letter:
            case "s":
                self.hook.set(self.model)
            case "u":
                assert self.hook.unset is not None
                self.hook.unset(self.model)
            case "p" if self.fused and self.report is None:
                self.report = patched(self.model, backend="native")
                assert is_patched(self.model)
            case "p" if self.fused:
                with pytest.raises(RuntimeError, match="patched already"):
                    patched(self.model)
            case "o" if self.report is not None:
                self.report.undo()
                self.report = None
                assert not is_patched(self.model)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Outputs of the steps of a sampling, whose inputs change a little."""
        torch.manual_seed(2)
        found = []
        for step, time in enumerate(SAMPLING):
            TIME[0] = time
            inputs = dict(self.inputs)
            key = "x" if "x" in inputs else "hidden_states"
            scale = 1 + 0.01 * step
            inputs[key] = [scale * x for x in inputs[key]] if key == "x" else scale * inputs[key]
            if getattr(self.model, "is_cache_enabled", False):
                with self.model.cache_context("cond"):
                    found.append(run(self.model, inputs))
            else:
                found.append(run(self.model, inputs))
        if getattr(self.model, "is_cache_enabled", False):
            self.model._reset_stateful_cache()
        return found


def cases() -> Iterator[Any]:
    for name, hook in HOOKS.items():
        orders = ORDERS_THAT_STAY if hook.unset is None else ORDERS
        for number, family in enumerate(hook.families):
            for order in orders[:FEWER_ORDERS] if number else orders:
                slow = [pytest.mark.slow] if number or order not in orders[:3] else []
                yield pytest.param(hook, family, order, id=f"{name}-{family}-{order}".replace(" ", "-"), marks=slow)


def assert_same(actual: list[Tensor], expected: list[Tensor], where: str) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert e.isfinite().all(), where
        torch.testing.assert_close(a, e, rtol=0, atol=2e-4 * float(e.abs().max()), msg=lambda m: f"{where}: {m}")


def check(hook: Hook, family: str, order: str) -> None:
    """Walk in one order with and without fused blocks, and compare after every step."""
    stock, fast = Walk(family, hook, fused=False), Walk(family, hook, fused=True)
    plain, calls = stock.outputs(), Counter(stock.calls)
    for done, letter in enumerate(order):
        for walk in (stock, fast):
            walk.do(letter)
            walk.calls.clear()
        assert is_patched(fast.model) == (fast.report is not None)
        expected, actual = stock.outputs(), fast.outputs()
        where = f"{letter} at {done} of {order}"
        assert_same(actual, expected, where)
        assert fast.calls == stock.calls, where
        hooked = "s" in order[: done + 1] and "u" not in order[: done + 1]
        if hook.changes == "calls":
            assert (stock.calls != calls) == hooked
        elif hook.changes == "values":
            assert float((expected[-1] - plain[-1]).norm() / plain[-1].norm()) > 1e-3 or not hooked
    assert fast.report is None
    with patched(fast.model, backend="native") as report:
        assert_same(fast.outputs(), stock.outputs(), "patched again")
        if hook.unset is not None:
            assert not report.stepped_aside
            assert report.counts == patched_counts(family)
    assert_same(fast.outputs(), stock.outputs(), "in the end")


@pytest.mark.parametrize(("hook", "family", "order"), cases())
def test_hooks_work_in_any_order(hook: Hook, family: str, order: str) -> None:
    check(hook, family, order)


@pytest.mark.parametrize("order", ORDERS_THAT_STAY)
def test_weights_that_are_offloaded_to_disk_come_back(tmp_path: Path, order: str) -> None:
    folders = (tmp_path / name for name in ("stock", "fast"))
    hook = Hook(
        set=lambda model: model.enable_group_offload(
            torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            offload_to_disk_path=str(next(folders)),
        ),
        changes="",
    )
    check(hook, "flux", order)


@functools.cache
def patched_counts(family: str) -> Counter[str]:
    with patched(FUSED[family][0]()) as report:
        return report.counts


def what_is_fused(hook: Hook, order: str) -> str:
    """Cell of the table in docs/patching.md: parts that run stock when the hook is set."""
    walk = Walk(hook.families[0], hook, fused=True)
    for letter in order:
        walk.do(letter)
    walk.outputs()
    assert walk.report is not None
    parts = {"attention" if "Attention" in entry.split(":")[0] else "blocks" for entry in walk.report.stepped_aside}
    return f"{' and '.join(sorted(parts))} stock" if parts else "fused"


def test_the_table_in_the_docs_is_true() -> None:
    text = (Path(__file__).parents[3] / "docs" / "patching.md").read_text()
    rows = [f"| {name} | {what_is_fused(hook, 'ps')} | {what_is_fused(hook, 'sp')} |" for name, hook in HOOKS.items()]
    assert not [row for row in rows if row not in text.splitlines()]
