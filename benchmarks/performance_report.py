"""Writes the tables and plots of docs/performance.md from the results that are there.

    python benchmarks/performance_report.py

Reads ``benchmarks/results``: ``GPU-performance-*.json``, ``h100-attention.json``, ``*-fast-paths.json``,
``cpu-ratios.json`` and the two ``h100-stages-*.json`` of an earlier benchmark. What has no result yet says so.
"""

import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md", ROOT / "docs" / "images"
MISSING = "*Not measured yet.*"
# The published code, unchanged, on an H100 with diffusers 0.42: frames, seconds of an injecting step, GiB.
PUBLISHED = {
    "AdaFlow, published": [(1000, 31.1, 26.2)],
    "TokenFlow": [(96, 4.1, 28.5), (240, 12.9, 23.4), (480, 41.3, 62.4)],
}
TOKENFLOW_FAILS = 560
INJECTING, PAST = "step injecting", "step past injection"
INVERSION, FURTHER = "inversion, first step, descriptors taken", "inversion, each further step"
MATCHING = "matching, 50 draws"
TICKS = {
    "frames": [100, 250, 500, 1000, 2000, 4000],
    "keyframes": [25, 50, 100, 200, 400],
    "seconds": [1, 2, 5, 10, 20, 40],
}
GPUS = {"H100": "o-", "H200": "s-"}  # and how what was measured there is drawn
MANY = 400  # keyframes in one joint pass
LONG = 4000  # frames
SHARES = 40, 10  # steps of either kind in an edit


@dataclass(frozen=True)
class Case:
    """One measured edit; None is what was not measured.

    Attributes:
        memory: GiB that the GPU was made to have; 0: all.
        injecting, past: seconds of a step.
        peak: GiB, of the steps.
        peak_of_all: GiB, of the inversion, selection and matching too.
        minutes: of the whole.
        matching: seconds of matching for 50 draws and of taking descriptors.
    """

    file: str
    kind: str
    frames: int
    keyframes: int
    budget: int
    injecting: float
    past: float
    peak: float
    minutes: float | None
    memory: float = 0.0
    peak_of_all: float = 0.0
    matching: float | None = None

    @property
    def gpu(self) -> str:
        return self.file.split("-")[0].upper()

    @property
    def repeated(self) -> bool:
        """Whether it was measured again since."""
        return "performance-earlier" in self.file

    @property
    def editing(self) -> float:
        """Seconds of 50 steps."""
        return SHARES[0] * self.injecting + SHARES[1] * self.past


