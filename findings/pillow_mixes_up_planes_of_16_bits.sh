#!/usr/bin/env bash
# Pillow 13.0.0: an uncompressed RGB TIFF of 16 bits whose channels lie in separate planes
# (PlanarConfiguration 2) is read as if it had 8 bits, without an error. Its mode's coding is RGB;16L
# or RGB;16B, and TiffImageFile._setup takes the coding of a plane from the letter alone: R, G, B.
# Each plane's first bytes become pixels, low and high bytes in turn:
#
#     expected: [(10, 20, 30), (40, 50, 60)]
#     read:     [(0, 0, 0), (10, 20, 30)]
#
# Fails if the file is read right, or refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct

from PIL import Image

colours = [(10, 20, 30), (40, 50, 60)]
planes = [struct.pack("<2H", *(colour[channel] << 8 for colour in colours)) for channel in range(3)]
tags = {256: [2], 257: [1], 258: [16, 16, 16], 259: [1], 262: [2], 273: [8, 12, 16], 277: [3], 278: [1]}
tags |= {279: [4, 4, 4], 284: [2]}
entries, tail, place = b"", b"", 20 + 2 + 12 * len(tags) + 4
for tag, values in tags.items():
    packed = struct.pack(f"<{len(values)}H", *values)
    if len(packed) > 4:
        packed, tail, place = struct.pack("<I", place), tail + packed, place + len(packed)
    entries += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
directory = struct.pack("<H", len(tags)) + entries + bytes(4)
content = b"II*\0" + struct.pack("<I", 20) + b"".join(planes) + directory + tail
with Image.open(io.BytesIO(content)) as image:
    image.load()
    found = [image.getpixel((column, 0)) for column in range(2)]
print("expected:", colours)
print("read:    ", found)
assert found != colours, "the file is read right"
PYTHON
