"""The memory estimate is what a trainer then holds."""

import json

import pytest
import torch

from fastdistill.train.config import RoleConfig
from fastdistill.train.estimate import dry_run, memory
from fastdistill.train.trainer import Trainer
from tests.train.rivals import Blocks, Rivals, batches, rivals_config


def test_it_is_what_the_trainer_holds(tmp_path) -> None:
    method = Rivals()
    method.networks["teacher"].bfloat16()
    method.networks["critic"] = Blocks(width=9)
    config = rivals_config(roles={"critic": RoleConfig(ema_decay=None)})
    found = {(item.role, item.what): item.bytes for item in memory(method, config)}

    method.networks["teacher"].float()
    trainer = Trainer(method, batches, config, tmp_path)
    trainer.fit()
    method.networks["teacher"].bfloat16()
    held = {
        (role, "weights"): sum(value.nbytes for value in network.state_dict().values())
        for role, network in method.networks.items()
    }
    for role, optimizer in trainer.optimizers.items():
        slots = [value for slot in optimizer.state.values() for name, value in slot.items() if name != "step"]
        held[role, "two moments"] = sum(value.nbytes for value in slots)
    held |= {
        (role, "average"): sum(value.nbytes for value in ema.shadow.values()) for role, ema in trainer.emas.items()
    }
    # One role has gradients at a time, and the critic is the larger network.
    held["critic", "gradients"] = sum(parameter.nbytes for parameter in method.networks["critic"].parameters())
    assert found == held


def test_eight_bit_moments(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    method = Rivals(width=80)
    config = rivals_config(optimizer="adamw8bit")
    estimated = sum(item.bytes for item in memory(method, config) if item.role == "student" and "moments" in item.what)
    trainer = Trainer(method, batches, config, tmp_path)
    trainer.fit()
    slots = trainer.optimizers["student"].state.values()
    # The tables of 256 numbers are common to all.
    held = [
        value for slot in slots for name, value in slot.items() if name in ("state1", "state2", "absmax1", "absmax2")
    ]
    assert estimated == sum(value.nbytes for value in held)


def test_shares_of_a_large_network_on_the_meta_device() -> None:
    method = Rivals()
    with torch.device("meta"):
        method.networks = {role: Blocks(width=10_000, blocks=5) for role in method.networks}
    alone, shared = (memory(method, rivals_config(), processes) for processes in (1, 4))
    whole = sum(item.bytes for item in alone)
    together = sum(item.bytes for item in shared if item.what == "put together")
    assert sum(item.bytes for item in shared) - together == pytest.approx(whole / 4, rel=1e-6)
    outside, block = 3 * 10_000 + 10_000 + 3 * 10_000 + 3, 10_000 * 10_001
    assert together == 2 * (outside + 2 * block) * 4  # weights and gradients of one role


def test_a_dry_run_says_the_configuration_and_the_sum() -> None:
    text = dry_run(Rivals(), rivals_config(), processes=2)
    config, table = text.split("\n\n")
    assert json.loads(config)["roles"]["critic"]["learning_rate"] == 5e-2
    assert "in each of 2 processes" in table
    assert table.splitlines()[-1].startswith("in all")
