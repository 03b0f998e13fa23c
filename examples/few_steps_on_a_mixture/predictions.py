"""Predictions of theory about the few-step students of each method, as comparisons of two numbers
of the experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Quantity:
    """A score of a row's students of `steps` steps; None for a perfect sampler, which has none."""

    row: str
    steps: int | None
    score: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """`less < more`, or that both are equal within a tenth."""

    about: str
    theory: str
    less: Quantity
    more: Quantity
    relation: Literal["less", "equal"] = "less"

    def holds(self, less: float, more: float) -> bool:
        return abs(less - more) <= 0.1 * more if self.relation == "equal" else less < more


W, TV, OUTSIDE, SPREAD, FAR = "sliced_wasserstein", "total_variation", "outside", "spread", "displacement"
NO_GAN, NOISED = "dmd2 without GAN", "dmd2 without GAN, on noised data"
TOLD = "dmd2 without GAN, critic told the step"
LITTLE_NO_GAN = "dmd2 without GAN at little noise"
STRAIGHT, FLOOR = "reflow, straightening only", "perfect sampler"

PREDICTIONS = (
    Prediction(
        about=NO_GAN,
        theory="the reverse KL divergence seeks modes: their weights are farther off than by following the flow",
        less=Quantity("consistency", 1, TV),
        more=Quantity(NO_GAN, 1, TV),
    ),
    Prediction(
        about=NO_GAN,
        theory="and samples are too narrow within a mode",
        less=Quantity(NO_GAN, 1, SPREAD),
        more=Quantity(FLOOR, None, SPREAD),
    ),
    Prediction(
        about=NO_GAN,
        theory="it avoids what is between modes more than a method that follows the flow",
        less=Quantity(NO_GAN, 1, OUTSIDE),
        more=Quantity("consistency", 1, OUTSIDE),
    ),
    Prediction(
        about=NO_GAN,
        theory="its map is its own, not the flow's",
        less=Quantity("consistency", 1, FAR),
        more=Quantity(NO_GAN, 1, FAR),
    ),
    Prediction(
        about=LITTLE_NO_GAN,
        theory="where no noise joins the modes, scores say nothing of their weights",
        less=Quantity(NO_GAN, 1, TV),
        more=Quantity(LITTLE_NO_GAN, 1, TV),
    ),
    Prediction(
        about="dmd2 at little noise",
        theory="a GAN, which sees data, does know the weights",
        less=Quantity("dmd2 at little noise", 1, TV),
        more=Quantity(LITTLE_NO_GAN, 1, TV),
    ),
    Prediction(
        about="dmd2",
        theory="the GAN, which sees data, brings the weights back",
        less=Quantity("dmd2", 1, TV),
        more=Quantity(NO_GAN, 1, TV),
    ),
    Prediction(
        about="dmd2",
        theory="and the whole distribution closer",
        less=Quantity("dmd2", 1, W),
        more=Quantity(NO_GAN, 1, W),
    ),
    Prediction(
        about="dmd",
        theory="regression on pairs keeps the modes",
        less=Quantity("dmd", 1, TV),
        more=Quantity(NO_GAN, 1, TV),
    ),
    Prediction(
        about="dmd",
        theory="and ties the map to the flow's",
        less=Quantity("dmd", 1, FAR),
        more=Quantity(NO_GAN, 1, FAR),
    ),
    *(
        Prediction(
            about=NOISED,
            theory=f"a student of noised data is not ready for its own states: worse in {steps} steps",
            less=Quantity(NO_GAN, steps, W),
            more=Quantity(NOISED, steps, W),
        )
        for steps in (2, 4)
    ),
    Prediction(
        about=NO_GAN,
        theory="more steps are better",
        less=Quantity(NO_GAN, 4, W),
        more=Quantity(NO_GAN, 1, W),
    ),
    *(
        Prediction(
            about=TOLD,
            theory=f"a critic that knows the step matches each of {steps} by itself",
            less=Quantity(TOLD, steps, W),
            more=Quantity(NO_GAN, steps, W),
        )
        for steps in (2, 4)
    ),
    *(
        Prediction(
            about="tdm",
            theory=f"each of {steps} steps has its own times, and goes only part of the way",
            less=Quantity("tdm", steps, W),
            more=Quantity(NO_GAN, steps, W),
        )
        for steps in (2, 4)
    ),
    Prediction(
        about="tdm",
        theory="a student that starts near the flow stays near it, closer than where each step goes all the way",
        less=Quantity("tdm", 4, FAR),
        more=Quantity(TOLD, 4, FAR),
    ),
    Prediction(
        about="tdm, critic of the score",
        theory="the mean of x_0 is not the score: without that bias the distribution is closer",
        less=Quantity("tdm, critic of the score", 4, W),
        more=Quantity("tdm", 4, W),
    ),
    Prediction(
        about="dmd2 without GAN, with ISG",
        theory="the teacher ties each step to the flow, so that steps do not share out the modes",
        less=Quantity("dmd2 without GAN, with ISG", 4, TV),
        more=Quantity(NO_GAN, 4, TV),
    ),
    *(
        Prediction(
            about=name,
            theory="follows the flow, more closely in more steps",
            less=Quantity(name, 4, score),
            more=Quantity(name, 1, score),
        )
        for name, score in (("progressive", FAR), ("reflow", FAR))
    ),
    Prediction(
        about="consistency",
        theory="more steps correct the first",
        less=Quantity("consistency", 4, W),
        more=Quantity("consistency", 1, W),
    ),
    *(
        Prediction(
            about=name,
            theory="better than the teacher in as many steps",
            less=Quantity(name, 4, W),
            more=Quantity("teacher", 4, W),
        )
        for name in ("progressive", "consistency", "reflow")
    ),
    Prediction(
        about=STRAIGHT,
        theory="paths of the flow's own pairs do not cross: one step is better than the start's",
        less=Quantity(STRAIGHT, 1, W),
        more=Quantity("start", 1, W),
    ),
    Prediction(
        about="reflow",
        theory="distilling at the student's times mends the curvature that straightening leaves",
        less=Quantity("reflow", 1, W),
        more=Quantity(STRAIGHT, 1, W),
    ),
    Prediction(
        about="reflow",
        theory="by exact pairs one step is closer to the flow than by targets that networks have made",
        less=Quantity("reflow", 1, FAR),
        more=Quantity("progressive", 1, FAR),
    ),
    *(
        Prediction(
            about="output_kd",
            theory=f"no few-step method: in {steps} step{'s' if steps > 1 else ''} as good as the teacher in as many",
            less=Quantity("output_kd", steps, W),
            more=Quantity("teacher", steps, W),
            relation="equal",
        )
        for steps in (1, 2, 4)
    ),
    Prediction(
        about="all",
        theory="a continuous map from noise has to cross from mode to mode: one step leaves some between them",
        less=Quantity(FLOOR, None, OUTSIDE),
        more=Quantity("reflow", 1, OUTSIDE),
    ),
)
