"""A pipeline's folder and a way to call a command as a user does."""

import json
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fastdistill.compress import __main__ as compress
from fastdistill.compress.config import CompressConfig
from fastdistill.distill import __main__ as distill
from fastdistill.distill.config import config_of
from fastdistill.evaluate import EvaluateConfig
from fastdistill.evaluate import main as evaluate_main
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run import cli
from fastdistill.sample import SampleConfig
from fastdistill.sample import main as sample_main
from tests.tiny import tiny_flux_pipeline

COMMANDS = {
    "compress": lambda: cli.run_job(CompressConfig, compress.JOB, prog=compress.PROGRAM),
    "distill": lambda: cli.run_job(config_of(sys.argv[1:]), distill.JOB, prog=distill.PROGRAM),
    "sample": lambda: cli.run(SampleConfig, sample_main, prog="sample"),
    "evaluate": lambda: cli.run(EvaluateConfig, evaluate_main, prog="evaluate"),
}
"""Functions that run the command of `sys.argv`, by name."""

Ended = namedtuple("Ended", "code message")


def save_tiny(pipeline, folder):
    pipeline.save_pretrained(folder)
    SamplingDefaults(num_inference_steps=2, true_cfg_scale=2.0, height=64, width=64, max_sequence_length=8).save(folder)
    (folder / "prompts.txt").write_text("a cat\na dog\na red fox\n")
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    return save_tiny(tiny_flux_pipeline(), tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def command(monkeypatch, capsys):
    def call(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        capsys.readouterr()
        try:
            COMMANDS[name]()
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ended(code, captured.out + captured.err)

    return call


def check_handed_on(output, pipeline_folder, result):
    """The model travels alone: with the record of its run, with parts that are the original's byte
    for byte, and without a path of this machine."""
    model, record = output / "model", json.loads((output / result).read_text())
    handed_on = json.loads((model / result).read_text())
    assert handed_on["model"] == pipeline_folder.name
    assert f"--model {pipeline_folder.name} " in handed_on["command"]
    for name in ("model", "command", "config"):
        del record[name], handed_on[name]
    assert handed_on == record
    for path in filter(Path.is_file, model.rglob("*")):
        content = path.read_bytes()
        for folder in (pipeline_folder, output):
            assert str(folder.parent).encode() not in content, path
        if path.parent.name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            assert content == (pipeline_folder / path.relative_to(model)).read_bytes()


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt
