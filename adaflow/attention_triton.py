"""Attention as Triton kernels: to kept keys and values, read by index and never gathered to memory, and to a prompt.

The first is an online softmax over blocks of keys (arXiv 2205.14135), all heads and all query frames of a chunk in one
launch. A prompt's keys are few: a program holds those of its head and walks over queries. Half precision comes in and
goes out, scores and sums are kept in float32.
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


@triton.jit(do_not_specialize=["tokens", "length"])
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


@dataclass(frozen=True)
class PromptTiles:
    """Queries that one program works on at a time, how many times, and how Triton runs it."""

    queries: int
    steps: int
    warps: int
    stages: int


def prompt_tiles(padded: int, span: int) -> PromptTiles:
    """Tiles for heads and prompts that take so many channels and keys, to be overruled in benchmarks."""
    if padded <= 64 and span <= 80:
        return PromptTiles(64, 8, 4, 3)
    if padded + span <= 256:
        return PromptTiles(128, 4, 8, 2)
    return PromptTiles(64, 4, 8, 1 if padded > 128 else 2)


@triton.jit
def _prompt_scores(
    queries, k, keys, row_stride,
    START: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Scores of KEYS keys from START on, minus infinity past the last."""
    place, channel = START + tl.arange(0, KEYS), tl.arange(0, PADDED)
    mask = (place < keys)[None, :] & (channel < CHANNELS)[:, None]
    loaded = tl.load(k + place[None, :] * row_stride + channel[:, None], mask=mask, other=0.0)
    return tl.where((place < keys)[None, :], tl.dot(queries, loaded, input_precision="ieee"), float("-inf"))


@triton.jit
def _prompt_values(
    weights, v, out, keys, row_stride,
    START: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """``out`` and the weighted sum of KEYS values from START on."""
    place, channel = START + tl.arange(0, KEYS), tl.arange(0, PADDED)
    mask = (place < keys)[:, None] & (channel < CHANNELS)[None, :]
    loaded = tl.load(v + place[:, None] * row_stride + channel[None, :], mask=mask, other=0.0)
    return tl.dot(weights.to(loaded.dtype), loaded, out, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens", "keys", "share"])
def _prompt_attention(
    q, k, v, out, tokens, keys, share, row_stride, scale,
    QUERIES: tl.constexpr, STEPS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """QUERIES * STEPS queries of one head of one image; FIRST keys and, if there are more, up to REST others.

    ``share`` images in a row have the same keys and values.

    What is loaded of keys and values does not change with the step: the compiler takes it out of the loop.
    """
    image, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, PADDED)
    q += image * tokens * row_stride + head * CHANNELS
    out += image * tokens * row_stride + head * CHANNELS
    k += image // share * keys * row_stride + head * CHANNELS
    v += image // share * keys * row_stride + head * CHANNELS
    begin = tl.program_id(0) * (QUERIES * STEPS)
    for start in range(begin, tl.minimum(begin + QUERIES * STEPS, tokens), QUERIES):
        place = start + tl.arange(0, QUERIES)
        where = place[:, None] * row_stride + channel[None, :]
        mask = (place < tokens)[:, None] & (channel < CHANNELS)[None, :]
        queries = tl.load(q + where, mask=mask, other=0.0)
        scores = _prompt_scores(queries, k, keys, row_stride, 0, FIRST, CHANNELS, PADDED)
        best = tl.max(scores, 1)
        if REST:
            others = _prompt_scores(queries, k, keys, row_stride, FIRST, REST, CHANNELS, PADDED)
            best = tl.maximum(best, tl.max(others, 1))
        best *= scale
        weights = tl.exp2(scores * scale - best[:, None])
        total = tl.sum(weights, 1)
        mean = tl.zeros([QUERIES, PADDED], tl.float32)
        mean = _prompt_values(weights, v, mean, keys, row_stride, 0, FIRST, CHANNELS, PADDED)
        if REST:
            weights = tl.exp2(others * scale - best[:, None])
            total += tl.sum(weights, 1)
            mean = _prompt_values(weights, v, mean, keys, row_stride, FIRST, REST, CHANNELS, PADDED)
        tl.store(out + where, (mean / total[:, None]).to(out.dtype.element_ty), mask=mask)


def key_tiles(keys: int) -> tuple[int, int]:
    """Two powers of two, the first of 16 or more, the second perhaps 0, that hold so many keys with the least to spare.

    77 keys take 64 + 16, not 128.
    """
    whole = max(16, triton.next_power_of_2(keys))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(max(1, keys - first)))
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, tiles: PromptTiles | None = None) -> Tensor:
    """Each image's queries over the keys and values of its prompt.

    Args:
        q: (images, tokens, heads * channels), float16, bfloat16 or float32.
        k, v: (prompts, keys, heads * channels), each of images / prompts consecutive images, of the same type, at most
            256 keys.
        tiles: to be tried in place of the default.

    Returns:
        (images, tokens, heads * channels).
    """
    (images, tokens, width), keys = q.shape, k.shape[1]
    channels, (first, rest) = width // heads, key_tiles(keys)
    padded = max(16, triton.next_power_of_2(channels))
    q, k, v = (x.contiguous() for x in (q, k, v))
    tiles, out = tiles or prompt_tiles(padded, first + rest), torch.empty_like(q)
    with torch.cuda.device_of(q):
        _prompt_attention[(triton.cdiv(tokens, tiles.queries * tiles.steps), heads, images)](
            q, k, v, out, tokens, keys, images // len(k), width, math.log2(math.e) / math.sqrt(channels),
            QUERIES=tiles.queries, STEPS=tiles.steps, FIRST=first, REST=rest, CHANNELS=channels, PADDED=padded,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out
