"""The commands from the outside, but distill: what they write, how they stop, and that they can go
on."""

import json
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import psutil
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastdistill.compress import CompressConfig, Compression, calibrate, job, score
from fastdistill.compress.config import CalibrationOptions, RecoveryOptions, RepairOptions
from fastdistill.compress.importance.output_error import OutputError
from fastdistill.compress.repairs import ridge
from fastdistill.data import shards, trajectories
from fastdistill.run.options import RunOptions, TrainingOptions
from fastdistill.run.store import default_folder
from fastdistill.train.trainer import Trainer
from tests.commands.conftest import COMMANDS, check_handed_on, interrupt, save_tiny
from tests.tiny import untrained_emoji_pipeline

QUICK = [
    "--recovery-steps",
    "4",
    "--batch",
    "4",
    "--calibration-images",
    "6",
    "--calibration-steps",
    "2",
    "--evaluate-images",
    "4",
]
QUICK += ["--repair-points", "8"]


@pytest.mark.parametrize("name", [*COMMANDS, "info"])
def test_help_answers_in_two_seconds(name):
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", f"fastdistill.{name}", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout
    # A loaded machine may be twice as slow as a free one.
    assert time.perf_counter() - began < 4


@pytest.mark.slow
def test_compress_writes_a_stock_pipeline_and_a_report(command, pipeline_folder, tmp_path):
    output = tmp_path / "out"
    ended = command(
        "compress", "--model", pipeline_folder, "--drop-blocks", "double:0", "single:1", "--output", output, *QUICK
    )
    assert ended.code == 0, ended.message
    assert sorted(path.name for path in output.iterdir()) == [
        "compress.json",
        "grid.png",
        "metrics.jsonl",
        "model",
        "report.md",
    ]
    record = json.loads((output / "compress.json").read_text())
    assert record["dropped"] == {"transformer_blocks": [0], "single_transformer_blocks": [1]}
    assert record["kept"] == {"transformer_blocks": [1], "single_transformer_blocks": [0, 2]}
    assert record["boundaries"] == {"double:1": "double:1", "single:0": "single:1", "single:2": "single:2"}
    assert record["parameters"]["compressed"] < record["parameters"]["full"]
    assert record["choice"]["asked"] == "--drop-blocks double:0 single:1"
    assert record["command"].startswith(
        f"fastdistill compress --model {pipeline_folder} --drop-blocks double:0 single:1"
    )
    assert record["scores"] == {}, "there was nothing to choose"
    assert (record["config"]["seed"], record["evaluation"]["full"]["seeds"], record["config"]["prompts"]) == (
        0,
        [0, 1, 2, 3],
        None,
    )
    assert set(record["versions"]) == {"fastdistill", "python", "torch", "diffusers", "transformers", "machine"}
    check_handed_on(output, pipeline_folder, "compress.json")
    assert list(record["evaluation"]) == ["full", "cut", "repaired", "recovered"]
    assert set(record["output_errors"]) == {"cut", "repaired", "recovered"}
    report = (output / "report.md").read_text()
    assert "double:0" in report
    assert "dropped" in report
    assert Image.open(output / "grid.png").size[0] > 300
    script = f"""
import sys
sys.modules["fastdistill"] = None
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
pipeline = FluxPipeline.from_pretrained({str(output / "model")!r})
assert (pipeline.transformer.config.num_layers, pipeline.transformer.config.num_single_layers) == (1, 2)
image = pipeline("a cat", height=64, width=64, num_inference_steps=2, max_sequence_length=8).images[0]
assert image.size == (64, 64)
"""
    stranger = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert stranger.returncode == 0, stranger.stderr
    again = command(
        "compress", "--model", pipeline_folder, "--drop-blocks", "double:0", "single:1", "--output", output, *QUICK
    )
    assert again.code == 2
    assert "finished run" in again.message


@pytest.mark.slow_but_first
@pytest.mark.parametrize("repair", ["scale", "average", "none"])
def test_without_recovery_the_repaired_model_is_saved_if_it_is_better(command, pipeline_folder, tmp_path, repair):
    output = tmp_path / "out"
    quick = ["--recovery-steps", "0", *QUICK[2:], "--repair", repair, "--save-dtype", "float32", "--output", output]
    assert command("compress", "--model", pipeline_folder, "--drop-blocks", "single:1", *quick).code == 0
    record = json.loads((output / "compress.json").read_text())
    assert list(record["evaluation"]) == ["full", "cut", *(["repaired"] if repair != "none" else [])]
    full, saved = (
        FluxTransformer2DModel.from_pretrained(folder / "transformer") for folder in (pipeline_folder, output / "model")
    )
    block, kept = saved.single_transformer_blocks[0], full.single_transformer_blocks[0]
    changed = {name for name, weight in block.state_dict().items() if not torch.equal(weight, kept.state_dict()[name])}
    repaired = record["saved"] == "repaired"
    assert repaired == (repair != "none" and record["distances"]["repaired"] < record["distances"]["cut"])
    if repair == "average" and repaired:
        assert {"proj_mlp.weight", "attn.to_q.weight", "proj_out.weight"} <= changed
    else:
        assert changed == ({"proj_out.weight", "proj_out.bias"} if repaired else set())
    report = (output / "report.md").read_text()
    assert ("| repaired |" in report) == (repair != "none")
    assert "| recovered |" not in report


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_weights(command, pipeline_folder, tmp_path, monkeypatch):
    options = ["--model", pipeline_folder, "--drop-blocks", "2", *QUICK]
    assert command("compress", *options, "--output", tmp_path / "whole").code == 0
    whole_advance = Trainer._advance

    def stop_at_two(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return whole_advance(self)

    monkeypatch.setattr(Trainer, "_advance", stop_at_two)
    ended = command("compress", *options, "--output", tmp_path / "broken")
    assert ended.code == 130
    assert "continues" in ended.message
    monkeypatch.setattr(Trainer, "_advance", whole_advance)
    # What is finished is not done again.
    monkeypatch.setattr(ridge, "repair", lambda damage: pytest.fail("repaired again"))
    monkeypatch.setattr(
        job,
        "calibrated",
        lambda *args, **kwargs: pytest.fail("sampled again") if not kwargs["cache"].exists() else real(*args, **kwargs),
    )
    assert command("compress", *options, "--learning-rate", "0.5", "--output", tmp_path / "broken").code == 2
    assert command("compress", *options, "--output", tmp_path / "broken").code == 0
    first, second = (
        load_file(tmp_path / name / "model/transformer/diffusion_pytorch_model.safetensors")
        for name in ("whole", "broken")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow_but_first
@pytest.mark.parametrize("budget", ["params=0.7", "latency=0.8"])
def test_compress_to_a_budget(command, pipeline_folder, tmp_path, budget):
    output = tmp_path / "out"
    quick = ["--recovery-steps", "0", *QUICK[2:]]
    ended = command(
        "compress", "--model", pipeline_folder, "--budget", budget, "--verify", "3", "--output", output, *quick
    )
    assert ended.code == 0, ended.message
    record = json.loads((output / "compress.json").read_text())
    choice, cost = record["choice"], record["costs"][budget.split("=")[0]]
    assert choice["asked"] == f"--budget {budget}"
    assert cost["full"] == choice["full"]
    assert cost["cut"] <= choice["limit"] == int(float(budget.split("=")[1]) * cost["full"])
    assert cost["full"] == cost["outside"] + sum(cost["blocks"].values())
    assert record["costs"]["params"]["cut"] == record["parameters"]["compressed"]
    assert ("latency" in record["costs"]) == budget.startswith("latency")
    assert [point["left"] for point in choice["front"]] == sorted(
        (point["left"] for point in choice["front"]), reverse=True
    )
    eligible = [found for found in choice["verified"] if found["eligible"]]
    assert len(eligible) >= 3
    best = min(eligible, key=lambda found: found["joint"])
    assert choice["dropped"] == best["dropped"]
    # Measured again with weights as they are saved.
    assert record["output_errors"]["cut"] == pytest.approx(best["joint"], rel=0.1)
    assert choice["additivity"]["sets"] == len(choice["verified"])
    report = (output / "report.md").read_text()
    assert "Do errors add up?" in report
    assert f"--budget {budget}" in report


def test_a_budget_that_turns_out_impossible_leaves_the_folder_free(command, pipeline_folder, tmp_path):
    options = ["--model", pipeline_folder, "--output", tmp_path / "out", *QUICK]
    ended = command("compress", "--budget", "latency=1us", *options)
    assert ended.code == 2
    assert "cannot be met" in ended.message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupted_choice_measures_nothing_twice(command, pipeline_folder, tmp_path, monkeypatch):
    options = [
        "--model",
        pipeline_folder,
        "--budget",
        "latency=0.8",
        "--output",
        tmp_path / "out",
        "--recovery-steps",
        "0",
        *QUICK[2:],
    ]
    measured, whole = [], OutputError.without

    def stop_at_the_last(self, dropped):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(tuple(dropped))
        return whole(self, dropped)

    monkeypatch.setattr(OutputError, "without", stop_at_the_last)
    assert command("compress", *options).code == 130

    def count(self, dropped):
        measured.append(tuple(dropped))
        return whole(self, dropped)

    monkeypatch.setattr(OutputError, "without", count)
    before, timed = job.latency, []
    monkeypatch.setattr(job, "latency", lambda *args: timed.append(1) or before(*args))
    assert command("compress", *options).code == 0
    assert len(set(measured)) == len(measured) > 5
    assert len(timed) == 1, "the full model was timed before the interruption, the cut one after it"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (80, 64), (50 * index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red {index % 2}")
    return folder


def test_a_line_says_what_was_read_of_the_images(command, images, tmp_path):
    """Before the model is looked for; an output folder among the images is refused."""
    options = ["compress", "--drop-blocks", "1", "--model", tmp_path / "nowhere", "--images", images]
    ended = command(*options, "--output", tmp_path / "out")
    assert f"5 images of {images}, with captions (5 from .txt)\n" in ended.message
    ended = command(*options, "--output", images / "runs" / "out")
    assert ended.code == 2
    assert f"lies in {images}, whose subfolders are read for images; choose another --output" in ended.message


@pytest.mark.slow
def test_calibration_on_images(command, pipeline_folder, images, tmp_path, monkeypatch):
    output = tmp_path / "out"
    options = [
        "--model",
        pipeline_folder,
        "--drop-blocks",
        "1",
        "--images",
        images,
        "--also-score",
        "trajectory",
        *QUICK,
    ]
    choose = Compression.choose
    monkeypatch.setattr(Compression, "choose", interrupt)
    assert command("compress", *options, "--output", output).code == 130
    cached = [load_file(path)["latents"] for path in sorted(default_folder().glob("calibration-*/*.safetensors"))]
    assert [tuple(part.shape) for part in cached] == [(4, 16, 8, 8), (1, 16, 8, 8)]
    monkeypatch.setattr(Compression, "choose", choose)
    # Encoded once: a run that goes on does not look at the images again but to see that they are
    # there.
    monkeypatch.setattr(trajectories, "pixels", lambda *args: pytest.fail("encoded again"))
    assert command("compress", *options, "--output", output).code == 0
    record = json.loads((output / "compress.json").read_text())
    assert (record["images"], record["config"]["images"]) == (5, str(images))
    assert "5 images of" in (output / "report.md").read_text()
    (images / "3.txt").unlink()
    ended = command("compress", *options, "--output", tmp_path / "other")
    assert ended.code == 2
    assert "3.png and 0 more of 5 images have no caption" in ended.message
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_python_scores_as_the_command_does(command, pipeline_folder, tmp_path):
    options = [
        "--model",
        pipeline_folder,
        "--drop-blocks",
        "2",
        "--recovery-steps",
        "0",
        *QUICK[2:],
        "--output",
        tmp_path / "out",
    ]
    assert command("compress", *options).code == 0
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    pipeline = FluxPipeline.from_pretrained(pipeline_folder)
    scores = score(calibrate(pipeline, ["a cat", "a dog", "a red fox"], points=6, steps=2, batch=4))
    assert [*scores.values()] == [*record["scores"]["output"].values()]


def test_a_job_from_python_is_quiet(pipeline_folder, tmp_path, capsys):
    config = CompressConfig(
        drop_blocks=("single:1",),
        run=RunOptions(model=str(pipeline_folder), output=tmp_path / "out", evaluate_images=4),
        calibration=CalibrationOptions(calibration_images=6, calibration_steps=2),
        repair=RepairOptions(repair_points=8),
        recovery=RecoveryOptions(recovery_steps=2),
        training=TrainingOptions(batch=4),
    )
    capsys.readouterr()
    Compression(config).run()
    assert capsys.readouterr() == ("", "")
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert (record["command"], record["config"]["drop_blocks"]) == ("", ["single:1"])


def test_a_dry_run_needs_no_weights_and_writes_nothing(command, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "guidance_embeds": true}')
    ended = command("compress", "--dry-run", "--model", tmp_path / "config.json", "--drop-blocks", "double:0-10")
    assert ended.code == 0, ended.message
    assert "8.163 B (0.686)" in ended.message
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


real = job.calibrated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop-blocks", "9"], "all 5 blocks"),
        (["--drop-blocks", "5"], "all 5 blocks"),
        (["--drop-blocks", "double:7"], "no block double:7"),
        (["--drop-blocks", "tripel:1"], "double:1,2"),
        (["--drop-blocks", "0"], "drops nothing"),
        (["--drop-blocks", "2", "--batch", "0"], "--batch"),
        (["--drop-blocks", "2", "--prompts", "nowhere.txt"], "no prompt file"),
        (
            ["--drop-blocks", "2", "--task-weight", "0", "--output-weight", "0", "--feature-weight", "0"],
            "nothing to recover by",
        ),
        (["--drop-blocks", "2", "--recovery-stepz", "3"], "--recovery-steps"),
        ([], "give either --drop-blocks"),
        (["--drop-blocks", "2", "--budget", "params=0.5"], "give either --drop-blocks"),
        (["--budget", "params"], "params=0.66"),
        (["--budget", "params=0.01"], "cannot be met"),
        (["--budget", "memory=3GiB"], "drops nothing"),
        (["--budget", "params=0.7", "--verify", "0"], "--verify"),
        (["--drop-blocks", "2", "--learning-rate", "-1"], "--learning-rate must be positive"),
        (["--drop-blocks", "2", "--learning-rate", "nan"], "--learning-rate must be a finite number"),
        (["--drop-blocks", "2", "--ema-decay", "1"], "--ema-decay must be at least 0 and less than 1"),
        (["--drop-blocks", "2", "--betas", "0.9", "1.5"], "--betas"),
        (["--drop-blocks", "2", "--micro-batches", "7"], "--micro-batches"),
        (["--drop-blocks", "2", "--true-cfg-scale", "inf"], "--true-cfg-scale"),
        (["--drop-blocks", "2", "--seed", "-3"], "--seed"),
        (["--drop-blocks", "2", "--device", "tpu"], "--device tpu cannot be used; this machine has cpu"),
        (["--drop-blocks", "2", "--height", "1"], "--height 1 is not a multiple of 16 pixels; give 16"),
        (["--drop-blocks", "2", "--width", "100"], "--width 100 is not a multiple of 16 pixels; give 96 or 112"),
        (["--drop-blocks", "2", "--max-sequence-length", "513"], "cannot be greater than 512 but is 513"),
        (["--drop-blocks", "2", "--true-cfg-scale", "0.5"], "--true-cfg-scale must be at least 1"),
        (["--drop-blocks", "2", "--criterion", "entropy"], "invalid choice 'entropy'"),
        (["--drop-blocks", "2", "--repair", "glue"], "invalid choice 'glue'"),
    ],
)
def test_bad_requests_stop_before_any_work(command, pipeline_folder, tmp_path, options, message):
    ended = command("compress", "--model", pipeline_folder, "--output", tmp_path / "out", *options)
    assert ended.code == 2
    assert message in ended.message
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_files_is_left_alone(command, pipeline_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    ended = command("compress", "--model", pipeline_folder, "--drop-blocks", "1", "--output", tmp_path)
    assert ended.code == 2
    assert "not empty" in ended.message
    assert "loading" not in ended.message, "refused before minutes of loading"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def broken(folder, tmp_path, spoil):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil(copy)
    return copy


def poison(copy):
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def mark(path):
    path.write_text(path.read_text(), encoding="utf-8-sig")


def truncate(copy):
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def overflow(copy):
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.bias"][0] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})


def lose_a_shard(copy):
    """Weights in two files, of which one has been lost."""
    folder = copy / "transformer"
    transformer = FluxTransformer2DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(folder, max_shard_size="100KB")
    next(folder.glob("*-00002-of-*.safetensors")).unlink()


def other_class(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))


def cuttable_class(copy):
    index = json.loads((copy / "model_index.json").read_text())
    sd3 = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (copy / "model_index.json").write_text(json.dumps(index | sd3))


@pytest.mark.slow_but_first("message")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda copy: (copy / "model_index.json").unlink(), "no model_index.json"),
        (lambda copy: (copy / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda copy: mark(copy / "model_index.json"), "model_index.json begins with a byte order mark"),
        (lambda copy: mark(copy / "vae/config.json"), "config.json begins with a byte order mark"),
        (lambda copy: shutil.rmtree(copy / "vae"), "lacks its part vae"),
        (lambda copy: (copy / "transformer/config.json").unlink(), "transformer has no config.json"),
        (lambda copy: (copy / "text_encoder/config.json").write_text("{"), "does not load"),
        (lambda copy: (copy / "tokenizer_2/tokenizer.json").write_text("{"), "does not load"),
        (
            lambda copy: (copy / "fastdistill.json").write_text('{"stepz": 3}'),
            "it is a JSON object of num_inference_steps",
        ),
        (lambda copy: (copy / "prompts.txt").write_bytes(b"\xff\xfe\x00"), "is not UTF-8 text"),
        (truncate, "does not load"),
        (poison, "transformer weight proj_out.weight has NaN"),
        (overflow, "vae weight decoder.conv_in.bias has NaN or infinite"),
        (
            lambda copy: (copy / "transformer/diffusion_pytorch_model.safetensors").unlink(),
            "transformer has no weights",
        ),
        (lambda copy: (copy / "text_encoder_2/model.safetensors").unlink(), "text_encoder_2 has no weights"),
        (lose_a_shard, "diffusion_pytorch_model-00002-of-"),
        (other_class, "is a StableDiffusionPipeline; supported: FluxPipeline"),
        (cuttable_class, "Its SD3Transformer2DModel can be cut from Python, with fastdistill.compress.cut"),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_broken_pipelines_are_named(command, pipeline_folder, tmp_path, name, spoil, message):
    folder = broken(pipeline_folder, tmp_path, spoil)
    options = {
        "compress": ["--drop-blocks", "1"],
        "distill": ["--method", "dmd2", "--steps", "1"],
        "sample": ["--output", tmp_path / "x.png"],
        "evaluate": [],
    }[name]
    ended = command(name, "--model", folder, *options)
    assert ended.code == 2
    assert message in ended.message


def test_a_model_that_is_nowhere(command, tmp_path):
    ended = command("compress", "--model", tmp_path / "nowhere", "--drop-blocks", "1")
    assert ended.code == 2
    assert "there is no folder" in ended.message


def test_too_small_a_disk_is_noticed_first(command, pipeline_folder, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 99, 1000))
    ended = command("compress", "--model", pipeline_folder, "--drop-blocks", "1", "--output", tmp_path / "out", *QUICK)
    assert ended.code == 2
    assert "MiB free" in ended.message
    assert not (tmp_path / "out").exists()


