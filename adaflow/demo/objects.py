"""The object of each scene, drawn part by part from signed distances, and its shadow.

A part is placed by ``u`` (to where the object faces) and ``v`` (up), both in picture heights from the middle of the
object's base; ``w`` and ``t`` are the object's width and height.
"""

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor

from . import palette
from .canvas import Canvas, smoothstep
from .layout import Layer


class Brush:
    """Paints parts of objects of one kind on their canvas.

    Attributes:
        u, v: places, (n, 1, width) and (n, height, 1).
        w, t, shape, detail: numbers of the objects, (n, 1, 1).
        lit: light from one side, 0 dark to 1 bright across the object, (n, height, width).
        cover: what has been painted so far, (n, height, width).
    """

    def __init__(self, canvas: Canvas):
        layout = canvas.layout
        x, y = canvas.local(Layer.OBJECT)
        self.canvas, self.layout = canvas, layout
        self.u, self.v = x * layout["facing"], -y
        self.w, self.t = layout["width"], layout["width"] * layout["tallness"]
        self.shape, self.detail = layout["shape"], layout["detail"]
        self.light = layout.table(palette.OBJECT_LIGHT, "time")
        self.bright = layout.table(palette.COLOUR, "colour") * self.light
        self.lit = (0.62 + 0.5 * canvas.sunward * x / self.w + 0.55 * (self.v / self.t - 0.5)).clamp_(0, 1)
        self.cover = torch.zeros_like(self.lit)

    def coloured(self, distance: Tensor, tint: float = 1.0, shade: Tensor | None = None) -> None:
        """A part in the asked colour, darker (tint under 1) or paler (over 1), shaded by ``lit`` unless told."""
        colour = self.bright * min(tint, 1) + (self.light - self.bright) * max(tint - 1, 0)
        self._lay(distance, 0.58 * colour, torch.lerp(colour, self.light, 0.12), self.lit if shade is None else shade)

    def plain(self, distance: Tensor, dark, light=None, shade: Tensor | None = None) -> None:
        """A part in a fixed colour, or between two: (red, green, blue), or (n, 3, 1, 1)."""
        dark, light = self._constant(dark), None if light is None else self._constant(light)
        self._lay(distance, dark, light, shade if light is None or shade is not None else self.lit)

    def _constant(self, colour) -> Tensor:
        if isinstance(colour, Tensor):
            return colour
        return torch.tensor(colour, device=self.layout.device)[:, None, None] * self.light

    def _lay(self, distance: Tensor, dark: Tensor, light: Tensor | None, shade: Tensor | None) -> None:
        alpha = self.canvas.coverage(distance).expand_as(self.cover)
        self.canvas.paint(alpha, dark, light, shade)
        self.cover = torch.maximum(self.cover, alpha)


