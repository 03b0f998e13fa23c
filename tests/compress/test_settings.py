"""A cut keeps what no state dict holds, and says what it cannot keep."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from fastdistill.compress import cut
from fastdistill.errors import UserError
from fastdistill.models.families import anatomy_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.hooks import skipped
from fastdistill.models.patch import is_patched, patched
from tests import tiny_families as tiny

DROP = {"double": [0], "single": [1]}
GONE = [BlockId(stack="transformer_blocks", index=0), BlockId(stack="single_transformer_blocks", index=1)]


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    return tiny.seeded(tiny.tiny_flux).eval()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inputs = tiny.flux_inputs()
    return tiny.run(model, inputs)


def run_without(model: Any) -> torch.Tensor:
    with skipped(model, anatomy_of(model), GONE):
        return run(model)


@pytest.mark.parametrize(
    "words",
    [
        "double:0 single:1",
        "transformer_blocks:0  single:1-1",
        ["double:0", "single:1"],
        ["double:0 single:1"],
        ("double:0", GONE[1]),
        GONE,
        iter(GONE),
        {"double": (0,), "single_transformer_blocks": range(1, 2)},
    ],
)
def test_blocks_are_named_as_the_command_names_them(transformer: FluxTransformer2DModel, words: Any) -> None:
    assert torch.equal(run(cut(transformer, words)), run_without(transformer))


def test_one_block_needs_no_list(transformer: FluxTransformer2DModel) -> None:
    assert cut(transformer, GONE[1]).config.num_single_layers == 2
    assert cut(transformer, "single:0-1").config.num_single_layers == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("double", "cannot read 'double'; give blocks such as double:1,2 single:0,5-7; this model has double, single"),
        ("tripel:1", "cannot read 'tripel:1'"),
        ("double:1-0", "the range 1-0 of 'double:1-0' is empty"),
        ("double:0 double:0", "dropped twice"),
        ("double:7", "no block double:7; this model has double: 0-1"),
        ("2", r"'2' is a number of blocks.*select\(transformer, scores, drop_blocks=2\)"),
        (2, r"2 is a number of blocks.*select\(transformer, scores, drop_blocks=2\)"),
        ([0, 1], "give the blocks to drop as"),
        (None, "give the blocks to drop as"),
        (1.5, "give the blocks to drop as"),
        ({"double": 0}, 'give the blocks to drop as {"double"'),
    ],
)
def test_blocks_that_cannot_be_read(transformer: FluxTransformer2DModel, words: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut(transformer, words)


def test_gradient_checkpointing_stays_on(transformer: FluxTransformer2DModel) -> None:
    calls = []

    def checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(function)
        return function(*arguments)

    transformer.enable_gradient_checkpointing(checkpoint)
    smaller = cut(transformer, DROP)
    assert smaller.is_gradient_checkpointing
    smaller.train()
    tiny.run(smaller, tiny.flux_inputs())
    assert len(calls) == 3, "each block that is left"
    assert not cut(tiny.seeded(tiny.tiny_flux), DROP).is_gradient_checkpointing


def test_every_parameter_trains_as_before(transformer: FluxTransformer2DModel) -> None:
    transformer.requires_grad_(False)
    trained = transformer.single_transformer_blocks[2].proj_out.weight.requires_grad_(True)
    transformer.x_embedder.bias.requires_grad_(True)
    smaller = cut(transformer, DROP)
    names = {name for name, parameter in smaller.named_parameters() if parameter.requires_grad}
    assert names == {"single_transformer_blocks.1.proj_out.weight", "x_embedder.bias"}
    assert torch.equal(smaller.single_transformer_blocks[1].proj_out.weight, trained)


def test_every_module_is_in_training_as_before(transformer: FluxTransformer2DModel) -> None:
    transformer.eval()
    transformer.transformer_blocks[1].ff.train()
    smaller = cut(transformer, DROP)
    training = {name for name, module in smaller.named_modules() if module.training}
    assert "transformer_blocks.0.ff" in training
    assert all(name.startswith("transformer_blocks.0.ff") for name in training)


def test_dtypes_stay_parameter_by_parameter(transformer: FluxTransformer2DModel) -> None:
    transformer.bfloat16()
    transformer.transformer_blocks[1].norm1.float()
    smaller = cut(transformer, DROP)
    wide = {name for name, parameter in smaller.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {"transformer_blocks.0.norm1.linear.weight", "transformer_blocks.0.norm1.linear.bias"}
    assert smaller.x_embedder.weight.dtype == torch.bfloat16


def test_attention_backends_and_processors_stay(transformer: FluxTransformer2DModel) -> None:
    class Mine(FluxAttnProcessor):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

    transformer.set_attention_backend("_native_math")
    transformer.single_transformer_blocks[2].attn.set_processor(Mine(0.5))
    smaller = cut(transformer, DROP)
    assert [block.attn.processor._attention_backend for block in smaller.transformer_blocks] == ["_native_math"]
    first, second = (block.attn.processor for block in smaller.single_transformer_blocks)
    assert first._attention_backend == "_native_math"
    assert (type(second), second.scale) == (Mine, 0.5)
    second.scale = 2.0
    assert transformer.single_transformer_blocks[2].attn.processor.scale == 0.5


def test_layerwise_casting_stays(transformer: FluxTransformer2DModel) -> None:
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = run_without(transformer)
    smaller = cut(transformer, DROP)
    weight = smaller.transformer_blocks[0].attn.to_q.weight
    assert weight.dtype == torch.float8_e4m3fn
    assert torch.equal(run(smaller), expected)
    assert smaller.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn


def test_a_patched_model_gives_a_stock_one(transformer: FluxTransformer2DModel) -> None:
    expected = run_without(transformer)
    with patched(transformer):
        smaller = cut(transformer, DROP)
    assert not is_patched(smaller)
    assert torch.equal(run(smaller), expected)


def test_a_model_offloaded_in_groups_gives_one_without(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    expected = run_without(transformer)
    devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    on_disk = tiny.seeded(tiny.tiny_flux)
    transformer.enable_group_offload(**devices, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(run(cut(transformer, DROP)), expected)
    on_disk.enable_group_offload(
        **devices, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    with pytest.raises(UserError, match="are on disk; cut the model before it is offloaded"):
        cut(on_disk, DROP)


def test_a_model_that_accelerate_offloads_is_refused(transformer: FluxTransformer2DModel) -> None:
    accelerate.cpu_offload(transformer, torch.device("cpu"))
    with pytest.raises(UserError, match="is not in memory; cut the model before it is offloaded"):
        cut(transformer, DROP)


class Wrapper(nn.Module):
    """As DistributedDataParallel wraps a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(("wrap", "place"), [(torch.compile, "_orig_mod"), (Wrapper, "module")])
