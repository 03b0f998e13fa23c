"""A folder of captioned images: what is read, how it is cropped, what is skipped, and what the user
is told."""

import json
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastdistill.data.images import pixels, read_folder
from fastdistill.errors import UserError
from tests.data.test_image_file import table


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path)


def captions(folder: Path, at_most: int = 99) -> dict[str, str]:
    return {str(image.path.relative_to(folder)): image.caption for image in read_folder(folder, at_most).images}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(["b.png", "a.JPG", "d.jpeg", "c.webp"]):
        draw(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"image\n {index} \n")
    (tmp_path / "notes.md").write_text("not an image")
    return tmp_path


def test_images_come_by_name_with_their_captions(folder: Path) -> None:
    assert list(captions(folder).items()) == [
        ("a.JPG", "image 1"), ("b.png", "image 0"), ("c.webp", "image 3"), ("d.jpeg", "image 2"),
    ]  # fmt: skip
    assert list(captions(folder, 2)) == ["a.JPG", "c.webp"], "spread evenly"
    (folder / "d.txt").write_bytes(b"\xff")  # a caption that is not taken is not read
    assert str(read_folder(folder, 2)) == f"2 of 4 images of {folder}, with captions (2 from .txt); skipped: 1 .md"


def test_without_captions_the_prompt_is_empty(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    assert set(captions(folder).values()) == {""}
    assert "4 images of" in str(read_folder(folder, 9))
    assert "none with a caption: all go with the empty prompt" in str(read_folder(folder, 9))


LAYOUTS = {
    "file of the whole name": {"a.png.txt": "a cat", "b.JPG.TXT": "a dog"},
    "text file": {"a.TXT": "a cat", "b.txt": "a  dog\n"},
    "caption file": {"a.caption": "a cat", "b.Caption": "a\ndog"},
    "JSON file of one image": {"a.json": '{"width": 8, "caption": "a cat"}', "b.JPG.json": '{"Prompt": " a dog"}'},
    "JSON lines": {
        "metadata.jsonl": '{"file_name": "a.png", "text": "a cat"}\n\n{"file_name": "./b.JPG", "text": "a dog"}\n'
    },
    "comma-separated": {"metadata.csv": 'file_name,size,caption\na.png,8,"a cat"\nb.jpg,8,a dog\n'},
    "JSON list": {
        "captions.json": '[{"image": "a.png", "text": ["a cat", "a pet"]}, {"image": "b.JPG", "text": "a dog"}]'
    },
    "JSON by name": {"meta_cap.json": '{"a": {"caption": "a", "tags": "cat"}, "b.JPG": {"tags": ["a", "dog"]}}'},
}


def test_the_docs_have_every_layout() -> None:
    assert list(table("Captions")) == list(LAYOUTS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_of_every_layout_are_read(tmp_path: Path, layout: str, encoding: str) -> None:
    """Each with a byte order mark, too, and in a subfolder."""
    for place in (tmp_path, tmp_path / "more" / "below"):
        draw(place / "a.png")
        draw(place / "b.JPG")
        for name, text in LAYOUTS[layout].items():
            (place / name).write_text(text, encoding=encoding)
    right = ["a, cat", "a, dog"] if layout == "JSON by name" else ["a cat", "a dog"]
    assert list(captions(tmp_path).items()) == [
        ("a.png", right[0]), ("b.JPG", right[1]), ("more/below/a.png", right[0]), ("more/below/b.JPG", right[1]),
    ]  # fmt: skip
    assert "skipped" not in str(read_folder(tmp_path, 9))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "sub/a.png", "blip_caption": "a cat"}\n'),
        ("metadata.jsonl", '{"image_file_name": "sub\\\\a.png", "text": "a cat"}\n'),
        ("metadata.jsonl", '{"source_file_name": ["sub/a.png"], "description": "a cat"}\n'),
        ("metadata.csv", "file_name;text\r\nsub/a.png;a cat\r\n"),
        ("metadata.csv", "file_name\ttext\nsub/a.png\ta cat\n"),
        ("metadata.csv", 'file_name,text\nsub/a.png,"a\ncat"\n'),
        ("list.tsv", "path\tprompt\nsub/a\ta cat\n"),
        ("any.json", '{"sub/a": "a cat"}'),
        ("sub/metadata.jsonl", '{"file_name": "A.PNG", "TEXT": "a cat"}\n'),
    ],
)
def test_tables_name_images_in_many_ways(tmp_path: Path, name: str, text: str) -> None:
    draw(tmp_path / "sub" / "a.png")
    (tmp_path / name).write_text(text)
    assert captions(tmp_path) == {"sub/a.png": "a cat"}
    (tmp_path / name).write_text(text.replace("sub/", f"{tmp_path}/sub/"))
    assert captions(tmp_path) == {"sub/a.png": "a cat"}, "by its whole path"


