"""A patched FLUX.1 transformer does what the stock one does: outputs, gradients, and all around
them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import fastdistill
from fastdistill.errors import UserError
from fastdistill.models.families import family_of
from fastdistill.models.patch import patched
from tests.tiny import WIDTH, tiny_flux_pipeline, tiny_inputs

SEQUENCE = 16


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    transformer = tiny_flux_pipeline().transformer
    for name, parameter in transformer.named_parameters():
        if "norm_" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return transformer


def predict(transformer: FluxTransformer2DModel, **options: Any) -> Tensor:
    x, t, conditioning = tiny_inputs(transformer)
    if not options:
        return family_of(transformer).predict(transformer, x, t, conditioning)
    ids = torch.zeros(SEQUENCE, 3)
    ids[:, 1], ids[:, 2] = torch.arange(SEQUENCE) // 4, torch.arange(SEQUENCE) % 4
    return transformer(
        hidden_states=x.flatten(2).transpose(1, 2).reshape(2, SEQUENCE, 64),
        encoder_hidden_states=conditioning.prompt_embeds,
        pooled_projections=conditioning.pooled_prompt_embeds,
        timestep=t,
        img_ids=ids,
        txt_ids=torch.zeros(conditioning.prompt_embeds.shape[1], 3),
        return_dict=False,
        **options,
    )[0]


def gradients(
    transformer: FluxTransformer2DModel, run: Callable[..., Tensor] = predict, **options: Any
) -> dict[str, Tensor]:
    """Output, and gradient of every parameter."""
    transformer.zero_grad()
    out = run(transformer, **options)
    out.float().square().mean().backward()
    return {
        "output": out.detach(),
        **{name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None},
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    # Some gradients are zero but for rounding: attention does not see a bias of the keys.
    floor = 1e-3 * max(float(e.abs().max()) for e in expected.values())
    for name, e in expected.items():
        scale = max(float(e.abs().max()), floor)
        assert float((actual[name] - e).abs().max()) <= relative * scale, name


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_it_equals_stock_and_undoes_to_the_bit(transformer: FluxTransformer2DModel, backend: Any) -> None:
    keys = list(transformer.state_dict())
    stock = gradients(transformer)
    with patched(transformer, backend=backend) as report:
        assert report.counts["FluxTransformerBlock"] == 2
        assert report.counts["FluxSingleTransformerBlock"] == 3
        assert_same(gradients(transformer), stock)
        with torch.no_grad():
            assert_same({"output": predict(transformer)}, {"output": stock["output"]})
        with torch.inference_mode():
            assert_same({"output": predict(transformer)}, {"output": stock["output"]})
        assert list(transformer.state_dict()) == keys
        assert not report.stepped_aside
        assert set(report.operators.values()) == {backend}
    again = gradients(transformer)
    assert all(torch.equal(again[name], value) for name, value in stock.items())
    assert not any("forward" in module.__dict__ for module in transformer.modules())


def operator_calls(run: Callable[[], Any]) -> list[str]:
    """Operators that `run` calls; concatenations with the number of axes."""
    calls: list[str] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket._qualified_op_name.removeprefix("fastdistill::")
            calls.append(f"{name} {args[0][0].dim()}" if name == "aten::cat" else name)
            return func(*args, **(kwargs or {}))

    with Recorder():
        run()
    return calls


def test_every_operator_is_where_it_belongs(transformer: FluxTransformer2DModel) -> None:
    with patched(transformer, backend="native"):
        calls = operator_calls(lambda: gradients(transformer))
    doubles, singles = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    for name, count in {
        "joint_qk_norm_rope": doubles,
        "qk_norm_rope": singles,
        "gated_residual_modulate": 2 * doubles,
        "gated_residual": 2 * doubles + singles,
        "modulate": 2 * doubles + 1,
        "modulate_for_two": singles,
        "activation_concat": 2 * doubles + singles,
    }.items():
        assert calls.count(name) == count, name
        # The last double block's text, and what only it would change, has its gradient too.
        assert calls.count(f"{name}_backward") == count, f"{name}_backward"


def test_tokens_are_concatenated_once(transformer: FluxTransformer2DModel) -> None:
    """Text and image are concatenated before the first single block, and never after that."""

    def concatenations() -> int:
        with torch.no_grad():
            calls = operator_calls(lambda: predict(transformer))
        return calls.count("aten::cat 3") + calls.count("aten::cat 4")

    doubles, singles = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    assert concatenations() == 3 * doubles + 2 * singles
    with patched(transformer, backend="native"):
        assert concatenations() == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(transformer: FluxTransformer2DModel, reentrant: bool) -> None:
    stock = gradients(transformer)
    transformer.train()
    transformer.enable_gradient_checkpointing(
        lambda block, *arguments: checkpoint(block, *arguments, use_reentrant=reentrant)
    )
    expected = gradients(transformer)
    with patched(transformer):
        assert_same(gradients(transformer), expected)
    if not reentrant:
        assert_same(expected, stock)


def test_captured_halves_keep_their_gradients(transformer: FluxTransformer2DModel) -> None:
    """A feature loss depends on the halves that single blocks return, which the next block takes as
    one."""

    def with_features(transformer: FluxTransformer2DModel) -> Tensor:
        features: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda _module, _arguments, output: features.extend(output))
            for block in transformer.single_transformer_blocks
        ]
        out = predict(transformer)
        for handle in handles:
            handle.remove()
        return torch.cat([out.flatten(), *(feature.flatten() for feature in features)])

    stock = gradients(transformer, with_features)
    with patched(transformer):
        assert_same(gradients(transformer, with_features), stock)


def test_halves_that_are_not_neighbours_are_concatenated(transformer: FluxTransformer2DModel) -> None:
    block = transformer.single_transformer_blocks[0]
    temb = torch.randn(2, 32)
    both = torch.randn(2, 7, 32, requires_grad=True) * 1.0
    pairs = [
        (both[:, :3].detach().requires_grad_(), both[:, 3:]),
        (both[:, :4], both[:, 4:].clone()),
        (both[:, :3], both[:, 2:]),
        (both[:, 3:], both[:, :3]),
    ]
    for text, image in pairs:
        stock = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        with patched(transformer):
            fast = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        for actual, expected in zip(fast, stock, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_takes_it_whole(transformer: FluxTransformer2DModel) -> None:
    stock = gradients(transformer)
    x, t, conditioning = tiny_inputs(transformer)
    family = family_of(transformer)
    operators: set[str] = set()

    def inspect(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        operators.update(
            node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
        )
        return graph.forward

    torch._dynamo.reset()
    with patched(transformer):
        backend = aot_autograd(fw_compiler=inspect)
        compiled = torch.compile(
            lambda: family.predict(transformer, x, t, conditioning), fullgraph=True, backend=backend
        )
        assert_same(gradients(transformer, lambda _: compiled()), stock)
    torch._dynamo.reset()
    fused = {name.removeprefix("fastdistill::") for name in operators if name.startswith("fastdistill::")}
    kept = {"joint_qk_norm_rope", "qk_norm_rope", "gated_residual_modulate"}
    assert fused == {name + suffix for name in kept for suffix in ("", "_backward")}, (
        "the others are left to the compiler"
    )


@pytest.mark.slow
def test_blocks_compile_once_for_all_of_their_kind() -> None:
    """One graph for a kind of block, not one for each block.

    diffusers' `compile_repeated_blocks` promises this of the stock model.
    """
    transformer = tiny_flux_pipeline(num_layers=10, num_single_layers=10).transformer
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        stock = predict(transformer)
        torch._dynamo.reset()
        with patched(transformer):
            transformer.compile_repeated_blocks(fullgraph=True, backend=count)
            assert_same({"output": predict(transformer)}, {"output": stock})
    torch._dynamo.reset()
    assert len(graphs) <= 3


def test_fused_projections(transformer: FluxTransformer2DModel) -> None:
    transformer.fuse_qkv_projections()
    stock = gradients(transformer)
    with patched(transformer) as report:
        assert_same(gradients(transformer), stock)
        assert not report.stepped_aside


def test_lora(transformer: FluxTransformer2DModel) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "add_v_proj", "proj_out", "linear"]
    )
    transformer.add_adapter(config)
    stock = gradients(transformer)
    assert any("lora" in name for name in stock)
    with patched(transformer) as report:
        assert_same(gradients(transformer), stock, 2e-5)
        assert not report.stepped_aside


def test_an_attention_mask(transformer: FluxTransformer2DModel) -> None:
    mask = torch.ones(2, 1, 1, 5 + SEQUENCE, dtype=torch.bool)
    mask[1, ..., 2:5] = False
    options = {"joint_attention_kwargs": {"attention_mask": mask}}
    stock = gradients(transformer, **options)
    assert not torch.equal(stock["output"], gradients(transformer, joint_attention_kwargs={})["output"])
    with patched(transformer) as report:
        assert_same(gradients(transformer, **options), stock)
        assert not report.stepped_aside


def test_controlnet_residuals(transformer: FluxTransformer2DModel) -> None:
    options = {
        "controlnet_block_samples": [torch.randn(2, SEQUENCE, 32)],
        "controlnet_single_block_samples": [torch.randn(2, SEQUENCE, 32) for _ in range(2)],
    }
    stock = gradients(transformer, **options)
    with patched(transformer):
        assert_same(gradients(transformer, **options), stock)


def test_ip_adapter_steps_aside_and_says_so(
    transformer: FluxTransformer2DModel, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, WIDTH, num_tokens=(3,), scale=0.7))
    options = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 3, WIDTH)]}}
    stock = gradients(transformer, **options)
    with caplog.at_level("INFO", "fastdistill"), patched(transformer) as report:
        assert_same(gradients(transformer, **options), stock)
        assert report.stepped_aside == {"FluxAttention: its processor is FluxIPAdapterAttnProcessor": 2}
        assert "stepped aside 2 times" in str(report)
    assert "FluxIPAdapterAttnProcessor" in caplog.text


def test_hooks_inside_of_a_block_still_run(transformer: FluxTransformer2DModel) -> None:
    seen: list[str] = []
    watched = ("transformer_blocks.0.norm2", "transformer_blocks.1.attn.norm_q",
               "single_transformer_blocks.1.norm.norm",
               "single_transformer_blocks.2.act_mlp", "norm_out.norm")  # fmt: skip
    for name in watched:
        transformer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    stock = gradients(transformer)
    assert set(seen) == set(watched)
    seen.clear()
    with patched(transformer) as report:
        assert_same(gradients(transformer), stock)
    assert set(seen) == set(watched)
    # One each, and the adaptive norm of the single block that stepped aside.
    assert len(report.stepped_aside) == len(watched) + 1


def test_attention_of_the_users_choice(transformer: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = gradients(transformer)
    with patched(transformer, attention="_native_math"):
        assert_same(gradients(transformer), stock)
    # diffusers also sets it for the whole process, which the context undoes.
    with attention_backend("native"):
        transformer.set_attention_backend("_native_math")
        with patched(transformer):
            assert_same(gradients(transformer), stock)
    transformer.reset_attention_backend()
    with attention_backend("_native_math"), patched(transformer):
        assert "aten::_scaled_dot_product_flash_attention_for_cpu" not in operator_calls(lambda: gradients(transformer))
    with pytest.raises(UserError, match=r"attention: expected .*nonsense"):
        patched(transformer, attention="nonsense")
    with pytest.raises(UserError, match=r"unknown backend 'nonsense'"):
        patched(transformer, backend="nonsense")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_no_farther_from_float64_than_stock(
    transformer: FluxTransformer2DModel, dtype: torch.dtype
) -> None:
    def run(cast: torch.dtype) -> dict[str, Tensor]:
        transformer.to(cast)
        results = {name: value.double() for name, value in gradients(transformer).items()}
        transformer.to(torch.float32)
        return results

    transformer.to(dtype).to(torch.float32)
    exact, stock = run(torch.float64), run(dtype)
    with patched(transformer) as report:
        fast = run(dtype)
        assert not report.stepped_aside
    total = {"stock": 0.0, "fast": 0.0}
    for name, e in exact.items():
        scale = float(e.norm()) or 1.0
        total["stock"] += float((stock[name] - e).norm()) / scale
        total["fast"] += float((fast[name] - e).norm()) / scale
    assert float((fast["output"] - exact["output"]).norm()) <= 1.5 * float((stock["output"] - exact["output"]).norm())
    assert total["fast"] <= 1.1 * total["stock"]


def test_autocast(transformer: FluxTransformer2DModel) -> None:
    exact = gradients(transformer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = gradients(transformer)
        with patched(transformer) as report:
            fast = gradients(transformer)
            assert not report.stepped_aside
    assert fast["output"].dtype == stock["output"].dtype
    for name in ("output", "transformer_blocks.0.norm1.linear.weight"):
        scale = float(exact[name].norm())
        assert (
            float((fast[name] - exact[name]).norm()) / scale
            <= 1.5 * float((stock[name] - exact[name]).norm()) / scale + 1e-3
        )


def test_patching_twice_is_refused_and_leaves_the_first_patch(transformer: FluxTransformer2DModel) -> None:
    with patched(transformer):
        with pytest.raises(RuntimeError, match="undo the earlier patch"):
            patched(transformer)
        assert "forward" in transformer.norm_out.__dict__
    assert not any("forward" in module.__dict__ for module in transformer.modules())


def test_an_offloading_hook_keeps_its_forward(transformer: FluxTransformer2DModel) -> None:
    """An earlier hook stays; a later one keeps working when the patch is undone."""
    stock = gradients(transformer)
    calls: list[str] = []

    def wrap(module: torch.nn.Module, name: str) -> None:
        inner = module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            return inner(*arguments, **keywords)

        module.forward = forward

    wrap(transformer.transformer_blocks[0], "earlier")
    with patched(transformer) as report:
        wrap(transformer.single_transformer_blocks[0], "later")
        assert_same(gradients(transformer), stock)
        assert list(report.stepped_aside) == [
            "FluxTransformerBlock: a hook wraps it since before the patch; patch first to fuse it"
        ]
    again = gradients(transformer)
    assert all(torch.equal(again[name], value) for name, value in stock.items())
    assert calls.count("earlier") == calls.count("later") == 2


def test_the_public_name(transformer: FluxTransformer2DModel) -> None:
    assert fastdistill.patched is patched
    report = fastdistill.patched(transformer)
    report.undo()
    report.undo()
    with pytest.raises(UserError, match=r"Linear has no block .*covered are .*FluxTransformerBlock"):
        patched(torch.nn.Linear(2, 2))
