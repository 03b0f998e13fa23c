"""Whatever a step does to the smaller model, what is saved is never worse than what was there."""

import json

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image

from fastdistill.compress import CompressConfig, Compression
from fastdistill.compress.config import CalibrationOptions, RecoveryOptions, RepairOptions
from fastdistill.run.options import RunOptions, TrainingOptions
from fastdistill.train.trainer import Trainer
from tests.commands.conftest import save_tiny
from tests.tiny import mixing_transformer, tiny_flux_pipeline


@pytest.fixture(scope="module")
def mixing_folder(tmp_path_factory):
    """Pipeline of which every block matters."""
    pipeline = tiny_flux_pipeline()
    pipeline.transformer = mixing_transformer()
    return save_tiny(pipeline, tmp_path_factory.mktemp("mixing"))


def compressed(folder, output, *, repair="ridge", steps=6, rate=1e-3, images=None):
    config = CompressConfig(
        drop_blocks=("single:1",),
        run=RunOptions(model=str(folder), output=output, evaluate_images=0, images=images, save_dtype="float32"),
        calibration=CalibrationOptions(calibration_images=10, calibration_steps=2, calibration_points=4),
        repair=RepairOptions(repair=repair, repair_points=8),
        recovery=RecoveryOptions(recovery_steps=steps),
        training=TrainingOptions(batch=4, learning_rate=rate),
    )
    Compression(config).run()
    return json.loads((output / "compress.json").read_text())


def drawn(pipeline, transformer):
    """Final latents by the stock pipeline, from noise that the command never saw."""
    pipeline.transformer = transformer
    generator = [torch.Generator().manual_seed(900 + index) for index in range(4)]
    latents = pipeline(
        ["a bird"] * 4, height=64, width=64, num_inference_steps=2, max_sequence_length=8, generator=generator,
        output_type="latent", true_cfg_scale=2.0, negative_prompt=[""] * 4,
    ).images  # fmt: skip
    return latents.double()


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    "spoilt",
    [
        {"rate": 0.5},
        {"rate": 0.5, "repair": "none"},
        {"repair": "average", "steps": 0},
        {"repair": "average", "rate": 0.3},
    ],
    ids=str,
)
def test_the_saved_model_is_no_worse_than_the_cut_one(mixing_folder, tmp_path, spoilt):
    record = compressed(mixing_folder, tmp_path / "out", **spoilt)
    distances = record["distances"]
    assert distances[record["saved"]] == min(distances.values())
    assert len(distances) == 1 + (spoilt.get("repair") != "none") + (spoilt.get("steps") != 0)
    assert record["saved"] != list(distances)[-1], "nothing was spoilt"
    pipeline = FluxPipeline.from_pretrained(mixing_folder)
    pipeline.set_progress_bar_config(disable=True)
    full = drawn(pipeline, pipeline.transformer)
    saved = FluxTransformer2DModel.from_pretrained(tmp_path / "out/model/transformer")
    plain = FluxTransformer2DModel.from_pretrained(mixing_folder / "transformer")
    plain.single_transformer_blocks.pop(1)
    errors = [float((drawn(pipeline, model) - full).square().sum()) for model in (saved, plain)]
    assert errors[0] <= 1.01 * errors[1]
    report = (tmp_path / "out/report.md").read_text()
    assert f"Saved is the {record['saved']} model" in report.split("##")[0]


def test_ten_images_of_ones_own_do_no_harm(mixing_folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(10):
        Image.effect_noise((64, 64), 40 + 10 * index).convert("RGB").save(images / f"{index}.png")
    record = compressed(mixing_folder, tmp_path / "out", images=images, rate=0.1)
    assert record["saved"] != "recovered"
    assert record["distances"]["recovered"] > record["distances"][record["saved"]]


def test_a_recovery_that_helps_is_saved_at_its_best(mixing_folder, tmp_path, monkeypatch):
    """A training that is good at first and then destroys everything."""
    advance = Trainer._advance

    def destroy(self):
        if self.step == 4:
            for group in self.parameters.values():
                for parameter in group:
                    parameter.data.mul_(3)
            for average in self.emas["student"].shadow.values():
                average.mul_(3)
        return advance(self)

    monkeypatch.setattr(Trainer, "_advance", destroy)
    monkeypatch.setattr("fastdistill.compress.job.steps_between", lambda *amounts: 2)
    record = compressed(mixing_folder, tmp_path / "out", repair="none", steps=8)
    assert record["saved"] == "recovered"
    logged = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["evaluation/distance"] for line in logged if "evaluation/distance" in line}
    assert list(measured) == [2, 4, 6, 8]
    assert record["distances"]["recovered"] == pytest.approx(min(measured[2], measured[4]), rel=1e-3)
    assert measured[8] > 10 * measured[4]
