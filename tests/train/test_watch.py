"""Observers of a run, and evaluations that end it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fastdistill.errors import UserError
from fastdistill.train.method import Loss, StudentMethod
from fastdistill.train.trainer import Trainer
from fastdistill.train.watch import Evaluation, SampleGrid
from tests.train.rivals import Rivals, batches, rivals_config


class Counter(StudentMethod):
    """The student's only number is the count of steps."""

    def __init__(self) -> None:
        self.networks = {"student": nn.Linear(1, 1, bias=False)}
        nn.init.zeros_(self.networks["student"].weight)

    def loss(self, role, batch, rng):
        return Loss(total=0 * self.networks["student"].weight.sum())

    def after_step(self, step):
        nn.init.constant_(self.networks["student"].weight, step + 1)

    @property
    def value(self) -> float:
        return float(self.networks["student"].weight.detach())


def counting(run: Path, quality: list[float], *, source=batches, **settings) -> tuple[Counter, Trainer]:
    """Evaluated every 2 steps; `quality` is the measurement by number of evaluation."""
    method = Counter()
    evaluation = Evaluation(
        **(
            {"every": 2, "monitor": "error", "evaluate": lambda: {"error": quality[int(method.value) // 2 - 1]}}
            | settings
        )
    )
    config = rivals_config(steps=20, roles={}, ema_decay=None, micro_batches=1)
    trainer = Trainer(method, source, config, run, evaluation=evaluation)
    trainer.fit()
    return method, trainer


NAN = float("nan")
QUALITY = [5.0, 3.0, 4.0, 2.0, NAN, 2.5, 2.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "best", "end"),
    [
        ({}, 16, 20),
        ({"patience": 3}, 8, 14),  # not a number, worse, and equal: none is better than step 8
        ({"patience": 2}, 8, 12),
        ({"patience": 1, "direction": "higher"}, 2, 4),
    ],
)
def test_the_best_is_kept_and_patience_ends_the_run(tmp_path: Path, settings, best: int, end: int) -> None:
    method, trainer = counting(tmp_path, QUALITY, **settings)
    assert trainer.step == end
    assert (tmp_path / f"checkpoint-{end}").exists()
    record = json.loads((tmp_path / "best/best.json").read_text())
    assert record == {"step": best, "error": QUALITY[best // 2 - 1]}
    assert float(load_file(tmp_path / "best/student.safetensors")["weight"]) == best
    assert method.value == end
    trainer.take_best()
    assert method.value == best
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation/error" in line] == list(range(2, end + 1, 2))


def test_what_is_not_a_number_is_no_best(tmp_path: Path) -> None:
    _, trainer = counting(tmp_path / "first", [NAN, 5.0, 4.0, *[6.0] * 7])
    assert (trainer.best.value, trainer.best.step) == (4.0, 6)
    method, trainer = counting(tmp_path / "all", [NAN] * 10, patience=4)
    assert trainer.step == 8
    trainer.take_best()
    assert method.value == 8
    assert not (tmp_path / "all/best").exists()


def test_a_resumed_run_remembers_its_best_and_its_patience(tmp_path: Path) -> None:
    def stopping(step, rng):
        if step == 10:
            raise KeyboardInterrupt
        return batches(step, rng)

    with pytest.raises(KeyboardInterrupt):
        counting(tmp_path, QUALITY, patience=3, source=stopping)
    _, trainer = counting(tmp_path, QUALITY, patience=3)
    assert (trainer.step, trainer.best.step) == (14, 8)
    _, again = counting(tmp_path, QUALITY, patience=3, source=lambda step, rng: pytest.fail("went on after its end"))
    assert again.step == 14
    with pytest.raises(UserError, match="monitored by 'error'"):
        counting(tmp_path, QUALITY, monitor="frechet")


def test_an_unknown_monitor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="measures error, and not 'frechet'"):
        counting(tmp_path, QUALITY, monitor="frechet")


def test_the_evaluation_sees_averaged_weights_in_evaluation_mode_and_the_training_does_not(tmp_path: Path) -> None:
    def trained(run: Path, **watched) -> tuple[Rivals, Trainer]:
        method = Rivals()
        trainer = Trainer(
            method, batches, rivals_config(), run, **{name: make(method) for name, make in watched.items()}
        )
        seen["trainer"] = trainer
        trainer.fit()
        return method, trainer

    seen: dict = {}

    def evaluate(method: Rivals):
        def measure() -> dict[str, float]:
            student = method.networks["student"]
            assert not any(module.training for network in method.networks.values() for module in network.modules())
            for name, average in seen["trainer"].emas["student"].shadow.items():
                assert torch.equal(student.state_dict()[name], average)
            return {"draw": float(torch.randn(()))}  # the default generator, carelessly

        return Evaluation(evaluate=measure, every=5, monitor="draw")

    plain, _ = trained(tmp_path / "plain")
    watched, trainer = trained(tmp_path / "watched", evaluation=evaluate)
    assert watched.networks["student"].training
    for role, network in plain.networks.items():
        for name, value in network.state_dict().items():
            assert torch.equal(watched.networks[role].state_dict()[name], value), (role, name)
    _, repeated = trained(tmp_path / "again", evaluation=evaluate)
    assert repeated.best.value == trainer.best.value


def rows(pixels: int = 8) -> dict[str, torch.Tensor]:
    colours = {"student": -1.0, "x0_real": 0.0, "x0_critic": 1.0}
    return {name: torch.full((2, 3, pixels, pixels), value) for name, value in colours.items()}


def test_sample_grids_are_drawn_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    grids = SampleGrid(every=5, draw=rows)
    Trainer(Rivals(), batches, rivals_config(), tmp_path, observers=[grids]).fit()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "0000005.png",
        "0000010.png",
        "0000012.png",
    ]
    image = Image.open(tmp_path / "samples/0000005.png").convert("RGB")
    # Three rows of two cells: black, grey, white at the right edge.
    heights = [round(image.height * share) for share in (1 / 6, 3 / 6, 5 / 6)]
    assert [image.getpixel((image.width - 20, height))[0] for height in heights] == [0, 128, 255]


def test_tensorboard_has_scalars_and_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    grids = SampleGrid(every=6, draw=rows)
    Trainer(Rivals(), batches, rivals_config(tensorboard=True), tmp_path, observers=[grids]).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("student/loss", "critic/gradient_norm", "learning_rate"):
        expected = {line["step"]: line[name] for line in lines if name in line}
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(expected)
    assert [event.step for event in events.Images("samples")] == [6, 12]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Trainer(Rivals(), batches, rivals_config(tensorboard=True), tmp_path).fit()
    Trainer(Rivals(), batches, rivals_config(), tmp_path).fit()
