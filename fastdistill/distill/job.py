"""The distillation of one pipeline from end to end: let the teacher draw, train, measure, write."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastdistill.data.images import Captioned
from fastdistill.data.latents import LatentPool
from fastdistill.data.trajectories import encode_prompts, trajectories
from fastdistill.distill.build import build, requirements, training
from fastdistill.distill.config import DistillConfig
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.distill.methods.teacher_pairs import PairOptions, teacher_pairs
from fastdistill.distill.sample_rows import Rows
from fastdistill.models.families import family_of
from fastdistill.models.families.family import Conditioning, Family
from fastdistill.models.guidance_embedder import embeds_guidance
from fastdistill.models.patch import patched
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.saving import save, swapped
from fastdistill.models.schedule import few_step_scheduler, shift_of
from fastdistill.run.files import digest
from fastdistill.run.progress import bar
from fastdistill.run.resources import require_disk, require_memory
from fastdistill.run.workspace import Workspace
from fastdistill.train.trainer import BatchSource, Trainer
from fastdistill.train.watch import Evaluation, SampleGrid

Evaluate = Callable[[Any, str, SamplingDefaults], dict[str, Any]]
"""``(pipeline, name, sampling) -> measurements``, a JSON object."""
WATCHED = ("frechet_distance_to_reference", "frechet_distance", "background_total_variation", "background_purity", "caption_accuracy")
"""The first decides. It is there for every model; and images of the same prompts and noise differ less by chance than from fresh ones."""
GRID_PICTURES = 8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run knows; the manifest and the report are made from it."""

    evaluation: dict[str, dict[str, Any]]
    """By model: the teacher, the teacher in as many steps as the student if that is another number, the student."""
    calls: dict[str, int]
    """Of a network for one image, by model."""
    parameters: dict[str, int]
    shift: float
    watched: dict[str, dict[str, Any]]
    """What the student was compared with while it was trained, measured as it was."""
    chosen: dict[str, Any] | None
    """The measurement by which the best weights were chosen, and their step."""
    seconds: dict[str, float]


def student_sampling(config: DistillConfig, sampling: SamplingDefaults, student: Any) -> SamplingDefaults:
    """How the student of a teacher that is sampled by ``sampling`` is sampled: guidance is in its weights, or an input."""
    scale = sampling.guidance_scale
    if config.options.guidance_range is not None and embeds_guidance(student) and sampling.true_cfg_scale != 1:
        scale = sampling.true_cfg_scale
    return dataclasses.replace(sampling, num_inference_steps=config.steps, true_cfg_scale=1.0, guidance_scale=scale)


def validate(config: DistillConfig, pipeline: Any, student: Any | None, sampling: SamplingDefaults, output: Path) -> None:
    """
    Raises:
        UserError: teacher, student and method do not go together, or the memory or the disk of ``output`` does not suffice.
    """
    memory, disk = requirements(config, pipeline.transformer, student, sampling)
    shape = family_of(pipeline.transformer).latent_shape(pipeline, sampling.height, sampling.width)
    require_disk(output, disk + 2 * config.num_images * prod(shape) * torch.float32.itemsize)
    remedy = "give --optimizer adamw8bit, a smaller --student, or a machine with more"
    require_memory(pipeline.device, memory, f"{config.method}, beside the teacher and without activations,", remedy)


def distill(
    config: DistillConfig,
    pipeline: Any,
    student: Any | None,
    prompts: Sequence[str],
    images: Sequence[Captioned],
    sampling: SamplingDefaults,
    workspace: Workspace,
    evaluate: Evaluate,
    watch: Evaluate,
    console: Console,
) -> Outcome:
    """Run every stage, or read it from the workspace if an interrupted run has finished it. Leaves the pipeline as it was.

    Args:
        student: a transformer to start from; None: the teacher's weights.
        evaluate: measures teacher and student for the report.
        watch: measures the student while it is trained.

    Raises:
        UserError: :func:`validate` does, or the training diverges.
    """
    teacher = pipeline.transformer.requires_grad_(False)
    family = family_of(teacher)
    clock, work = workspace.clock, workspace.work
    shift = config.shift or shift_of(pipeline.scheduler, _image_tokens(pipeline, family, sampling))
    empty = encode_prompts([""], pipeline, family, sampling, batch=1)
    method = build(config, teacher, student, sampling, shift=shift, unconditional=empty)
    scheduler = few_step_scheduler(shift, stochastic_sampling=method.stochastic_sampling)
    drawn = student_sampling(config, sampling, method.networks["student"])
    # What the student is compared with: the teacher as it is sampled, and in as many steps as the student.
    teachers = {"teacher": sampling}
    if config.steps != sampling.num_inference_steps:
        name = f"teacher, {config.steps} step{'s' if config.steps > 1 else ''}"
        teachers[name] = dataclasses.replace(sampling, num_inference_steps=config.steps)

    with clock("images"), patched(teacher):
        conditioning, batches = _batches(config, method, pipeline, prompts, images, sampling, workspace, console)

    def measured(stage: str, measure: Evaluate) -> dict[str, dict[str, Any]]:
        return {
            name: workspace.cached(f"{stage}-teacher-{how.num_inference_steps}", partial(measure, pipeline, name, how))
            for name, how in teachers.items()
        }

    with clock("evaluate"):
        evaluation = measured("evaluation", evaluate)
    watched: dict[str, dict[str, Any]] = {}
    with clock("train"):
        observing: dict[str, Any] = {}
        if config.watch_every:
            watched = measured("watch", watch)
            observing = _observing(config, method, pipeline, scheduler, sampling, drawn, conditioning, watch)
        trainer = Trainer(method, batches, training(config, method), work / "training", **observing)
        with ExitStack() as stack:
            for role, network in method.networks.items():
                if role != "discriminator":
                    stack.enter_context(patched(network))
            trainer.fit("train")
        trainer.take_best()

    trained: Any = method.networks["student"].eval()
    trained.to(getattr(torch, config.save_dtype))
    with swapped(pipeline, trained, scheduler):
        save(pipeline, trained, workspace.output / "model", drawn, prompts)
    trained.to(teacher.dtype)
    with clock("evaluate"), swapped(pipeline, trained, scheduler):
        evaluation["student"] = workspace.cached("evaluation-student", lambda: evaluate(pipeline, "student", drawn))
    _hand_over(work / "training", workspace.output)
    guided = 2 if sampling.true_cfg_scale > 1 else 1
    return Outcome(
        evaluation=evaluation,
        calls={**{name: guided * how.num_inference_steps for name, how in teachers.items()}, "student": config.steps},
        parameters={"teacher": teacher.num_parameters(), "student": trained.num_parameters()},
        shift=shift,
        watched=watched,
        chosen=trainer.best.record() if trainer.best else None,
        seconds=workspace.seconds,
    )


