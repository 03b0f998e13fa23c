"""The compression of one pipeline from end to end: calibrate, score, choose, cut, repair, recover,
measure, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill.compress.choice.budget import show
from fastdistill.compress.choice.choose import Evidence, Selection, Trial, choose, limit_of, requested, spell
from fastdistill.compress.choice.costs import Cost, flops, latency, sizes, workload
from fastdistill.compress.choice.solve import Interval
from fastdistill.compress.choice.verify import intervals
from fastdistill.compress.config import CompressConfig, tell_of_few_points
from fastdistill.compress.held_out import HeldOut, images_for, steps_between
from fastdistill.compress.importance import CRITERIA, DEPEND_ON_DROPS
from fastdistill.compress.importance.calibrate import Amount, Calibration, calibrated
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.compress.plan import plan
from fastdistill.compress.recovery import Recovery, RecoveryWeights
from fastdistill.compress.repairs.damage import Damage, mend
from fastdistill.compress.repairs.enough import points_needed
from fastdistill.compress.report import Outcome, headline, manifest, report
from fastdistill.compress.speed import speed
from fastdistill.compress.stages import Stage, Stages
from fastdistill.compress.surgery import CutModel, cut_model
from fastdistill.compress.work import CALIBRATE, CHOOSE, CUT, FIRST, FULL, RECOVER, REPAIR, SAVE, work
from fastdistill.data.trajectories import Source, encode_prompts
from fastdistill.errors import UserError
from fastdistill.job import Job, dtype_of, train_config, training_bytes
from fastdistill.models.blocks import block_ids, tied
from fastdistill.models.families.family import BlockId
from fastdistill.models.folder import weight_bytes
from fastdistill.models.loading import EMBEDDED, embedded_folder
from fastdistill.models.patch import patched
from fastdistill.models.saving import save
from fastdistill.models.skeleton import skeleton_of
from fastdistill.run.files import folder_bytes, write_image
from fastdistill.run.pace import Pace
from fastdistill.run.progress import bar
from fastdistill.run.resources import require_disk, require_memory
from fastdistill.train.config import TrainConfig
from fastdistill.train.trainer import Diverged, Trainer
from fastdistill.train.watch import Evaluation

Scores = dict[str, dict[BlockId, float]]
"""Score of each block in the order of the forward pass, by criterion."""


class Compression(Job[CompressConfig]):
    """A FLUX pipeline in, a smaller stock diffusers pipeline and a report out.

    Attributes:
        blocks: every block of the full model, in the order of the forward pass.
        request: what `--drop-blocks` or `--budget` asks for.
        costs: of the full model, by quantity; operations and latency are added once they are
            measured.
        evaluation: measurements of the images by model, of all that have been measured so far.
    """

    result = "compress.json"
    reference = "full"

    @classmethod
    def plan(cls, config: CompressConfig) -> str:
        return plan(config)

    def check(self) -> None:
        self.blocks = block_ids(self.teacher, self.family)
        self.request = requested(self.config.drop_blocks, self.config.parsed_budget(), self.teacher, self.family)
        self.costs = sizes(self.teacher, self.family, self.save_dtype.itemsize)
        self.evaluation: dict[str, dict[str, Any]] = {}
        tokens = {
            "image": prod(self.latent_shape) // int(self.teacher.config.in_channels),
            "text": self.sampling.max_sequence_length,
        }
        tell_of_few_points(self.config, points_needed(self.teacher, self.family, tokens))
        self.require_resources(self.largest_student())

    def run(self) -> None:
        with self.workspace.released():
            self.write(self.compress())

    def compress(self) -> Outcome:
        """Run every stage; what is left is to write about it."""
        self.measure_costs()
        pace = Pace(work(self), self.console)
        with pace.stage(FIRST):
            self.draw_first()
        with pace.stage(CALIBRATE):
            calibration = self.calibrate()
        with pace.stage(CHOOSE):
            scores = self.score(calibration)
            selection = self.choose(calibration, scores)
            model = cut_model(self.teacher, self.family, selection.dropped)
            latency_after = self.time(model.student, selection.limit)
        with pace.stage(FULL):
            self.evaluation = {"full": self.measured("full", self.teacher)}
            held_out = self.hold_out(calibration)
        stages = self.refine(model, calibration, held_out, pace)
        with pace.stage(SAVE):
            self.save(stages)
            timed = self.workspace.cached("speed", lambda: self.speed_of(model.student))
        return Outcome(
            model=model,
            selection=selection,
            costs=self.costs,
            latency_after=latency_after,
            speed=timed,
            disk=self.disk(),
            scores=scores,
            stages=stages.done,
            held_out=len(held_out.runs),
            evaluation=self.evaluation,
        )

    def draw_first(self) -> None:
        """Show the full model's images of the grid, a few of them at once."""
        with self.clock("first images"):
            self.gallery.draw_first(self.pipeline, self.reference, self.show)

    def show(self) -> None:
        """Write the grid of all images that have been drawn so far."""
        write_image(self.output / "grid.png", self.gallery.grid(list(self.evaluation) or [self.reference]))

    def largest_student(self) -> CutModel:
        """The largest model that the request can leave, without weights.

        Which blocks go is not known yet, unless they are named. Of all sets of blocks that meet the
        request, the one with the fewest parameters is dropped; where operations or latency are
        asked for, which are not measured yet, none.
        """
        budget = self.request.budget
        dropped: list[BlockId] = []
        if budget is None or budget.quantity in self.costs:
            evidence = Evidence(scores=self.costs["params"].blocks, tied=tied(self.teacher, self.family))
            dropped = choose(self.request, self.costs, evidence).dropped
        return cut_model(
            skeleton_of(type(self.teacher), self.teacher.config).to(self.teacher.dtype), self.family, dropped
        )

    def require_resources(self, model: CutModel) -> None:
        """Raise `UserError` if the disk or the memory does not suffice for a student of the size of
        `model`."""
        parameters = sum(parameter.numel() for parameter in model.student.parameters())
        # The student as it is repaired and as it is saved, and what is saved with it.
        disk = parameters * (self.teacher.dtype.itemsize + self.save_dtype.itemsize)
        for name, part in self.pipeline.components.items():
            if name != "transformer" and isinstance(part, nn.Module):
                # The file is copied, in whatever dtype its weights are.
                stored = weight_bytes(self.source / name)
                disk += sum(parameter.nbytes for parameter in part.parameters()) if stored is None else stored
        memory = 0
        if self.config.recovery.recovery_steps:
            model.student.float()
            memory, checkpoints = training_bytes(self.recovery(model), self.train_config)
            # The best weights lie next to the checkpoint, and are kept once more when it is done.
            disk += checkpoints + 2 * parameters * torch.float32.itemsize
        require_disk(self.output, disk)
        remedy = "drop more blocks, or give --optimizer adamw8bit, or --recovery-steps 0 to cut without recovery"
        require_memory(
            self.pipeline.device, memory, "recovery, in addition to the full model and without activations,", remedy
        )

    def measure_costs(self) -> None:
        """Add operations to `costs`, and the latency if a budget is in it.

        Raises:
            UserError: the costs show that the budget cannot be met.
        """
        budget = self.request.budget
        with self.clock("costs"):
            self.costs["flops"] = flops(
                self.teacher, self.family, workload(self.sampling, self.pipeline.vae_scale_factor)
            )
            if budget and budget.quantity == "latency":
                # Kept: another measurement would be another problem, and the continued run would
                # choose other blocks.
                outside, *times = self.workspace.cached("latency", self._latency_of_parts)
                self.costs["latency"] = Cost(blocks=dict(zip(self.blocks, times, strict=True)), outside=outside)
        if budget:
            try:
                limit_of(budget, self.costs[budget.quantity])
            except UserError:
                # Nothing has been done yet, and another budget should find the folder free.
                self.workspace.finish()
                raise

    @cached_property
    def amount(self) -> Amount:
        """Size of the calibration."""
        options = self.config.calibration
        return Amount(
            images=options.calibration_images,
            points=options.calibration_points,
            steps=options.calibration_steps,
            batch=self.images_at_once,
            seed=self.config.run.seed,
        )

    def calibrate(self) -> Calibration:
        source = Source(pipeline=self.pipeline, prompts=self.prompts, sampling=self.sampling, images=self.images)
        with self.clock("calibrate"):
            sampled = {name: value for name, value in asdict(self.amount).items() if name != "points"}
            cache = self.store.entry("calibration", self.facts(sampled))
            return calibrated(source, self.amount, cache=cache, console=self.console)

    def score(self, calibration: Calibration) -> Scores:
        """Scores by every criterion of `criteria`; kept for other runs."""

        def values(criterion: str) -> list[float]:
            pieces = self.workspace.work / f"scores-{criterion}.jsonl"
            return list(calibration.score(criterion, drops=self.request.drops, pieces=pieces).values())

        found: dict[str, list[float]] = {}
        with self.clock("score"):
            for name in self.criteria:
                drops = self.request.drops if name in DEPEND_ON_DROPS else None
                facts = self.facts({**asdict(self.amount), "criterion": name, "drops": drops})
                found[name] = self.store.cached("scores", facts, partial(values, name))
        return {name: dict(zip(self.blocks, found[name], strict=True)) for name in found}

    @property
    def criteria(self) -> list[str]:
        """Criteria to score by: output and bi, which help to understand a choice, the one that
        chooses, and those asked for. Where the blocks are named there is nothing to choose."""
        options = self.config.choice
        usual = [] if self.request.blocks else ["output", "bi"]
        chosen = [] if self.request.blocks and options.criterion == "output" else [options.criterion]
        return list(dict.fromkeys([*usual, *chosen, *options.also_score]))

    def choose(self, calibration: Calibration, scores: Scores) -> Selection:
        options = self.config.choice

        if self.request.blocks:
            return choose(self.request, self.costs, Evidence(scores={}))
        known = Ledger(self.store.entry("errors", self.facts(asdict(self.amount))) / "joint.jsonl")

        def joint(positions: Sequence[int]) -> float:
            name = " ".join(map(str, sorted(positions)))
            if name not in known:
                known.keep(name, calibration.joint_error([self.blocks[position] for position in positions]))
            return float(known[name])

        with self.clock("score"):
            evidence = Evidence(
                scores=scores[options.criterion],
                intervals=self.score_runs(joint),
                output_errors=scores["output"],
                tied=tied(self.teacher, self.family),
            )
            selection = choose(self.request, self.costs, evidence, Trial(joint=joint, sets=options.verify))
        return selection

    def score_runs(self, joint: Callable[[Sequence[int]], float]) -> dict[Interval, float] | None:
        """Joint errors of runs of neighbouring blocks, as far as they can be candidates."""
        options = self.config.choice
        if options.criterion != "output" or options.longest_run == 1:
            return None
        runs = list(intervals(len(self.blocks), options.longest_run))
        errors: dict[Interval, float] = {}
        with bar(self.console, "score runs", len(runs)) as advance:
            for first, last in runs:
                errors[first, last] = joint(range(first, last + 1))
                advance(1)
        return errors

    def time(self, student: Any, limit: int) -> int | None:
        """Nanoseconds of one forward pass of the cut model, if a budget of `limit` nanoseconds is
        to be met."""
        if "latency" not in self.costs:
            return None
        with self.clock("costs"):
            found = int(self.workspace.cached("latency-after", lambda: self._latency(student).total))
        if found > limit:
            self.console.print(
                f"the cut model takes {show('latency', found)} where its blocks promised {show('latency', limit)} at "
                "most: they were timed one by one, and times vary; ask for a little less to be sure"
            )
        return found

    def hold_out(self, calibration: Calibration) -> HeldOut:
        """Measure by which stages are compared, from noise that nothing else uses; where the full
        model ends is kept for other runs."""
        batch = self.config.training.batch
        count = images_for(self.config.recovery.recovery_steps, batch, calibration.runs.passes)
        prompts = [self.prompts[index * len(self.prompts) // count] for index in range(count)]
        with self.clock("compare"):
            conditioning = encode_prompts(prompts, self.pipeline, self.family, self.sampling, batch)
            facts = self.facts({"count": count, "steps": self.amount.steps, "seed": self.amount.seed})
            return HeldOut.of(calibration, conditioning, self.latent_shape, self.store.entry("held-out", facts))

    def refine(self, model: CutModel, calibration: Calibration, held_out: HeldOut, pace: Pace) -> Stages:
        """Cut, repaired and recovered model, each measured; the evaluation of their images is in
        `evaluation`."""

        def judge(name: str, student: Any) -> Stage:
            with self.clock("compare"):
                distance = self.workspace.cached(f"distance-{name}", lambda: held_out.distance(student))
                error = self.workspace.cached(f"error-{name}", lambda: calibration.output_error(student))
            stage = Stage(name=name, distance=distance, output_error=error)
            if stage.sound:
                self.evaluation[name] = self.measured(name, student)
                self.show()
            return stage

        dropped = [block_id for block_id in self.blocks if block_id not in model.boundaries]
        stages = Stages(model, self.workspace.work, self.save_dtype, judge, self.console)
        with pace.stage(CUT):
            stages.take("cut", f"without {spell(dropped, self.family)}", lambda: None)
        if (kind := self.config.repair.repair) != "none":
            with pace.stage(REPAIR):
                stages.take("repaired", f"repaired by {kind}", lambda: self.repair(model, calibration))
        if self.config.recovery.recovery_steps:
            with pace.stage(RECOVER):
                stages.take("recovered", "recovered", lambda: self.recover(model, calibration, held_out))
            self.hand_over(self.training_folder)
            if stages.best.name != "recovered":
                self.console.print(
                    "training did not help here: a lower --learning-rate or more --recovery-steps may, and "
                    "--recovery-steps 0 saves the time",
                    soft_wrap=True,
                )
        return stages

    def repair(self, model: CutModel, calibration: Calibration) -> None:
        """Mend the student in place."""
        options = self.config.repair
        with self.clock("repair"):
            mend(Damage.of(model, calibration, options.repair_points), options.repair, self.console)

    def recover(self, model: CutModel, calibration: Calibration, held_out: HeldOut) -> None:
        """Train the student in place; it ends with the averaged weights that measured best."""
        student: Any = model.student.float().train()
        if self.config.training.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        steps, batch = self.config.recovery.recovery_steps, self.config.training.batch
        trainer = Trainer(
            self.recovery(model),
            lambda step, rng: calibration.pool.batch(batch, rng),
            self.train_config,
            self.training_folder,
            evaluation=Evaluation(
                evaluate=lambda: {"distance": held_out.distance(student)},
                every=steps_between(steps, batch, held_out.runs.passes, len(held_out.runs)),
                monitor="distance",
            ),
        )
        with self.clock("recover"), patched(student), patched(model.teacher):
            try:
                trainer.fit("recover", self.console)
            except Diverged:
                # What was measured before is sound, and so is the model before the training.
                self.console.print(
                    f"recovery ends at step {trainer.step}: its gradient is not finite; lower the --learning-rate"
                )
        trainer.take_best()
        student.eval().requires_grad_(False)

    def save(self, stages: Stages) -> None:
        """Write the pipeline with the best stage to `OUTPUT/model`."""
        student: Any = stages.model.student
        stages.restore(stages.best)
        save(self.pipeline, student.to(self.save_dtype), self.output / "model", self.sampling, self.prompts)

    def speed_of(self, student: Any) -> dict[str, Any]:
        """Forward passes of the full and the smaller model, measured in turns, as JSON."""
        load = workload(self.sampling, self.pipeline.vae_scale_factor)
        with self.clock("time"):
            return speed(self.teacher, student.to(self.teacher.dtype), self.family, load).as_json()

    def disk(self) -> dict[str, int | None]:
        """Bytes of the folders of the full and the smaller pipeline; None for one that is no folder
        on this disk."""
        return {
            "full": folder_bytes(self.source) if self.source.is_dir() else None,
            "compressed": folder_bytes(self.output / "model"),
        }

    def write(self, outcome: Outcome) -> None:
        record = self.record(manifest(self.config, outcome, self.sampling))
        text = report(
            record,
            output=self.output,
            dtype=str(self.teacher.dtype).removeprefix("torch."),
            shown=self.gallery.shown,
            measured=self.gallery.prompts,
            meanings=CRITERIA.meanings,
        )
        self.finish(record, text, headline(record))

    @property
    def source(self) -> Path:
        """Folder of the full pipeline, if it is one on this disk."""
        return embedded_folder() if self.config.run.model == EMBEDDED else Path(self.config.run.model)

    @property
    def save_dtype(self) -> torch.dtype:
        return dtype_of(self.config.run.save_dtype)

    @property
    def training_folder(self) -> Path:
        return self.workspace.work / "recovery"

    @property
    def train_config(self) -> TrainConfig:
        return train_config(self.config.training, steps=self.config.recovery.recovery_steps, seed=self.config.run.seed)

    def recovery(self, model: CutModel) -> Recovery:
        options = self.config.recovery
        weights = RecoveryWeights(task=options.task_weight, out=options.output_weight, feat=options.feature_weight)
        return Recovery(model, weights)

    def _latency_of_parts(self) -> list[int]:
        """Nanoseconds outside the blocks of the full model, and of each block."""
        cost = self._latency(self.teacher)
        return [cost.outside, *cost.blocks.values()]

    def _latency(self, transformer: Any) -> Cost:
        """Latency of the stock model, which is what is saved."""
        options = self.config.choice
        dtype = dtype_of(options.latency_dtype) if options.latency_dtype else None
        load = workload(self.sampling, self.pipeline.vae_scale_factor, options.latency_batch)
        return latency(transformer, self.family, load, dtype)
