"""Peak signal-to-noise ratio between images, such as those of two models from the same noise."""

from __future__ import annotations

from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB of each image, (N,), for pixels in [-1, 1].

    It is `-10 log10(mean squared error)` relative to the peak-to-peak value, 2. Identical images
    give infinity.
    """
    error = ((images.double().clamp(-1, 1) - reference.double().clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()
