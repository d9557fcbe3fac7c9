"""Rows of trees, without end: the plane is cut into cells of equal width, and each holds a tree or none."""

import torch
from torch import Tensor

from . import palette
from .canvas import Canvas
from .layout import Layer
from .noise import hashed, noise_plane
from .scenery import seasonal


def paint_trees(canvas: Canvas, layer: Layer) -> None:
    """The grove behind the ground, or the few larger trees that stand on it."""
    layout = canvas.layout
    grove = layer == Layer.GROVE
    name, salt = ("grove", 80) if grove else ("tree", 90)
    x, y = canvas.local(layer)
    size = layout[f"{name}_size"]
    cell = size * (0.7 if grove else 1.3)
    index = (x / cell).floor()
    draw = [hashed(layout.seed, salt + i, index.long()) for i in range(6)]
    grown = (draw[0] < layout[f"{name}_density"]).float()
    tall = size * (0.65 + 0.35 * draw[1])
    wide = tall * (0.26 + 0.08 * draw[2])
    right = x - (index + 0.5) * cell - (draw[3] - 0.5) * (cell - 2.1 * wide).clamp(min=0)
    base = layout["horizon"] + (0.012 if grove else layout["tree_base"] * (0.5 + draw[2]))
    up = base - y
    conifer = draw[4] < layout[f"{name}_conifers"]
    distance = torch.where(conifer, _conifer(right, up, tall, wide), _round(right, up, tall, wide))
    crown = canvas.coverage(distance) * grown
    thick = 0.05 * tall + 0.5 * canvas.pixel
    trunk = canvas.coverage(torch.maximum(right.abs() - thick, torch.maximum(-up, up - 0.5 * tall))) * grown
    light = layout.table(palette.SCENERY_LIGHT, "season", "time")[:, 0]
    canvas.paint(trunk, torch.tensor(palette.TRUNK, device=layout.device)[:, None, None] * light)
    leaves = noise_plane(layout.seed, salt + 7, 16.0 * x, 16.0 * y)
    shade = (0.1 + 0.55 * up / tall + 0.35 * canvas.sunward * right / wide + 0.6 * (leaves - 0.4)).clamp_(0, 1)
    hue = (0.6 * layout["foliage_hue"] + 0.8 * draw[5] - 0.2).clamp(0, 1)
    canvas.paint(crown, *seasonal(canvas, palette.FOLIAGE, hue, 0.12 if grove else 0.0), shade)
    canvas.claim(layer, torch.maximum(crown, trunk))


def _round(right: Tensor, up: Tensor, tall: Tensor, wide: Tensor) -> Tensor:
    """Signed distance of a broad-leaved tree's crown: three balls."""
    top = torch.hypot(right, up - tall + 0.72 * wide) - 0.72 * wide
    low = torch.hypot(right.abs() - 0.42 * wide, up - 0.52 * tall) - 0.58 * wide
    return torch.minimum(top, low)


def _conifer(right: Tensor, up: Tensor, tall: Tensor, wide: Tensor) -> Tensor:
    """Signed distance of a conifer's crown: a cone cut into three tiers."""
    share = (up / tall - 0.14) / 0.86
    tiers = 1 - share + 0.1 * (1 - (share * 3) % 1) - 0.1
    side = (right.abs() - 0.95 * wide * tiers) * 0.93
    return torch.maximum(side, -share * tall)
