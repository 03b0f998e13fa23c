"""A run that is killed, at any moment, and started again ends with the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdistill.errors import UserError
from fastdistill.train import checkpoint
from fastdistill.train.trainer import Trainer
from tests.train.rivals import Rivals, batches, folders, rivals_config, weights


@pytest.mark.slow
def test_kill_9_anywhere(tmp_path: Path) -> None:
    """Several roles with turns of their own, accumulation, averages, dropout, a target network, the
    best weights, checkpoints.
    """
    command = [sys.executable, "-m", "tests.train.killed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout.splitlines()[-1])
    assert kills.pop("whole") == 0
    assert min(kills.values()) >= 1
    expected = load_file(tmp_path / "whole/result.safetensors")
    best = [(tmp_path / "whole/best" / name).read_bytes() for name in ("student.safetensors", "best.json")]
    metrics = without_seconds(tmp_path / "whole")
    for name in kills:
        result = load_file(tmp_path / name / "result.safetensors")
        assert all(torch.equal(result[key], value) for key, value in expected.items()), name
        assert [(tmp_path / name / "best" / file).read_bytes() for file in ("student.safetensors", "best.json")] == best
        assert without_seconds(tmp_path / name) == metrics
        assert folders(tmp_path / name) == ["best", "checkpoint-12"]


def without_seconds(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("turn", [9, 10, 11, 12])
def test_ctrl_c_between_the_turns_of_a_step_saves_no_half_step(tmp_path: Path, turn: int) -> None:
    def trained(run: Path, method: Rivals) -> dict[str, torch.Tensor]:
        trainer = Trainer(method, batches, rivals_config(checkpoint_every=100), run)
        trainer.fit()
        return weights(method, trainer.emas)

    class Interrupted(Rivals):
        calls = 0

        def loss(self, *arguments):
            self.calls += 1
            if self.calls == turn:
                raise KeyboardInterrupt
            return super().loss(*arguments)

    expected = trained(tmp_path / "whole", Rivals())
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", Interrupted())
    result = trained(tmp_path / "broken", Rivals())
    assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    Trainer(Rivals(), batches, rivals_config(keep_checkpoints=2), tmp_path).fit()
    assert folders(tmp_path) == ["checkpoint-12", "checkpoint-9"]
    files = {path.suffix for path in (tmp_path / "checkpoint-12").iterdir()}
    assert files == {".json", ".safetensors"}


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    method = Rivals()
    Trainer(method, batches, rivals_config(), tmp_path).fit()
    method.networks["student"].out = torch.nn.Linear(5, 4)
    with pytest.raises(UserError, match=r"student.*out\.bias, out\.weight differ"):
        Trainer(method, batches, rivals_config(), tmp_path).fit()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path / "best", {"student": {"w": torch.zeros(2)}}, {"best": {"step": 1}})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path / "best", {"student": {"w": torch.ones(2)}}, {"best": {"step": 2}})
    assert folders(tmp_path) == ["best"]
    assert torch.equal(load_file(tmp_path / "best/student.safetensors")["w"], torch.zeros(2))
