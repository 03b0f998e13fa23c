"""The folder of a run: claimed, continued or refused."""

from pathlib import Path

import pytest

from fastdistill.errors import UserError
from fastdistill.run import workspace
from fastdistill.run.workspace import Workspace


def test_a_run_that_ended_before_it_wrote_its_settings_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "write_json", full_disk)
        with pytest.raises(OSError, match="No space"):
            Workspace(tmp_path / "run", {"steps": 1}, "result.json").claim()
    assert not Workspace(tmp_path / "run", {"steps": 2}, "result.json").resumed


def test_nothing_is_written_before_the_claim(tmp_path: Path) -> None:
    found = Workspace(tmp_path / "run", {"steps": 1}, "result.json")
    assert not (tmp_path / "run").exists()
    found.claim()
    assert Workspace(tmp_path / "run", {"steps": 1}, "result.json").resumed
    with pytest.raises(UserError, match="another --steps"):
        Workspace(tmp_path / "run", {"steps": 2}, "result.json")


@pytest.mark.parametrize("file", ["notes.txt", "work", "work/notes.txt"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        Workspace(tmp_path, {"steps": 1}, "result.json")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        Workspace(tmp_path / "run", {"steps": 1}, "result.json")
