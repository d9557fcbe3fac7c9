"""DDIM inversion and descriptor extraction through ComfyUI's own sampling, a chunk of frames at a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...adaflow.ddim import ddim_timesteps, inversion_step, sigma_to_mu
from ...adaflow.descriptors import DescriptorWriter
from ...adaflow.estimate import Pace, inversion_needs, plural
from ...adaflow.storage import Beside
from ...adaflow.trajectory import TrajectoryWriter
from .evaluator import Ahead, auto_chunk, prompts_on_device
from .families import UNetFamily, unet_family
from .memory import announce, chunk_to_go_on_with, halved, release_unused, unet_sizes
from .patch import PRELOAD_FRAMES, add_wrappers, limit_memory_estimate
from .preview import NodeText
from .taps import StopForward, UNetCall, UNetPass, run_unet, tapped, with_pass
from .windows import slice_conds


def inversion_sigmas(model_patcher, steps: int) -> list[float]:
    """Ascending noise levels of an inversion: that of t = 0, then ComfyUI's ``ddim_uniform`` grid upwards."""
    sigmas = model_patcher.get_model_object("model_sampling").sigmas
    return [float(sigmas[t]) for t in (0, *ddim_timesteps(steps, len(sigmas)))]


class DescriptorPass(UNetPass):
    """Takes the output of the descriptor block; with ``stop`` nothing after it is computed."""

    def __init__(self, stop: bool):
        self.stop = stop
        self.feature: Tensor | None = None

    def descriptor(self, call: UNetCall, feature: Tensor) -> None:
        self.feature = feature
        if self.stop:
            raise StopForward


@dataclass
class ChunkedInference:
    """Wrappers that evaluate a whole clip in chunks of frames, each with its own slice of the conditioning.

    Args:
        chunk: frames at once; 0 chooses from the free memory.
        on_chunk: if given, evaluates a chunk instead: ``(evaluate, frames, x)`` -> predictions, where
            ``evaluate(x, step_pass)`` runs the model on that chunk.
        pace: told how long the evaluation of all frames will take, once a chunk of them is done.
    """

    family: UNetFamily
    chunk: int = 0
    on_chunk: Callable | None = None
    pace: Pace | None = None

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options):
        """The body of the CALC_COND_BATCH wrapper."""
        self.chunk = self.chunk or auto_chunk(unet_sizes(model, self.family, x.device), x.shape, 1, x.device)
        conds, ahead = prompts_on_device(conds, x.device), Ahead(x.device)
        out = [torch.zeros_like(x) for _ in conds]
        with tapped(model.diffusion_model, self.family):
            self._chunks(executor, model, conds, x, timestep, model_options, out, ahead)
        return out

    def _chunks(self, executor, model, conds, x, timestep, model_options, out: list[Tensor], ahead: Ahead) -> None:
        """Evaluate chunk after chunk into ``out``."""
        start, begun = 0, time.perf_counter()
        while start < x.shape[0]:
            comfy.model_management.throw_exception_if_processing_interrupted()
            frames = list(range(start, min(start + self.chunk, x.shape[0])))
            rows = slice(start, start + len(frames))
            parts = slice_conds(conds, frames)

            def evaluate(x_chunk: Tensor, step_pass: UNetPass, parts=parts, rows=rows) -> list[Tensor]:
                return executor(model, parts, x_chunk, timestep[rows], with_pass(model_options, step_pass, parts))

            try:
                if self.on_chunk is None:
                    predictions = evaluate(x[rows], UNetPass())
                else:
                    predictions = self.on_chunk(evaluate, frames, x[rows])
            except RuntimeError as error:
                pixels = f"of {8 * x.shape[3]}x{8 * x.shape[2]} pixels"
                self.chunk = halved(error, len(frames), pixels, "use a smaller size", x.device)
                continue
            for branch, prediction in zip(out, predictions, strict=True):
                branch[rows] = prediction
            start += len(frames)
            if self.pace is not None and self.pace.asks:
                ahead.wait()
                self.pace.measured((time.perf_counter() - begun) * x.shape[0] / start)
            ahead.told()

    def diffusion_model(self, executor, x, *args, **kwargs):
        return run_unet(executor, self.family, x, args, kwargs)

    def patch(self, model_patcher):
        """A clone of MODEL that is evaluated like this."""
        return add_wrappers(
            model_patcher,
            {
                WrappersMP.PREPARE_SAMPLING: limit_memory_estimate(self.chunk or PRELOAD_FRAMES),
                WrappersMP.CALC_COND_BATCH: self.calc_cond_batch,
                WrappersMP.DIFFUSION_MODEL: self.diffusion_model,
            },
        )


