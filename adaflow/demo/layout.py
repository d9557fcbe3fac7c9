"""Where everything of a scene stands and how it moves: numbers drawn from the seed, and the layers' translations.

Lengths are picture heights: x to the right from the picture's middle, y down from its top edge. Times are seconds.
"""

from enum import IntEnum
from functools import lru_cache
from math import pi

import numpy as np
import torch
from torch import Tensor

DRIFT = 0.15  # how far the camera may stray from the place that follows the object
_MARGIN = 0.02  # between the object and the picture's edge
_SWAY = 0.012  # the most an object sways to a side


class Layer(IntEnum):
    """Ids of the layers, back to front."""

    SKY = 0
    CLOUDS = 1
    FAR_HILLS = 2
    NEAR_HILLS = 3
    GROVE = 4
    GROUND = 5
    TREES = 6
    OBJECT = 7
    FOREGROUND = 8


_PARALLAX = {
    Layer.SKY: 0.0,
    Layer.CLOUDS: 0.1,
    Layer.FAR_HILLS: 0.25,
    Layer.NEAR_HILLS: 0.5,
    Layer.GROVE: 0.75,
    Layer.GROUND: 1.0,
    Layer.TREES: 1.0,
    Layer.OBJECT: 1.0,
    Layer.FOREGROUND: 1.3,
}

# Each number of a scene is drawn uniformly from these limits; those of the kind come in place of the common ones.
_COMMON = {
    "horizon": (0.52, 0.64),
    "sun_x": (-0.9, 0.9),  # in half picture widths
    "sun_y": (0.1, 0.26),
    "sun_size": (0.035, 0.06),
    "crescent": (0.3, 1.6),
    "wind": (-0.012, 0.012),
    "cloud_cover": (0.0, 1.0),
    "far_height": (0.08, 0.26),
    "far_detail": (1.2, 3.2),
    "near_height": (0.04, 0.16),
    "near_detail": (0.8, 2.6),
    "hill_hue": (0.0, 1.0),
    "ground_hue": (0.0, 1.0),
    "patches": (0.0, 0.6),
    "haze": (0.0, 1.0),
    "sky_depth": (0.45, 0.85),
    "ground_swell": (0.005, 0.03),
    "grove_density": (0.1, 0.9),
    "grove_conifers": (-0.3, 1.3),
    "grove_size": (0.09, 0.15),
    "tree_density": (0.0, 0.85),
    "tree_conifers": (-0.3, 1.3),
    "tree_size": (0.26, 0.4),
    "tree_base": (0.015, 0.045),  # under the horizon
    "foliage_hue": (0.0, 1.0),
    "foreground": (-0.03, 0.08),  # height; none where it would be thin
    "band_far": (0.05, 0.08),  # road: its edges behind and before the object's base; lake: its shore under the horizon
    "band_near": (0.03, 0.06),
    "place": (-1.0, 1.0),
    "facing": (-1.0, 1.0),
    "shape": (0.0, 1.0),
    "detail": (0.0, 1.0),
    "phase": (0.0, 1.0),
    "velocity": (0.0, 0.0),
    "sway": (0.0, 0.0),
    "lift": (0.0, 0.0),  # height of the bounce, or half the way up and down
    "period": (2.0, 4.0),
}
_KINDS = {
    "car": {"width": (0.46, 0.54), "tallness": (0.44, 0.5), "base": (0.82, 0.9), "velocity": (-0.16, 0.16)},
    "boat": {"width": (0.36, 0.5), "tallness": (0.95, 1.2), "base": (0.78, 0.88), "velocity": (-0.05, 0.05)}
    | {"sway": (0.0, _SWAY), "lift": (0.004, 0.01)},
    "ball": {"width": (0.22, 0.36), "tallness": (1.0, 1.0), "base": (0.76, 0.92), "lift": (-0.08, 0.2)}
    | {"period": (0.9, 1.4)},
    "balloon": {"width": (0.28, 0.4), "tallness": (1.36, 1.5), "base": (0.5, 0.72), "velocity": (-0.04, 0.04)}
    | {"sway": (0.0, _SWAY), "lift": (0.0, 0.03), "period": (5.0, 9.0)},
    "house": {"width": (0.36, 0.52), "tallness": (0.8, 0.95), "base": (0.76, 0.86)},
}
_STANDING = 0.04  # a car slower than this stands still
_THIN = 0.025  # a foreground lower than this is left out
_NAMES = (*_COMMON, "width", "tallness", "base")
_USES = ("layout", "attributes", "view", "clip")


