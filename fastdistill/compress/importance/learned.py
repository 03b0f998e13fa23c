"""Learned masks: which blocks does a network do without, if its weights may follow? (TinyFusion,
Fang et al. 2025, arXiv 2412.01199)

Other criteria ask how much breaks when a block goes, this one how much stays broken. Consecutive
blocks form groups, each with a distribution over the patterns in which it can lose its share of
blocks. It is learned by gradient descent together with a low-rank update of every linear layer of
the blocks, towards the velocity of the full network. The update is thrown away: all it is for is
that the blocks are chosen for what recovery can make of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastdistill.compress.importance.criterion import CalibrationPoints, Material
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.compress.importance.output_error import predictions, time_weight, weighted_square
from fastdistill.compress.importance.taylor import gated
from fastdistill.errors import UserError
from fastdistill.models.blocks import block, block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import replaced
from fastdistill.train import checkpoint

STEPS = 200
BATCH = 16
STEPS_A_PIECE = 20
OPTIONS = 500
RANK = 8
LEARNING_RATE = 5e-4
# TinyFusion's distribution is softmax(100 l), and l learns at ten times the rate of the weights: to
# Adam the same as this, of 100 l.
LOGIT_RATE = 1000 * LEARNING_RATE
HOT, COLD = 4.0, 0.1


def partition(blocks: int, drops: int) -> list[tuple[int, int]]:
    """(kept, dropped) of each group of consecutive blocks: even shares of both, at least one of
    each.

    The fewest groups with at most 500 patterns each, such as 12 blocks of which 4 go. TinyFusion's
    are of 2 or 4 blocks, but that every group loses its share is decided before anything is
    learned: the best set known of the emoji FLUX takes one of its first six blocks and three of the
    others, which two groups of six cannot say. Of thousands of patterns few would ever be tried:
    TinyFusion finds 3432 too many.
    """

    def shares(count: int, groups: int) -> list[int]:
        return [count * (group + 1) // groups - count * group // groups for group in range(groups)]

    most = max(1, min(drops, blocks - drops))
    choices = [
        list(zip(shares(blocks - drops, groups), shares(drops, groups), strict=True)) for groups in range(1, most + 1)
    ]
    few = (
        choice for choice in choices if max(math.comb(kept + dropped, dropped) for kept, dropped in choice) <= OPTIONS
    )
    return next(few, choices[-1])


def patterns(kept: int, dropped: int) -> Tensor:
    """All ways to lose `dropped` blocks: (C(kept + dropped, dropped), kept + dropped), 0 where a
    block goes."""
    size = kept + dropped
    return torch.tensor(
        [[float(index not in gone) for index in range(size)] for gone in combinations(range(size), dropped)]
    )


class Masks(nn.Module):
    """A distribution over the patterns of each group: `softmax(logits)`, uniform at first."""

    def __init__(self, blocks: int, drops: int) -> None:
        super().__init__()
        self.patterns = [patterns(kept, dropped) for kept, dropped in partition(blocks, drops)]
        self.logits = nn.ParameterList(torch.zeros(len(options)) for options in self.patterns)

    def draw(self, count: int, temperature: float, rng: torch.Generator) -> Tensor:
        """Gates (count, blocks) of 0 and 1, a draw for each sample; their gradient is that of the
        soft draw (straight-through Gumbel)."""
        groups = []
        for logits, options in zip(self.logits, self.patterns, strict=True):
            gumbel = -torch.empty(count, len(options)).exponential_(generator=rng).log()
            soft = ((logits + gumbel.to(logits)) / temperature).softmax(dim=1)
            hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
            # In this order the value is exactly 0 or 1.
            groups.append((hard + (soft - soft.detach())) @ options.to(logits))
        return torch.cat(groups, dim=1)

    def kept(self) -> list[float]:
        """The probability of each block to stay."""
        groups = zip(self.logits, self.patterns, strict=True)
        return torch.cat(
            [logits.detach().cpu().double().softmax(dim=0) @ options.double() for logits, options in groups]
        ).tolist()


class LowRank(nn.Module):
    """Addition `2 B A` to a linear layer, at first zero: LoRA (Hu et al. 2022) of rank 8 with alpha
    16."""

    def __init__(self, layer: nn.Linear, rng: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(layer.in_features)
        self.a = nn.Parameter(torch.empty(RANK, layer.in_features).uniform_(-bound, bound, generator=rng))
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def updated(layer: nn.Module, update: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer's forward with `update` added."""
    own = layer.forward

    def forward(x: Tensor) -> Tensor:
        return own(x) + update(x)  # type: ignore[no-any-return]

    return forward


