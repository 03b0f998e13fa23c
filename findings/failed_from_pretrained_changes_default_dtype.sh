#!/usr/bin/env bash
# diffusers 0.42.1: `Model.from_pretrained(..., dtype=torch.bfloat16)` sets torch's default dtype while
# it constructs the model, and does not set it back when the constructor raises. A program that catches
# the error, to try another class or to show a message, computes in bfloat16 from there on: every new
# tensor and layer of the process, also those of code that has nothing to do with diffusers. Seen:
#
#     default dtype: torch.float32
#     caught: this constructor refuses
#     default dtype: torch.bfloat16
#     a new layer: torch.bfloat16
#
# Fails if the default dtype is restored.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import UNet1DModel


class Refuses(UNet1DModel):
    def __init__(self, **config: object) -> None:
        raise ValueError("this constructor refuses")


UNet1DModel(block_out_channels=(32, 32, 64)).save_pretrained("saved")
print(f"default dtype: {torch.get_default_dtype()}")
try:
    Refuses.from_pretrained("saved", dtype=torch.bfloat16)
except ValueError as error:
    print(f"caught: {error}")
print(f"default dtype: {torch.get_default_dtype()}")
print(f"a new layer: {torch.nn.Linear(2, 2).weight.dtype}")
assert torch.get_default_dtype() == torch.bfloat16, "the default dtype is restored"
PYTHON
