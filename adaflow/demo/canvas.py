"""What layers are painted on: pictures of n scenes, the id of the topmost layer, and the pixels' places in a layer."""

from copy import copy
from itertools import groupby

import torch
from torch import Tensor

from .layout import Layer, Layout


class Canvas:
    """Pictures under work, painted back to front.

    Attributes:
        layout: the scenes' numbers.
        image: (n, 3, height, width) in 0 .. 1.
        layers: ids of the topmost layer, (n, height, width) int64.
        pixel: side of a pixel in picture heights.
    """

    def __init__(self, layout: Layout, shifts: Tensor, height: int, width: int):
        self.layout, self.pixel = layout, 1 / height
        n, device = len(layout.scenes), layout.device
        self._shifts = shifts.float().to(device)
        self._x = ((torch.arange(width, device=device) + 0.5) / height - layout.aspect / 2)[None, None, :]
        self._y = ((torch.arange(height, device=device) + 0.5) / height)[None, :, None]
        self.image = torch.zeros(n, 3, height, width, device=device)
        self.layers = torch.zeros(n, height, width, dtype=torch.int64, device=device)

    def local(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Places in a layer's own coordinates, picture heights: x (n, 1, width) and y (n, height, 1)."""
        x, y = self.shift(layer)
        return self._x - x, self._y - y

    def shift(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Where a layer's origin is in the picture, x and y, each (n, 1, 1)."""
        return self._shifts[:, layer, 0, None, None], self._shifts[:, layer, 1, None, None]

    @property
    def sunward(self) -> Tensor:
        """The side that the light comes from, -1 left to 1 right, (n, 1, 1)."""
        return (3 * self.layout["sun_x"]).clamp(-1, 1)

    def by_kind(self) -> list["Canvas"]:
        """Canvases of the scenes of each kind, on the same memory; scenes of one kind stand together."""
        parts, first = [], 0
        for _, group in groupby(self.layout.scenes, key=lambda scene: scene.kind):
            rows = slice(first, first + len(list(group)))
            part = copy(self)
            part.layout, part._shifts = self.layout.rows(rows), self._shifts[rows]
            part.image, part.layers = self.image[rows], self.layers[rows]
            parts.append(part)
            first = rows.stop
        return parts

    def coverage(self, distance: Tensor) -> Tensor:
        """Share of each pixel inside a shape, from the signed distance (negative inside) in picture heights."""
        return (0.5 - distance / self.pixel).clamp_(0, 1)

    def paint(self, alpha: Tensor, dark: Tensor, light: Tensor | None = None, shade: Tensor | None = None) -> None:
        """Lay a colour, or a mixture of two, over the pictures.

        Args:
            alpha: how much of each pixel is covered, (n, height, width).
            dark, light: (n or 1, 3, 1 or height, 1 or width); dark alone is a flat colour.
            shade: 0 for dark, 1 for light, broadcasts with alpha.
        """
        colour = dark if light is None else torch.lerp(dark, light, shade.unsqueeze(1))
        self.image.lerp_(colour.expand_as(self.image), alpha.unsqueeze(1))

    def claim(self, layer: Layer, alpha: Tensor) -> None:
        """Say that a layer is the topmost where it covers more than half of a pixel."""
        self.layers.masked_fill_(alpha > 0.5, int(layer))


def smoothstep(low: float | Tensor, high: float | Tensor, value: Tensor) -> Tensor:
    """0 under ``low``, 1 over ``high``, smooth in between."""
    t = ((value - low) / (high - low)).clamp_(0, 1)
    return t * t * (3 - 2 * t)
