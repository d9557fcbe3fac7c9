"""Best cosines between the tokens of many pairs of frames as one Triton kernel: no product is ever written to memory.

A program takes some tokens of one frame through all tokens of another. What its own tokens find best stays with it;
what the others find best is joined over programs by atomic maxima, whose order does not matter.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Tokens of both frames and channels that are multiplied at a time, and how Triton runs it."""

    rows: int = 128
    columns: int = 128
    channels: int = 64
    warps: int = 8
    stages: int = 3


@triton.jit(
    do_not_specialize=["seconds", "tiles", "tokens", "first_frame", "first_other", "second_frame", "second_other"]
)
def _best_cosines(
    first, second, of_first, of_second, seconds, tiles, tokens, channels,
    first_frame, first_other, second_frame, second_other,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    EVEN: tl.constexpr, SAME: tl.constexpr, RATES_FIRST: tl.constexpr, RATES_SECOND: tl.constexpr,
):  # fmt: skip
    """Tokens past the last are the last one again, which changes no maximum.

    Programs of the same pair of frames come one after the other, so that what they read is in the cache.
    """
    pair = tl.program_id(0) // tiles
    a, b = (pair // seconds).to(tl.int64), (pair % seconds).to(tl.int64)
    if (not SAME) or a < b:
        place = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
        row = tl.minimum(place, tokens - 1)
        channel = tl.arange(0, CHANNELS)
        a_rows = first + a * tokens * channels + row[:, None] * channels + channel[None, :]
        best = tl.full([ROWS], float("-inf"), tl.float32)
        for start in range(0, tokens, COLUMNS):
            other = start + tl.arange(0, COLUMNS)
            column = tl.minimum(other, tokens - 1)
            b_rows = second + b * tokens * channels + column[None, :] * channels + channel[:, None]
            cosines = tl.zeros([ROWS, COLUMNS], tl.float32)
            for done in range(0, channels, CHANNELS):
                if EVEN:
                    left, right = tl.load(a_rows + done), tl.load(b_rows + done)
                else:
                    inside = done + channel < channels
                    left = tl.load(a_rows + done, mask=inside[None, :], other=0.0)
                    right = tl.load(b_rows + done, mask=inside[:, None], other=0.0)
                cosines = tl.dot(left, right, cosines, input_precision="ieee")
            best = tl.maximum(best, tl.max(cosines, 1))
            if RATES_SECOND:
                where = of_second + a * second_other + b * second_frame + other
                tl.atomic_max(where, tl.max(cosines, 0), mask=other < tokens, sem="relaxed")
        if RATES_FIRST:
            tl.store(of_first + b * first_other + a * first_frame + place, best, mask=place < tokens)


def rate(
    first: Tensor, second: Tensor, of_second: Tensor | None, of_first: Tensor | None, tiles: Tiles | None = None
) -> None:
    """Best cosine of every token of some frames to each of some others; of twice the same tensor: among themselves.

    Among themselves each pair of frames is multiplied once, and what a frame's tokens find in itself is not rated.

    Args:
        first, second: L2-normalised descriptors, float16 or float32, (frames, tokens, channels).
        of_second: gets what second's tokens find in each of first, (first, second, tokens) float32, strided by frames
            as it may be; None: not wanted.
        of_first: what first's find in each of second, (second, first, tokens); ``of_second`` where both are the same.
        tiles: to be tried in place of the default.
    """
    same, tiles = first is second, tiles or Tiles()
    first, second = first.contiguous(), second.contiguous()
    frames, tokens, channels = first.shape
    if of_second is not None:
        of_second.fill_(torch.finfo(torch.float32).min)
    for_first, for_second = (first if rated is None else rated for rated in (of_first, of_second))
    count = triton.cdiv(tokens, tiles.rows)
    with torch.cuda.device_of(first):
        _best_cosines[(frames * len(second) * count,)](
            first, second, for_first, for_second, len(second), count, tokens, channels,
            for_first.stride(1), for_first.stride(0), for_second.stride(1), for_second.stride(0),
            ROWS=tiles.rows, COLUMNS=tiles.columns, CHANNELS=tiles.channels, EVEN=channels % tiles.channels == 0,
            SAME=same, RATES_FIRST=of_first is not None, RATES_SECOND=of_second is not None,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