def generator(seed: int, use: str) -> np.random.Generator:
    """The random numbers of one use of a seed; no use shares numbers with another."""
    return np.random.Generator(np.random.Philox(key=[seed, _USES.index(use)]))


@lru_cache(maxsize=4096)
def measures(seed: int, kind: str) -> dict[str, float]:
    """All numbers of a scene by name; those that the kind does not touch depend on the seed alone."""
    draws = generator(seed, "layout").random(len(_NAMES))
    limits = _COMMON | _KINDS[kind]
    values = {
        name: limits[name][0] + (limits[name][1] - limits[name][0]) * float(draw)
        for name, draw in zip(_NAMES, draws, strict=True)
    }
    values["facing"] = 1.0 if values["facing"] >= 0 else -1.0
    values["lift"] = max(values["lift"], 0.0)
    values["base"] = max(values["base"], values["width"] * values["tallness"] + values["lift"] + _MARGIN)
    values["foreground"] = values["foreground"] if values["foreground"] > _THIN else 0.0
    if kind == "car":
        values["velocity"] = values["velocity"] if abs(values["velocity"]) > _STANDING else 0.0
    if values["velocity"]:
        values["facing"] = 1.0 if values["velocity"] > 0 else -1.0
    return values


class Layout:
    """The numbers of n scenes as tensors.

    Attributes:
        scenes: the n scenes.
        seed: (n, 1, 1) int64.
        aspect: the picture's width over its height.
    """

    def __init__(self, scenes, aspect: float, device):
        self.scenes, self.aspect, self.device = list(scenes), aspect, torch.device(device)
        rows = [list(measures(scene.seed, scene.kind).values()) for scene in self.scenes]
        values = torch.tensor(rows, dtype=torch.float64)
        self._exact = dict(zip(_NAMES, values.unbind(1), strict=True))
        self._values = dict(zip(_NAMES, values.float().to(device)[..., None, None].unbind(1), strict=True))
        self.seed = torch.tensor([scene.seed for scene in self.scenes], device=device)[:, None, None]

    def __getitem__(self, name: str) -> Tensor:
        """One number of each scene, (n, 1, 1)."""
        return self._values[name]

    def rows(self, rows: slice) -> "Layout":
        """The layout of some of the scenes."""
        return Layout(self.scenes[rows], self.aspect, self.device)

    def table(self, values: dict, *attributes: str) -> Tensor:
        """Numbers of each scene, such as a colour, looked up by an attribute, or by two in a table of tables.

        Returns:
            (n, ..., 1, 1), where ... is the shape of what the table holds.
        """
        rows = []
        for scene in self.scenes:
            row = values
            for attribute in attributes:
                row = row[getattr(scene, attribute)]
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float32).to(self.device)[..., None, None]

    def only(self, attribute: str, value: str) -> Tensor:
        """1 for the scenes with an attribute and 0 for the others, (n, 1, 1)."""
        flags = [float(getattr(scene, attribute) == value) for scene in self.scenes]
        return torch.tensor(flags).to(self.device)[:, None, None]

    def shifts(self, camera: Tensor, clock: Tensor) -> Tensor:
        """Where the origin of each layer is in the picture, (n, layers, 2) float64; camera and clock are (n,)."""
        camera, clock = camera.double().cpu(), clock.double().cpu()
        parallax = torch.tensor([_PARALLAX[layer] for layer in Layer], dtype=torch.float64)
        x = -camera[:, None] * parallax
        y = torch.zeros_like(x)
        x[:, Layer.CLOUDS] += self._exact["wind"] * clock
        moved, lifted = self._motion(clock)
        x[:, Layer.OBJECT] += moved
        y[:, Layer.OBJECT] = self._exact["base"] - lifted
        return torch.stack((x, y), dim=-1)

    def _motion(self, clock: Tensor) -> tuple[Tensor, Tensor]:
        """The object's place in its world at a time: x of its middle, and height over its base; both (n,)."""
        get = self._exact
        room = (self.aspect / 2 - get["width"] / 2 - DRIFT - _SWAY - _MARGIN).clamp(min=0)
        turn = clock / get["period"] + get["phase"]
        x = get["place"] * room + get["velocity"] * clock + get["sway"] * torch.sin(pi * turn)
        ball = torch.tensor([scene.kind == "ball" for scene in self.scenes])
        bounce = 4 * (turn % 1) * (1 - turn % 1)
        return x, get["lift"] * torch.where(ball, bounce, torch.sin(2 * pi * turn))
