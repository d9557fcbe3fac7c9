"""Triton kernels for what lies between a UNet's convolutions and matrix products: norms, activations, sums.

They work on tokens, (images, tokens, channels) contiguous, which is how a channels_last image lies in memory. Values
come in and go out in the tensor's own type, all sums are kept in float32. What they compute is said in ``fused.py``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # values that one program works on at a time
STEPS = 8  # tiles that one program sums up
PARTS = 8  # partial sums that are joined at a time
WIDTH = 32  # channels of a group that are joined at a time, at least: each number would be compiled by itself


@triton.jit(do_not_specialize=["tokens"])
def _partial_moments(
    x, means, squares, tokens, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """By channel, over ROWS * STEPS tokens of an image: the mean and the sum of squared differences from it.

    Sums are of differences from a first value, so that a mean far from zero costs no digits.
    """
    image, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = part * (ROWS * STEPS) + tl.arange(0, ROWS)
    inside = (channel < channels)[None, :]
    x += image * tokens * channels
    where = row[:, None].to(tl.int64) * channels + channel[None, :]
    first = tl.load(x + where, mask=(row < tokens)[:, None] & inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    square = tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in tl.static_range(1, STEPS):
        mask = (row + step * ROWS < tokens)[:, None] & inside
        value = tl.load(x + where + step * ROWS * channels, mask=mask, other=0.0).to(tl.float32)
        apart = tl.where(mask, value - first, 0.0)
        total += apart
        square += apart * apart
    count = tl.minimum(tl.maximum((tokens - row + ROWS - 1) // ROWS, 0), STEPS).to(tl.float32)[:, None]
    own = total / tl.maximum(count, 1.0)
    mean = tl.sum(count * (first + own), 0) / tl.minimum(tokens - part * (ROWS * STEPS), ROWS * STEPS).to(tl.float32)
    apart = first + own - mean[None, :]
    square = tl.maximum(square - total * own, 0.0) + count * apart * apart
    out = (image * tl.num_programs(1) + part) * channels + channel
    tl.store(means + out, mean, mask=channel < channels)
    tl.store(squares + out, tl.sum(square, 0), mask=channel < channels)


@triton.jit(do_not_specialize=["tokens", "width", "parts", "part_tokens", "shift_stride"])
def _group_moments(
    means, squares, shift, weight, centre, scale, tokens, channels, width, parts, part_tokens, shift_stride, eps,
    PARTS: tl.constexpr, PADDED: tl.constexpr, SHIFTED: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Join the partial moments of one group of one image; by channel, what to subtract and what to multiply with."""
    image, group = tl.program_id(1).to(tl.int64), tl.program_id(0)
    place = tl.arange(0, PADDED)
    inside = place < width
    channel = group * width + place
    moved = tl.zeros([PADDED], tl.float32)
    if SHIFTED:
        moved = tl.load(shift + image * shift_stride + channel, mask=inside, other=0.0).to(tl.float32)
    base = image * parts * channels
    size = 1.0 * tokens * width
    total = tl.zeros([PARTS, PADDED], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & inside[None, :]
        count = tl.minimum(tokens - part * part_tokens, part_tokens).to(tl.float32)[:, None]
        mean = tl.load(means + base + part[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        total += tl.where(mask, count * (mean + moved[None, :]), 0.0)
    middle = tl.sum(tl.sum(total, 0), 0) / size
    total = tl.zeros([PARTS, PADDED], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & inside[None, :]
        where = base + part[:, None] * channels + channel[None, :]
        count = tl.minimum(tokens - part * part_tokens, part_tokens).to(tl.float32)[:, None]
        apart = tl.load(means + where, mask=mask, other=0.0) + moved[None, :] - middle
        square = tl.load(squares + where, mask=mask, other=0.0)
        total += tl.where(mask, square + count * apart * apart, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(tl.sum(total, 0), 0) / size + eps)
    factors = factor + tl.zeros([PADDED], tl.float32)
    if AFFINE:
        factors *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(centre + image * channels + channel, middle - moved, mask=inside)
    tl.store(scale + image * channels + channel, factors, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _normalise(
    x, centre, scale, bias, out, tokens, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, AFFINE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mask = (row < tokens)[:, None] & inside[None, :]
    where = image * tokens * channels + row[:, None].to(tl.int64) * channels + channel[None, :]
    value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    middle = tl.load(centre + image * channels + channel, mask=inside, other=0.0)
    factor = tl.load(scale + image * channels + channel, mask=inside, other=0.0)
    value = (value - middle[None, :]) * factor[None, :]
    if AFFINE:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _add(x, y, bias, out, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mask = (row < rows)[:, None] & inside[None, :]
    where = row[:, None] * channels + channel[None, :]
    value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(y + where, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _geglu(x, out, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    where = row[:, None] * (2 * channels) + channel[None, :]
    value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + where + channels, mask=mask, other=0.0).to(tl.float32)
    value *= 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row[:, None] * channels + channel[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_linear(
    x, weight, bias, out, channels, inner, ROWS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    """A tile of both halves of a product, and of them its own tile of the result. All but ``bias`` are descriptors."""
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * CHANNELS
    value = tl.zeros([ROWS, CHANNELS], tl.float32)
    gate = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, inner, INNER):
        loaded = x.load([row, start])
        value = tl.dot(loaded, weight.load([column, start]).T, value, input_precision="ieee")
        gate = tl.dot(loaded, weight.load([channels + column, start]).T, gate, input_precision="ieee")
    channel = column + tl.arange(0, CHANNELS)
    inside = channel < channels
    value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + channels + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value *= 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    out.store([row, column], value.to(out.dtype))


@triton.jit(do_not_specialize=["rows"])
def _add_layer_norm(
    x, y, weight, bias, after, total, out, rows, channels, eps,
    ROWS: tl.constexpr, PADDED: tl.constexpr, AFFINE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Whole rows at a time. The sum is rounded to its type before it is normalised."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    inside = channel < channels
    mask = (row < rows)[:, None] & inside[None, :]
    where = row[:, None] * channels + channel[None, :]
    value = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(y + where, mask=mask, other=0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty).to(tl.float32)
    stored = value
    if AFTER:
        stored += tl.load(after + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(total + where, stored.to(total.dtype.element_ty), mask=mask)
    value = tl.where(inside[None, :], value - (tl.sum(value, 1) / channels)[:, None], 0.0)
    value *= (1.0 / tl.sqrt(tl.sum(value * value, 1) / channels + eps))[:, None]
    if AFFINE:
        value *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "to_height", "to_width"])
def _upsample(
    x, out, height, width, to_height, to_width, channels, y_scale, x_scale, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (row < to_height * to_width)[:, None] & (channel < channels)[None, :]
    from_y = tl.minimum(((row // to_width).to(tl.float32) * y_scale).to(tl.int32), height - 1)
    from_x = tl.minimum(((row % to_width).to(tl.float32) * x_scale).to(tl.int32), width - 1)
    source = (image * height * width + from_y * width + from_x)[:, None] * channels + channel[None, :]
    target = (image * to_height * to_width + row)[:, None] * channels + channel[None, :]
    tl.store(out + target, tl.load(x + source, mask=mask, other=0.0), mask=mask)


@dataclass(frozen=True)
class ProductTiles:
    """Rows and channels of a result that one program makes, channels multiplied at a time, how Triton runs it."""

    rows: int = 128
    channels: int = 64
    inner: int = 64
    warps: int = 4
    stages: int = 2


def _tile(channels: int) -> tuple[int, int]:
    """(rows, channels) that one program works on: 128 bytes of a row or more, and no channels past the last."""
    across = 128 if channels % 128 == 0 else 64
    across = min(across, max(16, triton.next_power_of_2(channels)))
    return TILE // across, across


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    """See :func:`..fused.group_norm`."""
    x = x.contiguous()
    images, tokens, channels = x.shape
    width, out = channels // groups, torch.empty_like(x)
    rows, across = _tile(channels)
    columns, parts = triton.cdiv(channels, across), triton.cdiv(tokens, rows * STEPS)
    means, squares = torch.empty(2, images, parts, channels, dtype=torch.float32, device=x.device)
    centre, scale = torch.empty(2, images, channels, dtype=torch.float32, device=x.device)
    affine = weight is not None
    if shift is not None and shift.stride(-1) != 1:
        shift = shift.contiguous()
    with torch.cuda.device_of(x):
        _partial_moments[(columns, parts, images)](
            x, means, squares, tokens, channels, ROWS=rows, CHANNELS=across, STEPS=STEPS, num_warps=4
        )  # fmt: skip
        _group_moments[(groups, images)](
            means, squares, x if shift is None else shift, weight if affine else x, centre, scale,
            tokens, channels, width, parts, rows * STEPS, 0 if shift is None else shift.stride(0), eps,
            PARTS=PARTS, PADDED=max(WIDTH, triton.next_power_of_2(width)),
            SHIFTED=shift is not None, AFFINE=affine, num_warps=4,
        )  # fmt: skip
        _normalise[(columns, triton.cdiv(tokens, rows), images)](
            x, centre, scale, bias if affine else x, out, tokens, channels,
            ROWS=rows, CHANNELS=across, AFFINE=affine, SILU=silu, num_warps=4,
        )  # fmt: skip
    return out


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """See :func:`..fused.add`."""
    x, y = x.contiguous(), y.contiguous()
    out, channels = torch.empty_like(x), x.shape[-1]
    count, (rows, across) = x.numel() // channels, _tile(channels)
    with torch.cuda.device_of(x):
        _add[(triton.cdiv(channels, across), triton.cdiv(count, rows))](
            x, y, bias, out, count, channels, ROWS=rows, CHANNELS=across, num_warps=4
        )  # fmt: skip
    return out


def geglu(x: Tensor) -> Tensor:
    """See :func:`..fused.geglu`."""
    x = x.contiguous()
    channels = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], channels)
    count, (rows, across) = x.numel() // x.shape[-1], _tile(channels)
    with torch.cuda.device_of(x):
        _geglu[(triton.cdiv(channels, across), triton.cdiv(count, rows))](
            x, out, count, channels, ROWS=rows, CHANNELS=across, num_warps=4
        )  # fmt: skip
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor, tiles: ProductTiles = ProductTiles()) -> Tensor:
    """See :func:`..fused.gated_linear`.

    Args:
        x, weight: at multiples of 16 bytes, of channels and out_channels that are multiples of 8, on a GPU that copies
            tiles by itself (compute capability 9 or more).
        tiles: to be tried in place of the default.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape, inner, channels = x.shape, x.shape[-1], weight.shape[0] // 2
    x, weight = x.reshape(-1, inner).contiguous(), weight.contiguous()
    out = x.new_empty(x.shape[0], channels)
    blocks = (tiles.rows, tiles.inner), (tiles.channels, tiles.inner), (tiles.rows, tiles.channels)
    x_tiles, weight_tiles, out_tiles = (
        TensorDescriptor.from_tensor(one, list(block)) for one, block in zip((x, weight, out), blocks, strict=True)
    )
    with torch.cuda.device_of(x):
        _gated_linear[(triton.cdiv(channels, tiles.channels), triton.cdiv(x.shape[0], tiles.rows))](
            x_tiles, weight_tiles, bias, out_tiles, channels, inner,
            ROWS=tiles.rows, CHANNELS=tiles.channels, INNER=tiles.inner,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out.unflatten(0, shape[:-1])


def add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, after: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`..fused.add_layer_norm`."""
    x, y = x.contiguous(), y.contiguous()
    total, out, channels = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    padded, affine, count = triton.next_power_of_2(channels), weight is not None, x.numel() // channels
    rows = max(1, TILE // padded)
    with torch.cuda.device_of(x):
        _add_layer_norm[(triton.cdiv(count, rows),)](
            x, y, weight if affine else x, bias if affine else x, x if after is None else after, total, out,
            count, channels, eps, ROWS=rows, PADDED=padded, AFFINE=affine, AFTER=after is not None, num_warps=4,
        )  # fmt: skip
    return total, out


def upsample(x: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """See :func:`..fused.upsample`."""
    x = x.contiguous()
    images, _, channels = x.shape
    (height, width), (to_height, to_width) = size, to
    out = x.new_empty(images, to_height * to_width, channels)
    rows, across = _tile(channels)
    with torch.cuda.device_of(x):
        _upsample[(triton.cdiv(channels, across), triton.cdiv(out.shape[1], rows), images)](
            x, out, height, width, to_height, to_width, channels, height / to_height, width / to_width,
            ROWS=rows, CHANNELS=across, num_warps=4,
        )  # fmt: skip
    return out
