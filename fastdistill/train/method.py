"""The contract between a training method and the one training loop.

A method is a plain object. It holds networks by role, says which role is updated when, and turns a
batch into a loss. It owns no
optimizer, no device, no checkpoint and no loop: `Trainer` has those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A scalar to differentiate, and detached scalars to log with it."""

    total: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


def give_turn(role: str, trained: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Leave gradients to `role` among the `trained` parameters of all roles, as a loss may lead
    through the networks of other roles.

    Gradients of the others stay off until the next turn: a recomputed forward pass (gradient
    checkpointing) has to find what the first one found.
    """
    for parameters in trained.values():
        for parameter in parameters:
            parameter.requires_grad_(False)
    for parameter in trained[role]:
        parameter.requires_grad_(True)


class StudentMethod:
    """The usual case of a `Method`: the student alone is trained, in every step."""

    trains: Sequence[str] = ("student",)

    def turns(self, step: int) -> Sequence[str]:
        return self.trains

    def after_step(self, step: int) -> None:
        pass


class Method(Protocol):
    """Contract between the trainer and a method."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Every network by role: `student`, `teacher`, `critic`, `discriminator`, `target` ..."""
        ...

    @property
    def trains(self) -> Sequence[str]:
        """The roles that have an optimizer; all other networks are frozen by the trainer."""
        ...

    def turns(self, step: int) -> Sequence[str]:
        """The roles to update in this step, in order."""
        ...

    def loss(self, role: str, batch: Any, rng: torch.Generator) -> Loss:
        """The loss of `role` on `batch`, whose parameters alone require gradients during its turn.

        All randomness comes from `rng`, so that a resumed run repeats the same bits.
        """
        ...

    def after_step(self, step: int) -> None:
        """Called after every step, for target networks and schedules."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A method that may add this, if more than the trained roles changes: a target network, the
    phase of progressive distillation."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """State that a checkpoint has to hold in addition to the trained roles; numbers as tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned, or from nothing."""
        ...


@runtime_checkable
class BeforeStep(Protocol):
    """A method that may add this, if it draws how often a network is called: processes that share
    its weights have to agree."""

    def before_step(self, step: int, rng: torch.Generator) -> None:
        """Called before the turns of a step. `rng` gives the same to every process and to every
        part of the batch."""
        ...
