"""A whole compression from Python: what it reuses, what it shows meanwhile, and what it reports."""

import json

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from fastdistill.compress import CompressConfig, Compression, Sweep
from fastdistill.compress.config import CalibrationOptions, ChoiceOptions, RecoveryOptions, RepairOptions
from fastdistill.compress.importance.calibrate import Calibration
from fastdistill.errors import UserError
from fastdistill.evaluation import gallery
from fastdistill.models.families.flux import Flux
from fastdistill.run.options import RunOptions, TrainingOptions
from tests.commands.conftest import interrupt


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(folder, output, drop=("1",), *, repair="none", steps=0, criterion="output", evaluate=0, **run):
    return CompressConfig(
        drop_blocks=drop,
        run=RunOptions(model=str(folder), output=output, evaluate_images=evaluate, **run),
        calibration=CalibrationOptions(calibration_images=4, calibration_steps=2, calibration_points=4),
        choice=ChoiceOptions(criterion=criterion),
        repair=RepairOptions(repair=repair, repair_points=4),
        recovery=RecoveryOptions(recovery_steps=steps),
        training=TrainingOptions(batch=4),
    )


def record_of(output):
    return json.loads((output / "compress.json").read_text())


@pytest.fixture
def spent(monkeypatch):
    """Work on the full model so far, by kind."""
    done = {"trajectory": 0, "score": 0, "joint": 0, "drawn": 0}

    def counted(owner, name, kind):
        whole = getattr(owner, name)

        def count(*args, **kwargs):
            done[kind] += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    counted(Flux, "trajectory", "trajectory")
    counted(Calibration, "score", "score")
    counted(Calibration, "joint_error", "joint")
    counted(gallery, "sample", "drawn")
    return done


@pytest.mark.slow
def test_other_demands_of_the_same_model_reuse_what_it_did(pipeline_folder, tmp_path, spent):
    Compression(config(pipeline_folder, tmp_path / "first")).run()
    first = dict(spent)
    assert all(first.values()), "nothing was done in the first place"
    for name, other in {
        "drops": {"drop": ("2",)},
        "repair": {"repair": "scale"},
        "steps": {"steps": 1},
        "named": {"drop": ("double:0", "single:2")},
    }.items():
        Compression(config(pipeline_folder, tmp_path / name, **other)).run()
        # A choice of two tries sets that a choice of one had no reason to.
        assert {**spent, "joint": 0} == {**first, "joint": 0}, name
    before = dict(spent)
    Compression(config(pipeline_folder, tmp_path / "again")).run()
    assert spent == before
    assert record_of(tmp_path / "again")["scores"] == record_of(tmp_path / "first")["scores"]
    Compression(config(pipeline_folder, tmp_path / "seed", seed=1)).run()
    assert all(spent[kind] > before[kind] for kind in spent), "another seed is another calibration"


def test_named_blocks_are_not_scored_unless_it_is_asked_for(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Calibration, "joint_error", lambda *args: pytest.fail("tried a choice"))
    monkeypatch.setattr(Calibration, "score", lambda *args, **kwargs: pytest.fail("scored"))
    Compression(config(pipeline_folder, tmp_path / "plain", ("single:1",))).run()
    assert record_of(tmp_path / "plain")["scores"] == {}
    report = (tmp_path / "plain" / "report.md").read_text()
    assert "`--drop-blocks single:1` names the blocks." in report
    assert "| single:1 | dropped |" in report
    asked = []
    monkeypatch.setattr(
        Calibration, "score", lambda self, name, **_: asked.append(name) or dict.fromkeys(self.blocks, 0.5)
    )
    Compression(config(pipeline_folder, tmp_path / "asked", ("single:1",), criterion="bi")).run()
    assert asked == ["bi"]


