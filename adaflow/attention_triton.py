"""Extended attention over kept keys and values as one Triton kernel: they are read by index, never gathered to memory.

Online softmax over blocks of keys (arXiv 2205.14135), all heads and all query frames of a chunk in one launch. Half
precision comes in and goes out, sums are kept in float32.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHANNELS = 256  # of one head, rounded up to a power of two


@dataclass(frozen=True)
class Tiles:
    """Queries and keys that one program works on at a time, and how Triton runs it."""

    queries: int
    keys: int
    warps: int
    stages: int


def default_tiles(channels: int) -> Tiles:
    """Tiles for heads of so many channels, to be overruled by what ``benchmarks/attention.py`` finds."""
    if channels <= 128:
        return Tiles(128, 64, 8, 3)
    return Tiles(64, 32, 8, 2)


@triton.jit
def _attend(
    best, total, out, q, start, k, v, rows, length, row_stride, scale,
    KEYS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Take one block of kept keys and values into the running maximum, sum and weighted mean of values."""
    place = start + tl.arange(0, KEYS)
    row = tl.load(rows + place, mask=place < length, other=0).to(tl.int64) * row_stride
    channel = tl.arange(0, PADDED)
    inside = channel < CHANNELS
    keys = tl.load(k + row[None, :] + channel[:, None], mask=inside[:, None], other=0.0)
    scores = tl.dot(q, keys, input_precision="ieee")
    if TAIL:
        scores = tl.where((place < length)[None, :], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(best - higher)
    values = tl.load(v + row[:, None] + channel[None, :], mask=inside[None, :], other=0.0)
    out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, 1), out


@triton.jit
def _slim_attention(
    q, k, v, rows, out, tokens, length, row_stride, heads, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one frame; ``scale`` has the factor that turns exp2 into exp."""
    frame, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, PADDED)
    where = (frame * tokens + place)[:, None] * row_stride + head * CHANNELS + channel[None, :]
    mask = (place < tokens)[:, None] & (channel < CHANNELS)[None, :]
    queries = tl.load(q + where, mask=mask, other=0.0)
    k += head * CHANNELS
    v += head * CHANNELS
    rows += frame * length
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES, PADDED], tl.float32)
    whole = length // KEYS * KEYS
    for start in range(0, whole, KEYS):
        best, total, mean = _attend(
            best, total, mean, queries, start, k, v, rows, length, row_stride, scale, KEYS, CHANNELS, PADDED, False
        )  # fmt: skip
    if whole < length:
        best, total, mean = _attend(
            best, total, mean, queries, whole, k, v, rows, length, row_stride, scale, KEYS, CHANNELS, PADDED, True
        )  # fmt: skip
    tl.store(out + where, (mean / total[:, None]).to(out.dtype.element_ty), mask=mask)


def slim_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, kept: Tensor, tiles: Tiles | None = None) -> Tensor:
    """Each query frame over the tokens kept for it.

    Args:
        q: (query_frames, tokens, heads * channels), float16, bfloat16 or float32.
        k, v: (frames, tokens, heads * channels), of the same type.
        kept: (query_frames, kept_tokens) int32 flat indices ``frame * tokens + token`` into ``k`` and ``v``.
        tiles: to be tried in place of the default.

    Returns:
        (query_frames, tokens, heads * channels).

    Raises:
        ValueError: a head has more than 256 channels.
    """
    frames, tokens, width = q.shape
    channels = width // heads
    padded = max(16, triton.next_power_of_2(channels))
    if padded > MOST_CHANNELS:
        raise ValueError(f"heads of {channels} channels, at most {MOST_CHANNELS}")
    q, k, v, kept = (x.contiguous() for x in (q, k, v, kept))
    tiles, out = tiles or default_tiles(channels), torch.empty_like(q)
    grid = (triton.cdiv(tokens, tiles.queries), frames * heads)
    with torch.cuda.device_of(q):
        _slim_attention[grid](
            q, k, v, kept, out, tokens, kept.shape[1], width, heads, math.log2(math.e) / math.sqrt(channels),
            QUERIES=tiles.queries, KEYS=tiles.keys, CHANNELS=channels, PADDED=padded,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out
