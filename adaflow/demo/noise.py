"""Value noise by integer hashing: the same on every device and for every batch, up to rounding."""

import torch
from torch import Tensor

_MULTIPLIERS = (0x1B873593CC9E2D51, 0x2545F4914F6CDD1D)
_LOW = 0x7FFFFFFF


def hashed(seed: Tensor, salt: int, *indices: Tensor) -> Tensor:
    """A number in 0 .. 1 for each lattice point.

    Args:
        seed: int64, of a shape that broadcasts with the indices.
        salt: tells apart the uses of one seed.
        indices: integer lattice positions, int64.
    """
    state = seed + salt * _MULTIPLIERS[0] % 2**61
    for index in (torch.zeros_like(seed), *indices):
        state = (state ^ index) * _MULTIPLIERS[1]
        state = state ^ ((state >> 31) & _LOW)
        state = state * _MULTIPLIERS[0]
        state = state ^ ((state >> 29) & _LOW)
    return ((state >> 7) & 0xFFFFFF).float() / 0x1000000


def noise_line(seed: Tensor, salt: int, x: Tensor) -> Tensor:
    """Smooth noise of one coordinate in 0 .. 1, lattice points at whole numbers; seed broadcasts with x."""
    cell = x.floor()
    index = cell.long()
    return torch.lerp(hashed(seed, salt, index), hashed(seed, salt, index + 1), _smooth(x - cell))


def noise_plane(seed: Tensor, salt: int, x: Tensor, y: Tensor) -> Tensor:
    """Smooth noise of a plane in 0 .. 1, lattice points at whole numbers.

    The lattice points that the picture needs are hashed once and spread to the pixels by two products of matrices.

    Args:
        seed: (n, 1, 1) int64.
        x: ascending along a row, (n, 1, width).
        y: ascending down a column, (n or 1, height, 1).

    Returns:
        (n, height, width).
    """
    across, columns = _hats(x[:, 0])
    down, rows = _hats(y[:, :, 0])
    lattice = hashed(seed, salt, columns[:, None, :], rows[:, :, None])
    return down @ lattice @ across.transpose(1, 2)


def _hats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (n, pixels, points) of the lattice points around x (n, pixels), and the points' indices (n, points)."""
    cell = x.floor()
    first = cell[:, :1]
    points = torch.arange(int((x[:, -1] - x[:, 0]).max()) + 3, device=x.device)
    place = cell - first + _smooth(x - cell)
    weights = (1 - (place[..., None] - points).abs()).clamp_(min=0)
    return weights, first.long() + points


def _smooth(t: Tensor) -> Tensor:
    return t * t * (3 - 2 * t)
