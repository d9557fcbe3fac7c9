"""Runs scripts/demo as its first user would, on 2 cores without a GPU, and measures its edits against the truth.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/demo_edit.py --edit colour=blue season=winter style=watercolour
    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/demo_edit.py --edit colour=blue --folder FOLDER

The first command runs the demo for each edit, the second measures what a run left in FOLDER. Both put what they find
into benchmarks/results/demo-edit.json, in the place of what that held of the same edit, and write the table of
docs/quality.md of it. That page says what is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("training", "scripts"))

import psutil
import torch
from common import ROOT, pack_module, start_comfyui
from data import truth_of
from demo_clip import demo_clip
from provenance import commit, machine
from quality_report import fill, write_json
from torch import Tensor

CORES = 2
FRAMES = 96  # that scripts/demo draws
SHARE, DECIBELS, FLICKER, SECONDS, BYTES = 0.95, 25.0, 1.3, 240, 3e9  # what is asked of the demo
IDLE = 0.1  # share of the machine that other work may take where seconds that are too many shall count
MARKERS = "<!-- {} of the table written by benchmarks/demo_edit.py -->"
RESULT = ROOT / "benchmarks" / "results" / "demo-edit.json"
RUN = "run.json"  # what a run leaves in its folder of its seconds and its memory
INTERVAL = 0.2  # seconds between two looks at the memory


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    times = psutil.cpu_times()
    return sum(times[: len(times._fields) - 2]) - times.idle - getattr(times, "iowait", 0)  # guest time is user time


def own_seconds() -> float:
    """CPU seconds of the children that have ended, with theirs."""
    times = os.times()
    return times.children_user + times.children_system


def watch_memory(process: psutil.Process, peak: list[int]) -> None:
    """Keep in ``peak`` the most bytes that the process and its children held resident together, until it ends."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        held = 0
        for one in (process, *process.children(recursive=True)):
            try:
                held += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], held)
        time.sleep(INTERVAL)


