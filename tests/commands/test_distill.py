"""`python -m fastdistill.distill` from the outside: what it writes, how it stops, and that it goes
on."""

import inspect
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from fastdistill.diffusion.timesteps import few_step_times
from fastdistill.distill import METHODS, DistillConfig, FewStepStudent, job
from fastdistill.distill.config import DataOptions, StudentTrainingOptions, WatchOptions, config_for, config_of
from fastdistill.distill.methods.dmd2 import DMD2
from fastdistill.distill.methods.output_kd import OutputKDOptions
from fastdistill.errors import UserError
from fastdistill.models import loading
from fastdistill.run.options import RunOptions
from fastdistill.run.store import default_folder
from fastdistill.train.trainer import Trainer
from tests.commands.conftest import check_handed_on, interrupt, save_tiny
from tests.tiny import tiny_flux_pipeline

QUICK = [
    "--training-steps",
    "6",
    "--batch",
    "4",
    "--num-images",
    "6",
    "--watch-every",
    "3",
    "--watch-images",
    "2",
    "--evaluate-images",
    "4",
]
PACKAGE = Path(job.__file__).parents[1]
EXTRA = {
    "dmd2": ["--critic-updates", "2", "--gan-depths", "0.5", "1"],
    "consistency": ["--grid-steps", "4"],
    "progressive": ["--teacher-steps", "8"],
}


def weights(folder):
    return load_file(folder / "model/transformer/diffusion_pytorch_model.safetensors")


def test_every_method_can_be_named():
    for name, method in METHODS.items():
        found = config_of(["--method", name])(method=name, steps=1 if name == "dmd" else 4).flags()
        assert {option: found[option] for option in method.command_defaults} == method.command_defaults


@pytest.mark.slow_but_first
@pytest.mark.parametrize("method", METHODS)
def test_a_student_is_a_stock_pipeline_that_knows_its_steps(command, pipeline_folder, tmp_path, method):
    output, steps = tmp_path / "out", 1 if method == "dmd" else 2
    options = [
        "--method",
        method,
        "--steps",
        steps,
        "--model",
        pipeline_folder,
        "--output",
        output,
        *QUICK,
        *EXTRA.get(method, []),
    ]
    options += ["--num-inference-steps", "3"]
    ended = command("distill", *options)
    assert ended.code == 0, ended.message
    found = sorted(path.name for path in output.iterdir())
    assert found == ["curves.png", "distill.json", "grid.png", "metrics.jsonl", "model", "report.md", "samples"]
    record = json.loads((output / "distill.json").read_text())
    short = f"teacher, {steps} step{'s' if steps > 1 else ''}"
    assert record["calls"] == {"teacher": 6, short: 2 * steps, "student": steps}
    assert list(record["evaluation"]) == ["teacher", short, "student"]
    assert record["command"].startswith(f"fastdistill distill --method {method} --steps {steps}")
    assert record["chosen"]["monitor"] == "frechet_distance_to_reference"
    assert record["chosen"]["step"] in (3, 6)
    check_handed_on(output, pipeline_folder, "distill.json")
    sampling = json.loads((output / "model" / "fastdistill.json").read_text())
    assert (sampling["num_inference_steps"], sampling["true_cfg_scale"]) == (steps, 1.0)
    guided = method == "guidance"
    assert sampling["guidance_scale"] == (2.0 if guided else 3.5)
    assert [path.name for path in sorted((output / "samples").iterdir())] == ["0000003.png", "0000006.png"]
    assert Image.open(output / "curves.png").size[0] > 300
    report = (output / "report.md").read_text()
    assert f"by {method}" in report
    assert f"num_inference_steps={steps}" in report
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    prefix = "student/" if len(lines[0]) and "critic/loss" in lines[0] else ""
    assert f"{prefix}loss" in lines[1]
    teacher, student = (
        FluxTransformer2DModel.from_pretrained(folder / "transformer") for folder in (pipeline_folder, output / "model")
    )
    assert student.config.guidance_embeds == guided
    assert not torch.equal(student.proj_out.weight, teacher.proj_out.weight.bfloat16().float())
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(output / "model" / "scheduler")
    assert scheduler.config.stochastic_sampling == (method == "consistency")


