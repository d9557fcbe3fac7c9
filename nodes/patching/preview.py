"""Pictures of latents without a VAE, by ComfyUI's own linear factors, and its sampling callback."""

import latent_preview
import torch
from torch import Tensor


def sampling_callback(model_patcher, steps: int):
    """ComfyUI's progress bar and preview for a sampler of ``steps`` steps."""
    return latent_preview.prepare_callback(model_patcher, steps)


def latent_rgb(model_patcher, latent: Tensor) -> Tensor:
    """Approximate colours of a latent, one pixel each.

    Args:
        latent: clean, as a LATENT holds it, (frames, channels, ...).

    Returns:
        (frames, ..., 3) in 0 .. 1.
    """
    latent_format = model_patcher.model.latent_format
    pixels = latent_format.process_in(latent).movedim(1, -1).float()
    factors = latent_format.latent_rgb_factors
    if factors is None:
        return pixels.mean(-1, keepdim=True).expand(*pixels.shape[:-1], 3).sigmoid()
    bias = latent_format.latent_rgb_factors_bias
    rgb = pixels @ torch.tensor(factors, dtype=torch.float32)
    rgb = rgb if bias is None else rgb + torch.tensor(bias, dtype=torch.float32)
    return ((rgb + 1) / 2).clamp(0, 1)
