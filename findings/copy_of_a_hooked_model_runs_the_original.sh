#!/usr/bin/env bash
# diffusers 0.42.1: a deep copy of a model with hooks, such as a cache that `enable_cache` sets, computes
# with the weights of the original wherever a hook is. `HookRegistry.register_hook` puts a forward on the
# module whose closure holds the module's earlier bound forward; `copy.deepcopy` copies functions by
# reference, so the copy calls the original's layer. Parameters, state_dict and `is_cache_enabled` of the
# copy look right. An averaged copy of such a model (EMA) never shows what it averaged, and a backward
# pass through the copy leaves its gradients in the original. Seen with pyramid attention broadcast on
# every step, so that nothing is skipped, after all attention weights of the copy were set to zero:
#
#     without hooks: the copy is 0.000 from a model with its weights, 0.076 from the original
#     with hooks: the copy is 0.076 from a model with its weights, 0.000 from the original
#     gradients of attention layers: 0 of 40 in the copy, 38 of 40 in the original
#
# Fails if the copy computes with its own weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import torch
from diffusers import FluxTransformer2DModel, PyramidAttentionBroadcastConfig


def flux(hooks: bool) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    if hooks:
        model.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=1,
                spatial_attention_timestep_skip_range=(-1, 1000),
                current_timestep_callback=lambda: 500,
            )
        )
    return model


generator = torch.Generator().manual_seed(1)
inputs = {
    "hidden_states": torch.randn(1, 9, 4, generator=generator),
    "encoder_hidden_states": torch.randn(1, 3, 8, generator=generator),
    "pooled_projections": torch.randn(1, 8, generator=generator),
    "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(9, 3),
    "txt_ids": torch.zeros(3, 3),
}


def output(model: FluxTransformer2DModel) -> torch.Tensor:
    return model(**inputs).sample


def trial(hooks: bool) -> tuple[float, float]:
    original = flux(hooks)
    twin = copy.deepcopy(original)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".attn." in name:
                parameter.zero_()
    same_weights = flux(hooks)
    same_weights.load_state_dict(twin.state_dict())
    answer = output(twin)
    answer.square().mean().backward()

    def apart(other: FluxTransformer2DModel) -> float:
        with torch.no_grad():
            return float((answer - output(other)).abs().max())

    distances = apart(same_weights), apart(original)
    words = "with" if hooks else "without"
    own, others = distances
    print(f"{words} hooks: the copy is {own:.3f} from a model with its weights, {others:.3f} from the original")
    if hooks:
        counts = [
            sum(p.grad is not None for name, p in model.named_parameters() if ".attn." in name)
            for model in (twin, original)
        ]
        total = sum(".attn." in name for name, _ in twin.named_parameters())
        print(f"gradients of attention layers: {counts[0]} of {total} in the copy, {counts[1]} of {total} in the original")
        assert counts[0] == 0 < counts[1], "gradients reach the copy"
    return distances


plain, hooked = trial(hooks=False), trial(hooks=True)
assert plain[0] < 1e-6 < 1e-2 < plain[1]
assert hooked[1] < 1e-6 < 1e-2 < hooked[0], "the copy computes with its own weights"
PYTHON
