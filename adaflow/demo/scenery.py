"""The layers around the object: sky, clouds, hills, ground and foreground. Each paints itself on a canvas."""

import torch
from torch import Tensor

from . import palette
from .canvas import Canvas, smoothstep
from .layout import Layer
from .noise import hashed, noise_line, noise_plane

_STARS = 70


def seasonal(canvas: Canvas, table: dict, hue: Tensor, haze: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """The dark and the light colour of some scenery in its season, light and haze.

    Args:
        table: of palette.py, by season.
        hue: which of the season's hues, 0 .. 1, (n, 1, 1 or width).
        haze: share of the haze's colour; a number, or (n, 1, 1).

    Returns:
        two tensors (n, 3, 1, 1 or width).
    """
    layout = canvas.layout
    hues = layout.table(table, "season")
    colours = torch.lerp(hues[:, 0], hues[:, 1], hue[:, None, None]) * layout.table(
        palette.SCENERY_LIGHT, "season", "time"
    )
    haze = torch.as_tensor(haze, device=layout.device).expand(len(colours), 1, 1)[:, None, None]
    colours = torch.lerp(colours, layout.table(palette.HAZE, "time")[:, None], haze)
    return colours[:, 0], colours[:, 1]


def paint_sky(canvas: Canvas) -> None:
    """The gradient, stars by night, and the sun or the moon."""
    layout = canvas.layout
    x, y = canvas.local(Layer.SKY)
    top, middle, low = layout.table(palette.SKY, "time").unbind(1)
    depth = (y / layout["horizon"]).clamp(max=1).unsqueeze(1)
    upper = torch.lerp(top, middle, smoothstep(0.0, layout["sky_depth"].unsqueeze(1), depth))
    canvas.image.copy_(torch.lerp(upper, low, smoothstep(0.45, 1.0, depth)))
    night = layout.only("time", "night")
    if any(scene.time == "night" for scene in layout.scenes):
        star = torch.tensor(palette.STAR, device=layout.device)[None, :, None, None]
        canvas.paint(_stars(canvas) * night, star)
    sunset = layout.only("time", "sunset")
    size = layout["sun_size"] * (1 + 0.6 * sunset)
    sun_x = layout["sun_x"] * (layout.aspect / 2)
    sun_y = torch.lerp(layout["sun_y"], layout["horizon"] - 0.75 * layout["sun_y"] - 0.06, sunset)
    distance = torch.hypot(x - sun_x, y - sun_y)
    glow = torch.exp(distance * (-1 / (size * (1.4 + 2.2 * sunset)))) * (0.75 - 0.25 * night)
    canvas.paint(glow, layout.table(palette.GLOW, "time"))
    disc = canvas.coverage(distance - size)
    bite = canvas.coverage(torch.hypot(x - sun_x - layout["crescent"] * size, y - sun_y + 0.25 * size) - 0.95 * size)
    canvas.paint(disc * (1 - bite * night), layout.table(palette.SUN, "time"))


def _stars(canvas: Canvas) -> Tensor:
    """Brightness of the stars, (n, height, width): each a dot of about a pixel, brightest at its middle."""
    n, _, height, width = canvas.image.shape
    number = torch.arange(_STARS, device=canvas.layout.device)[None, :]
    seed = canvas.layout.seed[:, 0]
    x = hashed(seed, 1, number) * (width - 2)
    y = hashed(seed, 2, number) * (height * 0.6)
    bright = 0.35 + 0.65 * hashed(seed, 3, number)
    sky = torch.zeros(n, height * width, device=canvas.layout.device)
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (y.frac() - down).abs()) * (1 - (x.frac() - right).abs())
            place = (y.long() + down) * width + x.long() + right
            sky.scatter_add_(1, place, (1.6 * weight * bright))
    return sky.clamp_(max=1).view(n, height, width)


def paint_clouds(canvas: Canvas) -> None:
    """Soft clouds, thinner towards the horizon."""
    layout = canvas.layout
    x, y = canvas.local(Layer.CLOUDS)
    fine = noise_plane(layout.seed, 11, 5.2 * x, 13.0 * y)
    noise = 0.7 * noise_plane(layout.seed, 10, 2.1 * x, 5.5 * y) + 0.3 * fine
    edge = 0.95 - 0.52 * layout["cloud_cover"] + 0.35 * smoothstep(0.55, 1.0, y / layout["horizon"])
    alpha = smoothstep(edge, edge + 0.16, noise) * 0.92
    dark, light = layout.table(palette.CLOUDS, "time").unbind(1)
    canvas.paint(alpha, dark, light, (1.6 * fine - 0.1).clamp_(0, 1))
    canvas.claim(Layer.CLOUDS, alpha)


