#!/usr/bin/env bash
# diffusers 0.42.1: what is trained in fused projections never reaches the model again.
# `fuse_qkv_projections` adds one layer `to_qkv` next to `to_q`, `to_k` and `to_v`, copies their
# weights into it and computes with it alone. Nothing leads back: `unfuse_qkv_projections` deletes the
# fused layer without copying it into the three, and no message says so; `save_pretrained` writes both,
# and `from_pretrained` drops the fused one with a warning of unused weights, of which many scripts
# have silenced the logger. A fine-tuned model is then the untrained one. Seen:
#
#     output before training, after it: 0.0000 apart, 0.9940 apart
#     after unfuse_qkv_projections: 0.0000 apart from the untrained model
#     after save_pretrained and from_pretrained: 0.0000 apart from the untrained model
#
# Fails if either way keeps what was trained.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import torch
from diffusers import FluxTransformer2DModel

torch.manual_seed(0)
model = FluxTransformer2DModel(
    patch_size=1,
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=8,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 6, 6),
)
inputs = {
    "hidden_states": torch.randn(1, 9, 4),
    "encoder_hidden_states": torch.randn(1, 3, 8),
    "pooled_projections": torch.randn(1, 8),
    "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(9, 3),
    "txt_ids": torch.zeros(3, 3),
}


def output(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(**inputs).sample


untrained = output(model)


def apart(network: torch.nn.Module) -> float:
    return float((output(network) - untrained).norm() / untrained.norm())


model.fuse_qkv_projections()
before = apart(model)
optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "qkv" in name], lr=30.0)
for _ in range(50):
    loss = model(**inputs).sample.square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
trained = apart(model)
print(f"output before training, after it: {before:.4f} apart, {trained:.4f} apart")
unfused = copy.deepcopy(model)
unfused.unfuse_qkv_projections()
print(f"after unfuse_qkv_projections: {apart(unfused):.4f} apart from the untrained model")
model.save_pretrained("saved")
loaded = FluxTransformer2DModel.from_pretrained("saved")
print(f"after save_pretrained and from_pretrained: {apart(loaded):.4f} apart from the untrained model")
assert before < 1e-5 < 0.01 < trained
assert apart(unfused) < 1e-5, "unfusing keeps what was trained"
assert apart(loaded) < 1e-5, "saving keeps what was trained"
PYTHON
