"""Times an edit, stage by stage and as a whole, with a UNet of SD 2.1's full size and random weights.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/performance.py --frames 1000 --out FILE
    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/performance.py --cases 40:20 40:20:compiled 40:20:eager:4 400:20

Half precision, 384x672 (48x84 latents), guidance on, as the published figures were taken. Time and memory do not depend
on the values of weights or latents; clips are cut evenly, keyframes drawn anew for every step. No VAE.

Of the inversion and of both kinds of editing step a few are measured, after a first one that does not count (it
matches, compiles and warms up), and the whole is the sum of 50 + 50 steps of them: named "extrapolated". ``--full``
runs every step instead. The inversion is made once for all cases. The file is written after each stage and step; a case
that was broken off lacks what comes after, and one that failed says why.
"""

import argparse
import gc
import importlib.util
import itertools
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from harness import comfyui_version, measured, peak_gib, reset_peak, start_comfyui, synchronize, write_result
from kernel_families import profiled

STARTED = time.perf_counter()
INVERSION_STEPS = EDIT_STEPS = 50
INJECTING = 0.8
SEGMENT_UNIT = 2 << 20  # bytes of which torch's allocator takes large tensors' memory from CUDA
INVERSION, FURTHER = "inversion, first step, descriptors taken", "inversion, each further step"
MATCHING = f"matching, {EDIT_STEPS} draws"


class Case(NamedTuple):
    """What is edited with; ``memory`` in GiB and ``chunk`` in frames, 0 for all and automatic."""

    keyframes: int
    budget: int
    compiled: bool = False
    memory: float = 0.0
    chunk: int = 0


def parse_case(text: str) -> Case:
    """From ``keyframes:budget[:eager|compiled[:GiB[:chunk]]]``."""
    keyframes, budget, kind, memory, chunk = (text.split(":") + ["eager", "0", "0"][max(0, text.count(":") - 1) :])[:5]
    if kind not in ("eager", "compiled"):
        raise ValueError(text)
    return Case(int(keyframes), int(budget), kind == "compiled", float(memory), int(chunk))


@dataclass
class StepClock:
    """A Euler sampler that notes seconds and peak memory of each step.

    Attributes:
        ballast: GiB held by the benchmark itself, taken off every peak.
        profiles: by number of the step whose kernels go into it; its time is longer for that.
        save: called after each step.
    """

    ballast: float = 0.0
    profiles: dict[int, dict] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, following in itertools.pairwise(sigmas):
            reset_peak(empty=False)
            profile = self.profiles.get(len(self.seconds))
            synchronize()
            started = time.perf_counter()
            with nullcontext() if profile is None else profiled(profile):
                denoised = model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {}))
            x = x + (x - denoised) / sigma * (following - sigma)
            synchronize()
            self.seconds.append(round(time.perf_counter() - started, 3))
            self.peaks.append(round(peak_gib() - self.ballast, 2))
            print(f"  step {len(self.seconds)}: {self.seconds[-1]:.2f} s, {self.peaks[-1]:.2f} GiB", flush=True)
            self.save()
        return x


@contextmanager
def made_small(memory: float):
    """A GPU of ``memory`` GiB for torch, all of it for 0; yields the GiB of the tensor that takes up the others."""
    gc.collect()
    if not memory or not torch.cuda.is_available():
        yield 0.0
        return
    torch.cuda.empty_cache()
    size = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - int(memory * 2**30)
    size -= size % SEGMENT_UNIT  # else the rest of the last one is handed out, and the whole is never given back
    ballast = torch.empty(max(0, size), dtype=torch.uint8, device="cuda")
    yield ballast.nbytes / 2**30
    del ballast
    torch.cuda.empty_cache()


