"""The contract between a training method and the one training loop.

A method is a plain object. It holds networks by role, says which role is updated when, and turns a batch into a loss. It owns no
optimizer, no device, no checkpoint and no loop: :class:`fastdistill.train.trainer.Trainer` has those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A scalar to differentiate, and detached scalars to log beside it."""

    total: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class StudentMethod:
    """The usual case of a :class:`Method`: the student alone is trained, in every step."""

    trains: Sequence[str] = ("student",)

    def turns(self, step: int) -> Sequence[str]:
        return self.trains

    def after_step(self, step: int) -> None:
        pass


class Method(Protocol):
    """What the trainer asks of a method."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Every network by role: ``student``, ``teacher``, ``fake``, ``discriminator``, ``target`` ..."""
        ...

    @property
    def trains(self) -> Sequence[str]:
        """The roles that have an optimizer; all other networks are frozen by the trainer."""
        ...

    def turns(self, step: int) -> Sequence[str]:
        """The roles to update in this step, in order."""
        ...

    def loss(self, role: str, batch: Any, rng: torch.Generator) -> Loss:
        """The loss of ``role`` on ``batch``. All randomness comes from ``rng``, so that a resumed run repeats the same bits."""
        ...

    def after_step(self, step: int) -> None:
        """Called after every step, for target networks and schedules."""
        ...
