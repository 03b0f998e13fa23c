"""Models that `patched` takes: ControlNets, wrapped and derived ones, pipelines, and weights of
every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastdistill.errors import UserError
from fastdistill.models.patch import is_patched, patched, unpatch
from tests.models.patches.controlnets import CONTROLNETS, residuals, several_flux, z_image_controlnet
from tests.models.patches.test_patches import OperatorCalls
from tests.tiny import tiny_flux_pipeline
from tests.tiny_families import (
    flux_inputs,
    run,
    seeded,
    tiny_flux,
    tiny_z_image,
)


def assert_same(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * float(expected.abs().max()))


@pytest.mark.parametrize("name", CONTROLNETS)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_controlnets_made_of_the_same_blocks(name: str, backend: Any) -> None:
    make, make_inputs = CONTROLNETS[name]
    model, inputs = seeded(make), make_inputs()

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        # By itself, diffusers' ControlNet of Z-Image runs without gradients only.
        with torch.set_grad_enabled(name != "z_image"):
            out = residuals(model, inputs)
        if out.requires_grad:
            out.square().mean().backward()
        return out.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    stock, stock_gradients = gradients()
    with patched(model, backend=backend) as report, OperatorCalls() as calls:
        fast, fast_gradients = gradients()
        assert report.counts.total() > 4
    assert (calls.counts["gated_residual"] > 0) == (backend == "native")
    assert_same(fast, stock)
    assert fast_gradients.keys() == stock_gradients.keys()
    floor = 1e-3 * max((float(g.abs().max()) for g in stock_gradients.values()), default=0)
    for key, gradient in stock_gradients.items():
        atol = 1e-4 * max(float(gradient.abs().max()), floor)
        torch.testing.assert_close(fast_gradients[key], gradient, rtol=0, atol=atol, msg=key)


@torch.no_grad()
def test_several_controlnets_at_once() -> None:
    model, inputs = several_flux(), flux_inputs()
    condition = torch.randn_like(inputs["hidden_states"])
    inputs |= {"controlnet_cond": [condition, 2 * condition], "conditioning_scale": [1.0, 0.5]}
    inputs |= {"controlnet_mode": [torch.zeros(2), torch.zeros(2)], "return_dict": False}

    def vector() -> Tensor:
        doubles, singles = model(**inputs)
        return torch.cat([t.flatten() for t in (*doubles, *singles)])

    stock = vector()
    with patched(model) as report:
        assert_same(vector(), stock)
        assert report.counts["FluxTransformerBlock"] == 4


class Derived(FluxTransformer2DModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * t for t in super().forward(*args, **kwargs, return_dict=False))


class DerivedBlock(FluxTransformerBlock):
    pass


class OtherBlock(FluxSingleTransformerBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        text, image = super().forward(*args, **kwargs)
        return text, 1.5 * image


@torch.no_grad()
def test_derived_classes_keep_what_they_change() -> None:
    config = dict(tiny_flux().config)
    model, inputs = seeded(lambda: Derived.from_config(config)), flux_inputs() | {}
    model.transformer_blocks[1].__class__ = DerivedBlock
    model.single_transformer_blocks[0].__class__ = OtherBlock
    stock = model(**inputs)[0]
    with patched(model, backend="native") as report:
        fast = model(**inputs)[0]
        assert report.counts["DerivedBlock"] == 1
        assert report.counts["FluxSingleTransformerBlock"] == 2
        assert list(report.stepped_aside) == [
            "OtherBlock: its class is derived from one with a fused form, and changes it"
        ]
    assert_same(fast, stock)
    assert model(**inputs)[0].equal(stock)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["to_q", "proj_out"], init_lora_weights=False, r=2)
    )


def sharded(model: Any) -> nn.Module:
    """Its blocks and itself, whose classes become others."""
    for block in (*model.transformer_blocks, *model.single_transformer_blocks, model):
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    assert type(model).__name__ != "FluxTransformer2DModel"
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "PEFT": adapted,
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "FSDP": sharded,
    "two around": lambda model: DistributedDataParallel(adapted(model)),
    "a user's": lambda model: nn.ModuleDict({"student": model}),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper: str) -> None:
    model, inputs = seeded(tiny_flux), flux_inputs()
    wrapped = WRAPPERS[wrapper](model)
    call = wrapped["student"] if isinstance(wrapped, nn.ModuleDict) else wrapped
    stock = run(call, inputs)
    with patched(wrapped, backend="native") as report, OperatorCalls() as calls:
        fast = run(call, inputs)
        assert is_patched(model)
        assert sum(count for name, count in report.counts.items() if "SingleTransformerBlock" in name) == 3
    assert_same(fast, stock, 2e-5)
    if wrapper != "compiled":
        assert calls.counts["qk_norm_rope"] == 3
    assert run(call, inputs).equal(stock)


@torch.no_grad()
def test_a_pipeline_is_patched_in_all_its_networks() -> None:
    pipeline = tiny_flux_pipeline()
    with patched(pipeline) as report:
        assert is_patched(pipeline.transformer)
        assert is_patched(pipeline)
        assert report.counts["FluxTransformerBlock"] == 2
        assert "2 FluxTransformerBlock" in repr(report)
        assert "in place" in repr(report)
    assert "undone" in repr(report)
    assert not is_patched(pipeline)
    patched(pipeline.transformer)
    with pytest.raises(RuntimeError, match="patched already"):
        patched(pipeline)
    unpatch(pipeline)
    assert not is_patched(pipeline.transformer)
    with pytest.raises(UserError, match="expected a model or a pipeline of diffusers, got str"):
        patched("black-forest-labs/FLUX.1-dev")


def test_modules_that_two_networks_share_are_patched_once() -> None:
    """A ControlNet of Z-Image borrows its transformer's refiners."""

    class Pipeline:
        transformer = tiny_z_image(n_refiner_layers=2)
        controlnet = z_image_controlnet().from_transformer(z_image_controlnet(), transformer)
        components = {"transformer": transformer, "controlnet": controlnet, "scheduler": object()}

    with patched(Pipeline()) as report:
        assert report.counts["ZImageTransformerBlock"] == 6
        assert report.counts["ZImageControlTransformerBlock"] == 4
    assert not is_patched(Pipeline())


