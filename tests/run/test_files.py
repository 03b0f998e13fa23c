"""Files are written whole or not at all, and a failure leaves no partial file; text is read in
every form of Unicode that editors save."""

import codecs
import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from fastdistill.errors import UserError
from fastdistill.run.files import (
    atomic_write,
    begins_with_mark,
    digest,
    folder_bytes,
    read_json,
    read_lines,
    read_text,
    without_folders,
    write_image,
    write_json,
    write_text,
)


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


TEXT = "a naïve café,\n猫 on a mat 🐈\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        codecs.BOM_UTF8 + TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace("猫", "\ufeff猫").encode(),
    ],
)
def test_text_is_the_same_in_every_form_of_unicode(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert read_text(path) == TEXT
    assert read_lines(path) == TEXT.split("\n")[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("café".encode("latin-1"), r"text\.txt is not UTF-8 text \(byte 3\); save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"\0", r"text\.txt is not UTF-8 text"),
        ("a cat".encode("utf-16-le"), "NUL"),
        (b"a\0b", "NUL"),
        (None, r"text\.txt cannot be read: No such file"),
    ],
)
def test_other_text_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    for read in (read_text, read_lines, read_json):
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path)


@pytest.mark.parametrize("within", ["\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029"])
def test_only_the_ends_of_lines_end_lines(tmp_path: Path, within: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(f"  a cat{within}on a mat \t\r\n\r\n \r\n{within}a dog{within}\n".encode())
    assert read_lines(path) == [f"a cat{within}on a mat", "a dog"]


def test_json_with_a_mark_and_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text('{"é": 1}', encoding=encoding)
        assert read_json(path) == {"é": 1}
        assert begins_with_mark(path) == (encoding != "utf-8")
    for content in ("{", "", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(UserError, match=r"value\.json is not valid JSON"):
            read_json(path)


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder/below").mkdir(parents=True)
    (tmp_path / "elsewhere").write_bytes(bytes(1000))
    (tmp_path / "folder/below/file").write_bytes(bytes(30))
    (tmp_path / "folder/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder/broken").symlink_to(tmp_path / "nowhere")
    assert folder_bytes(tmp_path / "folder") == 1030


def test_names_in_place_of_paths() -> None:
    record = {"a": ["/home/me/cats", "x /home/me/cats/out --y=/home/me/cats"], "b": {"c": 3, "/home/me": "0.1.0"}}
    paths = ["/home/me/cats", "/home/me/cats/out", ".", "0"]
    assert without_folders(record, paths) == {"a": ["cats", "x out --y=cats"], "b": {"c": 3, "/home/me": "0.1.0"}}
