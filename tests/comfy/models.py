"""Small random models of Stable Diffusion's shapes, in ComfyUI's own classes."""

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.supported_models_base
import torch

SD1 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "num_heads": 4,
    "num_head_channels": -1,
    "context_dim": 24,
    "use_spatial_transformer": True,
    "legacy": False,
}
SD2 = {k: v for k, v in SD1.items() if k != "num_heads"} | {
    "num_head_channels": 16,
    "use_linear_in_transformer": True,
}
SDXL = SD2 | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 3, 3],
    "transformer_depth_middle": 3,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
    "num_classes": "sequential",
    "adm_in_channels": 32 + 6 * 256,
}
SD2_FULL = SD2 | {"model_channels": 320, "num_head_channels": 64, "context_dim": 1024}
SHAPES = {"sd1": (SD1, "eps"), "sd2": (SD2, "eps"), "sd2-v": (SD2, "v"), "sdxl": (SDXL, "eps")}


class _Config(comfy.supported_models_base.BASE):
    latent_format = comfy.latent_formats.SD15
    unet_extra_config = {}
    prediction = "eps"

    def model_type(self, state_dict, prefix=""):
        types = comfy.model_base.ModelType
        return types.V_PREDICTION if self.prediction == "v" else types.EPS

    def get_model(self, state_dict, prefix="", device=None):
        kind = self.model_type(state_dict)
        if self.unet_config.get("num_classes"):
            return _SDXL(self, model_type=kind, device=device)
        return comfy.model_base.BaseModel(self, model_type=kind, device=device)


class _SDXL(comfy.model_base.SDXL):
    """SDXL's conditioning with a pooled embedding of 32 instead of 1280."""

    def __init__(self, config, model_type, device):
        comfy.model_base.BaseModel.__init__(self, config, model_type, device=device)
        self.embedder = comfy.model_base.Timestep(256)
        self.noise_augmentor = None


def initialise(module: torch.nn.Module, seed: int, draw_on="cpu") -> None:
    """Fan-in scaled normal weights, everywhere: nothing is zero, so that nothing hides. ``draw_on`` changes them."""
    generator = torch.Generator(draw_on).manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device=draw_on)
        if parameter.ndim > 1:
            values /= parameter[0].numel() ** 0.5
        else:
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        parameter.data = values.to(parameter)
        parameter.requires_grad_(False)


def small_model(shape: str = "sd1", seed: int = 0, device=None):
    """A ModelPatcher on a small random UNet of one of ``SHAPES``, run on ComfyUI's device by default."""
    return random_model(*SHAPES[shape], seed, torch.float32, device)


def gentle_model(shape: str = "sd1"):
    """A small model whose prediction bends little between two steps, as a trained one's does."""
    model = small_model(shape)
    model.model.diffusion_model.out[-1].weight.mul_(0.02)
    model.model.diffusion_model.out[-1].bias.zero_()
    return model


def random_model(unet_config: dict, prediction: str, seed: int, dtype: torch.dtype, device=None, draw_on="cpu"):
    """A ModelPatcher on a random UNet; at full size it takes a minute to draw it on the CPU, on a GPU a second."""
    config = _Config(dict(unet_config))
    family = comfy.supported_models.SDXL if "num_classes" in unet_config else comfy.supported_models.SD20
    config.memory_usage_factor = family.memory_usage_factor  # SD 1.x has that of 2.x
    config.prediction = prediction
    config.unet_config["dtype"] = dtype
    device = device or comfy.model_management.get_torch_device()
    model = config.get_model({}, device=torch.device("cpu"))
    initialise(model.diffusion_model, seed, draw_on)
    model.eval()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def conditioning(shape: str = "sd1", seed: int = 0, batch: int = 1):
    """CONDITIONING of random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    options = {}
    if shape == "sdxl":
        options = {"pooled_output": torch.randn(batch, 32, generator=generator)}
    return [[torch.randn(batch, 7, 24, generator=generator), options]]


def clip_latent(frames: int = 6, size=(8, 12), seed: int = 0) -> torch.Tensor:
    """A latent clip (frames, 4, height, width) of two shots that drift."""
    generator = torch.Generator().manual_seed(seed)
    shots = torch.randn(2, 4, *size, generator=generator)
    out = [shots[int(f >= frames / 2)] + 0.15 * torch.randn(4, *size, generator=generator) for f in range(frames)]
    return torch.stack(out)
