"""Runs the fused kernels in Triton's interpreter on random inputs; prints their errors against the oracles as JSON.

A process of its own: Triton decides when a kernel is defined whether to interpret it.
"""

import json
import os

import oracles
import torch
from interpreted_kernel import kernel_module

CASES = [(10, 66, 0, True, True), (20, 1, 0, True, True), (30, 7, 30, False, False), (40, 395, 30, True, False),
         (60, 35, 0, False, True), (80, 130, 3, True, True)]  # fmt: skip
GROUPS = 5


def group_norm_errors(kernels, dtype: torch.dtype) -> list[float]:
    errors = []
    for width, tokens, mean, silu, shifted in CASES:  # widths are channels of a group, not all powers of two
        channels = GROUPS * width
        x = (torch.randn(2, tokens, channels) + mean).to(dtype)
        x[:, -1] *= 10 if tokens > 1 else 1  # a last row that stands out
        weight, bias = 1 + 0.2 * torch.randn(channels), torch.randn(channels).to(dtype)
        shift = 3 * torch.randn(2, channels).to(dtype) if shifted else None
        found = kernels.group_norm(x, GROUPS, weight, bias, 1e-5, silu, shift)
        expected = oracles.group_norm(x, GROUPS, weight, bias, 1e-5, silu, shift)
        errors.append(oracles.relative_error(found, expected))
    return errors


def geglu_errors(kernels, dtype: torch.dtype) -> list[float]:
    errors = []
    for shape in ((3, 7, 80), (2, 20, 320), (1, 33, 2)):
        x = 2 * torch.randn(shape).to(dtype)
        errors.append(oracles.relative_error(kernels.geglu(x), oracles.geglu(x)))
    return errors


def gated_linear_errors(kernels, dtype: torch.dtype) -> list[float]:
    errors, tiles = [], kernels.ProductTiles(16, 16, 16)
    for shape, channels in (((3, 7, 40), 24), ((2, 20, 64), 16), ((33, 8), 40)):  # none are whole tiles alone
        x, weight = torch.randn(shape).to(dtype), torch.randn(2 * channels, shape[-1]).to(dtype)
        bias = torch.randn(2 * channels).to(dtype)
        product = x.double() @ weight.double().T + bias.double()
        found = kernels.gated_linear(x, weight, bias, tiles)
        errors.append(oracles.relative_error(found, oracles.geglu(product)))
        errors.append(float(found.shape != (*product.shape[:-1], channels)))
    return errors


def add_errors(kernels, dtype: torch.dtype) -> list[float]:
    errors = []
    for shape in ((3, 7, 40), (2, 37, 256)):
        x, y, bias = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1])
        errors.append(oracles.relative_error(kernels.add(x, y, bias), x.double() + y.double() + bias.double()))
    return errors


def add_layer_norm_errors(kernels, dtype: torch.dtype) -> list[float]:
    errors = []
    for shape in ((3, 7, 40), (2, 9, 320)):
        x, y = torch.randn(shape).to(dtype), (torch.randn(shape) + 20).to(dtype)
        weight, bias, after = torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]), torch.randn(shape[-1])
        total, out = kernels.add_layer_norm(x, y, weight, bias, 1e-5, None)
        errors.append(oracles.relative_error(total, x.double() + y.double()))
        errors.append(oracles.relative_error(out, oracles.layer_norm(total, weight, bias, 1e-5)))
        more, same = kernels.add_layer_norm(x, y, weight, bias, 1e-5, after)
        errors.append(oracles.relative_error(more, total.double() + after.double()))
        errors.append(float(not torch.equal(same, out)))
    return errors


def upsample_errors(kernels, dtype: torch.dtype) -> list[float]:
    """0 where every bit is PyTorch's."""
    errors = []
    for channels, size, to in (
        (40, (6, 11), (12, 21)),
        (130, (5, 4), (10, 8)),
        (16, (3, 7), (8, 15)),
        (3, (9, 5), (4, 5)),
    ):
        image = torch.randn(2, channels, *size).to(dtype)
        expected = torch.nn.functional.interpolate(image, to, mode="nearest")
        found = kernels.upsample(image.permute(0, 2, 3, 1).flatten(1, 2), size, to)
        errors.append(float(not torch.equal(found.unflatten(1, to).permute(0, 3, 1, 2), expected)))
    return errors


KERNELS = {
    "group_norm": group_norm_errors,
    "geglu": geglu_errors,
    "gated_linear": gated_linear_errors,
    "add": add_errors,
    "add_layer_norm": add_layer_norm_errors,
    "upsample": upsample_errors,
}

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    module = kernel_module("fused_triton")
    torch.seed()
    print(
        json.dumps(
            {
                f"{name}-{dtype}": measure(module, getattr(torch, dtype))
                for name, measure in KERNELS.items()
                for dtype in ("float16", "float32")
            }
        )
    )