def test_few_calls_lead_from_the_command_to_the_loss(command, pipeline_folder, tmp_path, monkeypatch):
    """A reader who follows the command comes to the formula: `run_job`, the job's `run` and
    `train`, three of the trainer, `loss`."""
    calls = []

    def loss(self, role, batch, rng):
        frames = [frame.function for frame in inspect.stack() if PACKAGE in Path(frame.filename).parents]
        calls.append([*reversed(frames[: frames.index("run_job") + 1]), "loss"])
        raise KeyboardInterrupt

    monkeypatch.setattr(DMD2, "loss", loss)
    options = ["--method", "dmd2", "--steps", "1", "--model", pipeline_folder, "--output", tmp_path / "out", *QUICK]
    assert command("distill", *options, "--watch-every", "0", "--evaluate-images", "0").code == 130
    assert calls == [["run_job", "run", "train", "fit", "_advance", "_update", "loss"]]


def test_gradient_checkpointing_reaches_every_trained_transformer(command, pipeline_folder, tmp_path, monkeypatch):
    seen = []

    def fit(self, *_):
        seen.append(
            {
                role: getattr(self.method.networks[role], "is_gradient_checkpointing", None)
                for role in self.method.trains
            }
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", fit)
    options = [
        "--method",
        "dmd2",
        "--steps",
        "1",
        "--model",
        pipeline_folder,
        *QUICK,
        "--watch-every",
        "0",
        "--evaluate-images",
        "0",
    ]
    for name, extra in (("with", ["--gradient-checkpointing"]), ("without", [])):
        assert command("distill", *options, *extra, "--output", tmp_path / name).code == 130
    assert seen == [
        {"student": True, "critic": True, "discriminator": None},
        {"student": False, "critic": False, "discriminator": None},
    ]


def test_python_has_the_defaults_of_the_command():
    for name, method in METHODS.items():
        config = config_for(name)(steps=1 if name == "dmd" else 4)
        assert isinstance(config.options, method.Options)
        assert config == config_of([f"--method={name}"])(method=name, steps=config.steps)
    with pytest.raises(UserError, match="there is no method 'tmd'"):
        config_for("tmd")


def test_a_job_from_python_is_quiet(pipeline_folder, tmp_path, capsys):
    run = RunOptions(model=str(pipeline_folder), output=tmp_path / "out", evaluate_images=0)
    with pytest.raises(UserError, match=r"give options=OutputKDOptions\(...\)"):
        DistillConfig(method="output_kd", steps=2, run=run)
    config = DistillConfig(
        method="output_kd",
        steps=2,
        run=run,
        data=DataOptions(num_images=2),
        training=StudentTrainingOptions(batch=2, training_steps=2),
        watch=WatchOptions(watch_every=0),
        options=OutputKDOptions(error_in="x0"),
    )
    capsys.readouterr()
    FewStepStudent(config).run()
    assert capsys.readouterr() == ("", "")
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert (record["command"], record["config"]["error_in"]) == ("", "x0")


@pytest.mark.slow
def test_the_report_says_what_diffusers_does_with_the_result(command, pipeline_folder, tmp_path):
    """In a process that cannot import fastdistill: the times of the scheduler are those that were
    trained at."""
    output = tmp_path / "out"
    options = [
        "--method",
        "output_kd",
        "--steps",
        "4",
        "--shift",
        "3",
        "--model",
        pipeline_folder,
        "--output",
        output,
        *QUICK,
    ]
    assert command("distill", *options).code == 0
    lines = (output / "report.md").read_text().splitlines()
    example = "\n".join(line.strip() for line in lines if line.startswith("    "))
    assert "FluxPipeline.from_pretrained" in example
    script = f"import sys\nsys.modules['fastdistill'] = None\n{example}\nprint(pipeline.scheduler.sigmas.tolist())"
    stranger = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert stranger.returncode == 0, stranger.stderr
    sigmas = torch.tensor(json.loads(stranger.stdout.splitlines()[-1]))
    torch.testing.assert_close(sigmas, torch.cat([few_step_times(4, 3.0), torch.zeros(1)]))


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_weights(command, pipeline_folder, tmp_path, monkeypatch):
    options = ["--method", "dmd2", "--steps", "2", "--model", pipeline_folder, *QUICK]
    assert command("distill", *options, "--output", tmp_path / "whole").code == 0
    whole_advance = Trainer._advance

    def stop_at_four(self):
        if self.step == 4:
            raise KeyboardInterrupt
        return whole_advance(self)

    monkeypatch.setattr(Trainer, "_advance", stop_at_four)
    assert command("distill", *options, "--output", tmp_path / "broken").code == 130
    monkeypatch.setattr(Trainer, "_advance", whole_advance)
    changed = command("distill", *options, "--gan-weight", "0.5", "--output", tmp_path / "broken")
    assert changed.code == 2
    assert "--gan-weight" in changed.message
    pairs = {path: path.stat().st_mtime_ns for path in default_folder().glob("pairs-*/shard-*")}
    assert pairs
    real = job.save

    def look(*args):
        assert {path: path.stat().st_mtime_ns for path in pairs} == pairs, "drawn again"
        real(*args)

    monkeypatch.setattr(job, "save", look)
    assert command("distill", *options, "--output", tmp_path / "broken").code == 0
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = command("distill", *options, "--output", tmp_path / "broken")
    assert again.code == 2
    assert "finished run" in again.message


@pytest.mark.slow
def test_a_smaller_student(command, pipeline_folder, tmp_path):
    smaller = save_tiny(tiny_flux_pipeline(num_layers=1, num_single_layers=2), tmp_path / "smaller")
    output = tmp_path / "out"
    options = [
        "--method",
        "dmd2",
        "--steps",
        "2",
        "--critic-knows-step",
        "--model",
        pipeline_folder,
        "--student",
        smaller,
        "--output",
        output,
    ]
    ended = command("distill", *options, *QUICK)
    assert ended.code == 0, ended.message
    pipeline = FluxPipeline.from_pretrained(output / "model")
    assert (pipeline.transformer.config.num_layers, pipeline.transformer.config.num_single_layers) == (1, 2)
    record = json.loads((output / "distill.json").read_text())
    assert record["parameters"]["student"] < record["parameters"]["teacher"]


def test_a_student_of_another_interface_is_refused(command, pipeline_folder, tmp_path):
    pipeline = tiny_flux_pipeline()
    config = {**pipeline.transformer.config, "pooled_projection_dim": 8}
    pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(config))
    other = save_tiny(pipeline, tmp_path / "other")
    ended = command(
        "distill",
        "--method",
        "dmd2",
        "--steps",
        "1",
        "--model",
        pipeline_folder,
        "--student",
        other,
        "--output",
        tmp_path / "out",
    )
    assert ended.code == 2
    assert "pooled_projection_dim 16 and the student 8" in ended.message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_gan_no_image_is_drawn(command, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "teacher_pairs", lambda *args, **kwargs: pytest.fail("the teacher has drawn"))
    options = [
        "--method",
        "dmd2",
        "--steps",
        "2",
        "--gan-weight",
        "0",
        "--model",
        pipeline_folder,
        "--output",
        tmp_path / "out",
        *QUICK,
    ]
    assert command("distill", *options).code == 0
    assert "3 prompts and no images" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_images_of_ones_own(command, pipeline_folder, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (80, 64), (80 * index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red {index}")
    options = ["--steps", "2", "--model", pipeline_folder, "--images", folder, *QUICK]
    ended = command(
        "distill", "--method", "progressive", "--teacher-steps", "4", "--output", tmp_path / "out", *options
    )
    assert ended.code == 0, ended.message
    assert "3 images of" in (tmp_path / "out" / "report.md").read_text()
    for method, reason in (("reflow", "trains on pairs"), ("tdm", "trains on prompts")):
        refused = command("distill", "--method", method, "--output", tmp_path / method, *options)
        assert refused.code == 2
        assert reason in refused.message
        assert "leave out --images" in refused.message


@pytest.mark.slow
def test_patience_ends_a_run_early(command, pipeline_folder, tmp_path, monkeypatch):
    values = iter([10.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(job.FewStepStudent, "measure", lambda self: {job.WATCHED[0]: next(values)})
    options = [
        "--method",
        "output_kd",
        "--steps",
        "2",
        "--model",
        pipeline_folder,
        "--output",
        tmp_path / "out",
        *QUICK,
    ]
    options += ["--training-steps", "12", "--watch-every", "2", "--patience", "2"]
    assert command("distill", *options).code == 0
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert (record["chosen"]["step"], record["chosen"]["value"]) == (4, 5.0)
    assert [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()] == [
        2,
        4,
        6,
        8,
    ]


@pytest.mark.slow
def test_a_student_of_the_teachers_steps_is_compared_with_it_once(command, pipeline_folder, tmp_path):
    options = ["--method", "guidance", "--steps", "2", "--model", pipeline_folder, "--output", tmp_path / "out", *QUICK]
    assert command("distill", *options).code == 0
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert list(record["evaluation"]) == list(record["calls"]) == ["teacher", "student"]


def test_without_watching_the_averaged_weights_are_the_result(command, pipeline_folder, tmp_path):
    options = [
        "--method",
        "output_kd",
        "--steps",
        "2",
        "--model",
        pipeline_folder,
        "--output",
        tmp_path / "out",
        *QUICK,
    ]
    assert command("distill", *options, "--watch-every", "0", "--evaluate-images", "0", "--tensorboard").code == 0
    assert (tmp_path / "out" / "tensorboard").is_dir()
    report = (tmp_path / "out" / "report.md").read_text()
    assert "the averaged ones after the last step" in report
    assert "## Quality" not in report


def test_a_dry_run_needs_no_weights_and_writes_nothing(command, tmp_path):
    """FLUX.1-dev, 11.9 B parameters: 44 GiB of float32 weights for the student, and as many for
    each of its moments and its average."""
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "guidance_embeds": true}')
    options = ["--method", "dmd2", "--steps", "4", "--dry-run", "--model", tmp_path / "config.json", "--device", "cuda"]
    ended = command("distill", *options)
    assert ended.code == 0, ended.message
    rows = {
        tuple(line.split("  ")[0].split() + line.split()[1:2]): line
        for line in ended.message.splitlines()
        if "GiB" in line
    }
    assert "44.3" in rows["student", "weights"]
    assert "22.1" in rows["teacher", "weights"]
    assert "bfloat16" in rows["teacher", "weights"]
    assert "88.6" in rows["critic", "two"]
    assert ("discriminator", "weights") in rows
    # As much less as 3072 is wider than 128.
    for rate in (5e-5, 4e-4):
        assert f'"learning_rate": {rate * 128 / 3072}' in ended.message
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "dmd3", "--steps", "4"], "invalid choice 'dmd3'"),
        (["--method", "dmd2"], "--steps"),
        (["--steps", "2"], "--method"),
        (["--method", "dmd2", "--steps", "0"], "at least one step"),
        (["--method", "dmd", "--steps", "4"], "choose tdm or dmd2"),
        (["--method", "progressive", "--steps", "3"], "such as 24"),
        (["--method", "progressive", "--steps", "4", "--training-steps", "2"], "halved 3 times"),
        (["--method", "consistency", "--steps", "5"], "--grid-steps"),
        (["--method", "progressive", "--steps", "4", "--gan-weight", "1"], "--gan-weight"),
        (["--method", "dmd2", "--steps", "4", "--micro-batches", "7"], "--micro-batches"),
        (["--method", "dmd2", "--steps", "4", "--learning-rate", "0"], "--learning-rate"),
        (["--method", "dmd2", "--steps", "4", "--ema-decay", "1"], "--ema-decay"),
        (["--method", "dmd2", "--steps", "4", "--shift", "-1"], "--shift"),
        (["--method", "dmd2", "--steps", "4", "--watch-every", "0", "--patience", "1"], "--watch-every"),
        (["--method", "dmd2", "--steps", "4", "--prompts", "nowhere.txt"], "no prompt file"),
        (["--method", "dmd2", "--steps", "4", "--student", "nowhere"], "there is no folder nowhere"),
        (["--method", "guidance", "--steps", "4", "--guidance-range", "4", "1"], "from low to high"),
    ],
)
def test_bad_requests_stop_before_any_work(command, pipeline_folder, tmp_path, options, message):
    ended = command("distill", "--model", pipeline_folder, "--output", tmp_path / "out", *options)
    assert ended.code == 2
    assert message in ended.message
    assert not (tmp_path / "out").exists()


