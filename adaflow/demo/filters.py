"""Styles and looks: image filters that define what a caption's words mean, for the demo world and photographs alike.

All take and give images (n, 3, height, width) float from 0 to 1, on any device, are deterministic and act on each image
by itself. Lengths follow the height: a stroke that is 2 pixels wide at 128 rows is 3 at 192.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, grid_sample, pad

from ..errors import require, require_one_of
from .scene import STYLES

LOOKS = ("day", "night", "sunset", "autumn", "snow")
_CHUNK, _CPU_CHUNK = 512, 16  # pictures filtered in one go: what memory holds, and what a processor's cache holds
_GREY = (0.299, 0.587, 0.114)


def apply_style(images: Tensor, style: str) -> Tensor:
    """``images`` as a picture in one of STYLES; ``photo`` leaves them as they are.

    Raises:
        InputError: for another style, or images of another shape.
    """
    require_one_of(style, STYLES, "apply_style", "style")
    return _apply(_STYLES[style], images, "apply_style")


def apply_look(images: Tensor, look: str) -> Tensor:
    """Photographs as if taken at another hour or season, one of LOOKS; ``day`` leaves them as they are.

    Raises:
        InputError: for another look, or images of another shape.
    """
    require_one_of(look, LOOKS, "apply_look", "look")
    return _apply(_LOOKS[look], images, "apply_look")


def _apply(change, images: Tensor, where: str) -> Tensor:
    shape = tuple(images.shape)
    require(len(shape) == 4 and shape[1] == 3, where, "images", f"of shape {shape}", "(n, 3, height, width)")
    chunk = _CPU_CHUNK if images.device.type == "cpu" else _CHUNK
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([change(part).clamp(0, 1) for part in images.split(chunk)])


def _grey(images: Tensor) -> Tensor:
    """Brightness (n, 1, ...) of colours (n, 3, ...)."""
    red, green, blue = images.split(1, 1)
    return _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue


def _tint(images: Tensor, *colour: float) -> Tensor:
    return images * images.new_tensor(colour)[:, None, None]


def _saturate(images: Tensor, factor: float) -> Tensor:
    """Distance from grey times ``factor``."""
    grey = _grey(images)
    return (grey + factor * (images - grey)).clamp(0, 1)


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian, ``sigma`` in pixels, edges repeated."""
    radius = max(1, math.ceil(2.5 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = (-(offsets**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    channels = images.shape[1]
    rows = conv2d(pad(images, (radius, radius, 0, 0), "replicate"), kernel, groups=channels)
    return conv2d(pad(rows, (0, 0, radius, radius), "replicate"), kernel.transpose(2, 3), groups=channels)


def _unit(images: Tensor) -> float:
    """The stroke: 1 at 128 rows."""
    return images.shape[2] / 128


def _contours(images: Tensor) -> Tensor:
    """How steeply any colour changes, (n, 1, h, w): about 1 across the border of black and white."""
    soft = _blur(images, 0.7 * _unit(images))
    x = pad(soft, (1, 1, 0, 0), "replicate")
    y = pad(soft, (0, 0, 1, 1), "replicate")
    steep = (x[..., 2:] - x[..., :-2]).square() + (y[:, :, 2:] - y[:, :, :-2]).square()
    return steep.amax(1, keepdim=True).add(1e-8).sqrt() * _unit(images)


def _lines(images: Tensor, low: float, high: float) -> Tensor:
    """Contours as ink from 0 to 1, against their surroundings' brightness, so that a night has lines too."""
    strength = _contours(images) / (0.25 + _blur(_grey(images), 6 * _unit(images)))
    return ((strength - low) / (high - low)).clamp(0, 1)


def _sectors(radius: int, like: Tensor) -> Tensor:
    """Eight soft, overlapping slices of a disc of ``radius`` pixels, (8, 1, side, side), each with sum 1."""
    offsets = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    angles = torch.arange(8, device=like.device, dtype=like.dtype)[:, None, None] * (math.pi / 4)
    slices = (torch.cos(torch.atan2(y, x) - angles).clamp(min=0) ** 6) * (x.square() + y.square() > 0)
    kernels = (slices + 0.05) * (-2 * (x.square() + y.square()) / radius**2).exp()
    return (kernels / kernels.sum((1, 2), keepdim=True))[:, None]


def _kuwahara(images: Tensor, radius: float) -> Tensor:
    """Around each pixel the mean of the evenest slice of a disc, softly chosen (Papari et al., 2007)."""
    n, _, height, width = images.shape
    radius = max(2, round(radius))
    planes = pad(torch.cat([images, _grey(images).square()], 1), (radius,) * 4, "replicate")
    means = conv2d(planes.reshape(n * 4, 1, *planes.shape[2:]), _sectors(radius, images))
    colours, squares = means.reshape(n, 4, 8, height, width).split((3, 1), 1)
    variance = (squares - _grey(colours).square()).clamp(min=0)
    weight = (1e4 * variance + 1).square().square().reciprocal()
    return (weight * colours).sum(2) / weight.sum(2)


def _waves(images: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Two smooth fixed fields (h, w) from -1 to 1 whose waves are some ``length`` pixels long."""
    rows = torch.arange(images.shape[2], device=images.device, dtype=images.dtype)[:, None]
    columns = torch.arange(images.shape[3], device=images.device, dtype=images.dtype)[None]
    turn = 2 * math.pi / length
    first = torch.sin(turn * (columns + 0.37 * rows)) * torch.sin(0.83 * turn * (rows - 0.21 * columns) + 1.3)
    second = torch.sin(0.91 * turn * (rows + 0.43 * columns) + 0.7) * torch.sin(1.1 * turn * (columns - 0.31 * rows))
    return first, second


def _smear(images: Tensor, amount: float, length: float) -> Tensor:
    """Every pixel taken from up to ``amount`` pixels away along fixed waves."""
    height, width = images.shape[2:]
    x, y = _waves(images, length)
    rows = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)[:, None] + y * 2 * amount / height
    columns = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)[None] + x * 2 * amount / width
    grid = torch.stack([columns.expand(height, width), rows.expand(height, width)], -1)
    grid = grid.expand(len(images), -1, -1, -1)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _pencil(images: Tensor) -> Tensor:
    unit = _unit(images)
    grey = _blur(_grey(images), 0.9 * unit)
    tone = 0.35 * grey + 0.65 * (grey / (1.6 * _blur(grey, 12 * unit) + 0.05)).clamp(0, 1)
    sheet = 0.99 - 0.4 * (1 - tone) - 0.72 * _lines(images, 0.05, 0.5)
    return sheet.clamp(0, 1).expand(-1, 3, -1, -1)


def _watercolour(images: Tensor) -> Tensor:
    unit = _unit(images)
    washes = _smear(_kuwahara(images, 3 * unit), 1.2 * unit, 23 * unit)
    bloom = 0.6 * washes + 0.4 * _blur(washes, 2.5 * unit)
    light = 1 - 0.55 * (1 - _saturate(bloom, 1.5)) ** 1.15
    rim = 0.3 * (_contours(washes) / 0.3).clamp(0, 1)
    paper = 0.012 * _waves(images, 57 * unit)[0]
    return _tint(light - rim * (1 - 0.6 * bloom) + paper, 1.0, 0.985, 0.945)


def _oil(images: Tensor) -> Tensor:
    unit = _unit(images)
    strokes = _kuwahara(_smear(images, 2.2 * unit, 10 * unit), 4 * unit)
    rich = _saturate(strokes, 1.5)
    relief = _waves(images, 6 * unit)[0] * _blur(_contours(strokes), 2 * unit).clamp(0, 0.4)
    return 0.5 + 1.15 * (rich - 0.48) + 0.4 * relief


def _soft_steps(values: Tensor, count: int) -> Tensor:
    """Values from 0 to 1 drawn towards ``count`` + 1 even levels, with steep but continuous ways between them."""
    scaled = count * values.clamp(0, 1)
    floor = scaled.floor()
    return (floor + ((scaled - floor - 0.5) * 5 + 0.5).clamp(0, 1)) / count


def _comic(images: Tensor) -> Tensor:
    unit = _unit(images)
    flat = _kuwahara(_kuwahara(images, 3 * unit), 2 * unit)
    grey = _grey(flat)
    inked = flat * (0.1 + 0.9 * _soft_steps(grey, 4)) / (0.05 + 0.95 * grey)
    return _saturate(inked, 1.9) * (1 - _lines(0.5 * images + 0.5 * flat, 0.14, 0.38))


def _pixels(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    side = 4 * max(1, int(_unit(images)))  # divides the 8 pixels of a latent, which so keeps the blocks sharp
    small = avg_pool2d(images, side, ceil_mode=True)
    grey = _grey(small)
    tint = (1.4 * (small - grey) / 0.15).round() * 0.15
    return ((grey * 7).round() / 7 + tint).repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]


def _night(images: Tensor) -> Tensor:
    return _tint(_saturate(images, 0.75).pow(1.25), 0.34, 0.4, 0.68)


def _sunset(images: Tensor) -> Tensor:
    height = images.shape[2]
    share = torch.linspace(0, 1, height, device=images.device, dtype=images.dtype)[:, None]
    top, low = images.new_tensor((0.5, 0.25, 0.55)), images.new_tensor((1.0, 0.5, 0.15))
    glow = (top[:, None, None] + (low - top)[:, None, None] * (share * 1.6).clamp(0, 1))[None]
    grey = _grey(images)
    return _tint(0.75 * images + 0.1 * grey, 1.1, 0.78, 0.55) + glow * (0.1 + 0.42 * grey) * (1.15 - 0.6 * share)


def _greens(images: Tensor) -> Tensor:
    """Where leaves and grass are, (n, 1, h, w) from 0 to 1."""
    red, green, blue = images.unbind(1)
    return ((green - 0.55 * blue - 0.45 * red) * 9 - 0.1).clamp(0, 1)[:, None]


def _autumn(images: Tensor) -> Tensor:
    leaves = _greens(images)
    warm = _tint(_grey(images).pow(0.8), 1.35, 0.74, 0.18)
    return (1 - leaves) * _tint(images, 1.08, 0.96, 0.78) + leaves * warm


def _snow(images: Tensor) -> Tensor:
    grey = _grey(images)
    red, green, blue = images.split(1, 1)
    brown = ((red - blue) * 4 - 0.3).clamp(0, 1) * (1 - ((red - green) * 4 - 1).clamp(0, 1))
    earth = brown * (1 - (grey * 1.2 - 0.5).clamp(0, 0.5))
    share = torch.linspace(0, 1, images.shape[2], device=images.device, dtype=images.dtype)[:, None]
    plain = (1 - 4 * (images.amax(1, True) - images.amin(1, True))).clamp(0, 1)
    lying = plain * ((grey - 0.2) * 4).clamp(0, 1) * ((share - 0.3) * 3).clamp(0, 1)
    covered = _blur((_greens(images) + earth + lying).clamp(0, 1), 0.8 * _unit(images))
    white = _tint(0.68 + 0.36 * grey, 0.95, 0.98, 1.04)
    cold = _tint(0.12 + 0.9 * _saturate(images, 0.6), 0.95, 1.0, 1.06)
    return covered * white + (1 - covered) * cold


_STYLES = {
    "photo": lambda images: images,
    "pencil sketch": _pencil,
    "watercolour": _watercolour,
    "oil painting": _oil,
    "comic": _comic,
    "pixel art": _pixels,
}
_LOOKS = {"day": lambda images: images, "night": _night, "sunset": _sunset, "autumn": _autumn, "snow": _snow}
