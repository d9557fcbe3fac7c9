"""What an edited clip is worth, measured against the truth that the demo world knows.

Images are (frames, 3, height, width) from 0 to 1, masks (frames, height, width) bool. Where a mask leaves nothing to
measure, the result is NaN.
"""

from collections.abc import Mapping

import torch
from kornia.geometry.transform import remap
from kornia.metrics import ssim as ssim_map
from torch import Tensor

SSIM_WINDOW = 11  # pixels
SMALLEST_ERROR = 1e-10  # mean squared; equal pictures have 100 dB


def inside(values: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean of each frame's ``values`` (frames, height, width) inside a mask, (frames,)."""
    if where is None:
        return values.mean((1, 2))
    return (values * where).sum((1, 2)) / where.sum((1, 2))


def psnr(images: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each frame, dB, (frames,)."""
    errors = inside((images - truth).square().mean(1), where)
    return -10 * errors.clamp(min=SMALLEST_ERROR).log10()


def ssim(images: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Structural similarity of each frame, 1 for equal ones, (frames,): kornia's map, averaged inside the mask."""
    return inside(ssim_map(images, truth, SSIM_WINDOW).mean(1), where)


def warping_error(images: Tensor, flow: Tensor, visible: Tensor) -> float:
    """Mean squared difference between each frame and the next one, read where the flow says that its points went.

    Args:
        images: n + 1 frames.
        flow: from each of the first n frames to the next, pixels to the right and down, (n, 2, height, width).
        visible: which points of the first n frames count, (n, height, width) bool.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    following = remap(images[1:], x, y, padding_mode="border", align_corners=True)
    errors = (following - images[:-1]).square().mean(1)
    return (errors[visible].sum() / visible.sum()).item()


def shares(read: Mapping[str, Tensor], named: Mapping[str, int], asked: str) -> dict[str, float]:
    """How often the judge reads what the caption says.

    Args:
        read: what the judge reads of each attribute, (frames,) numbers.
        named: the attributes that the caption names, and which of their values.
        asked: the one that the edit changes.

    Returns:
        ``asked``: share of frames with the value asked for; ``agreement``: with all the values named.
    """
    right = {name: read[name] == value for name, value in named.items()}
    every = torch.stack(list(right.values())).all(0)
    return {"asked": right[asked].float().mean().item(), "agreement": every.float().mean().item()}


def against_truth(images: Tensor, truth: Tensor, masks: Tensor) -> dict[str, float]:
    """PSNR and SSIM, means over the frames: of the whole picture, of the object and of all else."""
    places = {"": None, " object": masks, " rest": ~masks}
    values = {f"psnr{place}": psnr(images, truth, where) for place, where in places.items()}
    values |= {f"ssim{place}": ssim(images, truth, where) for place, where in places.items()}
    return {name: value.nanmean().item() for name, value in values.items()}


def steadiness(images: Tensor, flow: Tensor, visible: Tensor, masks: Tensor) -> dict[str, float]:
    """Warping error of the whole picture and of the object; ``flow`` and ``visible`` as for :func:`warping_error`."""
    on_object = visible & masks[:-1]
    return {
        "warping": warping_error(images, flow, visible),
        "warping object": warping_error(images, flow, on_object),
    }
