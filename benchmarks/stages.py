"""Times the stages of an edit on this machine's GPU, with a UNet of SD 2.1's full size and random weights.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/stages.py --frames 1000 --clips 40 --out FILE

Half precision, 384x672 (48x84 latents), as the published figures were taken. Time and memory do not depend on values
of weights or latents; clips are cut evenly. No VAE. One warm-up of every stage is not counted.
"""

import argparse
import gc
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from provenance import commit, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "comfy")]


def start_comfyui(folder: Path) -> None:
    """Import ComfyUI in this process as its tests do, with its folders under ``folder``."""
    import os

    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import folder_paths

    for kind in ("input", "output", "temp"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        getattr(folder_paths, f"set_{kind}_directory")(str(folder / kind))


@contextmanager
def measured(results: dict, name: str):
    """Seconds and peak GPU memory of a block."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    yield
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**30
    results[name] = {"seconds": round(seconds, 3), "peak GiB": round(peak, 2)}
    print(f"{name}: {seconds:.2f} s, {peak:.2f} GiB", flush=True)


def run(options, results: dict) -> None:
    from graph import Graph, plain_euler, select
    from models import SD2_FULL, clip_latent, random_model

    model = random_model(SD2_FULL, "eps", 0, torch.float16)
    prompts = [[[torch.randn(1, 77, 1024), {}]] for _ in range(3)]
    Graph("sd2", latent=clip_latent(64, (48, 84)), steps=1, model=model, source=prompts[0])  # warm-up
    latent = clip_latent(options.frames, (48, 84))
    with measured(results, "inversion, 2 steps, descriptors taken"):
        graph = Graph("sd2", latent=latent, steps=2, model=model, source=prompts[0])
    with measured(results, "clip selection"):
        plan = select(graph.descriptors, -1.0, -1.0, -(-options.frames // options.clips), "fixed")
    sigma = graph.trajectory.sigmas[-1]

    def step(shares):
        patched = graph.patch(plan, graph.slim(options.budget), shares, chunk=options.chunk)
        plain_euler(patched, latent, [sigma, 0.0], prompts[1], prompts[2], 7.5)

    with measured(results, "step injecting, matching and selection included"):
        step((1.0, 1.0))
    for name, shares in (("step injecting", (1.0, 1.0)), ("step past injection", (0.0, 0.0))):
        with measured(results, name):
            step(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--clips", type=int, default=40, help="keyframes of a step")
    parser.add_argument("--budget", type=int, default=20, help="keyframes' worth of keys and values")
    parser.add_argument("--chunk", type=int, default=0, help="frames in one forward; 0: automatic")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-files"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/stages.py needs a CUDA device")
    from conftest import mount_pack

    mount_pack()
    start_comfyui(options.folder)
    results = {
        **machine(),
        "commit": commit(),
        "frames": options.frames,
        "clips": options.clips,
        "budget": options.budget,
        "chunk": options.chunk or "automatic",
    }
    with torch.inference_mode():
        run(options, results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
