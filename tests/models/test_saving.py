"""A pipeline is saved whole or not at all."""

from pathlib import Path

import pytest

from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.saving import save
from tests.tiny import tiny_flux_pipeline


def test_a_failed_save_leaves_nothing_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, folder = tiny_flux_pipeline(), tmp_path / "model"
    arguments = (pipeline, pipeline.transformer, folder, SamplingDefaults(height=64, width=64), ["a cat"])
    with monkeypatch.context() as patch:
        patch.setattr(
            SamplingDefaults, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space"):
            save(*arguments)
    assert list(tmp_path.iterdir()) == []
    # Left by a process that was killed.
    (tmp_path / "model.partial").mkdir()
    save(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "prompts.txt").read_text() == "a cat\n"
    assert SamplingDefaults.load(folder).height == 64


def test_what_is_saved_already_stays(tmp_path: Path) -> None:
    pipeline, folder = tiny_flux_pipeline(), tmp_path / "model"
    folder.mkdir()
    save(pipeline, pipeline.transformer, folder, SamplingDefaults(), [])
    assert list(folder.iterdir()) == []
