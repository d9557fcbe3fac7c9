"""Times a UNet's blocks as they are, in channels_last, and run fast: norms and products alone, blocks, whole forwards.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/norms.py --out benchmarks/results/h100-norms.json

SD 2.1's shapes at 384x672, half precision, random values. Milliseconds and, against the UNet as it is, ratios.
Needs a CUDA device; ``--small`` runs tiny shapes anywhere, with PyTorch's operations for the kernels.
"""

import argparse
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import best_ms, comfyui_version, peak_gib, reset_peak, start_comfyui, write_result
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
NORMS = [(320, (48, 84)), (640, (48, 84)), (960, (48, 84)), (640, (24, 42)), (1280, (24, 42)), (1920, (24, 42)),
         (1280, (12, 21)), (2560, (12, 21)), (2560, (6, 11))]  # fmt: skip
PRODUCTS = [(320, (48, 84)), (640, (24, 42)), (1280, (12, 21))]
FORMATS = {"as it is": torch.contiguous_format, "channels_last": torch.channels_last, "fast": torch.channels_last}


@contextmanager
def blocks_run(kind: str):
    """The way in which ``fast_blocks`` has the UNet's blocks run."""
    os.environ["ADAFLOW_BLOCKS"] = "fast" if kind == "fast" else "own"
    yield
    del os.environ["ADAFLOW_BLOCKS"]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def row_of(name: dict, functions: dict, seconds: float) -> dict:
    """Milliseconds of each function, how much faster than the first, and the last one's difference from the first."""
    row = dict(name)
    for kind, function in functions.items():
        row[kind] = round(best_ms(function, seconds), 4)
    first, *_, last = functions
    row["times faster"] = {kind: round(row[first] / row[kind], 3) for kind in list(functions)[1:]}
    row["difference"] = difference(functions[last](), functions[first]())
    print(row, flush=True)
    return row


def norm_row(channels: int, size: tuple[int, int], batch: int) -> dict:
    """GroupNorm and SiLU of an image to which a shift by channel is added first, as in a ResBlock."""
    from adaflow_pack.adaflow import fused

    x = torch.randn(batch, channels, *size, device=DEVICE).to(DTYPE)
    last = x.contiguous(memory_format=torch.channels_last)
    shift, (weight, bias) = (torch.randn(n, channels, device=DEVICE).to(DTYPE) for n in (batch, 2))

    def plain(x):
        return F.silu(F.group_norm(x + shift[:, :, None, None], 32, weight, bias, 1e-5))

    def kernel():
        tokens = last.permute(0, 2, 3, 1).flatten(1, 2)
        out = fused.group_norm(tokens, 32, weight, bias, 1e-5, True, shift)
        return out.unflatten(1, size).permute(0, 3, 1, 2)

    functions = {"as it is": lambda: plain(x), "channels_last": lambda: plain(last), "fast": kernel}
    row = row_of({"channels": channels, "size": size, "batch": batch}, functions, 0.1)
    row["GB/s of the kernel, two reads and a write"] = round(3 * x.numel() * x.element_size() / row["fast"] / 1e6)
    return row


def product_row(channels: int, size: tuple[int, int], batch: int) -> dict:
    """The widening product of a feed forward and GEGLU after it, against both in one kernel."""
    from adaflow_pack.adaflow import fused

    x = torch.randn(batch, size[0] * size[1], channels, device=DEVICE).to(DTYPE)
    weight = (torch.randn(8 * channels, channels, device=DEVICE) / channels**0.5).to(DTYPE)
    bias = torch.randn(8 * channels, device=DEVICE).to(DTYPE)
    functions = {"PyTorch's product, fused GEGLU": lambda: fused.geglu(F.linear(x, weight, bias))}
    if DEVICE == "cuda" and fused._product_works(x.device, x.dtype):
        from adaflow_pack.adaflow import fused_triton

        functions["one kernel"] = lambda: fused_triton.gated_linear(x, weight, bias)
    functions["fast"] = lambda: fused.gated_linear(x, weight, bias)
    return row_of({"product": channels, "size": size, "batch": batch}, functions, 0.1)


