"""Transformer by its config alone, for plans that need no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdistill.errors import UserError, first_line
from fastdistill.models.families import anatomy_named
from fastdistill.models.loading import EMBEDDED, embedded_folder
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run.files import read_json


def skeleton_of(transformer_class: Any, config: Mapping[str, Any]) -> Any:
    """Build a transformer without weights."""
    with torch.device("meta"):
        return transformer_class.from_config(config).eval()


def read_config(model: str) -> tuple[Any, SamplingDefaults, int]:
    """Read a transformer without weights, its sampling defaults, and the pixels per latent.

    Args:
        model: a pipeline's folder, which needs no more than `transformer/config.json`; a
            transformer's folder or config file; or a hub id.

    Raises:
        UserError: there is no such config, or it describes no supported transformer.
    """
    folder = embedded_folder() if model == EMBEDDED else Path(model)
    paths = [folder] if folder.is_file() else [folder / "transformer" / "config.json", folder / "config.json"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise UserError(
                f"there is no config.json in {model} or its folder transformer; "
                "give a pipeline's folder, its transformer's config.json, or a hub id such as owner/name"
            )
        path = _from_hub(model)
    try:
        config = read_json(path)
        name = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no diffusers config: it has to be a JSON object with _class_name") from error
    anatomy = anatomy_named(name)
    import diffusers

    try:
        network = skeleton_of(getattr(diffusers, name), config)
    except Exception as error:  # whatever the class makes of a value that it does not expect
        raise UserError(f"{path} does not describe a {name}: {error}") from error
    vae = folder / "vae" / "config.json"
    channels = read_json(vae).get("block_out_channels") if vae.is_file() else None
    return network, SamplingDefaults.load(folder), 2 ** (len(channels) - 1) if channels else anatomy.vae_scale_factor


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "transformer/config.json"))
    except Exception as error:  # no network, no such repository, no permission: each library has its own
        raise UserError(
            f"{model} is no folder here, and its config does not come from the hub: {first_line(error)}"
        ) from error
