"""In/out MSE: how large is what a block adds, against what comes in? (the criterion of Freepik's
flux.1-lite)"""

from __future__ import annotations

import torch
from torch import nn

from fastdistill.compress.importance.criterion import CalibrationPoints, Material, sums_over_chunks
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import captured, captured_inputs


@torch.no_grad()
def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """`||h_out - h_in||^2 / ||h_in||^2` over all points, the mean of the streams. Costs one pass
    over the points.

    Divided by the norm, which grows by orders of magnitude with depth in FLUX: the plain difference
    would only rank that. The text that leaves the last block is left out, as nothing reads it.
    """
    blocks = block_ids(network, family)

    def squares(part: CalibrationPoints, _start: int) -> list[list[float]]:
        with captured_inputs(network, family, blocks) as before, captured(network, family, blocks) as after:
            family.predict(network, part.x_t, part.t, part.conditioning)
        rows = []
        for block_id in blocks:
            streams = ["image"] if block_id == blocks[-1] else sorted(before[block_id])
            ins = [before[block_id][stream].float() for stream in streams]
            outs = [after[block_id][stream].float() for stream in streams]
            pairs = zip(ins, outs, strict=True)
            sums = [float(x.square().sum(dtype=torch.float64)) for h_in, h_out in pairs for x in (h_out - h_in, h_in)]
            # Rows of one length: without text, the image counts twice.
            rows.append(sums * (4 // len(sums)))
        return rows

    added_image, image, added_text, text = sums_over_chunks(material, ledger, squares).unbind(dim=1)
    relative = (added_image / image + added_text / text) / 2
    return dict(zip(blocks, relative.tolist(), strict=True))
