"""AdaFlowDemoClip: a clip of the demo world, to try a graph on without a file."""

import comfy.utils
import torch
from comfy_api.latest import io

from ..adaflow.demo import ATTRIBUTES, Clip
from ..adaflow.errors import require
from .types import CATEGORY
from .validation import CheckedNode

CHUNK = 16  # frames drawn at once
DEFAULTS = {"kind": "car", "colour": "red", "season": "summer", "time": "day", "style": "photo"}


class AdaFlowDemoClip(CheckedNode):
    """Frames of :class:`Clip`, and what they show."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowDemoClip",
            display_name="AdaFlow Demo Clip",
            category=CATEGORY,
            description="Draws a clip of the demo model's world, in several shots. The same seed with one attribute "
            "changed is the same clip with that changed: what a perfect edit would be.",
            inputs=[
                *(
                    io.Combo.Input(
                        name,
                        options=list(options),
                        default=DEFAULTS[name],
                        tooltip=f"{name.capitalize()}, as captions name it.",
                    )
                    for name, options in ATTRIBUTES.items()
                ),
                io.Int.Input(
                    "frames",
                    default=96,
                    min=2,
                    max=2000,
                    tooltip="Length in frames, 2 to 2000, default 96. At 192x128 a frame takes 0.3 MB of memory.",
                ),
                io.Int.Input("shots", default=2, min=1, max=16, tooltip="Shots with a cut between each two, 1 to 16."),
                io.Float.Input("fps", default=12.0, min=1.0, max=60.0, tooltip="Frames a second, 1 to 60, default 12."),
                io.Int.Input(
                    "width",
                    default=192,
                    min=64,
                    max=640,
                    step=64,
                    tooltip="Pixels, a multiple of 64, at least the height.",
                ),
                io.Int.Input("height", default=128, min=64, max=640, step=64, tooltip="Pixels, a multiple of 64."),
                io.Int.Input(
                    "seed",
                    default=75,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Decides the landscape, and how objects and camera move.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="All frames."),
                io.String.Output(display_name="caption", tooltip="What the clip shows: the source prompt."),
                io.Float.Output(display_name="fps", tooltip="Frames a second, for the save node."),
            ],
        )

    @classmethod
    def execute(cls, kind, colour, season, time, style, frames, shots, fps, width, height, seed) -> io.NodeOutput:
        where = "AdaFlowDemoClip"
        require(width >= height, where, "width", width, f"at least the height, {height}")
        require(shots <= frames, where, "shots", shots, f"at most the frames, {frames}")
        clip = Clip.random(seed, frames, shots, fps, kind=kind, colour=colour, season=season, time=time, style=style)
        images = torch.empty(frames, height, width, 3)
        bar = comfy.utils.ProgressBar(frames)
        for first in range(0, frames, CHUNK):
            count = min(CHUNK, frames - first)
            images[first : first + count] = clip.render(first, count, height, width).images.movedim(1, -1)
            bar.update(count)
        return io.NodeOutput(images, clip.caption(), float(fps))
