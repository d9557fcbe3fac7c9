"""Adaptive Keyframe Selection: clips cut where the content changes, a keyframe in each (arXiv 2502.05433, 3.2)."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .correspondence import nearest_tokens

LOOKAHEAD = 8


@dataclass(frozen=True)
class Clips:
    """A partition of frames 0 .. ``frames - 1`` into runs; ``starts`` are their ascending first frames, 0 first."""

    starts: tuple[int, ...]
    frames: int

    def __post_init__(self):
        bounds = [*self.starts, self.frames]
        if not self.starts or self.starts[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"clips start at {self.starts} of {self.frames} frames; expected ascending from 0")

    def __len__(self) -> int:
        return len(self.starts)

    def bounds(self, clip: int) -> tuple[int, int]:
        """First frame of a clip and the frame after its last."""
        return self.starts[clip], self.starts[clip + 1] if clip + 1 < len(self.starts) else self.frames

    def of(self, frame: int) -> int:
        """The clip that holds ``frame``."""
        return bisect_right(self.starts, frame) - 1


@dataclass(frozen=True)
class CutThresholds:
    """When a clip ends. Defaults are the paper's.

    Attributes:
        mean: cut when the mean best cosine to the reference frame is below this.
        window: cut when that mean in any window is below this.
        max_clip: cut when the clip has this many frames.
    """

    mean: float = 0.75
    window: float = 0.6
    max_clip: int = 400


def is_cut(similarity: Tensor, size: tuple[int, int], thresholds: CutThresholds) -> Tensor:
    """Whether each of some frames differs too much from the reference.

    Args:
        similarity: best cosine of each token of the reference, (frames, height * width).
        size: (height, width).

    Returns:
        (frames,) bool.
    """
    height, width = size
    side = min(max(1, max(height, width) // 16), height, width)
    maps = similarity.reshape(-1, 1, height, width)
    windows = F.avg_pool2d(maps, side, stride=max(1, side // 2))
    return (maps.mean(dim=(1, 2, 3)) < thresholds.mean) | (windows.amin(dim=(1, 2, 3)) < thresholds.window)


def cut_clips(
    tokens: Callable[[list[int]], Tensor],
    frames: int,
    size: tuple[int, int],
    thresholds: CutThresholds | None = None,
    lookahead: int = LOOKAHEAD,
    on_progress: Callable[[int], None] | None = None,
) -> Clips:
    """Cut a video into clips by comparing each frame with the first one of its clip.

    Args:
        tokens: frame numbers -> their normalised descriptors, (frames, height * width, channels).
        frames: number of frames of the video.
        size: (height, width) of a descriptor map.
        lookahead: frames compared with the reference in one go; does not change the result.
        on_progress: told the number of frames done; may raise to stop.
    """
    thresholds = thresholds or CutThresholds()
    starts = [0]
    reference = tokens([0])
    frame = 1
    while frame < frames:
        stop = min(frame + lookahead, frames, starts[-1] + thresholds.max_clip)
        cut = stop < frames and stop == starts[-1] + thresholds.max_clip
        if stop > frame:
            similarity, _ = nearest_tokens(reference.expand(stop - frame, -1, -1), tokens(list(range(frame, stop))))
            differs = is_cut(similarity, size, thresholds).nonzero()
            if len(differs):
                stop, cut = frame + int(differs[0]), True
        frame = stop
        if cut:
            starts.append(frame)
            reference = tokens([frame])
            frame += 1
        if on_progress:
            on_progress(frame)
    return Clips(tuple(starts), frames)


def draw_keyframes(clips: Clips, generator: np.random.Generator) -> tuple[int, ...]:
    """One frame of each clip, uniformly."""
    return tuple(int(generator.integers(*clips.bounds(clip))) for clip in range(len(clips)))


@dataclass(frozen=True)
class KeyframeDraws:
    """Which keyframes each sampling step uses.

    Attributes:
        mode: "resample" draws anew for each step, "fixed" keeps one draw, "schedule" takes the frames given.
        seed: of the draws; the draw of a step depends on the seed and the step alone.
        schedule: keyframes of step 0, 1, ...; the last entry stands for all later steps. Its frames need not follow
            the clips, but each clip must hold exactly one.
    """

    mode: str = "resample"
    seed: int = 0
    schedule: tuple[tuple[int, ...], ...] = ()

    def check(self, clips: Clips) -> None:
        """Raise ValueError unless the mode is known and a schedule has one keyframe in each clip."""
        if self.mode not in ("resample", "fixed", "schedule"):
            raise ValueError(f"draw mode is {self.mode!r}; expected resample, fixed or schedule")
        if self.mode != "schedule":
            return
        if not self.schedule:
            raise ValueError("no keyframes are given")
        for step, frames in enumerate(self.schedule):
            if any(not 0 <= frame < clips.frames for frame in frames):
                raise ValueError(f"step {step} of the schedule names {frames}; expected frames 0 to {clips.frames - 1}")
            if sorted(clips.of(frame) for frame in frames) != list(range(len(clips))):
                raise ValueError(
                    f"step {step} of the schedule names {frames}; expected one frame in each of the {len(clips)} "
                    f"clips, which start at {list(clips.starts)}"
                )

    def at(self, step: int, clips: Clips) -> tuple[int, ...]:
        """Ascending keyframes of one step."""
        if self.mode == "schedule":
            return tuple(sorted(self.schedule[min(step, len(self.schedule) - 1)]))
        step = 0 if self.mode == "fixed" else step
        return draw_keyframes(clips, np.random.default_rng((self.seed, step)))