def disc(u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Signed distance of a disc around the origin."""
    return torch.hypot(u, v) - radius


def box(u: Tensor, v: Tensor, half_width: Tensor | float, half_height: Tensor, corner: Tensor | float = 0.0) -> Tensor:
    """Signed distance of a box around the origin with rounded corners."""
    across, along = u.abs() - half_width + corner, v.abs() - half_height + corner
    outside = torch.hypot(across.clamp(min=0), along.clamp(min=0))
    return outside + torch.maximum(across, along).clamp(max=0) - corner


def hull(*sides: Tensor) -> Tensor:
    """Signed distance of the common part of half planes or other shapes."""
    distance = sides[0]
    for side in sides[1:]:
        distance = torch.maximum(distance, side)
    return distance


def slant(u: Tensor, v: Tensor, start: tuple, end: tuple) -> Tensor:
    """Signed distance to the line from ``start`` to ``end`` (each u, v), negative on its right."""
    along_u, along_v = end[0] - start[0], end[1] - start[1]
    length = torch.hypot(along_u, along_v)
    return ((v - start[1]) * along_u - (u - start[0]) * along_v) / length


def draw_car(b: Brush) -> None:
    u, v, w, t = b.u, b.v, b.w, b.t
    wheel = 0.205 * t
    front, back = (0.20 + 0.06 * b.shape) * w, (-0.24 - 0.16 * b.detail) * w
    roof_front, roof_back = front - (0.13 - 0.04 * b.shape) * w, back + (0.10 - 0.06 * b.detail) * w
    waist, top = 0.56 * t, t

    def cabin(inset: Tensor | float, low: Tensor, high: Tensor) -> Tensor:
        windscreen = slant(u, v, (roof_front, top), (front, waist))
        rear = slant(u, v, (back, waist), (roof_back, top))
        return hull(windscreen + inset, rear + inset, low - v, v - high)

    b.coloured(cabin(0.0, waist - 0.08 * t, top), tint=0.97)
    b.coloured(box(u, v - 0.4 * t, 0.5 * w, 0.24 * t, 0.13 * t))
    b.coloured(box(u, v - 0.235 * t, 0.485 * w, 0.035 * t), tint=0.6)
    glass = cabin(0.035 * w, waist, 0.9 * t)
    pillar = 0.016 * w - (u - (front + back) / 2).abs()
    b.plain(hull(glass, pillar), *palette.GLASS)
    b.plain(disc(u - 0.455 * w, v - 0.44 * t, 0.055 * t), (1.0, 0.95, 0.7))
    b.plain(box(u + 0.48 * w, v - 0.46 * t, 0.016 * w, 0.05 * t), (0.75, 0.08, 0.05))
    for place in (-0.29, 0.29):
        b.plain(disc(u - place * w, v - wheel, wheel), palette.TYRE)
        b.plain(disc(u - place * w, v - wheel, 0.5 * wheel), palette.METAL)


def draw_boat(b: Brush) -> None:
    u, v, w, t = b.u, b.v, b.w, b.t
    deck, boom = 0.2 * t, 0.25 * t
    mast = (0.06 - 0.1 * b.shape) * w
    b.plain(box(u - mast, v - 0.6 * t, 0.008, 0.4 * t), *palette.WOOD)
    belly = 0.05 * w * torch.sin(pi * ((v - boom) / (0.72 * t)).clamp(0, 1))
    leech = slant(u, v, (-0.46 * w, boom), (mast - 0.015, 0.97 * t)) - belly
    main = hull(leech, u - mast + 0.015, boom - v)
    b.coloured(main, shade=(0.35 + 0.9 * b.lit + 0.6 * u / w).clamp(0, 1))
    jib = hull(slant(u, v, (mast + 0.015, 0.86 * t), (0.44 * w, boom)), mast + 0.015 - u, boom - v)
    b.coloured(jib, tint=1.28)
    keel = hull(slant(u, v, (-0.36 * w, 0 * t), (-0.48 * w, deck)), slant(u, v, (0.5 * w, deck), (0.3 * w, 0 * t)))
    body = hull(keel, -v, v - deck)
    b.coloured(body, tint=0.9, shade=(0.25 + 3.2 * v / t).clamp(0, 1).expand_as(b.lit))
    b.plain(hull(body, (v - 0.165 * t).abs() - 0.022 * t), palette.METAL)


def draw_ball(b: Brush) -> None:
    radius = b.w / 2
    u, v = b.u, b.v - radius
    whole = disc(u, v, radius)
    toward = torch.hypot(u * b.layout["facing"] / radius - 0.38 * b.canvas.sunward, v / radius - 0.42)
    shade = (1.12 - 0.62 * toward).clamp_(0, 1)
    b.coloured(whole, shade=shade)
    angle = 1.2 * (b.shape - 0.5)
    norm = (1 + angle * angle).sqrt()
    along, over = (u + angle * v) / norm, (v - angle * u) / norm
    bend = over - (b.detail - 0.5) * 0.5 * (1 - (along / radius).square()).clamp(min=0) * radius
    b.coloured(hull(whole, bend.abs() - 0.17 * radius), tint=1.55, shade=shade)
    for side in (-1, 1):
        b.coloured(hull(whole, (bend - side * 0.62 * radius).abs() - 0.1 * radius), tint=0.66, shade=shade)
    spot = 0.35 * torch.exp(-(toward / 0.24).square())
    b.canvas.paint(spot * b.canvas.coverage(whole), b.light)


def draw_balloon(b: Brush) -> None:
    u, v, w, t = b.u, b.v, b.w, b.t
    radius = w / 2
    middle = t - radius
    neck, mouth = 0.21 * t, 0.1 * w
    cone = slant(u.abs(), v, (0.8 * radius, middle - 0.6 * radius), (mouth, neck))
    skirt = hull(cone, neck - v, v - middle + 0.6 * radius)
    whole = torch.minimum(disc(u, v - middle, radius), skirt)
    for rope in (-1, 1):
        line = slant(u * rope, v, (mouth, neck), (0.07 * w, 0.1 * t)).abs() - 0.4 * b.canvas.pixel
        b.plain(hull(line, v - neck, 0.1 * t - v), palette.WOOD[0])
    b.plain(box(u, v - 0.06 * t, 0.09 * w, 0.06 * t, 0.02 * w), *palette.WOOD)
    height = ((v - neck) / (middle - neck)).clamp(0, 1)
    dome = (radius.square() - (v - middle).square()).clamp(min=1e-5).sqrt()
    girth = torch.where(v > middle, dome, torch.lerp(mouth, radius, height * (1.75 - 0.75 * height)))
    round_ = (u / girth).clamp(-1, 1)
    gores = torch.asin(round_ * 0.999) / pi * (4 + 2 * (b.shape > 0.5).float()) + 0.25
    shade = (0.2 + 1.0 * b.lit - 0.25 * round_.square()).clamp_(0, 1)
    b.coloured(whole, tint=0.92, shade=shade)
    stripe = ((gores % 1) - 0.5).abs() - 0.25
    soft = smoothstep(-0.03, 0.03, -stripe)
    pale = torch.lerp(b.bright, b.light, 0.5)
    b.canvas.paint(b.canvas.coverage(whole) * soft, 0.6 * pale, pale, shade)
    band = hull(whole, (v - middle + (0.1 + 0.4 * b.detail) * radius).abs() - 0.13 * radius)
    b.coloured(band, tint=0.72, shade=shade)


def draw_house(b: Brush) -> None:
    u, v, w, t = b.u, b.v, b.w, b.t
    eaves = (0.5 + 0.1 * b.shape) * t
    ridge = (0.03 + 0.25 * b.detail) * w
    b.coloured(box(u - 0.24 * w, v - 0.8 * t, 0.045 * w, 0.17 * t), tint=0.5)
    walls = box(u, v - eaves / 2, 0.45 * w, eaves / 2 + 0.01)
    b.coloured(hull(walls, -v), shade=(0.45 + 0.7 * b.lit).clamp(0, 1))
    roof = hull(slant(u.abs(), v, (ridge, t), (0.5 * w, eaves - 0.01)), eaves - 0.01 - v, v - t)
    b.coloured(roof, tint=0.66)
    b.coloured(hull(roof, v - eaves - 0.03 * t), tint=0.45)
    b.plain(box(u, v - 0.15 * t, 0.065 * w, 0.15 * t), *palette.WOOD)
    window = b.layout.table(palette.WINDOW, "time")
    for place in (-0.28, 0.28):
        frame = box(u - place * w, v - 0.56 * eaves, 0.095 * w, 0.18 * eaves)
        b.plain(frame, palette.METAL)
        b.plain(frame + 0.012 * w, window)
        b.plain(hull(frame, (u - place * w).abs() - 0.006), palette.METAL)


DRAW: dict[str, Callable[[Brush], None]] = {
    "car": draw_car,
    "boat": draw_boat,
    "ball": draw_ball,
    "balloon": draw_balloon,
    "house": draw_house,
}


# Of the shadow: its height over its width, and how dark it is.
_SHADOWS = {
    "car": (0.07, 0.42),
    "boat": (0.10, 0.30),
    "ball": (0.16, 0.42),
    "balloon": (1.0, 0.0),
    "house": (0.06, 0.35),
}


def paint_shadow(canvas: Canvas) -> None:
    """A soft dark patch under the object, on what it stands on; a balloon has none."""
    layout = canvas.layout
    x, y = canvas.local(Layer.OBJECT)
    lifted = layout["base"] - canvas.shift(Layer.OBJECT)[1]
    flat, depth = layout.table(_SHADOWS, "kind").unbind(1)
    half = layout["width"] * 0.56 / (1 + 1.5 * lifted)
    r = torch.hypot((x + 0.08 * canvas.sunward * layout["width"]) / half, (y - lifted) / (half * 2 * flat))
    canvas.paint(depth * smoothstep(0.0, 1.0, 1.25 - r), torch.zeros(1, 3, 1, 1, device=layout.device))


def paint_object(canvas: Canvas) -> Tensor:
    """The object of scenes of one kind; returns its coverage, (n, height, width)."""
    brush = Brush(canvas)
    DRAW[canvas.layout.scenes[0].kind](brush)
    return brush.cover
