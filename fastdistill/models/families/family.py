"""What the rest of the project asks of a model family, in two parts.

`Anatomy` is what cutting needs: the block lists, and what follows a block that goes. Every family has it. `Family` adds
what sampling, scoring and recovery need. Methods and scores call a network only through `Family.predict`, so that their number and
the number of families add up instead of multiplying.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    """A transformer block: the `ModuleList` it is in and its index there."""

    stack: str
    index: int


@dataclass(frozen=True, kw_only=True)
class Closing:
    """The last linear layer of a block on the way to some of its streams, `h_out = h + gate * linear(z)`; by names inside the block."""

    linear: str
    norm: str
    """The adaptive layer norm that computes the gate (B, D) ..."""
    gate: int
    """... and its place among what that returns."""
    streams: tuple[str, ...]
    """What the layer writes to; of several, their tokens in this order."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A list of equal blocks. Stacks that share a `config_field` must lose equally many, as that field counts the blocks of each."""

    attribute: str
    """Where the list is, dotted if inside another module."""
    config_field: str
    short: str
    """What a user types."""
    pass_through: Callable[..., Any]
    """A block's forward that returns its inputs as its output, one of those below."""
    closings: tuple[Closing, ...] = ()
    """What a repair may refit; none: unknown."""


def both_streams(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Pass through a block that takes image and text, and returns text and image."""
    return encoder_hidden_states, hidden_states


def one_stream(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Pass through a block with one stream, whatever conditions it."""
    return hidden_states


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one forward pass works on: latents of `height` x `width`, so many text tokens, and so many samples."""

    height: int
    width: int
    text_tokens: int
    batch: int = 1


def noise(network: Any, *shape: int) -> Tensor:
    """Standard normal numbers in the dtype and on the device of `network`."""
    return torch.randn(*shape, dtype=network.dtype, device=network.device)


class Anatomy(ABC):
    """The block lists of one class of diffusers transformers, what it takes, and how its config and weights follow a cut."""

    name: str
    stacks: tuple[Stack, ...]
    """In the order in which the forward pass runs through them."""
    vae_scale_factor: int = 8
    """Pixels along the side of a latent, with the autoencoder that the family is published with."""
    remark: str = ""
    """What a cut costs beside its blocks' costs, in words for the user."""

    def stack(self, attribute: str) -> Stack:
        return next(stack for stack in self.stacks if stack.attribute == attribute)

    def adapt_to_cut(self, source: nn.Module, kept: Mapping[str, Sequence[int]], config: dict[str, Any], state: dict[str, Tensor]) -> None:  # noqa: B027
        """Change, in place, what depends on a block's place beside its name: nothing, unless a family says otherwise.

        Args:
            source: the whole transformer, which stays as it is.
            kept: the kept indices of each stack, rising; their places in the list are the new indices.
            config: of the cut transformer, with the new counts.
            state: its state dict, with the new names and tensors of its own.
        """

    def full_size_twins(self, network: nn.Module) -> Mapping[BlockId, BlockId]:
        """For each block that its place makes smaller, one of the size it would have elsewhere. Whichever block is there is smaller."""
        return {}

    @abstractmethod
    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        """Arguments of `network` with the shapes that its pipeline gives them for text to image, in its dtype and on its device."""


class Predicts(Protocol):
    """What a training method asks of a family: to call a network. Toy networks need no more of one."""

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor: ...


class Family(Anatomy):
    """A family that can be sampled, scored and recovered. Latents are (B, C, H, W) in the scale that the transformer is trained on."""

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: list[str], guidance_scale: float, max_sequence_length: int) -> Conditioning: ...

    @abstractmethod
    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """Latents of images (B, 3, H, W) in [-1, 1], the mode of what the autoencoder makes of each."""

    @abstractmethod
    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], about, of latents."""

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity `dx_t/dt` at `t` (B,) in [0, 1], in the shape and dtype of `x_t`, whatever those of the network are."""

    @abstractmethod
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
        """The pipeline's own sampling from `noise`: its `steps + 1` states, noise first, and their times (steps + 1,)."""

    @abstractmethod
    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a `height` x `width` pixel image."""

    @abstractmethod
    def streams(self, block_output: Any) -> Mapping[str, Tensor]:
        """What a block hands to the next, by stream: `image` and `text`, each (B, S, D)."""
