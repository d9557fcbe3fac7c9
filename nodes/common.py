"""What several nodes share: where run files live and what a LATENT must be."""

import logging
import shutil
import uuid
import weakref
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..adaflow.errors import InputError, require

logger = logging.getLogger(__name__)


def chunk_input(optional: bool = False) -> io.Int.Input:
    """How many frames go through the model at once."""
    return io.Int.Input(
        "chunk",
        default=0,
        min=0,
        max=4096,
        optional=optional,
        tooltip="Frames in one forward of the model, 0 to 4096, default 0: chosen from the free memory. Lower it when "
        "memory runs out; the result does not change.",
    )


def clip_latent(latent: dict, where: str, input_name: str = "latent") -> Tensor:
    """The samples of a LATENT that holds a clip, (frames, channels, height, width).

    Raises:
        InputError: it is not such a latent, is empty, or holds NaN.
    """
    samples = latent["samples"]
    if samples.is_nested or samples.ndim != 4:
        raise InputError(where, input_name, f"of shape {list(samples.shape)}", "(frames, 4, height, width), of images")
    require(samples.shape[0] > 0, where, input_name, "empty", "at least one frame")
    bad = (~torch.isfinite(samples)).flatten(1).any(1).nonzero().flatten()
    require(
        len(bad) == 0,
        where,
        input_name,
        f"not finite (NaN or infinite) in {len(bad)} frames, the first is {int(bad[0]) if len(bad) else 0}",
        "finite values; a VAE in half precision makes such latents: start ComfyUI with --fp32-vae or --bf16-vae",
    )
    return samples


def middle_column(latent: Tensor) -> Tensor:
    """The column of a clip latent whose y-t slice is shown, (frames, channels, height)."""
    return latent[..., latent.shape[-1] // 2]


def run_file(name: str, size_bytes: int, where: str) -> Path:
    """A new file name under ComfyUI's temp folder, once the disk has room for ``size_bytes``.

    Raises:
        InputError: it has not, with both numbers.
    """
    folder = Path(folder_paths.get_temp_directory()) / "adaflow"
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    require(
        size_bytes < free,
        where,
        "latent",
        f"so long that {name} needs {size_bytes / 1e9:.2f} GB of disk",
        f"less than the {free / 1e9:.2f} GB free in {folder.name}: use fewer frames or steps, or float16, or start "
        "ComfyUI with --temp-directory on a larger disk",
    )
    logger.info("%s: %s takes %.1f MB of disk", where, name, size_bytes / 1e6)
    return folder / f"{name}-{uuid.uuid4().hex}.safetensors"


def remove_when_unused(owner) -> None:
    """Delete ``owner.path`` when nothing refers to ``owner`` any more: ComfyUI has dropped it from its cache."""
    weakref.finalize(owner, Path.unlink, owner.path, missing_ok=True)
