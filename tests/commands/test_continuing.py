"""Runs that continue: with what they began with, in a folder of their own, whatever stops them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdistill.compress import job as compress_job
from fastdistill.distill import job as distill_job
from fastdistill.distill.methods import teacher_pairs
from fastdistill.run.store import default_folder
from tests.commands.conftest import interrupt, save_tiny
from tests.tiny import tiny_flux_pipeline

SMALL = ["--batch", "4", "--evaluate-images", "0"]
COMPRESS = ["compress", "--drop-blocks", "1", "--calibration-images", "4", "--calibration-steps", "2", *SMALL]
COMPRESS += ["--recovery-steps", "0", "--repair-points", "8"]
DISTILL = ["distill", "--method", "output_kd", "--steps", "2", "--num-images", "4", "--training-steps", "2", *SMALL]
DISTILL += ["--watch-every", "0"]


@pytest.fixture
def mine(pipeline_folder, tmp_path):
    """A model, prompts and images that a test may change."""
    model = shutil.copytree(pipeline_folder, tmp_path / "model")
    (tmp_path / "p.txt").write_text("a tall ship\nan old man\n")
    (tmp_path / "images").mkdir()
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (80, 64), colour).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"a {colour} wall")
    save_tiny(tiny_flux_pipeline(num_layers=1, num_single_layers=2), tmp_path / "student")
    return model


def changed_weight(model, part="transformer"):
    """Change one number of a part's weights, in place."""
    file = next((model / part).glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 0.5
    save_file(weights, file, {"format": "pt"})


CHANGES = {
    "prompts": lambda folder: (folder / "p.txt").write_text("a tall ship\nan old dog\na third line\n"),
    "weights": lambda folder: changed_weight(folder / "model"),
    "text encoder": lambda folder: changed_weight(folder / "model", "text_encoder_2"),
    "scheduler": lambda folder: edit(folder / "model/scheduler/scheduler_config.json", '"shift": 1.0', '"shift": 2.5'),
    "defaults": lambda folder: edit(
        folder / "model/fastdistill.json", '"num_inference_steps": 2', '"num_inference_steps": 3'
    ),
    "fewer images": lambda folder: [(folder / "images" / f"b.{suffix}").unlink() for suffix in ("png", "txt")],
    "image": lambda folder: Image.new("RGB", (80, 64), "white").save(folder / "images" / "c.png"),
    "caption": lambda folder: (folder / "images" / "a.txt").write_text("a scarlet wall"),
    "student": lambda folder: changed_weight(folder / "student"),
}
TOLD = {
    "prompts": "the prompts in {}/p.txt changed since the run in {}/out began (changed: line 2; new: line 3)",
    "weights": "the model in {}/model changed since the run in {}/out began (changed: transformer)",
    "text encoder": "the model in {}/model changed since the run in {}/out began (changed: text_encoder_2)",
    "scheduler": "the model in {}/model changed since the run in {}/out began (changed: scheduler)",
    "defaults": "defaults of {}/model changed since the run in {}/out began (changed: num_inference_steps)",
    "fewer images": "the images in {}/images changed since the run in {}/out began (gone: b.png)",
    "image": "the images in {}/images changed since the run in {}/out began (changed: c.png)",
    "caption": "the images in {}/images changed since the run in {}/out began (changed: a.png)",
    "student": "the student in {}/student changed since the run in {}/out began (changed: transformer)",
}


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_is_not_continued_with_other_data(command, mine, tmp_path, monkeypatch, kind):
    options = ["--model", mine, "--output", tmp_path / "out", "--prompts", tmp_path / "p.txt"]
    if kind in ("fewer images", "image", "caption"):
        options += ["--images", tmp_path / "images"]
    if kind == "student":
        options += ["--student", tmp_path / "student"]
    # Every second kind by each of the commands.
    words = DISTILL if kind == "student" or list(CHANGES).index(kind) % 2 else COMPRESS
    monkeypatch.setattr(distill_job, "Trainer", interrupt)
    monkeypatch.setattr(compress_job, "cut_model", interrupt)
    monkeypatch.setattr(compress_job.Compression, "largest_student", lambda self: None)
    monkeypatch.setattr(compress_job.Compression, "require_resources", lambda self, model: None)
    assert command(*words, *options).code == 130
    assert command(*words, *options).code == 130, "continued as far as before"
    CHANGES[kind](tmp_path)
    ended = command(*words, *options)
    assert ended.code == 2
    assert TOLD[kind].format(tmp_path, tmp_path) in ended.message
    assert "restore what was there, or choose another --output" in ended.message


def test_what_was_moved_continues(command, mine, tmp_path, monkeypatch):
    options = ["--output", tmp_path / "out", "--student", tmp_path / "student"]
    whole = distill_job.Trainer
    monkeypatch.setattr(distill_job, "Trainer", interrupt)
    here = ["--model", mine, "--prompts", tmp_path / "p.txt", "--images", tmp_path / "images"]
    assert command(*DISTILL, *options, *here).code == 130
    for name in ("model", "p.txt", "images"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    monkeypatch.setattr(distill_job, "Trainer", whole)
    there = ["--model", tmp_path / "moved-model", "--prompts", tmp_path / "moved-p.txt"]
    ended = command(*DISTILL, *options, *there, "--images", tmp_path / "moved-images")
    assert ended.code == 0, ended.message
    assert "continuing the interrupted run" in ended.message


def started(words, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", f"fastdistill.{words[0]}", *words[1:], *map(str, options)]
    return subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path, process):
    until = time.monotonic() + 120
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < until
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.slow
def test_the_same_command_twice_at_once(pipeline_folder, tmp_path):
    words = [*DISTILL, "--training-steps", "4"]
    both = [started(words, "--model", pipeline_folder, "--output", tmp_path / "out") for _ in range(2)]
    messages = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], messages
    loser = next(process for process in both if process.returncode)
    winner = next(process for process in both if not process.returncode)
    message = messages[both.index(loser)].splitlines()[-1]
    assert f"in use by process {winner.pid} on" in message or "holds a finished run" in message
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["TERM", "KILL"])
def test_a_training_that_was_ended_continues(pipeline_folder, tmp_path, number, code):
    words = [*DISTILL, "--training-steps", "2000", "--checkpoint-every", "1000"]
    process = started(words, "--model", pipeline_folder, "--output", tmp_path / "out")
    training = tmp_path / "out" / "work" / "training"
    wait_for(training / "metrics.jsonl", process)
    while not (training / "metrics.jsonl").read_text():
        time.sleep(0.02)
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == code, message
    left = [path.name for path in training.glob("checkpoint-*")]
    if number == signal.SIGTERM:
        assert "the same command continues" in message
        assert len(left) == 1
    again = started(words, "--model", pipeline_folder, "--output", tmp_path / "out")
    while not (training / "lock").exists() or str(again.pid) not in (training / "lock").read_text():
        assert again.poll() is None, again.stderr.read()
        time.sleep(0.02)
    again.terminate()
    message = again.communicate(timeout=60)[1]
    assert again.returncode == 143, message
    assert "continuing the interrupted run" in message


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("name", ["distill", "compress", "sample", "evaluate"])
def test_torchrun_is_refused_by_the_first_process(command, tmp_path, monkeypatch, name, rank):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.chdir(tmp_path)
    words = {"distill": DISTILL[1:], "compress": COMPRESS[1:]}.get(name, [])
    ended = command(name, *words)
    assert ended.code == 2
    assert ended.message.count("\n") == (1 if rank == "0" else 0)
    assert ("runs in one process, and WORLD_SIZE is 3" in ended.message) == (rank == "0")
    assert list(tmp_path.iterdir()) == []


