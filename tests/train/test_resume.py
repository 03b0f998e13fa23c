"""A run that is killed, at any moment, and started again ends with the same bits."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdistill.errors import UserError
from fastdistill.run.lock import Lock
from fastdistill.run.signals import Stopped, stopping_in_order
from fastdistill.train import checkpoint
from fastdistill.train import trainer as trainer_module
from fastdistill.train.trainer import Trainer
from fastdistill.train.watch import Evaluation
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


def measured(trainer: Trainer) -> dict[str, float]:
    student, teacher = trainer.method.networks["student"], trainer.method.networks["teacher"]
    with torch.no_grad():
        probe = torch.linspace(-1, 1, 12).view(4, 3)
        return {"error": float((student(probe) - teacher(probe)).square().mean())}


def observed(run: Path, method: Rivals, *, at: int = -1, **changes: Any) -> dict[str, torch.Tensor]:
    """Weights of a run that is measured after every second step, and by SIGTERM in measurement
    `at`."""
    calls = itertools.count()

    def evaluate() -> dict[str, float]:
        if next(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return measured(trainer)

    evaluation = Evaluation(evaluate=evaluate, every=2, monitor="error")
    trainer = Trainer(method, batches, rivals_config(**{"checkpoint_every": 100, **changes}), run, (), evaluation)
    with stopping_in_order():
        trainer.fit()
    return weights(method, trainer.emas)


def same_run(first: Path, second: Path) -> bool:
    names = ("student.safetensors", "best.json")
    files = [[(run / "best" / name).read_bytes() for name in names] for run in (first, second)]
    return files[0] == files[1] and without_seconds(first) == without_seconds(second)


@pytest.mark.parametrize(("turn", "reached"), [(7, 2), (8, 2), (9, 3), (10, 3), (11, 3), (12, 3)])
def test_sigterm_ends_after_the_step_that_is_being_done(tmp_path: Path, turn: int, reached: int) -> None:
    """In two parts of the student and two of the critic; before the student's update nothing of the
    step has happened."""

    class Asked(Rivals):
        calls = 0

        def loss(self, *arguments: Any) -> Any:
            self.calls += 1
            if self.calls == turn:
                signal.raise_signal(signal.SIGTERM)
            return super().loss(*arguments)

    expected = observed(tmp_path / "whole", Rivals())
    with pytest.raises(Stopped, match="SIGTERM"):
        observed(tmp_path / "broken", Asked())
    assert folders(tmp_path / "broken") == ["best", f"checkpoint-{reached}"]
    result = observed(tmp_path / "broken", Rivals())
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_step_that_was_not_measured_is_measured_later(tmp_path: Path, at: int) -> None:
    """The last one among them, and one that is stopped twice."""
    expected = observed(tmp_path / "whole", Rivals())
    for again in (at, 0):
        with pytest.raises(Stopped):
            observed(tmp_path / "broken", Rivals(), at=again)
        assert f"checkpoint-{2 * at + 2}" in folders(tmp_path / "broken")
    for _ in range(2):
        result = observed(tmp_path / "broken", Rivals())
        assert all(torch.equal(result[name], value) for name, value in expected.items())
        assert same_run(tmp_path / "whole", tmp_path / "broken")


def test_checkpoints_by_the_clock_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = observed(tmp_path / "whole", Rivals())
    written, save, clock = [], checkpoint.save, itertools.count()

    def told(run: Path, step: int, *rest: Any, **more: Any) -> Path:
        written.append(step)
        return save(run, step, *rest, **more)

    monkeypatch.setattr(checkpoint, "save", told)
    # 20 seconds from look to look: a minute is over after three steps.
    ticking = SimpleNamespace(monotonic=lambda: 20.0 * next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(trainer_module, "time", ticking)
    result = observed(tmp_path / "timed", Rivals(), checkpoint_minutes=1)
    assert written == [3, 12], "writing took 20 seconds, and waits for ten times as long"
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert same_run(tmp_path / "whole", tmp_path / "timed")


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    with pytest.raises(UserError, match="in use by process"):
        Trainer(Rivals(), batches, rivals_config(), tmp_path).fit()
    held.release()
    Trainer(Rivals(), batches, rivals_config(), tmp_path).fit()
    assert not (tmp_path / "lock").exists()


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


def test_a_run_that_has_ended_is_trained_on(tmp_path: Path) -> None:
    def trained(run: Path, steps: int, stop: int = -1) -> tuple[dict[str, torch.Tensor], list[float]]:
        trainer = Trainer(Rivals(), batches, rivals_config(steps=steps, schedule="cosine"), run)
        advance = trainer._advance

        def counted() -> None:
            if trainer.step == stop:
                raise KeyboardInterrupt
            advance()

        trainer._advance = counted  # type: ignore[method-assign]
        trainer.fit()
        rates = [line["learning_rate"] for line in without_seconds(run)]
        return weights(trainer.method, trainer.emas), rates

    _, first = trained(tmp_path / "run", 12)
    result, rates = trained(tmp_path / "run", 20)
    _, whole = trained(tmp_path / "whole", 20)
    assert len(rates) == 20
    assert rates[:12] == first
    # Warmed up again over three steps, then where the longer run is.
    assert rates[12:14] == pytest.approx([whole[12] / 3, whole[13] * 2 / 3])
    assert rates[14:] == whole[14:]
    trained(tmp_path / "broken", 12)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", 20, stop=14)
    again, _ = trained(tmp_path / "broken", 20)
    assert all(torch.equal(again[name], value) for name, value in result.items())
    with pytest.raises(UserError, match="another steps"):
        trained(tmp_path / "run", 12)


def test_an_interrupted_run_does_not_change_its_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        observed(tmp_path / "run", Rivals(), at=1)
    with pytest.raises(UserError, match="another steps"):
        observed(tmp_path / "run", Rivals(), steps=20)
