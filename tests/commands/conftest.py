"""A pipeline's folder and a way to call a command as a user does."""

import sys
from collections import namedtuple

import pytest

from fastdistill.compress.__main__ import main as compress_main
from fastdistill.compress.config import CompressConfig
from fastdistill.distill.__main__ import JOB, PROGRAM
from fastdistill.distill.config import config_of
from fastdistill.evaluate import EvaluateConfig
from fastdistill.evaluate import main as evaluate_main
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run import cli
from fastdistill.sample import SampleConfig
from fastdistill.sample import main as sample_main
from tests.tiny import tiny_flux_pipeline

COMMANDS = {
    "compress": (lambda arguments: CompressConfig, compress_main),
    "sample": (lambda arguments: SampleConfig, sample_main),
    "evaluate": (lambda arguments: EvaluateConfig, evaluate_main),
}

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
        arguments = [*map(str, options)]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        try:
            if name == "distill":
                cli.run_job(config_of(arguments), JOB, prog=PROGRAM)
            else:
                of, main = COMMANDS[name]
                cli.run(of(arguments), main, prog=name)
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ended(code, captured.out + captured.err)

    return call


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt
