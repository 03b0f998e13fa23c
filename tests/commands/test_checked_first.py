"""Whatever can be checked before the work is: by the run, and by its `--dry-run`."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdistill.compress import job as compress_job
from fastdistill.errors import UserError
from fastdistill.run import packages, resources
from fastdistill.run.store import Store
from fastdistill.train.config import TrainConfig
from fastdistill.train.trainer import Trainer
from tests.train.rivals import Rivals, batches

COMPRESS = ("compress", "--drop-blocks", "1")
DISTILL = ("distill", "--method", "dmd2", "--steps", "2")
Usage = namedtuple("Usage", "total used free")
MIB = 2**20
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("words", [COMPRESS, DISTILL], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "adamw8bit"], "--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or leave"),
        (["--tensorboard"], "--tensorboard needs tensorboard: pip install tensorboard, or leave"),
        (["--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (["--images", "nowhere"], "there is no folder nowhere"),
        (["--output", "a_file/out"], "a_file/out cannot be made, as "),
        (["--cache", "a_file/cache"], "a_file/cache cannot be made, as "),
        (["--cache", "a_file"], "--cache a_file is a file; name a folder"),
        (["--output", "a_file"], "--output a_file is a file; name a folder"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    command, pipeline_folder, tmp_path, monkeypatch, dry, words, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    ended = command(*words, "--model", pipeline_folder, *options, *dry)
    assert ended.code == 2
    assert message in ended.message
    assert "fastdistill[" not in ended.message
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("path", "message"), [("a_file", "a_file is a file; name a folder"), ("a_file/b", "a_file/b cannot be made, as ")]
)
def test_a_teacher_cache_that_cannot_be_made(command, pipeline_folder, tmp_path, monkeypatch, dry, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    words = ("distill", "--method", "reflow", "--steps", "1", "--model", pipeline_folder, *dry)
    ended = command(*words, "--teacher-cache", path)
    assert ended.code == 2
    assert message in ended.message
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_a_cache_that_breaks_leaves_the_output_folder_free(command, pipeline_folder, tmp_path, monkeypatch):
    def full(self, kind, facts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Store, "entry", full)
    assert command(*COMPRESS, "--model", pipeline_folder, "--output", tmp_path / "out").code
    assert not (tmp_path / "out").exists()


def test_no_hint_installs_what_is_not_on_the_index():
    """Whoever registers the name of an extra of this package owns whoever follows the hint."""
    files = [*(ROOT / "fastdistill").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert not [path for path in files if "install 'fastdistill" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_named(command, pipeline_folder, tmp_path, monkeypatch, number):
    def refused(dir):
        raise OSError(number, os.strerror(number), str(dir))

    monkeypatch.setattr(resources, "TemporaryFile", refused)
    reason = {errno.EROFS: "the disk of {} is read-only", errno.EACCES: "you may not write to {}"}[number]
    jobs = [[*words, *dry] for words in (COMPRESS, DISTILL) for dry in ([], ["--dry-run"])]
    for words in (*jobs, ["sample"], ["evaluate"]):
        name = {"sample": "grid.png", "evaluate": "values.json"}.get(words[0], "new/out")
        ended = command(*words, "--model", pipeline_folder, "--output", tmp_path / name)
        assert ended.code == 2
        assert f"cannot be written: {reason.format(tmp_path)}; choose another --output" in ended.message


@pytest.mark.parametrize("words", [COMPRESS, DISTILL], ids=lambda words: words[0])
def test_a_full_disk_is_named_in_mebibytes(command, pipeline_folder, tmp_path, monkeypatch, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * MIB, 100 * MIB - 300_000, 300_000))
    ended = command(*words, "--model", pipeline_folder, "--output", tmp_path / "out")
    assert ended.code == 2
    assert f"{tmp_path / 'out'} needs about " in ended.message
    assert (
        f" MiB, and the disk of {tmp_path} has 0 MiB free; free some space, or choose another --output" in ended.message
    )
    assert not (tmp_path / "out").exists()


def test_parts_that_are_copied_count_as_they_are_stored(command, pipeline_folder, tmp_path, monkeypatch):
    """In double precision, and with another variant next to it, which is not copied."""

    def needed(output, needed_bytes):
        raise UserError(f"bytes: {needed_bytes}")

    monkeypatch.setattr(compress_job, "require_disk", needed)
    copy = tmp_path / "copy"
    shutil.copytree(pipeline_folder, copy)
    (weights,) = (copy / "vae").glob("*.safetensors")
    shutil.copyfile(weights, weights.with_suffix(".fp16.safetensors"))
    before = weights.stat().st_size
    save_file({name: tensor.double() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    amounts = [
        int(command(*COMPRESS, "--model", model, "--output", tmp_path / "out").message.split("bytes: ")[1])
        for model in (pipeline_folder, copy)
    ]
    assert amounts[1] - amounts[0] == weights.stat().st_size - before > 0


def test_the_disk_of_the_cache_counts_too(command, pipeline_folder, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(1, 1, 3 * MIB if path == tmp_path / "cache" else 10**12)
    )
    options = ["--model", pipeline_folder, "--cache", tmp_path / "cache", "--num-images", "500"]
    ended = command("distill", "--method", "reflow", "--steps", "1", *options, "--output", tmp_path / "out")
    assert ended.code == 2
    # Noise and image, 16 x 8 x 8 numbers of 4 bytes each.
    assert (
        f"{tmp_path / 'cache'} needs about 4 MiB, and the disk of {tmp_path / 'cache'} has 3 MiB free" in ended.message
    )
    assert "choose another --cache" in ended.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks for a GPU that is not there")
@pytest.mark.parametrize("words", [COMPRESS, DISTILL, ("sample",), ("evaluate",)], ids=lambda words: words[0])
def test_a_device_that_is_not_here(command, pipeline_folder, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    ended = command(*words, "--model", pipeline_folder, "--device", "cuda")
    assert ended.code == 2
    assert "--device cuda" in ended.message
    assert len(ended.message.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("distill", "--method", "tdm", "--steps", "2", "--num-images", "7"), ["--num-images does nothing with tdm"]),
        (("distill", "--method", "dmd2", "--steps", "2", "--gan-weight", "0", "--gan-depths", "1"), ["--gan-depths"]),
        (
            ("distill", "--method", "dmd2", "--steps", "2", "--times", "logit_normal", "--time-low", "0.1"),
            ["--time-low"],
        ),
        (("distill", "--method", "consistency", "--steps", "2", "--loss", "mse", "--huber-c", "1"), ["--huber-c"]),
        (
            ("distill", "--method", "reflow", "--steps", "2", "--watch-every", "0", "--watch-images", "3"),
            ["--watch-images"],
        ),
        (("distill", "--method", "tdm", "--steps", "2", "--training-steps", "7", "--critic-updates", "3"), []),
        (
            (*COMPRESS, "--recovery-steps", "0", "--precision", "bf16", "--batch", "8"),
            ["--precision does nothing with"],
        ),
        ((*COMPRESS, "--repair", "none", "--repair-points", "9"), ["--repair-points does nothing with --repair none"]),
        ((*COMPRESS, "--latency-batch", "2"), ["--latency-batch"]),
    ],
)
def test_an_option_that_does_nothing_is_told(command, pipeline_folder, words, told):
    ended = command(*words, "--model", pipeline_folder, "--dry-run")
    assert ended.code == 0, ended.message
    notes = [line for line in ended.message.splitlines() if "does nothing" in line]
    assert len(notes) == len(told)
    for note, expected in zip(notes, told, strict=True):
        assert expected in note


def test_one_step_is_none_of_tdm(command, pipeline_folder, tmp_path):
    ended = command(
        "distill", "--method", "tdm", "--steps", "1", "--model", pipeline_folder, "--output", tmp_path / "out"
    )
    assert ended.code == 2
    assert "for one step choose dmd, progressive or reflow" in ended.message


def test_the_trainer_asks_for_tensorboard_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tensorboard=True needs tensorboard: pip install tensorboard"):
        Trainer(Rivals(), batches, TrainConfig(steps=1, tensorboard=True), tmp_path)


def test_images_are_looked_at_in_a_dry_run(command, pipeline_folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = ("distill", "--method", "output_kd", "--steps", "2", "--model", pipeline_folder, "--dry-run")
    assert command(*words, "--images", tmp_path).code == 0


def test_the_benchmarks_explain_themselves():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "python -m benchmarks.run [ops | models]" in done.stdout


@pytest.mark.parametrize("size", [512, 1024])
def test_too_few_points_to_repair_from_are_told(command, tmp_path, size):
    """FLUX.1-dev: a token for 16 x 16 pixels; the last layer of a double block has 12288 inputs and
    reads them, that of a single block has 15360 and reads 512 tokens of text, too."""
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "guidance_embeds": true}')
    pixels = (size // 16) ** 2
    needed = max(-(-30 * 12288 // pixels), -(-30 * 15360 // (pixels + 512)))
    words = [*COMPRESS, "--model", tmp_path / "config.json", "--height", size, "--width", size, "--dry-run"]
    told = command(*words, "--repair-points", needed - 1)
    assert f"note: --repair-points {needed - 1} may make the model worse: its layers have thirty tokens" in told.message
    assert f"with {needed} or more" in told.message
    for enough in (["--repair-points", needed], ["--repair", "scale", "--repair-points", "2"]):
        ended = command(*words, *enough)
        assert ended.code == 0
        assert "may make the model worse" not in ended.message


def test_too_few_points_are_told_before_the_work(command, pipeline_folder, tmp_path):
    """16 tokens an image, and 128 inputs of the last layer of a double block: 240 images."""
    words = [*COMPRESS, "--model", pipeline_folder, "--output", tmp_path / "out", "--budget", "params=0.1"]
    ended = command("compress", *words[3:], "--repair-points", "239")
    assert "with 240 or more" in ended.message
    assert "with 240 or more" not in command("compress", *words[3:], "--repair-points", "240").message
