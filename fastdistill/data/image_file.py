"""One image file of any mode and depth, as 8-bit sRGB on white. docs/images.md has the table."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base

from fastdistill.errors import UserError

# fmt: off
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".dib",
    ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)
# fmt: on
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA")
"""Formats that a file may have, whatever its suffix. Pillow hands some others to other programs."""
LARGE = 2**26
"""Pixels from which an image is made smaller while it is converted."""
LARGEST = 2**31
"""Bytes of the largest image that is decoded."""
BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
"""Bytes of a pixel in Pillow's memory; 4 in other modes."""
# Pillow scales samples of these PNG files to 8 bits, but not the colour that stands for
# transparency.
SCALES_OF_TRANSPARENCY = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
COLOUR_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}
"""Mode of the images that a profile of each colour space is for."""


class UnusableImage(UserError):
    """A file that cannot serve as an image, with the kind of reason in a few words."""

    def __init__(self, path: Path, kind: str, detail: str) -> None:
        super().__init__(f"{path} cannot be used as an image: it is {kind} ({detail}); replace or remove it")
        self.kind = kind


def read_image(path: Path, at_least: int = 1) -> Image.Image:
    """Read the first frame of an image as RGB, upright and on white.

    An image of more than `LARGE` pixels is made smaller by a whole factor, so that memory is
    bounded by what the decoder needs.

    Args:
        at_least: pixels of which the shorter side keeps twice as many, unless it has fewer or the
            image is a long strip.

    Raises:
        UnusableImage: the file is damaged, would take more than `LARGEST` bytes, holds numbers of
            which none is known to be white, or has nothing to see on white.
    """
    try:
        with _no_limits(), warnings.catch_warnings():
            # Of tags and palettes; what they are about is dealt with here.
            warnings.simplefilter("ignore")
            # A file and not its name: Pillow maps files that it knows by name into memory, and
            # then mixes up the rows of some that are to be turned.
            with path.open("rb") as file, Image.open(file, formats=_formats()) as image:
                return _read(path, image, at_least)
    except UnusableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnusableImage(path, "broken", "not an image of a format that is read") from error
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnusableImage(path, "broken", detail) from error


