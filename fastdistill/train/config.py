"""Configuration of a training run: how to train. The method says what to train."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from fastdistill.errors import UserError

Schedule = Literal["constant", "cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """Configuration of one role: its optimizer, gradients and averaged weights."""

    learning_rate: float = 1e-4
    warmup_steps: int = 20
    """Steps of linear warm-up from zero."""
    schedule: Schedule = "cosine"
    """Learning rate after warm-up: constant; cosine to zero at `steps`; or constant and, over the
    last quarter, linear to zero (`wsd`: warm-up, stable, decay; Hu et al. 2024). A `wsd` run alone
    can be resumed with another number of `steps` before its decay begins. Any run that has ended
    can be trained on with more `steps`: it is warmed up again, and is then where a run of so many
    steps would be."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps both moments in a byte each (Dettmers et al. 2022); it needs bitsandbytes
    and a single process."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Bound of the gradient norm; larger gradients are scaled down."""
    ema_decay: float | None = 0.999
    """Decay of the averaged weights, which are the result of the run. None: no average, which saves
    the memory of one set of weights."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError("learning_rate and clip_norm must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RoleConfig):
    """Configuration of a whole run.

    Settings of `RoleConfig` hold here for every role that is not in `roles`.
    """

    steps: int
    """Optimizer steps."""
    roles: Mapping[str, RoleConfig] = field(default_factory=dict)
    """Roles with a configuration of their own, such as the critic of DMD2 with its own learning
    rate."""
    micro_batches: int = 1
    """Number of equal parts into which a step's batch is cut, and whose gradients are averaged.
    Fewer samples are in memory at a time; under torchrun the processes share the parts. The noise
    is drawn for each part: a result depends on this number, not on the number of processes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the forward pass: `bf16` runs it under autocast; weights and optimizer stay
    float32."""
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    checkpoint_minutes: float = 0.0
    """Minutes after which a checkpoint is written, too, whatever the step; 0: by steps alone. A
    checkpoint waits until ten times the time has passed that the last one took to write."""
    keep_checkpoints: int = 1
    """Number of checkpoints to keep, the newest."""
    tensorboard: bool = False
    """Whether to write scalars and images for TensorBoard, too, in `tensorboard/` of the run's
    folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "micro_batches", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.checkpoint_minutes >= 0:
            raise ValueError(f"checkpoint_minutes must be at least 0, got {self.checkpoint_minutes}")

    def of(self, role: str) -> RoleConfig:
        """Return the configuration of `role`."""
        return self.roles.get(role, self)

    def check_roles(self, trained: Collection[str]) -> None:
        """Raise `UserError` if `roles` names a role that is not among the `trained`."""
        for role in self.roles:
            if role not in trained:
                nearest = get_close_matches(role, trained, n=1, cutoff=0)[0]
                raise UserError(
                    f"the method trains no role {role!r}; did you mean {nearest!r}? It trains {', '.join(trained)}"
                )

    def free(self, trained: Collection[str]) -> set[str]:
        """Settings that may change when a run is resumed: no result so far depends on them."""
        free = {"log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "tensorboard"}
        return free | ({"steps"} if all(self.of(role).schedule == "wsd" for role in trained) else set())
