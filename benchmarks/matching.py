"""Times the matching of all keyframe draws of an edit: made ahead, a clip's descriptors read once, and step by step.

    python benchmarks/matching.py                                                           # small, on the CPU
    python benchmarks/matching.py --device cuda --frames 1000 --size 48 84 --channels 640 --clip 25 --steps 50 \\
        --budget 20 --keyframes 40 100 400 --each-step 1

Descriptors are random, on disk, in half precision. Also timed: which tokens the keyframes of a step keep, at several
numbers of keyframes, beside the plain way, every ordered pair of keyframes in a product of its own, of which a sample
is timed.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from provenance import commit, machine

from adaflow.correspondence import cosines, matching_dtype
from adaflow.descriptors import Descriptors, DescriptorWriter, layer_sizes, resize_tokens
from adaflow.keyframes import Clips, KeyframeDraws
from adaflow.plan import EditPlan

CHUNK = 32  # frames asked for at a time


def random_descriptors(path: Path, frames: int, channels: int, size: tuple[int, int], device) -> Descriptors:
    writer = DescriptorWriter(path, (frames, channels, *size), "random", "random", "random", torch.zeros(frames, 1, 3))
    for start in range(0, frames, CHUNK):
        rows = list(range(start, min(start + CHUNK, frames)))
        writer.write(rows, torch.randn(len(rows), channels, *size, device=device))
    return writer.close()


def ask_for_step(plan: EditPlan, step: int, size: tuple[int, int]) -> None:
    """What propagation asks a plan for in a step, chunk after chunk, at the finest resolution."""
    keyframes = plan.keyframes(step)
    frames = [frame for frame in range(plan.frames) if frame not in set(keyframes)]
    for start in range(0, len(frames), CHUNK):
        where = plan.propagation(frames[start : start + CHUNK], keyframes, False)
        plan.matches(list(where.frames), where.keyframes, size)


def timed(work, device: str) -> float:
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(options: argparse.Namespace, descriptors: Descriptors) -> dict:
    size, steps = tuple(options.size), range(options.steps)
    clips = Clips(tuple(range(0, options.frames, options.clip)), options.frames)

    def plan() -> EditPlan:
        return EditPlan(descriptors, clips, KeyframeDraws(), device=options.device)

    def make_ahead() -> None:
        ahead.expect(steps, False)
        for step in steps:
            ask_for_step(ahead, step, size)

    def each_step() -> None:
        for step in steps[: options.each_step]:
            ask_for_step(each, step, size)

    warm = plan()
    warm.expect(steps[:1], False)
    ask_for_step(warm, 0, size)
    ahead, each = plan(), plan()
    seconds = {"all draws ahead": timed(make_ahead, options.device)}
    seconds["each step"] = timed(each_step, options.device) / options.each_step
    return {
        "seconds": seconds,
        "ahead, a step": seconds["all draws ahead"] / len(steps),
        "each step to ahead": seconds["each step"] * len(steps) / seconds["all draws ahead"],
        "compared in": str(matching_dtype(options.device)),
        "selection": [select(options, descriptors, keyframes) for keyframes in options.keyframes],
    }


def pairs_one_by_one(levels: list[torch.Tensor], pairs: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Importance of a keyframe's tokens to another, with the index of the best one: each direction a product."""
    return [cosines(level[key], level[query]).max(dim=1).values for level in levels for query, key in pairs]


def select(options: argparse.Namespace, descriptors: Descriptors, keyframes: int) -> dict:
    """Seconds of a step's selection among so many keyframes, drawn anew in each step, and of the plain way."""
    size, budget = tuple(options.size), min(options.budget, keyframes - 1)
    starts = tuple(clip * options.frames // keyframes for clip in range(keyframes))
    plan = EditPlan(descriptors, Clips(starts, options.frames), KeyframeDraws(), device=options.device)
    plan.kept(plan.keyframes(0), budget, size)
    steps = range(1, 4 if keyframes <= 100 else 2)
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    now = timed(lambda: [plan.kept(plan.keyframes(step), budget, size) for step in steps], options.device) / len(steps)
    row = {"keyframes": keyframes, "budget": budget, "seconds of a step": now}
    if options.device == "cuda":
        row["extra GiB at most"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    few = list(plan.keyframes(0)[:8])
    maps = descriptors.maps(few, None, options.device)
    levels = [resize_tokens(maps, part).to(matching_dtype(options.device)) for part in layer_sizes(*size)]
    pairs = list(product(range(len(few)), repeat=2))
    pairs_one_by_one(levels, pairs[:4])
    products = timed(lambda: pairs_one_by_one(levels, pairs), options.device) * keyframes**2 / len(pairs)
    row["seconds of the plain way's products, from a sample"] = products
    row["plain products to now"] = products / now
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--size", type=int, nargs=2, default=(16, 24), help="height and width of the latent")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--clip", type=int, default=12, help="frames of a clip")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budget", type=int, default=4, help="keyframes' worth of tokens that are kept")
    parser.add_argument("--keyframes", type=int, nargs="+", default=[8, 24], help="in a step, to select tokens of")
    parser.add_argument("--each-step", type=int, default=3, help="steps timed of the way that reads for each step")
    parser.add_argument("--commit", help="to note in the result (default: ask git)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="matching-") as folder, torch.inference_mode():
        path = Path(folder) / "descriptors.safetensors"
        found = measure(
            options, random_descriptors(path, options.frames, options.channels, tuple(options.size), options.device)
        )
    about = {**machine(), "commit": commit(options.commit)}
    names = ("frames", "size", "channels", "clip", "steps", "budget")
    settings = {name: getattr(options, name) for name in names}
    text = json.dumps({**about, **settings, **found}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
