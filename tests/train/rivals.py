"""Method with all that the trainer has to keep: several roles, unequal turns, a target that nobody
trains, a phase, dropout.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.train.config import RoleConfig, TrainConfig
from fastdistill.train.ema import EMA
from fastdistill.train.method import Loss


class Blocks(nn.Module):
    """Residual blocks in a module list, as transformers have them; sizes that no number of
    processes divides.
    """

    def __init__(self, width: int = 5, dropout: float = 0.2, blocks: int = 2) -> None:
        super().__init__()
        self.into = nn.Linear(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout)) for _ in range(blocks)
        )
        self.out = nn.Linear(width, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.out(hidden) * self.scale


class Rivals:
    """`student` follows `teacher` and `target`, its own average, and flees `critic`, which follows
    it.
    """

    trains = ("student", "critic")

    def __init__(self, width: int = 5) -> None:
        torch.manual_seed(0)
        student = Blocks(width)
        critic, teacher = Blocks(width), Blocks(width, dropout=0)
        self.networks = {"student": student, "critic": critic, "teacher": teacher, "target": copy.deepcopy(student)}
        self.phase = 0
        self.draw = 0.0

    def turns(self, step: int) -> tuple[str, ...]:
        return ("student", "critic") if step % 2 == 0 else ("critic",)

    def before_step(self, step: int, rng: torch.Generator) -> None:
        self.draw = float(torch.rand(1, generator=rng))

    def loss(self, role: str, batch: Tensor, rng: torch.Generator) -> Loss:
        for other in self.trains:
            self.networks[other].requires_grad_(other == role)
        noise = self.draw * torch.randn(batch.shape, generator=rng)
        student = self.networks["student"](batch + noise)
        if role == "critic":
            return Loss(total=(self.networks["critic"](batch) - student).square().mean())
        with torch.no_grad():
            wanted = self.networks["teacher"](batch) + 0.1 * self.phase * self.networks["target"](batch)
        matched = (student - wanted).square().mean()
        rival = (student - self.networks["critic"](batch)).square().mean()
        return Loss(total=matched - 0.1 * rival, logs={"matched": matched})

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if "student" in self.turns(step):
            torch._foreach_lerp_(*([*self.networks[role].parameters()] for role in ("target", "student")), 0.3)
        if step % 5 == 4:
            self.phase += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"phase": torch.tensor(self.phase), **self.networks["target"].state_dict(prefix="target.")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        self.phase = int(state["phase"])
        with torch.no_grad():
            for name, tensor in self.networks["target"].state_dict(prefix="target.").items():
                tensor.copy_(state[name])


def batches(step: int, rng: torch.Generator) -> Tensor:
    return torch.randn(8, 3, generator=rng)


def rivals_config(**changes: Any) -> TrainConfig:
    settings = {
        "steps": 12, "learning_rate": 2e-2, "warmup_steps": 3, "clip_norm": 0.5, "micro_batches": 2,
        "checkpoint_every": 3,
        "log_every": 1, "roles": {"critic": RoleConfig(learning_rate=5e-2, schedule="constant", ema_decay=0.9)},
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


def weights(method: Any, emas: dict[str, EMA]) -> dict[str, Tensor]:
    """Everything that training has changed."""
    networks = {
        f"{role}.{name}": value
        for role, network in method.networks.items()
        for name, value in network.state_dict().items()
    }
    return networks | {f"{role}.ema.{name}": value for role, ema in emas.items() for name, value in ema.shadow.items()}


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.is_dir())


def die() -> None:
    """Die like a process under `kill -9`: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), 9)
