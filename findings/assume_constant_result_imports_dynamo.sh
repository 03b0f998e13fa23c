#!/usr/bin/env bash
# torch 2.13.0: decorating one function with torch.compiler.assume_constant_result imports all of
# torch._dynamo, also where nothing is ever compiled. The decorator only sets an attribute of the
# function, _dynamo_marked_constant, so a library that marks a helper pays this when it is imported:
# about as much processor time as `import torch` itself. Seen on an AMD EPYC, CPU build:
#
#     import torch: 1.42 s, 0 modules of torch._dynamo
#     one decorator: 1.37 s, 93 modules of torch._dynamo
#     attributes of the function: {'_dynamo_marked_constant': True}
#
# Fails if the decorator no longer imports torch._dynamo or does more than set the attribute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time


def dynamo() -> int:
    return sum(name.split(".")[:2] == ["torch", "_dynamo"] for name in sys.modules)


began = time.process_time()
import torch

print(f"import torch: {time.process_time() - began:.2f} s, {dynamo()} modules of torch._dynamo")
assert dynamo() == 0, "torch imports torch._dynamo by itself"
began = time.process_time()


@torch.compiler.assume_constant_result
def constant() -> int:
    return 1


print(f"one decorator: {time.process_time() - began:.2f} s, {dynamo()} modules of torch._dynamo")
print(f"attributes of the function: {vars(constant)}")
assert dynamo() > 50, "the decorator imports torch._dynamo no longer"
assert vars(constant) == {"_dynamo_marked_constant": True}
PYTHON
