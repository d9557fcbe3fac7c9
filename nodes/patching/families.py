"""Where the method's taps sit in each UNet family: the one table of block numbers."""

from dataclasses import dataclass

from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel, VideoResBlock

from ...adaflow.errors import InputError
from .demo_model import DemoConfig


@dataclass(frozen=True)
class UNetFamily:
    """Decoder block numbers (LDM ``output_blocks``) by role.

    Attributes:
        name: as users know it.
        levels: resolutions of the UNet.
        conv_block: its ResBlock's branch-internal feature is injected (arXiv 2211.12572, section 4.1).
        attention_blocks: their self-attention takes the source's queries and keys.
        descriptor_block: its output after upsampling is the token descriptor (arXiv 2306.03881).
    """

    name: str
    levels: int
    conv_block: int
    attention_blocks: range
    descriptor_block: int


# By the number of decoder blocks, or by the class of ComfyUI's model config where that has numbers of its own.
FAMILIES: dict[int | type, UNetFamily] = {
    12: UNetFamily("SD 1.x / 2.x", levels=4, conv_block=4, attention_blocks=range(4, 12), descriptor_block=8),
    9: UNetFamily("SDXL", levels=3, conv_block=3, attention_blocks=range(3, 9), descriptor_block=5),
    # SD 1.x's blocks, but at 192x128 pixels block 4 has 4x6 tokens, where SD's has 16x16 at 512: a feature so coarse
    # lets what is recoloured jump. Block 6 is twice as fine.
    DemoConfig: UNetFamily("demo model", levels=4, conv_block=6, attention_blocks=range(4, 12), descriptor_block=8),
}


def unet_family(model_patcher, where: str) -> UNetFamily:
    """The family of a MODEL.

    Raises:
        InputError: it is not an image UNet of the table, with what it is instead.
    """
    unet = model_patcher.model.diffusion_model
    expected = "a Stable Diffusion 1.x, 2.x or SDXL checkpoint (an image UNet); load one of these"
    if not isinstance(unet, UNetModel):
        raise InputError(where, "model", f"a {type(unet).__name__}, not a UNet", expected)
    family = FAMILIES.get(type(model_patcher.model.model_config)) or FAMILIES.get(len(unet.output_blocks))
    if family is None or not isinstance(unet.output_blocks[family.conv_block][0], ResBlock):
        raise InputError(where, "model", f"a UNet of {len(unet.output_blocks)} decoder blocks", expected)
    if isinstance(unet.output_blocks[family.conv_block][0], VideoResBlock):
        raise InputError(where, "model", "a video UNet", expected)
    sampling = model_patcher.get_model_object("model_sampling")
    if getattr(sampling, "sigma_data", None) != 1.0 or len(getattr(sampling, "sigmas", ())) != 1000:
        raise InputError(where, "model", f"sampled with {type(sampling).__mro__[1].__name__}", expected + " unpatched")
    return family


def model_signature(model_patcher, where: str) -> str:
    """What must agree between a trajectory or descriptors and the model that uses them.

    Family, widths and prediction type; two checkpoints of one architecture have the same signature, as have a
    checkpoint and its LoRA.
    """
    family = unet_family(model_patcher, where)
    config = model_patcher.model.model_config.unet_config
    prediction = model_patcher.model.model_type.name
    return f"{family.name}, {config['model_channels']} channels, context {config['context_dim']}, {prediction}"
