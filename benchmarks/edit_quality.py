"""Measures edits of the demo model against the truth that the demo world knows.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/edit_quality.py --part 1/5 --pieces FOLDER [--settings NAME ...]
    python benchmarks/edit_quality.py --collect --pieces FOLDER

The first command makes one file per clip and edit and leaves out what is there: parts may run beside each other, a
broken one may be started again, and a later call with other settings adds them to the same files. The second makes
benchmarks/results/edit-quality.json, the tables of docs/quality.md and docs/images/quality.png of them. docs/quality.md
says what is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

import torch
from common import ROOT, pack_module, start_comfyui
from data import HELD_OUT, truth_of
from inverting import invert
from provenance import commit, machine
from quality_report import EACH, INTERPOLATED, NOT_INJECTED, OWN, SHORT, TOKENFLOW
from torch import Tensor

WHERE = "edit_quality"
FIRST_CLIP = HELD_OUT + 2_000_000  # seed of the first clip; those of its scenes are drawn from 0 to 2**63
EDITS = ("foreground", "background", "style")
STYLES = ("pencil sketch", "watercolour", "pixel art")
UNIFORM = 8  # frames of a clip in TokenFlow's settings


@dataclass(frozen=True)
class Options:
    """What decides the numbers.

    Attributes:
        inversion_steps, steps, refine: those of the demo.
        cfg: guidance of foreground, background and style edits.
        feature_share, attention_share: of the settings that inject.
        short: most frames of a clip in the settings that compare budgets, so that keyframes are more than these.
        precision: of products of float32 on a GPU, float32 or tf32.
    """

    clips: int = 20
    frames: int = 48
    shots: int = 2
    height: int = 128
    width: int = 192
    inversion_steps: int = 16
    refine: int = 1
    steps: int = 16
    cfg: tuple[float, ...] = (1.5, 2.0, 2.0)
    feature_share: float = 0.8
    attention_share: float = 0.8
    short: int = 2
    mean_threshold: float = 0.94
    window_threshold: float = 0.5
    budgets: tuple[int, ...] = (20, 8, 2)
    edits: tuple[str, ...] = EDITS
    precision: str = "tf32"


SMALL = Options(clips=1, frames=8, height=64, width=96, inversion_steps=2, steps=2, budgets=(2, 1))


@dataclass(frozen=True)
class Setting:
    """One way to edit.

    Attributes:
        cut: how clips are made: "each frame", "uniform", "adaptive" or, adaptive too but held short, "short".
        budget: KV budget in keyframes; 0 has no limit.
        interpolate: whether outputs are blended.
        injected: whether the source's features are injected.
    """

    name: str
    cut: str
    budget: int
    interpolate: bool
    injected: bool = True


def chosen_settings(settings: list[Setting], parts_of_names: list[str] | None) -> list[Setting]:
    """Those whose name has one of ``parts_of_names`` in it; all where that is None.

    Raises:
        SystemExit: one of them is in no name.
    """
    for part in parts_of_names or ():
        if not any(part in setting.name for setting in settings):
            names = "\n  ".join(setting.name for setting in settings)
            raise SystemExit(f"--settings is {part!r}, which is in no name of\n  {names}")
    return [s for s in settings if parts_of_names is None or any(part in s.name for part in parts_of_names)]


def settings_of(options: Options) -> list[Setting]:
    """All that are compared."""
    made = []
    for injected in (True, False):
        prefix = "" if injected else NOT_INJECTED
        made += [
            Setting(prefix + EACH, "each frame", 1, False, injected),
            Setting(prefix + TOKENFLOW, "uniform", 0, True, injected),
        ]
        for interpolate in (False, True):
            name = prefix + OWN + INTERPOLATED * interpolate
            made.append(Setting(name, "adaptive", options.budgets[0], interpolate, injected))
    for injected, budgets in ((True, (0, *options.budgets)), (False, options.budgets[:2])):
        for interpolate in (False, True):
            for budget in budgets:
                name = SHORT.format(budget or "unlimited") + INTERPOLATED * interpolate
                made.append(Setting(name if injected else NOT_INJECTED + name, "short", budget, interpolate, injected))
    return made


@dataclass(frozen=True)
class Task:
    """One edit of one clip: the source, the truth, and what is asked for."""

    number: int
    edit: str
    source: object
    truth: object
    attribute: str

    @property
    def name(self) -> str:
        return f"clip{self.number:02}-{self.edit}"

    @property
    def scene(self):
        """Any of the truth's; all have the same attributes."""
        return self.truth.shots[0].scene

    def captions(self) -> tuple[str, str]:
        """Of the source and of the truth, in the same words."""
        return self.source.caption(self.number), self.truth.caption(self.number)

    def about(self) -> dict:
        """What was asked for, as JSON holds it."""
        before, after = (getattr(clip.shots[0].scene, self.attribute) for clip in (self.source, self.truth))
        return {
            "clip": self.number,
            "seed": FIRST_CLIP + self.number,
            "edit": self.edit,
            "asked": {self.attribute: [before, after]},
            "captions": list(self.captions()),
        }


