"""A small random VAE in ComfyUI's own classes: 8 pixels to a latent, 4 channels, like Stable Diffusion's."""

import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def small_vae(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> comfy.sd.VAE:
    """A ``comfy.sd.VAE`` whose output varies with its input; ``changes`` are to its configuration."""
    params = {"ddconfig": {**CONFIG, **changes}, "embed_dim": 4}
    model = AutoencoderKL(**params)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        if value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        else:
            state[name] = torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value)
    return comfy.sd.VAE(sd=state, config={"params": params}, dtype=dtype)
