"""The demo world: scenes, clips of them, and the truth about both."""

from .clip import Clip, Shot
from .scene import ATTRIBUTES, CAPTION_VARIANTS, COLOURS, KINDS, SEASONS, STYLES, TIMES, Scene
from .world import Rendered, flow, render

__all__ = [
    "ATTRIBUTES",
    "CAPTION_VARIANTS",
    "COLOURS",
    "KINDS",
    "SEASONS",
    "STYLES",
    "TIMES",
    "Clip",
    "Rendered",
    "Scene",
    "Shot",
    "flow",
    "render",
]