def white_of(image: Image.Image) -> float | None:
    """Value of white in an image of a mode of more than 8 bits; None if the image does not say."""
    if image.mode.startswith("I;16"):
        return float(2 ** _tag(image, TiffImagePlugin.BITSPERSAMPLE, 16) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535.0  # what Pillow scales these formats to
    if image.mode == "F":
        low, high = _range(image)
        # No comparison with NaN holds.
        return 1.0 if low >= 0 and high <= 1 else None
    return None


def converter(image: Image.Image, white: float | None) -> Callable[[Image.Image], Image.Image]:
    """A function that converts an image of any mode, or parts of it, to RGB on white.

    Args:
        white: the value of white in a mode of more than 8 bits; see `white_of`.
    """
    inverted = image.mode[0] in "IF" and _tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 0
    managed = _to_srgb(image.info.get("icc_profile"), image.mode if white is None else "L")

    def convert(part: Image.Image) -> Image.Image:
        if white is not None:
            part = _eight_bit(part, white, inverted)
        if not part.has_transparency_data:
            return managed(part)
        # Pillow converts grey with premultiplied alpha to no other mode.
        part = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
        canvas = Image.new("RGB", part.size, "white")
        canvas.paste(managed(part.convert("RGB")), mask=part.getchannel("A"))
        return canvas

    return convert


def _read(path: Path, image: ImageFile.ImageFile, at_least: int) -> Image.Image:
    large = math.prod(image.size) > LARGE
    if large:
        # JPEG alone decodes to a fraction of its size.
        side = 2 * at_least
        image.draft(image.mode, (side, side))
    if math.prod(image.size) * BYTES.get(image.mode, 4) > LARGEST:
        raise UnusableImage(path, "too large", f"{image.width} x {image.height} pixels")
    if _tag(image, TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2 and _tag(image, TiffImagePlugin.BITSPERSAMPLE, 8) > 8:
        raise UnusableImage(path, "of separate planes", "Pillow mixes up planes of more than 8 bits")
    _scale_transparency(image)
    image.load()
    white = white_of(image)
    if white is None and image.mode in ("I", "F"):
        low, high = _range(image)
        raise UnusableImage(path, "of unknown brightness", f"its numbers go from {low:g} to {high:g}")
    factor = _factor(image.size, at_least) if large else 1
    result = _reduced(image, converter(image, white), factor)
    if image.has_transparency_data and result.getextrema() == ((255, 255),) * 3:
        raise UnusableImage(path, "blank", "what is not transparent is white, as the background")
    return _upright(result, image)


def _factor(size: tuple[int, int], at_least: int) -> int:
    """Factor that leaves the shorter side twice `at_least`, but no more than four `LARGE` images:
    long strips lose more."""
    return max(1, min(size) // (2 * at_least), math.ceil(math.sqrt(math.prod(size) / (4 * LARGE))))


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Bring the colour that stands for transparency to the 8 bits that Pillow will decode to."""
    clear, coding = image.info.get("transparency"), image.tile[0].args if image.tile else None
    if image.format != "PNG" or clear is None or not isinstance(coding, str):
        return
    scale = SCALES_OF_TRANSPARENCY.get(coding, 1.0)
    if isinstance(clear, tuple):
        image.info["transparency"] = tuple(int(value * scale) for value in clear)
    elif isinstance(clear, int):
        image.info["transparency"] = int(clear * scale)


def _reduced(image: Image.Image, convert: Callable[[Image.Image], Image.Image], factor: int) -> Image.Image:
    """Convert the image strip by strip, each scaled down by `factor`."""
    if factor == 1:
        return convert(image)
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    rows = factor * max(1, LARGE // 4 // (image.width * factor))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(convert(strip).reduce(factor), (0, top // factor))
    return result


def _eight_bit(image: Image.Image, white: float, inverted: bool) -> Image.Image:
    """Grey image of numbers from 0 to `white`, in 8 bits; or from `white` to 0, if inverted."""
    numbers = np.asarray(image)
    grey = np.rint(numbers.astype(np.float32).clip(0, white) * (255 / white)).astype(np.uint8)
    result = Image.fromarray(255 - grey if inverted else grey)
    if (clear := image.info.get("transparency")) is not None:
        result.putalpha(Image.fromarray(np.where(numbers == clear, 0, 255).astype(np.uint8)))
    return result


def _to_srgb(profile: bytes | None, mode: str) -> Callable[[Image.Image], Image.Image]:
    """A function that converts opaque images to sRGB, by the profile of a file of `mode`.

    A profile that is damaged, or for other colours than those of `mode`, has no effect.
    """
    colours = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(mode, "RGB")

    def plain(image: Image.Image) -> Image.Image:
        return image.convert("RGB")

    if not profile:
        return plain
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        for_mode = COLOUR_SPACES.get(source.profile.xcolor_space.strip())
        if for_mode != colours or "sRGB" in (source.profile.profile_description or ""):
            return plain
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), colours, "RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError):
        return plain

    def managed(image: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(image if image.mode == colours else image.convert(colours), transform)
        assert converted is not None  # None is for a transform in place
        return converted

    return managed


def _upright(image: Image.Image, file: Image.Image) -> Image.Image:
    """Turn the image as the file's tag says, where a camera records which side is up."""
    try:
        orientation = int(file.getexif().get(Base.Orientation, 1))
    except Exception:  # damaged tags: the image itself is sound
        return image
    image.getexif()[Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


def _range(image: Image.Image) -> tuple[float, float]:
    """Lowest and highest number of a grey image; NaN if one is."""
    numbers = np.asarray(image)
    return float(numbers.min()), float(numbers.max())


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """Number in a TIFF file's tag; `default` without the tag, and for other files."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _formats() -> list[str]:
    """The `FORMATS` that this build of Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _no_limits() -> Iterator[None]:
    """Lift Pillow's limit of pixels inside the block, where `LARGEST` stands for it, and that of a
    PNG's texts and profile: other programs keep whole projects there."""
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits
