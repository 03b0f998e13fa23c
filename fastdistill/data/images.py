"""Folder of images with captions, in the layout that trainers take: `name.jpg` with `name.txt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastdistill.errors import UserError
from fastdistill.run.files import read_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """File of an image, and its caption; the empty prompt if the folder has no captions."""

    path: Path
    caption: str


def read_folder(folder: Path, at_most: int) -> list[Captioned]:
    """Read the images of `folder` in the order of their names, or `at_most` of them, spread evenly.

    Every image that is returned has been opened and decoded, so that none fails in the middle of
    long work.

    Raises:
        UserError: there is no such folder, it holds no image, an image cannot be decoded, some
            images only have a caption, or a caption is no text.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; give one with {', '.join(SUFFIXES)} files, "
            "and their captions as .txt files of the same names"
        )
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no image; it needs {', '.join(SUFFIXES)} files, not in folders of their own")
    bare = [path for path in paths if not path.with_suffix(".txt").is_file()]
    if 0 < len(bare) < len(paths):
        raise UserError(
            f"{bare[0]} and {len(bare) - 1} more of {len(paths)} images have no caption; write it to "
            f"{bare[0].with_suffix('.txt').name}, "
            "or remove all captions to use the empty prompt"
        )
    count = min(at_most, len(paths))
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    for path in chosen:
        _open(path)
    return [Captioned(path=path, caption="" if bare else _caption(path.with_suffix(".txt"))) for path in chosen]


def pixels(image: Captioned, height: int, width: int) -> Tensor:
    """Pixels (3, height, width) in [-1, 1] of an image.

    The image is scaled until its shorter side fits, and cropped to the centre. diffusers' training
    scripts do the same.
    """
    fitted = ImageOps.fit(_open(image.path), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            # A camera says which side is up in a tag.
            return ImageOps.exif_transpose(image).convert("RGB")
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # what Pillow's readers raise on damaged files
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def _caption(path: Path) -> str:
    return " ".join(read_text(path).split())
