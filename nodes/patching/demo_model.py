"""A small random stand-in for a Stable Diffusion 1.x checkpoint, in ComfyUI's own classes.

It has SD 1.x's blocks, attention and latents, runs in seconds on a CPU, and lets a graph be tried before any checkpoint
is downloaded. Its text encoder and UNet are random, so what it paints means nothing; its VAE is written down in closed
form and carries colour at an eighth of the resolution.
"""

import copy

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import Tensor, nn

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
    "context_dim": 128,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
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
    "ch_mult": [3, 1, 1, 3],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
# Random predictions this strong change the clip and leave it recognisable, also under guidance of 7.5.
PROMPT_SHARE, NOISE_SHARE = 0.05, 0.3
LATENT_SCALE = 9.0  # an image in -1..1 becomes a latent of about unit size after SD's factor 0.18215
LEVEL = 30.0  # the constant beside each colour, far above it, that keeps the last group norm from rescaling colours


class DemoConfig(comfy.supported_models_base.BASE):
    """SD 1.x (noise prediction, its beta schedule and latents) around :data:`UNET`."""

    unet_config = {}
    unet_extra_config = {}
    latent_format = comfy.latent_formats.SD15
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


def random_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Fan-in scaled normal weights, norms of one, biases of zero; the same for a seed on every device."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = 1 if "embedding" in name else parameter[0].numel()
            values = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        elif parameter.ndim == 1:
            values = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            continue
        parameter.data.copy_(values)
        parameter.requires_grad_(False)


def demo_unet(generator: torch.Generator) -> comfy.model_patcher.ModelPatcher:
    """A MODEL: 34 M random parameters in SD 1.x's block structure, latents (frames, 4, height/8, width/8)."""
    config = DemoConfig(copy.deepcopy(UNET))
    config.set_inference_dtype(torch.float32, None)
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload)
    random_weights(model.diffusion_model, generator)
    for name, parameter in model.diffusion_model.named_parameters():
        if ".attn2.to_out." in name:
            parameter.data.mul_(PROMPT_SHARE)
    model.diffusion_model.out[-1].weight.data.mul_(NOISE_SHARE)
    model.eval()
    return comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )


def demo_clip(generator: torch.Generator) -> comfy.sd.CLIP:
    """A CLIP: SD 1.x's tokenizer, two random layers of width 128."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    target.params["clip_model"] = DemoTextModel
    clip = comfy.sd.CLIP(target, parameters=0)
    random_weights(clip.cond_stage_model, generator)
    return clip


def _carry(weight: Tensor, channels: int, kernel: Tensor) -> None:
    """Let the first channels of a convolution's input through, each by itself."""
    for channel in range(channels):
        weight[channel, channel] = kernel


def _spread(layer: nn.Module) -> None:
    """Write colour i as (+i, -i, a large constant): one group of the group norm that follows."""
    for i in range(3):
        layer.weight[3 * i, i] = 1.0
        layer.weight[3 * i + 1, i] = -1.0
        layer.bias[3 * i + 2] = LEVEL


def _gather(norm: nn.Module, conv: nn.Module, scale: float) -> None:
    """Undo the group norm and read colour i as silu(+i) - silu(-i), which is exactly i."""
    norm.weight.fill_(LEVEL * 2**0.5 / 3)
    norm.bias.fill_(LEVEL / 3)
    for i in range(3):
        conv.weight[i, 3 * i, 1, 1] = scale
        conv.weight[i, 3 * i + 1, 1, 1] = -scale


def demo_vae() -> comfy.sd.VAE:
    """A VAE in SD's AutoencoderKL: block means of the three colours and of a horizontal edge, blown up smoothly.

    Pixels (frames, height, width, 3) from 0 to 1, latents (frames, 4, height/8, width/8).
    """
    model = AutoencoderKL(ddconfig=copy.deepcopy(VAE), embed_dim=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        one = torch.zeros(3, 3)
        one[1, 1] = 1.0
        mean = torch.zeros(3, 3)
        mean[:2, :2] = 0.25
        smooth = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 16
        point = torch.ones(1, 1)
        encoder, decoder = model.encoder, model.decoder

        _carry(encoder.conv_in.weight, 3, one)
        _carry(encoder.down[0].block[0].nin_shortcut.weight, 3, point)
        _carry(encoder.down[1].block[0].nin_shortcut.weight, 3, point)
        for level in range(3):
            _carry(encoder.down[level].downsample.conv.weight, 3, mean)
        _spread(encoder.down[3].block[0].nin_shortcut)
        _gather(encoder.norm_out, encoder.conv_out, LATENT_SCALE)
        for i in range(3):  # the fourth latent channel: how brightness changes to the right
            for side, sign in ((0, -1.0), (2, 1.0)):
                encoder.conv_out.weight[3, 3 * i, 1, side] = sign * LATENT_SCALE / 3
                encoder.conv_out.weight[3, 3 * i + 1, 1, side] = -sign * LATENT_SCALE / 3
        encoder.conv_out.bias[4:] = -30.0
        _carry(model.quant_conv.weight, 8, point)

        _carry(model.post_quant_conv.weight, 4, point)
        _carry(decoder.conv_in.weight, 3, one / LATENT_SCALE)
        _carry(decoder.up[2].block[0].nin_shortcut.weight, 3, point)
        for level in (1, 2, 3):
            _carry(decoder.up[level].upsample.conv.weight, 3, smooth)
        _spread(decoder.up[0].block[0].nin_shortcut)
        _gather(decoder.norm_out, decoder.conv_out, 1.0)
    return comfy.sd.VAE(model.state_dict(), config={"params": {"ddconfig": copy.deepcopy(VAE), "embed_dim": 4}})


def load_demo_model(seed: int = 0) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE as a checkpoint loader gives them. Torch's own random state is left as it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        return demo_unet(generator), demo_clip(generator), demo_vae()
