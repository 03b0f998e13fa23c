"""Linear probes over intervals of blocks (PPCL, "Pluggable Pruning with Contiguous Layer
Distillation", the detection of intervals).

A block is probed by the linear map that replaces it best, a run of blocks by the product of their
probes. As long as the product stays like what really leaves the run, one block can learn to stand
for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastdistill.compress.importance.cka import Grams, distance
from fastdistill.compress.importance.criterion import Material
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import captured, captured_inputs

TOKENS = 8192
RIDGE = 1e-6


@torch.no_grad()
def boundaries(network: nn.Module, family: Family, material: Material) -> Tensor:
    """Image stream before every block and after the last: (blocks + 1, N, tokens, D) float32 on
    CPU, at tokens the seed chooses."""
    blocks = block_ids(network, family)
    rng = torch.Generator().manual_seed(material.seed)
    chunks = []
    for part in material.points.chunks(material.batch):
        with captured_inputs(network, family, blocks) as before, captured(network, family, blocks[-1:]) as after:
            family.predict(network, part.x_t, part.t, part.conditioning)
        streams = [*(before[block_id]["image"] for block_id in blocks), after[blocks[-1]]["image"]]
        available = streams[0].shape[1]
        each = min(available, -(-TOKENS // len(material.points)))
        chosen = torch.stack([torch.randperm(available, generator=rng)[:each] for _ in range(len(part))])
        rows = torch.arange(len(part))[:, None]
        chunks.append(torch.stack([stream[rows, chosen].float().cpu() for stream in streams]))
    return torch.cat(chunks, dim=1)


def probe(x: Tensor, z: Tensor) -> Tensor:
    """The linear map W (D, D) that minimises `||x W - z||^2`, of centred tokens; a little ridge
    where x does not span its space."""
    gram = x.mT @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    w: Tensor = torch.linalg.solve(gram, x.mT @ z)
    return w


def intervals(blocks: int, distances: Callable[[int], Iterator[float]]) -> list[range]:
    """Cut 0 .. blocks - 1 into intervals, each as long as it gets no worse at a rising pace.

    `distances(u)` gives, for k = u, u + 1, ..., 1 - CKA of the true and the surrogate output of
    blocks u .. k. The interval from u ends before the first k with `D(u, k) > D(u, k - 1)`, where D
    is what block k adds to it.
    """
    found: list[range] = []
    u = 0
    while u < blocks:
        end, reached, added = u, 0.0, math.inf
        for distance_to_end in distances(u):
            if distance_to_end - reached > added:
                break
            reached, added = distance_to_end, distance_to_end - reached
            end += 1
        found.append(range(u, end))
        u = end
    return found


def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """`1 - CKA(block, its probe)`, and 1 more for the first block of each interval, which stays to
    stand for the others.

    So the blocks that another stands for go first, the most linear of them before all; the heads of
    the intervals only when no others are left. PPCL knows no budget and drops exactly the former.
    The probes are solved on the even points and compared on the odd ones; PPCL polishes them by
    gradient descent on the same loss, which is left out. Costs one pass over the points and one or
    two linear systems a block, and holds 8192 tokens a block in main memory, 6 GB for FLUX.1. A
    scoring that is killed begins again.
    """
    blocks = block_ids(network, family)
    ledger.expect(1)
    if "all" not in ledger:
        ledger.keep("all", probed(boundaries(network, family, material), material.points.x_t.device))
    return dict(zip(blocks, ledger["all"], strict=True))


def probed(streams: Tensor, device: torch.device) -> list[float]:
    """The scores from the streams at all boundaries, (blocks + 1, N, tokens, D), computed on
    `device`."""
    blocks = len(streams) - 1

    def at(boundary: int, odd: int) -> Tensor:
        # Both halves are centred by the mean of the first. A single point serves as both.
        points = streams[boundary].to(device)
        mean = points[::2].flatten(0, 1).mean(dim=0)
        return (points[odd::2] if len(points) > 1 else points).flatten(0, 1) - mean

    probes = [probe(at(k, 0), at(k + 1, 0) - at(k, 0)) for k in range(blocks)]

    def distances(u: int) -> Iterator[float]:
        surrogate = at(u, 1)
        for k in range(u, blocks):
            surrogate = surrogate + surrogate @ probes[k]
            yield distance(Grams.of(surrogate, at(k + 1, 1) - surrogate))

    heads = {interval[0] for interval in intervals(blocks, distances)}
    return [next(distances(k)) + (k in heads) for k in range(blocks)]
