"""Work of each stage of a compression, in forward passes of one sample, by which time is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.compress.held_out import IMAGES, PASSES_OF_A_STEP, SHARE

if TYPE_CHECKING:
    from fastdistill.compress.job import Compression

FIRST = "draw the first images"
CALIBRATE = "let the full model draw what it is measured on"
CHOOSE = "choose the blocks"
FULL = "measure the full model"
CUT = "cut, and measure"
REPAIR = "repair, and measure"
RECOVER = "recover, and measure"
SAVE = "save, and time both models"

AUTOENCODER = 1.3
"""Cost of an image with its decoding and its measurements, in that of its sampling."""
GAPS_OF_A_DROP, PASSES_OF_A_GAP = 0.75, 3
"""A repair passes over its points for each gap, with a part of two models; neighbouring dropped
blocks leave one gap."""


def work(job: Compression) -> dict[str, float]:
    """Work of every stage of the run, in order.

    Only the proportions matter: what a pass takes is learned as the run goes.
    """
    guided = 2 if job.sampling.true_cfg_scale > 1 else 1
    blocks, config = len(job.blocks), job.config
    points = min(job.amount.points, job.amount.images)
    image = job.sampling.num_inference_steps * guided * AUTOENCODER
    runs = IMAGES * job.amount.steps * guided
    judged = len(job.gallery) * image + runs + points
    choice = len(job.criteria) * (blocks + 3) / 2
    if not job.request.blocks:
        choice += blocks * (config.choice.longest_run - 1) + 2 * config.choice.verify
    drops = job.request.drops or blocks / 3
    found = {
        # So few images at once are slower than the rest, and say nothing of its pace.
        FIRST: 0.0,
        CALIBRATE: len(job.images) or job.amount.images * job.amount.steps * guided,
        CHOOSE: points * choice,
        FULL: len(job.gallery) * image + runs,
        CUT: judged,
    }
    if config.repair.repair != "none":
        found[REPAIR] = judged + config.repair.repair_points * drops * GAPS_OF_A_DROP * PASSES_OF_A_GAP
    if steps := config.recovery.recovery_steps:
        found[RECOVER] = judged + steps * config.training.batch * PASSES_OF_A_STEP * (1 + SHARE)
    return {**found, SAVE: 2 * image}
