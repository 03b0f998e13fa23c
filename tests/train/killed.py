"""Trains `Rivals` in children that are killed: `python -m tests.train.killed FOLDER`, its own
process as it forks.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by optimizers: once here, not in every child
from safetensors.torch import save_file

from fastdistill.train import checkpoint
from fastdistill.train.trainer import Trainer
from fastdistill.train.watch import Evaluation
from tests.train.rivals import Rivals, batches, die, rivals_config, weights

# Functions with the number of their calls of which one is the last.
PLACES = [
    (Rivals, "loss", 30),  # between the turns of a step, too
    (Rivals, "after_step", 12),
    (checkpoint, "save_file", 20),  # in a checkpoint, and in what is kept of the best weights
    (os, "replace", 5),
    (shutil, "rmtree", 3),
]


def train(run: Path, at: Callable[[Trainer], None] = lambda trainer: None) -> None:
    method = Rivals()

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            probe = torch.linspace(-1, 1, 12).view(4, 3)
            return {
                "error": float((method.networks["student"](probe) - method.networks["teacher"](probe)).square().mean())
            }

    evaluation = Evaluation(evaluate=evaluate, every=2, monitor="error", patience=5)
    trainer = Trainer(method, batches, rivals_config(), run, evaluation=evaluation)
    at(trainer)
    trainer.fit()
    trained = weights(method, trainer.emas)
    save_file({name: value.contiguous().clone() for name, value in trained.items()}, run / "result.safetensors")


def dying(owner: Any, name: str, number: int) -> Callable[[Trainer], None]:
    """Dies in call `number` of `owner.name`, before it does anything."""

    def arm(trainer: Trainer) -> None:
        target = trainer.method if owner is Rivals else owner
        whole, calls = getattr(target, name), itertools.count()

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                die()
            return whole(*args, **kwargs)

        setattr(target, name, counted)

    return arm


def child(work: Callable[[], None]) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_in(run: Path, owner: Any, name: str, numbers: Iterable[int]) -> int:
    arms = [dying(owner, name, number) for number in numbers]
    return sum(ended(child(lambda arm=arm: train(run, arm))) == -signal.SIGKILL for arm in arms)


def killed_after(run: Path, seconds: Iterable[float]) -> int:
    kills = 0
    for wait in seconds:
        process = child(lambda: train(run))
        time.sleep(wait)
        os.kill(process, signal.SIGKILL)
        kills += ended(process) == -signal.SIGKILL
    return kills


def main(folder: Path) -> None:
    """Prints how often each run was killed before it was left alone."""
    torch.set_num_threads(1)  # forked children have no pool of threads
    dice = random.Random(0)
    began = time.monotonic()
    kills = {"whole": 0}
    assert ended(child(lambda: train(folder / "whole"))) == 0
    whole = time.monotonic() - began
    for owner, name, calls in PLACES:
        kills[name] = killed_in(folder / name, owner, name, (dice.randrange(calls) for _ in range(4)))
    # The shortest waits first: the first run may have taken longer than another does, and a run that
    # is through is killed no more.
    kills["any"] = killed_after(folder / "any", sorted(dice.uniform(0, whole) for _ in range(10)))
    for name in kills:
        assert ended(child(lambda run=folder / name: train(run))) == 0
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
