"""Folder of images with captions: which files are read, and what the user is told of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastdistill.data.captions import Captions, find_captions, listed
from fastdistill.data.image_file import SUFFIXES, UnusableImage, read_image
from fastdistill.errors import UserError

# What systems leave in folders, besides files whose names begin with a dot.
LITTER = ("__macosx", "thumbs.db", "desktop.ini")


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """File of an image, and its caption; the empty prompt if the folder has no captions."""

    path: Path
    caption: str


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images that were read of a folder; as text, a line for the user."""

    folder: Path
    images: list[Captioned]
    found: int
    """Number of the folder's image files, used or not."""
    captions: Captions
    unusable: Mapping[Path, str]
    """Image files that were skipped, with the kind of reason."""

    def __str__(self) -> str:
        used = len(self.images)
        count = f"{used} of {self.found}" if used < self.found else str(used)
        parts = [f"{count} image{'s' if self.found > 1 else ''} of {self.folder}, {self._sources()}"]
        skipped = [*self._unusable(), *self._others()]
        parts += [f"skipped: {', '.join(skipped)}"] if skipped else []
        return "; ".join([*parts, *self._differing(), *self.captions.remarks])

    def _sources(self) -> str:
        """Number of captions of each kind of file."""
        if not self.captions.by_image:
            return "none with a caption: all go with the empty prompt"
        kinds = Counter(self.captions.by_image[image.path][0].kind for image in self.images)
        sources = ", ".join(f"{number} from {kind}" for kind, number in kinds.items())
        empty = sum(not image.caption for image in self.images)
        return f"with captions ({sources}{f'; {empty} of them empty' if empty else ''})"

    def _unusable(self) -> list[str]:
        kinds: dict[str, list[Path]] = {}
        for path, kind in self.unusable.items():
            kinds.setdefault(kind, []).append(path)
        return [f"{len(paths)} {kind} ({self._names(paths)})" for kind, paths in kinds.items()]

    def _others(self) -> list[str]:
        """Files that are neither images nor captions, by their suffix."""
        kinds = Counter(path.suffix.lower() or path.name for path in self.captions.unread)
        lone = self.captions.without_image
        captions = [f"{len(lone)} caption{'s' if len(lone) > 1 else ''} without an image ({self._names(lone)})"]
        return [*(captions if lone else []), *(f"{number} {kind}" for kind, number in sorted(kinds.items()))]

    def _differing(self) -> list[str]:
        """Images with several captions that differ."""
        cases = []
        for image in self.images:
            found = self.captions.by_image.get(image.path, [])
            if any(caption.text != image.caption for caption in found):
                cases.append(f"{self._names([image.path])}: {found[0].file.name} is used")
        return [f"{len(cases)} with captions that differ ({listed(cases)})"] if cases else []

    def _names(self, paths: Sequence[Path]) -> str:
        return listed([str(path.relative_to(self.folder)) for path in paths])


def read_folder(folder: Path, at_most: int) -> ImageFolder:
    """Read the images of `folder` and its subfolders in the order of their names, or `at_most` of
    them, spread evenly.

    Every image that is returned has been opened and decoded, so that none fails in the middle of
    long work. Those that cannot be are skipped.

    Raises:
        UserError: there is no such folder, it holds no usable image, only some of its images have a
            caption, or a caption is no text.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one with images, and their captions in .txt files")
    files = _files(folder)
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        kinds = sorted({path.suffix.lower() for path in files} - {""})
        instead = f", but {', '.join(kinds)} files" if kinds else ""
        raise UserError(f"{folder} holds no image{instead}; it needs {', '.join(SUFFIXES)} files")
    captions = find_captions(paths, [path for path in files if path.suffix.lower() not in SUFFIXES])
    unusable: dict[Path, str] = {}
    bare = [path for path in paths if path not in captions.by_image]
    if 0 < len(bare) < len(paths) and (bare := [path for path in bare if _usable(path, unusable)]):
        raise UserError(
            f"{bare[0]} and {len(bare) - 1} more of {len(paths)} images have no caption; write it to "
            f"{bare[0].with_suffix('.txt').name}, an empty file for the empty prompt, or remove all captions"
        )
    count = min(at_most, len(paths))
    spread = [paths[i * len(paths) // count] for i in range(count)]
    # Others take the places of those that cannot be used.
    order = dict.fromkeys([*spread, *paths])
    chosen = sorted(islice((path for path in order if _usable(path, unusable)), count))
    if not chosen:
        path, kind = next(iter(unusable.items()))
        raise UserError(f"no image of {folder} can be used; {path}, the first, is {kind}")
    images = [
        Captioned(path=path, caption=captions.by_image[path][0].text if path in captions.by_image else "")
        for path in chosen
    ]
    return ImageFolder(folder=folder, images=images, found=len(paths), captions=captions, unusable=unusable)


def pixels(image: Captioned, height: int, width: int) -> Tensor:
    """Pixels (3, height, width) in [-1, 1] of an image.

    The image is scaled until its shorter side fits, and cropped to the centre. diffusers' training
    scripts do the same.
    """
    decoded = read_image(image.path, at_least=max(height, width))
    fitted = ImageOps.fit(decoded, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _files(folder: Path) -> list[Path]:
    """Files of a folder and of its subfolders, but for hidden ones and litter, by name."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    found: list[Path] = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        # A link may lead back to where the walk came from.
        folders[:] = [name for name in folders if not _hidden(name) and os.path.realpath(f"{place}/{name}") not in seen]
        seen.update(os.path.realpath(f"{place}/{name}") for name in folders)
        found += [Path(place) / name for name in names if not _hidden(name)]
    return sorted(found)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _usable(path: Path, unusable: dict[Path, str]) -> bool:
    """Whether a file can be read as an image; if not, it is in `unusable` from then on."""
    if path in unusable:
        return False
    try:
        read_image(path)
    except UnusableImage as error:
        unusable[path] = error.kind
        return False
    return True