def block_rows(unet, size: tuple[int, int], batch: int) -> list[dict]:
    """The decoder's blocks, one of each shape."""
    from adaflow_pack.nodes.patching import fast_blocks
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    rows, seen, levels = [], set(), [size]
    for _ in range(3):
        levels.append(tuple((side + 1) // 2 for side in levels[-1]))
    for number, section in enumerate(unet.output_blocks):
        for block in section:
            key = type(block), getattr(block, "channels", getattr(block, "in_channels", 0)), number // 3
            if type(block) not in (ResBlock, SpatialTransformer) or key in seen:
                continue
            seen.add(key)
            x = torch.randn(batch, key[1], *levels[3 - number // 3], device=DEVICE).to(DTYPE)
            if type(block) is ResBlock:
                rest = (torch.randn(batch, block.emb_channels, device=DEVICE).to(DTYPE),)
            else:
                context = block.transformer_blocks[0].attn2.to_k.in_features
                rest = (torch.randn(batch, 77, context, device=DEVICE).to(DTYPE), {})

            def run(kind, block=block, x=x, rest=rest):
                x = x.contiguous(memory_format=FORMATS[kind])
                if kind == "fast":
                    return lambda: fast_blocks.run(block, block.forward, (x, *rest), lambda number: None)
                return lambda: block(x, *rest)

            name = {"block": f"output_blocks[{number}] {type(block).__name__}", "channels": key[1], "batch": batch}
            rows.append(row_of(name, {kind: run(kind) for kind in FORMATS}, 0.1))
    return rows


def forward_rows(model, size: tuple[int, int], batch: int) -> list[dict]:
    """Whole forwards: a plain one, and one whose self-attentions' outputs are given, as in propagation but for gathers.

    "channels_last" is left out here: the first rows show what it costs.
    """
    from adaflow_pack.nodes.patching.families import unet_family
    from adaflow_pack.nodes.patching.taps import UNetPass, run_unet, tapped
    from comfy.patcher_extension import WrapperExecutor

    unet, outputs = model.model.diffusion_model, {}

    class GivenPass(UNetPass):
        def given(self, call, layer, tokens):
            return outputs[layer]

        def self_attention(self, call, layer, attn, x, context, value):
            if layer not in outputs:
                outputs[layer] = torch.randn_like(x)
            return outputs[layer]

    x = torch.randn(batch, 4, *size, device=DEVICE).to(DTYPE)
    time = torch.full((batch,), 500.0, device=DEVICE)
    context = torch.randn(batch, 77, model.model.model_config.unet_config["context_dim"], device=DEVICE).to(DTYPE)
    family, rows = unet_family(model, "benchmarks/norms.py"), []

    def wrapper(executor, x, *args, **kwargs):
        return run_unet(executor, family, x, args, kwargs)

    executor = WrapperExecutor.new_class_executor(unet._forward, unet, [wrapper])

    def run(kind, step_pass):
        def forward():
            options = {"adaflow": step_pass, "uuids": ["one"], "cond_or_uncond": [0]}
            with blocks_run(kind):
                return executor.execute(x, time, context, None, None, options)

        return forward

    with tapped(unet, family):
        for name, step_pass in (("plain", UNetPass()), ("self-attention given", GivenPass())):
            run("as it is", step_pass)()
            functions = {kind: run(kind, step_pass) for kind in ("as it is", "fast")}
            row = row_of({"forward": name, "batch": batch}, functions, 1.0)
            for kind, function in functions.items():
                row[f"ms a frame, {kind}"] = round(row[kind] / batch, 3)
                reset_peak()
                function()
                row[f"peak GiB, {kind}"] = round(peak_gib(), 2)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64], help="frames in one forward")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--commit", help="to be noted where this is no clone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.small:
        sys.exit("benchmarks/norms.py needs a CUDA device")
    with tempfile.TemporaryDirectory() as folder:
        start_comfyui(Path(folder))
        from adaflow_pack.adaflow import fused
        from models import SD2, SD2_FULL, random_model

        size, norms, products, batches, config = (48, 84), NORMS, PRODUCTS, options.batches, SD2_FULL
        if options.small:
            size, norms, batches, config = (8, 12), [(64, (8, 12)), (96, (4, 6))], [2], SD2
            products = [(64, (8, 12))]
        if DEVICE == "cuda" and not fused.kernels_work(torch.device(DEVICE, torch.cuda.current_device())):
            sys.exit("the kernels do not run here")
        results = {"comfyui": comfyui_version()}
        results["norms"] = [norm_row(*shape, batches[0]) for shape in norms]
        results["products"] = [product_row(*shape, batches[0]) for shape in products]
        model = random_model(config, "eps", 0, DTYPE)
        unet = model.model.diffusion_model.to(DEVICE)
        results["blocks"] = block_rows(unet, size, batches[0])
        results["forwards"] = [row for batch in batches for row in forward_rows(model, size, batch)]
    if options.out:
        write_result(options.out, results, options.commit)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
