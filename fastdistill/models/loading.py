"""Loading of a pipeline, with a message that says what is wrong with a folder that does not load."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.models.families import FAMILIES
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.weights import check_computable, check_finite
from fastdistill.run.files import begins_with_mark, read_json, read_lines

EMBEDDED = "emoji"
PIPELINES = ("FluxPipeline",)
PROMPTS_FILE = "prompts.txt"
"""Prompts of a pipeline's folder, one a line."""

# For a model that brings no prompts.txt: subjects, styles, text, counting and places that a general
# model should keep.
GENERAL_PROMPTS = (
    "a photograph of an astronaut riding a horse on the moon",
    "a red fox in fresh snow, golden hour",
    "a bowl of ramen with a soft-boiled egg, top view",
    "an oil painting of a stormy sea with a small lighthouse",
    "a street sign that says 'fast and small'",
    "three green apples and two oranges on a wooden table",
    "portrait of an old fisherman with a white beard, studio light",
    "a watercolour of a mountain village in spring",
    "a macro photograph of a dew drop on a spider web",
    "an isometric illustration of a tiny bookshop",
    "a glass sphere on a beach reflecting the sunset",
    "a crowded night market in the rain, neon reflections",
    "a pencil sketch of a violin",
    "a robot reading a newspaper in a cafe",
    "a bird's-eye view of a winding river through autumn forest",
    "a still life with a blue vase to the left of a yellow lemon",
)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Pipeline with its sampling defaults and prompts."""

    name: str
    pipeline: Any
    sampling: SamplingDefaults
    prompts: list[str]


def embedded_folder() -> Path:
    """Folder of the pipeline that ships with the package."""
    return Path(str(resources.files("fastdistill"))) / "assets" / "emoji" / "pipeline"


def default_device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_on(device: str) -> torch.dtype:
    """Dtype in which a pipeline is loaded on `device`."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def load(model: str, device: str | None = None) -> Loaded:
    """Load a FLUX pipeline, in float32 on a CPU and in bfloat16 on a GPU.

    Args:
        model: `"emoji"` for the embedded pipeline, a local folder, or a hub id.

    Raises:
        UserError: there is no such pipeline, it is of another class, a part is missing, or a weight
            is not finite, or not of a type to compute with.
    """
    device = device or default_device()
    folder = embedded_folder() if model == EMBEDDED else Path(model)
    local = model == EMBEDDED or folder.exists()
    _check_device(device)
    if local:
        _check_folder(folder)
    elif model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"there is no folder {model}; give a FLUX pipeline's folder, a hub id such as owner/name, or {EMBEDDED!r}"
        )
    quiet()
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(folder if local else model, dtype=dtype_on(device))
    except (
        Exception
    ) as error:  # diffusers, transformers, tokenizers and safetensors each raise their own on a damaged file
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{model} does not load as a diffusers pipeline: {first_line}") from error
    _check_class(type(pipeline).__name__, type(getattr(pipeline, "transformer", None)).__name__, model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            check_finite(module, f"{model}: {part}")
    check_computable(pipeline.transformer, f"{model}: transformer")
    return Loaded(name=model, pipeline=pipeline, sampling=SamplingDefaults.load(folder), prompts=_prompts(folder))


def _check_device(device: str) -> None:
    """Raise `UserError` for a device that is not here, before gigabytes are read for it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(f"--device {device} cannot be used; this machine has {here}") from error


def read_prompts(path: Path) -> list[str]:
    """Read the non-empty lines of a text file.

    Raises:
        UserError: there is no such file, it is not text, or it has no such line.
    """
    if not path.is_file():
        raise UserError(f"there is no prompt file {path}")
    prompts = read_lines(path)
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    return prompts


def quiet() -> None:
    """Keep libraries from showing progress of their own, and warnings that have no consequence."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # bitsandbytes warns at its import of a kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # diffusers warns of a list of modules to keep in float32 that is empty.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # rms_norm under autocast: the fused path is not taken, the result is right.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{folder} is no diffusers pipeline: it has no model_index.json; give the folder that save_pretrained wrote"
        )
    entries = read_json(index)
    for path in [index, *sorted(folder.glob("*/*.json"))]:
        if begins_with_mark(path):
            raise UserError(
                f"{path} begins with a byte order mark, which diffusers does not read; save it as UTF-8 without one"
            )
    transformer = entries.get("transformer")
    _check_class(
        entries.get("_class_name", "a pipeline without a class"),
        transformer[1] if isinstance(transformer, list) else None,
        str(folder),
    )
    parts = [name for name, entry in entries.items() if isinstance(entry, list) and entry[0]]
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} lacks its part{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            "get a complete copy of the pipeline"
        )
    if not (folder / "transformer" / "config.json").is_file():
        raise UserError(f"{folder}: transformer has no config.json; get a complete copy of the pipeline")
    for name in parts:
        # Only models have one; schedulers and tokenizers call theirs otherwise.
        if (folder / name / "config.json").is_file():
            _check_weight_files(folder / name)


def _check_weight_files(part: Path) -> None:
    """Raise `UserError` unless a set of weights is complete.

    A set is one file, or the files that an index names. There may be several sets, such as one of
    half precision. One complete set suffices.
    """
    files = {path.name for pattern in ("*.safetensors", "*.bin") for path in part.glob(pattern)}
    lost: list[str] = []
    for index in sorted(part.glob("*.index*.json")):
        try:
            shards = set(read_json(index)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is not the index of a model's weights; get a sound copy of the pipeline"
            ) from error
        if shards <= files:
            return
        lost += sorted(shards - files)
    if all("-of-" in name for name in files):
        what = f"lacks {', '.join(lost)}" if lost else "has no weights"
        raise UserError(f"{part.parent}: {part.name} {what}; get a complete copy of the pipeline")


def _check_class(name: str, transformer: str | None, model: str) -> None:
    if name not in PIPELINES:
        from_python = (
            f". Its {transformer} can be cut from Python, with fastdistill.compress.cut"
            if transformer in FAMILIES
            else ""
        )
        raise UserError(f"{model} is a {name}; supported: {', '.join(PIPELINES)}{from_python}")


def _prompts(folder: Path) -> list[str]:
    path = folder / PROMPTS_FILE
    return read_prompts(path) if path.exists() else list(GENERAL_PROMPTS)
