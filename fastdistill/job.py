"""One run of a command that makes a pipeline out of another, as an object: what the stages share is
made once and held here."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console

from fastdistill.data.images import Captioned, read_folder
from fastdistill.errors import UserError, notice
from fastdistill.evaluation.gallery import Gallery
from fastdistill.evaluation.table import summarise
from fastdistill.models.checks import check_call, tell_of_long_prompts
from fastdistill.models.digest import digests
from fastdistill.models.families import family_of
from fastdistill.models.loading import load, read_prompts
from fastdistill.models.sampling import SamplingDefaults, images_at_once
from fastdistill.models.saving import swapped
from fastdistill.models.weights import check_computable
from fastdistill.run.files import digest, without_folders, write_image, write_json, write_text
from fastdistill.run.inputs import Input
from fastdistill.run.options import JobConfig, RunOptions, TrainingOptions, flag
from fastdistill.run.packages import require_package
from fastdistill.run.resources import GIB, require_writable
from fastdistill.run.store import OFF, Store, default_folder
from fastdistill.run.versions import versions
from fastdistill.run.workspace import Workspace
from fastdistill.train.config import TrainConfig
from fastdistill.train.estimate import memory
from fastdistill.train.method import Method

ConfigT = TypeVar("ConfigT", bound=JobConfig)


class Job(ABC, Generic[ConfigT]):
    """A run from the model's folder to the finished output folder; a stage is a method.

    Attributes:
        config: the options.
        pipeline: the model, as diffusers opens it.
        teacher: the pipeline's transformer, frozen.
        family: the family of `teacher`.
        prompts: the prompts of `--prompts`, else those that come with the model.
        images: the images of `--images`; empty without the option.
        sampling: how `pipeline` is sampled.
        latent_shape: (C, H, W) of the latents of an image of `sampling`'s size.
        output: the folder to write to.
        workspace: `output` with the results of finished stages.
        store: results that other runs can use, too.
        gallery: measures models, and keeps their images.
        console: where progress is shown; quiet by default.
    """

    result: ClassVar[str]
    """File in `output` that ends a run, and holds everything about it."""
    reference: ClassVar[str]
    """Name of the model that the others are compared with in `gallery`."""

    def __init__(self, config: ConfigT, *, console: Console | None = None, command: str = "") -> None:
        """Open the model, refuse what cannot be done, and claim the output folder.

        Args:
            command: what the user typed, for the record.

        Raises:
            UserError: an input is missing or unsound, the request cannot be met, the memory or the
                disk does not suffice, or the output folder holds something else.
        """
        self.config, self.command = config, command
        self.console = Console(quiet=True) if console is None else console
        run = config.run
        self.output = run.output or Path("runs") / config.name
        self.workspace = Workspace(self.output, config.settings(), self.result, config.more)
        self.check_config(config)
        prompts = read_prompts(run.prompts) if run.prompts else None
        self.images = self._own_images(run.images) if run.images else []
        self.console.print(f"loading {run.model}")
        loaded = load(run.model, run.device)
        self.prompts = prompts or loaded.prompts
        self.pipeline = loaded.pipeline
        self.teacher: Any = loaded.pipeline.transformer.requires_grad_(False)
        self.family = family_of(self.teacher)
        self.sampling: SamplingDefaults = loaded.sampling.replaced(config.sampling)
        check_computable(self.teacher, f"{run.model}: transformer")
        check_call(self.pipeline, self.sampling)
        captions = [image.caption for image in self.images]
        tell_of_long_prompts(self.pipeline, captions or self.prompts, self.sampling.max_sequence_length)
        self.latent_shape = self.family.latent_shape(self.pipeline, self.sampling.height, self.sampling.width)
        self.store = Store(cache_folder(run, self.output), int(run.cache_gib * GIB))
        self.check()
        self.workspace.claim(self.inputs())
        if self.workspace.resumed:
            self.console.print(f"continuing the interrupted run in {self.output}")
        self.clock = self.workspace.clock
        try:
            self.store.trim()
            self.gallery = self.gallery_in(self.workspace.work, count=run.evaluate_images, seed=run.seed)
        except BaseException:
            self.workspace.withdraw()
            raise

    @classmethod
    def check_config(cls, config: ConfigT) -> None:
        """Refuse what is wrong whatever the model is, and tell of options that do nothing.

        Raises:
            UserError: a package is missing, or a folder to write to cannot be used.
        """
        run = config.run
        if config.training.optimizer == "adamw8bit":
            require_package("bitsandbytes", "--optimizer adamw8bit")
        if config.training.tensorboard:
            require_package("tensorboard", "--tensorboard")
        require_writable(run.output or Path("runs"))
        if run.cache is not None and str(run.cache) != OFF:
            require_writable(run.cache, "--cache")
        for name, reason in config.idle().items():
            notice(f"{flag(name)} does nothing {reason}")

    @classmethod
    def check_inputs(cls, config: ConfigT) -> None:
        """Refuse prompts and images that a run would refuse when it reads them.

        Raises:
            UserError: a file or folder is missing or cannot be used.
        """
        if config.run.prompts:
            read_prompts(config.run.prompts)
        if config.run.images:
            read_folder(config.run.images, 1)

    @classmethod
    @abstractmethod
    def plan(cls, config: ConfigT) -> str:
        """Text that `--dry-run` prints, from the model's config alone.

        Raises:
            UserError: there is no such model, or the request cannot be met.
        """

    @abstractmethod
    def check(self) -> None:
        """Refuse what cannot be done, before any work and before the output folder is claimed.

        Raises:
            UserError: the request does not fit the model, or the memory or the disk does not
                suffice.
        """

    @abstractmethod
    def run(self) -> None:
        """Run every stage, or read its result from the workspace if an interrupted run has finished
        it; inside `workspace.released()`, which leaves the output folder to other processes."""

    def inputs(self) -> dict[str, Input]:
        """Content of all that the run reads, by which a run that continues is known."""
        run = self.config.run
        sampling = {name: str(value) for name, value in asdict(self.sampling).items()}
        prompts = {f"line {number}": digest({"prompt": prompt}) for number, prompt in enumerate(self.prompts, 1)}
        return {
            "model": Input(called=f"the model in {run.model}", items=self.parts),
            "sampling": Input(called=f"the sampling defaults of {run.model}", items=sampling),
            "prompts": Input(called=f"the prompts in {run.prompts or run.model}", items=prompts),
            "images": Input(called=f"the images in {run.images}", items=self.image_digests),
        }

    def facts(self, own: Mapping[str, Any], *, of_images: bool = True) -> dict[str, Any]:
        """Facts for `store.entry` on which a result of the full model depends: the content of its
        parts, the device, prompts, images with their captions, and sampling; and the result's own.

        Args:
            own: amounts, seeds and the like. They stay apart: no name of theirs can take the place
                of another fact.
            of_images: whether the images of `--images` matter to the result.
        """
        origin = {
            "parts": self.parts,
            "device": self.pipeline.device.type,
            "prompts": list(self.prompts),
            "images": self.image_digests if of_images else None,
            "sampling": asdict(self.sampling),
        }
        return {"origin": origin, "own": dict(own)}

    def _own_images(self, folder: Path) -> list[Captioned]:
        """Images of the user's `folder`, of which a line is printed."""
        if self.output.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{self.output} lies in {folder}, whose subfolders are read for images; choose another --output"
            )
        found = read_folder(folder, self.config.image_count)
        self.console.print(str(found), markup=False, soft_wrap=True)
        return found.images

    @cached_property
    def parts(self) -> dict[str, str]:
        """Digest of each part of the pipeline."""
        return digests(self.pipeline)

    @cached_property
    def image_digests(self) -> dict[str, str]:
        """Digest of each image of `--images` with its caption, by its path in the folder."""
        folder = self.config.run.images
        return {
            os.path.relpath(image.path, folder): digest(
                {"caption": image.caption, "file": hashlib.sha256(image.path.read_bytes()).hexdigest()}
            )
            for image in self.images
        }

    def gallery_in(self, folder: Path, *, count: int, seed: int) -> Gallery:
        """A gallery of `count` images of each model in `folder`; those of the reference are in the
        store, where other runs find them."""
        return Gallery(
            folder,
            self.prompts,
            self.sampling,
            reference=self.reference,
            count=count,
            seed=seed,
            batch=self.images_at_once,
            console=self.console,
            shared=self.store.entry("measured", self.facts({"count": count, "seed": seed}, of_images=False)),
        )

    @property
    def images_at_once(self) -> int:
        """Number of images that are drawn at once."""
        return images_at_once(self.config.training.batch, self.sampling)

    def measured(
        self, name: str, transformer: Any, *, scheduler: Any = None, sampling: SamplingDefaults | None = None
    ) -> dict[str, Any]:
        """Measurements of the pipeline with another transformer, kept for a run that is continued.

        Args:
            name: of the model, in the gallery and in the report.
            scheduler: by default the pipeline's own.
            sampling: by default `self.sampling`.
        """
        with self.clock("evaluate"), swapped(self.pipeline, transformer, scheduler):
            if name.split(",")[0] == self.reference:
                # Kept with its images, which may be in another --cache now.
                return self.gallery.evaluate(self.pipeline, name, sampling, continues=True)
            found = self.workspace.cached(
                f"evaluation-{name}", lambda: self.gallery.evaluate(self.pipeline, name, sampling, continues=True)
            )
        return dict(found)

    def hand_over(self, training: Path) -> None:
        """Copy what was logged in the folder `training` to the output folder."""
        shutil.copy(training / "metrics.jsonl", self.output / "metrics.jsonl")
        for folder in ("samples", "tensorboard"):
            if (training / folder).exists():
                shutil.copytree(training / folder, self.output / folder, dirs_exist_ok=True)

    def record(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Everything about the run, as JSON: `own`, and what every job records.

        `trained_on` are the numbers of steps at which the run was finished before it was trained
        on. `images` is the number of images from a folder that the run worked on, 0 if the model
        drew them.
        """
        flags = self.config.flags()
        return {
            "format": 1,
            "command": self.command,
            "model": self.config.run.model,
            **own,
            "trained_on": self.workspace.trains_on,
            "prompts": len(self.prompts),
            "images": len(self.images),
            "seconds": self.workspace.seconds,
            "config": {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()},
            "versions": versions(),
        }

    def _to_hand_on(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record with names in place of the paths that the user gave, which are nobody else's."""
        paths = [
            str(value)
            for value in self.config.flags().values()
            if isinstance(value, Path) or (isinstance(value, str) and Path(value).exists())
        ]
        words = without_folders(shlex.split(self.command), paths)
        return {**without_folders(record, paths), "command": shlex.join(words)}

    def finish(self, record: Mapping[str, Any], report: str, headline: str) -> None:
        """Write what people and programs read, and remove what only a continued run would have
        needed.

        Args:
            record: what `Job.record` returned, with the measurements of each model under
                `evaluation`.
            report: text of `report.md`.
            headline: first line of the closing summary.
        """
        write_image(self.output / "grid.png", self.gallery.grid(list(record["evaluation"])))
        write_text(self.output / "report.md", report)
        # The weights travel alone, so the record goes with them, too; diffusers ignores it there.
        write_json(self.output / "model" / self.result, self._to_hand_on(record))
        write_json(self.output / self.result, record)
        self.workspace.finish()
        self.console.print(headline, soft_wrap=True)
        summarise(record["evaluation"], self.output, self.console)


def cache_folder(options: RunOptions, output: Path) -> Path:
    """Folder of `--cache`; within the run's `output`, until it is finished, where nothing is to be
    kept or where the user's own folder cannot be written."""
    if options.cache is not None:
        return output / "work" / "cache" if str(options.cache) == OFF else options.cache
    try:
        require_writable(default_folder())
    except UserError:
        return output / "work" / "cache"
    return default_folder()


def train_config(options: TrainingOptions, *, steps: int, seed: int, scale: float = 1.0) -> TrainConfig:
    """Training of a job's student for `steps`; `scale` multiplies the learning rate."""
    return TrainConfig(
        steps=steps,
        learning_rate=options.learning_rate * scale,
        warmup_steps=min(20, steps),
        optimizer=options.optimizer,
        betas=options.betas,
        ema_decay=options.ema_decay,
        micro_batches=options.micro_batches,
        precision=options.precision,
        seed=seed,
        log_every=10,
        checkpoint_every=options.checkpoint_every,
        checkpoint_minutes=options.checkpoint_minutes,
        tensorboard=options.tensorboard,
    )


def training_bytes(method: Method, config: TrainConfig) -> tuple[int, int]:
    """Bytes of memory that training takes, and bytes of disk that its checkpoints take.

    The memory is without activations, and without the teacher, which is there already. The networks
    of `method` may be on the meta device.
    """
    items = [item for item in memory(method, config) if item.role != "teacher"]
    # The newest checkpoint is there until the next one is written.
    return sum(item.bytes for item in items), 2 * sum(item.bytes for item in items if item.what != "gradients")


def dtype_of(name: str) -> torch.dtype:
    """The type that torch calls `name`, as `--save-dtype` gives it."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
