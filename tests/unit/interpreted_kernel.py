"""Runs the Triton kernel in Triton's interpreter on random inputs; prints its errors against the oracle as JSON.

A process of its own: Triton decides when a kernel is defined whether to interpret it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch

PROMPTS = (1, 16, 77, 154, 231, 256)
CASES = [(heads, channels, dtype) for heads, channels in ((2, 40), (2, 64), (3, 80), (1, 160)) for dtype in
         ("float16", "float32")]  # fmt: skip


def interpreted(script: str) -> dict:
    """What a script of this kind prints, by its name in this folder; skips where Triton cannot interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton: torch's builds for NVIDIA GPUs on Linux bring it along")
    command = [sys.executable, str(Path(__file__).with_name(script))]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stderr:
        pytest.skip("Triton before 3.7 cannot interpret loops with this numpy")
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def kernel_module(name: str):
    path = Path(__file__).resolve().parents[2] / "adaflow" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def error(kernel, heads: int, channels: int, dtype: torch.dtype, tokens: int, kept_tokens: int) -> float:
    frames, queries = 5, 2
    q = torch.randn(queries, tokens, heads * channels).to(dtype)
    k, v = (torch.randn(frames, tokens, heads * channels).to(dtype) for _ in range(2))
    kept = torch.stack([torch.randperm(frames * tokens)[:kept_tokens] for _ in range(queries)])
    found = kernel.slim_attention(q, k, v, heads, kept.int(), kernel.Tiles(16, 32, 4, 2))
    flat_k, flat_v = k.flatten(0, 1).double(), v.flatten(0, 1).double()
    expected = [oracles.attention(q[i].double(), flat_k[rows], flat_v[rows], heads) for i, rows in enumerate(kept)]
    return oracles.relative_error(found, torch.stack(expected))


def prompt_error(kernel, heads: int, channels: int, dtype: torch.dtype, tokens: int, keys: int) -> float:
    q = torch.randn(4, tokens, heads * channels).to(dtype)
    k, v = (torch.randn(2, keys, heads * channels).to(dtype) for _ in range(2))
    q[0] *= 8  # some weights near 1
    tiles = kernel.PromptTiles(16, 2, 4, 2)
    found = kernel.prompt_attention(q, k, v, heads, tiles)
    pairs = ((q[image], k[image // 2], v[image // 2]) for image in range(4))
    expected = [oracles.attention(*(x.double() for x in pair), heads) for pair in pairs]
    return oracles.relative_error(found, torch.stack(expected))


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    module, errors = kernel_module("attention_triton"), {}
    torch.seed()
    for case in CASES:
        heads, channels, dtype = case
        # whole tiles, odd numbers of queries and keys, and fewer keys than a tile
        shapes = ((32, 64), (35, 97), (7, 19))
        errors["-".join(map(str, case))] = [error(module, heads, channels, getattr(torch, dtype), *s) for s in shapes]
        prompts = [prompt_error(module, heads, channels, getattr(torch, dtype), 5 + 16 * i, keys) for i, keys in
                   enumerate(PROMPTS)]  # fmt: skip
        errors["prompt-" + "-".join(map(str, case))] = prompts
    errors["key tiles"] = [module.key_tiles(keys) for keys in range(1, 257)]
    print(json.dumps(errors))
