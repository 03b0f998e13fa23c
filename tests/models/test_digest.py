"""Digests of parts: of what they hold, and of nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn

from fastdistill.models import digest as module
from fastdistill.models.digest import digest_of, digests
from fastdistill.models.patch import patched
from tests.tiny import tiny_flux_pipeline


def test_a_moved_and_used_pipeline_has_the_same_digests(tmp_path: Path) -> None:
    for name in "ab":
        tiny_flux_pipeline().save_pretrained(tmp_path / name)
    first, second = (FluxPipeline.from_pretrained(tmp_path / name) for name in "ab")
    found = digests(first)
    assert set(found) == {
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"
    }  # fmt: skip
    assert len(set(found.values())) == len(found)
    second.set_progress_bar_config(disable=True)
    second("a cat", height=64, width=64, num_inference_steps=1, max_sequence_length=8)
    assert digests(second) == found
    with patched(second.transformer):
        assert digest_of(second.transformer) == found["transformer"]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_one_changed_number_changes_the_digest_of_its_part_alone(part: str) -> None:
    pipeline = tiny_flux_pipeline()
    before = digests(pipeline)
    with torch.no_grad():
        list(getattr(pipeline, part).parameters())[-1].view(-1)[0].add_(1e-3)
    after = digests(pipeline)
    assert {name for name in before if before[name] != after[name]} == {part}


def test_what_a_scheduler_and_a_tokenizer_do_counts() -> None:
    pipeline = tiny_flux_pipeline()
    assert digest_of(FlowMatchEulerDiscreteScheduler(shift=1.0)) == digest_of(pipeline.scheduler)
    assert digest_of(FlowMatchEulerDiscreteScheduler(shift=3.0)) != digest_of(pipeline.scheduler)
    tokenizer, before = copy.deepcopy(pipeline.tokenizer_2), digest_of(pipeline.tokenizer_2)
    tokenizer.add_tokens(["emoji"])
    assert digest_of(tokenizer) != before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)),
        (torch.tensor(1.0), torch.tensor(-1.0)),
        (torch.zeros(4).to(torch.float8_e4m3fn), torch.ones(4).to(torch.float8_e4m3fn)),
        (torch.zeros(0), torch.zeros(0, 3)),
        (torch.tensor([True, False]), torch.tensor([False, True])),
    ],
)
def test_type_shape_and_bytes_count(first: torch.Tensor, second: torch.Tensor) -> None:
    def holding(value: torch.Tensor) -> str:
        network = nn.Module()
        network.register_buffer("value", value)
        return digest_of(network)

    assert holding(first) == holding(first.clone())
    assert holding(first) != holding(second)
    strided = torch.stack([first, second.reshape(first.shape)], -1)[..., 0] if first.dtype == second.dtype else first
    assert holding(strided) == holding(first)


def test_configs_count_where_weights_are_equal() -> None:
    def network(heads: int) -> Any:
        made = nn.Linear(2, 2)
        nn.init.zeros_(made.weight)
        nn.init.zeros_(made.bias)
        made.config = {"heads": heads, "_name_or_path": f"/somewhere/{heads}"}  # type: ignore[assignment]
        return made

    assert digest_of(network(1)) != digest_of(network(2))
    renamed = network(1)
    renamed.config["_name_or_path"] = "/elsewhere"
    assert digest_of(renamed) == digest_of(network(1))


def test_quantised_weights_are_looked_into() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised(scale: float) -> str:
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
        weight = torch.randn(64, 64) * scale
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
        nn.init.zeros_(layer.bias)
        return digest_of(layer)

    assert quantised(1.0) == quantised(1.0)
    # The four bits are equal, their scale is not.
    assert quantised(1.0) != quantised(2.0)


def test_tensors_are_read_once_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    network, read, whole = nn.Linear(3, 3), [], module._hash_of
    monkeypatch.setattr(module, "_hash_of", lambda name, value: read.append(name) or whole(name, value))
    first = digest_of(network)
    assert digest_of(network) == first
    assert sorted(read) == ["bias", "weight"]
    with torch.no_grad():
        network.weight.mul_(2)
    assert digest_of(network) != first
    network.to(torch.float64)
    assert digest_of(network) not in ("", first)