class Bench:
    """Model, prompts and the inverted clip.

    Args:
        save: called with nothing after each stage, writes the results.
    """

    def __init__(self, options, save: Callable[[], None]):
        from models import SD2, SD2_FULL, clip_latent, random_model

        self.options, self.save = options, save
        config, dtype = (SD2, torch.float32) if options.small else (SD2_FULL, torch.float16)
        self.size = (8, 12) if options.small else (48, 84)
        draw_on = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = random_model(config, "eps", 0, dtype, draw_on=draw_on)
        generator = torch.Generator().manual_seed(0)
        shape = (1, 77, config["context_dim"])
        self.prompts = [[[torch.randn(shape, generator=generator), {}]] for _ in range(3)]
        self.latent = clip_latent(options.frames, self.size)
        self.warm_up_latent = clip_latent(min(64, options.frames), self.size)
        self.trajectory = self.descriptors = None
        self.matched: dict[tuple, dict] = {}

    @contextmanager
    def stage(self, results: dict, name: str, ballast: float = 0.0):
        """Measure a block into ``results`` and write them."""
        with measured(results, name, ballast):
            yield
        self.save()

    def invert(self, latent, steps: int, resume: str = "start afresh") -> list[float]:
        """Invert; returns when each step was done, by ``time.perf_counter``."""
        import comfy.utils
        from adaflow_pack.nodes.invert import AdaFlowDDIMInvert

        self.trajectory = self.descriptors = None
        gc.collect()
        ends: list[float] = []
        comfy.utils.set_progress_bar_global_hook(lambda *_, **__: ends.append(time.perf_counter()))
        try:
            inverted = AdaFlowDDIMInvert.execute(
                self.model, self.prompts[0], {"samples": latent}, steps, "float16", self.options.chunk, resume
            )
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
        self.trajectory, self.descriptors, _ = inverted.args
        return ends

    def edit_steps(self) -> tuple[int, int]:
        """Editing steps to run that inject, and those after them: the first one and the profiled ones among them."""
        if self.options.full:
            return round(INJECTING * EDIT_STEPS), EDIT_STEPS - round(INJECTING * EDIT_STEPS)
        few = self.options.steps + self.options.profile
        return 1 + few, few

    def inversion(self, results: dict) -> None:
        """Time the inversion, and leave a trajectory of as many steps as will be edited."""
        self.invert(self.warm_up_latent, 1)
        with made_small(self.options.memory) as ballast:
            if self.options.full:
                done = "" if self.options.only_inversion else ", less what --only-inversion had done"
                with self.stage(results, f"inversion, 50 steps, descriptors taken{done}", ballast):
                    self.invert(self.latent, INVERSION_STEPS, "resume")
                return
            steps = sum(self.edit_steps())
            name = f"inversion, {steps} steps, descriptors taken"
            with measured(results, name, ballast):
                ends = self.invert(self.latent, steps)
        further = (ends[-1] - ends[0]) / (steps - 1)
        results[INVERSION] = {"seconds": round(results[name]["seconds"] - (steps - 1) * further, 3)}
        results[FURTHER] = {"seconds": round(further, 3)}
        self.save()

    def case(self, case: Case, out: dict) -> None:
        """Selection, matching and editing with one number of keyframes and one budget, measured into ``out``."""
        out |= case._asdict()
        print(f"{case.keyframes} keyframes, budget {case.budget}{', compiled' if case.compiled else ''}"
              f"{f', on {case.memory:g} GiB' if case.memory else ''}", flush=True)  # fmt: skip
        with made_small(case.memory) as ballast:
            with self.stage(out, "clip selection", ballast):
                plan = self.select(case)
            out["keyframes"] = len(plan.clips)
            if self.options.matching:
                alike = case.keyframes, case.memory  # neither budget nor compiling matter to matches
                if alike not in self.matched:
                    with self.stage(out, MATCHING, ballast):
                        self.match(plan)
                    self.matched[alike] = out[MATCHING]
                    plan = self.select(case)  # with nothing matched
                out[MATCHING] = self.matched[alike]
            self.edit(out, plan, case, ballast)

    def select(self, case: Case):
        from adaflow_pack.nodes.keyframes import AdaFlowKeyframeSelect

        longest = -(-self.options.frames // case.keyframes)
        selected = AdaFlowKeyframeSelect.execute(self.descriptors, -1.0, -1.0, longest, self.options.draws, 0, "")
        return selected.args[0]

    def match(self, plan) -> None:
        """All matches that an edit of 50 steps asks for, in its order."""
        frames, chunk = list(range(self.options.frames)), 32
        plan.device = self.model.load_device
        for step in range(EDIT_STEPS):
            plan.expect(range(step, EDIT_STEPS), False)
            keyframes = plan.keyframes(step)
            left = sorted(set(frames) - set(keyframes))
            for start in range(0, len(left), chunk):
                part = plan.propagation(left[start : start + chunk], keyframes, False)
                plan.matches(list(part.frames), part.keyframes, self.size)

    def edit(self, out: dict, plan, case: Case, ballast: float) -> None:
        """Steps of both kinds: the first, then those that count; or all 50."""
        import comfy.sample
        import comfy.samplers
        from adaflow_pack.nodes.patch_model import AdaFlowPatchModel
        from adaflow_pack.nodes.slim import AdaFlowSlimAttention

        profiling = self.options.profile
        injecting, past = self.edit_steps()
        steps = injecting + past
        share = injecting / steps
        model = AdaFlowSlimAttention.execute(self.model, case.budget).args[0]
        model = AdaFlowPatchModel.execute(
            model, plan, self.trajectory, share, share, False, case.chunk, compile=case.compiled
        ).args[0]
        clock = StepClock(ballast, {injecting - 1: {}, steps - 1: {}} if profiling else {}, self.save)
        out["seconds of each step"], out["peak GiB of each step"] = clock.seconds, clock.peaks
        sigmas = torch.tensor([*list(reversed(self.trajectory.sigmas))[:steps], 0.0])
        comfy.sample.sample_custom(
            model, torch.zeros_like(self.latent), 7.5, comfy.samplers.KSAMPLER(clock), sigmas,
            self.prompts[1], self.prompts[2], self.latent, disable_pbar=True, seed=0,
        )  # fmt: skip
        kinds = {"injecting": (1, injecting), "past injection": (injecting, steps)}
        for kind, (first, end) in kinds.items():
            times, peaks = (of[first : end - profiling] for of in (clock.seconds, clock.peaks))
            out[f"step {kind}"] = {"seconds": round(sum(times) / len(times), 3), "peak GiB": max(peaks)}
            if profiling:
                out[f"a step {kind}, profiled"] = clock.profiles[end - 1]
        out["peak GiB"] = max(clock.peaks)
        out["matching while sampling, seconds"] = round(plan.matching_seconds, 3)
        out["edit, 50 steps"] = round(sum(clock.seconds), 1) if self.options.full else None
        self.save()


def extrapolate(results: dict, case: dict) -> None:
    """The whole edit from what was measured of it: 50 steps of inversion, selection, 40 + 10 steps of editing.

    Without the matches of 50 draws there is no whole.
    """
    if MATCHING not in case:
        return
    injecting = round(INJECTING * EDIT_STEPS)
    steady, past = case["step injecting"]["seconds"], case["step past injection"]["seconds"]
    first, while_sampling = case["seconds of each step"][0], case["matching while sampling, seconds"]
    parts = {
        "inversion, 50 steps": results[INVERSION]["seconds"] + (INVERSION_STEPS - 1) * results[FURTHER]["seconds"],
        "clip selection": case["clip selection"]["seconds"],
        MATCHING: case[MATCHING]["seconds"],
        "first step beyond the others, matching left out": max(0.0, first - steady - while_sampling),
        f"{injecting} steps injecting": injecting * steady,
        f"{EDIT_STEPS - injecting} steps past injection": (EDIT_STEPS - injecting) * past,
    }
    case["extrapolated, seconds"] = {name: round(value, 1) for name, value in parts.items()}
    case["extrapolated, whole edit in minutes"] = round(sum(parts.values()) / 60, 2)
    print(f"whole edit, extrapolated: {case['extrapolated, whole edit in minutes']} min", flush=True)


def run(options, results: dict, save: Callable[[], None]) -> bool:
    """All that was asked for and that time allows, into ``results``; whether nothing failed."""
    bench = Bench(options, save)
    print(f"ready after {time.perf_counter() - STARTED:.1f} s", flush=True)
    bench.inversion(results)
    results["cases"], good = [], True
    for case in [] if options.only_inversion else options.cases:
        if options.deadline and time.perf_counter() - STARTED > options.deadline:
            results.setdefault("left out for lack of time", []).append(case._asdict())
            continue
        results["cases"].append({})
        try:
            bench.case(case, results["cases"][-1])
            if not options.full:
                extrapolate(results, results["cases"][-1])
        except Exception as error:  # one that does not fit must not cost the others
            traceback.print_exc()
            results["cases"][-1]["error"], good = f"{type(error).__name__}: {error}", False
        save()
    save()
    return good


def parse() -> argparse.Namespace:
    """Options, with ``cases`` filled from those that name one kind of case each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument(
        "--cases", type=parse_case, nargs="+", metavar="KEYFRAMES:BUDGET[:eager|compiled[:GiB[:CHUNK]]]",
        help="one after the other, instead of those of --keyframes, --budgets and --compile",
    )  # fmt: skip
    parser.add_argument("--keyframes", type=int, nargs="+", help="of a step; by default 40 for each 1000 frames")
    parser.add_argument("--budgets", type=int, nargs="+", default=[20], help="keyframes' worth of keys and values")
    parser.add_argument("--compile", choices=["off", "on", "both"], default="off")
    parser.add_argument("--chunk", type=int, default=0, help="frames in one forward; 0: automatic")
    parser.add_argument(
        "--memory", type=float, default=0.0, help="GiB that the GPU is made to have, from the inversion on; 0: all"
    )
    parser.add_argument("--draws", choices=["resample", "fixed"], default="resample")
    parser.add_argument("--steps", type=int, default=2, help="of each kind that are measured")
    parser.add_argument("--no-matching", dest="matching", action="store_false", help="leave out the 50 draws' matches")
    parser.add_argument(
        "--full", action="store_true", help="run all 50 + 50 steps; an inversion on disk is gone on with"
    )
    parser.add_argument("--only-inversion", action="store_true")
    parser.add_argument("--profile", action="store_true", help="a step more of each kind, its time by kernels' family")
    parser.add_argument("--deadline", type=float, default=0.0, help="seconds after which no case is begun; 0: none")
    parser.add_argument("--small", action="store_true", help="a tiny model and size, to try the script anywhere")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-files"))
    parser.add_argument("--commit", help="to be noted where this is no clone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    keyframes = options.keyframes or [max(1, round(options.frames * 40 / 1000))]
    compiled = {"off": [False], "on": [True], "both": [False, True]}[options.compile]
    alike = itertools.product(keyframes, options.budgets, compiled, [options.memory], [options.chunk])
    options.cases = options.cases or [Case(*one) for one in alike]
    if options.memory:
        options.cases = [case._replace(memory=case.memory or options.memory) for case in options.cases]
    return options


def main() -> None:
    options = parse()
    if not torch.cuda.is_available() and not options.small:
        sys.exit("benchmarks/performance.py needs a CUDA device")
    if importlib.util.find_spec("greenlet") is None:
        sys.exit("benchmarks/performance.py needs greenlet: without it keyframes are not edited in chunks")
    start_comfyui(options.folder)
    left_out = ("out", "folder", "commit", "cases", "keyframes", "budgets", "compile")
    about = {name: value for name, value in vars(options).items() if name not in left_out}
    results = {"comfyui": comfyui_version(), "options": about}

    def save() -> None:
        if options.out:
            write_result(options.out, results, options.commit)

    with torch.inference_mode():
        good = run(options, results, save)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
