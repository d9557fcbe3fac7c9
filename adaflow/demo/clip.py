"""Clips of the demo world: shots of one length after another, each a scene under a camera that pans or stands still."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import require
from .layout import DRIFT, generator
from .scene import Scene
from .world import Rendered, flow, render

_FASTEST = 0.25  # of a random pan past an object, picture heights a second


@dataclass(frozen=True)
class Shot:
    """Some frames of one scene.

    Attributes:
        camera: sideways position at the first frame, picture heights.
        speed: of the camera, picture heights a second; 0 stands still.
        clock: seconds at the first frame.
    """

    scene: Scene
    frames: int
    camera: float
    speed: float
    clock: float


@dataclass(frozen=True)
class Clip:
    """Shots with a cut between each two.

    Raises:
        InputError: if there is no shot, a shot has no frame, or the shots differ in an attribute of their scenes.
    """

    shots: tuple[Shot, ...]
    fps: float = 12

    def __post_init__(self):
        require(len(self.shots) > 0, "Clip", "shots", "empty", "at least one")
        lengths = [shot.frames for shot in self.shots]
        require(min(lengths) > 0, "Clip", "shots", f"of {lengths} frames", "at least one frame each")
        require(self.fps > 0, "Clip", "fps", self.fps, "a positive number")
        kinds = {replace(shot.scene, seed=0) for shot in self.shots}
        require(
            len(kinds) == 1, "Clip", "shots", f"of {len(kinds)} sets of attributes", "scenes that differ in seed only"
        )

    @classmethod
    def random(cls, seed: int, frames: int, shots: int, fps: float = 12, **attributes: str) -> "Clip":
        """A clip whose attributes are drawn from the seed, but for those given.

        Where an object moves on, the camera may follow it; in the other shots the camera pans past or stands still.
        """
        require(1 <= shots <= frames, "Clip", "shots", shots, f"1 to {frames}, the number of frames")
        draws = generator(seed, "clip")
        scene = replace(Scene.random(seed), **attributes)
        made = []
        for length in _lengths(draws, frames, shots):
            own = replace(scene, seed=int(draws.integers(2**63)))
            made.append(_random_shot(draws, own, length, length / fps))
        return cls(tuple(made), fps)

    def __len__(self) -> int:
        return sum(shot.frames for shot in self.shots)

    @property
    def cuts(self) -> tuple[int, ...]:
        """First frames of the shots after the first."""
        return tuple(accumulate(shot.frames for shot in self.shots[:-1]))

    def edited(self, **attributes: str) -> "Clip":
        """The same clip with some attributes changed: the truth of an edit."""
        return replace(self, shots=tuple(replace(s, scene=replace(s.scene, **attributes)) for s in self.shots))

    def caption(self, variant: int = 0) -> str:
        """Of any of its frames; see :meth:`Scene.caption`."""
        return self.shots[0].scene.caption(variant)

    def render(self, first: int, count: int, height: int, width: int, device="cpu") -> Rendered:
        """Frames ``first`` to ``first + count - 1``; a frame does not depend on which others are rendered with it."""
        return render(*self._views(range(first, first + count)), height, width, device)

    def flow(self, first: int, count: int, height: int, width: int, device="cpu") -> tuple[Tensor, Tensor]:
        """Exact flow from each of ``count`` frames to the next, and where both see the point; see :func:`world.flow`.

        Before a cut and at the end of the clip nothing is visible and the flow is 0.
        """
        start = range(first, first + count)
        last = {cut - 1 for cut in (*self.cuts, len(self))}
        following = [frame if frame in last else frame + 1 for frame in start]
        scenes, camera0, clock0 = self._views(start)
        _, camera1, clock1 = self._views(following)
        moved, visible = flow(scenes, camera0, clock0, camera1, clock1, height, width, device)
        goes_on = torch.tensor([frame not in last for frame in start], device=visible.device)
        return moved, visible & goes_on[:, None, None]

    def _views(self, frames) -> tuple[list[Scene], Tensor, Tensor]:
        """Scene, camera and clock of each of some frames."""
        require(
            len(frames) > 0 and frames[0] >= 0 and frames[-1] < len(self),
            "Clip",
            "frames",
            f"{frames[0]} to {frames[-1]}" if len(frames) else "none",
            f"frames from 0 to {len(self) - 1}",
        )
        scenes, camera, clock = [], [], []
        for frame in frames:
            index = bisect_right(self.cuts, frame)
            shot = self.shots[index]
            seconds = (frame - (0, *self.cuts)[index]) / self.fps
            scenes.append(shot.scene)
            camera.append(shot.camera + shot.speed * seconds)
            clock.append(shot.clock + seconds)
        return scenes, torch.tensor(camera, dtype=torch.float64), torch.tensor(clock, dtype=torch.float64)


def _lengths(draws, frames: int, shots: int) -> list[int]:
    """Frames of each shot, at most about twice as many in one as in another."""
    shares = draws.uniform(1, 2, shots).cumsum()
    edges = [0, *(int(edge) for edge in (shares / shares[-1] * (frames - shots)).round())]
    return [1 + after - before for before, after in pairwise(edges)]


def _random_shot(draws, scene: Scene, frames: int, seconds: float) -> Shot:
    """A camera path under which the object stays wholly inside the picture."""
    clock = float(draws.uniform(0, 60))
    own = scene.velocity
    stray = min(2 * DRIFT, _FASTEST * seconds) * float(draws.choice([-1, 1]) * draws.uniform(0.4, 1))
    begin = float(draws.uniform(max(-DRIFT, -DRIFT - stray), min(DRIFT, DRIFT - stray)))
    still = bool(draws.random() < 0.4) and abs(own) * seconds <= 2 * DRIFT
    if still:
        half = DRIFT - abs(own) * seconds / 2
        begin = float(draws.uniform(-half, half)) + own * seconds / 2
    speed = 0.0 if still else own + stray / seconds
    return Shot(scene, frames, scene.follow(clock) + begin, speed, clock)
