"""Copies of a pipeline's parts, byte for byte, as long as they are what their files hold.

A part in memory has the dtype that it was loaded in. Saved from there, a text encoder in half
precision would take twice its size.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn

from fastdistill.errors import UserError
from fastdistill.models.digest import digest_of
from fastdistill.models.folder import WeightSet, weight_sets
from fastdistill.models.skeleton import skeleton_of
from fastdistill.run.files import read_json, write_json

ORIGIN = re.compile(r".*name_or_path|.*_file")
"""Fields of a JSON file that may say where a part was loaded from."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ABSOLUTE = re.compile(r"[/~].*|\w:[\\/].*|.*\\.*", re.DOTALL)
"""Paths from the root of a disk, of any system."""
CONFIGS = ("config.json", "generation_config.json")
"""Files of a model besides its weights."""
VOCABULARY = (".json", ".txt", ".model", ".jinja")
"""Endings of the files of a tokenizer."""
NOT_COMPARED = ("dtype", "torch_dtype", "transformers_version", "architectures")
"""Fields of a config, besides those with an underscore, that loading changes."""


def copy_part(part: Any, name: str, target: Path) -> bool:
    """Copy the files that `part` was loaded from to the folder `target`, if it is as they are.

    Weights that are there as a variant only get the names of plain weights, so that the copy loads
    without naming the variant.

    Args:
        part: a model or tokenizer of diffusers or transformers.
        name: of the part in its pipeline.

    Returns:
        Whether that was done; if not, nothing is written.
    """
    try:
        files = _files_of(part, name)
    except Exception:  # a part that does not load from there: libraries raise their own errors
        return False
    if files is None:
        return False
    target.mkdir()
    for saved_as, file in files.items():
        if isinstance(file, Path):
            # Links are followed: a hub's cache is made of them.
            shutil.copyfile(file, target / saved_as)
        else:
            write_json(target / saved_as, file)
    return True


def forget_origins(folder: Path) -> None:
    """Remove the local paths that parts were loaded from, from every JSON file in `folder`."""
    for path in folder.rglob("*.json"):
        with suppress(UserError):  # a file of somebody's that is not JSON
            content = read_json(path)
            if (kept := _without_origins(content)) != content:
                write_json(path, kept)


def _without_origins(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_origins(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_origins(held) for name, held in value.items() if not _is_origin(name, held)}


def _is_origin(name: str, value: Any) -> bool:
    """Whether a field holds a path of some machine, and no name on the hub or next to the file."""
    if not isinstance(value, str) or not ORIGIN.fullmatch(name):
        return False
    if name.endswith("_file"):
        return ABSOLUTE.fullmatch(value) is not None
    return not HUB_ID.fullmatch(value) or ("/" in value and Path(value).exists())


def _files_of(part: Any, name: str) -> dict[str, Path | Any] | None:
    """Files that hold what `part` is, by the names to save them as, or None if no files do.

    An index of renamed files is there as JSON.
    """
    folder = _origin(part, name)
    if folder is None:
        return None
    if hasattr(part, "get_vocab"):
        same = digest_of(type(part).from_pretrained(folder)) == digest_of(part)
        return {path.name: path for path in folder.iterdir() if path.suffix in VOCABULARY} if same else None
    if not isinstance(part, nn.Module) or _config(part.config) != _config(_config_in(folder, part)):
        return None
    found = next((files for files in weight_sets(folder) if not files.missing and _holds(files, part)), None)
    if found is None:
        return None
    configs = {name: folder / name for name in CONFIGS if (folder / name).is_file()}
    return {**configs, **_as_plain(found)}


def _origin(part: Any, name: str) -> Path | None:
    """Folder that a part was loaded from, if it is on this machine."""
    recorded = getattr(part, "name_or_path", None) or getattr(getattr(part, "config", None), "_name_or_path", None)
    if not recorded:
        return None
    recorded = str(recorded)
    config = "tokenizer_config.json" if hasattr(part, "get_vocab") else "config.json"
    # A part that was loaded as a subfolder records the folder above it.
    paths = [Path(recorded) / name / config, Path(recorded) / config]
    if HUB_ID.fullmatch(recorded):
        in_cache = (try_to_load_from_cache(recorded, file) for file in (f"{name}/{config}", config))
        paths += [Path(path) for path in in_cache if isinstance(path, str)]
    return next((path.parent for path in paths if path.is_file()), None)


def _config_in(folder: Path, part: Any) -> Any:
    if hasattr(part.config, "to_dict"):
        return type(part.config).from_pretrained(folder)
    return skeleton_of(type(part), type(part).load_config(folder)).config


def _config(config: Any) -> dict[str, Any]:
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    plain = json.loads(json.dumps(dict(fields), default=str))
    return {name: value for name, value in plain.items() if name not in NOT_COMPARED and not name.startswith("_")}


def _holds(files: WeightSet, module: nn.Module) -> bool:
    """Whether every tensor of `module` is one of the files', cast."""
    state = module.state_dict()
    with ExitStack() as stack:
        stored: dict[str, Callable[[], Tensor]] = {}
        for path in files.paths:
            stored |= stack.enter_context(_tensors(path))
        tied: dict[int, list[str]] = {}
        for name, tensor in state.items():
            tied.setdefault(tensor.data_ptr(), []).append(name)
        return all(
            any(
                _equal(stored[candidate](), tensor)
                for twin in tied[tensor.data_ptr()]
                for candidate in _names(twin, stored)
            )
            for tensor in state.values()
        )


def _names(name: str, stored: Iterable[str]) -> Iterator[str]:
    """Names in the files that a tensor called `name` may have: transformers adds and removes
    prefixes when it loads."""
    return (other for other in stored if f".{other}".endswith(f".{name}") or name.endswith(f".{other}"))


def _equal(stored: Tensor, tensor: Tensor) -> bool:
    return stored.shape == tensor.shape and torch.equal(stored.to(tensor.dtype), tensor.cpu())


@contextmanager
def _tensors(path: Path) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Functions that read each tensor of a file, by its name."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            yield {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118, file is no dict
    else:
        # Files of torch before 1.6 are no archives, and cannot be mapped into memory.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        yield {name: partial(state.get, name) for name in state}


def _as_plain(files: WeightSet) -> dict[str, Path | Any]:
    """Files of a set of weights by their names without the variant."""
    named: dict[str, Path | Any] = {files.plain(path.name): path for path in files.paths}
    if files.index is not None:
        content = read_json(files.index)
        renamed = {name: files.plain(shard) for name, shard in content["weight_map"].items()}
        same = renamed == content["weight_map"]
        named[files.plain(files.index.name)] = files.index if same else {**content, "weight_map": renamed}
    return named
