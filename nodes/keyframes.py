"""AdaFlowKeyframeSelect: clips where the content changes, and which keyframes each step uses."""

import re

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..adaflow.errors import InputError, require_one_of
from ..adaflow.keyframes import LOOKAHEAD, Clips, CutThresholds, KeyframeDraws, cut_clips
from ..adaflow.picture import yt_picture
from ..adaflow.plan import EditPlan
from .common import preview_picture
from .patching.memory import halved
from .types import CATEGORY, Descriptors, Plan
from .validation import CheckedNode

MODES = ["resample", "fixed", "schedule"]


def parse_schedule(text: str, where: str) -> tuple[tuple[int, ...], ...]:
    """Keyframes of step 0, 1, ... from text such as ``0, 40, 95; 3, 42, 90``.

    Raises:
        InputError: anything else than whole numbers, commas and semicolons.
    """
    if not re.fullmatch(r"[0-9\s,;]*", text) or re.search(r"[0-9]{10}", text):
        raise InputError(where, "schedule", repr(text[:80]), "frame numbers like 0, 40, 95; 3, 42, 90 (one set a step)")
    steps = [[int(number) for number in re.findall(r"[0-9]+", step)] for step in re.split(r"[;\n]", text)]
    return tuple(tuple(step) for step in steps if step)


class AdaFlowKeyframeSelect(CheckedNode):
    """Adaptive Keyframe Selection."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowKeyframeSelect",
            display_name="AdaFlow Keyframe Select",
            category=CATEGORY,
            description="Cuts the clip where its content changes; one keyframe is edited in each part. The picture is "
            "the clip's middle column over time: red lines are cuts, yellow ticks the first step's keyframes.",
            inputs=[
                Descriptors.Input("descriptors", tooltip="From AdaFlow DDIM Invert or AdaFlow Extract Descriptors."),
                io.Float.Input(
                    "mean_threshold",
                    default=0.75,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Cosine from -1 to 1, default 0.75. Cut when a frame's mean similarity to the clip's first "
                    "frame is below. Higher cuts more often: more keyframes, closer to the source, more work.",
                ),
                io.Float.Input(
                    "window_threshold",
                    default=0.6,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Cosine from -1 to 1, default 0.6. Cut when any small window is less similar than this: "
                    "catches small things that appear. Higher cuts more often.",
                ),
                io.Int.Input(
                    "max_clip",
                    default=400,
                    min=1,
                    max=100000,
                    tooltip="Frames, 1 to 100000, default 400. A clip is cut at this length at the latest. Lower it "
                    "for more keyframes; 1 makes every frame a keyframe.",
                ),
                io.Combo.Input(
                    "draw_mode",
                    options=MODES,
                    default="resample",
                    tooltip="resample (default): new keyframes at every step, as published. fixed: one draw for all "
                    "steps, so the keyframe preview is exactly what the edit keeps. schedule: the frames given below.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=True,
                    tooltip="Of the keyframe draws, 0 to 4294967295, default 0. The same seed draws the same frames.",
                ),
                io.String.Input(
                    "schedule",
                    default="",
                    optional=True,
                    tooltip="For draw mode schedule: frame numbers from 0, one in each clip, as 0, 40, 95. A semicolon "
                    "starts the next step; the last set stands for all later steps.",
                ),
            ],
            outputs=[
                Plan.Output(display_name="plan", tooltip="Clips, keyframes and matches, for the edit nodes."),
                io.Image.Output(display_name="picture", tooltip="y-t slice with the cuts and keyframes."),
                io.Int.Output(display_name="keyframes", tooltip="Keyframes in one step: the number of clips."),
            ],
        )

    @classmethod
    def check_constants(cls, constants: dict, wired: dict) -> None:
        """The schedule can be read."""
        parse_schedule(constants.get("schedule", ""), "AdaFlowKeyframeSelect")

    @classmethod
    def execute(
        cls, descriptors, mean_threshold, window_threshold, max_clip, draw_mode, seed, schedule=""
    ) -> io.NodeOutput:
        where = "AdaFlowKeyframeSelect"
        for name, value in (("mean_threshold", mean_threshold), ("window_threshold", window_threshold)):
            if not -1.0 <= value <= 1.0:
                raise InputError(where, name, value, "a cosine from -1 to 1")
        require_one_of(draw_mode, MODES, where, "draw_mode")
        if max_clip < 1:
            raise InputError(where, "max_clip", max_clip, "at least 1 frame")
        device = comfy.model_management.get_torch_device()
        progress = comfy.utils.ProgressBar(descriptors.frames)

        def on_progress(frames: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(frames, descriptors.frames)

        thresholds = CutThresholds(mean_threshold, window_threshold, max_clip)
        clips = _cut(descriptors, thresholds, device, on_progress)
        draws = KeyframeDraws(draw_mode, seed, parse_schedule(schedule, where))
        try:
            plan = EditPlan(descriptors, clips, draws, device=device)
        except ValueError as error:
            raise InputError(where, "schedule", f"{schedule!r}: {error}", "one keyframe in each clip") from error
        picture = yt_picture(descriptors.slice_rgb(), clips, plan.keyframes(0))
        return io.NodeOutput(plan, picture, len(clips), ui=preview_picture(picture, cls))


def _cut(descriptors, thresholds: CutThresholds, device, on_progress) -> Clips:
    """The clips, compared with fewer frames in one go when memory runs out."""
    lookahead = LOOKAHEAD
    while True:
        try:
            return cut_clips(
                lambda frames: descriptors.tokens(frames, device=device),
                descriptors.frames,
                descriptors.size,
                thresholds,
                lookahead,
                on_progress,
            )
        except RuntimeError as error:
            doing = "to compare descriptors of {}x{} tokens".format(*descriptors.size[::-1])
            lookahead = halved(error, lookahead, doing, "use a smaller size", device)
