"""The y-t picture of a keyframe selection."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .keyframes import Clips

CUT, KEYFRAME = (255, 64, 64), (255, 221, 51)
WIDEST = 8192  # pixels


def yt_picture(slice_rgb: Tensor, clips: Clips, keyframes: tuple[int, ...], height: int = 384) -> Tensor:
    """One column of each frame side by side; cuts as red lines, keyframes as yellow ticks at top and bottom.

    Args:
        slice_rgb: (frames, rows, 3) in 0 .. 1.
        keyframes: frame numbers to mark.
        height: of the slice in the picture, pixels.

    Returns:
        (1, height + 32, width, 3) in 0 .. 1; every frame is at least 1 pixel wide, but for more than ``WIDEST`` frames.
    """
    frames = slice_rgb.shape[0]
    per_frame = min(max(1, min(16, 1024 // frames)), WIDEST / frames)
    pixels = (slice_rgb.transpose(0, 1).clamp(0, 1) * 255).to(torch.uint8).numpy()
    band = Image.fromarray(pixels).resize((round(frames * per_frame), height), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (band.width, height + 32))
    picture.paste(band, (0, 16))
    draw = ImageDraw.Draw(picture)
    for start in clips.starts[1:]:
        at = int(start * per_frame)
        draw.line([(at, 0), (at, picture.height)], fill=CUT, width=max(1, int(per_frame) // 4))
    for keyframe in keyframes:
        left = int(keyframe * per_frame)
        right = left + max(int(per_frame), 3) - 1
        draw.rectangle([left, 0, right, 13], fill=KEYFRAME)
        draw.rectangle([left, height + 18, right, height + 31], fill=KEYFRAME)
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]
