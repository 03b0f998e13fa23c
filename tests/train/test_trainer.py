"""The training loop: what it computes, and that an interrupted run ends with the same bits."""

import json

import pytest
import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.train import checkpoint
from fastdistill.train.config import TrainConfig
from fastdistill.train.ema import EMA
from fastdistill.train.method import Loss, StudentMethod
from fastdistill.train.trainer import Diverged, Trainer


class Regression(StudentMethod):
    """Fits `student` to a fixed linear map; `teacher` is there to be left alone."""

    def __init__(self):
        torch.manual_seed(0)
        self.networks = {"student": nn.Linear(4, 3), "teacher": nn.Linear(4, 3)}

    def loss(self, role, batch, rng):
        noisy = batch + 0.1 * torch.randn(batch.shape, generator=rng)
        with torch.no_grad():
            target = self.networks["teacher"](batch)
        return Loss(total=(self.networks["student"](noisy) - target).square().mean())


def batches(step, generator):
    return torch.randn(8, 4, generator=generator)


def config(**changes):
    return TrainConfig(
        **({"steps": 30, "learning_rate": 1e-2, "warmup_steps": 5, "checkpoint_every": 7, "log_every": 10} | changes)
    )


def trained(run, source=batches, **changes):
    trainer = Trainer(Regression(), source, config(**changes), run)
    trainer.fit()
    return trainer


def weights(trainer):
    return {
        **trainer.method.networks["student"].state_dict(),
        **{f"ema.{k}": v for k, v in trainer.emas["student"].shadow.items()},
    }


def test_it_learns(tmp_path):
    trainer = trained(tmp_path, steps=300, learning_rate=3e-2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 300
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]
    assert trainer.step == 300


@pytest.mark.parametrize("stop_at", [3, 7, 20])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, stop_at, error):
    expected = weights(trained(tmp_path / "whole"))

    def interrupted(step, generator):
        if step == stop_at:
            raise error
        return batches(step, generator)

    with pytest.raises(error):
        trained(tmp_path / "broken", interrupted)
    resumed = trained(tmp_path / "broken")
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30]


class Noiseless(Regression):
    def loss(self, role, batch, rng):
        return Loss(total=(self.networks["student"](batch) - self.networks["teacher"](batch)).square().mean())


class OfBatch(Regression):
    """A loss of the batch as a whole, which is not the mean of those of its parts."""

    def loss(self, role, batch, rng):
        return Loss(total=self.networks["student"](batch).std(dim=0).mean())


@pytest.mark.parametrize(
    ("method", "micro_batches", "equal"), [(Noiseless, 2, True), (Noiseless, 8, True), (OfBatch, 2, False)]
)
def test_the_parts_of_a_batch_make_the_gradient_of_all_of_it(tmp_path, method, micro_batches, equal):
    def seen(parts):
        Trainer(method(), batches, config(steps=8, log_every=1, micro_batches=parts), tmp_path / str(parts)).fit()
        lines = [json.loads(line) for line in (tmp_path / str(parts) / "metrics.jsonl").read_text().splitlines()]
        return [line[name] for line in lines for name in ("loss", "gradient_norm")]

    assert (seen(micro_batches) == pytest.approx(seen(1), rel=1e-5)) == equal


def test_parts_have_noise_of_their_own_and_agree_where_they_have_to(tmp_path):
    class Drawing(Regression):
        def __init__(self):
            super().__init__()
            self.agreed, self.noise, self.careless = [], [], []

        def before_step(self, step, rng):
            self.agreed.append(float(torch.rand(1, generator=rng)))

        def loss(self, role, batch, rng):
            self.careless.append(float(torch.rand(1)))
            self.noise.append(float(torch.rand(1, generator=rng)))
            return super().loss(role, batch, rng)

    def drawn(parts):
        method = Drawing()
        Trainer(method, batches, config(steps=4, micro_batches=parts), tmp_path / str(parts)).fit()
        return method

    whole, cut = drawn(1), drawn(4)
    assert whole.agreed == cut.agreed
    assert len(set(cut.agreed)) == 4
    assert cut.noise[::4] == whole.noise
    assert len({*cut.noise, *cut.careless, *cut.agreed}) == 16 + 16 + 4


@pytest.mark.parametrize("order", [("student", "critic"), ("critic", "student")])
def test_what_a_loss_leaves_in_the_network_of_another_role_is_not_its_gradient(tmp_path, order):
    class Followed(Regression):
        trains = order

        def __init__(self, careful):
            super().__init__()
            self.networks["critic"], self.careful = nn.Linear(4, 3), careful

        def loss(self, role, batch, rng):
            if role == "student":
                return super().loss(role, batch, rng)
            student = self.networks["student"](batch)
            return Loss(
                total=100
                * (self.networks["critic"](batch) - (student.detach() if self.careful else student)).square().mean()
            )

    careful, careless = Followed(True), Followed(False)
    for name, method in {"careful": careful, "careless": careless}.items():
        Trainer(method, batches, config(), tmp_path / name).fit()
    for role in order:
        for expected, parameter in zip(
            careful.networks[role].parameters(), careless.networks[role].parameters(), strict=True
        ):
            assert torch.equal(parameter, expected)


def test_a_callers_generator_is_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    method = Regression()
    torch.manual_seed(3)
    Trainer(method, batches, config(steps=3), tmp_path).fit()
    assert torch.equal(torch.rand(1), expected)


def test_only_the_trained_role_changes(tmp_path):
    before = {name: value.clone() for name, value in Regression().networks["teacher"].state_dict().items()}
    trainer = trained(tmp_path)
    assert not any(parameter.requires_grad for parameter in trainer.method.networks["teacher"].parameters())
    for name, value in trainer.method.networks["teacher"].state_dict().items():
        assert torch.equal(value, before[name])


def test_nan_stops_before_it_reaches_the_weights(tmp_path):
    def poisoned(step, generator):
        return batches(step, generator) * (float("nan") if step == 8 else 1)

    with pytest.raises(Diverged, match="step 8"):
        trained(tmp_path, poisoned)
    state = checkpoint.latest(tmp_path)
    assert state is not None
    assert state.name == "checkpoint-7"


def test_another_configuration_is_refused(tmp_path):
    trained(tmp_path, steps=7)
    with pytest.raises(UserError, match="learning_rate"):
        trained(tmp_path, steps=7, learning_rate=5e-2)


def test_half_a_line_of_the_log_does_not_stop_a_resumed_run(tmp_path):
    trained(tmp_path, steps=20, schedule="wsd")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    trained(tmp_path, steps=30, schedule="wsd")
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20, 30]


def test_a_failed_write_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    trainer = trained(tmp_path, steps=7)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    trainer.step = 8
    with pytest.raises(OSError, match="No space"):
        trainer.save()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-7"]


def test_ema_is_the_recursion_and_undoes_itself():
    network = nn.Linear(2, 2)
    ema = EMA(network, decay=0.9)
    expected = network.weight.detach().clone()
    for update in range(1, 30):
        with torch.no_grad():
            network.weight.add_(torch.randn(2, 2))
        ema.update(network)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(ema.shadow["weight"], expected)
    trained_weight = network.weight.detach().clone()
    with ema.applied(network):
        torch.testing.assert_close(network.weight, expected)
    assert torch.equal(network.weight, trained_weight)