def test_the_first_grid_is_there_before_the_work(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Compression, "calibrate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Compression(config(pipeline_folder, tmp_path / "out", evaluate=4)).run()
    assert Image.open(tmp_path / "out" / "grid.png").size[1] > 128


def test_the_grid_grows_with_every_stage_and_shows_every_prompt(pipeline_folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "fastdistill.compress.job.write_image", lambda path, image: shown.append(image.size[1]) or image.save(path)
    )
    job = Compression(config(pipeline_folder, tmp_path / "out", ("single:1",), repair="scale"))
    job.run()
    assert job.gallery.shown == ["a cat", "a dog", "a red fox"]
    assert sorted(shown) == shown
    assert len(set(shown)) == 3, "full; and cut; and repaired"


def test_the_report_speaks_of_what_was_done(pipeline_folder, tmp_path):
    output = tmp_path / "out"
    Compression(config(pipeline_folder, output, evaluate=2)).run()
    report, record = (output / "report.md").read_text(), record_of(output)
    verdict = report.splitlines()[2]
    assert verdict == f"**{record['verdict']}**"
    for absent in ("metrics.jsonl", "Recovery", "Repair by", "seconds an image", "0 training steps"):
        assert absent not in report
    for link in ("grid.png", "compress.json"):
        assert (output / link).exists()
    for prompt in ("a cat", "a dog", "a red fox"):
        assert prompt in report
    disk = record["disk"]
    assert disk["full"] == sum(path.stat().st_size for path in pipeline_folder.rglob("*") if path.is_file())
    assert 0 < disk["compressed"] < disk["full"]
    assert record["speed"]["rounds"] >= 3
    # The snippet, word for word.
    lines = report.splitlines()
    start = lines.index("    import torch")
    snippet = [line[4:] for line in lines[start : lines.index("    ).images[0]") + 1]]
    names = {}
    exec("\n".join(snippet), names)
    assert names["image"].size == (64, 64)
    assert isinstance(names["pipeline"], FluxPipeline)
    assert names["pipeline"].transformer.dtype == torch.float32


def test_several_sizes_share_everything_and_are_compared(pipeline_folder, tmp_path, spent):
    output = tmp_path / "out"
    sweep = Sweep(config(pipeline_folder, output, ("1", "3"), cache="none"))
    sweep.run()
    assert spent["score"] == 2, "output and bi, once"
    assert spent["trajectory"] == 1
    summary = json.loads((output / "sweep.json").read_text())
    assert list(summary["models"]) == ["1", "3"]
    for name, dropped in (("1", 1), ("3", 3)):
        record = record_of(output / name)
        assert sum(map(len, record["dropped"].values())) == dropped
        assert summary["models"][name]["parameters"] == record["parameters"]
        assert (
            FluxPipeline.from_pretrained(output / name / "model").transformer.num_parameters()
            == (record["parameters"]["compressed"])
        )
    assert not (output / "work").exists()
    report = (output / "report.md").read_text()
    assert f"| 3 | {record['choice']['dropped']} |" in report
    with pytest.raises(UserError, match="finished run"):
        Sweep(config(pipeline_folder, output, ("1", "3"))).run()


def test_an_interrupted_sweep_goes_on_with_the_next_size(pipeline_folder, tmp_path, monkeypatch):
    output, run, ran = tmp_path / "out", Compression.run, []

    def second_fails(self):
        ran.append(self.config.drop_blocks)
        if len(ran) == 2:
            raise KeyboardInterrupt
        run(self)

    monkeypatch.setattr(Compression, "run", second_fails)
    with pytest.raises(KeyboardInterrupt):
        Sweep(config(pipeline_folder, output, ("1", "2"))).run()
    Sweep(config(pipeline_folder, output, ("1", "2"))).run()
    assert ran == [("1",), ("2",), ("2",)]
    assert (output / "report.md").exists()


def test_a_size_that_is_impossible_is_told_before_any_work(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Compression, "run", lambda self: pytest.fail("began"))
    with pytest.raises(UserError, match="dropping all 5 blocks"):
        Sweep(config(pipeline_folder, tmp_path / "out", ("1", "9"))).run()
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_images_of_the_user_and_of_the_model_are_told_apart(pipeline_folder, tmp_path):
    """As many images of the one as of the other, in one store."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 255, 0)).save(tmp_path / "images" / f"{number}.png")

    def errors(name, **run):
        Compression(config(pipeline_folder, tmp_path / name, **run)).run()
        return record_of(tmp_path / name)["scores"]["output"]

    own = errors("own", images=tmp_path / "images")
    drawn = errors("drawn")
    assert drawn == errors("alone", cache="none")
    assert own != drawn
    assert errors("own-again", images=tmp_path / "images") == own
