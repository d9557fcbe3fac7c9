"""What lies between a UNet's convolutions and matrix products, on tokens: (images, tokens, channels), contiguous.

That is how a channels_last image lies in memory. cuDNN's half precision convolutions work in that layout, PyTorch's
GroupNorm does not. On a GPU these are Triton kernels (``fused_triton.py``), elsewhere PyTorch's own operations.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import HALF, kernels_run

# Compute capability -> channels of which a product with GEGLU in one kernel was measured to be faster than PyTorch's
# product and GEGLU after it (benchmarks/norms.py). With more there is less to save, and PyTorch's products are better.
PRODUCT_FASTER: dict[tuple[int, int], tuple[int, ...]] = {(9, 0): (320, 640)}


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """GroupNorm over each group of channels and all tokens of an image, of ``x`` or of ``x + shift``.

    Args:
        x: (images, tokens, channels).
        weight, bias: (channels,), of any type; both or none.
        silu: SiLU afterwards.
        shift: (images, channels), the same for all tokens.

    Returns:
        (images, tokens, channels) of the type of ``x``.
    """
    if x.device.type == "cuda":
        from . import fused_triton

        return fused_triton.group_norm(x, groups, weight, bias, eps, silu, shift)
    x = x if shift is None else x + shift[:, None]
    weight, bias = (None if values is None else values.to(x.dtype) for values in (weight, bias))
    out = F.group_norm(x.transpose(1, 2), groups, weight, bias, eps).transpose(1, 2)
    return (F.silu(out) if silu else out).contiguous()


def add(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """``x + y``, and ``bias`` by channel."""
    if bias is None:
        return x + y
    if x.device.type == "cuda" and x.dtype == y.dtype:
        from . import fused_triton

        return fused_triton.add(x, y, bias)
    return x + y + bias


def geglu(x: Tensor) -> Tensor:
    """The first half of the channels, times the exact GELU of the second (arXiv 2002.05202)."""
    if x.device.type == "cuda":
        from . import fused_triton

        return fused_triton.geglu(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`geglu` of a projection.

    Args:
        x: (..., channels).
        weight, bias: (2 * out_channels, channels) and (2 * out_channels,), of the type of ``x``.

    Returns:
        (..., out_channels).
    """
    if _product_is_faster(x, weight) and _product_works(x.device, x.dtype):
        from . import fused_triton

        return fused_triton.gated_linear(x, weight, bias)
    return geglu(F.linear(x, weight, bias))


def _product_is_faster(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cuda" or x.dtype not in HALF or weight.shape[0] % 16:
        return False
    if x.data_ptr() % 16 or weight.data_ptr() % 16:  # tiles are copied by rows that begin at multiples of 16 bytes
        return False
    return x.shape[-1] in PRODUCT_FASTER.get(torch.cuda.get_device_capability(x.device), ())


@functools.cache
def _product_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether its kernel compiles and runs there; if not, a message says why, once."""

    def probe() -> None:
        from . import fused_triton

        x = torch.zeros(128, 64, dtype=dtype, device=device)
        fused_triton.gated_linear(x, x, x[:, 0].contiguous())

    return kernels_run(probe, "its kernel for GEGLU after a product does not run here, PyTorch makes the product")


def add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``x + y``, and its LayerNorm over the channels; both of the type of ``x``.

    Args:
        weight, bias: (channels,), of any type; both or none.
        after: (channels,), added to the sum that is returned, not to what is normalised.
    """
    if x.device.type == "cuda":
        from . import fused_triton

        return fused_triton.add_layer_norm(x, y, weight, bias, eps, after)
    total = x + y
    weight, bias = (None if values is None else values.to(x.dtype) for values in (weight, bias))
    normalised = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return total if after is None else total + after.to(x.dtype), normalised


def upsample(x: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """The nearest token, for an image of another size.

    Args:
        x: (images, height * width, channels).
        size, to: (height, width) before and after.
    """
    if x.device.type == "cuda":
        from . import fused_triton

        return fused_triton.upsample(x, size, to)
    image = x.unflatten(1, tuple(size)).permute(0, 3, 1, 2)
    return F.interpolate(image, to, mode="nearest").permute(0, 2, 3, 1).flatten(1, 2)


@functools.cache
def kernels_work(device: torch.device) -> bool:
    """Whether the kernels compile and run there; if not, a message says why, once."""

    def probe() -> None:
        from . import fused_triton

        x, ones = torch.zeros(1, 16, 64, dtype=torch.float16, device=device), torch.ones(64, device=device)
        fused_triton.group_norm(x, 32, ones, ones, 1e-5, True, x[:, 0])
        fused_triton.add(x, x, ones)
        fused_triton.geglu(x)
        fused_triton.add_layer_norm(x, x, ones, ones, 1e-5, ones)
        fused_triton.upsample(x, (4, 4), (7, 8))

    return kernels_run(probe, "its kernels for norms do not run here, the UNet's blocks run as they are")