def run_demo(edit: str, folder: Path) -> None:
    """Run scripts/demo on ``CORES`` cores and no GPU; its files and ``RUN`` are left in ``folder``.

    Raises:
        SystemExit: the demo failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    command = [str(ROOT / "scripts" / "demo"), "--edit", edit, "--output", str(folder)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    busy, own, started, peak = busy_seconds(), own_seconds(), time.perf_counter(), [0]
    process = subprocess.Popen(
        command, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, cores), stdin=subprocess.DEVNULL
    )
    watcher = threading.Thread(target=watch_memory, args=(psutil.Process(process.pid), peak), daemon=True)
    watcher.start()
    if process.wait():
        raise SystemExit(f"scripts/demo --edit {edit} failed; {folder / 'server.log'} may say why")
    seconds, own = time.perf_counter() - started, own_seconds() - own
    others = max(0.0, busy_seconds() - busy - own) / (seconds * psutil.cpu_count())
    found = {
        "seconds": seconds, "cpu seconds": own, "cores": len(cores), "peak memory, bytes": peak[0],
        "share of the machine taken by other work": others,
    }  # fmt: skip
    (folder / RUN).write_text(json.dumps(found))


def read_video(path: Path) -> Tensor:
    """All frames as AdaFlowLoadVideo reads them, (frames, 3, height, width) from 0 to 1."""
    video = pack_module("adaflow.video")
    chunks = video.VideoClip(video.probe(path)).frames(FRAMES)
    return torch.cat([torch.from_numpy(chunk) for chunk in chunks]).movedim(-1, 1).float() / 255


class DemoTruth:
    """The demo clip and what an edit of it shall show.

    Attributes:
        source, truth: as the files in ``folder`` hold them, (frames, 3, height, width) from 0 to 1.
        masks: the object, (frames, height, width) bool.
        untouched: points that the edit leaves as they are in the world: drawn alike before and after.
        flow, visible: of the world, see :func:`quality_measures.warping_error`.
    """

    def __init__(self, edit: str, folder: Path):
        self.attribute, _, value = edit.partition("=")
        self.source, self.truth = (read_video(folder / name) for name in ("source.mp4", "truth.mp4"))
        frames, _, height, width = self.source.shape
        clip = demo_clip(frames)
        self.scene = clip.edited(**{self.attribute: value}).shots[0].scene
        drawn = clip.render(0, frames, height, width)
        edited = clip.edited(**{self.attribute: value}).render(0, frames, height, width)
        self.masks = drawn.masks
        self.untouched = (drawn.images - edited.images).abs().amax(1) < 1 / 255
        self.flow, self.visible = clip.flow(0, frames - 1, height, width)


def measured(images: Tensor, demo: DemoTruth, reconstruction: Tensor, judge) -> dict:
    """Every measure of one clip (frames, 3, height, width); of style edits, which touch all, none of the untouched."""
    from quality_measures import psnr, shares, steadiness

    names = pack_module("adaflow.demo").ATTRIBUTES
    read = dict(zip(names, judge.read(images), strict=True))
    named = {name: value for name, value in zip(names, truth_of(demo.scene), strict=True) if value >= 0}
    right = read[demo.attribute] == named[demo.attribute]
    values = {**shares(read, named, demo.attribute), **steadiness(images, demo.flow, demo.visible, demo.masks)}
    values["psnr"] = psnr(images, demo.truth).mean().item()
    values["frames that miss the attribute"] = (~right).nonzero().flatten().tolist()
    if demo.untouched.any((1, 2)).all():
        untouched = psnr(images, reconstruction, demo.untouched)
        kept = untouched >= DECIBELS
        values |= {"untouched psnr, mean": untouched.mean().item(), "untouched psnr, least": untouched.min().item()}
        values |= {"untouched": kept.float().mean().item(), "asked and untouched": (kept & right).float().mean().item()}
    return values


def verdicts(clips: dict[str, dict], run: dict | None) -> dict[str, str]:
    """ "met", "missed" or why it cannot be said, of every number that is asked of the demo.

    Args:
        clips: what :func:`measured` found of the edit and of the truth, by name.
        run: what a run left of seconds and memory, if it is known.
    """
    edit, word = clips["edit"], lambda good: "met" if good else "missed"
    found = {"attribute as asked in 95 % of the frames": word(edit["asked"] >= SHARE)}
    name = "attribute as asked and untouched region within 25 dB in 95 % of the frames"
    found[name] = word(edit["asked and untouched"] >= SHARE) if "untouched" in edit else "nothing is left untouched"
    ratio = edit["warping object"] / clips["truth"]["warping object"]
    found["object's warping error at most 1.3 times the truth's"] = word(ratio <= FLICKER)
    seconds = memory = "not measured"
    if run:
        memory, seconds = word(run["peak memory, bytes"] < BYTES), word(run["seconds"] < SECONDS)
        if seconds == "missed" and run["share of the machine taken by other work"] > IDLE:
            seconds = "not to be said: beside other work"
    return found | {"under 4 minutes": seconds, "under 3 GB": memory}


def measure(edit: str, folder: Path, weights: Path, judge_file: Path) -> dict:
    """What a folder of scripts/demo holds, measured."""
    demo = DemoTruth(edit, folder)
    vae = pack_module("nodes.patching.demo_model").load_demo_model(weights)[2]
    judge = pack_module("adaflow.demo.judge").load_judge(judge_file)

    def decoded(images: Tensor) -> Tensor:
        return vae.decode(vae.encode(images.movedim(1, -1))).movedim(-1, 1).contiguous()

    reconstruction = decoded(demo.source)
    clips = {"edit": read_video(folder / "edit.mp4"), "truth": demo.truth}
    clips |= {"truth through the autoencoder": decoded(demo.truth), "source through the autoencoder": reconstruction}
    found = {name: measured(images, demo, reconstruction, judge) for name, images in clips.items()}
    run = json.loads((folder / RUN).read_text()) if (folder / RUN).is_file() else None
    return {"frames": len(demo.source), "run": run, "clips": found, "verdicts": verdicts(found, run)}


def table(edits: dict[str, dict]) -> str:
    """Markdown, a row an edit."""
    heads = (
        "Edit", "asked", "untouched, mean (least)", "asked and untouched", "PSNR to the truth (autoencoder's)",
        "object's warping error to the truth's (autoencoder's)", "seconds (other work)", "CPU seconds", "peak memory",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, found in edits.items():
        edit, truth, ceiling = (found["clips"][key] for key in ("edit", "truth", "truth through the autoencoder"))
        kept = ["", ""]
        if "untouched" in edit:
            kept[0] = f"{edit['untouched psnr, mean']:.1f} dB ({edit['untouched psnr, least']:.1f})"
            kept[1] = f"{edit['asked and untouched']:.1%}"
        own, best = (clip["warping object"] / truth["warping object"] for clip in (edit, ceiling))
        cells = [name, f"{edit['asked']:.1%}", *kept, f"{edit['psnr']:.2f} dB ({ceiling['psnr']:.2f})"]
        cells += [f"{own:.2f} ({best:.2f})", "", "", ""]
        if found["run"]:
            run, others = found["run"], found["run"]["share of the machine taken by other work"]
            cells[-3:] = [f"{run['seconds']:.0f} ({others:.0%})", f"{run['cpu seconds']:.0f}"]
            cells.append(f"{run['peak memory, bytes'] / 1e9:.2f} GB")
        lines.append("| " + " | ".join(cells) + " |")
    missed = [
        f"- {name}: {what}: {verdict}."
        for name, found in edits.items()
        for what, verdict in found["verdicts"].items()
        if verdict != "met"
    ]
    return "\n".join(
        [*lines, "", "Not met, or not to be said:" if missed else "All that is asked is met.", "", *missed]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edit", nargs="+", default=["colour=blue"], metavar="WHAT=VALUE")
    parser.add_argument("--folder", type=Path, help="measure what a run left here, for one edit; run nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark-files" / "demo-edit", help="of the runs")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: the result in the repository, and its table")
    parser.add_argument("--commit", help="to note in the result (default: ask git)")
    arguments = parser.parse_args()
    if arguments.folder and len(arguments.edit) > 1:
        parser.error("--folder holds one edit")
    folders = {edit: arguments.folder or arguments.output / edit for edit in arguments.edit}
    if not arguments.folder:
        for edit, folder in folders.items():
            run_demo(edit, folder)
    start_comfyui()
    weights, judge = (ROOT / "demo_model" / f"{name}.safetensors" for name in ("weights", "classifier"))
    result = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"edits": {}}
    about = {"commit": arguments.commit or commit(), **machine()}
    about |= {"weights": hashlib.sha256(weights.read_bytes()).hexdigest()}
    with torch.inference_mode():
        for edit, folder in folders.items():
            found = {**about, **measure(edit, folder, weights, judge)}
            result["edits"][edit] = found
            print(edit, json.dumps(found["verdicts"], indent=1), flush=True)
    write_json(arguments.out, result)
    if arguments.out == RESULT:
        fill(ROOT / "docs" / "quality.md", MARKERS, table(result["edits"]))


if __name__ == "__main__":
    main()
