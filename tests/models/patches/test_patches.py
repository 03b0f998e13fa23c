"""`patched` on every family but FLUX.1: it does what the stock model does, and calls the operators.

FLUX.1 is tested in `test_patched_flux.py`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.errors import UserError
from fastdistill.models.patch import patched
from fastdistill.models.patches import PATCHES, fused_forms
from fastdistill.models.patches.adaln import AROUND_BLOCKS
from tests.models.patches.controlnets import CONTROLNETS
from tests.tiny import tiny_flux_pipeline
from tests.tiny_families import (
    flux2_inputs,
    qwen_image_inputs,
    run,
    sd3_inputs,
    seeded,
    tiny_flux2,
    tiny_qwen_image,
    tiny_sd3,
    tiny_z_image,
    z_image_inputs,
)


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A family with few blocks of each kind."""

    make: Callable[..., Any]
    smallest: Callable[[], Any]
    """For torch.compile, whose time is in the number of blocks."""
    inputs: Callable[..., dict[str, Any]]
    modules: dict[str, int]
    """Patched modules by class."""
    operators: dict[str, int]
    """Calls of each operator in a forward pass."""
    without_gradient: dict[str, int] = field(default_factory=dict)
    """Calls among these that receive no gradient."""


FAMILIES = {
    "flux2": Tiny(
        make=tiny_flux2,
        smallest=lambda: tiny_flux2(1, 1),
        inputs=flux2_inputs,
        modules={
            "Flux2TransformerBlock": 2,
            "Flux2Attention": 2,
            "Flux2SingleTransformerBlock": 3,
            "Flux2ParallelSelfAttention": 3,
            "Flux2SwiGLU": 7,
            "AdaLayerNormContinuous": 1,
        },
        operators={
            "modulate": 8,
            "joint_qk_norm_rope": 2,
            "qk_norm_rope": 3,
            "gated_residual_modulate": 4,
            "gated_residual": 7,
            "activation_concat": 7,
        },
    ),
    "sd3": Tiny(
        make=tiny_sd3,
        smallest=lambda: tiny_sd3(2),
        inputs=sd3_inputs,
        modules={
            "JointTransformerBlock": 3,
            "Attention": 4,
            "AdaLayerNormZero": 4,
            "SD35AdaLayerNormZeroX": 1,
            "AdaLayerNormContinuous": 2,
            "GELU": 5,
        },
        operators={
            "modulate": 8,
            "joint_qk_norm_rope": 3,
            "qk_norm_rope": 1,
            "gated_residual_modulate": 5,
            "gated_residual": 6,
            "activation_concat": 5,
        },
    ),
    "qwen_image": Tiny(
        make=tiny_qwen_image,
        smallest=lambda: tiny_qwen_image(1),
        inputs=qwen_image_inputs,
        modules={"QwenImageTransformerBlock": 3, "Attention": 3, "AdaLayerNormContinuous": 1, "GELU": 6},
        operators={
            "modulate": 7,
            "joint_qk_norm_rope": 3,
            "gated_residual_modulate": 6,
            "gated_residual": 6,
            "activation_concat": 6,
        },
        # The text after the last attention.
        without_gradient={"gated_residual_modulate": 1, "gated_residual": 1, "activation_concat": 1},
    ),
    "z_image": Tiny(
        make=tiny_z_image,
        smallest=lambda: tiny_z_image(1),
        inputs=z_image_inputs,
        modules={"ZImageTransformerBlock": 4, "Attention": 4},
        operators={"qk_norm_rope": 4, "gated_residual": 6},
    ),
}


every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
both_backends = pytest.mark.parametrize("backend", ["eager", "native"])


