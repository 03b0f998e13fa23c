"""One toy case of every method, with as many of its options on as go together. The suite of ``test_methods.py`` runs on each.

``python -m tests.distill.methods.cases`` writes the golden losses anew. Do so only after a change that is meant to change them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill.distill.methods.consistency import ConsistencyDistillation, ConsistencyOptions
from fastdistill.distill.methods.discriminator import Heads
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.distill.methods.dmd import DMD, DMDOptions
from fastdistill.distill.methods.dmd2 import DMD2, DMD2Options
from fastdistill.distill.methods.guidance import GuidanceDistillation, GuidanceOptions
from fastdistill.distill.methods.output_kd import OutputKD, OutputKDOptions
from fastdistill.distill.methods.progressive import ProgressiveDistillation, ProgressiveOptions
from fastdistill.distill.methods.reflow import Reflow, ReflowOptions
from fastdistill.distill.methods.tdm import TDM, TDMOptions
from tests.distill.methods.toys import LabelFamily, Perceptron, exact, loss_of, null, pairs_of
from tests.toy import generator, mixture

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 3


def setup(*, guidance: bool = False, steps: int = 2) -> dict[str, Any]:
    return {
        "student": Perceptron(seed=1, guidance=guidance),
        "teacher": exact(mixture()),
        "family": LabelFamily(),
        "steps": steps,
        "shift": 2.0,
        "unconditional": null(),
    }


def heads() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        discriminator = Heads(16, 2).double()
        for head in discriminator.heads:
            nn.init.normal_(head.out.weight, std=0.1)
    return discriminator


CASES: dict[str, Callable[[], Distillation]] = {
    "output_kd": lambda: OutputKD(OutputKDOptions(true_cfg_scale=3.0), **setup()),
    "guidance": lambda: GuidanceDistillation(GuidanceOptions(guidance_range=(1.0, 4.0)), **setup(guidance=True)),
    "dmd2": lambda: DMD2(
        DMD2Options(
            true_cfg_scale=3.0,
            critic_updates=2,
            backward_simulation=0.5,
            gan_weight=0.1,
            gan_depths=(0.0, 1.0),
            ida_decay=0.9,
            isg_weight=0.5,
        ),
        critic=Perceptron(seed=2),
        heads=heads(),
        **setup(),
    ),
    "tdm": lambda: TDM(TDMOptions(true_cfg_scale=3.0, backward_simulation=0.5, ida_decay=0.9), critic=Perceptron(seed=2), **setup()),
    "consistency": lambda: ConsistencyDistillation(
        ConsistencyOptions(grid_steps=8, skip=2, solver="heun", guidance_range=(1.0, 4.0)), **setup(guidance=True)
    ),
    "progressive": lambda: ProgressiveDistillation(ProgressiveOptions(teacher_steps=8, phase_length=2, true_cfg_scale=2.0), **setup()),
    "reflow": lambda: Reflow(ReflowOptions(straighten=2), **setup()),
    "dmd": lambda: DMD(DMDOptions(true_cfg_scale=2.0), critic=Perceptron(seed=2), **setup(steps=1)),
}


def losses(name: str) -> list[dict[str, float]]:
    """The losses of each role in three steps of gradient descent with a rate of 0.1."""
    method, batch, found = CASES[name](), pairs_of(), []
    for step in range(STEPS):
        of_step = {}
        for number, role in enumerate(method.turns(step)):
            loss = loss_of(method, role, batch, generator(10 * step + number)).total
            loss.backward()
            of_step[role] = float(loss.detach())
            with torch.no_grad():
                for parameter in method.networks[role].parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        method.after_step(step)
        found.append(of_step)
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in CASES}, indent=1) + "\n")
