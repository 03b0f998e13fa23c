"""Folders that do not load say what is wrong, and parts are loaded whole or not at all."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

from fastdistill.errors import Notice, UserError
from fastdistill.models.checks import check_pipeline
from fastdistill.models.folder import Part, variant_of
from fastdistill.models.loading import embedded_folder, load
from fastdistill.models.patch import patched
from fastdistill.models.sampling import SamplingDefaults, sample
from fastdistill.models.tokenizers import check_vocabulary
from tests.tiny import tiny_flux_pipeline

CLASSES = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "pipeline"))


def configure(part: Path, **changes: Any) -> None:
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | changes))


def save_again(folder: Path, part: str, **options: Any) -> None:
    """Replace the weights of a part by those that its class saves with `options`."""
    model = CLASSES[part].from_pretrained(folder / part)
    for path in folder.joinpath(part).glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(folder / part, **options)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"num_single_layers": 5}, "weights of single_transformer_blocks.3, .*blocks.4 are missing"),
        ("transformer", {"num_layers": 1}, "describes no transformer_blocks.1, whose weights are there"),
        ("transformer", {"guidance_embeds": True}, "weights of time_text_embed.guidance_embedder.* are missing"),
        ("text_encoder", {"num_hidden_layers": 3}, "weights of .*layers.1, .*layers.2 are missing"),
        ("text_encoder_2", {"num_layers": 2}, "weights of encoder.block.1 are missing"),
        ("vae", {"use_quant_conv": True}, "weights of quant_conv.bias, quant_conv.weight are missing"),
        ("vae", {"layers_per_block": 2}, "weights of decoder.up_blocks.0, .* and 5 more are missing"),
    ],
)
def test_a_config_that_describes_other_weights(folder: Path, part: str, changes: dict[str, Any], message: str) -> None:
    configure(folder / part, **changes)
    with pytest.raises(UserError, match=f"{part}: .*{message}"):
        load(str(folder))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"num_attention_heads": 4}, r"context_embedder.bias: \(64\) and \(32\)"),
        ("transformer", {"pooled_projection_dim": 24}, r"text_embedder.linear_1.weight: \(32, 24\) and \(32, 16\)"),
        ("vae", {"latent_channels": 8}, r"decoder.conv_in.weight: \(8, 8, 3, 3\) and \(8, 16, 3, 3\)"),
        ("text_encoder", {"vocab_size": 600}, r"token_embedding.weight: \(600, 16\) and \(514, 16\)"),
        ("text_encoder_2", {"d_model": 64}, r"SelfAttention.k.weight: \(16, 64\) and \(16, 16\)"),
    ],
)
def test_weights_of_other_shapes(
    folder: Path, capsys: pytest.CaptureFixture[str], part: str, changes: dict[str, Any], message: str
) -> None:
    configure(folder / part, **changes)
    with pytest.raises(UserError, match=f"{part}: its config.json and its weights are of different mod.*{message}"):
        load(str(folder))
    assert "MISMATCH" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("part", "file"), [("transformer", "diffusion_pytorch_model.safetensors"), ("text_encoder_2", "model.safetensors")]
)
def test_tensors_that_no_config_describes(folder: Path, part: str, file: str) -> None:
    path = folder / part / file
    weights = load_file(path)
    name = next(name for name in weights if ".0." in name)
    save_file(weights | {name.replace(".0.", ".7.", 1): torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{part}: config.json describes no .*7"):
        load(str(folder))


@pytest.mark.parametrize("files", [(), ("vocab.json",), ("merges.txt",)])
@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_a_vocabulary(folder: Path, part: str, files: tuple[str, ...]) -> None:
    (folder / part / "tokenizer.json").unlink()
    for name in files:
        (folder / part / name).write_text("{}")
    with pytest.raises(UserError, match=f"{part} has no vocabulary .*; get a complete copy"):
        load(str(folder))


@pytest.mark.parametrize(
    ("class_name", "files"),
    [
        ("CLIPTokenizer", ("vocab.json", "merges.txt")),
        ("CLIPTokenizerFast", ("tokenizer.json",)),
        ("T5Tokenizer", ("spiece.model",)),
        ("T5TokenizerFast", ("tokenizer.json",)),
        ("PreTrainedTokenizerFast", ("tokenizer.json",)),
        ("ByT5Tokenizer", ()),
    ],
)
def test_every_form_of_a_vocabulary_is_enough(tmp_path: Path, class_name: str, files: tuple[str, ...]) -> None:
    part = Part(name="tokenizer", library="transformers", class_name=class_name)
    (tmp_path / "tokenizer").mkdir()
    if files:
        with pytest.raises(UserError, match="tokenizer has no vocabulary"):
            check_vocabulary(tmp_path, part)
    for name in files:
        (tmp_path / "tokenizer" / name).touch()
    check_vocabulary(tmp_path, part)


@pytest.mark.parametrize(("number", "tokens"), [("", 514), ("_2", 30)])
def test_a_tokenizer_of_another_text_encoder(number: str, tokens: int) -> None:
    pipeline = tiny_flux_pipeline()
    encoder = getattr(pipeline, f"text_encoder{number}")
    encoder.resize_token_embeddings(tokens + 28)
    check_pipeline(pipeline)
    encoder.resize_token_embeddings(tokens - 1)
    with pytest.raises(
        UserError, match=f"tokenizer{number} has {tokens} tokens, .*encoder{number} knows {tokens - 1};"
    ):
        check_pipeline(pipeline)


@pytest.mark.parametrize("device", ["meta", "meta:0", "mps", "nothing"])
def test_a_device_that_cannot_compute(folder: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device} cannot be used; this machine has cpu"):
        load(str(folder), device)


def test_a_text_encoder_with_the_image_half_of_clip_loads(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(path) | {"vision_model.post_layernorm.bias": torch.ones(2)}, path, metadata={"format": "pt"})
    load(str(folder))


@pytest.mark.parametrize(
    ("part", "options", "variant"),
    [
        ("transformer", {"variant": "fp16"}, "fp16"),
        ("transformer", {"variant": "bf16", "max_shard_size": "50KB"}, "bf16"),
        ("text_encoder_2", {"variant": "fp16", "max_shard_size": "2KB"}, "fp16"),
        ("vae", {"variant": "non_ema"}, "non_ema"),
        ("text_encoder", {"max_shard_size": "10KB"}, None),
    ],
)
def test_weights_that_exist_as_a_variant(folder: Path, part: str, options: dict[str, Any], variant: str | None) -> None:
    expected = {
        name: value.clone() for name, value in CLASSES[part].from_pretrained(folder / part).state_dict().items()
    }
    save_again(folder, part, **options)
    if variant is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Notice)
            loaded = load(str(folder))
    else:
        with pytest.warns(Notice, match=f"the weights of {part} only as the variant {variant}, which is loaded"):
            loaded = load(str(folder))
    state = getattr(loaded.pipeline, part).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_plain_shard_that_is_missing_is_named(folder: Path) -> None:
    save_again(folder, "transformer", max_shard_size="50KB")
    FluxTransformer2DModel.from_pretrained(folder / "transformer").save_pretrained(folder / "half", variant="fp16")
    shutil.copy(folder / "half" / "diffusion_pytorch_model.fp16.safetensors", folder / "transformer")
    lost = sorted((folder / "transformer").glob("*-of-*"))[1]
    lost.unlink()
    with pytest.warns(Notice, match=f"only as the variant fp16, which is loaded; transformer lacks {lost.name}$"):
        load(str(folder))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.fp16.safetensors", "model.safetensors"], None),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "bf16"),
        (["diffusion_pytorch_model.ema.bin", "diffusion_pytorch_model.fp16.bin"], "fp16"),
        (["pytorch_model.bin", "model.fp16.safetensors"], None),
        (["model-00001-of-00001.fp16.safetensors", "model.safetensors.index.fp16.json"], "fp16"),
        (["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"], "fp16"),
    ],
)
def test_the_most_suitable_complete_variant_is_chosen(tmp_path: Path, names: list[str], expected: str | None) -> None:
    shards = {f"weight{number}": name for number, name in enumerate(names) if "-of-" in name}
    for name in names:
        (tmp_path / name).write_text(json.dumps({"weight_map": shards}))
    assert variant_of(tmp_path, torch.float32) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["flux1-dev.safetensors"], "has no weights"),
        (["model.fp16-00001-of-00002.safetensors"], "has no weights"),
        (["model.safetensors.index.fp16.json"], "lacks model.fp16-00009-of-00009.safetensors"),
    ],
)
def test_an_incomplete_variant_is_named(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text('{"weight_map": {"a": "model.fp16-00009-of-00009.safetensors"}}')
    with pytest.raises(UserError, match=message):
        variant_of(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"height": "64"}', "--height must be a whole number, got '64'"),
        ('{"width": null}', "--width must be a whole number, got None"),
        ('{"width": 64.0}', "--width must be a whole number, got 64.0"),
        ('{"num_inference_steps": true}', "--num-inference-steps must be a whole number, got True"),
        ('{"num_inference_steps": 0}', "--num-inference-steps must be at least 1, got 0"),
        ('{"max_sequence_length": [8]}', r"--max-sequence-length must be a whole number, got \[8\]"),
        ('{"guidance_scale": -1}', "--guidance-scale must be at least 0"),
        ('{"guidance_scale": NaN}', "--guidance-scale must be a finite number"),
        ('{"true_cfg_scale": 0.5}', "--true-cfg-scale must be at least 1, got 0.5"),
        ('{"true_cfg_scale": "1"}', "--true-cfg-scale must be a number, got '1'"),
        ('{"heigth": 64}', "holds heigth; it is a JSON object of num_inference_steps"),
        *((content, "holds no JSON object; it is a JSON object of") for content in ("[64]", "null", "3", '"x"', "[]")),
    ],
)
def test_defaults_of_the_wrong_type_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "fastdistill.json").write_text(content)
    with pytest.raises(UserError, match=rf"fastdistill\.json.*{message}"):
        SamplingDefaults.load(tmp_path)


def test_a_pipeline_of_the_hub_is_loaded_as_a_folder_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variant that is there and the files of this package, which diffusers does not fetch."""
    save_again(folder, "transformer", variant="fp16")
    SamplingDefaults(height=32).save(folder)
    asked: list[str | None] = []

    def download(model: str, variant: str | None = None) -> str:
        asked.append(variant)
        return str(folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model, name: str(folder / name))
    with pytest.warns(Notice, match="only as the variant fp16"):
        assert load("somebody/something").sampling.height == 32
    assert asked == [None]
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").rename(folder / "elsewhere")

    def late(model: str, variant: str | None = None) -> str:
        if variant == "fp16":
            (folder / "elsewhere").rename(folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
        return download(model, variant)

    monkeypatch.setattr(DiffusionPipeline, "download", late)
    with pytest.warns(Notice, match="only as the variant fp16"):
        load("somebody/something")
    assert asked[1:] == [None, "bf16", "fp16"]


def test_the_embedded_pipeline_opens_in_one_dtype() -> None:
    for options, expected in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        pipeline = FluxPipeline.from_pretrained(embedded_folder(), **options)
        found = {part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)}
        assert found == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_quantised_part_is_sampled_as_it_is(folder: Path, part: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config_class = diffusers.TorchAoConfig if part == "transformer" else transformers.TorchAoConfig
    quantised = CLASSES[part].from_pretrained(
        folder / part, quantization_config=config_class(quantization.Int8WeightOnlyConfig()), dtype=torch.float32
    )
    sampling = SamplingDefaults(num_inference_steps=2, height=64, width=64, max_sequence_length=8)
    stock = FluxPipeline.from_pretrained(folder, dtype=torch.float32, **{part: quantised})
    stock.set_progress_bar_config(disable=True)
    expected = sample(stock, ["a cat"], sampling, seeds=[3], batch=1)
    stock.save_pretrained(folder / "quantised")
    loaded = load(str(folder / "quantised")).pipeline
    weights = {type(weight.data).__name__ for weight in getattr(loaded, part).parameters()}
    assert "Int8Tensor" in weights
    assert torch.equal(sample(loaded, ["a cat"], sampling, seeds=[3], batch=1), expected)
    with patched(loaded.transformer):
        images = sample(loaded, ["a cat"], sampling, seeds=[3], batch=1)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


def other_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxKontextPipeline"}))


def no_second_encoder(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    empty = {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | empty))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_class, r"is a FluxKontextPipeline; supported: FluxPipeline\. Its FluxTransformer2DModel can be cut"),
        (no_second_encoder, "lacks its parts text_encoder_2, tokenizer_2"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "it has to be a JSON object"),
    ],
)
def test_folders_that_are_no_whole_pipeline(folder: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load(str(folder))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_and_sampling_come_in_every_form_of_unicode(folder: Path, encoding: str) -> None:
    (folder / "prompts.txt").write_text("a naïve cat\r\na dog\u2028on a mat\r\n \r\n", encoding=encoding, newline="")
    (folder / "fastdistill.json").write_text('{"height": 64, "width": 32}', encoding=encoding)
    loaded = load(str(folder), "cpu")
    assert loaded.prompts == ["a naïve cat", "a dog\u2028on a mat"]
    assert (loaded.sampling.height, loaded.sampling.width) == (64, 32)