def gradients(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad()
    out = run(model, inputs)
    out.float().square().mean().backward()
    return out.detach(), {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_close(actual: Any, expected: Any, rtol: float, name: str) -> None:
    """Compare relative to the largest element; a gradient that is None stays None."""
    assert (actual is None) == (expected is None), name
    if expected is not None:
        atol = rtol * float(expected.detach().abs().max()) + 1e-9
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_same_run(actual: Any, expected: Any) -> None:
    assert_close(actual[0], expected[0], 1e-5, "output")
    for name, gradient in expected[1].items():
        assert_close(actual[1][name], gradient, 2e-5, name)


def identical(first: Any, second: Any) -> bool:
    same = [first[0].equal(second[0])]
    same += [
        second[1][name] is None if gradient is None else gradient.equal(second[1][name])
        for name, gradient in first[1].items()
    ]
    return all(same)


def test_a_patch_takes_the_arguments_of_its_class() -> None:
    """By position and by name: `why_not` and `forward` repeat diffusers' signature after the slash."""
    checked = set()
    for make in (
        lambda: tiny_flux_pipeline().transformer,
        *(make for make, _ in CONTROLNETS.values()),
        *(f.make for f in FAMILIES.values()),
    ):
        for module, patch in fused_forms(make()):
            assert patch is not None
            (_, *expected) = positional(type(module).forward)
            (_, _, *forward) = positional(patch.forward)
            assert forward == expected, patch
            (_, *why_not) = positional(patch.why_not)
            takes_any = "_" in inspect.signature(patch.why_not).parameters
            assert takes_any or why_not == expected, patch
            checked.add(patch)
    assert checked == {patch for block in PATCHES for patch in PATCHES[block].values()} | {*AROUND_BLOCKS.values()}


def positional(function: Callable[..., Any]) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]


class OperatorCalls(TorchDispatchMode):
    """Counts calls of compiled operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "fastdistill":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@every_family
@both_backends
def test_patched_equals_stock_and_undoes_to_the_bit(family: Tiny, backend: str) -> None:
    model, inputs = seeded(family.make), family.inputs()
    keys = list(model.state_dict())
    stock = gradients(model, inputs)
    with patched(model, backend=backend) as report:
        fast = gradients(model, inputs)
        assert list(model.state_dict()) == keys
        assert report.counts == family.modules
        assert not report.stepped_aside
    assert_same_run(fast, stock)
    assert identical(gradients(model, inputs), stock)
    assert not any("forward" in module.__dict__ for module in model.modules())


@every_family
def test_every_operator_runs_forward_and_backward(family: Tiny) -> None:
    model, inputs = seeded(family.make), family.inputs()
    with patched(model, backend="native"), OperatorCalls() as calls:
        gradients(model, inputs)
    backward = Counter(family.operators) - Counter(family.without_gradient)
    assert calls.counts == family.operators | {f"{name}_backward": count for name, count in backward.items()}


@every_family
def test_one_sample(family: Tiny) -> None:
    model, inputs = seeded(family.make), family.inputs(batch=1)
    stock = gradients(model, inputs)
    with patched(model) as report:
        assert_same_run(gradients(model, inputs), stock)
        with torch.inference_mode():
            assert_close(run(model, inputs), stock[0], 1e-5, "in inference mode")
    assert not report.stepped_aside


@pytest.mark.slow
@every_family
def test_compiles_whole(family: Tiny) -> None:
    model, inputs = seeded(family.smallest), family.inputs()
    stock = gradients(model, inputs)
    torch._dynamo.reset()
    with patched(model, backend="native"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        out = run(compiled, inputs)
        out.float().square().mean().backward()
    assert_same_run((out.detach(), {name: p.grad for name, p in model.named_parameters()}), stock)


@every_family
def test_gradient_checkpointing(family: Tiny) -> None:
    model, inputs = seeded(family.make), family.inputs()
    stock = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    model.train()
    with patched(model, backend="native") as report, OperatorCalls() as calls:
        assert_same_run(gradients(model, inputs), stock)
    assert not report.stepped_aside
    # Once more on the way back.
    assert family.operators["gated_residual"] < calls.counts["gated_residual"]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def errors_of(actual: Any, expected: Any) -> tuple[float, float]:
    """Relative error of the output, and of the gradients that do not vanish, on average."""
    of_gradients = [
        relative_error(actual[1][name], gradient)
        for name, gradient in expected[1].items()
        if gradient is not None and gradient.norm() > 1e-6
    ]
    return relative_error(actual[0], expected[0]), mean(of_gradients)


def in_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, dict):
        # Position ids stay exact.
        return {name: t if name.endswith("_ids") else in_dtype(t, dtype) for name, t in inputs.items()}
    if isinstance(inputs, list):
        return [in_dtype(item, dtype) for item in inputs]
    return inputs.to(dtype) if isinstance(inputs, torch.Tensor) else inputs


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@both_backends
def test_sixteen_bits_are_no_less_exact_than_stock(family: Tiny, dtype: torch.dtype, backend: str) -> None:
    narrow = seeded(family.make).to(dtype)
    exact = copy.deepcopy(narrow).double()
    errors: dict[str, list[tuple[float, float]]] = {"stock": [], "patched": []}
    for _ in range(3):
        inputs = in_dtype(family.inputs(), dtype)
        expected = gradients(exact, in_dtype(inputs, torch.float64))
        errors["stock"].append(errors_of(gradients(narrow, inputs), expected))
        with patched(narrow, backend=backend) as report:
            errors["patched"].append(errors_of(gradients(narrow, inputs), expected))
        assert not report.stepped_aside
    outputs, parameters = (
        {who: mean(e[which] for e in of_runs) for who, of_runs in errors.items()} for which in (0, 1)
    )
    assert outputs["patched"] <= 1.5 * outputs["stock"]
    assert parameters["patched"] <= 1.5 * parameters["stock"]


def masked_flux2() -> tuple[Any, dict[str, Any]]:
    mask = torch.ones(2, 1, 1, 14, dtype=torch.bool)
    mask[0, ..., 3:5] = False
    return seeded(tiny_flux2), flux2_inputs() | {"joint_attention_kwargs": {"attention_mask": mask}}


def masked_qwen_image() -> tuple[Any, dict[str, Any]]:
    return seeded(tiny_qwen_image), qwen_image_inputs() | {
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]])
    }


def masked_z_image() -> tuple[Any, dict[str, Any]]:
    """Captions that are padded to 32 and to 64 tokens."""
    return seeded(tiny_z_image), z_image_inputs() | {"cap_feats": [torch.randn(5, 12), torch.randn(40, 12)]}


@pytest.mark.parametrize("case", [masked_flux2, masked_qwen_image, masked_z_image])
def test_masks_are_passed_on(case: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    model, inputs = case()
    stock = gradients(model, inputs)
    with patched(model, backend="native") as report:
        assert_same_run(gradients(model, inputs), stock)
    assert not report.stepped_aside


class OwnProcessor(JointAttnProcessor2_0):
    pass


def other_processor() -> tuple[Any, dict[str, Any]]:
    model = seeded(tiny_sd3)
    model.transformer_blocks[1].attn.set_processor(OwnProcessor())
    return model, sd3_inputs()


def fused_sd3() -> tuple[Any, dict[str, Any]]:
    # diffusers' processor for fused projections has no dual attention.
    model = seeded(tiny_sd3, dual_attention_layers=())
    model.fuse_qkv_projections()
    return model, sd3_inputs()


def chunked_sd3() -> tuple[Any, dict[str, Any]]:
    model = seeded(tiny_sd3)
    model.enable_forward_chunking(1, dim=1)
    return model, sd3_inputs()


def omni_z_image() -> tuple[Any, dict[str, Any]]:
    """A clean image and the noisy one that is made with it."""
    inputs = {
        "x": [[torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 12)]],
        "t": torch.rand(1),
        "cap_feats": [[torch.randn(5, 12), torch.randn(7, 12)]],
        "siglip_feats": [None],
        "image_noise_mask": [[0, 1]],
    }
    return seeded(tiny_z_image), inputs


def hooked_activation() -> tuple[Any, dict[str, Any]]:
    model = seeded(tiny_flux2)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        activation = block.ff.act_fn if hasattr(block, "ff") else block.attn.mlp_act_fn
        activation.gate_fn.register_forward_hook(lambda module, arguments, output: 2 * output)
    return model, flux2_inputs()


STEPPING_ASIDE: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], set[str]]] = {
    "sd3-without-norms": (
        lambda: (seeded(tiny_sd3, qk_norm=None), sd3_inputs()),
        {"Attention: a query-key norm is no plain RMS norm, is hooked or is offloaded"},
    ),
    "sd3-other-processor": (other_processor, {f"Attention: its processor is {__name__}.OwnProcessor"}),
    "sd3-fused-projections": (fused_sd3, {"Attention: its processor is FusedJointAttnProcessor2_0"}),
    "sd3-chunked": (chunked_sd3, {"JointTransformerBlock: its feed-forward is chunked"}),
    "sd3-keywords": (
        lambda: (seeded(tiny_sd3), sd3_inputs() | {"joint_attention_kwargs": {"ip_hidden_states": None}}),
        {"Attention: it was called with ip_hidden_states"},
    ),
    "qwen-image-two-times": (
        lambda: (
            seeded(tiny_qwen_image, zero_cond_t=True),
            qwen_image_inputs() | {"img_shapes": [[(1, 2, 4), (1, 2, 2)]] * 2},
        ),
        {"QwenImageTransformerBlock: its image tokens have modulations of two times"},
    ),
    "z-image-omni": (omni_z_image, {"ZImageTransformerBlock: clean and noisy tokens have modulations of their own"}),
    "flux2-activation": (
        hooked_activation,
        {
            "Flux2SwiGLU: its gate is another or is hooked",
            "Flux2ParallelSelfAttention: its gate is another or is hooked",
        },
    ),
}


@pytest.mark.parametrize(("case", "reasons"), STEPPING_ASIDE.values(), ids=STEPPING_ASIDE)
def test_what_cannot_be_fused_runs_as_it_always_did(
    case: Callable[[], tuple[Any, dict[str, Any]]], reasons: set[str]
) -> None:
    model, inputs = case()
    stock = gradients(model, inputs)
    with patched(model, backend="eager") as report:
        fast = gradients(model, inputs)
    assert_same_run(fast, stock)
    assert report.stepped_aside.keys() == reasons
    with patched(model, backend="native"):
        assert_same_run(gradients(model, inputs), stock)


@every_family
def test_hooks_on_norms_are_called(family: Tiny) -> None:
    model, inputs = seeded(family.make), family.inputs()
    calls: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in ("LayerNorm", "RMSNorm"):
            module.register_forward_hook(lambda module, arguments, output, name=name: calls.append(name))
    stock = run(model, inputs)
    expected = sorted(calls)
    calls.clear()
    with patched(model, backend="eager") as report:
        torch.testing.assert_close(run(model, inputs), stock, rtol=1e-5, atol=1e-5)
    assert sorted(calls) == expected
    assert report.stepped_aside


@pytest.mark.parametrize("batch", [1, 2])
def test_flux2_keys_of_reference_tokens_are_kept(batch: int) -> None:
    """The first call keeps keys and values of two reference tokens, the second call reads them.

    Reference tokens have modulations of their own. With one timestep for two samples, both samples
    share these modulations.
    """
    model, inputs = seeded(tiny_flux2), flux2_inputs()
    inputs |= {"timestep": inputs["timestep"][:batch], "guidance": inputs["guidance"][:batch]}
    model.set_attn_processor(
        {
            name: Flux2KVParallelSelfAttnProcessor() if name.startswith("single") else Flux2KVAttnProcessor()
            for name in model.attn_processors
        }
    )
    later = inputs | {"hidden_states": inputs["hidden_states"][:, 2:], "img_ids": inputs["img_ids"][2:]}

    def both_steps() -> tuple[torch.Tensor, torch.Tensor]:
        first, cache = model(**inputs, kv_cache_mode="extract", num_ref_tokens=2, return_dict=False)
        return first, run(model, later, kv_cache=cache, kv_cache_mode="cached")

    stock = both_steps()
    for backend in ("eager", "native"):
        with patched(model, backend=backend) as report:
            fast = both_steps()
        for actual, expected in zip(fast, stock, strict=True):
            assert_close(actual, expected, 1e-5 if backend == "native" else 0, backend)
        assert set(report.stepped_aside) == {
            "Flux2Attention: its processor is Flux2KVAttnProcessor",
            "Flux2ParallelSelfAttention: its processor is Flux2KVParallelSelfAttnProcessor",
        }


def test_flux2_fused_projections() -> None:
    model, inputs = seeded(tiny_flux2), flux2_inputs()
    model.fuse_qkv_projections()
    stock = gradients(model, inputs)
    with patched(model, backend="native") as report:
        assert_same_run(gradients(model, inputs), stock)
    assert not report.stepped_aside


def test_sd3_projections_that_were_fused_for_a_while() -> None:
    """diffusers marks the attention as fused even after its processor has stopped to use that."""
    model, inputs = seeded(tiny_sd3, dual_attention_layers=()), sd3_inputs()
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight.mul_(2)
    stock = gradients(model, inputs)
    with patched(model, backend="native") as report:
        assert_same_run(gradients(model, inputs), stock)
    assert not report.stepped_aside


@pytest.mark.parametrize("text", [True, False], ids=["two-streams", "one-stream"])
@pytest.mark.parametrize("halves", [True, False], ids=["in-halves", "whole"])
@pytest.mark.parametrize("mod_axes", [2, 3])
def test_flux2_single_block_by_itself(text: bool, halves: bool, mod_axes: int) -> None:
    model = seeded(tiny_flux2)
    block = model.single_transformer_blocks[0]
    image, encoded, modulation = torch.randn(2, 9, 32), torch.randn(2, 5, 32), torch.randn(2, 96)
    if mod_axes == 3:
        modulation = modulation[:, None]
    arguments = (image, encoded if text else None, modulation, None, None, halves, None if text else 4)
    stock = block(*arguments)
    with patched(model, backend="native"):
        fast = block(*arguments)
    for actual, expected in zip(fast, stock, strict=True) if halves else ((fast, stock),):
        assert_close(actual, expected, 1e-5, "block")


@pytest.mark.parametrize("name", ["flux2", "sd3", "qwen_image"])
@both_backends
def test_one_image_with_several_texts(name: str, backend: str) -> None:
    """Plain PyTorch broadcasts a stream of one sample over the modulations of two."""
    model, inputs = seeded(FAMILIES[name].make), FAMILIES[name].inputs()
    inputs |= {"hidden_states": inputs["hidden_states"][:1]}
    stock = gradients(model, inputs)
    assert len(stock[0]) == 2
    with patched(model, backend=backend) as report:
        assert_same_run(gradients(model, inputs), stock)
    assert not report.stepped_aside


@pytest.mark.parametrize("name", ["flux2", "sd3", "qwen_image"])
def test_one_time_for_several_images(name: str) -> None:
    model, inputs = seeded(FAMILIES[name].make), FAMILIES[name].inputs()
    inputs |= {key: inputs[key][:1] for key in ("timestep", "guidance", "pooled_projections") if key in inputs}
    stock = gradients(model, inputs)
    with patched(model, backend="native") as report:
        assert_same_run(gradients(model, inputs), stock)
    assert not report.stepped_aside


@every_family
def test_autocast(family: Tiny) -> None:
    model, inputs = seeded(family.make), family.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock, stock_gradients = gradients(model, inputs)
        with patched(model) as report:
            fast, fast_gradients = gradients(model, inputs)
    assert not report.stepped_aside
    assert fast.dtype == stock.dtype
    assert relative_error(fast, stock.double()) < 0.02
    for name, gradient in stock_gradients.items():
        if gradient is not None and gradient.norm() > 1e-6:
            assert relative_error(fast_gradients[name], gradient.double()) < 0.1, name


@both_backends
@torch.no_grad()
def test_float16_is_clipped_where_stock_clips(backend: str) -> None:
    """FLUX.2 clips the text of its double blocks and all of its single blocks, Qwen-Image both
    streams.

    SD3 clips none: there, sums overflow.
    """
    flux2, qwen_image, sd3 = (seeded(make).half() for make in (tiny_flux2, tiny_qwen_image, tiny_sd3))
    flux2_block, single = flux2.transformer_blocks[0], flux2.single_transformer_blocks[0]
    qwen_image_block, sd3_block = qwen_image.transformer_blocks[0], sd3.transformer_blocks[1]
    image, text = (65000 * torch.randn(1, tokens, 32).sign().half() for tokens in (9, 5))
    # Only what comes last in a block is large.
    modulation = torch.cat((torch.zeros(5 * 32), torch.full((32,), 10000.0))).half()
    for layer in (
        qwen_image_block.img_mod[1],
        qwen_image_block.txt_mod[1],
        sd3_block.norm1.linear,
        sd3_block.norm1_context.linear,
    ):
        layer.bias.copy_(modulation)
    temb, modulation = torch.zeros(1, 32).half(), modulation[None, None]

    def run_all() -> dict[str, Any]:
        return {
            "flux2 double": flux2_block(image, text, modulation, modulation),
            "flux2 single": (single(image, None, modulation[..., -96:]),),
            "qwen image": qwen_image_block(image, text, None, temb),
            "sd3": sd3_block(image, text, temb),
        }

    largest = {
        "flux2 double": [65504, math.inf],
        "flux2 single": [65504],
        "qwen image": [65504, 65504],
        "sd3": [math.inf, math.inf],
    }
    stock = run_all()
    with patched(flux2, backend=backend), patched(qwen_image, backend=backend), patched(sd3, backend=backend):
        fast = run_all()
    for name, streams in stock.items():
        assert [float(t.abs().max()) for t in streams] == largest[name], name
        torch.testing.assert_close(fast[name], streams, rtol=0, atol=100)


def test_other_models_are_refused_with_the_list_of_those_covered() -> None:
    model = AuraFlowTransformer2DModel(
        num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2
    )
    with pytest.raises(UserError, match=f"AuraFlowTransformer2DModel has no block .* {', '.join(PATCHES)}"):
        patched(model)
