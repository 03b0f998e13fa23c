"""A pipeline is saved whole or not at all. Parts that nobody changed are copied byte for byte, and
nothing says where they came from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file, save_file

from fastdistill.models.copying import forget_origins
from fastdistill.models.loading import load
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.saving import save
from fastdistill.run.files import folder_bytes
from tests.tiny import tiny_flux_pipeline

COPIED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in half precision."""
    folder = tmp_path_factory.mktemp("secret-place") / "pipeline"
    tiny_flux_pipeline().to(torch.float16).save_pretrained(folder)
    return folder


def saved(pipeline: Any, folder: Path) -> Path:
    """Folder that `pipeline` is saved to; it loads in stock diffusers, without a variant."""
    save(pipeline, pipeline.transformer, folder, SamplingDefaults(height=64, width=64), ["a cat"])
    again = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        right, found = (getattr(pipe, name).state_dict() for pipe in (pipeline, again))
        assert right.keys() == found.keys()
        for key, tensor in right.items():
            torch.testing.assert_close(found[key], tensor.float(), rtol=0, atol=0)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(original: Path, folder: Path) -> set[str]:
    """Parts whose files are those of the original, byte for byte."""
    return {part for part in COPIED if contents(original / part) == contents(folder / part)}


def test_a_failed_save_leaves_nothing_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, folder = tiny_flux_pipeline(), tmp_path / "model"
    arguments = (
        pipeline,
        pipeline.transformer,
        folder,
        SamplingDefaults(height=64, width=64),
        ["a  cat", "two\nlines"],
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            SamplingDefaults, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space"):
            save(*arguments)
    assert list(tmp_path.iterdir()) == []
    # Left by a process that was killed.
    (tmp_path / "model.partial").mkdir()
    save(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "prompts.txt").read_text() == "a  cat\ntwo lines\n"
    assert SamplingDefaults.load(folder).height == 64


def test_what_is_saved_already_stays(tmp_path: Path) -> None:
    pipeline, folder = tiny_flux_pipeline(), tmp_path / "model"
    folder.mkdir()
    save(pipeline, pipeline.transformer, folder, SamplingDefaults(), [])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_that_nobody_changed_are_copied(original: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pipeline = DiffusionPipeline.from_pretrained(original, dtype=torch.float32)
    if dtype == torch.bfloat16:
        # Half precision has more digits, which a copy keeps and memory has lost.
        pipeline.to(dtype)
        save(pipeline, pipeline.transformer, tmp_path / "model", SamplingDefaults(), ["a cat"])
    else:
        saved(pipeline, tmp_path / "model")
    assert copied(original, tmp_path / "model") == set(COPIED)
    transformer = folder_bytes(tmp_path / "model/transformer") - folder_bytes(original / "transformer")
    assert abs(folder_bytes(tmp_path / "model") - folder_bytes(original) - transformer) < 1000


def test_what_load_loads_is_copied_too(original: Path, tmp_path: Path) -> None:
    loaded = load(str(original), "cpu")
    assert copied(original, saved(loaded.pipeline, tmp_path / "model")) == set(COPIED)
    for name, content in contents(tmp_path / "model").items():
        assert b"secret-place" not in content, name


def change_a_weight(pipeline: Any) -> None:
    with torch.no_grad():
        next(pipeline.text_encoder.parameters())[0, 0] += 1


def change_a_config(pipeline: Any) -> None:
    pipeline.vae.register_to_config(scaling_factor=0.25)


def add_a_token(pipeline: Any) -> None:
    pipeline.tokenizer.add_tokens(["<mine>"])


def cut_an_encoder(pipeline: Any) -> None:
    pipeline.text_encoder_2.encoder.block[0].layer[1].DenseReluDense.wo.weight.data.zero_()


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (change_a_weight, "text_encoder"),
        (change_a_config, "vae"),
        (add_a_token, "tokenizer"),
        (cut_an_encoder, "text_encoder_2"),
    ],
)
def test_a_part_that_was_changed_is_saved(
    original: Path, tmp_path: Path, change: Callable[[Any], None], changed: str
) -> None:
    pipeline = load(str(original), "cpu").pipeline
    change(pipeline)
    folder = saved(pipeline, tmp_path / "model")
    assert copied(original, folder) == set(COPIED) - {changed}
    again = FluxPipeline.from_pretrained(folder)
    assert again.vae.config.scaling_factor == pipeline.vae.config.scaling_factor
    assert len(again.tokenizer) == len(pipeline.tokenizer)


