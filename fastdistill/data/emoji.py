"""Emoji testbed: a text-to-image task whose true distribution is known.

It has 200 Noto emoji, each on one of eight backgrounds.

A draw of caption `c` is the image of `c` scaled by `s ~ U(0.85, 1)`, moved by up to two pixels
along each axis and laid over a background colour that is uniform over eight. The caption does not
name the colour, so `p(colour | caption)` has eight equal modes: a model that samples in too few
steps, or has collapsed, shows it as a measurable loss of diversity.

`python -m fastdistill.data.emoji` renders the images from the installed Noto Color Emoji font into
the sheet that the package ships.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastdistill.run.files import atomic_write, read_json, write_text

SIZE = 64
SHEET_COLUMNS = 20
MIN_SCALE = 0.85
MAX_SHIFT_PIXELS = 2.0

CHARACTERS = (
    # faces
    "😀😂😇😈😍😎😘😜😡😭😱😴😷🙄🤐🤑🤒🤓🤔🤖🤠🤡🤢🤩🤯🥳🥵🥶🥺😻🤬🫠"
    # animals
    "🐀🐂🐄🐅🐇🐈🐉🐊🐋🐌🐍🐎🐐🐑🐒🐓🐔🐕🐖🐘🐙🐚🐜🐝🐞🐟🐠🐡🐢🐣🐦🐧🐨🐩🐪🐬🐭🐮🐯🐰🐱🐴🐵🐶🐷🐸🐹🐺🐻🐼🦀🦁🦂🦃🦄🦅🦆🦇🦈🦉🦊🦋🦒🦔"
    # plants and food
    "🌲🌴🌵🌷🌹🌻🌽🍀🍁🍄🍅🍆🍇🍉🍊🍋🍌🍍🍎🍐🍑🍒🍓🍔🍕🍗🍙🍝🍞🍟🍣🍤🍦🍩🍪🍫🍬🍭🍯🍰🍷🍺🥐🥑🥒🥓🥕🥝🥞🥥🥦🥨🥪🌭🌮🎂"
    # objects
    "🎈🎁🎃🎄🎒🎓👑👓👕👖👗👟🎡🎤🎧🎨🎩🎮🎯🎲🎷🎸🎺🎻🏀🏆💡💣💰💻📅📖📦📷📺🔑🔔🔥🔨🔭🚀🚁🚂🚌🚗⚓⏰🧸"
)

# Chosen far apart in RGB, so that the nearest of the eight is unambiguous after the autoencoder.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "grey": (136, 136, 144),
    "red": (200, 48, 56),
    "green": (40, 140, 72),
    "blue": (40, 80, 200),
    "violet": (140, 60, 170),
    "cyan": (100, 205, 220),
}


def assets() -> Path:
    """Folder of the embedded emoji model and its images."""
    return Path(str(resources.files("fastdistill"))) / "assets" / "emoji"


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Batch of fresh draws: pixels (B, 3, 64, 64) in [-1, 1], caption and background indices (B,)."""

    pixels: Tensor
    captions: Tensor
    backgrounds: Tensor


class Emoji:
    """Images and captions of the testbed, and its sampler."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or assets()
        sheet_path, captions_path = folder / "emoji.png", folder / "captions.json"
        if not sheet_path.exists() or not captions_path.exists():
            raise FileNotFoundError(f"no emoji sheet in {folder}: run `python -m fastdistill.data.emoji` to render it")
        self.captions: list[str] = read_json(captions_path)
        sheet = torch.from_numpy(np.array(Image.open(sheet_path).convert("RGBA"))).float() / 255
        rows = sheet.shape[0] // SIZE
        tiles = sheet.view(rows, SIZE, SHEET_COLUMNS, SIZE, 4).permute(0, 2, 4, 1, 3)
        rgba = tiles.reshape(-1, 4, SIZE, SIZE)[: len(self.captions)]
        # Premultiplied alpha: interpolating straight colours would bleed what lies under
        # transparent pixels into the edges.
        self.rgba_premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1).contiguous()
        self.background_rgb = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, captions: Tensor, generator: torch.Generator) -> Draws:
        """Draw one fresh image for each caption index in `captions` (B,)."""
        batch = captions.shape[0]
        scale = 1 - torch.rand(batch, generator=generator) * (1 - MIN_SCALE)
        shift = (torch.rand(batch, 2, generator=generator) * 2 - 1) * (MAX_SHIFT_PIXELS * 2 / SIZE)
        backgrounds = torch.randint(len(BACKGROUNDS), (batch,), generator=generator)
        # affine_grid maps output to input coordinates: the scale is inverse and the shift negated.
        theta = torch.zeros(batch, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
        theta[:, :, 2] = -shift / scale[:, None]
        grid = F.affine_grid(theta, [batch, 4, SIZE, SIZE], align_corners=False)
        rgba = F.grid_sample(self.rgba_premultiplied[captions], grid, mode="bilinear", align_corners=False)
        rgb = rgba[:, :3] + (1 - rgba[:, 3:]) * self.background_rgb[backgrounds][:, :, None, None]
        return Draws(pixels=rgb * 2 - 1, captions=captions, backgrounds=backgrounds)

    def random(self, batch: int, generator: torch.Generator) -> Draws:
        """Draw `batch` fresh images of captions chosen with equal odds."""
        return self.draw(torch.randint(len(self), (batch,), generator=generator), generator)


def render(font_path: Path, folder: Path) -> None:
    """Render `CHARACTERS` into `folder/emoji.png`, and their names into `folder/captions.json`.

    The font is Noto Color Emoji, the names are CLDR's.
    """
    import emoji as cldr
    from PIL import ImageDraw, ImageFont

    bitmap_size = 109  # the only size of the font's colour bitmaps
    font = ImageFont.truetype(str(font_path), bitmap_size)
    captions = [cldr.demojize(character).strip(":").replace("_", " ").lower() for character in CHARACTERS]
    rows = -(-len(CHARACTERS) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * SIZE, rows * SIZE))
    for index, character in enumerate(CHARACTERS):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((12, 12), character, font=font, embedded_color=True)
        box = glyph.getbbox()
        if box is None:
            raise ValueError(f"{font_path} has no image of {captions[index]!r}")
        glyph = glyph.crop(box)
        # The margin of four pixels keeps every draw inside the frame: its shift is at most two, its
        # scale at most one.
        ratio = (SIZE - 8) / max(glyph.size)
        glyph = glyph.resize((round(glyph.width * ratio), round(glyph.height * ratio)), Image.Resampling.LANCZOS)
        row, column = divmod(index, SHEET_COLUMNS)
        sheet.paste(glyph, (column * SIZE + (SIZE - glyph.width) // 2, row * SIZE + (SIZE - glyph.height) // 2))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "emoji.png") as partial:
        sheet.save(partial, optimize=True)
    write_text(folder / "captions.json", json.dumps(captions, indent=0, ensure_ascii=False) + "\n")


def main(font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"), output: Path | None = None) -> None:
    """Render the emoji sheet.

    Args:
        font: Noto Color Emoji (Debian: apt-get install fonts-noto-color-emoji).
        output: folder to write to; the package's assets when omitted.
    """
    if not font.exists():
        raise SystemExit(f"no font at {font}: apt-get install fonts-noto-color-emoji, or pass --font")
    output = output or assets()
    render(font, output)
    print(f"wrote {len(CHARACTERS)} emoji to {output}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
