"""The demo world: pictures of scenes, the object's mask, the layers and the exact optical flow between two views."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import require
from .canvas import Canvas
from .filters import apply_style
from .layout import Layer, Layout
from .objects import paint_object, paint_shadow
from .scene import Scene
from .scenery import paint_clouds, paint_foreground, paint_ground, paint_hills, paint_sky
from .trees import paint_trees

_CHUNK, _CPU_CHUNK = 512, 8  # scenes painted in one go: what memory holds, and what a processor's cache holds


@dataclass(frozen=True)
class Rendered:
    """Pictures of n scenes.

    Attributes:
        images: (n, 3, height, width) float32 in 0 .. 1.
        masks: where the object is seen, (n, height, width) bool.
        layers: id of the topmost layer (see layout.Layer), (n, height, width) int64.
    """

    images: Tensor
    masks: Tensor
    layers: Tensor


def render(
    scenes: Sequence[Scene], camera: Tensor, clock: Tensor, height: int, width: int, device="cpu", chunk: int = 0
) -> Rendered:
    """Pictures of some scenes, each from a camera position and at a time of its own.

    Args:
        camera: sideways position of the camera in picture heights, (n,).
        clock: seconds, (n,).
        chunk: scenes painted in one go; 0 for a good number. Does not change the result.

    Raises:
        InputError: if the numbers of scenes, positions and times differ, or the picture is higher than wide.
    """
    images, layers = _paint_all(scenes, camera, clock, height, width, device, chunk)
    return Rendered(_in_style(scenes, images), layers == Layer.OBJECT, layers)


def flow(
    scenes: Sequence[Scene],
    camera0: Tensor,
    clock0: Tensor,
    camera1: Tensor,
    clock1: Tensor,
    height: int,
    width: int,
    device="cpu",
) -> tuple[Tensor, Tensor]:
    """Exact optical flow from one view of each scene to another: every layer moves by a translation.

    Args:
        camera0, clock0: of the first view, as in :func:`render`; camera1, clock1: of the second.

    Returns:
        flow: (n, 2, height, width) float32, pixels to the right and down.
        visible: the point is seen in both views, (n, height, width) bool.
    """
    _, first = _paint_all(scenes, camera0, clock0, height, width, device, 0)
    _, second = _paint_all(scenes, camera1, clock1, height, width, device, 0)
    layout = Layout(scenes, width / height, "cpu")
    moves = ((layout.shifts(camera1, clock1) - layout.shifts(camera0, clock0)) * height).float().to(device)
    rows = torch.arange(len(first), device=first.device)[:, None, None]
    moved = moves[rows, first].permute(0, 3, 1, 2)
    x = (torch.arange(width, device=first.device) + moved[:, 0]).round().long()
    y = (torch.arange(height, device=first.device)[:, None] + moved[:, 1]).round().long()
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    there = second[rows, y.clamp(0, height - 1), x.clamp(0, width - 1)]
    return moved.contiguous(), inside & (there == first)


def _paint_all(scenes, camera: Tensor, clock: Tensor, height: int, width: int, device, chunk: int):
    """Pictures without style and their layers."""
    n = len(scenes)
    require(n > 0, "render", "scenes", "empty", "at least one scene")
    require(width >= height > 0, "render", "size", f"{width}x{height}", "a picture at least as wide as it is high")
    for name, given in (("camera", camera), ("clock", clock)):
        require(given.shape == (n,), "render", name, f"of shape {tuple(given.shape)}", f"one number a scene, ({n},)")
    images = torch.empty(n, 3, height, width, device=device)
    layers = torch.empty(n, height, width, dtype=torch.int64, device=device)
    # scenes of one kind together: each kind's object is then drawn for its own scenes only
    order = sorted(range(n), key=lambda i: scenes[i].kind)
    chunk = chunk or (_CPU_CHUNK if images.device.type == "cpu" else _CHUNK)
    for first in range(0, n, chunk):
        rows = order[first : first + chunk]
        with torch.autocast(images.device.type, enabled=False):
            part = _paint([scenes[i] for i in rows], camera[rows], clock[rows], height, width, device)
        images[rows], layers[rows] = part.image, part.layers
    return images, layers


@torch.no_grad()
def _paint(scenes: list[Scene], camera: Tensor, clock: Tensor, height: int, width: int, device) -> Canvas:
    """Paint all layers back to front; scenes of one kind stand together."""
    layout = Layout(scenes, width / height, device)
    canvas = Canvas(layout, layout.shifts(camera, clock), height, width)
    paint_sky(canvas)
    paint_clouds(canvas)
    paint_hills(canvas, Layer.FAR_HILLS)
    paint_hills(canvas, Layer.NEAR_HILLS)
    paint_trees(canvas, Layer.GROVE)
    paint_ground(canvas)
    paint_trees(canvas, Layer.TREES)
    paint_shadow(canvas)
    for part in canvas.by_kind():
        part.claim(Layer.OBJECT, paint_object(part))
    paint_foreground(canvas)
    return canvas


def _in_style(scenes: Sequence[Scene], images: Tensor) -> Tensor:
    """Each picture in its scene's style."""
    for style in sorted({scene.style for scene in scenes} - {"photo"}):
        rows = [i for i, scene in enumerate(scenes) if scene.style == style]
        images[rows] = apply_style(images[rows], style)
    return images
