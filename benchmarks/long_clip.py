"""Edits clips of several lengths from file to file through a real ComfyUI server on the CPU, with the demo model.

For each length a server of its own: resident memory of its process over time, and what every stage takes for a frame,
by the clock and of CPU time, which other work on the machine changes less. Then the longest is judged: its memory
beside that of the shortest, its time a frame beside that of the second longest.

    COMFYUI_PATH=... python benchmarks/long_clip.py --frames 200 600 10000 --out results.json --plot results.svg

The clip is drawn by the demo world, a cut and a keyframe in every 50 frames; attention has a KV budget. Each length is
written to --out when it is done; lengths that stand there are not measured again.
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
CLOCKS = {"seconds": "time", "cpu": "CPU time"}
MOST_MEMORY = 1e9  # bytes that the longest may take more than the shortest
MOST_CHANGE = 0.15  # of the time a frame, up or down


def measure(frames: int, size: int, steps: int) -> dict:
    """One length, on a server of its own."""
    from comfy_client import ServerProcess
    from long_edit import edit_long_clip

    with tempfile.TemporaryDirectory(prefix="long-clip-") as folder:
        base = Path(folder)
        with ServerProcess(Path(os.environ["COMFYUI_PATH"]), base, cpu=True) as server:
            return edit_long_clip(server, frames, size, steps)


def measure_missing(lengths: list[int], about: dict, size: int, steps: int, out: Path | None) -> list[dict]:
    """The runs of all lengths, ascending; those that are in ``out`` are taken from there.

    Raises:
        SystemExit: one is missing in ``out``, and its others were made otherwise than this one would be.
    """
    known = json.loads(out.read_text()) if out and out.exists() else {**about, "runs": []}
    runs = {run["frames"]: run for run in known["runs"]}
    missing = [frames for frames in sorted(set(lengths)) if frames not in runs]
    changed = [f"{name} {known.get(name)}, now {value}" for name, value in about.items() if known.get(name) != value]
    if missing and changed:
        sys.exit(f"{out} cannot be gone on with: it has {'; '.join(changed)}. Name another file")
    for frames in missing:
        print(f"{frames} frames ...", file=sys.stderr, flush=True)
        runs[frames] = measure(frames, size, steps)
        if out:
            whole = json.dumps({**about, "runs": list(runs.values())}) + "\n"
            part = out.with_name(out.name + ".part")
            part.write_text(whole)
            part.replace(out)
    return [runs[frames] for frames in sorted(set(lengths))]


def per_frame(run: dict, clock: str) -> dict[str, float]:
    """Milliseconds for a frame by one of ``CLOCKS``: of each stage, and of ``all`` nodes together."""
    spent = {**{stage: run["stages"][stage][clock] for stage in STAGES}, "all": run[clock]}
    return {name: 1000 * value / run["frames"] for name, value in spent.items()}


def changes(runs: list[dict], clock: str) -> dict[str, float]:
    """How much more of its time a frame each stage of the longest run takes than in the run before it, as a share."""
    base, longest = (per_frame(run, clock) for run in runs[-2:])
    return {name: longest[name] / base[name] - 1 if base[name] else 0.0 for name in base}


def table(runs: list[dict]) -> str:
    """All runs side by side, in Markdown."""
    last = f"{runs[-1]['frames']:,} beside {runs[-2]['frames']:,}"
    rows = [["", *(f"{run['frames']:,} frames" for run in runs), last], ["---"] * (len(runs) + 2)]
    rows.append(["Peak resident memory of the ComfyUI process", *(f"{run['peak'] / 1e9:.2f} GB" for run in runs), ""])
    for clock, name in CLOCKS.items():
        rows.append([f"{name} in all", *(f"{run[clock]:.0f} s" for run in runs), ""])
    for clock, name in CLOCKS.items():
        columns, change = [per_frame(run, clock) for run in runs], changes(runs, clock)
        for stage in ("all", *STAGES):
            values = [f"{column[stage]:.1f} ms" for column in columns]
            rows.append([f"{name} a frame: {stage}", *values, f"{change[stage]:+.1%}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def verdict(runs: list[dict]) -> list[str]:
    """Whether the longest of ascending runs keeps to ``MOST_MEMORY`` and ``MOST_CHANGE``, in sentences."""
    longest, growth = runs[-1]["frames"], runs[-1]["peak"] - runs[0]["peak"]
    more = f"{longest} frames take {growth / 1e9:+.2f} GB beside {runs[0]['frames']}"
    lines = [f"Memory: {more}, {_within(growth <= MOST_MEMORY)} {MOST_MEMORY / 1e9:.1f} GB"]
    for clock, name in CLOCKS.items():
        change = changes(runs, clock)
        beyond = [f"{stage} {change[stage]:+.1%}" for stage in STAGES if abs(change[stage]) > MOST_CHANGE]
        sound = _within(abs(change["all"]) <= MOST_CHANGE)
        told = f"{change['all']:+.1%} beside {runs[-2]['frames']} frames, {sound} {MOST_CHANGE:.0%}"
        lines.append(f"{name} a frame: {told}; stages beyond it: {', '.join(beyond) or 'none'}")
    return lines


def _within(sound: bool) -> str:
    return "within" if sound else "NOT within"


def plot(runs: list[dict], path: Path) -> None:
    """Memory over the run, and milliseconds a frame of each stage by both clocks, for every length."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    figure, (left, *others) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for number, run in enumerate(runs):
        label, width = f"{run['frames']:,} frames", 0.8 / len(runs)
        done = [100 * at / run["seconds"] for at, _, _ in run["memory"]]
        left.plot(done, [size / 1e9 for _, size, _ in run["memory"]], label=label)
        places = [stage + (number - (len(runs) - 1) / 2) * width for stage in range(len(STAGES))]
        for axes, clock in zip(others, CLOCKS, strict=True):
            values = per_frame(run, clock)
            axes.bar(places, [values[stage] for stage in STAGES], width, label=label)
    left.set(xlabel="share of the run, %", ylabel="resident memory of ComfyUI, GB", ylim=(0, None))
    for axes, name in zip(others, CLOCKS.values(), strict=True):
        axes.set(ylabel=f"{name} a frame, ms")
        axes.set_xticks(range(len(STAGES)), STAGES)
    for axes in (left, *others):
        axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[200, 600, 10_000], help="at least two lengths")
    parser.add_argument("--size", type=int, default=128, help="width and height, pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, help="results; gone on with if it is there")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if len(set(options.frames)) < 2:
        parser.error("--frames: at least two lengths are compared")
    about = {**machine(), "commit": commit(), "cores": os.cpu_count(), "size": options.size, "steps": options.steps}
    about["threads"] = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    runs = measure_missing(options.frames, about, options.size, options.steps, options.out)
    print(table(runs), *verdict(runs), sep="\n")
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
