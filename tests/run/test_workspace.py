"""The folder of a run: claimed, continued or refused."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fastdistill.errors import UserError
from fastdistill.run import resources, workspace
from fastdistill.run.inputs import Input
from fastdistill.run.workspace import Workspace


def test_a_run_that_ended_before_it_wrote_its_settings_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "write_json", full_disk)
        with pytest.raises(OSError, match="No space"):
            Workspace(tmp_path / "run", {"steps": 1}, "result.json").claim({})
    assert not Workspace(tmp_path / "run", {"steps": 2}, "result.json").resumed


def test_nothing_is_written_before_the_claim(tmp_path: Path) -> None:
    found = Workspace(tmp_path / "run", {"steps": 1}, "result.json")
    assert not (tmp_path / "run").exists()
    found.claim({})
    found.release()
    assert Workspace(tmp_path / "run", {"steps": 1}, "result.json").resumed
    with pytest.raises(UserError, match="another --steps"):
        Workspace(tmp_path / "run", {"steps": 2}, "result.json")


def read(prompts: list[str], weights: str = "ab", images: dict[str, str] | None = None) -> dict[str, Input]:
    lines = {f"line {number}": prompt for number, prompt in enumerate(prompts, 1)}
    return {
        "model": Input(called="the model in flux", items={"vae": "v", "transformer": weights}),
        "prompts": Input(called="the prompts in p.txt", items=lines),
        "images": Input(called="the images in pictures", items=images or {}),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["a cat", "a fox"]}, r"prompts in p\.txt changed since .* began \(changed: line 2\); restore"),
        ({"prompts": ["a cat", "a dog", "a fox"]}, r"prompts in p\.txt changed .*\(new: line 3\)"),
        ({"prompts": ["a cat"]}, r"prompts in p\.txt changed .*\(gone: line 2\)"),
        ({"weights": "ac"}, r"the model in flux changed .*\(changed: transformer\)"),
        ({"images": {"1": "a", "2": "c"}}, r"images in pictures changed .*\(changed: 2; gone: 3, 4, 5 and 2 more\)"),
    ],
)
def test_a_run_whose_inputs_changed_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before = {"prompts": ["a cat", "a dog"], "images": {**dict.fromkeys("1234567", "a"), "2": "b"}}

    def begin(**changed: Any) -> Workspace:
        found = Workspace(tmp_path / "run", {"steps": 1}, "result.json")
        found.claim(read(**{**before, **changed}))
        return found

    begin().release()
    with pytest.raises(UserError, match=message):
        begin(**changes)
    again = begin()
    assert again.resumed
    again.release()


def test_a_finished_run_leaves_no_lock(tmp_path: Path) -> None:
    found = Workspace(tmp_path / "run", {"steps": 1}, "result.json")
    found.claim({})
    (tmp_path / "run" / "result.json").write_text("{}")
    found.finish()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]
    with pytest.raises(UserError, match="finished run"):
        Workspace(tmp_path / "run", {"steps": 1}, "result.json")


def test_a_run_that_another_process_has_finished_meanwhile_is_refused(tmp_path: Path) -> None:
    early, late = (Workspace(tmp_path / "run", {"steps": 1}, "result.json") for _ in range(2))
    early.claim({})
    (tmp_path / "run" / "result.json").write_text("{}")
    early.finish()
    with pytest.raises(UserError, match="finished run"):
        late.claim({})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]


def test_a_disk_that_is_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, reason in (
        (errno.EROFS, f"the disk of {tmp_path} is read-only"),
        (errno.EACCES, f"you may not write to {tmp_path}"),
    ):

        def refused(dir: Path, number: int = number) -> None:
            raise OSError(number, os.strerror(number), str(dir))

        monkeypatch.setattr(resources, "TemporaryFile", refused)
        with pytest.raises(UserError, match=f"{reason}; choose another --output"):
            Workspace(tmp_path / "a" / "b", {}, "result.json")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path / 'file'} is a file"):
        Workspace(tmp_path / "file" / "b", {}, "result.json")


@pytest.mark.parametrize("file", ["notes.txt", "work", "work/notes.txt"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        Workspace(tmp_path, {"steps": 1}, "result.json")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=f"--output {tmp_path / 'run'} is a file; name a folder"):
        Workspace(tmp_path / "run", {"steps": 1}, "result.json")


@pytest.mark.parametrize("there", [False, True])
def test_a_claim_is_taken_back_unless_something_was_done(tmp_path: Path, there: bool) -> None:
    output = tmp_path / "run"
    if there:
        output.mkdir()
    for done in ((), ("seconds.json",)):
        found = Workspace(output, {"steps": 1}, "result.json")
        found.claim({})
        for name in done:
            (found.work / name).write_text("{}")
        found.withdraw()
        assert output.exists() == (there or bool(done))
        assert Workspace(output, {"steps": 1}, "result.json").resumed == bool(done)
    again = Workspace(output, {"steps": 1}, "result.json")
    again.claim({})
    again.withdraw()
    assert Workspace(output, {"steps": 1}, "result.json").resumed


def test_an_error_before_the_first_result_takes_the_claim_back(tmp_path: Path) -> None:
    found = Workspace(tmp_path / "run", {"steps": 1}, "result.json")
    found.claim({})
    with pytest.raises(OSError, match="no space"), found.released():
        raise OSError("no space")
    assert not (tmp_path / "run").exists()