def paint_hills(canvas: Canvas, layer: Layer) -> None:
    """One range of hills with a wavy crest, lighter at the crest."""
    layout = canvas.layout
    far = layer == Layer.FAR_HILLS
    name, salt = ("far", 20) if far else ("near", 30)
    x, y = canvas.local(layer)
    detail = layout[f"{name}_detail"]
    crest = 0.75 * noise_line(layout.seed, salt, x * detail) + 0.25 * noise_line(
        layout.seed, salt + 1, x * detail * 2.7
    )
    depth = y - (layout["horizon"] + 0.01 - layout[f"{name}_height"] * (0.25 + 1.1 * crest))
    alpha = canvas.coverage(-depth)
    patches = noise_plane(layout.seed, salt + 2, 5.0 * x, 11.0 * y)
    shade = (0.45 + 0.75 * (patches - 0.5) + 0.5 * torch.exp(-18 * depth.clamp(min=0))).clamp_(0, 1)
    table = palette.FAR_HILLS if far else palette.NEAR_HILLS
    haze = 0.25 + 0.35 * layout["haze"] if far else 0.06 + 0.14 * layout["haze"]
    canvas.paint(alpha, *seasonal(canvas, table, layout["hill_hue"], haze), shade)
    canvas.claim(layer, alpha)


def paint_ground(canvas: Canvas) -> None:
    """The meadow, and in it the road of a car or the lake of a boat."""
    layout = canvas.layout
    x, y = canvas.local(Layer.GROUND)
    swell = layout["ground_swell"] * (noise_line(layout.seed, 40, 1.3 * x) - 0.5)
    depth = y - layout["horizon"] - swell
    alpha = canvas.coverage(-depth)
    patches = noise_plane(layout.seed, 41, 3.0 * x, 14.0 * y)
    blades = noise_plane(layout.seed, 42, 11.0 * x, 30.0 * y)
    shade = (0.2 + 0.55 * patches + 0.3 * blades - 0.4 * depth.clamp(min=0)).clamp_(0, 1)
    canvas.paint(alpha, *seasonal(canvas, palette.MEADOW, layout["ground_hue"]), shade)
    spots = smoothstep(0.6, 0.85, noise_plane(layout.seed, 43, 7.0 * x, 24.0 * y)) * layout["patches"] * alpha
    canvas.paint(spots, seasonal(canvas, palette.PATCHES, layout["ground_hue"])[1])
    kinds = [scene.kind for scene in layout.scenes]
    if "car" in kinds:
        _paint_road(canvas, x, y, blades)
    if "boat" in kinds:
        _paint_lake(canvas, x, y, depth, patches)
    canvas.claim(Layer.GROUND, alpha)


def _paint_road(canvas: Canvas, x: Tensor, y: Tensor, blades: Tensor) -> None:
    """A level road with a dashed line, on which the object's base stands."""
    layout = canvas.layout
    below = y - layout["base"]
    middle = (layout["band_near"] - layout["band_far"]) / 2
    half = (layout["band_near"] + layout["band_far"]) / 2
    shows = layout.only("kind", "car")
    edge = 0.012 * (noise_line(layout.seed, 50, 4.0 * x) - 0.5)
    alpha = canvas.coverage((below - middle + edge).abs() - half) * shows
    light = layout.table(palette.SCENERY_LIGHT, "season", "time")
    canvas.paint(alpha, *(layout.table(palette.ROAD, "season") * light).unbind(1), blades)
    dash = canvas.coverage(((x * 4) % 1 - 0.5).abs() / 4 - 0.07)
    line = canvas.coverage((below - layout["band_near"] * 0.45).abs() - 0.008) * dash * shows
    canvas.paint(line, torch.tensor(palette.ROAD_LINE, device=layout.device)[:, None, None] * light[:, 1])


def _paint_lake(canvas: Canvas, x: Tensor, y: Tensor, depth: Tensor, patches: Tensor) -> None:
    """Water from a wavy far shore to the bottom of the picture."""
    layout = canvas.layout
    shore = layout["band_far"] + 0.025 * (noise_line(layout.seed, 60, 2.0 * x) - 0.5)
    below = depth - shore
    ripples = noise_plane(layout.seed, 61, 4.0 * x, 42.0 * y)
    shade = (0.95 - 2.6 * below + 0.5 * (ripples - 0.5) + 0.25 * (patches - 0.5)).clamp_(0, 1)
    dark, light = layout.table(palette.WATER, "time").unbind(1)
    canvas.paint(canvas.coverage(-below) * layout.only("kind", "boat"), dark, light, shade)


def paint_foreground(canvas: Canvas) -> None:
    """Grass in front of everything, at the bottom edge."""
    layout = canvas.layout
    x, y = canvas.local(Layer.FOREGROUND)
    bushes = noise_line(layout.seed, 70, 2.2 * x)
    blades = noise_line(layout.seed, 71, 34.0 * x)
    top = 1 - layout["foreground"] * (0.2 + bushes) - 0.35 * layout["foreground"] * blades
    alpha = canvas.coverage(top - y) * (layout["foreground"] > 0)
    shade = (0.15 + 0.7 * blades + 4 * (y - 1)).clamp_(0, 1)
    canvas.paint(alpha, *seasonal(canvas, palette.FOLIAGE, layout["foliage_hue"]), shade)
    canvas.claim(Layer.FOREGROUND, alpha)
