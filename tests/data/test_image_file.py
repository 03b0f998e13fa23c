"""An image of every mode and depth: the right colours, or skipped for the right reason. Each row of
the table in docs/images.md has a case here."""

import io
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from fastdistill.data import image_file
from fastdistill.data.image_file import SUFFIXES, UnusableImage, converter, read_image
from fastdistill.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "images.md"
GREY = [0x0000, 0x4CCD, 0x8000, 0xFFFF]  # in 16 bits: 0, 0.3, 0.5, 1
EIGHT = [0, 77, 128, 255]
Colours = list[tuple[int, int, int]]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, depth: int, colour: int, row: bytes, *extra: bytes, height: int = 1) -> bytes:
    """A PNG of one row, written by hand: Pillow writes few depths."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(
    size: tuple[int, int],
    row: bytes,
    *,
    bits: int,
    photometric: int,
    channels: int = 1,
    kind: int = 1,
    order: str = "<",
    **more: int,
) -> bytes:
    """An uncompressed TIFF; `kind` is 1 for unsigned numbers, 2 for signed ones, 3 for floats."""
    tags = {256: [size[0]], 257: [size[1]], 258: [bits] * channels, 259: [1], 262: [photometric], 273: [8]}
    tags |= {277: [channels], 278: [size[1]], 279: [len(row)], 339: [kind] * channels}
    tags |= {{"alpha": 338, "orientation": 274, "planes": 284}[name]: [value] for name, value in more.items()}
    body = row + b"\0" * (len(row) % 2)
    directory = 8 + len(body)
    entries, tail, place = b"", b"", directory + 2 + 12 * len(tags) + 4
    for tag in sorted(tags):
        packed = struct.pack(f"{order}{len(tags[tag])}H", *tags[tag])
        if len(packed) > 4:
            packed, tail, place = struct.pack(f"{order}I", place), tail + packed, place + len(packed)
        entries += struct.pack(f"{order}HHI", tag, 3, len(tags[tag])) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", directory)
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + tail


def written(image: Image.Image, suffix: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue()


def words(values: list[int], order: str = ">") -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


def greys(values: list[int]) -> Colours:
    return [(value, value, value) for value in values]


def row_of(mode: str, colours: list) -> Image.Image:
    image = Image.new(mode, (len(colours), 1))
    image.putdata(colours)
    return image


def profile(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged, under another name: a profile whose effect is plain."""
    content = bytearray(profile("sRGB").replace(b"s\0R\0G\0B", b"b\0g\0r\0!"))
    red, blue = content.index(b"rXYZ", 128), content.index(b"bXYZ", 128)
    content[red : red + 4], content[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(content)


def linear_grey() -> bytes:
    """A grey profile whose numbers are proportional to light: 55 of 255 look like 128 in sRGB."""
    tags = {
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(4) + struct.pack(">I", 0),
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    header = bytearray(128)
    header[0:4] = struct.pack(">I", 128 + len(table) + len(body))
    header[8:12], header[12:24], header[36:40] = b"\x02\x40\0\0", b"mntrGRAYXYZ ", b"acsp"
    header[68:80] = struct.pack(">3i", 63190, 65536, 54061)
    return bytes(header) + table + body


def bad_tags() -> bytes:
    return written(row_of("RGB", [(10, 20, 30)]), ".jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xffgarbage", quality=100)


def orientation(value: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = value
    return tags


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))


RAMP = struct.pack("<4f", 0, 0.3, 0.5, 1)
PALETTE = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
ON_WHITE_OF_THREE_TENTHS = 255 - round((255 - 77) * 128 / 255)
HALF = [(77, 77, 77, 128), (200, 100, 0, 0), (1, 2, 3, 255)]
HALF_ON_WHITE = [(ON_WHITE_OF_THREE_TENTHS,) * 3, (255, 255, 255), (1, 2, 3)]
SIXTEEN = [0x4CCD, 0x4CCD, 0x4CCD, 0x8000, 0xC8FF, 0x64FF, 0, 0, 0x0100, 0x0200, 0x0300, 0xFFFF]

Case = tuple[bytes, "Colours | str"]
CASES: dict[str, list[Case]] = {
    "1 bit": [
        (png(3, 1, 0, b"\x40"), greys([0, 255, 0])),
        (tiff((3, 1), b"\x40", bits=1, photometric=1), greys([0, 255, 0])),
        (tiff((3, 1), b"\x40", bits=1, photometric=0), greys([255, 0, 255])),
        (b"P4 3 1\n\x40", greys([255, 0, 255])),
    ],
    "grey of 2 or 4 bits": [
        (png(4, 2, 0, b"\x1b"), greys([0, 85, 170, 255])),
        (png(4, 4, 0, b"\x0f\x5a"), greys([0, 255, 85, 170])),
        (tiff((4, 1), b"\x1b", bits=2, photometric=1), greys([0, 85, 170, 255])),
        (tiff((4, 1), b"\x0f\x5a", bits=4, photometric=0), greys([255, 0, 170, 85])),
    ],
    "grey of 8 bits": [
        (png(4, 8, 0, bytes(EIGHT)), greys(EIGHT)),
        (tiff((4, 1), bytes(EIGHT), bits=8, photometric=0), greys([255, 178, 127, 0])),
        (written(row_of("L", EIGHT), ".gif"), greys(EIGHT)),
        (written(row_of("L", EIGHT), ".bmp"), greys(EIGHT)),
        (written(row_of("L", EIGHT), ".tga"), greys(EIGHT)),
    ],
    "grey of 12 bits, TIFF": [
        (tiff((4, 1), bytes([0x00, 0x04, 0xCD, 0x80, 0x0F, 0xFF]), bits=12, photometric=1), greys(EIGHT)),
    ],
    "grey of 16 bits, PNG": [
        (png(4, 16, 0, words(GREY)), greys(EIGHT)),
        (png(4, 16, 0, words([0, 256, 257, 514])), greys([0, 1, 1, 2])),
    ],
    "grey of 16 bits, TIFF of either byte order": [
        (tiff((4, 1), words(GREY, order), bits=16, photometric=1, order=order), greys(EIGHT)) for order in "<>"
    ],
    "grey of 16 bits with white as zero, TIFF": [
        (tiff((4, 1), words(GREY, "<"), bits=16, photometric=0), greys([255, 178, 127, 0])),
    ],
    "grey of more than 8 bits, PGM": [
        (b"P5 4 1 65535\n" + words(GREY), greys(EIGHT)),
        (b"P5 4 1 1000\n" + words([0, 300, 502, 1000]), greys([0, 76, 128, 255])),
    ],
    "grey with alpha, 8 or 16 bits": [
        (png(2, 8, 4, bytes([77, 128, 10, 0])), greys([ON_WHITE_OF_THREE_TENTHS, 255])),
        (png(2, 16, 4, words([0x4CCD, 0x8000, 0xAAAA, 0])), greys([ON_WHITE_OF_THREE_TENTHS, 255])),
        (tiff((2, 1), bytes([39, 128, 0, 0]), bits=8, photometric=1, channels=2, alpha=1),
         greys([ON_WHITE_OF_THREE_TENTHS, 255])),
        (tiff((2, 1), bytes([77, 128, 10, 0]), bits=8, photometric=1, channels=2, alpha=2),
         greys([ON_WHITE_OF_THREE_TENTHS, 255])),
    ],
    "palette": [
        (png(3, 2, 3, b"\x18", PALETTE), [(10, 20, 30), (40, 50, 60), (70, 80, 90)]),
        (png(2, 8, 3, bytes([2, 0]), PALETTE), [(70, 80, 90), (10, 20, 30)]),
    ],
    "palette with transparency": [
        (png(3, 2, 3, b"\x18", PALETTE, chunk(b"tRNS", b"\x80\x00")), [(132, 137, 142), (255,) * 3, (70, 80, 90)]),
        (written(row_of("P", [1, 0]), ".gif", transparency=0), [(1, 1, 1), (255,) * 3]),
    ],
    "one colour that is transparent, any depth": [
        (png(3, 1, 0, b"\x40", chunk(b"tRNS", words([1]))), greys([0, 255, 0])),
        (png(4, 2, 0, b"\x1b", chunk(b"tRNS", words([1]))), greys([0, 255, 170, 255])),
        (png(4, 4, 0, b"\x0f\x5a", chunk(b"tRNS", words([10]))), greys([0, 255, 85, 255])),
        (png(3, 8, 0, bytes([5, 6, 7]), chunk(b"tRNS", words([6]))), greys([5, 255, 7])),
        (png(4, 16, 0, words(GREY), chunk(b"tRNS", words([0x4CCD]))), greys([0, 255, 128, 255])),
        (png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), chunk(b"tRNS", words([1, 2, 3]))), [(255,) * 3, (4, 5, 6)]),
        (png(2, 16, 2, words([0x8001, 0, 0, 0x4CCD, 0, 0]), chunk(b"tRNS", words([0x8001, 0, 0]))),
         [(255,) * 3, (76, 0, 0)]),
    ],
    "RGB of 8 bits": [
        (png(2, 8, 2, bytes([1, 2, 3, 250, 251, 252])), [(1, 2, 3), (250, 251, 252)]),
        (written(row_of("RGB", [(1, 2, 3), (9, 8, 7)]), ".webp", lossless=True), [(1, 2, 3), (9, 8, 7)]),
        (written(row_of("RGB", [(1, 2, 3), (9, 8, 7)]), ".jp2"), [(1, 2, 3), (9, 8, 7)]),
        (written(row_of("RGB", [(1, 2, 3), (9, 8, 7)]), ".dib"), [(1, 2, 3), (9, 8, 7)]),
        (b"P6 1 1 255\n\x01\x02\x03", [(1, 2, 3)]),
    ],
    "RGB of 16 bits, PNG or TIFF": [
        (png(2, 16, 2, words([0, 0x4DFF, 0xFFFF, 0x80FF, 1, 2])), [(0, 77, 255), (128, 0, 0)]),
        *((tiff((1, 1), words([0, 0x4DFF, 0xFFFF], order), bits=16, photometric=2, channels=3, order=order),
           [(0, 77, 255)]) for order in "<>"),
    ],
    "RGB with alpha, 8 or 16 bits": [
        (written(row_of("RGBA", HALF), ".png"), HALF_ON_WHITE),
        (written(row_of("RGBA", HALF), ".webp", lossless=True), HALF_ON_WHITE),
        (written(row_of("RGBA", HALF), ".tga"), HALF_ON_WHITE),
        (png(3, 16, 6, words(SIXTEEN)), HALF_ON_WHITE),
        (tiff((3, 1), words(SIXTEEN, "<"), bits=16, photometric=2, channels=4, alpha=2), HALF_ON_WHITE),
    ],
    "RGB with premultiplied alpha, TIFF": [
        (tiff((2, 1), bytes([39, 39, 39, 128, 0, 0, 0, 0]), bits=8, photometric=2, channels=4, alpha=1),
         greys([ON_WHITE_OF_THREE_TENTHS, 255])),
    ],
    "CMYK": [
        (tiff((3, 1), bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 255]), bits=8, photometric=5, channels=4),
         [(255,) * 3, (0, 255, 255), (0,) * 3]),
        (written(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), ".jpg", quality=100), [(254, 0, 0)] * 64),
    ],
    "YCbCr": [
        (written(Image.new("YCbCr", (8, 8), (76, 85, 255)), ".jpg", quality=100), [(254, 0, 0)] * 64),
        (written(Image.new("YCbCr", (1, 1), (128, 128, 128)), ".tif"), [(128,) * 3]),
    ],
    "LAB": [
        (tiff((2, 1), bytes([128, 0, 0, 255, 0, 0]), bits=8, photometric=8, channels=3), greys([119, 255])),
    ],
    "float from 0 to 1": [
        (tiff((4, 1), RAMP, bits=32, photometric=1, kind=3), greys([0, 76, 128, 255])),
        (tiff((4, 1), RAMP, bits=32, photometric=0, kind=3), greys([255, 179, 127, 0])),
    ],
    "float beyond 0 to 1, or NaN": [
        (tiff((2, 1), struct.pack("<2f", *pair), bits=32, photometric=1, kind=3), "of unknown brightness")
        for pair in ((0, 2), (-0.1, 1), (0.5, float("nan")), (float("nan"), 0.5), (0, float("inf")))
    ],
    "integers of 32 bits, or with a sign": [
        (tiff((2, 1), struct.pack("<2I", 0, 2**31), bits=32, photometric=1), "of unknown brightness"),
        (tiff((2, 1), struct.pack("<2i", -5, 7), bits=32, photometric=1, kind=2), "of unknown brightness"),
        (tiff((2, 1), struct.pack("<2h", -5, 7), bits=16, photometric=1, kind=2), "of unknown brightness"),
    ],
    "float in three channels, which Pillow does not read": [
        (tiff((1, 1), RAMP[:12], bits=32, photometric=2, channels=3, kind=3), "broken"),
    ],
    "colour profile": [
        (written(row_of("RGB", [(200, 20, 10)]), ".png", icc_profile=swapped_profile()), [(10, 20, 200)]),
        (written(row_of("RGBA", [(200, 20, 10, 0), (200, 20, 10, 255)]), ".png", icc_profile=swapped_profile()),
         [(255,) * 3, (10, 20, 200)]),
        (written(row_of("RGB", [(200, 20, 10)]), ".png", icc_profile=profile("sRGB")), [(200, 20, 10)]),
        (written(row_of("L", [0, 55, 255]), ".png", icc_profile=linear_grey()), greys([0, 128, 255])),
        (png(2, 16, 0, words([0x3737, 0xFFFF]), chunk(b"iCCP", b"grey\0\0" + zlib.compress(linear_grey()))),
         greys([128, 255])),
    ],
    "damaged profile, or for other colours": [
        (written(row_of("RGB", [(200, 20, 10)]), ".png", icc_profile=b"no profile"), [(200, 20, 10)]),
        (written(row_of("RGB", [(200, 20, 10)]), ".png", icc_profile=swapped_profile()[:300]), [(200, 20, 10)]),
        (written(row_of("L", EIGHT), ".png", icc_profile=swapped_profile()), greys(EIGHT)),
        (written(row_of("RGB", [(200, 20, 10)]), ".png", icc_profile=profile("LAB")), [(200, 20, 10)]),
    ],
    "turned by a tag": [
        (written(row_of("RGB", [(1, 1, 1), (9, 9, 9)]), ".png", exif=orientation(3)), [(9, 9, 9), (1, 1, 1)]),
        *((tiff((3, 2), bytes([1, 2, 3, 4, 5, 6]), bits=8, photometric=1, orientation=turn), greys(turned))
          for turn, turned in ((6, [4, 1, 5, 2, 6, 3]), (3, [6, 5, 4, 3, 2, 1]), (8, [3, 6, 2, 5, 1, 4]))),
    ],
    "damaged tags, or texts of many megabytes": [
        (png(2, 8, 0, bytes([1, 9]), chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000)))), greys([1, 9])),
        (png(2, 8, 0, bytes([1, 9]), chunk(b"iCCP", b"huge\0\0" + zlib.compress(bytes(3_000_000)))), greys([1, 9])),
        (bad_tags(), [(10, 20, 30)]),
        (written(row_of("RGB", [(1, 1, 1), (9, 9, 9)]), ".png", exif=orientation(77)), [(1, 1, 1), (9, 9, 9)]),
    ],
    "animation, or several pages": [
        (written(row_of("L", [7]), suffix, save_all=True, append_images=[row_of("L", [200])], **options), greys([7]))
        for suffix, options in ((".gif", {}), (".png", {}), (".webp", {"lossless": True}), (".tif", {}))
    ],
    "other suffix than format": [
        (written(Image.new("RGB", (8, 8), (255, 255, 255)), ".jpg"), [(255,) * 3] * 64),
        (written(row_of("RGB", [(1, 2, 3)]), ".bmp"), [(1, 2, 3)]),
    ],
    "more than 67 megapixels": [],  # below, with a smaller limit
    "more than 2 GiB when decoded": [(png(100_000, 1, 0, b"", height=100_000), "too large")],
    "white or nothing, once it is on white": [
        (written(row_of("RGBA", [(1, 2, 3, 0), (4, 5, 6, 0)]), ".png"), "blank"),
        (written(row_of("RGBA", [(255, 255, 255, 255), (4, 5, 6, 0)]), ".webp", lossless=True), "blank"),
        (png(3, 1, 0, b"\x40", chunk(b"tRNS", words([0]))), "blank"),
        (png(2, 8, 0, bytes([255, 255])), greys([255, 255])),
    ],
    "TIFF of more than 8 bits in separate planes, which Pillow mixes up": [
        (tiff((1, 1), words([1, 2, 3], order), bits=16, photometric=2, channels=3, order=order, planes=2),
         "of separate planes") for order in "<>"
    ],
    "truncated": [
        (written(noise((64, 64)), ".png")[:-3000], "broken"),
        (written(noise((64, 64)), ".jpg")[:-1000], "broken"),
        (written(noise((64, 64)), ".webp")[:-1000], "broken"),
        (written(noise((64, 64)), ".bmp")[:-1000], "broken"),
        (written(noise((64, 64)), ".tif", compression="tiff_lzw")[:-5000], "broken"),
        (png(4, 16, 0, words(GREY))[:20], "broken"),
    ],
    "empty, or no image": [
        (b"", "broken"),
        (b"no image", "broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "broken"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "broken"),
    ],
}  # fmt: skip