def read(name: str) -> dict | None:
    """A result by name, or None."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def cases() -> list[Case]:
    """Of the earlier benchmark and of this one."""
    found = []
    for path in sorted(RESULTS.glob("h100-stages-*.json")):
        old = json.loads(path.read_text())
        peak = max(old[INJECTING]["peak GiB"], old[PAST]["peak GiB"])
        seconds = old[INJECTING]["seconds"], old[PAST]["seconds"]
        found.append(Case(path.name, "earlier", old["frames"], old["clips"], old["budget"], *seconds, peak, None))
    for path in sorted(RESULTS.glob("*-performance-*.json")):
        result = json.loads(path.read_text())
        found += [measured_case(path.name, result, case) for case in result.get("cases", []) if PAST in case]
    return found


def measured_case(file: str, result: dict, case: dict) -> Case:
    """One of those in a result of performance.py, whole as far as its steps go."""
    options = result["options"]
    kind, memory = "compiled" if case["compiled"] else "eager", case.get("memory", options["memory"])
    if memory:
        kind += f", on {memory:g} GiB"
    if case.get("chunk"):
        kind += f", {case['chunk']} frames at a time"
    peaks = [part["peak GiB"] for part in case.values() if isinstance(part, dict) and "peak GiB" in part]
    if options["memory"] == memory:
        peaks += [
            part["peak GiB"] for name, part in result.items() if name.startswith("inversion") and "peak GiB" in part
        ]
    matching = None
    if MATCHING in case and INVERSION in result:
        taking = result[INVERSION]["seconds"] - result[FURTHER]["seconds"]
        matching = case[MATCHING]["seconds"] + max(0.0, taking)
    return Case(
        file, kind, options["frames"], case["keyframes"], case["budget"], case[INJECTING]["seconds"],
        case[PAST]["seconds"], case["peak GiB"], case.get("extrapolated, whole edit in minutes"), memory,
        max(case["peak GiB"], *peaks), matching,
    )  # fmt: skip


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def case_table(found: list[Case]) -> str:
    """Every case in a row."""
    rows = [
        [
            f"[{case.kind}](../benchmarks/results/{case.file})", case.gpu, case.frames, case.keyframes, case.budget,
            f"{case.injecting:.1f}", f"{case.past:.1f}", f"{case.peak:.1f}",
            "" if case.minutes is None else f"{case.minutes:.1f}",
        ]
        for case in sorted(found, key=lambda case: (case.frames, case.keyframes, case.budget, case.gpu, case.kind))
    ]  # fmt: skip
    head = ["", "GPU", "frames", "keyframes", "budget", "step injecting, s", "past injection, s", "peak GiB",
            "whole, min"]  # fmt: skip
    return table(head, rows)


def one_of(found: list[Case], kind: str) -> Case | None:
    """The case of that kind of 1000 frames with 40 keyframes and a budget of 20; one with a whole first."""
    fitting = [c for c in found if (c.kind, c.frames, c.keyframes, c.budget) == (kind, 1000, 40, 20)]
    return min(fitting, key=lambda case: case.minutes is None, default=None)


def target_table(found: list[Case]) -> str:
    """What was to be reached beside what was, at 1000 frames, 40 keyframes and a budget of 20 unless it says else."""
    rows = []

    def add(what: str, published: str, target: float, reached: float | None, unit: str, digits: int = 1) -> None:
        got = "not measured" if reached is None else f"{reached:.{digits}f}{unit}"
        verdict = "" if reached is None else "yes" if reached <= target else "**no**"
        rows.append([what, published, f"{target:g}{unit}", got, verdict])

    eager, compiled = one_of(found, "eager"), one_of(found, "compiled")
    six, four = one_of(found, "eager, on 6 GiB"), one_of(found, "eager, on 4 GiB")
    many = next((c for c in found if c.kind == "eager" and c.keyframes == MANY and c.budget == 20), None)
    limits = [("eager", eager, 6.0, 5.2, 7.5), ("compiled", compiled, 4.5, 3.8, 5.5)]
    for kind, case, injecting, _, _ in limits:
        add(f"step injecting, {kind}", "31.1 s", injecting, case and case.injecting, " s", 2)
    for kind, case, _, past, _ in limits:
        add(f"step past injection, {kind}", "28.7 s", past, case and case.past, " s", 2)
    for kind, case, _, _, minutes in limits:
        add(f"inversion, selection and 50 steps, {kind}", "about 32 min", minutes, case and case.minutes, " min")
    add("descriptors and matching, 50 draws", "77 s", 15, eager and eager.matching, " s")
    add("peak GPU memory", "26.2 GiB", 6, eager and eager.peak_of_all, " GiB")
    if six:
        add("the same, on a GPU made to have 6 GiB", "26.2 GiB", 6, six.peak_of_all, " GiB")
        add("50 steps of editing there", "25.5 min", 292, six.editing, " s")
    add("peak GPU memory in a low-memory setting, a GPU made to have 4 GiB", "-", 4, four and four.peak_of_all, " GiB")
    add("50 steps there, against the whole GPU", "-", 1.5, four and eager and four.editing / eager.editing, " times", 2)
    frames = f", {many.frames} frames" if many else ""
    add(
        f"peak GPU memory of {MANY} keyframes in one joint pass{frames}", "does not fit", 16, many and many.peak, " GiB"
    )
    long = [c for c in found if c.kind.startswith("eager") and (c.frames, c.keyframes, c.budget) == (LONG, 160, 20)]
    for case in long or [None]:
        both = case is not None and eager is not None
        where = f", {LONG} on a GPU made to have {case.memory:g} GiB" if case and case.memory else ""
        per_frame = (case.editing / case.frames) / (eager.editing / eager.frames) if both else None
        add(f"time for each frame of a step, {LONG} frames against 1000{where}", "-", 1.1, per_frame, " times", 2)
        add(f"peak GPU memory of a step, {LONG} frames against 1000{where}", "TokenFlow ends at about 560 frames", 1.1,
            case.peak / eager.peak if both else None, " times", 2)  # fmt: skip
    return table(["", "published, on an H100", "to reach, at most", "reached", "met"], rows)


def attention_table() -> str:
    """Every backend at every shape."""

    def cell(timed: dict) -> str:
        return f"{timed['ms']:.3f} ({timed['TFLOP/s']:.0f})" if "ms" in timed else "does not run"

    result = read("h100-attention.json")
    if result is None:
        return MISSING
    rows = [
        [
            row["tokens"], row["heads"], row["query frames"], row["budget"],
            *(cell(row[name]) for name in ("gather and SDPA", "gather and cuDNN", "kernel")),
            f"{row['gather and SDPA']['ms'] / row['kernel']['ms']:.2f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["tokens", "heads", "query frames", "budget", "gather and SDPA, ms (TFLOP/s)",
            "gather and cuDNN, ms (TFLOP/s)", "kernel, ms (TFLOP/s)", "SDPA / kernel"]  # fmt: skip
    tiles = f"Tiling: {result['tiles chosen']}.\n\n" if "tiles chosen" in result else ""
    return f"{result['gpu']}, commit {result['commit'][:7]}. {tiles}" + "\n\n" + table(head, rows)


def fast_path_table() -> str:
    """How far fast paths are from plain ones, on each machine that has a result."""
    parts = []
    for name in ("h100-fast-paths.json", "cpu-fast-paths.json"):
        result = read(name)
        if result is None:
            parts.append(f"`{name}`: {MISSING}")
            continue
        rows = [
            [row["path"], row["precision"], f"{row['relative difference']:.1e}", f"{row['limit']:.0e}"]
            for row in result["rows"]
        ]
        machine = "On a CPU" if result["gpu"] == "none" else f"On an {result['gpu']}"
        broken_off = "" if result.get("complete", True) else " (the run was broken off)"
        parts.append(f"{machine}{broken_off}:\n\n" + table(["what", "precision", "relative difference", "limit"], rows))
    return "\n\n".join(parts)


def ratio_table() -> str:
    """The CPU's ratios."""
    result = read("cpu-ratios.json")
    if result is None:
        return MISSING
    rows = [[title, name, ratio] for title, part in result["ratios"].items() for name, ratio in part.items()]
    return table(["", "", "ratio"], rows)


