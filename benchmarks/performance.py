"""Times an edit, stage by stage and as a whole, with a UNet of SD 2.1's full size and random weights.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/performance.py --frames 1000 --out FILE

Half precision, 384x672 (48x84 latents), guidance on, as the published figures were taken. Time and memory do not depend
on the values of weights or latents; clips are cut evenly, keyframes drawn anew for every step. No VAE.

Of the inversion and of both kinds of editing step a few are measured, after a first one that does not count (it
matches, compiles and warms up), and the whole is the sum of 50 + 50 steps of them: named "extrapolated". ``--full``
runs every step instead. With several keyframe counts or budgets the inversion is made once.
"""

import argparse
import gc
import itertools
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import comfyui_version, measured, peak_gib, reset_peak, start_comfyui, synchronize, write_result
from kernel_families import profiled

INVERSION_STEPS = EDIT_STEPS = 50
INJECTING = 0.8


@dataclass
class StepClock:
    """A Euler sampler that notes seconds and peak memory of each step.

    Attributes:
        ballast: GiB held by the benchmark itself, taken off every peak.
        profile_step: number of the step whose kernels go into ``profile``; its time is longer for that.
    """

    ballast: float = 0.0
    profile_step: int | None = None
    profile: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, following in itertools.pairwise(sigmas):
            reset_peak(empty=False)
            profiling = len(self.seconds) == self.profile_step
            synchronize()
            started = time.perf_counter()
            with profiled(self.profile) if profiling else nullcontext():
                denoised = model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {}))
            x = x + (x - denoised) / sigma * (following - sigma)
            synchronize()
            self.seconds.append(round(time.perf_counter() - started, 3))
            self.peaks.append(round(peak_gib() - self.ballast, 2))
            print(f"  step {len(self.seconds)}: {self.seconds[-1]:.2f} s, {self.peaks[-1]:.2f} GiB", flush=True)
        return x


