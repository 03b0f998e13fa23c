"""Loading of a pipeline, with a message that says what is wrong with a folder that does not load."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill.errors import UserError, first_line, notice
from fastdistill.models.checks import check_pipeline
from fastdistill.models.folder import Part, holds_weights, is_complete, missing_of, parts_of, read_index, variant_of
from fastdistill.models.sampling import FILE, SamplingDefaults
from fastdistill.models.tokenizers import ENCODERS, check_vocabulary
from fastdistill.models.weights import check_finite, check_loaded, check_shapes
from fastdistill.run.files import read_lines

EMBEDDED = "emoji"
PROMPTS_FILE = "prompts.txt"
"""Prompts of a pipeline's folder, one a line."""

OTHER_SHAPE = re.compile(
    r"(?P<name>\S+) expected shape torch\.Size\((?P<described>.*?)\), but got torch\.Size\((?P<there>.*?)\)"
)
"""Words of diffusers of a weight that has another shape than the config describes."""

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

    A part whose weights are there only as a variant, such as fp16, is loaded from that variant, and
    a `Notice` says so. Quantised parts stay quantised.

    Args:
        model: `"emoji"` for the embedded pipeline, a local folder, or a hub id.

    Raises:
        UserError: there is no such pipeline, it is of another class, a part is missing, weights and
            config of a part do not belong together, or a weight is not finite.
    """
    device = device or default_device()
    _check_device(device)
    folder = _folder(model)
    parts, dtype = parts_of(folder), dtype_on(device)
    variants = {part.name: variant_of(folder / part.name, dtype) for part in parts if holds_weights(folder / part.name)}
    for variant in sorted({variant for variant in variants.values() if variant}):
        names = [name for name, found in variants.items() if found == variant]
        lost = [f"{name} lacks {file}" for name in names for file in missing_of(folder / name)]
        reason = f"; {', '.join(lost)}" if lost else ""
        notice(f"{model} has the weights of {', '.join(names)} only as the variant {variant}, which is loaded{reason}")
    quiet()
    from diffusers import DiffusionPipeline

    for part in parts:
        if part.name in ENCODERS:
            check_vocabulary(folder, part)
    with _errors_of(model):
        models = {
            part.name: _load_part(folder, part, class_, variants[part.name], dtype)
            for part in parts
            if part.name in variants and (class_ := _model_class(part))
        }
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **models)
    check_pipeline(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            check_finite(module, f"{model}: {name}")
    return Loaded(name=model, pipeline=pipeline, sampling=SamplingDefaults.load(folder), prompts=_prompts(folder))


def _folder(model: str) -> Path:
    """Folder of the pipeline that `load` is asked for; one on the hub is downloaded.

    Raises:
        UserError: there is no such folder, and nothing of that name comes from the hub.
    """
    if model == EMBEDDED:
        return embedded_folder()
    if (folder := Path(model)).exists():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"there is no folder {model}; give a FLUX pipeline's folder, a hub id such as owner/name, or {EMBEDDED!r}"
        )
    with _errors_of(model):
        return _downloaded(model)


def _downloaded(model: str) -> Path:
    """Folder of a pipeline of the hub, with the weights that are there, plain or of a variant."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # The class first: another pipeline's gigabytes would come for nothing.
    read_index(Path(hf_hub_download(model, "model_index.json")))
    folder = Path(DiffusionPipeline.download(model))
    for variant in ("bf16", "fp16"):
        if not is_complete(folder):
            with suppress(ValueError):  # there is no such variant
                DiffusionPipeline.download(model, variant=variant)
    for name in (FILE, PROMPTS_FILE):
        with suppress(EntryNotFoundError, LocalEntryNotFoundError):
            hf_hub_download(model, name)
    return folder


def _model_class(part: Part) -> Any:
    """Class of a part that has weights, or None if only the pipeline knows how to load it."""
    if part.library not in ("diffusers", "transformers"):
        return None
    class_ = getattr(import_module(part.library), part.class_name, None)
    return class_ if isinstance(class_, type) and issubclass(class_, nn.Module) else None


def _load_part(folder: Path, part: Part, class_: Any, variant: str | None, dtype: torch.dtype) -> Any:
    """Model of `part`, which has every weight that its files hold, and no other."""
    name = f"{folder}: {part.name}"
    # diffusers takes weights of other shapes only where it needs the memory twice, and else names one.
    lenient = {"ignore_mismatched_sizes": True} if part.library == "transformers" else {}
    try:
        module, loading = class_.from_pretrained(
            folder, subfolder=part.name, dtype=dtype, variant=variant, output_loading_info=True, **lenient
        )
    except ValueError as error:
        if found := OTHER_SHAPE.search(str(error)):
            check_shapes([(found["name"], found["there"], found["described"])], name)
        raise
    check_shapes(loading["mismatched_keys"], name)
    check_loaded(module, loading, name)
    return module


@contextmanager
def _errors_of(model: str) -> Iterator[None]:
    """Turn every error of the block into a `UserError`: diffusers, transformers, tokenizers and
    safetensors each raise their own on a damaged file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{model} does not load as a diffusers pipeline: {first_line(error)}") from error


def _check_device(device: str) -> None:
    """Raise `UserError` for a device that is not here, before gigabytes are read for it."""
    try:
        # The meta device is everywhere, and keeps no numbers.
        usable = not torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(f"--device {device} cannot be used; this machine has {here}")


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

    # diffusers warns of a list of modules to keep in float32 that is empty.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # transformers reports weights that do not fit in a table; `check_loaded` says it in a line.
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    # rms_norm under autocast: the fused path is not taken, the result is right.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def _prompts(folder: Path) -> list[str]:
    path = folder / PROMPTS_FILE
    return read_prompts(path) if path.exists() else list(GENERAL_PROMPTS)
