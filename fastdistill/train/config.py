"""How to train; what to train is the method's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from fastdistill.errors import UserError

Schedule = Literal["constant", "cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """The optimizer of one role, and what is done with its gradients and weights."""

    learning_rate: float = 1e-4
    warmup_steps: int = 20
    """Steps of linear warm-up from zero."""
    schedule: Schedule = "cosine"
    """After warm-up: constant; cosine to zero at `steps`; or constant and, over the last quarter, linear to zero (warm-up, stable,
    decay; Hu et al. 2024), which alone lets a run be resumed with another number of `steps` before its decay begins."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps both moments in a byte each (Dettmers et al. 2022); it needs bitsandbytes and a single process."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down."""
    ema_decay: float | None = 0.999
    """Decay of the averaged weights, which are the result of the run; None: no average, and the memory of one set of weights less."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError("learning_rate and clip_norm must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RoleConfig):
    """A whole run. What a role may have settings of its own for holds for every role that is not in `roles`."""

    steps: int
    """Optimizer steps."""
    roles: Mapping[str, RoleConfig] = field(default_factory=dict)
    """Roles that are trained otherwise, as the critic of DMD2 with its own learning rate."""
    micro_batches: int = 1
    """Equal parts into which a step's batch is cut, whose gradients are averaged. Fewer samples are in memory at a time; under torchrun
    the processes share the parts. The noise is drawn for each part, so it is this number that a result depends on, not the processes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the forward pass under autocast; weights and optimizer stay float32."""
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    keep_checkpoints: int = 1
    """The newest so many are kept."""
    tensorboard: bool = False
    """Scalars and images for TensorBoard, too, in `tensorboard/` of the run's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "micro_batches", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def of(self, role: str) -> RoleConfig:
        return self.roles.get(role, self)

    def check_roles(self, trained: Collection[str]) -> None:
        """Raise `UserError` if `roles` names one that is not among the `trained`."""
        for role in self.roles:
            if role not in trained:
                nearest = get_close_matches(role, trained, n=1, cutoff=0)[0]
                raise UserError(f"the method trains no role {role!r}; did you mean {nearest!r}? It trains {', '.join(trained)}")

    def free(self, trained: Collection[str]) -> set[str]:
        """The settings that may change when a run is resumed, as they do not change what has been computed so far."""
        free = {"log_every", "checkpoint_every", "keep_checkpoints", "tensorboard"}
        return free | ({"steps"} if all(self.of(role).schedule == "wsd" for role in trained) else set())
