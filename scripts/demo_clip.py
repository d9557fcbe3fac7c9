"""A small moving scene drawn by code, with cuts and sound: what the demo and the tests edit when no video is given."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SOUND_RATE = 44100


def shot_frame(shot: int, time: float, width: int, height: int) -> np.ndarray:
    """One frame (height, width, 3) uint8 of ``shot``, ``time`` seconds in: a gradient that pans, a disc and a box."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    scale = min(width, height)
    x, y = x / scale, y / scale
    pan = 0.12 * time
    hue = 2.1 * shot
    sky = [0.5 + 0.35 * np.sin(hue + k * 2.1 + 2.2 * (x + pan) + 1.3 * y) for k in range(3)]
    frame = np.stack(sky, -1)
    stripes = np.sin((14 + 6 * shot) * (x + 2 * pan) + 4 * shot * y) > 0.9
    frame[stripes] *= 0.75
    middle = width / scale / 2
    disc = (x - middle - 0.28 * math.sin(1.7 * time)) ** 2 + (y - 0.42 - 0.1 * math.cos(2.3 * time)) ** 2
    frame[disc < (0.14 + 0.03 * shot) ** 2] = [(0.95, 0.85, 0.2), (0.2, 0.3, 0.8), (0.9, 0.9, 0.95)][shot % 3]
    left = 0.15 + 0.2 * time
    box = (abs(x - left) < 0.1) & (abs(y - 0.78) < 0.12)
    frame[box] = [(0.75, 0.15, 0.2), (0.95, 0.6, 0.1), (0.1, 0.5, 0.3)][shot % 3]
    return (frame.clip(0, 1) * 255).astype(np.uint8)


def render(
    path: Path, frames: int = 48, width: int = 256, height: int = 256, fps: int = 12, shots: int = 2, sound: bool = True
) -> Path:
    """Write the scene as H.264 (and AAC) to ``path`` and return it. Width and height are even, in pixels."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"crf": "16"}
        audio = container.add_stream("aac", rate=SOUND_RATE, layout="mono") if sound else None
        for index in range(frames):
            shot = index * shots // frames
            picture = shot_frame(shot, index / fps, width, height)
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