def table(heading: str) -> dict[str, str]:
    """Second column by first of the table under a heading of the docs."""
    section = DOCS.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1] for row in rows[1:]}


def test_the_docs_have_every_case_and_every_suffix() -> None:
    documented = table("Modes and depths")
    assert list(documented) == list(CASES)
    for row, becomes in documented.items():
        kind = re.match(r"skipped: ([\w ]+)", becomes)
        assert {right for _, right in CASES[row] if isinstance(right, str)} == ({kind[1]} if kind else set())
    section = DOCS.read_text().partition("Suffixes:")[2].partition("The content")[0]
    assert tuple(re.findall(r"`(\.\w+)`", section)) == SUFFIXES


@pytest.mark.parametrize(
    ("content", "right"),
    [pytest.param(*case, id=f"{row}-{number}") for row, cases in CASES.items() for number, case in enumerate(cases)],
)
def test_every_image_has_the_right_colours_or_a_reason(tmp_path: Path, content: bytes, right: "Colours | str") -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    if isinstance(right, str):
        with pytest.raises(UnusableImage, match=re.escape(str(path))) as caught:
            read_image(path)
        assert caught.value.kind == right
        assert "\n" not in str(caught.value)
        return
    image = read_image(path)
    assert image.mode == "RGB"
    # Half of 255 rounds either way, and so do codecs and profiles.
    np.testing.assert_allclose(np.asarray(image).reshape(-1, 3).astype(int), right, atol=1)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 16))
    image.save(tmp_path / "a.avif")
    found = read_image(tmp_path / "a.avif")
    assert (found.getpixel((3, 3)), found.getpixel((12, 3))) == ((255, 255, 255), (0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "right"),
    [
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
        ("RGBa", (39, 39, 39, 128), (ON_WHITE_OF_THREE_TENTHS,) * 3),
        ("La", (39, 128), (ON_WHITE_OF_THREE_TENTHS,) * 3),
        ("PA", (0, 0), (255, 255, 255)),
        ("LA", (77, 128), (ON_WHITE_OF_THREE_TENTHS,) * 3),
    ],
)
def test_modes_that_only_plug_ins_give(mode: str, colour: tuple[int, ...], right: tuple[int, ...]) -> None:
    image = Image.new(mode, (2, 2), colour) if mode not in ("La", "RGBa") else Image.frombytes(
        mode, (2, 2), bytes(colour if mode == "RGBa" else (colour[0], colour[1])) * 4
    )  # fmt: skip
    found = converter(image, None)(image)
    np.testing.assert_allclose(np.asarray(found)[0, 0].astype(int), right, atol=1)