def profile_table() -> str:
    """Where a step's time goes, of every case that was profiled."""
    parts = []
    for path in sorted(RESULTS.glob("*-performance-*.json")):
        result = json.loads(path.read_text())
        for case, (what, step) in product(
            result.get("cases", []), {"injecting": INJECTING, "past injection": PAST}.items()
        ):
            families = case.get(f"a {step}, profiled", {}).get("seconds by family")
            if families:
                kind = "compiled" if case["compiled"] else "eager"
                title = f"{result['options']['frames']} frames, {case['keyframes']} keyframes, {kind}, {what}:"
                parts.append(title + "\n\n" + table(["kernels", "seconds"], list(families.items())))
    return "\n\n".join(parts) or MISSING


def plot(found: list[Case], by: str, chosen, baselines: dict, path: Path) -> None:
    """Seconds of an injecting step, and GiB, against frames or keyframes, without compiling.

    Args:
        chosen: case -> whether it is drawn.
        baselines: by name, (x, seconds, GiB) each.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for name, points in baselines.items():
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot([p[0] for p in points], [p[column] for p in points], "x--", label=name)
    shown = [
        c
        for c in found
        if chosen(c) and not c.repeated and c.kind.startswith(("earlier", "eager")) and "at a time" not in c.kind
    ]
    for gpu, kind in dict.fromkeys((case.gpu, case.kind) for case in shown):
        points = sorted((getattr(c, by), c.injecting, c.peak) for c in shown if (c.gpu, c.kind) == (gpu, kind))
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot([p[0] for p in points], [p[column] for p in points], GPUS[gpu], label=f"this pack, {gpu}, {kind}")
    axes[0].set(xlabel=by, ylabel="seconds of an injecting step", xscale="log", yscale="log")
    axes[1].set(xlabel=by, ylabel="peak GPU memory, GiB", xscale="log", ylim=(0, None))
    if by == "frames":
        axes[1].axvline(TOKENFLOW_FAILS, linestyle=":", color="grey", label="TokenFlow out of 80 GiB")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xticks(TICKS[by], map(str, TICKS[by]))
        axis.minorticks_off()
    axes[0].set_yticks(TICKS["seconds"], map(str, TICKS["seconds"]))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    plt.rcParams["svg.hashsalt"] = path.name
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write_section(page: str, name: str, content: str) -> str:
    """``page`` with the text between the markers of section ``name`` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    replaced, count = re.subn(pattern, lambda _: f"{begin}\n{content}\n{end}", page, flags=re.S)
    if count != 1:
        raise ValueError(f"{PAGE.name} has {count} sections {name}")
    return replaced


def sections() -> dict[str, str]:
    """The page's parts, by the name in their markers."""
    found = cases()
    return {
        **{f"targets on an {gpu}": target_table([c for c in found if c.gpu == gpu and not c.repeated]) for gpu in GPUS},
        "cases": case_table(found),
        "profile": profile_table(),
        "attention": attention_table(),
        "fast paths": fast_path_table(),
        "ratios": ratio_table(),
    }


def main() -> None:
    found = cases()
    per_1000 = {"AdaFlow, published": [(40, 31.1, 26.2)]}
    plot(found, "frames", lambda c: c.budget == 20 and c.keyframes == round(c.frames / 25), PUBLISHED,
         IMAGES / "performance-frames.svg")  # fmt: skip
    plot(found, "keyframes", lambda c: 1000 <= c.frames <= 1200 and c.budget == 20, per_1000,
         IMAGES / "performance-keyframes.svg")  # fmt: skip
    page = PAGE.read_text()
    for name, content in sections().items():
        page = write_section(page, name, content)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
