"""Chroma: `ChromaTransformer2DModel`, whose blocks have no modulation of their own.

One small network, the approximator, makes all modulations as the rows of a table: three for each
single block, six for the image and six for the text of each double block, two for the output. The
approximator knows a row by the sinusoidal embedding of its number, and stock diffusers numbers the
rows of a smaller model from zero. A cut therefore has to teach the approximator the new numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.errors import UserError
from fastdistill.models.families.family import Anatomy, Stack, Workload, both_streams, noise, one_stream
from fastdistill.models.families.flux import PATCH, image_ids

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
INPUT = "distilled_guidance_layer.in_proj.weight"
WIDENINGS = (1, 2, 4, 8, 16, 32, 64, 128)


class Chroma(Anatomy):
    """Chroma, whose approximator's first layer is fitted to the new row numbers; see `renumbered`."""

    name = "chroma"
    remark = (
        "Chroma's approximator is counted as it is. In the cut model it works on fewer rows, "
        "and its first layer may have a few million parameters more."
    )
    stacks = (
        Stack(attribute=DOUBLE, config_field="num_layers", short="double", pass_through=both_streams),
        Stack(attribute=SINGLE, config_field="num_single_layers", short="single", pass_through=one_stream),
    )

    def adapt_to_cut(
        self, source: nn.Module, kept: Mapping[str, Sequence[int]], config: dict[str, Any], state: dict[str, Tensor]
    ) -> None:
        doubles, singles = (len(source.get_submodule(stack)) for stack in (DOUBLE, SINGLE))  # type: ignore[arg-type]
        rows = kept_rows(kept[DOUBLE], kept[SINGLE], doubles, singles)
        state[INPUT] = renumbered(state[INPUT], rows)
        config["approximator_num_channels"] = state[INPUT].shape[1]

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        rows, columns, batch = workload.height // PATCH, workload.width // PATCH, workload.batch
        return {
            "hidden_states": noise(network, batch, rows * columns, network.config.in_channels),
            "encoder_hidden_states": noise(network, batch, workload.text_tokens, network.config.joint_attention_dim),
            "timestep": noise(network, batch),
            "img_ids": image_ids(PATCH * rows, PATCH * columns, network.device),
            "txt_ids": noise(network, workload.text_tokens, 3).zero_(),
        }


def kept_rows(kept_doubles: Sequence[int], kept_singles: Sequence[int], doubles: int, singles: int) -> list[int]:
    """Rows of the whole model's table that the cut model needs: singles, image, text, output."""
    image, text, output = 3 * singles, 3 * singles + 6 * doubles, 3 * singles + 12 * doubles
    return [
        *(3 * block + row for block in kept_singles for row in range(3)),
        *(image + 6 * block + row for block in kept_doubles for row in range(6)),
        *(text + 6 * block + row for block in kept_doubles for row in range(6)),
        *(output + row for row in range(2)),
    ]


def renumbered(weight: Tensor, rows: Sequence[int]) -> Tensor:
    """Fit a first layer that gives row `r` the output that `weight` gives row `rows[r]`.

    The layer is linear in the embedding `e` of the row number: the new `W'` must satisfy
    `W' e'(r) = W e(rows[r])` for every `r`. A solution exists once `e'` has about as many channels
    as there are rows. The embedding is widened, through the config, until the error of the smallest
    solution, rounded to the weights' dtype, is at most the rounding of the largest target. At the
    real depth of 19 + 38 blocks this takes 16 times the channels, and weights of the size they had.
    Frequencies are `10000^(-k / K)`: of `f K` frequencies every f-th is an old one, where the
    weights of the time find their channels again, and the new ones get zeros.

    Args:
        weight: (H, 4 N), for the embeddings of the time (N channels), of a constant (N) and of the
            row's number (2 N).

    Returns:
        (H, 4 N f), in the dtype and on the device of `weight`.

    Raises:
        UserError: N is odd, so that widening moves the frequencies, or no width suffices.
    """
    if list(rows) == list(range(max(rows) + 1)):
        return weight
    channels = weight.shape[1] // 4
    if channels % 2:
        raise UserError(f"approximator_num_channels is {weight.shape[1]}; a Chroma can be cut if it is a multiple of 8")
    time, constant, number = weight.cpu().double().split([channels, channels, 2 * channels], dim=1)
    # In float64 what limits is the solver.
    tolerance = max(torch.finfo(weight.dtype).eps / 2, 1e-12)
    target = row_embedding(max(rows) + 1, 2 * channels)[list(rows)] @ number.T
    for factor in WIDENINGS:
        embedding = row_embedding(len(rows), 2 * channels * factor)
        solution = (torch.linalg.pinv(embedding) @ target).to(weight.dtype)
        error = (embedding @ solution.double() - target).abs().max()
        if error <= tolerance * target.abs().max():
            return torch.cat([spread(time, factor), spread(constant, factor), solution.T.double()], dim=1).to(weight)
    raise UserError("the approximator cannot be fitted to the rows that this cut leaves; drop other blocks")


def row_embedding(rows: int, channels: int) -> Tensor:
    """Embedding (rows, channels) of the numbers of the rows, in float64.

    `ChromaCombinedTimestepTextProjEmbeddings` computes the embedding in float32.
    """
    from diffusers.models.embeddings import get_timestep_embedding

    embedding: Tensor = get_timestep_embedding(
        torch.arange(rows) * 1000, channels, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return embedding.double()


def spread(weight: Tensor, factor: int) -> Tensor:
    """Weights (H, N) of N/2 cosines and N/2 sines, spread over `factor` times the frequencies.

    The `factor - 1` new frequencies after each old one get zeros.
    """
    halves = weight.unflatten(1, (2, -1, 1))
    return nn.functional.pad(halves, (0, factor - 1)).flatten(1)
