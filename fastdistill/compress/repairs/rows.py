"""Data of the closed-form repairs, chunk by chunk: the last linear layer of a block, its gate, and
what its output lacks.

A block ends in `h_out = h + g * (W z + b)` with a gate `g` (D,) from the time and the pooled
prompt. What is missing to the full model, `r = h_target - h_out`, is to be made up by other `W` and
`b`: for fixed `z` and `g` they enter linearly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.compress.repairs.damage import Damage, Span
from fastdistill.models.blocks import block, block_ids
from fastdistill.models.families.family import BlockId, Closing, Family
from fastdistill.models.hooks import Streams, captured, skipped


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One closing on one chunk, float32: `z` (B, S, K), `gate` (B, D) and `missing` (B, S, D), over
    the tokens that matter."""

    z: Tensor
    gate: Tensor
    missing: Tensor | None
    """`None` if it was not asked for, as it takes the full model."""


def linears(damage: Damage, span: Span) -> list[nn.Linear]:
    """The last linear layers of the block, in the order of `watch`."""
    own = block(damage.student, span.block)
    found = []
    for closing in _closings(damage, span):
        linear = own.get_submodule(closing.linear)
        assert isinstance(linear, nn.Linear)
        found.append(linear)
    return found


@torch.no_grad()
def watch(damage: Damage, span: Span, *, missing: bool = True) -> Iterator[list[Rows]]:
    """Yields for every chunk the rows of every closing of the block.

    One chunk is held at a time, and no block after the ones that are looked at runs.
    """
    closings = _closings(damage, span)
    with (
        _up_to(damage.student, damage.family, span.block) as own,
        _up_to(damage.teacher, damage.family, span.target) as full,
        _tapped(block(damage.student, span.block), closings) as taps,
    ):
        for x_t, t, conditioning in damage.chunks():
            damage.family.predict(damage.student, x_t, t, conditioning)
            if missing:
                damage.family.predict(damage.teacher, x_t, t, conditioning)
            have = own[span.block]
            chunk = []
            for closing, tap in zip(closings, taps, strict=True):
                # Tokens of a stream that nothing reads would only take from the fit of the others.
                read = [stream for stream in closing.streams if stream != "text" or not span.at_end]
                z = dict(
                    zip(
                        closing.streams,
                        tap["z"].split([have[stream].shape[1] for stream in closing.streams], dim=1),
                        strict=True,
                    )
                )
                lacks = None
                if missing:
                    lacks = torch.cat(
                        [full[span.target][stream].float() - have[stream].float() for stream in read], dim=1
                    )
                chunk.append(
                    Rows(
                        z=torch.cat([z[stream] for stream in read], dim=1).float(),
                        gate=tap["gate"].float(),
                        missing=lacks,
                    )
                )
            yield chunk


def _closings(damage: Damage, span: Span) -> Sequence[Closing]:
    closings = damage.family.stack(span.block.stack).closings
    return [closing for closing in closings if not span.at_end or closing.streams != ("text",)]


@contextmanager
def _up_to(network: nn.Module, family: Family, last: BlockId) -> Iterator[dict[BlockId, Streams]]:
    """Yields the output of `last`, by stream, in the latest forward pass; the blocks after it do
    not run."""
    blocks = block_ids(network, family)
    with skipped(network, family, blocks[blocks.index(last) + 1 :]), captured(network, family, [last]) as outputs:
        yield outputs


@contextmanager
def _tapped(own: nn.Module, closings: Sequence[Closing]) -> Iterator[list[dict[str, Tensor]]]:
    """Yields the input of each closing's linear layer, and the gate that its norm makes, in the
    latest forward pass."""
    taps: list[dict[str, Tensor]] = [{} for _ in closings]

    def keep_z(tap: dict[str, Tensor]) -> Any:
        return lambda _module, args: tap.__setitem__("z", args[0])

    def keep_gate(tap: dict[str, Tensor], place: int) -> Any:
        return lambda _module, _args, output: tap.__setitem__("gate", output[place])

    with ExitStack() as stack:
        for closing, tap in zip(closings, taps, strict=True):
            stack.callback(own.get_submodule(closing.linear).register_forward_pre_hook(keep_z(tap)).remove)
            stack.callback(own.get_submodule(closing.norm).register_forward_hook(keep_gate(tap, closing.gate)).remove)
        yield taps