def test_the_order_of_several_captions_and_the_line_that_names_them(tmp_path: Path) -> None:
    """The order is that of the table of the docs; layouts of one kind go by name."""
    draw(tmp_path / "a.png")
    files = {name: text for files in LAYOUTS.values() for name, text in files.items() if name.startswith("a.")}
    tables = {
        "metadata.jsonl": '{"file_name": "a.png", "text": "a fox"}',
        "notes.jsonl": '{"file_name": "a.png", "text": "a cow"}',
        "captions.csv": "file_name,text\na.png,a hen",
        "captions.tsv": "file_name\ttext\na.png\ta bee",
        "metadata.csv": "file_name,text\na.png,an ant",
        "captions.json": '[{"image": "a.png", "text": "an eel"}]',
        "b_list.json": '{"a": "an owl"}',
    }
    files |= tables
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    wanted = ["a cat"] * 4 + ["a fox", "a cow", "a hen", "a bee", "an ant", "an eel", "an owl"]
    for name, caption in zip(list(files), wanted, strict=True):
        found = read_folder(tmp_path, 9)
        assert found.images[0].caption == caption, name
        assert (f"1 with captions that differ (a.png: {name} is used)" in str(found)) == (name != "b_list.json")
        (tmp_path / name).unlink()


HIDDEN = {
    "JSON by name": ("captions.json", {"a.png": "\ufeffa red\ufeff wall"}),
    "a name with a mark": ("captions.json", {"\ufeffa.png": "a red wall"}),
    "JSON list": ("captions.json", [{"\ufefffile_name": "\ufeffa.png", "\ufefftext": "a red wall\ufeff"}]),
    "list of captions": ("captions.json", [{"file_name": "a.png", "text": ["a \ufeffred wall"]}]),
    "JSON lines": ("metadata.jsonl", {"file_name": "a.png", "text": "a r\ufeffed wall"}),
    "tags": ("meta_cap.json", {"a.png": {"tags": ["\ufeffa red wall\ufeff"]}}),
    "JSON file of one image": ("a.json", {"\ufeffcaption": "\ufeffa red wall"}),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_marks_in_the_escapes_of_json_are_removed(tmp_path: Path, case: str) -> None:
    draw(tmp_path / "a.png")
    name, value = HIDDEN[case]
    (tmp_path / name).write_text(json.dumps(value))
    assert "ufeff" in (tmp_path / name).read_text()
    assert captions(tmp_path) == {"a.png": "a red wall"}


def test_an_image_whose_own_name_has_a_mark(tmp_path: Path) -> None:
    draw(tmp_path / "a\ufeff.png")
    for name, text in [("b.csv", "file_name,text\na\ufeff.png,a cat\n"), ("c.json", '{"a\\ufeff.png": "a cat"}')]:
        (tmp_path / name).write_text(text)
        assert captions(tmp_path) == {"a\ufeff.png": "a cat"}
        (tmp_path / name).unlink()


@pytest.mark.parametrize(("character", "message"), [("\0", "NUL"), ("\ud83d", "surrogate")])
def test_captions_of_no_text_are_refused(tmp_path: Path, character: str, message: str) -> None:
    draw(tmp_path / "a.png")
    text = f"a{character} cat"
    for name, value in [("a.json", {"text": text}), ("metadata.jsonl", {"file_name": "a.png", "text": text})]:
        (tmp_path / name).write_text(json.dumps(value))
        with pytest.raises(UserError, match=rf"{name}.*{message}"):
            read_folder(tmp_path, 9)
        (tmp_path / name).unlink()
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": text}))
    assert re.search(rf"captions\.json is not read.*{message}", str(read_folder(tmp_path, 9)))
    # A pair of halves is one letter.
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "a 🐈"}))
    assert captions(tmp_path) == {"a.png": "a 🐈"}


