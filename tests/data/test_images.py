"""A folder of captioned images: what is read, how it is cropped, and what is refused."""

import pytest
import torch
from PIL import Image

from fastdistill.data.images import pixels, read_folder
from fastdistill.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate(["b.png", "a.JPG", "d.jpeg", "c.webp"]):
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"image\n {index} \n")
    (tmp_path / "notes.md").write_text("not an image")
    return tmp_path


def test_images_come_by_name_with_their_captions(folder):
    found = read_folder(folder, 10)
    assert [(image.path.name, image.caption) for image in found] == [
        ("a.JPG", "image 1"), ("b.png", "image 0"), ("c.webp", "image 3"), ("d.jpeg", "image 2"),
    ]  # fmt: skip
    assert [image.path.name for image in read_folder(folder, 2)] == ["a.JPG", "c.webp"], "spread evenly"


def test_without_captions_the_prompt_is_empty(folder):
    for path in folder.glob("*.txt"):
        path.unlink()
    assert {image.caption for image in read_folder(folder, 10)} == {""}


def test_the_centre_is_kept_and_the_shorter_side_fits(tmp_path):
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 255, 255), (32, 0, 64, 32))
    image.save(tmp_path / "wide.png")
    (image,) = read_folder(tmp_path, 1)
    square = pixels(image, 16, 16)
    assert square.shape == (3, 16, 16)
    # White but for what the filter takes from outside the crop.
    assert float(square[:, :, 2:-2].min()) > 0.98
    wide = pixels(image, 16, 48)
    torch.testing.assert_close(wide[:, 8, 2], torch.tensor([-1.0, -1.0, 1.0]))


def test_a_camera_held_upright(tmp_path):
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=tags)
    (image,) = read_folder(tmp_path, 1)
    upright = pixels(image, 32, 16)
    assert float(upright[:, :12].mean()) > 0.9
    assert float(upright[:, -12:].mean()) < -0.9


def truncate(path):
    path.write_bytes(path.read_bytes()[:45])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no image"),
        (lambda folder: (folder / "b.png").write_text("no image"), r"b\.png cannot be read as an image"),
        (lambda folder: truncate(folder / "b.png"), r"b\.png cannot be read as an image"),
        (
            lambda folder: (folder / "a.txt").unlink(),
            r"a\.JPG and 0 more of 4 images have no caption; write it to a\.txt",
        ),
        (lambda folder: (folder / "a.txt").write_bytes(b"\xff\xfe\x00"), r"a\.txt is not UTF-8 text"),
    ],
)
def test_broken_folders_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        read_folder(folder, 10)


def test_a_folder_that_is_nowhere(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        read_folder(tmp_path / "nowhere", 10)