class Search(nn.Module):
    """Learned parameters, held outside of the network, of which nothing changes but the forward of
    its blocks and their layers."""

    def __init__(self, network: nn.Module, family: Family, drops: int, rng: torch.Generator) -> None:
        super().__init__()
        blocks = block_ids(network, family)
        self.blocks = [(block(network, block_id), family.stack(block_id.stack).pass_through) for block_id in blocks]
        self.layers = [layer for module, _ in self.blocks for layer in module.modules() if isinstance(layer, nn.Linear)]
        self.masks = Masks(len(blocks), drops)
        self.updates = nn.ModuleList(LowRank(layer, rng) for layer in self.layers)

    @contextmanager
    def applied(self, gates: Tensor) -> Iterator[None]:
        """The network with the update, and with `gates` (B, blocks) on its blocks."""
        with ExitStack() as stack:
            # A patched block calls its linear layers, so that their forwards count in it, too.
            for layer, update in zip(self.layers, self.updates, strict=True):
                stack.enter_context(replaced(layer, updated(layer, update)))
            for (module, pass_through), gate in zip(self.blocks, gates.unbind(dim=1), strict=True):
                stack.enter_context(replaced(module, gated(module, pass_through, gate)))
            yield

    def optimizer(self) -> torch.optim.Optimizer:
        groups = [
            {"params": list(self.masks.parameters()), "lr": LOGIT_RATE},
            {"params": list(self.updates.parameters()), "lr": LEARNING_RATE},
        ]
        # Once the draws are cold almost none has a gradient, and Adam forgets how large one is: the
        # next would throw over what has been decided. AMSGrad does not forget.
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, amsgrad=True, fused=True)


def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """The probability that a block stays.

    It says which `material.drops` go, or which half where that is not known. Where the masks are
    decided, and after the annealing they mostly are, these have scores near 0 and come to just the
    most probable pattern of each group. Where a group is not, its blocks share the doubt, and
    between groups those go that are surest to. What is decided ends in scores of almost exactly 0
    or 1: how much worse a larger cut would be they do not say.

    Costs about 50 passes over 256 points: 200 steps of 16 samples, with the blocks' activations
    recomputed in the backward pass. Every 20 steps the state of the training is kept next to the
    ledger, 0.7 GB for FLUX.1.
    """
    blocks = block_ids(network, family)
    ledger.expect(-(-STEPS // STEPS_A_PIECE) + 1)
    if "scores" not in ledger:
        ledger.keep("scores", learned(network, family, material, ledger).kept())
    return dict(zip(blocks, ledger["scores"], strict=True))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """`E ||v(masked, updated) - v||^2 / E ||v||^2` over the points, weighted by `time_weight`; v is
    the full network's."""

    network: nn.Module
    family: Family
    points: CalibrationPoints
    reference: Tensor
    batch: int

    def backward(self, search: Search, rows: Tensor, gates: Tensor) -> float:
        """Value at the points `rows` (B,) under `gates` (B, blocks); the gradient goes to `search`
        and nowhere else."""
        norm = weighted_square(self.reference, self.points.t) * len(rows) / len(self.points)
        # A forward pass takes `batch` samples, and each has a graph of its own; that of the gates
        # is common to all and runs once.
        switches = gates.detach().requires_grad_()
        value = 0.0
        for part in torch.arange(len(rows)).split(self.batch):
            chosen = rows[part].to(self.points.t.device)
            t = self.points.t[chosen]
            with search.applied(switches[part]):
                velocity = self.family.predict(
                    self.network, self.points.x_t[chosen], t, self.points.conditioning[chosen]
                )
                squares = (velocity.float() - self.reference[chosen]).square().flatten(1).sum(dim=1)
                error = (time_weight(t) * squares).sum() / norm
                # Inside, as the blocks run again for it.
                error.backward(inputs=[switches, *search.updates.parameters()])
            value += float(error.detach())
        gates.backward(switches.grad)
        return value


@torch.enable_grad()
def learned(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> Masks:
    """The masks after the training.

    Raises:
        UserError: the loss is no longer finite.
    """
    points, blocks = material.points, len(block_ids(network, family))
    reference = predictions(network, family, points, material.batch)
    objective = Objective(network=network, family=family, points=points, reference=reference, batch=material.batch)
    search = Search(network, family, material.drops or blocks // 2, torch.Generator().manual_seed(material.seed)).to(
        points.x_t.device
    )
    optimizer = search.optimizer()
    trained = checkpoint.Trained(networks={"search": search}, optimizers={"search": optimizer})
    first, folder = 0, ledger.folder
    if folder is not None and (state := checkpoint.latest(folder)):
        first = checkpoint.load(state, trained)["step"]
    for step in range(first, STEPS):
        # Seeded by the step, so that a training that goes on after a kill draws the same, and so
        # does another batch.
        rng = torch.Generator().manual_seed(material.seed * 1_000_003 + step)
        rows = torch.randperm(len(points), generator=rng)[:BATCH]
        # Geometric: while the draws are hot little is decided, and a linear fall leaves that to the
        # last few steps.
        temperature = HOT * (COLD / HOT) ** (step / STEPS)
        loss = objective.backward(search, rows, search.masks.draw(len(rows), temperature, rng))
        if not math.isfinite(loss):
            raise UserError(
                f"--criterion learned: the loss of step {step} is not finite; choose another criterion for this model"
            )
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % STEPS_A_PIECE == 0 or done == STEPS:
            if folder is not None:
                checkpoint.save(folder, done, trained, {})
            ledger.keep(str(done), loss)
    return search.masks