@pytest.mark.parametrize(
    ("name", "text", "caption"),
    [
        ("metadata.jsonl", '{"file_name": "7.png", "text": 1984}', "1984"),
        ("metadata.jsonl", '{"file_name": 7, "text": [2.5, "other"]}', "2.5"),
        ("metadata.jsonl", '{"file_name": "7.png", "text": null, "caption": "a cat"}', "a cat"),
        ("metadata.jsonl", '{"file_name": "7.png", "text": NaN, "prompt": 0}', "0"),
        ("any.json", '{"7": 3}', "3"),
        ("any.json", '{"7": {"caption": 3, "tags": "a, b"}}', "3, a, b"),
        ("7.json", '{"prompt": 9}', "9"),
        ("metadata.csv", "sep=;\nfile_name;text\n7.png;a cat, sitting\n", "a cat, sitting"),
        ("metadata.csv", "SEP=|\r\nfile_name|text\r\n7.png|a; b; c\r\n", "a; b; c"),
        ("metadata.csv", '"sep=,"\nfile_name,text\n7.png,"a; b; c"\n', "a; b; c"),
        ("metadata.csv", "sep=\t\nfile_name\ttext\n7.png\ta cat\n", "a cat"),
        ("metadata.csv", "\n\nfile_name,text\n7.png,a cat\n", "a cat"),
    ],
)
def test_numbers_and_lines_before_the_header(tmp_path: Path, name: str, text: str, caption: str) -> None:
    draw(tmp_path / "7.png")
    (tmp_path / name).write_text(text)
    found = read_folder(tmp_path, 9)
    assert [image.caption for image in found.images] == [caption]
    assert str(found).endswith(f"with captions (1 from {name if name != '7.json' else '.json'})")


@pytest.mark.parametrize(
    ("name", "text", "remark"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": true}', "(a.png has true in text)"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 3, "caption": null}', "(a.png has null in caption)"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": []}', "(a.png has [] in text)"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": {"en": "a cat"}}', '(a.png has {"en": "a cat"} in text)'),
        ("any.json", '{"a.png": {"caption": false}}', "(a.png has false in caption)"),
        ("any.json", '{"a.png": {"width": 8}}', "(a.png has none of the columns text, caption, prompt, description)"),
    ],
)
def test_tables_without_a_caption_say_what_is_there(tmp_path: Path, name: str, text: str, remark: str) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    assert str(read_folder(tmp_path, 9)).endswith(f"; {name} has no caption of a.png {remark}")


def test_names_equal_to_the_letter_come_before_others(tmp_path: Path) -> None:
    for name in ("a.png", "A.png", "c.v1.png"):
        draw(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert captions(tmp_path) == {"A.png": "A.png", "a.png": "a.png", "c.v1.png": "c.v1.png"}


def test_a_caption_serves_every_image_of_its_name(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("both")
    (tmp_path / "a.jpg.txt").write_text("one")
    assert captions(tmp_path) == {"a.jpg": "one", "a.png": "both"}


def test_letters_in_another_unicode_form(tmp_path: Path) -> None:
    """As a folder comes from a Mac, and a table from elsewhere."""
    name = unicodedata.normalize("NFD", "café.png")
    draw(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "café.png", "text": "a cup"}))
    assert captions(tmp_path) == {name: "a cup"}


def test_an_empty_caption_is_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text({"a": " \n", "b": "a cat"}[name])
    assert captions(tmp_path) == {"a.png": "", "b.png": "a cat"}
    assert "with captions (2 from .txt; 1 of them empty)" in str(read_folder(tmp_path, 9))


def test_every_suffix_is_an_image_whatever_its_case(tmp_path: Path) -> None:
    names = ["a.bmp", "b.TIFF", "c.tif", "d.jfif", "e.gif", "f.jpe", "g.JPEG", "h.webp"]
    for name in names:
        draw(tmp_path / name)
    assert list(captions(tmp_path)) == names


def test_hidden_files_and_litter_are_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    for name in ("._a.png", ".cache/b.png", "__MACOSX/c.png", "Thumbs.db", "sub/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    found = read_folder(tmp_path, 9)
    assert str(found).startswith(f"1 image of {tmp_path}, none with a caption")
    assert "skipped" not in str(found)


def test_a_hidden_folder_can_be_given(tmp_path: Path) -> None:
    draw(tmp_path / ".images" / "a.png")
    assert list(captions(tmp_path / ".images")) == ["a.png"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "a.png")
    images = tmp_path / "images"
    draw(images / "b.png")
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "back").symlink_to(images)
    (images / "c.png").symlink_to(images / "b.png")
    assert list(captions(images)) == ["b.png", "c.png", "linked/a.png"]


