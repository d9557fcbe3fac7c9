"""A clip of the demo world as a video file with sound: what the demo and the tests edit when no video is given."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adaflow.demo import ATTRIBUTES, Clip

DEMO_STEPS = 16
# By what is changed: around an object all is to stay as it was, a scene changes as a whole.
OBJECT_EDIT = {"cfg": 1.0, "refine": 0}
SCENE_EDIT = {"cfg": 2.0, "refine": 1}
__all__ = ["ATTRIBUTES", "DEMO_STEPS", "demo_clip", "demo_settings", "render"]
SOUND_RATE = 44100
SEED = 75  # two shots of a car, one that follows it and one that stands still
CHUNK = 16  # frames drawn at once


def demo_settings(changed: str = "") -> dict[str, dict[str, float]]:
    """What suits the demo model, by node and input.

    Its descriptors of one shot differ by 0.02, those of two by 0.1 and more.

    Args:
        changed: the attribute that is edited, if it is one.
    """
    edit = OBJECT_EDIT if changed == "colour" else SCENE_EDIT
    return {
        "AdaFlowDDIMInvert": {"refine": edit["refine"]},
        "AdaFlowKeyframeSelect": {"mean_threshold": 0.94, "window_threshold": 0.5},
        "AdaFlowJointKeyframeEdit": {"cfg": edit["cfg"], "feature_share": 1.0, "attention_share": 1.0},
        "KSampler": {"cfg": edit["cfg"]},
    }


def demo_clip(frames: int = 96, shots: int = 2, fps: int = 12) -> Clip:
    """A red car on a summer's day."""
    return Clip.random(SEED, frames, shots, fps, kind="car", colour="red", season="summer", time="day", style="photo")


def render(
    path: Path,
    frames: int = 48,
    width: int = 192,
    height: int = 128,
    fps: int = 12,
    shots: int = 2,
    sound: bool = True,
    **edited: str,
) -> Path:
    """Write the demo clip as H.264 (and AAC) to ``path`` and return it.

    Args:
        width: even and at least ``height``, which is even too; pixels.
        edited: attributes that differ from the demo clip's, such as ``colour="blue"``: the truth of an edit.
    """
    clip = demo_clip(frames, shots, fps).edited(**edited)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"crf": "12"}
        audio = container.add_stream("aac", rate=SOUND_RATE, layout="mono") if sound else None
        for first in range(0, frames, CHUNK):
            images = clip.render(first, min(CHUNK, frames - first), height, width).images
            for picture in (images * 255).round().byte().movedim(1, -1).numpy():
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            _tone(container, audio, frames / fps)
    return path


def _tone(container, stream, seconds: float) -> None:
    """A tone that rises and falls, mono."""
    samples = round(seconds * SOUND_RATE)
    time = np.arange(samples) / SOUND_RATE
    wave = 0.2 * np.sin(2 * math.pi * (330 * time + 20 * np.sin(2 * time)))
    for start in range(0, samples, 1024):
        piece = wave[None, start : start + 1024].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, start, Fraction(1, SOUND_RATE)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