class Bench:
    """Model, prompts and the inverted clip."""

    def __init__(self, options):
        from models import SD2, SD2_FULL, clip_latent, random_model

        self.options = options
        config, dtype = (SD2, torch.float32) if options.small else (SD2_FULL, torch.float16)
        self.size = (8, 12) if options.small else (48, 84)
        self.model = random_model(config, "eps", 0, dtype)
        generator = torch.Generator().manual_seed(0)
        shape = (1, 77, config["context_dim"])
        self.prompts = [[[torch.randn(shape, generator=generator), {}]] for _ in range(3)]
        self.latent = clip_latent(options.frames, self.size)
        self.warm_up_latent = clip_latent(min(64, options.frames), self.size)
        self.trajectory = self.descriptors = None

    def invert(self, latent, steps: int, resume: str = "start afresh"):
        from adaflow_pack.nodes.invert import AdaFlowDDIMInvert

        self.trajectory = self.descriptors = None
        gc.collect()
        inverted = AdaFlowDDIMInvert.execute(
            self.model, self.prompts[0], {"samples": latent}, steps, "float16", self.options.chunk, resume
        )
        self.trajectory, self.descriptors, _ = inverted.args

    def inversion(self, results: dict) -> None:
        """Time the inversion, and leave a trajectory of as many steps as will be edited."""
        steps = INVERSION_STEPS if self.options.full else 2 + 2 * self.options.steps
        self.invert(self.warm_up_latent, 1)
        if self.options.full:
            done = "" if self.options.only_inversion else ", less what --only-inversion had done"
            with measured(results, f"inversion, 50 steps, descriptors taken{done}"):
                self.invert(self.latent, steps, "resume")
            return
        with measured(results, "inversion, first step, descriptors taken"):
            self.invert(self.latent, 1)
        first = results["inversion, first step, descriptors taken"]["seconds"]
        with measured(results, f"inversion, {steps} steps, descriptors taken"):
            self.invert(self.latent, steps)
        whole = results[f"inversion, {steps} steps, descriptors taken"]["seconds"]
        results["inversion, each further step"] = {"seconds": round((whole - first) / (steps - 1), 3)}

    def case(self, keyframes: int, budget: int, compiled: bool) -> dict:
        """Selection, matching and editing with one number of keyframes and one budget."""
        from adaflow_pack.nodes.keyframes import AdaFlowKeyframeSelect

        out = {"keyframes": keyframes, "budget": budget, "compiled": compiled}
        print(f"{keyframes} keyframes, budget {budget}{', compiled' if compiled else ''}", flush=True)
        longest = -(-self.options.frames // keyframes)

        def select():
            draws = self.options.draws
            return AdaFlowKeyframeSelect.execute(self.descriptors, -1.0, -1.0, longest, draws, 0, "").args[0]

        with measured(out, "clip selection"):
            plan = select()
        out["keyframes"] = len(plan.clips)
        if self.options.matching:
            with measured(out, f"matching, {EDIT_STEPS} draws"):
                self.match(plan)
            plan = select()  # with nothing matched
        self.edit(out, plan, budget, compiled)
        return out

    def match(self, plan) -> None:
        """All matches that an edit of 50 steps asks for, in its order."""
        frames, chunk = list(range(self.options.frames)), 32
        plan.device = self.model.load_device
        for step in range(EDIT_STEPS):
            plan.expect(range(step, EDIT_STEPS), False)
            keyframes = plan.keyframes(step)
            for start in range(0, len(frames), chunk):
                part = plan.propagation(frames[start : start + chunk], keyframes, False)
                plan.matches(list(part.frames), part.keyframes, self.size)

    def edit(self, out: dict, plan, budget: int, compiled: bool) -> None:
        """Steps of both kinds: the first, then those that count; or all 50."""
        import comfy.sample
        import comfy.samplers
        from adaflow_pack.nodes.patch_model import AdaFlowPatchModel
        from adaflow_pack.nodes.slim import AdaFlowSlimAttention

        options, few = self.options, self.options.steps
        injecting = round(INJECTING * EDIT_STEPS) if options.full else 1 + few
        steps = EDIT_STEPS if options.full else 1 + 2 * few + options.profile
        share = injecting / steps
        model = AdaFlowSlimAttention.execute(self.model, budget).args[0]
        model = AdaFlowPatchModel.execute(
            model, plan, self.trajectory, share, share, False, options.chunk, compile=compiled
        ).args[0]
        clock, ballast = StepClock(profile_step=steps - 1 if options.profile else None), None
        if options.memory:
            ballast, clock.ballast = self.ballast()
        levels = list(reversed(self.trajectory.sigmas))[:steps]
        sigmas = torch.tensor([*levels, 0.0])
        comfy.sample.sample_custom(
            model, torch.zeros_like(self.latent), 7.5, comfy.samplers.KSAMPLER(clock), sigmas,
            self.prompts[1], self.prompts[2], self.latent, disable_pbar=True, seed=0,
        )  # fmt: skip
        del ballast
        out["seconds of each step"], out["peak GiB of each step"] = clock.seconds, clock.peaks
        kinds = {"injecting": slice(1, injecting), "past injection": slice(injecting, steps - options.profile)}
        for kind, part in kinds.items():
            times = clock.seconds[part]
            out[f"step {kind}"] = {"seconds": round(sum(times) / len(times), 3), "peak GiB": max(clock.peaks[part])}
        out["peak GiB"] = max(clock.peaks)
        out["matching while sampling, seconds"] = round(plan.matching_seconds, 3)
        if options.profile:
            out["a step past injection, profiled"] = clock.profile
        out["edit, 50 steps"] = round(sum(clock.seconds), 1) if options.full else None

    def ballast(self):
        """A tensor that makes the GPU as small as ``--memory`` for torch, and its size in GiB."""
        gc.collect()
        torch.cuda.empty_cache()
        left = int(self.options.memory * 2**30) - torch.cuda.memory_allocated()
        size = torch.cuda.mem_get_info()[0] - left
        return torch.empty(max(0, size), dtype=torch.uint8, device="cuda"), max(0, size) / 2**30


def extrapolate(results: dict, case: dict) -> None:
    """The whole edit from what was measured of it: 50 steps of inversion, selection, 40 + 10 steps of editing."""
    injecting = round(INJECTING * EDIT_STEPS)
    steady, past = case["step injecting"]["seconds"], case["step past injection"]["seconds"]
    first, while_sampling = case["seconds of each step"][0], case["matching while sampling, seconds"]
    inversion = results["inversion, first step, descriptors taken"]["seconds"]
    inversion += (INVERSION_STEPS - 1) * results["inversion, each further step"]["seconds"]
    matching = case.get(f"matching, {EDIT_STEPS} draws", {"seconds": 0.0})["seconds"]
    parts = {
        "inversion, 50 steps": inversion,
        "clip selection": case["clip selection"]["seconds"],
        "matching, 50 draws": matching,
        "first step beyond the others, matching left out": max(0.0, first - steady - while_sampling),
        f"{injecting} steps injecting": injecting * steady,
        f"{EDIT_STEPS - injecting} steps past injection": (EDIT_STEPS - injecting) * past,
    }
    case["extrapolated, seconds"] = {name: round(value, 1) for name, value in parts.items()}
    case["extrapolated, whole edit in minutes"] = round(sum(parts.values()) / 60, 2)
    print(f"whole edit, extrapolated: {case['extrapolated, whole edit in minutes']} min", flush=True)


def run(options) -> dict:
    """All that was asked for."""
    bench, results = Bench(options), {}
    bench.inversion(results)
    results["cases"] = []
    if options.only_inversion:
        return results
    compiled = {"off": [False], "on": [True], "both": [False, True]}[options.compile]
    for keyframes, budget, on in itertools.product(options.keyframes, options.budgets, compiled):
        case = bench.case(keyframes, budget, on)
        if not options.full:
            extrapolate(results, case)
        results["cases"].append(case)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--keyframes", type=int, nargs="+", help="of a step; by default 40 for each 1000 frames")
    parser.add_argument("--budgets", type=int, nargs="+", default=[20], help="keyframes' worth of keys and values")
    parser.add_argument("--compile", choices=["off", "on", "both"], default="off")
    parser.add_argument("--chunk", type=int, default=0, help="frames in one forward; 0: automatic")
    parser.add_argument("--memory", type=float, default=0.0, help="GiB that the GPU is made to have; 0: all")
    parser.add_argument("--draws", choices=["resample", "fixed"], default="resample")
    parser.add_argument("--steps", type=int, default=2, help="of each kind that are measured")
    parser.add_argument("--no-matching", dest="matching", action="store_false", help="leave out the 50 draws' matches")
    parser.add_argument(
        "--full", action="store_true", help="run all 50 + 50 steps; an inversion on disk is gone on with"
    )
    parser.add_argument("--only-inversion", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one step more, its time by family of kernels")
    parser.add_argument("--small", action="store_true", help="a tiny model and size, to try the script anywhere")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-files"))
    parser.add_argument("--commit", help="to be noted where this is no clone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.keyframes = options.keyframes or [max(1, round(options.frames * 40 / 1000))]
    if not torch.cuda.is_available() and not options.small:
        sys.exit("benchmarks/performance.py needs a CUDA device")
    start_comfyui(options.folder)
    about = {name: value for name, value in vars(options).items() if name not in ("out", "folder", "commit")}
    with torch.inference_mode():
        results = run(options)
    if options.out:
        write_result(options.out, {"comfyui": comfyui_version(), "options": about, **results}, options.commit)


if __name__ == "__main__":
    main()