def test_broken_images_are_skipped_and_named(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:45])
    (folder / "e.png").write_text("no image, and no caption")
    (folder / "x.png").mkdir()
    (folder / "clip.mp4").write_bytes(b"")
    (folder / "lost.caption").write_text("of no image")
    found = read_folder(folder, 99)
    assert [image.path.name for image in found.images] == ["a.JPG", "c.webp", "d.jpeg"]
    assert str(found) == (
        f"3 of 5 images of {folder}, with captions (3 from .txt); skipped: 2 broken (e.png, b.png), "
        "1 caption without an image (lost.caption), 1 .md, 1 .mp4"
    )
    # Another image takes the place of one that is broken, where not all are wanted.
    assert list(captions(folder, 2)) == ["a.JPG", "c.webp"]
    (folder / "a.JPG").write_text("broken, too")
    assert len(read_folder(folder, 2).images) == 2


def test_tables_that_name_other_files_are_told_of(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    rows = [{"file_name": f"{name}.png", "text": "a cat"} for name in "avwxyz"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "settings.json").write_text('{"size": 3}')
    (tmp_path / "broken.json").write_text("{")
    line = str(read_folder(tmp_path, 9))
    assert "skipped: 2 .json; " in line
    assert "metadata.jsonl names 5 files that are not there (v.png, w.png, x.png, 2 more)" in line
    assert "broken.json is not read as a table of captions" in line
    (tmp_path / "metadata.parquet").write_text("PAR1")
    assert "metadata.parquet is not read; save it as metadata.jsonl" in str(read_folder(tmp_path, 9))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3}')
    assert "metadata.jsonl has no caption of a.png (a.png has none of the columns text" in str(read_folder(tmp_path, 9))


def test_the_centre_is_kept_and_the_shorter_side_fits(tmp_path: Path) -> None:
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 255, 255), (32, 0, 64, 32))
    image.save(tmp_path / "wide.png")
    (captioned,) = read_folder(tmp_path, 1).images
    square = pixels(captioned, 16, 16)
    assert square.shape == (3, 16, 16)
    # White but for what the filter takes from outside the crop.
    assert float(square[:, :, 2:-2].min()) > 0.98
    wide = pixels(captioned, 16, 48)
    torch.testing.assert_close(wide[:, 8, 2], torch.tensor([-1.0, -1.0, 1.0]))


def test_a_camera_held_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=tags)
    (captioned,) = read_folder(tmp_path, 1).images
    upright = pixels(captioned, 32, 16)
    assert float(upright[:, :12].mean()) > 0.9
    assert float(upright[:, -12:].mean()) < -0.9


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def spoil_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text("no image")


def metadata(text: str, name: str = "metadata.csv") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty, "holds no image; it needs .jpg"),
        (lambda folder: [os.remove(path) for path in folder.iterdir() if path.suffix not in (".md", ".txt")],
         "holds no image, but .md, .txt files"),
        (spoil_all, "no image of .* can be used; .*a.JPG, the first, is broken"),
        (
            lambda folder: (folder / "a.txt").unlink(),
            r"a\.JPG and 0 more of 4 images have no caption; write it to a\.txt",
        ),
        (lambda folder: (folder / "a.txt").write_bytes(b"\xff\xfe\x00"), r"a\.txt is not UTF-8 text"),
        (lambda folder: (folder / "a.json").write_text("{"), r"a\.json is not valid JSON"),
        (metadata("file_name,text\na.JPG,a cat, sitting\n"), r"metadata\.csv .*row 2 has more fields"),
        (metadata("name,text\na.JPG,a cat\n"), r"metadata\.csv .*no row has a column file_name"),
        (metadata("sep=;\nfile_name;text\na.JPG;b;c\n"), r"metadata\.csv .*row 3 has more fields"),
        (metadata("sep=;"), r"metadata\.csv .*no row has a column file_name"),
        (metadata("{", "metadata.jsonl"), r"metadata\.jsonl .*row 1 is not JSON"),
        (metadata("[" * 100_000, "metadata.jsonl"), r"metadata\.jsonl .*row 1 is not JSON"),
        (metadata("3", "metadata.json"), r"metadata\.json .*its rows are no JSON objects"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used_are_named(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message):
        read_folder(folder, 10)


def test_a_folder_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        read_folder(tmp_path / "nowhere", 10)
