"""What ComfyUI's models and devices hold: the facts that an estimate starts from, and what to do when it runs out."""

import logging
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample

from ...adaflow.estimate import (
    FAST_FORWARD_MAPS,
    FORWARD_MAPS,
    Attention,
    Needs,
    UNetSizes,
    describe,
    plural,
    refuse_too_large,
)
from ...adaflow.memory import SmallestBlockError, give_back_ram, is_out_of_memory
from . import fast_blocks
from .families import UNetFamily
from .preview import NodeText
from .taps import replace_method, self_attentions

logger = logging.getLogger(__name__)
HOST_SHARE = 0.25  # of the free memory
BATCHING_MARGIN = 1.5  # times what a model says of a forward is what ComfyUI wants free, to batch conditionings in it


def unet_sizes(model, family: UNetFamily, device: torch.device) -> UNetSizes:
    """The widths of ComfyUI's BaseModel ``model``, a UNet of ``family``, that runs on ``device``."""
    unet, levels, level, skips = model.diffusion_model, {}, 0, []
    for number, block in enumerate(unet.input_blocks):
        level += any(isinstance(part, Downsample) for part in block)
        levels["input", number] = level
        skips.append((level, next(part.out_channels for part in block if hasattr(part, "out_channels"))))
    levels["middle", 0] = level
    for number, block in enumerate(unet.output_blocks):
        levels["output", number] = level
        level -= any(isinstance(part, Upsample) for part in block)
    attentions = tuple(
        Attention(
            levels[layer.section, layer.block],
            attn.to_q.out_features,
            injected=layer.section == "output" and layer.block in family.attention_blocks,
            source_read=layer.section != "output" or layer.block < family.conv_block,
        )
        for layer, attn in self_attentions(unet)
    )
    conv = levels["output", family.conv_block], unet.output_blocks[family.conv_block][0].out_channels
    dtype = value_dtype(model)
    value_bytes, weights = comfy.model_management.dtype_size(dtype), comfy.model_management.module_size(model)
    maps = FAST_FORWARD_MAPS if fast_blocks.run_on(device, dtype) else FORWARD_MAPS
    return UNetSizes(attentions, tuple(skips), conv, value_bytes, weights, maps)


def value_dtype(model) -> torch.dtype:
    """Of the activations of ComfyUI's BaseModel ``model``."""
    return model.manual_cast_dtype or model.get_dtype()


def free_memory(device: torch.device) -> dict[str, int]:
    """Bytes free by kind, as :func:`describe` takes them; what loaded models hold counts, since they make way."""
    free = {"RAM": comfy.model_management.get_free_memory(torch.device("cpu"))}
    if device.type != "cpu":
        models = [m for m in comfy.model_management.current_loaded_models if m.device == device and m.model is not None]
        loaded = sum(model.model_loaded_memory() for model in models)
        free["GPU memory"] = comfy.model_management.get_free_memory(device) + loaded
    return free


def announce(needs: Needs, device: torch.device, where: str, what: str, got: str, change: str, text: NodeText) -> None:
    """Show what a run is and needs, then refuse it if it surely does not fit.

    Args:
        what, got: the input that decides, and what it is: frames, keyframes, steps and size.
        change: what would make it fit.

    Raises:
        InputError: more is needed than is free.
    """
    free = free_memory(device)
    text.put("needs", f"{got}: {describe(needs, free)}")
    refuse_too_large(needs, free, where, what, got, change)


@contextmanager
def batched_by(unet: UNetSizes, model):
    """Have ComfyUI batch conditionings wherever a forward of BaseModel ``model`` fits by this pack's own estimate.

    A chunk was chosen for all branches in one forward. ComfyUI's estimate of that, from the area alone, is nearly three
    times as much in half precision: without this a GPU of 8 GB or less gets twice the forwards, of half the size.
    """

    def memory_required(input_shape, cond_shapes=None):
        return input_shape[0] * unet.frame_bytes(tuple(input_shape[2:])) / BATCHING_MARGIN

    restore = replace_method(model, "memory_required", memory_required)
    try:
        yield
    finally:
        restore()


def has_host(device: torch.device) -> bool:
    """Whether there is memory beside the device's own to put things in."""
    return device.type != "cpu"


def better_on_host(waiting: int, device: torch.device) -> bool:
    """Whether ``waiting`` bytes take so much of the device that they should wait in host memory."""
    return has_host(device) and waiting > HOST_SHARE * free_memory(device)["GPU memory"]


def give_back(device: torch.device) -> None:
    """Give back RAM that is free and kept, where ``device`` computes in RAM; on others PyTorch keeps its own."""
    if not has_host(device):
        give_back_ram()


def release_unused(device: torch.device) -> None:
    """:func:`give_back`, and the pinned buffers that PyTorch keeps for copies to and from ``device``, once done."""
    give_back(device)
    release = getattr(torch._C, "_host_emptyCache", None)  # has no public name yet
    if device.type == "cuda" and release is not None:
        torch.cuda.synchronize(device)
        release()


def chunk_to_go_on_with(chosen: int, noted: int) -> int:
    """Frames at once of a run that goes on: the fewer, since more than it noted may have run out of memory.

    Args:
        chosen: by the user; 0 for automatic.
        noted: by the run before it was broken off; 0 where it begins.
    """
    return min(chosen, noted) or chosen or noted


def halved(error: Exception, tried: int, doing: str, change: str, device: torch.device, divisible: bool = True) -> int:
    """Frames to go on with after ``error``, if that was lack of memory with ``tried`` frames at a time.

    To be called while the error is handled.

    Args:
        doing: what was done with the frames, and their size.
        change: what would make it fit.
        divisible: False where these frames must stay in one batch.

    Raises:
        RuntimeError: there is nothing to halve, with the numbers; or ``error`` itself, if it was something else.
    """
    if not is_out_of_memory(error):
        raise error
    if tried == 1 or not divisible:
        free, total = (
            amount(device) / 1e9
            for amount in (comfy.model_management.get_free_memory, comfy.model_management.get_total_memory)
        )
        tight = f"AdaFlow: out of memory with {plural(tried, 'frame')} at a time, which cannot be fewer, {doing}"
        if isinstance(error, SmallestBlockError):  # what fails is not the frames' forward
            tight = str(error)
        raise RuntimeError(f"{tight}; {free:.2f} of {total:.2f} GB are free on {device}: {change}") from error
    logger.warning("AdaFlow: out of memory with %d frames at a time; going on with %d", tried, tried // 2)
    comfy.model_management.soft_empty_cache()
    return tried // 2
