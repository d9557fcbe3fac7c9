"""Edits clips of several lengths from file to file through a real ComfyUI server on the CPU, with the demo model.

For each length a server of its own: resident memory of its process over time, and the CPU time that every stage takes
for a frame, which other work on the machine changes little, unlike the time of the clock.

    COMFYUI_PATH=... python benchmarks/long_clip.py --frames 200 10000 --out results.json --plot results.svg

The clip is drawn by the demo world, a cut and a keyframe in every 50 frames; attention has a KV budget.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from provenance import commit, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "server")]

STAGES = ("encode", "invert", "select", "joint", "propagate", "save")  # the other nodes take no time


def measure(frames: int, size: int, steps: int) -> dict:
    """One length, on a server of its own."""
    from comfy_client import ServerProcess
    from long_edit import edit_long_clip

    with tempfile.TemporaryDirectory(prefix="long-clip-") as folder:
        base = Path(folder)
        with ServerProcess(Path(os.environ["COMFYUI_PATH"]), base, cpu=True) as server:
            result = edit_long_clip(server, frames, size, steps)
    each = ", ".join(f"{stage} {value:.1f}" for stage, value in zip(STAGES, per_frame(result), strict=True))
    used = f"{result['seconds']:.0f} s, of CPU {result['cpu']:.0f} s, peak {result['peak'] / 1e9:.3f} GB"
    print(f"{frames} frames: {used}; ms of CPU a frame: {each}", flush=True)
    return result


def per_frame(result: dict) -> list[float]:
    """Milliseconds of CPU time that each stage takes for a frame."""
    return [1000 * result["stages"][stage]["cpu"] / result["frames"] for stage in STAGES]


def plot(results: list[dict], path: Path) -> None:
    """Memory over the run, and milliseconds a frame of each stage, for every length."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, result in enumerate(results):
        label = f"{result['frames']} frames"
        done = [100 * at / result["seconds"] for at, _, _ in result["memory"]]
        left.plot(done, [size / 1e9 for _, size, _ in result["memory"]], label=label)
        places = [stage + (number - (len(results) - 1) / 2) * 0.8 / len(results) for stage in range(len(STAGES))]
        right.bar(places, per_frame(result), 0.8 / len(results), label=label)
    left.set(xlabel="share of the run, %", ylabel="resident memory of ComfyUI, GB", ylim=(0, None))
    right.set(ylabel="CPU time a frame, ms")
    right.set_xticks(range(len(STAGES)), STAGES)
    left.legend()
    right.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[200, 10_000])
    parser.add_argument("--size", type=int, default=64, help="width and height, pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    results = [measure(frames, options.size, options.steps) for frames in options.frames]
    if options.out:
        about = {**machine(), "commit": commit(), "cores": os.cpu_count(), "size": options.size, "steps": options.steps}
        options.out.write_text(json.dumps({**about, "runs": results}) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