def _batches(
    config: DistillConfig,
    method: Distillation,
    pipeline: Any,
    prompts: Sequence[str],
    images: Sequence[Captioned],
    sampling: SamplingDefaults,
    workspace: Workspace,
    console: Console,
) -> tuple[Conditioning, BatchSource]:
    """The conditioning of every prompt, and what a step is trained on."""
    teacher = pipeline.transformer
    family = family_of(teacher)
    steps = config.image_steps or sampling.num_inference_steps
    if images and config.options.training_data == "images":
        with bar(console, "encode images", len(images)) as tick:
            encoded = trajectories(
                pipeline,
                family,
                prompts,
                sampling,
                count=len(images),
                steps=steps,
                batch=config.batch,
                generator=torch.Generator().manual_seed(config.seed),
                images=images,
                cache=workspace.work / "images.safetensors",
                tick=tick,
            )
        # The student is not sampled with the empty prompt.
        pool = encoded.pool(dropout=0.0)
        return encoded.conditioning[:-1], lambda step, rng: pool.batch(config.batch, rng)
    conditioning = encode_prompts(prompts, pipeline, family, sampling, config.batch)
    shape = family.latent_shape(pipeline, sampling.height, sampling.width)
    if config.options.training_data == "prompts":
        blank = torch.zeros(()).expand(len(conditioning), *shape)
        pool = LatentPool(latents=blank, prompts=torch.arange(len(conditioning)), conditioning=conditioning, dropout=0.0)
        return conditioning, lambda step, rng: pool.batch(config.batch, rng)
    with bar(console, "let the teacher draw", config.num_images) as tick:
        pairs = teacher_pairs(
            method,
            config.teacher_cache or workspace.work / "pairs",
            PairOptions(count=config.num_images, steps=steps, batch=config.batch),
            conditioning=conditioning,
            shape=shape,
            seed=config.seed,
            device=teacher.device,
            settings={"teacher": config.model, "texts": digest({"prompts": list(prompts)})},
            tick=tick,
        )
    return conditioning, lambda step, rng: pairs.batch(config.batch, rng)


def _observing(
    config: DistillConfig,
    method: Distillation,
    pipeline: Any,
    scheduler: Any,
    sampling: SamplingDefaults,
    drawn: SamplingDefaults,
    conditioning: Conditioning,
    watch: Evaluate,
) -> dict[str, Any]:
    """The trainer's evaluation of the student, and its grid of images."""
    teacher, student = pipeline.transformer, method.networks["student"]
    family = family_of(teacher)

    def mixed() -> torch.autocast:
        # A pipeline in bfloat16 hands its dtype to the student, whose weights are float32.
        return torch.autocast(teacher.device.type, dtype=torch.bfloat16, enabled=teacher.dtype != torch.float32)

    def measure() -> Mapping[str, float]:
        with mixed(), swapped(pipeline, student, scheduler):
            measured = watch(pipeline, "student", drawn)
        return {name: float(measured[name]) for name in WATCHED if name in measured}

    count = min(GRID_PICTURES, len(conditioning))
    rows = torch.arange(count) * len(conditioning) // count
    shape = family.latent_shape(pipeline, sampling.height, sampling.width)
    noise = torch.randn(len(rows), *shape, generator=torch.Generator().manual_seed(config.seed)).to(conditioning.prompt_embeds)
    draw = Rows(method, pipeline, family, scheduler, sampling, drawn, conditioning[rows.to(noise.device)], noise)

    def images() -> Mapping[str, torch.Tensor]:
        with mixed():
            return draw()

    return {
        "evaluation": Evaluation(evaluate=measure, every=config.watch_every, monitor=WATCHED[0], patience=config.patience),
        "observers": [SampleGrid(every=config.watch_every, draw=images)],
    }


def _image_tokens(pipeline: Any, family: Family, sampling: SamplingDefaults) -> int:
    channels, height, width = family.latent_shape(pipeline, sampling.height, sampling.width)
    return channels * height * width // int(pipeline.transformer.config.in_channels)


def _hand_over(run: Path, output: Path) -> None:
    """What was logged while training, beside the model."""
    shutil.copy(run / "metrics.jsonl", output / "metrics.jsonl")
    for folder in ("samples", "tensorboard"):
        if (run / folder).exists():
            shutil.copytree(run / folder, output / folder, dirs_exist_ok=True)
