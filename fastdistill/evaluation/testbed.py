"""Recognition of the emoji FLUX and of the models made of it, whose images have a known truth."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from fastdistill.models.loading import embedded_folder
from fastdistill.models.weights import is_plain

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Two roundings to bfloat16: a model may have been saved in it.
TOLERANCE = 2**-7


def draws_emoji(pipeline: Any) -> bool:
    """Whether `pipeline` is the emoji FLUX, or was made of it by a cut or by distillation.

    Its autoencoder tells: no command changes it, and another model has another. Weights are equal
    up to the rounding of 16 bits.
    """
    own = load_file(embedded_folder() / "vae" / WEIGHTS)
    state = pipeline.vae.state_dict()
    if own.keys() != state.keys() or not all(map(is_plain, pipeline.vae.parameters())):
        return False
    return all(
        state[name].shape == value.shape
        and torch.allclose(state[name].float().cpu(), value.float(), rtol=TOLERANCE, atol=1e-7)
        for name, value in own.items()
    )
