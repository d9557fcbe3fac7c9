"""Times extended attention under a KV budget: PyTorch's attention after a gather, also cuDNN's, and the Triton kernel.

    python benchmarks/attention.py --out benchmarks/results/h100-attention.json

Shapes of SD 2.1 at 384x672, half precision, random values and random kept tokens; every layer resolution, budgets of 5
to 40 keyframes, chunks of 8 and 32 query frames. Then attention to a prompt of 77 tokens, 64 images, against PyTorch's
own choice; ``--prompts`` leaves all but this out. With ``--tiles`` every tiling of the kernels is tried first. Needs a
CUDA device; ``--small`` runs tiny shapes anywhere, in Triton's interpreter where there is no GPU, to try the script.
"""

import argparse
import os
import sys
from itertools import product
from pathlib import Path

import torch
from harness import best_ms, peak_gib, reset_peak, write_result
from torch.nn.attention import SDPBackend, sdpa_kernel

CHANNELS = 64
LEVELS = {(48, 84): 5, (24, 42): 10, (12, 21): 20, (6, 11): 20}  # SD 2.1: heads at each resolution
TILES = [(128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 8, 4),
         (64, 64, 4, 3), (64, 128, 4, 3), (64, 32, 4, 4)]  # fmt: skip
PROMPT_TILES = [(128, 1, 8, 1), (128, 2, 8, 2), (128, 4, 8, 2), (128, 4, 8, 3), (128, 8, 8, 2), (128, 4, 4, 2),
                (64, 1, 4, 1), (64, 4, 4, 2), (64, 8, 4, 2), (64, 8, 4, 3)]  # fmt: skip


def inputs(tokens: int, heads: int, queries: int, budget: int, device: str):
    """Random q, k, v of twice as many keyframes as the budget, and sorted kept tokens, the frame's own among them."""
    frames, width = 2 * budget, heads * CHANNELS
    q = torch.randn(queries, tokens, width, device=device).half()
    k, v = (torch.randn(frames, tokens, width, device=device).half() for _ in range(2))
    rated = torch.rand(queries, frames * tokens, device=device)
    for frame in range(queries):
        own = frame % frames
        rated[frame, own * tokens : (own + 1) * tokens] = 2.0
    kept = torch.stack([row.topk(budget * tokens).indices.sort().values for row in rated]).int()
    return q, k, v, kept


def operations(q, kept) -> float:
    """Floating point operations of both products."""
    return 4.0 * q.shape[0] * q.shape[1] * kept.shape[1] * q.shape[2]


def timed(function, operations_done: float) -> dict:
    """Milliseconds, TFLOP/s and extra memory of a call."""
    reset_peak()
    before = peak_gib()
    function()
    extra = 1024 * (peak_gib() - before)
    ms = best_ms(function)
    return {"ms": round(ms, 4), "TFLOP/s": round(operations_done / ms / 1e9, 1), "extra MiB": round(extra, 1)}


def timed_cudnn(function, operations_done: float) -> dict:
    """The same with PyTorch held to cuDNN's attention, which it does not choose by itself; or why it cannot be."""
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return timed(function, operations_done)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0][:200]}


def compare(modules, tokens: int, heads: int, queries: int, budget: int, device: str, tiles) -> dict:
    """One shape: both backends, how far they are apart, and which was faster."""
    attention, kernel = modules
    q, k, v, kept = inputs(tokens, heads, queries, budget, device)
    plain = attention.gathered_attention(q, k, v, heads, kept)
    ours = kernel.slim_attention(q, k, v, heads, kept, tiles)
    error = float((ours.double() - plain.double()).norm() / plain.double().norm())
    work = operations(q, kept)
    row = {"tokens": tokens, "heads": heads, "query frames": queries, "budget": budget, "difference": error}
    row["gather and SDPA"] = timed(lambda: attention.gathered_attention(q, k, v, heads, kept), work)
    row["kernel"] = timed(lambda: kernel.slim_attention(q, k, v, heads, kept, tiles), work)
    row["gather and cuDNN"] = timed_cudnn(lambda: attention.gathered_attention(q, k, v, heads, kept), work)
    row["kernel is faster"] = row["kernel"]["ms"] < row["gather and SDPA"]["ms"]
    print(f"{tokens:5} tokens, {queries:3} frames, budget {budget:2}: SDPA {row['gather and SDPA']['ms']:.3f} ms, "
          f"cuDNN {row['gather and cuDNN'].get('ms', 'none')} ms, "
          f"kernel {row['kernel']['ms']:.3f} ms, difference {error:.1e}", flush=True)  # fmt: skip
    return row


def try_tiles(kernel, device: str, levels: dict) -> list[dict]:
    """Milliseconds of every tiling at the two finest resolutions; one that does not run says why."""
    rows = []
    for (height, width), heads in list(levels.items())[:2]:
        q, k, v, kept = inputs(height * width, heads, 8, 20, device)
        for numbers in TILES:
            row = {"tokens": height * width, "tiles": numbers}
            try:
                ms = best_ms(lambda: kernel.slim_attention(q, k, v, heads, kept, kernel.Tiles(*numbers)))  # noqa: B023
                row |= {"ms": round(ms, 4), "TFLOP/s": round(operations(q, kept) / ms / 1e9, 1)}
            except Exception as error:  # too much shared memory, for one
                row["error"] = str(error)[:200]
            print(row, flush=True)
            rows.append(row)
    return rows


