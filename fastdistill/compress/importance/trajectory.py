"""One block out: where does a short sampling run end without it? (EcoDiff, Zhang et al., the loss
on z_0)

EcoDiff found the error of the end decisive: masks learned on the errors of single steps gave a FID
of 97. It sees what single predictions do not: whether the errors of a block's absence add up along
a run, or are made good by later steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill.compress.importance.criterion import Material, SamplingRuns
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import skipped

STEPS = 4


def shortened(runs: SamplingRuns, steps: int) -> SamplingRuns:
    """The runs in at most `steps` steps, at times of the pipeline's own schedule."""
    last = len(runs.times) - 1
    chosen = torch.linspace(0, last, min(steps, last) + 1).round().long()
    return SamplingRuns(
        noise=runs.noise,
        times=runs.times[chosen.to(runs.times.device)],
        conditioning=runs.conditioning,
        unconditional=runs.unconditional,
        true_cfg_scale=runs.true_cfg_scale,
    )


@torch.no_grad()
def ends(network: nn.Module, family: Family, runs: SamplingRuns) -> Tensor:
    """The last state of each run, (N, C, H, W): `x <- x + (t_next - t) v`, with guidance `v = u + s
    (c - u)`."""
    x = runs.noise
    nothing = None
    if runs.unconditional is not None and runs.true_cfg_scale > 1:
        nothing = runs.unconditional[torch.zeros(len(runs), dtype=torch.long, device=x.device)]
    for t, t_next in zip(runs.times[:-1], runs.times[1:], strict=True):
        at = t.expand(len(runs))
        velocity = family.predict(network, x, at, runs.conditioning).float()
        if nothing is not None:
            without_prompt = family.predict(network, x, at, nothing).float()
            velocity = without_prompt + runs.true_cfg_scale * (velocity - without_prompt)
        # The sum in float32, as the scheduler has it.
        x = (x.float() + (t_next.float() - t.float()) * velocity).to(runs.noise.dtype)
    return x.float()


def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """`||z_0 without - z_0||^2 / ||z_0||^2` of runs from the same noise in 4 steps.

    There are as many runs as cost about one pass over the points, so that n blocks cost n + 1
    passes. The states differ from the first step on, so that there is no prefix to share.
    """
    blocks = block_ids(network, family)
    runs = shortened(material.runs, STEPS)
    runs = runs[: max(1, len(material.points) // runs.passes)]
    parts = [runs[start : start + material.batch] for start in range(0, len(runs), material.batch)]
    ledger.expect(len(blocks) * len(parts))
    errors, norm = dict.fromkeys(blocks, 0.0), 0.0
    for index, part in enumerate(parts):
        reference = ends(network, family, part).double()
        norm += float(reference.square().sum())
        for block_id in blocks:
            name = f"{index} {block_id.stack} {block_id.index}"
            if name not in ledger:
                with skipped(network, family, [block_id]):
                    ledger.keep(name, float((ends(network, family, part).double() - reference).square().sum()))
            errors[block_id] += ledger[name]
    return {block_id: error / norm for block_id, error in errors.items()}
