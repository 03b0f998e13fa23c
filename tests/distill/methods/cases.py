"""One toy case of every method, with as many of its options on as go together. The suite of
`test_methods.py` runs on each.

`python -m tests.distill.methods.cases` writes the golden losses again. Do so only after a change
that is meant to change them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill.distill.methods import METHODS
from fastdistill.distill.methods.discriminator import Heads
from fastdistill.distill.methods.distillation import Distillation
from tests.distill.methods.toys import LabelFamily, Perceptron, exact, loss_of, null, pairs_of
from tests.toy import generator, mixture

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments with which the suite builds a method."""

    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 2
    """Sampling steps of the student."""
    takes_guidance: bool = False
    """Whether the method is for a student that takes a guidance scale."""
    parts: Callable[[], Mapping[str, Any]] = dict
    """Networks that the method would make itself, with weights that do something."""
    flux_options: Mapping[str, Any] = field(default_factory=dict)
    """Options with which the method makes a FLUX student of `steps` steps."""


CASES: dict[str, Case] = {
    "tdm": Case(
        options={"true_cfg_scale": 3.0, "backward_simulation": 0.5, "ida_decay": 0.9},
        parts=lambda: {"critic": Perceptron(seed=2)},
    ),
    "dmd2": Case(
        options={
            "true_cfg_scale": 3.0,
            "critic_updates": 2,
            "backward_simulation": 0.5,
            "gan_weight": 0.1,
            "gan_depths": (0.0, 1.0),
            "ida_decay": 0.9,
            "isg_weight": 0.5,
        },
        parts=lambda: {"critic": Perceptron(seed=2), "heads": heads()},
    ),
    "dmd": Case(options={"true_cfg_scale": 2.0}, steps=1, parts=lambda: {"critic": Perceptron(seed=2)}),
    "progressive": Case(
        options={"teacher_steps": 8, "phase_length": 2, "true_cfg_scale": 2.0}, flux_options={"teacher_steps": 4}
    ),
    "consistency": Case(
        options={"grid_steps": 8, "skip": 2, "solver": "heun", "guidance_range": (1.0, 4.0)},
        takes_guidance=True,
        flux_options={"grid_steps": 4},
    ),
    "reflow": Case(options={"straighten": 2}),
    "guidance": Case(options={"guidance_range": (1.0, 4.0)}, takes_guidance=True),
    "output_kd": Case(options={"true_cfg_scale": 3.0}),
}


def build(name: str) -> Distillation:
    """The method `name` on toy networks."""
    case, method = CASES[name], METHODS[name]
    return method(
        method.Options(**case.options),
        student=Perceptron(seed=1, guidance=case.takes_guidance),
        teacher=exact(mixture()),
        family=LabelFamily(),
        steps=case.steps,
        shift=2.0,
        unconditional=null(),
        **case.parts(),
    )


def heads() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = Heads(16, 2).double()
        for head in found.heads:
            nn.init.normal_(head.out.weight, std=0.1)
    return found


def losses(name: str) -> list[dict[str, float]]:
    """Losses of each role in three steps of gradient descent with a rate of 0.1."""
    method, batch, found = build(name), pairs_of(), []
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
