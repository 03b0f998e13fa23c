"""What the rest of the project asks of a model family: load it, call it, know its blocks.

Methods and scores call a network only through :meth:`Family.predict`, so that their number and the number of families add up instead
of multiplying.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a prompt becomes: token embeddings (B, L, C), a pooled embedding (B, P), and the embedded guidance (B,) if the model has one."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    guidance: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        guidance = None if self.guidance is None else self.guidance[index]
        return Conditioning(
            prompt_embeds=self.prompt_embeds[index], pooled_prompt_embeds=self.pooled_prompt_embeds[index], guidance=guidance
        )

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        guidance = [part.guidance for part in parts if part.guidance is not None]
        return Conditioning(
            prompt_embeds=torch.cat([part.prompt_embeds for part in parts]),
            pooled_prompt_embeds=torch.cat([part.pooled_prompt_embeds for part in parts]),
            guidance=torch.cat(guidance) if guidance else None,
        )


@dataclass(frozen=True, kw_only=True, order=True)
class BlockId:
    """A transformer block: the ``ModuleList`` it is in and its index there."""

    stack: str
    index: int


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A list of equal blocks: its attribute, the config field that counts it, and the short name a user types."""

    attribute: str
    config_field: str
    short: str


class Family(Protocol):
    """One family of diffusers transformers. Latents are (B, C, H, W) in the scale that the transformer is trained on."""

    name: str
    stacks: tuple[Stack, ...]
    """In the order in which the forward pass runs through them."""

    def encode_prompts(self, pipeline: Any, prompts: list[str], guidance_scale: float, max_sequence_length: int) -> Conditioning: ...

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity ``dx_t/dt`` at ``t`` (B,) in [0, 1], in the shape of ``x_t``."""
        ...

    def trajectory(
        self,
        pipeline: Any,
        noise: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        *,
        steps: int,
        true_cfg_scale: float,
        guidance_scale: float,
    ) -> tuple[list[Tensor], Tensor]:
        """The pipeline's own sampling from ``noise``: its ``steps + 1`` states, noise first, and their times (steps + 1,)."""
        ...

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a ``height`` x ``width`` pixel picture."""
        ...

    def streams(self, block_output: Any) -> Mapping[str, Tensor]:
        """What a block hands to the next, by stream: ``image`` and ``text``, each (B, S, D)."""
        ...

    @property
    def pass_through(self) -> Callable[..., Any]:
        """A block's forward that returns its inputs as its output."""
        ...
