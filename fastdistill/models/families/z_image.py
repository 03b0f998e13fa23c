"""Z-Image: `ZImageTransformer2DModel`, with refiners before its main layers.

The refiners are of the noise, the caption and, in Omni, SigLIP features. Refiners may be cut, too:
each adds to its own tokens, and nothing else knows of it. One `n_refiner_layers` counts the
refiners of every kind: a cut takes equally many of each kind, though not the same indices.
"""

from __future__ import annotations

from typing import Any

from fastdistill.models.families.family import Anatomy, Stack, Workload, noise, one_stream


class ZImage(Anatomy):
    name = "z_image"
    stacks = (
        Stack(attribute="noise_refiner", config_field="n_refiner_layers", short="noise", pass_through=one_stream),
        Stack(attribute="context_refiner", config_field="n_refiner_layers", short="context", pass_through=one_stream),
        Stack(attribute="siglip_refiner", config_field="n_refiner_layers", short="siglip", pass_through=one_stream),
        Stack(attribute="layers", config_field="n_layers", short="layer", pass_through=one_stream),
    )

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        """Arguments without SigLIP features, whose refiner then has nothing to do."""
        patch, samples = network.config.all_patch_size[0], range(workload.batch)
        height, width = (patch * (side // patch) for side in (workload.height, workload.width))
        return {
            "x": [noise(network, network.config.in_channels, 1, height, width) for _ in samples],
            "t": noise(network, workload.batch),
            "cap_feats": [noise(network, workload.text_tokens, network.config.cap_feat_dim) for _ in samples],
            "patch_size": patch,
            "f_patch_size": network.config.all_f_patch_size[0],
        }