def test_too_small_a_memory_is_noticed_first(command, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(1000))
    options = ["--model", pipeline_folder, "--drop-blocks", "1", "--output", tmp_path / "out", *QUICK]
    ended = command("compress", *options)
    assert ended.code == 2
    assert "--recovery-steps 0" in ended.message
    assert not (tmp_path / "out").exists()


def test_a_diverging_recovery_loses_nothing(command, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *args: torch.tensor(float("nan")))
    ended = command("compress", "--model", pipeline_folder, "--drop-blocks", "1", "--output", tmp_path / "out", *QUICK)
    assert ended.code == 0, ended.message
    assert "lower the --learning-rate" in ended.message
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert record["saved"] == min(record["distances"], key=record["distances"].get)


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (FluxTransformer2DModel, "save_pretrained", OSError(28, "No space left on device")),
        # As it comes from safetensors on a disk that is full.
        (
            shards,
            "save_file",
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ),
    ],
    ids=["system", "safetensors"],
)
def test_a_disk_that_fills_up_is_no_traceback(command, pipeline_folder, tmp_path, monkeypatch, owner, name, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(owner, name, full)
    ended = command("compress", "--model", pipeline_folder, "--drop-blocks", "1", "--output", tmp_path / "out", *QUICK)
    assert ended.code == 1
    assert "disk is full" in ended.message


def test_quantised_weights_are_named(command, pipeline_folder, tmp_path, monkeypatch):
    whole = DiffusionPipeline.from_pretrained

    def quantised(*args, **kwargs):
        pipeline = whole(*args, **kwargs)
        weight = pipeline.transformer.proj_out.weight
        pipeline.transformer.proj_out.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
        return pipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", quantised)
    ended = command("compress", "--model", pipeline_folder, "--drop-blocks", "1", "--output", tmp_path / "out")
    assert ended.code == 2
    assert "transformer weight proj_out.weight is int8" in ended.message
    assert "load the model in bfloat16" in ended.message
    assert not (tmp_path / "out").exists()


def test_sample_is_repeatable_and_does_not_overwrite(command, pipeline_folder, tmp_path):
    options = ["--model", pipeline_folder, "--prompts", "a cat", "a dog", "--per-prompt", "3"]
    assert command("sample", *options, "--output", tmp_path / "a.png").code == 0
    assert command("sample", *options, "--output", tmp_path / "b.png", "--batch", "2").code == 0
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "b.png").size
    refused = command("sample", *options, "--output", tmp_path / "a.png")
    assert refused.code == 2
    assert "--overwrite" in refused.message
    assert (tmp_path / "a.png").read_bytes() == first
    assert command("sample", *options, "--output", tmp_path / "a.png", "--overwrite", "--seed", "5").code == 0
    assert (tmp_path / "a.png").read_bytes() not in (first, second)


