"""Folder of a pipeline: what it holds, looked at before gigabytes are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdistill.errors import UserError
from fastdistill.models.families import FAMILIES
from fastdistill.run.files import begins_with_mark, read_json

PIPELINES = ("FluxPipeline",)
PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
"""Parts that such a pipeline draws with."""

STEM = r"(diffusion_pytorch_model|pytorch_model|model)"
SHARD = r"-\d{5}-of-\d{5}"
# The variant stands before the number of the shard, or in older files after it.
WEIGHTS = re.compile(rf"{STEM}(\.(?P<variant>\w+?))?(?P<shard>{SHARD})?(\.(?P<older>\w+))?\.(safetensors|bin)")
INDEX = re.compile(rf"{STEM}\.(safetensors|bin)(\.(?P<older>\w+))?\.index(\.(?P<variant>\w+))?\.json")

VARIANTS = {torch.bfloat16: ("bf16", "fp16"), torch.float32: ("fp32", "bf16", "fp16")}
"""Variants of weights by the dtype that they are loaded in, the most suitable first."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part of a pipeline, as `model_index.json` names it."""

    name: str
    library: str
    class_name: str


@dataclass(frozen=True, kw_only=True)
class WeightSet:
    """All weights of a part: one file, or the files that an index names."""

    variant: str | None
    paths: list[Path]
    index: Path | None = None

    @property
    def missing(self) -> list[str]:
        """Files that the index names, and that are not there."""
        return [path.name for path in self.paths if not path.exists()]

    def plain(self, name: str) -> str:
        """Name of one of the files, or of the index, without the variant."""
        return name.replace(f".{self.variant}", "", 1) if self.variant else name


def parts_of(folder: Path) -> list[Part]:
    """Parts of the pipeline in `folder`.

    Raises:
        UserError: the folder is no pipeline, the pipeline is of a class that is not supported, or a
            part is missing.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{folder} is no diffusers pipeline: it has no model_index.json; give the folder that save_pretrained wrote"
        )
    parts = read_index(index)
    named = [part.name for part in parts]
    missing = [name for name in dict.fromkeys([*PARTS, *named]) if name not in named or not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} lacks its part{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            "get a complete copy of the pipeline"
        )
    for path in sorted(folder.glob("*/*.json")):
        _check_no_mark(path)
    if not (folder / "transformer" / "config.json").is_file():
        raise UserError(f"{folder}: transformer has no config.json; get a complete copy of the pipeline")
    return parts


def read_index(index: Path) -> list[Part]:
    """Parts that a `model_index.json` names.

    Raises:
        UserError: the file is no such index, or the pipeline is of a class that is not supported.
    """
    entries = read_json(index)
    _check_no_mark(index)
    if not isinstance(entries, dict):
        raise UserError(f"{index} is no pipeline's index: it has to be a JSON object; get a sound copy of the pipeline")
    parts = [
        Part(name=name, library=entry[0], class_name=entry[1])
        for name, entry in entries.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
    ]
    transformer = next((part.class_name for part in parts if part.name == "transformer"), None)
    check_class(str(entries.get("_class_name", "a pipeline without a class")), transformer, str(index.parent))
    return parts


def check_class(name: str, transformer: str | None, model: str) -> None:
    """Raise `UserError` for a pipeline of class `name` that is not supported."""
    if name not in PIPELINES:
        from_python = (
            f". Its {transformer} can be cut from Python, with fastdistill.compress.cut"
            if transformer in FAMILIES
            else ""
        )
        raise UserError(f"{model} is a {name}; supported: {', '.join(PIPELINES)}{from_python}")


def holds_weights(part: Path) -> bool:
    """Whether a part is a model: only models have a `config.json`.

    Schedulers and tokenizers call theirs otherwise.
    """
    return (part / "config.json").is_file()


def variant_of(part: Path, dtype: torch.dtype) -> str | None:
    """Variant of the weights of `part` to load: None for the plain weights, else one that is there.

    Raises:
        UserError: no set of weights is complete.
    """
    sets = weight_sets(part)
    complete = {files.variant for files in sets if not files.missing}
    if not complete:
        lost = sorted({name for files in sets for name in files.missing})
        what = f"lacks {', '.join(lost)}" if lost else "has no weights"
        raise UserError(f"{part.parent}: {part.name} {what}; get a complete copy of the pipeline")
    known = (variant for variant in (None, *VARIANTS.get(dtype, ())) if variant in complete)
    return next(known, min(complete, key=str))


def missing_of(part: Path) -> list[str]:
    """Files that plain weights of `part` lack."""
    return [name for files in weight_sets(part) if files.variant is None for name in files.missing]


def weight_sets(part: Path) -> list[WeightSet]:
    """Sets of weights of `part`, in the order in which stock libraries look for them: plain before
    variants, safetensors before other files, one file before several."""
    names = sorted(path.name for path in part.iterdir())
    sets = [
        WeightSet(variant=match["variant"] or match["older"], paths=[part / match[0]])
        for match in map(WEIGHTS.fullmatch, names)
        if match is not None and not match["shard"]
    ]
    sets += [
        WeightSet(
            variant=match["variant"] or match["older"],
            paths=[part / shard for shard in sorted(_shards(part / match[0]))],
            index=part / match[0],
        )
        for match in map(INDEX.fullmatch, names)
        if match is not None
    ]
    return sorted(
        sets, key=lambda files: (files.variant is not None, files.paths[0].suffix == ".bin", len(files.paths))
    )


def weight_bytes(part: Path) -> int | None:
    """Bytes of the first complete set of weights of `part`, or None if there is none on this
    disk."""
    sets = weight_sets(part) if part.is_dir() else []
    complete = next((files for files in sets if not files.missing), None)
    return None if complete is None else sum(path.stat().st_size for path in complete.paths)


def is_complete(folder: Path) -> bool:
    """Whether every model of the pipeline in `folder` has a complete set of weights."""
    try:
        for part in parts_of(folder):
            if holds_weights(folder / part.name):
                variant_of(folder / part.name, torch.float32)
    except UserError:
        return False
    return True


def _check_no_mark(path: Path) -> None:
    """Raise `UserError` for a JSON file that begins with a byte order mark."""
    if begins_with_mark(path):
        raise UserError(
            f"{path} begins with a byte order mark, which diffusers does not read; save it as UTF-8 without one"
        )


def _shards(index: Path) -> set[str]:
    content: Any = read_json(index)
    try:
        return {str(name) for name in content["weight_map"].values()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not the index of a model's weights; get a sound copy of the pipeline") from error