def test_files_that_were_changed_are_not_copied(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(original, folder)
    pipeline = load(str(folder), "cpu").pipeline
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.bias"] = weights["decoder.conv_in.bias"] + 1
    # As an editor does: another file under the same name, and the old one stays where it is mapped.
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    shutil.rmtree(folder / "text_encoder")
    assert copied(original, saved(pipeline, tmp_path / "model")) == set(COPIED) - {"vae", "text_encoder"}


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_variants_are_copied_under_plain_names(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "pipeline"
    tiny_flux_pipeline().to(torch.float16).save_pretrained(folder, variant="fp16", max_shard_size=shard)
    assert list(folder.glob("vae/*.fp16*"))
    copy = saved(load(str(folder), "cpu").pipeline, tmp_path / "model")
    for part in ("vae", "text_encoder", "text_encoder_2"):
        names = {path.name.replace(".fp16", ""): path.name for path in (folder / part).iterdir()}
        assert {path.name for path in (copy / part).iterdir()} == set(names)
        for name, variant in names.items():
            if not name.endswith(".json"):
                assert (copy / part / name).read_bytes() == (folder / part / variant).read_bytes()


def test_files_with_the_prefix_of_a_base_model_and_files_of_torch(original: Path, tmp_path: Path) -> None:
    """As text encoders were saved for years."""
    folder = tmp_path / "pipeline"
    shutil.copytree(original, folder)
    path = folder / "text_encoder/model.safetensors"
    weights = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert copied(folder, saved(load(str(folder), "cpu").pipeline, tmp_path / "model")) == set(COPIED)


def test_the_links_of_a_hubs_cache_are_followed(original: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub/models--owner--name"
    snapshot = repository / "snapshots/0123456789012345678901234567890123456789"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(snapshot.name)
    for number, path in enumerate(sorted(path for path in original.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / str(number), snapshot / path.relative_to(original)
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(blob)
    pipeline = DiffusionPipeline.from_pretrained(
        "owner/name", cache_dir=tmp_path / "hub", local_files_only=True, dtype=torch.float32
    )
    folder = saved(pipeline, tmp_path / "model")
    assert copied(original, folder) == set(COPIED)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert not any(str(tmp_path).encode() in content for content in contents(folder).values())


def test_origins_are_left_out_and_names_on_the_hub_stay(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(original, folder)
    origins = {
        "vae/config.json": {"_name_or_path": "/home/someone/sdxl-vae"},
        "text_encoder/config.json": {"_name_or_path": "C:\\models\\clip"},
        "text_encoder_2/config.json": {"_name_or_path": "google/t5-v1_1-xxl"},
        "tokenizer/tokenizer_config.json": {"special_tokens_map_file": "/home/someone/map.json"},
        "transformer/config.json": {"_name_or_path": "../mine/out"},
    }
    for name, origin in origins.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | origin))
    model = saved(load(str(folder), "cpu").pipeline, tmp_path / "model")
    for name, origin in origins.items():
        found = json.loads((model / name).read_text())
        assert found.items() >= (origin if "xxl" in str(origin) else {}).items()
        assert "someone" not in str(found)
        assert "mine" not in str(found)
        assert "C:" not in str(found)
    assert copied(folder, model) == {"text_encoder_2", "tokenizer_2"}
    weights = "diffusion_pytorch_model.safetensors"
    assert (model / "vae" / weights).read_bytes() == (folder / "vae" / weights).read_bytes()


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("_name_or_path", "black-forest-labs/FLUX.1-dev", True),
        ("_name_or_path", "t5-small", True),
        ("name_or_path", "/data/models/t5", False),
        ("_name_or_path", "runs/one/model", False),
        ("_name_or_path", "./model", False),
        ("_name_or_path", "here/model", False),
        ("_name_or_path", "~/model", False),
        ("tokenizer_file", "C:/Users/me/tokenizer.json", False),
        ("special_tokens_map_file", "./special_tokens_map.json", True),
        ("vocab_file", "vocab.json", True),
        ("model_type", "/t5", True),
    ],
)
def test_paths_are_told_from_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str, kept: bool
) -> None:
    (tmp_path / "here/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"a": [{field: value, "b": 1}]}))
    forget_origins(tmp_path)
    right = {field: value, "b": 1} if kept else {"b": 1}
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": [right]}