def test_a_wrapped_model_is_told_apart(
    transformer: FluxTransformer2DModel, wrap: Callable[[nn.Module], nn.Module], place: str
) -> None:
    with pytest.raises(UserError, match=f"give the FluxTransformer2DModel inside it, its attribute {place}"):
        cut(wrap(transformer), DROP)


def test_a_compiled_model_gives_one_that_is_not(transformer: FluxTransformer2DModel) -> None:
    transformer.compile_repeated_blocks()
    smaller = cut(transformer, DROP)
    assert all(module._compiled_call_impl is None for module in smaller.modules())


def test_a_subclass_is_cut_as_its_parent() -> None:
    class Mine(FluxTransformer2DModel):
        pass

    parent = tiny.seeded(tiny.tiny_flux)
    mine = Mine.from_config({name: value for name, value in parent.config.items() if name != "_use_default_values"})
    mine.load_state_dict(parent.state_dict())
    smaller = cut(mine.eval(), DROP)
    assert type(smaller) is Mine
    assert torch.equal(run(smaller), run_without(parent))


def torchao_int8() -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto_int8() -> Any:
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


@pytest.mark.parametrize(("package", "make"), [("torchao", torchao_int8), ("optimum.quanto", quanto_int8)])
def test_a_quantised_model_is_cut_and_stays_so(package: str, make: Callable[[], Any], tmp_path: Path) -> None:
    pytest.importorskip(package)
    tiny.seeded(tiny.tiny_flux).save_pretrained(tmp_path / "whole")
    transformer = FluxTransformer2DModel.from_pretrained(
        tmp_path / "whole", quantization_config=make(), dtype=torch.float32
    )
    smaller = cut(transformer, DROP)
    weight = smaller.transformer_blocks[0].attn.to_q.weight
    assert type(weight) is type(transformer.transformer_blocks[1].attn.to_q.weight)
    assert type(weight.data) is not torch.Tensor
    expected = run_without(transformer)
    torch.testing.assert_close(run(smaller), expected, rtol=1e-5, atol=1e-5)
    smaller.save_pretrained(tmp_path / "smaller", safe_serialization=True)
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "smaller", dtype=torch.float32)
    torch.testing.assert_close(run(again), expected, rtol=1e-5, atol=1e-5)


def nf4(linear: nn.Linear) -> nn.Linear:
    import bitsandbytes

    size = linear.in_features, linear.out_features
    layer = bitsandbytes.nn.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def gguf_q8(linear: nn.Linear) -> nn.Linear:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    layer = GGUFLinear(linear.in_features, linear.out_features, bias=True, compute_dtype=torch.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(linear.weight.detach().numpy(), kind)
    layer.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
    layer.bias = linear.bias
    return layer


def with_layers(model: Any, quantise: Callable[[nn.Linear], nn.Linear]) -> Any:
    """The model with quantised layers in its blocks, as diffusers builds them."""
    for name, module in list(model.named_modules()):
        # A group of GGUF's has 32 numbers.
        if type(module) is nn.Linear and "blocks." in name and module.in_features % 32 == 0:
            model.set_submodule(name, quantise(module))
    return model


@pytest.mark.parametrize("quantise", [nf4, gguf_q8])
def test_layers_of_a_class_of_their_own_are_copied(
    transformer: FluxTransformer2DModel, quantise: Callable[[nn.Linear], nn.Linear]
) -> None:
    with_layers(transformer, quantise)
    expected = run_without(transformer)
    smaller = cut(transformer, DROP)
    layer, own = smaller.transformer_blocks[0].attn.to_q, transformer.transformer_blocks[1].attn.to_q
    assert (type(layer), type(layer.weight)) == (type(own), type(own.weight))
    assert layer.weight.data_ptr() != own.weight.data_ptr()
    assert torch.equal(run(smaller), expected)


def test_a_cut_that_changes_quantised_weights_is_refused() -> None:
    transformer = with_layers(tiny.seeded(tiny.tiny_sd3), nf4)
    assert cut(transformer, {"block": [0]}).config.num_layers == 2
    with pytest.raises(UserError, match="changes weights of the SD3Transformer2DModel that are quantised; cut the"):
        cut(transformer, {"block": [2]})


def test_adapters_are_refused_with_the_way_out(transformer: FluxTransformer2DModel) -> None:
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(UserError, match="unload adapters and unfuse projections before cutting"):
        cut(transformer, DROP)


@pytest.mark.skipif(sys.platform != "linux", reason="gloo")
def test_sharded_weights_are_refused(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(transformer, mesh=mesh)
        with pytest.raises(UserError, match="is sharded over processes; cut the model before `fully_shard`"):
            cut(transformer, DROP)
    finally:
        torch.distributed.destroy_process_group()