def _sample(model_patcher, conditioning, latent: Tensor, function: Callable, sigmas: list[float], callback=None):
    """Run a sampler function of ours inside ComfyUI's sampling, from a clean latent, cfg 1."""
    return comfy.sample.sample_custom(
        model_patcher,
        torch.zeros_like(latent),
        1.0,
        comfy.samplers.KSAMPLER(function),
        torch.tensor(sigmas),
        conditioning,
        conditioning,
        latent,
        callback=callback,
        seed=0,
    )


def invert(
    model_patcher,
    conditioning,
    latent: Tensor,
    steps: int,
    trajectory: TrajectoryWriter,
    descriptors: DescriptorWriter | None,
    where: str,
    text: NodeText,
    chunk: int = 0,
    callback: Callable | None = None,
    refine: int = 0,
) -> Tensor:
    """DDIM inversion (arXiv 2010.02502, 4.3) with descriptors taken in its first pass.

    Args:
        conditioning: CONDITIONING of the source prompt.
        latent: clean, (frames, channels, height, width), as a LATENT holds it.
        trajectory: gets every level that it has not; the caller closes it.
        descriptors: gets every frame and is closed, once the first step is done; None where that is done already.
        text: where to say what is inverted and how long it takes.
        callback: ComfyUI's sampling callback, told of every evaluation of the model.
        refine: rounds in which a step is done again with the noise of its own result.

    Returns:
        The noisiest latent as a LATENT that any ComfyUI sampler takes with its noise off.
    """
    last, evaluations = trajectory.levels - 1, 1 + refine
    inference = ChunkedInference(unet_family(model_patcher, where), chunk_to_go_on_with(chunk, trajectory.chunk))
    if trajectory.level < last:
        inference.pace = Pace(last * evaluations, lambda line: text.put("time", line))
        work = plural(last, "step") + (f" of {evaluations} evaluations" if refine else "")
        _announce(model_patcher, inference, latent, work, where, text)

    def counted(number: int, denoised: Tensor, x: Tensor, _) -> None:  # ComfyUI takes a step for one evaluation
        callback(number, denoised, x, last * evaluations)

    patched, sigmas = inference.patch(model_patcher), inversion_sigmas(model_patcher, steps)
    sampler = _inversion_sampler(inference, trajectory, descriptors, where, refine)
    try:
        return _sample(patched, conditioning, latent, sampler, sigmas, None if callback is None else counted)
    finally:
        release_unused(model_patcher.load_device)


def _inversion_sampler(
    inference: ChunkedInference,
    trajectory: TrajectoryWriter,
    descriptors: DescriptorWriter | None,
    where: str,
    refine: int,
) -> Callable:
    """A sampler function for ComfyUI that goes up in noise, and on from the trajectory's last level.

    A level goes to the disk while the next one is computed. It is there when the function ends, be it by an error.
    """

    def first_pass(evaluate, frames, x):
        taken = DescriptorPass(stop=False)
        out = evaluate(x, taken)
        descriptors.write(frames, taken.feature)
        return out

    def write(x, chunk, describing):
        also = {descriptors.close().path.name: descriptors.checksum} if describing else {}
        trajectory.write(x, chunk, also)

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        levels = [float(sigma) for sigma in sigmas]
        if trajectory.level < 0:
            trajectory.write(x)
        else:
            x = trajectory.state().to(x)
        ones = x.new_ones(x.shape[0])
        with Beside() as beside:
            for level in range(trajectory.level + 1, len(levels)):
                start, describing = x, level == 1 and descriptors is not None
                evaluations = range((level - 1) * (1 + refine), level * (1 + refine))
                inference.pace.begin_step(evaluations[0])
                for number in evaluations:
                    inference.on_chunk = first_pass if describing and number == 0 else None
                    x_in = x / sigma_to_mu(levels[level]).item()
                    denoised = model(x_in, levels[level] * ones, **(extra_args or {}))
                    x = inversion_step(start, (x_in - denoised) / levels[level], levels[level - 1], levels[level])
                    _require_finite(x, where, level, levels)
                    if number == evaluations[-1]:
                        beside.do(write, x.cpu(), inference.chunk, describing)
                    if callback is not None:
                        callback({"i": number, "denoised": denoised, "x": x, "sigma": sigmas[level]})
        return x / sigma_to_mu(levels[-1]).item()

    return sampler


