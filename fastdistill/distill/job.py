"""The distillation of one pipeline from end to end: let the teacher draw, measure it, train, save,
measure the student, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from fastdistill.data.latents import LatentPool
from fastdistill.data.trajectories import Source, TrajectoryOptions, encode_prompts, trajectories
from fastdistill.distill import last_checkpoint
from fastdistill.distill.build import Models, build, plan, training
from fastdistill.distill.config import DistillConfig
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.distill.methods.teacher_pairs import PairOptions, teacher_pairs
from fastdistill.distill.report import Outcome, report
from fastdistill.distill.sample_rows import SampleRows, Start
from fastdistill.errors import UserError
from fastdistill.evaluation.gallery import Gallery
from fastdistill.job import Job, cache_folder, dtype_of, training_bytes
from fastdistill.models.digest import digest_of
from fastdistill.models.families.family import Conditioning
from fastdistill.models.few_step_scheduler import few_step_scheduler, shift_of
from fastdistill.models.guidance_embedder import embeds_guidance
from fastdistill.models.loading import load
from fastdistill.models.patch import patched
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.saving import save, swapped
from fastdistill.models.weights import check_computable
from fastdistill.run.curves import draw_curves
from fastdistill.run.files import digest
from fastdistill.run.inputs import Input
from fastdistill.run.progress import bar
from fastdistill.run.resources import require_disk, require_memory, require_writable, show
from fastdistill.run.store import OFF
from fastdistill.train.trainer import BatchSource, Trainer
from fastdistill.train.watch import Evaluation, SampleGrid

WATCHED = (
    "frechet_distance_to_reference",
    "frechet_distance",
    "background_total_variation",
    "background_purity",
    "caption_accuracy",
)
"""Measurements while training. The first decides: every model has it, and images of the same
prompts and noise differ less by chance than fresh ones."""
WATCH_SEEDS = 1000
"""Added to the seed of the run for images that choose the weights: the images of the report have no
part in the choice."""
GRID_IMAGES = 8


class FewStepStudent(Job[DistillConfig]):
    """A teacher in, a student that is sampled in few steps out.

    Attributes:
        models: the transformers that the run begins with.
        method: teaches the student; there once the job runs.
        teachers: how the teacher is sampled to compare with, by name: as it is, and in as many
            steps as the student.
        watch: gallery by whose measurements the weights are chosen.
    """

    result = "distill.json"
    reference = "teacher"

    @classmethod
    def plan(cls, config: DistillConfig) -> str:
        return plan(config)

    @classmethod
    def check_config(cls, config: DistillConfig) -> None:
        super().check_config(config)
        if config.data.teacher_cache is not None:
            require_writable(config.data.teacher_cache, "--teacher-cache")

    def check(self) -> None:
        student = (
            load(self.config.student, self.config.run.device).pipeline.transformer if self.config.student else None
        )
        if student is not None:
            check_computable(student, f"{self.config.student}: transformer")
        self.models = Models(teacher=self.teacher, student=student, sampling=self.sampling)
        bare = build(self.config, self.models.without_weights())
        memory, checkpoints = training_bytes(bare, training(self.config, bare))
        network: Any = bare.student.network
        saved = network.num_parameters() * dtype_of(self.config.run.save_dtype).itemsize
        require_disk(self.output, checkpoints + saved)
        if self.config.options.training_data != "prompts" and not self.images:
            pairs = 2 * self.config.data.num_images * prod(self.latent_shape) * torch.float32.itemsize
            own = self.config.data.teacher_cache
            folder = own or cache_folder(self.config.run, self.output)
            require_disk(folder, pairs, "--teacher-cache" if own else "--cache")
        remedy = "give --optimizer adamw8bit, a smaller --student, or a machine with more"
        require_memory(
            self.pipeline.device,
            memory,
            f"{self.config.method}, in addition to the teacher and without activations,",
            remedy,
        )
        self.check_last_checkpoint()

    def run(self) -> None:
        with self.workspace.released():
            self.take_up()
            self.method = self.build()
            conditioning, batches = self.draw()
            evaluation = {name: self.measured(name, self.teacher, sampling=how) for name, how in self.teachers.items()}
            watched = self.watch_teachers()
            trainer = self.train(conditioning, batches)
            student = self.save()
            evaluation["student"] = self.measured(
                "student", student, scheduler=self.scheduler, sampling=self.student_sampling
            )
            self.hand_over(trainer.run)
            self.keep_checkpoint()
            draw_curves(self.output / "metrics.jsonl", self.output / "curves.png", watched)
            self.write(
                Outcome(
                    evaluation=evaluation,
                    calls=self.calls(),
                    parameters={"teacher": self.teacher.num_parameters(), "student": student.num_parameters()},
                    shift=self.method.shift,
                    watched=watched,
                    chosen=trainer.best.record() if trainer.best else None,
                )
            )

    def finished_at(self, steps: list[int]) -> dict[str, Any]:
        """Facts for the store of this run when it was finished, and trained on, at `steps`."""
        return {
            "options": {**self.workspace.settings, "training_steps": steps[-1]},
            "finished": steps,
            "inputs": {name: each.items for name, each in self.inputs().items()},
        }

    def check_last_checkpoint(self) -> None:
        """Raise `UserError` if a finished run is to be trained on and its last checkpoint is gone."""
        finished = self.workspace.trains_on
        if not finished or self.training_folder.exists():
            return
        if last_checkpoint.find(self.store, self.finished_at(finished)) is None:
            raise UserError(
                f"the finished run in {self.output} cannot be trained on: its last checkpoint is not in "
                f"{self.store.folder}, or what it read has changed; choose another --output to train from the start"
            )

    def take_up(self) -> None:
        """Begin the training with the last checkpoint of the finished run that is trained on."""
        finished = self.workspace.trains_on
        if not finished or self.training_folder.exists():
            return
        if kept := last_checkpoint.find(self.store, self.finished_at(finished)):
            last_checkpoint.take_up(kept, self.training_folder)
        self.console.print(
            f"training on after {finished[-1]} steps: the learning rate is warmed up again, and is then where a run "
            f"of {self.config.training.training_steps} would have it",
            soft_wrap=True,
        )

    def keep_checkpoint(self) -> None:
        """Keep what is needed to train this run on, and say how."""
        if str(self.config.run.cache) == OFF:
            return
        steps = [*self.workspace.trains_on, self.config.training.training_steps]
        size = last_checkpoint.keep(self.store, self.finished_at(steps), self.training_folder)
        if size is None:
            told = "the last checkpoint is larger than --cache-gib, and not kept to train on with more --training-steps"
        else:
            told = f"the last checkpoint, {show(size)}, is kept in {self.store.folder}: more --training-steps train on"
        self.console.print(told, soft_wrap=True)

    @property
    def training_folder(self) -> Path:
        return self.workspace.work / "training"

    def inputs(self) -> dict[str, Input]:
        found, student = super().inputs(), self.models.student
        items = {} if student is None else {"transformer": digest_of(student)}
        return {**found, "student": Input(called=f"the student in {self.config.student}", items=items)}

    def build(self) -> Distillation:
        """The method with the student, a copy of a network."""
        image_tokens = prod(self.latent_shape) // int(self.teacher.config.in_channels)
        shift = self.config.shift or shift_of(self.pipeline.scheduler, image_tokens)
        return build(self.config, self.models, shift=shift, unconditional=self.encoded([""]))

    @cached_property
    def scheduler(self) -> Any:
        """Scheduler of the student, which visits the times that it is trained at."""
        return few_step_scheduler(self.method.shift, stochastic_sampling=self.method.stochastic_sampling)

    @cached_property
    def student_sampling(self) -> SamplingDefaults:
        """Sampling of the student: guidance is in its weights, or an input."""
        sampling, scale = self.sampling, self.sampling.guidance_scale
        if (
            self.config.options.guidance_range is not None
            and embeds_guidance(self.method.student.network)
            and sampling.true_cfg_scale != 1
        ):
            scale = sampling.true_cfg_scale
        return dataclasses.replace(
            sampling, num_inference_steps=self.config.steps, true_cfg_scale=1.0, guidance_scale=scale
        )

    @cached_property
    def teachers(self) -> dict[str, SamplingDefaults]:
        steps, found = self.config.steps, {"teacher": self.sampling}
        if steps != self.sampling.num_inference_steps:
            found[f"teacher, {steps} step{'s' if steps > 1 else ''}"] = dataclasses.replace(
                self.sampling, num_inference_steps=steps
            )
        return found

    @cached_property
    def watch(self) -> Gallery:
        count, seed = self.config.watch.watch_images, self.config.run.seed + WATCH_SEEDS
        return self.gallery_in(self.workspace.folder("watch"), count=count, seed=seed)

    def encoded(self, prompts: list[str]) -> Conditioning:
        return encode_prompts(prompts, self.pipeline, self.family, self.sampling, self.config.training.batch)

    def draw(self) -> tuple[Conditioning, BatchSource]:
        """Conditioning of every prompt, and what a step is trained on: the teacher's pairs, the
        user's images, or prompts alone."""
        with self.clock("images"), patched(self.teacher):
            if self.images and self.config.options.training_data == "images":
                return self._encode_images()
            conditioning = self.encoded(list(self.prompts))
            if self.config.options.training_data == "prompts":
                return conditioning, self._no_images(conditioning)
            return conditioning, self._draw_pairs(conditioning)

    def watch_teachers(self) -> dict[str, dict[str, Any]]:
        """Measurements of the teachers to compare the student in training with; none if it is not
        watched."""
        if not self.config.watch.watch_every:
            return {}
        with self.clock("train"):
            return {
                name: self.watch.evaluate(self.pipeline, name, how, continues=True)
                for name, how in self.teachers.items()
            }

    def train(self, conditioning: Conditioning, batches: BatchSource) -> Trainer:
        """Train the student, which ends with the weights that are the result of the run."""
        method, watch = self.method, self.config.watch
        watching: dict[str, Any] = {}
        if watch.watch_every:
            watching = {
                "evaluation": Evaluation(
                    evaluate=self.measure, every=watch.watch_every, monitor=WATCHED[0], patience=watch.patience
                ),
                "observers": [SampleGrid(every=watch.watch_every, draw=self._sample_rows(conditioning))],
            }
        if self.config.training.gradient_checkpointing:
            for role in method.trains:
                network: Any = method.networks[role]
                if role != "discriminator":
                    network.enable_gradient_checkpointing()
        with self.clock("train"), ExitStack() as stack:
            trainer = Trainer(method, batches, training(self.config, method), self.training_folder, **watching)
            for role, network in method.networks.items():
                if role != "discriminator":
                    stack.enter_context(patched(network))
            trainer.fit("train", self.console)
        trainer.take_best()
        return trainer

    def measure(self) -> Mapping[str, float]:
        """Measurements of the student in training."""
        with self._mixed(), swapped(self.pipeline, self.method.student.network, self.scheduler):
            measured = self.watch.evaluate(self.pipeline, "student", self.student_sampling)
        return {name: float(measured[name]) for name in WATCHED if name in measured}

    def save(self) -> Any:
        """Write the student's pipeline to `OUTPUT/model`; return the student in the teacher's
        dtype."""
        student: Any = self.method.student.network.eval()
        student.to(dtype_of(self.config.run.save_dtype))
        before, model = self.workspace.work / "model-before", self.output / "model"
        if self.workspace.trains_on and model.exists() and not before.exists():
            model.rename(before)
        with swapped(self.pipeline, student, self.scheduler):
            save(self.pipeline, student, self.output / "model", self.student_sampling, self.prompts)
        return student.to(self.teacher.dtype)

    def calls(self) -> dict[str, int]:
        """Calls of a network for one image, by model."""
        guided = 2 if self.sampling.true_cfg_scale > 1 else 1
        return {
            **{name: guided * how.num_inference_steps for name, how in self.teachers.items()},
            "student": self.config.steps,
        }

    def write(self, outcome: Outcome) -> None:
        record = self.record(
            {
                **asdict(outcome),
                "sampling": asdict(SamplingDefaults.load(self.output / "model")),
                "teacher_sampling": asdict(self.sampling),
                "training_data": self.config.options.training_data,
            }
        )
        text = report(record, example=self.prompts[0], output=self.output)
        self.finish(
            record, text, f"{outcome.calls['teacher']} -> {outcome.calls['student']} calls of the network for an image"
        )

    def _encode_images(self) -> tuple[Conditioning, BatchSource]:
        options = TrajectoryOptions(
            images=len(self.images),
            steps=self.config.data.image_steps or self.sampling.num_inference_steps,
            batch=self.config.training.batch,
            seed=self.config.run.seed,
        )
        with bar(self.console, "encode images", len(self.images)) as tick:
            encoded = trajectories(
                Source(pipeline=self.pipeline, prompts=self.prompts, sampling=self.sampling, images=self.images),
                options,
                cache=self.store.entry("images", self.facts(asdict(options))),
                tick=tick,
            )
        # The student is not sampled with the empty prompt.
        pool = encoded.pool(dropout=0.0)
        return encoded.conditioning[:-1], lambda step, rng: pool.batch(self.config.training.batch, rng)

    def _no_images(self, conditioning: Conditioning) -> BatchSource:
        blank = torch.zeros(()).expand(len(conditioning), *self.latent_shape)
        pool = LatentPool(
            latents=blank, prompts=torch.arange(len(conditioning)), conditioning=conditioning, dropout=0.0
        )
        return lambda step, rng: pool.batch(self.config.training.batch, rng)

    def _draw_pairs(self, conditioning: Conditioning) -> BatchSource:
        data, batch, seed = self.config.data, self.config.training.batch, self.config.run.seed
        options = PairOptions(
            count=data.num_images, steps=data.image_steps or self.sampling.num_inference_steps, batch=batch
        )
        folder = data.teacher_cache or self.store.entry(
            "pairs",
            self.facts(
                {
                    **asdict(options),
                    "guidance_range": self.config.options.guidance_range,
                    "shift": self.method.shift,
                    "seed": seed,
                }
            ),
        )
        encoders = {name: found for name, found in self.parts.items() if name.startswith(("text", "token"))}
        with bar(self.console, "let the teacher draw", options.count) as tick:
            pairs = teacher_pairs(
                self.method,
                folder,
                options,
                conditioning=conditioning,
                shape=self.latent_shape,
                seed=seed,
                device=self.teacher.device,
                settings={
                    "teacher": self.parts["transformer"],
                    "text encoders": digest(encoders),
                    "texts": digest({"prompts": list(self.prompts)}),
                    "max_sequence_length": self.sampling.max_sequence_length,
                },
                tick=tick,
            )
        return lambda step, rng: pairs.batch(batch, rng)

    def _sample_rows(self, conditioning: Conditioning) -> Any:
        """A function that draws the grid of images of the student in training, always from the same
        noise."""
        count = min(GRID_IMAGES, len(conditioning))
        rows = torch.arange(count) * len(conditioning) // count
        noise = torch.randn(
            count, *self.latent_shape, generator=torch.Generator().manual_seed(self.config.run.seed)
        ).to(conditioning.prompt_embeds)
        start = Start(noise=noise, conditioning=conditioning[rows.to(noise.device)])
        grid = SampleRows(self.method, self.pipeline, self.scheduler, start)

        def draw() -> Mapping[str, torch.Tensor]:
            with self._mixed():
                return grid.draw(self.sampling, self.student_sampling)

        return draw

    def _mixed(self) -> torch.autocast:
        """Autocast for a student in float32 within a pipeline in bfloat16, which hands its dtype to
        the student."""
        return torch.autocast(
            self.teacher.device.type, dtype=torch.bfloat16, enabled=self.teacher.dtype != torch.float32
        )