def test_evaluate_against_itself_is_identical(command, pipeline_folder, tmp_path):
    output = tmp_path / "evaluation.json"
    options = ["--model", pipeline_folder, "--reference", pipeline_folder, "--per-prompt", "1", "--seeds", "0"]
    ended = command("evaluate", *options, "--output", output)
    assert ended.code == 0, ended.message
    metrics = json.loads(output.read_text())
    assert metrics["images"] == 3
    # Identical images have no finite ratio.
    assert metrics["psnr_to_reference"] is None
    assert f"{metrics['transformer_parameters']:,}" in ended.message


@pytest.mark.slow
def test_evaluate_on_emoji_knows_the_truth(command, tmp_path):
    folder = save_tiny(untrained_emoji_pipeline(), tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("cat face\nrocket\n")
    output = tmp_path / "evaluation.json"
    options = [
        "--model",
        folder,
        "--prompts",
        tmp_path / "prompts.txt",
        "--per-prompt",
        "2",
        "--seeds",
        "0",
        "3",
    ]
    ended = command("evaluate", *options, "--output", output)
    assert ended.code == 0, ended.message
    metrics = json.loads(output.read_text())
    assert metrics["images"] == 8
    assert len(metrics["frechet_distance_by_seed"]) == len(metrics["caption_accuracy_by_seed"]) == 2
    # An untrained model is far from what two sets of draws differ by.
    assert metrics["frechet_distance"] > 2 * metrics["frechet_distance_of_truth"] > 0
    assert "caption accuracy" in ended.message
    one = command("evaluate", *options[:-5], "--per-prompt", "1", "--seeds", "0", "--output", output)
    assert one.code == 2
    assert "--overwrite" in one.message
    (tmp_path / "prompts.txt").write_text("cat face\n")
    assert command("evaluate", *options[:-5], "--per-prompt", "1", "--seeds", "0").code == 0, (
        "a single image has no distance"
    )
