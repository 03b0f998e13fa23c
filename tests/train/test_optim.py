"""Each role has the optimizer that was asked for."""

import sys

import pytest
import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.train import optim
from fastdistill.train.config import RoleConfig, TrainConfig
from fastdistill.train.learning_rate import learning_rate
from fastdistill.train.trainer import Trainer
from tests.train.rivals import Rivals, batches, rivals_config, weights

SCHEDULES = {
    "constant": {0: 0.25, 3: 1.0, 50: 1.0, 99: 1.0},
    "cosine": {0: 0.25, 3: 1.0, 4: 1.0, 52: 0.5, 99: 0.0002677},
    "wsd": {0: 0.25, 3: 1.0, 74: 1.0, 75: 1.0, 80: 0.8, 99: 0.04},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str) -> None:
    config = RoleConfig(learning_rate=1.0, warmup_steps=4, schedule=schedule)
    for step, expected in SCHEDULES[schedule].items():
        assert learning_rate(config, step, 100) == pytest.approx(expected, rel=1e-3), step


def test_roles_have_their_own_settings(tmp_path) -> None:
    critic = RoleConfig(
        learning_rate=5e-2, warmup_steps=1, betas=(0.0, 0.9), weight_decay=0.1, schedule="constant", ema_decay=None
    )
    trainer = Trainer(Rivals(), batches, rivals_config(steps=2, roles={"critic": critic}), tmp_path)
    trainer.fit()
    groups = {role: optimizer.param_groups[0] for role, optimizer in trainer.optimizers.items()}
    assert (groups["critic"]["lr"], groups["critic"]["betas"], groups["critic"]["weight_decay"]) == (
        5e-2,
        (0.0, 0.9),
        0.1,
    )
    assert groups["student"]["lr"] == pytest.approx(
        2e-2 / 3
    )  # the student's only turn was in the first of three steps of warm-up
    assert (groups["student"]["betas"], groups["student"]["weight_decay"]) == ((0.9, 0.99), 0.0)
    assert list(trainer.emas) == ["student"]


def test_a_role_that_is_not_trained_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no role 'critics'; did you mean 'critic'"):
        Trainer(Rivals(), batches, rivals_config(roles={"critics": RoleConfig()}), tmp_path)


def test_fused_adamw_is_the_formula() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, with the decay decoupled."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    config = RoleConfig(learning_rate=0.1, betas=(0.5, 0.8), weight_decay=0.3)
    optimizer = optim.build([parameter], config)
    expected, first, second = parameter.detach().clone().double(), torch.zeros(2).double(), torch.zeros(2).double()
    for step, gradient in enumerate(torch.tensor([[0.3, -1.0], [2.0, 0.1], [-0.5, 0.4]]), start=1):
        parameter.grad = gradient
        optimizer.step()
        first, second = 0.5 * first + 0.5 * gradient, 0.8 * second + 0.2 * gradient.square()
        corrected = (first / (1 - 0.5**step)) / ((second / (1 - 0.8**step)).sqrt() + 1e-8)
        expected = expected * (1 - 0.1 * 0.3) - 0.1 * corrected
    torch.testing.assert_close(parameter.detach(), expected.float())


class TestEightBit:
    """bitsandbytes quantises moments of tensors with 4096 numbers and more."""

    def setup_method(self) -> None:
        pytest.importorskip("bitsandbytes")

    def trained(self, optimizer: str, steps: int = 30) -> tuple[torch.optim.Optimizer, nn.Module, list[float]]:
        torch.manual_seed(0)
        network = nn.Linear(64, 64)
        built = optim.build(list(network.parameters()), RoleConfig(learning_rate=1e-2, optimizer=optimizer))
        x, y = torch.randn(32, 64), torch.randn(32, 64)
        losses = []
        for _ in range(steps):
            loss = (network(x) - y).square().mean()
            loss.backward()
            built.step()
            built.zero_grad()
            losses.append(float(loss.detach()))
        return built, network, losses

    def test_it_follows_adamw_with_moments_of_a_byte(self) -> None:
        optimizer, network, losses = self.trained("adamw8bit")
        assert losses == pytest.approx(self.trained("adamw")[2], rel=5e-2)
        assert losses[-1] < 0.3 * losses[0]
        large = optimizer.state[network.weight]
        assert large["state1"].dtype == large["state2"].dtype == torch.uint8

    def test_it_resumes_with_the_same_bits(self, tmp_path) -> None:
        def trained(run, source):
            method = Rivals(width=80)
            trainer = Trainer(method, source, rivals_config(optimizer="adamw8bit"), run)
            trainer.fit()
            return weights(method, trainer.emas), trainer

        def stopping(step, rng):
            if step == 8:
                raise RuntimeError
            return batches(step, rng)

        expected, trainer = trained(tmp_path / "whole", batches)
        assert any(slot["state1"].dtype == torch.uint8 for slot in trainer.optimizers["student"].state.values())
        with pytest.raises(RuntimeError):
            trained(tmp_path / "broken", stopping)
        result, _ = trained(tmp_path / "broken", batches)
        assert all(torch.equal(result[name], value) for name, value in expected.items())


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        optim.build([nn.Parameter(torch.zeros(2))], RoleConfig(optimizer="adamw8bit"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("micro_batches", 0),
        ("keep_checkpoints", 0),
        ("checkpoint_every", 0),
        ("learning_rate", 0.0),
        ("clip_norm", -1.0),
    ],
)
def test_bad_configuration_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        TrainConfig(**({"steps": 3} | {name: value}))