def fastest(rows: list[dict]) -> tuple[int, ...]:
    """The tiling that took least at the finest resolution, of those that were tried."""
    finest = [row for row in rows if "ms" in row and row["tokens"] == rows[0]["tokens"]]
    return min(finest, key=lambda row: row["ms"])["tiles"]


def prompt_inputs(tokens: int, heads: int, images: int, keys: int, device: str):
    """Random q, k, v of images with a prompt each."""
    width = heads * CHANNELS
    return [torch.randn(images, rows, width, device=device).half() for rows in (tokens, keys, keys)]


def compare_prompts(modules, tokens: int, heads: int, images: int, keys: int, device: str, tiles) -> dict:
    """One shape: PyTorch's own choice and the kernel, and how far they are apart."""
    attention, kernel = modules
    q, k, v = prompt_inputs(tokens, heads, images, keys, device)
    plain, ours = attention.frame_attention(q, k, v, heads), kernel.prompt_attention(q, k, v, heads, tiles)
    error = float((ours.double() - plain.double()).norm() / plain.double().norm())
    row = {"tokens": tokens, "heads": heads, "images": images, "prompt": keys, "difference": error}
    row["SDPA"] = round(best_ms(lambda: attention.frame_attention(q, k, v, heads)), 4)
    row["kernel"] = round(best_ms(lambda: kernel.prompt_attention(q, k, v, heads, tiles)), 4)
    row["GB/s of the kernel, a read and a write"] = round(2 * q.nbytes / row["kernel"] / 1e6)
    print(row, flush=True)
    return row


def try_prompt_tiles(kernel, device: str, levels: dict, images: int, keys: int) -> list[dict]:
    """Milliseconds of every tiling at the two finest resolutions; one that does not run says why."""
    rows = []
    for (height, width), heads in list(levels.items())[:2]:
        q, k, v = prompt_inputs(height * width, heads, images, keys, device)
        for numbers in PROMPT_TILES:
            row = {"tokens": height * width, "tiles": numbers}
            tiles = kernel.PromptTiles(*numbers)
            try:
                row["ms"] = round(best_ms(lambda: kernel.prompt_attention(q, k, v, heads, tiles)), 4)  # noqa: B023
            except Exception as error:  # too much shared memory, for one
                row["error"] = str(error)[:200]
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[5, 10, 20, 40], help="keyframes' worth of keys")
    parser.add_argument("--queries", type=int, nargs="+", default=[8, 32], help="query frames in one call")
    parser.add_argument("--tiles", action="store_true", help="try every tiling, and compare with the fastest")
    parser.add_argument("--prompts", action="store_true", help="attention to a prompt alone")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--commit", help="to be noted where this is no clone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if not options.small:
            sys.exit("benchmarks/attention.py needs a CUDA device")
        os.environ["TRITON_INTERPRET"] = "1"
    from conftest import mount_pack

    mount_pack()
    from adaflow_pack.adaflow import attention, attention_triton

    levels, budgets, queries = LEVELS, options.budgets, options.queries
    if options.small:
        levels, budgets, queries = {(3, 5): 2, (2, 3): 2}, [2], [2]
    modules, results = (attention, attention_triton), {}
    images, prompt, prompt_tiles = (2, 7, None) if options.small else (64, 77, None)
    if options.tiles:
        results["tiles for prompts"] = rows = try_prompt_tiles(attention_triton, device, levels, images, prompt)
        prompt_tiles = attention_triton.PromptTiles(*fastest(rows))
        results["tiles for prompts chosen"] = str(prompt_tiles)
    results["prompts"] = [
        compare_prompts(modules, height * width, heads, images, prompt, device, prompt_tiles)
        for (height, width), heads in levels.items()
    ]
    if not options.prompts:
        results |= extended(options, modules, levels, budgets, queries, device)
    if options.out:
        write_result(options.out, results, options.commit)


def extended(options, modules, levels: dict, budgets: list[int], queries: list[int], device: str) -> dict:
    """Tables of extended attention."""
    (_, attention_triton), results, tiles = modules, {}, None
    if options.tiles:
        results["tiles"] = rows = try_tiles(attention_triton, device, levels if not options.small else {(2, 3): 1})
        tiles = attention_triton.Tiles(*fastest(rows))
        results["tiles chosen"] = str(tiles)
    results["rows"] = [
        compare(modules, height * width, heads, count, budget, device, tiles)
        for ((height, width), heads), budget, count in product(levels.items(), budgets, queries)
    ]
    slower = {row["tokens"] for row in results["rows"] if not row["kernel is faster"]}
    results["always faster at tokens"] = sorted({row["tokens"] for row in results["rows"]} - slower)
    print("the kernel is faster in every row of layers with tokens:", results["always faster at tokens"])
    return results


if __name__ == "__main__":
    with torch.inference_mode():
        main()
