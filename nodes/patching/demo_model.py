"""The demo model: a small Stable Diffusion, trained by ``training/``, shipped with the pack, in ComfyUI's own classes.

Its UNet has the blocks, attention layers, latents and noise schedule of SD 1.x. But the pictures that suit it are
smaller, and so is the grid of tokens of each block: by :class:`DemoConfig` it has a row of its own in
``families.FAMILIES``. Its autoencoder shrinks by 8 to 4 channels; its text encoder reads SD 1.x's tokens.
"""

import copy
import functools
import json
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ...adaflow.demo.weights import unpack

WEIGHTS = Path(__file__).resolve().parents[2] / "demo_model" / "weights.safetensors"
PREVIEW = WEIGHTS.with_name("preview.json")  # by training/preview_colours.py
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "num_heads": -1,
    "num_head_channels": 32,
    "context_dim": 256,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "vocab_size": 49408,
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 4, 8],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
EMBEDDING = "transformer.text_model.embeddings.token_embedding.weight"


class DemoLatents(comfy.latent_formats.SD15):
    """SD 1.x's scale, and colours for previews of its own, where ComfyUI takes more than one value for a pixel's."""

    taesd_decoder_name = None

    def __init__(self):
        super().__init__()
        if hasattr(comfy.latent_formats.LatentFormat, "latent_rgb_factors_reshape"):
            self.latent_rgb_factors, self.latent_rgb_factors_bias = torch.eye(3).tolist(), None
            self.latent_rgb_factors_reshape = preview_colours


@functools.cache
def _preview_weights() -> tuple[Tensor, Tensor]:
    held = json.loads(PREVIEW.read_text())
    return torch.tensor(held["weight"]), torch.tensor(held["bias"])


def preview_colours(latent: Tensor) -> Tensor:
    """Approximate colours, (frames, 3, height, width) from -1 to 1, of a latent as the UNet takes it."""
    weight, bias = (values.to(latent) for values in _preview_weights())
    return F.conv2d(F.pad(latent, (1, 1, 1, 1), mode="replicate"), weight, bias)


class DemoConfig(comfy.supported_models_base.BASE):
    """SD 1.x (noise prediction, its beta schedule and latents) around :data:`UNET`."""

    unet_config = {}
    unet_extra_config = {}
    latent_format = DemoLatents
    memory_usage_factor = 1.0


class DemoTextModel(comfy.sd1_clip.SDClipModel):
    """CLIP's text transformer with :data:`TEXT`'s sizes."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


def empty_unet(device: torch.device) -> comfy.model_base.BaseModel:
    """The UNet without weights: latents (frames, 4, height/8, width/8), context (frames, tokens, 256)."""
    config = DemoConfig(copy.deepcopy(UNET))
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, device=device)


def empty_clip() -> comfy.sd.CLIP:
    """The text encoder without weights, with SD 1.x's tokenizer."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    target.params["clip_model"] = DemoTextModel
    return comfy.sd.CLIP(target, parameters=0)


def token_table(packed: dict[str, Tensor]) -> Tensor:
    """Embeddings of all of SD 1.x's tokens, (49408, 256): every token no caption had shares the unknown one's row 0."""
    rows = unpack(packed, "tokens.")["rows"]
    table = rows[:1].repeat(TEXT["vocab_size"], 1)
    table[packed["tokens.ids"].long()] = rows[1:]
    return table


def load_demo_model(
    weights: Path = WEIGHTS,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE as a checkpoint loader gives them. Torch's own random state is left as it was."""
    packed = load_file(weights)
    offload = comfy.model_management.unet_offload_device()
    with torch.random.fork_rng(devices=[]):
        unet, clip = empty_unet(offload), empty_clip()
    unet.diffusion_model.load_state_dict(unpack(packed, "unet."))
    unet.eval()
    model = comfy.model_patcher.ModelPatcher(
        unet, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )
    text = unpack(packed, "text.") | {EMBEDDING: token_table(packed)}
    clip.cond_stage_model.clip_l.load_state_dict(text)
    vae = comfy.sd.VAE(unpack(packed, "vae."), config={"params": {"ddconfig": copy.deepcopy(VAE), "embed_dim": 4}})
    return model, clip, vae