def test_another_run_finds_what_the_teacher_drew(command, mine, tmp_path, monkeypatch):
    """With other training in another folder, but not once a weight has changed, nor without the
    cache."""
    made = []
    whole = teacher_pairs.sample
    monkeypatch.setattr(teacher_pairs, "sample", lambda *args, **more: made.append(1) or whole(*args, **more))
    monkeypatch.setattr(distill_job, "Trainer", interrupt)
    options = ["--model", mine, "--output"]
    assert command(*DISTILL, *options, tmp_path / "a").code == 130
    assert command(*DISTILL, *options, tmp_path / "b", "--learning-rate", "1e-3").code == 130
    assert len(made) == 1
    assert command(*DISTILL, *options, tmp_path / "c", "--cache", "none").code == 130
    assert len(made) == 2
    assert command(*DISTILL, *options, tmp_path / "c", "--cache", "none").code == 130
    assert len(made) == 2, "with the run until it is finished"
    changed_weight(mine)
    assert command(*DISTILL, *options, tmp_path / "d").code == 130
    assert len(made) == 3


def test_a_finished_run_is_trained_on(command, mine, tmp_path, monkeypatch):
    output = tmp_path / "out"
    options = ["--model", mine, "--output", output, "--watch-every", "1", "--watch-images", "2"]
    assert command(*DISTILL, *options).code == 0
    before = load_file(output / "model/transformer/diffusion_pytorch_model.safetensors")
    same = command(*DISTILL, *options)
    assert same.code == 2
    assert "train it on with more --training-steps than 2" in same.message
    assert "train it on" not in command(*DISTILL, *options, "--learning-rate", "1e-3").message
    with monkeypatch.context() as patch:
        patch.setattr(distill_job.FewStepStudent, "save", interrupt)
        assert command(*DISTILL, *options, "--training-steps", "5").code == 130
    assert load_file(output / "model/transformer/diffusion_pytorch_model.safetensors").keys() == before.keys()
    ended = command(*DISTILL, *options, "--training-steps", "5")
    assert ended.code == 0, ended.message
    record = json.loads((output / "distill.json").read_text())
    assert (record["config"]["training_steps"], record["trained_on"]) == (5, [2])
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in output.iterdir()) == [
        "curves.png", "distill.json", "grid.png", "metrics.jsonl", "model", "report.md", "samples"
    ]  # fmt: skip
    after = load_file(output / "model/transformer/diffusion_pytorch_model.safetensors")
    assert json.loads((output / "model/distill.json").read_text())["chosen"] == record["chosen"]
    assert any(not torch.equal(after[name], before[name]) for name in before) == (record["chosen"]["step"] > 2)
    assert command(*DISTILL, *options, "--training-steps", "6").code == 0
    assert json.loads((output / "distill.json").read_text())["trained_on"] == [2, 5]


def test_a_finished_run_whose_last_checkpoint_is_gone(command, mine, tmp_path):
    options = ["--model", mine, "--output", tmp_path / "out"]
    assert command(*DISTILL, *options).code == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    shutil.rmtree(default_folder())
    ended = command(*DISTILL, *options, "--training-steps", "5")
    assert ended.code == 2
    assert "cannot be trained on: its last checkpoint is not in" in ended.message
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == kept


def test_a_cache_that_was_removed_meanwhile_is_made_again(command, mine, tmp_path, monkeypatch):
    options = ["--model", mine, "--output", tmp_path / "out", "--watch-every", "1", "--watch-images", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(distill_job.FewStepStudent, "save", interrupt)
        assert command(*DISTILL, *options).code == 130
    shutil.rmtree(default_folder())
    ended = command(*DISTILL, *options)
    assert ended.code == 0, ended.message