def test_too_small_a_memory_is_noticed_first(command, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(1000))
    ended = command(
        "distill", "--method", "dmd2", "--steps", "4", "--model", pipeline_folder, "--output", tmp_path / "out", *QUICK
    )
    assert ended.code == 2
    assert "--optimizer adamw8bit" in ended.message
    assert not (tmp_path / "out").exists()


def test_a_diverging_training_is_no_traceback(command, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *args: torch.tensor(float("nan")))
    ended = command(
        "distill", "--method", "dmd2", "--steps", "1", "--model", pipeline_folder, "--output", tmp_path / "out", *QUICK
    )
    assert ended.code == 2
    assert "Lower the learning rate" in ended.message


def test_an_interruption_before_training_keeps_what_the_teacher_drew(command, pipeline_folder, tmp_path, monkeypatch):
    options = ["--method", "reflow", "--steps", "1", "--model", pipeline_folder, "--output", tmp_path / "out", *QUICK]
    monkeypatch.setattr(job, "Trainer", interrupt)
    assert command("distill", *options).code == 130
    assert len(list(default_folder().glob("pairs-*/*.safetensors"))) == 2


@pytest.mark.slow
def test_runs_share_what_the_teacher_drew(command, pipeline_folder, tmp_path, monkeypatch):
    shared = ["--steps", "1", "--model", pipeline_folder, "--teacher-cache", tmp_path / "drawn", *QUICK]
    assert command("distill", "--method", "reflow", "--output", tmp_path / "a", *shared).code == 0
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*")}
    ended = command("distill", "--method", "dmd2", "--output", tmp_path / "b", *shared)
    assert ended.code == 0
    assert "evaluate teacher" not in ended.message
    assert "evaluate student" in ended.message
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*")} == drawn
    first, second = (json.loads((tmp_path / name / "distill.json").read_text()) for name in "ab")
    for name in ("teacher", "teacher, 1 step"):
        assert first["evaluation"][name] == second["evaluation"][name]
    ended = command("distill", "--method", "dmd2", "--output", tmp_path / "c", *shared, "--true-cfg-scale", "3")
    assert ended.code == 2
    assert "pairs of another true_cfg_scale" in ended.message


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_in_bfloat16(command, pipeline_folder, tmp_path, monkeypatch, precision):
    """As a GPU loads it: the student trains in float32, and is sampled by a pipeline of the
    teacher's dtype."""
    monkeypatch.setattr(loading, "dtype_on", lambda device: torch.bfloat16)
    options = [
        "--method",
        "dmd2",
        "--steps",
        "2",
        "--model",
        pipeline_folder,
        "--output",
        tmp_path / "out",
        "--precision",
        precision,
    ]
    ended = command("distill", *options, *QUICK)
    assert ended.code == 0, ended.message
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["student/loss"] > 0 for line in lines)