def make_task(options: Options, number: int, edit: str) -> Task:
    """Clip ``number`` as a photo and one change of it; kinds of change alternate from clip to clip."""
    world = pack_module("adaflow.demo")
    source = world.Clip.random(FIRST_CLIP + number, options.frames, options.shots, fps=12, style="photo")
    attribute = {"foreground": "colour", "background": ("season", "time")[number % 2], "style": "style"}[edit]
    if edit == "style":
        value = STYLES[number % len(STYLES)]
    else:
        values = world.ATTRIBUTES[attribute]
        before = values.index(getattr(source.shots[0].scene, attribute))
        value = values[(before + 1 + number // 2 % (len(values) - 1)) % len(values)]
    return Task(number, edit, source, source.edited(**{attribute: value}), attribute)


def tasks_of(options: Options, part: int, parts: int) -> Iterator[Task]:
    """The tasks of one part: all of its clips, which are inverted once each."""
    for number in range(options.clips * (part - 1) // parts, options.clips * part // parts):
        for edit in options.edits:
            yield make_task(options, number, edit)


class Bench:
    """The demo model, its judge, and a folder for trajectories."""

    def __init__(self, options: Options, weights: Path, judge: Path, folder: Path):
        self.options, self.folder = options, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.clip, self.vae = pack_module("nodes.patching.demo_model").load_demo_model(weights)
        self.judge = pack_module("adaflow.demo.judge").load_judge(judge, self.device)
        self.text = pack_module("nodes.patching.preview").NodeText(WHERE)
        # a GPU takes the whole clip at once; elsewhere the pack chooses
        self.chunk = options.frames if self.device.type == "cuda" else 0

    def prompt(self, caption: str):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images (frames, 3, height, width) from 0 to 1."""
        return self.vae.encode(images.movedim(1, -1).cpu())

    def decode(self, latents: Tensor) -> Tensor:
        """Images (frames, 3, height, width) on the device."""
        return self.vae.decode(latents).movedim(-1, 1).to(self.device).contiguous()

    def render(self, clip):
        return clip.render(0, len(clip), self.options.height, self.options.width, self.device)


class Source:
    """A clip, inverted once for all of its edits."""

    def __init__(self, bench: Bench, clip, caption: str):
        self.bench, self.clip = bench, clip
        rendered = bench.render(clip)
        self.images, self.masks = rendered.images, rendered.masks
        latents = bench.encode(rendered.images)
        self.decoded = bench.decode(latents)
        self.flow, self.visible = clip.flow(0, len(clip) - 1, bench.options.height, bench.options.width, bench.device)
        self.trajectory, self.descriptors, _ = invert(
            bench.model,
            bench.prompt(caption),
            latents,
            bench.options.inversion_steps,
            bench.folder,
            WHERE,
            bench.chunk,
            bench.options.refine,
        )
        self._plans: dict[str, object] = {}

    def plan(self, cut: str):
        """Clips and keyframes; one for all edits, since matches are kept in it."""
        if cut not in self._plans:
            draws = pack_module("adaflow.keyframes").KeyframeDraws()
            device = self.bench.device
            self._plans[cut] = pack_module("adaflow.plan").EditPlan(
                self.descriptors, self._clips(cut), draws, device=device
            )
        return self._plans[cut]

    def _clips(self, cut: str):
        keyframes, options = pack_module("adaflow.keyframes"), self.bench.options
        if cut in ("uniform", "each frame"):
            length = UNIFORM if cut == "uniform" else 1
            return keyframes.Clips(tuple(range(0, options.frames, length)), options.frames)
        thresholds = keyframes.CutThresholds(options.mean_threshold, options.window_threshold)
        if cut == "short":
            thresholds = replace(thresholds, max_clip=options.short)
        found, device = self.descriptors, self.bench.device
        return keyframes.cut_clips(
            lambda frames: found.tokens(frames, device=device), found.frames, found.size, thresholds
        )


class Editing:
    """One task carried out in every setting, and measured."""

    def __init__(self, source: Source, task: Task):
        self.bench, self.source, self.task = source.bench, source, task
        self.prompt, self.negative = self.bench.prompt(task.captions()[1]), self.bench.prompt("")
        self._done: dict[tuple, tuple[Tensor, float]] = {}

    @cached_property
    def truth(self) -> Tensor:
        return self.bench.render(self.task.truth).images

    def edited(self, setting: Setting) -> tuple[Tensor, float]:
        """Images, and the seconds they took; settings that come to the same are done once."""
        plan = self.source.plan(setting.cut)
        budget = min(setting.budget or len(plan.clips), len(plan.clips))
        key = setting.cut, budget, setting.interpolate, setting.injected
        if key not in self._done:
            started = time.perf_counter()
            images = self.bench.decode(self._sample(plan, replace(setting, budget=budget)))
            self._done[key] = images, time.perf_counter() - started
        return self._done[key]

    def _sample(self, plan, setting: Setting) -> Tensor:
        bench, options, trajectory = self.bench, self.bench.options, self.source.trajectory
        shares = (options.feature_share, options.attention_share) if setting.injected else (0.0, 0.0)
        settings = pack_module("nodes.patching.evaluator").EditSettings(
            *shares, setting.interpolate, setting.budget, bench.chunk
        )
        cfg = options.cfg[EDITS.index(self.task.edit)]
        edit = pack_module("nodes.patching.edit").Edit(
            bench.model, self.prompt, self.negative, trajectory, plan, settings,
            options.steps, cfg, "ddim", "ddim_uniform", 0,
        )  # fmt: skip
        edit.check(WHERE)
        run = pack_module("adaflow.runs").open_run(bench.folder, "edit", {"task": self.task.name}, afresh=True)
        try:
            return edit.sample(settings, WHERE, tuple(range(trajectory.frames)), run, bench.text)
        finally:
            run.close()

    def measured(self, images: Tensor) -> dict[str, float]:
        """All measures of one edit; of the truth itself those that compare it with nothing."""
        from quality_measures import against_truth, psnr, shares, steadiness

        source, task = self.source, self.task
        values = steadiness(images, source.flow, source.visible, source.masks)
        if images is not self.truth:
            values |= against_truth(images, self.truth, source.masks)
            if task.edit == "foreground":
                values["psnr untouched"] = psnr(images, source.decoded, ~source.masks).nanmean().item()
        names = pack_module("adaflow.demo").ATTRIBUTES
        read = dict(zip(names, self.bench.judge.read(images), strict=True))
        named = {name: value for name, value in zip(names, truth_of(task.scene), strict=True) if value >= 0}
        return values | shares(read, named, task.attribute)

    def run(self, settings: list[Setting]) -> tuple[dict, dict[str, Tensor]]:
        """What a piece holds of this task, and the images of each row of its sheet."""
        rows = {"source": self.source.images, "truth": self.truth}
        rows["truth through the autoencoder"] = self.bench.decode(self.bench.encode(self.truth))
        rows["source through the autoencoder"] = self.source.decoded
        seconds = {}
        for setting in settings:
            rows[setting.name], seconds[setting.name] = self.edited(setting)
        measures = {name: self.measured(images) for name, images in rows.items() if name != "source"}
        keyframes = {cut: len(self.source.plan(cut).clips) for cut in ("adaptive", "short")}
        found = {**self.task.about(), "keyframes": keyframes, "seconds": seconds, "measures": measures}
        return found, rows


def held_piece(path: Path, about: dict) -> dict:
    """What earlier calls put into a piece; empty where there is none.

    Raises:
        SystemExit: it was made in another way.
    """
    from quality_report import differing

    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    unlike = differing(held["about"], about)
    if unlike:
        raise SystemExit(f"{path} was made with another {', '.join(unlike)}: take another folder for --pieces")
    return held


def merged(held: dict, found: dict, settings: list[Setting]) -> dict:
    """A piece with all settings of ``held`` and of ``found``, in the order in which they are shown."""
    measures = found["measures"] | held.get("measures", {})
    names = [setting.name for setting in settings]
    order = [name for name in measures if name not in names] + [name for name in names if name in measures]
    seconds = held.get("seconds", {}) | found["seconds"]
    return {**found, "seconds": seconds, "measures": {name: measures[name] for name in order}}


def run_part(arguments: argparse.Namespace, options: Options, folder: Path) -> None:
    """Carry out what is chosen of one part's tasks and not in their pieces yet."""
    from quality_report import write_json, write_sheet

    settings, bench, source = settings_of(options), None, None
    chosen = chosen_settings(settings, arguments.settings)
    about = {
        "commit": arguments.commit or commit(),
        **machine(),
        "weights": hashlib.sha256(arguments.weights.read_bytes()).hexdigest(),
        "judge": hashlib.sha256(arguments.judge.read_bytes()).hexdigest(),
        "options": json.loads(json.dumps(vars(options))),
    }
    for task in tasks_of(options, *arguments.part):
        piece = arguments.pieces / f"{task.name}.json"
        held = held_piece(piece, about)
        missing = [setting for setting in chosen if setting.name not in held.get("measures", {})]
        if not missing:
            continue
        started = time.perf_counter()
        bench = bench or Bench(options, arguments.weights, arguments.judge, folder)
        if source is None or source.clip != task.source:
            source = Source(bench, task.source, task.captions()[0])
        inverted = time.perf_counter() - started
        found, rows = Editing(source, task).run(missing)
        write_json(piece, {"about": about, **merged(held, found, settings)})
        if arguments.sheets:
            title, short = " -> ".join(task.captions()), ("source", OWN, "truth")
            write_sheet(arguments.sheets / f"{task.name}.png", rows, title)
            if OWN in rows:
                write_sheet(arguments.sheets / f"{task.name}-short.png", {name: rows[name] for name in short}, title)
        took = time.perf_counter() - started
        print(f"{task.name}: {took:.1f} s, before the edits {inverted:.1f} s; {task.captions()[1]}", flush=True)


def parse() -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    part = lambda text: tuple(map(int, text.split("/")))  # noqa: E731
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="do the I-th of N shares of the clips")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="only those with one of these in their names")
    parser.add_argument("--pieces", type=Path, default=ROOT / "benchmark-files" / "edit-quality", metavar="FOLDER")
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help="also write pictures of what this call edits")
    parser.add_argument("--collect", action="store_true", help="merge the pieces, write table and plot; no ComfyUI")
    parser.add_argument("--weights", type=Path, default=ROOT / "demo_model" / "weights.safetensors")
    parser.add_argument("--judge", type=Path, default=ROOT / "demo_model" / "classifier.safetensors")
    parser.add_argument("--commit", help="to note in the result (default: ask git)")
    parser.add_argument("--small", action="store_true", help="a minute of work, to try it; options given still count")
    for field in fields(Options):
        name, many = "--" + field.name.replace("_", "-"), isinstance(field.default, tuple)
        kind = type(field.default[0] if many else field.default)
        parser.add_argument(name, type=kind, nargs="+" if many else None, help=f"default {field.default}")
    arguments = parser.parse_args()
    given = {field.name: getattr(arguments, field.name) for field in fields(Options)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    return arguments, replace(SMALL if arguments.small else Options(), **given)


def main() -> None:
    arguments, options = parse()
    if arguments.collect:
        from quality_report import collect

        return collect(arguments.pieces, ROOT)
    start_comfyui()
    import comfy.utils
    from comfy.cli_args import args

    args.fp32_vae = True  # as the UNet is, so that a GPU and a CPU find the same numbers
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
    comfy.utils.set_progress_bar_enabled(False)
    os.fsync = lambda _: (
        None
    )  # nothing here must survive a power loss, and waiting for the disk takes longer than a step
    with tempfile.TemporaryDirectory(prefix="edit-quality-") as folder, torch.inference_mode():
        run_part(arguments, options, Path(folder))


if __name__ == "__main__":
    main()