def with_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """`model` with other linear layers, as quantisers put them in."""
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, module in linears:
        parent, _, child = name.rpartition(".")
        if module.in_features % 32 == 0:
            model.get_submodule(parent)._modules[child] = make(module)
    return model


def four_bits(linear: nn.Linear) -> nn.Module:
    layer = Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


class Blocks8(nn.Module):
    """Weights as GGUF's Q8_0 keeps them, as bytes that are no parameter of a floating dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias.to(x.dtype))


def in_float8(model: Any) -> Any:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return model


def mixed(model: Any) -> Any:
    """Norms of the queries and keys in float32, and all else in bfloat16, whose order is odd."""
    model.to(torch.bfloat16)
    for name, module in model.named_modules():
        if "norm_" in name and isinstance(module, nn.RMSNorm | type(model.transformer_blocks[0].attn.norm_q)):
            module.float()
    return model


def offloaded(model: Any) -> Any:
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "NF4": lambda model: with_linears(model, four_bits),
    "int8": lambda model: with_linears(model, Blocks8),
    "float8, cast by layers": in_float8,
    "mixed": mixed,
    "cpu_offload": offloaded,
    "float64": lambda model: model.double(),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@torch.no_grad()
def test_weights_of_every_kind(kind: str) -> None:
    model, inputs = WEIGHTS[kind](seeded(tiny_flux)), flux_inputs()
    dtype = {"mixed": torch.bfloat16, "float64": torch.float64}.get(kind, torch.float32)
    inputs = {key: value if key.endswith("ids") else value.to(dtype) for key, value in inputs.items()}
    stock = run(model, inputs)
    with patched(model) as report, OperatorCalls() as calls:
        fast = run(model, inputs)
    assert calls.counts["gated_residual_modulate"] == 4
    assert report.runs_on == (torch.device("cpu"), dtype)
    assert set(report.operators.values()) == {"native"}
    assert str(dtype).removeprefix("torch.") in str(report)
    assert_same(fast, stock, 0.05 if kind == "mixed" else 1e-5)
    assert run(model, inputs).equal(stock)


@torch.no_grad()
def test_the_report_follows_the_model() -> None:
    model, inputs = seeded(tiny_flux), flux_inputs()
    with patched(model) as report:
        assert "to run on cpu in float32" in str(report)
        run(model, inputs)
        assert "ran on cpu in float32" in str(report)
        model.bfloat16()
        run(model, {k: v if k.endswith("ids") else v.bfloat16() for k, v in inputs.items()})
        assert "ran on cpu in bfloat16" in str(report)


def test_a_model_that_is_patched_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` builds it on the meta device, and keeps torch's default dtype as it was."""
    model, inputs = seeded(tiny_flux), flux_inputs()
    model.save_pretrained(tmp_path)
    reports = []
    construct = FluxTransformer2DModel.__init__

    @functools.wraps(construct)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        reports.append(patched(self, backend="native"))

    with monkeypatch.context() as patch:
        patch.setattr(FluxTransformer2DModel, "__init__", init)
        loaded = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        assert_same(run(loaded, inputs), run(model, inputs))
    assert reports[-1].operators["modulate"] == "native"
    assert not reports[-1].stepped_aside


def test_a_backend_that_cannot_run_is_named_in_the_report() -> None:
    with patched(seeded(tiny_flux), backend="triton") as report:
        assert "triton" in report.operators["modulate"]
        assert "triton" in str(report)


@torch.no_grad()
def test_tokens_that_are_only_transposed() -> None:
    """As an image becomes tokens: the channels of a token are far apart."""
    model = seeded(tiny_flux)
    image, text, temb = torch.randn(2, 32, 9).mT, torch.randn(2, 32, 5).mT, torch.randn(2, 32)
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        stock = block(image, text, temb)
        with patched(model, backend="native"):
            fast = block(image, text, temb)
        for actual, expected in zip(fast, stock, strict=True):
            assert_same(actual, expected)
