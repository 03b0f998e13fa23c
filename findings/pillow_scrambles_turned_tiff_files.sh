#!/usr/bin/env bash
# Pillow 13.0.0: an uncompressed 8-bit grey TIFF with an orientation tag of 5 to 8 that is opened by
# its name is read with its rows cut at the wrong width, without an error. ImageFile.load maps the
# pixels into memory at the size after turning (Image.core.map_buffer(map, self.size, ...)), and
# TiffImageFile.load_end turns them again. Opened as a file object, which is not mapped, the same
# file is right. A file that Pillow wrote itself shows it:
#
#     by name:        (3, 2) [[50, 30, 10], [60, 40, 20]]
#     as file object: (2, 3) [[40, 10], [50, 20], [60, 30]]
#
# Fails if both ways give the same image.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from PIL import Image

grey = Image.frombytes("L", (3, 2), bytes([10, 20, 30, 40, 50, 60]))
tags = Image.Exif()
tags[0x0112] = 6  # to be turned by 90 degrees clockwise
grey.save("turned.tif", exif=tags)


def rows(image: Image.Image) -> list[list[int]]:
    image.load()
    pixels = image.tobytes()
    return [list(pixels[start : start + image.width]) for start in range(0, len(pixels), image.width)]


with Image.open("turned.tif") as by_name:
    mapped = rows(by_name)
    print("by name:       ", by_name.size, mapped)
with open("turned.tif", "rb") as file, Image.open(file) as as_file:
    right = rows(as_file)
    print("as file object:", as_file.size, right)
assert right == rows(grey.transpose(Image.Transpose.ROTATE_270)), "the file object is wrong, too"
assert mapped != right, "both ways give the same image"
PYTHON
