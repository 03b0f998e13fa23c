#!/usr/bin/env bash
# Pillow 13.0.0: a grey PNG of 2 or 4 bits, or an RGB one of 16 bits, whose tRNS chunk names a
# transparent colour, is opaque after convert("RGBA"), without an error. The samples are scaled to 8
# bits, and info["transparency"] keeps the number of the file, so that no pixel equals it. The level
# 1 of 0, 1, 2, 3 should be clear:
#
#     pixels:       [0, 85, 170, 255], transparency 1
#     alpha:        [255, 255, 255, 255]
#
# Fails if the pixel is clear.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import zlib

from PIL import Image


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0))
rows = chunk(b"IDAT", zlib.compress(b"\0\x1b"))  # levels 0, 1, 2, 3 of two bits
content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", struct.pack(">H", 1)) + rows + chunk(b"IEND", b"")
with Image.open(io.BytesIO(content)) as image:
    image.load()
    alpha = list(image.convert("RGBA").getchannel("A").tobytes())
    print(f"pixels:       {list(image.tobytes())}, transparency {image.info['transparency']}")
    print(f"alpha:        {alpha}")
assert alpha == [255, 255, 255, 255], "the pixel is clear"
PYTHON
