"""Files are written whole or not at all, and a failure leaves no partial file."""

import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from fastdistill.run.files import atomic_write, digest, write_image, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_there_at_the_end_of_the_block_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        assert partial.suffix == path.suffix
        partial.write_text("all")
    assert path.read_text() == "all"
    assert names(tmp_path) == ["result.txt"]


def write_half(path: Path, failure: BaseException) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise failure


@pytest.mark.parametrize("failure", [ValueError("bad"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_block_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "result.txt"
    for earlier in ([], ["result.txt"]):
        with pytest.raises(type(failure)):
            write_half(path, failure)
        assert names(tmp_path) == earlier
        write_text(path, "earlier")
    assert path.read_text() == "earlier"


def test_a_block_that_fails_before_it_writes_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), atomic_write(tmp_path / "result.txt"):
        raise ValueError("early")
    assert names(tmp_path) == []


def test_a_file_that_cannot_take_its_name_is_removed(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with pytest.raises(OSError, match="result"):
        write_text(tmp_path / "result", "text")
    assert names(tmp_path) == ["result"]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Two blocks in one process, then eight threads: the file is always one of the whole texts."""
    path = tmp_path / "result.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    texts = {str(number) * 100_000 for number in range(8)}
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert names(tmp_path) == ["result.txt"]


def test_json_text_and_images(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": [1, 2]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"a": object()})
    write_text(tmp_path / "text.txt", "µ\n")
    assert (tmp_path / "text.txt").read_bytes() == "µ\n".encode()
    write_image(tmp_path / "image.png", Image.new("RGB", (2, 3), "red"))
    assert Image.open(tmp_path / "image.png").size == (2, 3)
    assert names(tmp_path) == ["image.png", "text.txt", "value.json"]


def test_a_digest_is_of_the_settings_and_not_of_their_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
