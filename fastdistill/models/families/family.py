"""Contract of a model family, in two parts.

`Anatomy` has what cutting needs: the block lists, and what follows a block that goes. Every family
has one. `Family` adds what sampling, scoring and recovery need. Methods and scores call a network
only through `Family.predict`, so that the number of methods and the number of families add up
instead of multiplying.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Encoded prompts: token embeddings (B, L, C) and a pooled embedding (B, P).

    A model that embeds guidance has the scale (B,) in `guidance`.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    guidance: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        guidance = None if self.guidance is None else self.guidance[index]
        return Conditioning(
            prompt_embeds=self.prompt_embeds[index],
            pooled_prompt_embeds=self.pooled_prompt_embeds[index],
            guidance=guidance,
        )

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """Concatenate `parts` along the batch."""
        guidance = [part.guidance for part in parts if part.guidance is not None]
        return Conditioning(
            prompt_embeds=torch.cat([part.prompt_embeds for part in parts]),
            pooled_prompt_embeds=torch.cat([part.pooled_prompt_embeds for part in parts]),
            guidance=torch.cat(guidance) if guidance else None,
        )


@dataclass(frozen=True, kw_only=True, order=True)
class BlockId:
    """Name of a transformer block: the `ModuleList` it is in, and its index there."""

    stack: str
    index: int


@dataclass(frozen=True, kw_only=True)
class Closing:
    """Last linear layer of a block on the way to some of its streams, by names inside the block.

    `h_out = h + gate * linear(z)`.
    """

    linear: str
    norm: str
    """Adaptive layer norm that computes the gate (B, D) ..."""
    gate: int
    """... and the place of the gate among the outputs of the norm."""
    streams: tuple[str, ...]
    """Streams that the layer writes to; the tokens of several streams come in this order."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """List of equal blocks.

    Stacks that share a `config_field` must lose equally many, as the field counts the blocks of
    each.
    """

    attribute: str
    """Name of the list in the transformer, dotted if it is inside another module."""
    config_field: str
    short: str
    """Name that a user types."""
    pass_through: Callable[..., Any]
    """Forward of a block that returns its inputs as its output, such as `both_streams`."""
    closings: tuple[Closing, ...] = ()
    """Layers that a repair may refit; none: unknown."""


def both_streams(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Pass through a block that takes image and text, and returns text and image."""
    return encoder_hidden_states, hidden_states


def one_stream(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Pass through a block with one stream, under any conditioning."""
    return hidden_states


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Size of one forward pass: latents of `height` x `width`, text tokens, and samples."""

    height: int
    width: int
    text_tokens: int
    batch: int = 1


def noise(network: Any, *shape: int) -> Tensor:
    """Standard normal numbers in the dtype and on the device of `network`."""
    return torch.randn(*shape, dtype=network.dtype, device=network.device)


class Anatomy(ABC):
    """Block lists and inputs of one class of diffusers transformers, and what follows a cut."""

    name: str
    stacks: tuple[Stack, ...]
    """Block lists in the order of the forward pass."""
    vae_scale_factor: int = 8
    """Number of pixels along the side of a latent, with the autoencoder that the family is
    published with."""
    remark: str = ""
    """Remark for the user on costs of a cut model other than the costs of its blocks."""

    def stack(self, attribute: str) -> Stack:
        """Block list by the name of its attribute."""
        return next(stack for stack in self.stacks if stack.attribute == attribute)

    def adapt_to_cut(  # noqa: B027
        self, source: nn.Module, kept: Mapping[str, Sequence[int]], config: dict[str, Any], state: dict[str, Tensor]
    ) -> None:
        """Change, in place, what depends on a block's place other than its name.

        By default nothing does.

        Args:
            source: the whole transformer, which stays as it is.
            kept: the kept indices of each stack, rising; their places in the list are the new
                indices.
            config: config of the cut transformer, with the new counts.
            state: state dict of the cut transformer, with the new names and tensors of its own.
        """

    def full_size_twins(self, network: nn.Module) -> Mapping[BlockId, BlockId]:
        """Block of full size for each block that is smaller only because of its place.

        Any block in that place is smaller. The twin has the size that the block would have
        elsewhere.
        """
        return {}

    @abstractmethod
    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        """Arguments of `network` for text to image, in the shapes of its pipeline.

        They have the dtype of the network, and are on its device.
        """


class Predicts(Protocol):
    """Part of a family that a training method needs: to call a network.

    A family of toy networks has no more.
    """

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Output of `network` at `x_t` (B, ...) and `t` (B,)."""
        ...


class HasStacks(Protocol):
    """A family that knows the block lists of its networks."""

    @property
    def stacks(self) -> tuple[Stack, ...]: ...

    def stack(self, attribute: str) -> Stack: ...


@runtime_checkable
class ReadsBlocks(Predicts, HasStacks, Protocol):
    """A family that can call its networks and read what their blocks return."""

    def streams(self, block_output: Any) -> Mapping[str, Tensor]: ...


class Family(Anatomy):
    """Family that can be sampled, scored and recovered.

    Latents are (B, C, H, W) in the scale that the transformer is trained on.
    """

    @abstractmethod
    def encode_prompts(
        self, pipeline: Any, prompts: list[str], guidance_scale: float, max_sequence_length: int
    ) -> Conditioning:
        """Conditioning of `prompts`."""

    @abstractmethod
    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """Latents of images (B, 3, H, W) in [-1, 1]: the mode of the autoencoder's distribution."""

    @abstractmethod
    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents, in about [-1, 1]."""

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `dx_t/dt` at `t` (B,) in [0, 1], in the shape and dtype of `x_t`.

        The network may have another dtype.
        """

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
        """Sample from `noise` by the pipeline itself.

        Returns:
            The `steps + 1` states, noise first, and their times (steps + 1,).
        """

    @abstractmethod
    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, H, W) of the latents of a `height` x `width` pixel image."""

    @abstractmethod
    def streams(self, block_output: Any) -> Mapping[str, Tensor]:
        """Output of a block by stream: `image` and `text`, each (B, S, D)."""