def _require_finite(x: Tensor, where: str, level: int, levels: list[float]) -> None:
    if not torch.isfinite(x).all():
        raise RuntimeError(
            f"{where}: the latent is not finite (NaN or infinite) at inversion step {level} of {len(levels) - 1}, "
            f"sigma {levels[level]:.4f}. Most likely half precision overflowed: start ComfyUI with --force-fp32 or "
            "--force-upcast-attention"
        )


def extract_descriptors(
    model_patcher,
    conditioning,
    latent: Tensor,
    time: int,
    ensemble: int,
    seed: int,
    descriptors: DescriptorWriter,
    where: str,
    text: NodeText,
    block: int | None = None,
    chunk: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Descriptors in the published setting: the mean feature over some noise draws at one time (arXiv 2306.03881).

    Args:
        conditioning: CONDITIONING of the empty prompt.
        latent: clean, as a LATENT holds it.
        time: of the diffusion, 0 to 999.
        ensemble: noise draws a frame; a frame's draws depend on the seed and the frame alone.
        text: where to say what is done and how long it takes.
        block: decoder block to read; None for the family's.
    """
    family = unet_family(model_patcher, where)
    if block is not None:
        family = UNetFamily(family.name, family.levels, family.conv_block, family.attention_blocks, block)
    sigma = float(model_patcher.get_model_object("model_sampling").sigmas[time])
    size = tuple(latent.shape[-2:])

    def mean_feature(evaluate, frames, x):
        total = None
        for draw in range(ensemble):
            out = evaluate(x + sigma * _noise(x, frames, draw, seed), taken := DescriptorPass(stop=True))
            total = taken.feature.float() if total is None else total + taken.feature.float()
        if tuple(total.shape[-2:]) != size:
            total = torch.nn.functional.interpolate(total, size, mode="bilinear")
        descriptors.write(frames, total / ensemble)
        if on_progress is not None:
            on_progress(frames[-1] + 1)
        return out

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {}))
        return x

    inference = ChunkedInference(family, chunk, mean_feature, Pace(1, lambda line: text.put("time", line)))
    inference.pace.begin_step(0)
    _announce(model_patcher, inference, latent, plural(ensemble, "noise draw"), where, text)
    try:
        _sample(inference.patch(model_patcher), conditioning, latent, sampler, [sigma, 0.0])
    finally:
        release_unused(model_patcher.load_device)


def _announce(model_patcher, inference: ChunkedInference, latent: Tensor, work: str, where: str, text: NodeText):
    """Show what will be done and what it takes; refuse what surely does not fit."""
    model, device = model_patcher.model, model_patcher.load_device
    unet = unet_sizes(model, inference.family, device)
    chunk = inference.chunk or auto_chunk(unet, latent.shape, 1, device)
    needs = inversion_needs(unet, latent.shape, chunk)
    height, width = latent.shape[2:]
    got = f"{plural(latent.shape[0], 'frame')}, {work}, {8 * width}x{8 * height} pixels"
    announce(needs, device, where, "latent", got, "use fewer frames or a smaller size", text)


def _noise(x: Tensor, frames: list[int], draw: int, seed: int) -> Tensor:
    noises = []
    for frame in frames:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + frame) * 1_009 + draw)
        noises.append(torch.randn(x.shape[1:], generator=generator))
    return torch.stack(noises).to(x)


def descriptor_channels(model_patcher, where: str, block: int | None = None) -> int:
    """Channels of the descriptor block's output."""
    family = unet_family(model_patcher, where)
    unet = model_patcher.model.diffusion_model
    number = family.descriptor_block if block is None else block
    return next(m.out_channels for m in unet.output_blocks[number] if hasattr(m, "out_channels"))


def zero_conditioning(model_patcher):
    """CONDITIONING of zeros, of the widths that the model takes."""
    model = model_patcher.model
    options = {}
    if model.adm_channels:
        options["pooled_output"] = torch.zeros(1, _pooled_channels(model))
    return [[torch.zeros(1, 77, model.model_config.unet_config["context_dim"]), options]]


def _pooled_channels(model) -> int:
    """Width of the pooled embedding of an SDXL-like model: what its six size embeddings of 256 leave."""
    return model.adm_channels - 6 * 256