def test_long_strips_are_made_smaller_too() -> None:
    assert image_file._factor((20_000, 20_000), 512) == 19
    assert image_file._factor((3_000, 300_000), 1024) == 2
    assert image_file._factor((8_192, 8_192), 4_096) == 1


@pytest.mark.parametrize(("suffix", "mode"), [(".png", "1"), (".png", "P"), (".png", "RGBA"), (".jpg", "RGB")])
def test_large_images_are_made_smaller_strip_by_strip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, mode: str
) -> None:
    whole = Image.new("RGB", (601, 403), (255, 255, 255))
    whole.paste((0, 0, 0), (0, 0, 200, 403))
    whole.paste((0, 0, 0), (0, 0, 601, 100))
    path = tmp_path / f"a{suffix}"
    whole.convert(mode).save(path, exif=orientation(6))
    expected = np.asarray(read_image(path).resize((50, 75), Image.Resampling.BOX)).astype(int)
    monkeypatch.setattr(image_file, "LARGE", 100_000)
    small = read_image(path, at_least=32)
    assert 64 <= min(small.size) < 403
    assert small.height > small.width, "upright"
    difference = np.abs(np.asarray(small.resize((50, 75), Image.Resampling.BOX)) - expected)
    # All but the edges, which fall between pixels.
    assert difference.mean() < 2
    assert np.median(difference) == 0
    assert read_image(path, at_least=300).size == (403, 601)


def test_a_scan_beyond_pillows_limit_of_pixels(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A sheet of 180 megapixels in one bit: Pillow refuses it as a decompression bomb."""
    limit = Image.MAX_IMAGE_PIXELS
    sheet = Image.new("1", (13_400, 13_400), 1)
    sheet.paste(0, (0, 0, 6_700, 13_400))
    sheet.save(tmp_path / "scan.png", compress_level=1)
    image = read_image(tmp_path / "scan.png", at_least=64)
    assert 128 <= min(image.size) <= 160
    assert (image.getpixel((5, 5)), image.getpixel((image.width - 5, 5))) == ((0, 0, 0), (255, 255, 255))
    assert limit == Image.MAX_IMAGE_PIXELS
    assert not recwarn.list


@pytest.mark.parametrize("prepare", [lambda path: None, lambda path: path.mkdir(), lambda path: path.symlink_to("no")])
def test_what_is_no_file_is_named(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png cannot be used as an image: it is broken"):
        read_image(tmp_path / "a.png")
