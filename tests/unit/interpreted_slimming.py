"""Runs the kernel that rates tokens in Triton's interpreter on random inputs; prints its errors as JSON.

A process of its own: Triton decides when a kernel is defined whether to interpret it.
"""

import json
import os

import oracles
import torch
from interpreted_kernel import kernel_module

CASES = [(3, 2, 37, 40), (2, 3, 16, 64), (1, 1, 5, 16), (2, 2, 70, 50)]  # frames, others, tokens, channels


def frames_of(count: int, tokens: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, tokens, channels), dim=-1).to(dtype)


def expected(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return oracles.importance(torch.stack([query, key]).double(), 0)[1]


def errors(kernels, dtype: torch.dtype) -> list[float]:
    """Of both directions of frames and others, and of frames among themselves; results are parts of larger tensors."""
    found, tiles = [], kernels.Tiles(16, 32, 16, 4, 2)
    for count, others, tokens, channels in CASES:
        first, second = (frames_of(n, tokens, channels, dtype) for n in (count, others))
        whole = torch.full((count + 1, others + 2, tokens), torch.nan)
        of_second, of_first = whole[1:, 2:], torch.empty(others, count, tokens)
        kernels.rate(first, second, of_second, of_first, tiles)
        for a in range(count):
            for b in range(others):
                found.append(oracles.relative_error(of_second[a, b], expected(second[b], first[a])))
                found.append(oracles.relative_error(of_first[b, a], expected(first[a], second[b])))
        assert whole[0].isnan().all() and whole[:, :2].isnan().all()
        alone = torch.empty_like(of_first)
        kernels.rate(first, second, None, alone, tiles)
        assert torch.equal(alone, of_first)
        both = torch.empty(count, count, tokens)
        kernels.rate(first, first, both, both, tiles)
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        found += [oracles.relative_error(both[a, b], expected(first[b], first[a])) for a, b in pairs]
    return found


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    module = kernel_module("slimming_triton")
    torch.seed()
    print(json.dumps({dtype: errors(module, getattr(torch, dtype)) for dtype in ("float16", "float32")}))
