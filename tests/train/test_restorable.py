"""Students whose training would be lost are refused before the first step."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from fastdistill.compress import cut
from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.diffusion.timesteps import Uniform
from fastdistill.errors import UserError
from fastdistill.models.families import family_of
from fastdistill.models.guidance_embedder import with_guidance_embedder
from fastdistill.models.patch import patched
from fastdistill.train.config import TrainConfig
from fastdistill.train.denoising import Denoising
from fastdistill.train.restorable import check_restorable
from fastdistill.train.trainer import Trainer
from tests import tiny_families
from tests.tiny import tiny_flux_pipeline, tiny_inputs


def with_adapter(transformer: Any) -> None:
    peft = pytest.importorskip("peft")
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "proj_out"]))


def with_norm(transformer: Any) -> None:
    nn.utils.parametrizations.weight_norm(transformer.proj_out)


def tied(transformer: Any) -> None:
    transformer.single_transformer_blocks[2] = transformer.single_transformer_blocks[0]


def shorter(transformer: Any) -> None:
    del transformer.transformer_blocks[1]


def wider(transformer: Any) -> None:
    transformer.context_embedder = nn.Linear(24, transformer.context_embedder.out_features)


def longer(transformer: Any) -> None:
    transformer.single_transformer_blocks.append(copy.deepcopy(transformer.single_transformer_blocks[0]))


CHANGES: dict[Callable[[Any], Any], str] = {
    FluxTransformer2DModel.fuse_qkv_projections: r"to_qkv.* would be lost, .*unfuse_qkv_projections\(\)",
    with_adapter: r"(base_layer|lora_).* would be lost, .*merge them first",
    with_norm: r"proj_out\.parametrizations.* would be lost, .*as from_pretrained loads it",
    longer: r"single_transformer_blocks\.3\..* would be lost",
    shorter: r"has no transformer_blocks\.1\..* draw at random",
    wider: r"context_embedder\.weight .*\(32, 24\) here and \(32, 16\) by its config",
    tied: r"single_transformer_blocks\.0.*single_transformer_blocks\.2.* are one weight",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_loading_would_not_restore_is_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    student = tiny_flux_pipeline().transformer
    method = Denoising(student, family_of(student), RectifiedFlow(), Prediction.VELOCITY, Uniform())
    change(student)

    def batch(step: int, rng: torch.Generator) -> LatentBatch:
        pytest.fail("work was done")

    with pytest.raises(UserError, match=CHANGES[change]):
        Trainer(method, batch, TrainConfig(steps=1), tmp_path / "run").fit()
    assert not (tmp_path / "run").exists()


def test_fused_projections_are_lost_by_diffusers(tmp_path: Path) -> None:
    """Should diffusers come to load them, the check can go."""
    student = tiny_flux_pipeline().transformer.eval()
    student.fuse_qkv_projections()
    x_t, t, conditioning = tiny_inputs(student)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "to_qkv" in name:
                parameter.add_(0.1)
        trained = family_of(student).predict(student, x_t, t, conditioning)
        student.save_pretrained(tmp_path)
        loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
        assert not torch.allclose(family_of(loaded).predict(loaded, x_t, t, conditioning), trained, atol=1e-3)


def test_students_that_load_again_are_taken() -> None:
    transformer = tiny_flux_pipeline().transformer
    check_restorable(transformer)
    check_restorable(cut(transformer, {"double": [0], "single": [1]}))
    check_restorable(with_guidance_embedder(transformer))
    with patched(transformer):
        check_restorable(transformer)
    check_restorable(torch.compile(transformer))  # type: ignore[arg-type]
    transformer.fuse_qkv_projections()
    transformer.unfuse_qkv_projections()
    check_restorable(nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["flux2", "sd3", "qwen_image", "z_image", "flux3", "chroma", "sana", "pixart"])
def test_every_family_is_taken(family: str) -> None:
    check_restorable(getattr(tiny_families, f"tiny_{family}")())
