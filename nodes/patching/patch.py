"""Clones of a MODEL that carry the method as ComfyUI wrappers. The caller's MODEL is never touched."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...adaflow.errors import InputError, require
from ...adaflow.estimate import EDIT_LATENTS, Pace, UNetSizes, edit_needs, plural
from ...adaflow.plan import EditPlan
from ...adaflow.trajectory import Trajectory
from . import fast_blocks
from .compiled import BlockCompiler
from .evaluator import EditEvaluator, EditSettings, auto_chunk
from .families import UNetFamily, model_signature, unet_family
from .memory import announce, better_on_host, release_unused, unet_sizes, value_dtype
from .preview import NodeText
from .slim import SLIM_KEY, SlimSettings
from .taps import run_unet

logger = logging.getLogger(__name__)
KEY = "adaflow"
RUN_KEY = "adaflow_run"
PRELOAD_FRAMES = 8  # frames whose memory is reserved before sampling when the chunk is chosen later
STOCHASTIC = ("ancestral", "sde", "ddpm", "lcm", "seeds_2", "seeds_3", "sa_solver", "restart")
_WRAPPERS = (
    WrappersMP.PREPARE_SAMPLING,
    WrappersMP.SAMPLER_SAMPLE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.DIFFUSION_MODEL,
)


def deterministic_samplers() -> list[str]:
    """ComfyUI's samplers that add no noise of their own."""
    return [name for name in comfy.samplers.SAMPLER_NAMES if not is_stochastic(name)]


def is_stochastic(sampler_name: str) -> bool:
    """Whether a sampler adds fresh noise at each step."""
    return any(part in sampler_name for part in STOCHASTIC)


def add_wrappers(model_patcher, wrappers: dict[str, object]):
    """A clone of ``model_patcher`` with these wrappers, in place of any that AdaFlow put there before."""
    clone = model_patcher.clone()
    for kind in _WRAPPERS:
        clone.remove_wrappers_with_key(kind, KEY)
    for kind, wrapper in wrappers.items():
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def course_of_run(extra_args: dict) -> dict:
    """:attr:`EditEvaluator.course` of the run that a sampler's ``extra_args`` belong to."""
    return extra_args["model_options"]["transformer_options"][RUN_KEY].course


def limit_memory_estimate(frames: int):
    """PREPARE_SAMPLING wrapper: let ComfyUI reserve memory for ``frames`` frames, not for the whole clip."""

    def wrapper(executor, model, noise_shape, *args, **kwargs):
        return executor(model, [min(noise_shape[0], frames), *noise_shape[1:]], *args, **kwargs)

    return wrapper


@dataclass(frozen=True)
class EditPatch:
    """The whole method as wrappers of one MODEL clone.

    Args:
        where: the node, for messages.
        frames: frame numbers of the rows that will be sampled.
        text: where to say what is sampled; None makes one when sampling starts.
        latents_in_ram: whether the sampler works there; None: where that is better.
    """

    where: str
    plan: EditPlan
    trajectory: Trajectory
    settings: EditSettings
    family: UNetFamily
    frames: tuple[int, ...]
    text: NodeText | None = None
    latents_in_ram: bool | None = None

    def sampler_sample(
        self, executor, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False
    ):
        """Start the run: check what is sampled, process the source prompt, set the start, and hold the evaluator."""
        model, text, device = guider.inner_model, self.text or NodeText(self.where), noise.device
        self._check(sigmas, noise, executor.class_obj)
        in_ram = self.latents_in_ram
        if in_ram is None:
            in_ram = _better_in_ram(noise, executor.class_obj, extra_args["model_options"])
        sizes = unet_sizes(model, self.family, device)
        on_host = self._announce(guider, sigmas, noise, sizes, text, in_ram, denoise_mask is not None)
        if in_ram:  # the sampler's own arithmetic, which is little, is done there too
            noise, latent_image, sigmas = noise.cpu(), latent_image.cpu(), sigmas.cpu()
            denoise_mask = denoise_mask if denoise_mask is None else denoise_mask.cpu()
            callback = callback and _seen_on(device, callback)
        if self.settings.start_from_trajectory:
            noise, latent_image = self._start(model, executor.class_obj, guider, sigmas, noise)
        source = self._source_cond(model, noise, latent_image, extra_args, device)
        self.plan.device = device
        compiler = self._compiler(model, device, text)
        run = EditEvaluator(
            model.diffusion_model,
            sizes,
            self.family,
            self.plan,
            self.trajectory,
            self.settings,
            self.frames,
            source,
            sigmas,
            Pace(len(sigmas) - 1, lambda line: text.put("time", line)),
            device,
            on_host,
            in_ram,
            compiler,
        )
        options = extra_args["model_options"]
        options = {**options, "transformer_options": {**options["transformer_options"], RUN_KEY: run}}
        extra_args = {**extra_args, "model_options": options}
        try:
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        finally:
            if compiler is not None:
                compiler.close()
            self.plan.release()
            release_unused(device)

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options):
        """Hand an evaluation to the run in progress."""
        run = model_options["transformer_options"].get(RUN_KEY)
        if run is None:
            return executor(model, conds, x, timestep, model_options)
        return run(executor, model, conds, x, timestep, model_options)

    def diffusion_model(self, executor, x, *args, **kwargs):
        return run_unet(executor, self.family, x, args, kwargs)

    def _compiler(self, model, device: torch.device, text: NodeText) -> BlockCompiler | None:
        """What compiles the propagation, if that is wanted and blocks do not run by kernels that are faster."""
        if not self.settings.compile:
            return None
        if fast_blocks.run_on(device, value_dtype(model)):
            text.put("compile", "nothing to compile: the UNet's blocks run by AdaFlow's own kernels, which are faster")
            return None
        return BlockCompiler(lambda line: text.put("compile", line))

    def _check(self, sigmas: Tensor, noise: Tensor, sampler) -> None:
        expected = (len(self.frames), *self.trajectory.shape[1:])
        require(
            tuple(noise.shape) == expected,
            self.where,
            "latent",
            f"{_shape(noise.shape)}",
            f"{_shape(expected)}, as the trajectory: connect the LATENT that was inverted",
        )
        require(
            len(sigmas) - 1 <= self.trajectory.steps,
            self.where,
            "steps",
            len(sigmas) - 1,
            f"at most {self.trajectory.steps}, the steps of the trajectory; or invert with more steps",
        )
        name = _name_of(sampler)
        if is_stochastic(name):
            logger.warning(
                "AdaFlow: %s adds noise of its own at each step, which differs from frame to frame and leaves the "
                "inverted trajectory: expect flicker. Use a deterministic sampler such as euler or dpmpp_2m",
                name,
            )

    def _announce(
        self, guider, sigmas: Tensor, noise: Tensor, unet: UNetSizes, text: NodeText, in_ram: bool, masked: bool
    ) -> bool:
        """Show what will be sampled and what that takes; refuse what surely does not fit.

        Returns:
            Whether activations of the keyframes are to wait in host memory.
        """
        settings, keyframes = self.settings, len(self.plan.clips)
        branches = 1 if getattr(guider, "cfg", 1.0) == 1.0 else 2
        chunk = settings.chunk or auto_chunk(unet, noise.shape, branches, noise.device)
        injecting = max(settings.feature_share, settings.attention_share) > 0
        waiting = keyframes * unet.keyframe_bytes(noise.shape[2:], branches, injecting).least
        on_host = better_on_host(waiting, noise.device)
        needs = edit_needs(unet, noise.shape, keyframes, branches, chunk, injecting, on_host, in_ram, masked)
        counts = {"frame": len(self.frames), "keyframe": keyframes, "step": len(sigmas) - 1}
        pixels = f"{8 * noise.shape[3]}x{8 * noise.shape[2]} pixels"
        got = ", ".join([*(plural(number, what) for what, number in counts.items()), pixels])
        change = (
            "use fewer keyframes (lower thresholds or a higher max_clip in AdaFlow Keyframe Select), a smaller size or "
            "fewer frames"
        )
        announce(needs, noise.device, self.where, "plan", got, change, text)
        return on_host

    def _start(self, model, sampler, guider, sigmas: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and clean latent that make the sampler start at the trajectory's latent of its first sigma.

        The clean latent stays the source's, so that a noise mask keeps the source where it is not edited.
        """
        clean = self.trajectory.at(0.0, list(self.frames)).to(noise)
        start = self.trajectory.at(float(sigmas[0]), list(self.frames)).to(noise)
        unit = model.model_sampling.noise_scaling(
            sigmas[0], torch.ones_like(noise[:1, :1, :1, :1]), torch.zeros_like(noise[:1, :1, :1, :1]),
            sampler.max_denoise(guider, sigmas),
        )  # fmt: skip
        return (start - clean) / unit, clean

    def _source_cond(self, model, noise, latent_image, extra_args, device: torch.device) -> dict:
        source = comfy.sampler_helpers.convert_cond(self.trajectory.source[:1])
        for cond in source:  # the source branch is the plain inverted video
            for key in ("control", "hooks", "area", "mask", "strength", "gligen"):
                cond.pop(key, None)
        return comfy.samplers.process_conds(
            model, noise, {"source": source}, device, latent_image, None, extra_args.get("seed")
        )["source"][0]


def _name_of(sampler) -> str:
    return getattr(getattr(sampler, "sampler_function", None), "__name__", "")


def _better_in_ram(noise: Tensor, sampler, model_options: dict) -> bool:
    """Whether a sampler had better work in RAM, since all its copies of the latents would take much of the GPU.

    Not one that draws noise, which would be other noise there, nor where a function makes the noise mask (Differential
    Diffusion), which may compute with what the model holds on the GPU.
    """
    if is_stochastic(_name_of(sampler)) or "denoise_mask_function" in model_options:
        return False
    return better_on_host(EDIT_LATENTS * noise.nbytes, noise.device)


def _seen_on(device: torch.device, callback: Callable) -> Callable:
    """A sampling callback that is given denoised latents on ``device``, where ComfyUI's previewers decode them."""
    return lambda step, denoised, x, total: callback(step, denoised.to(device), x, total)


def _shape(shape) -> str:
    frames, channels, height, width = shape
    return f"{frames} frames of {channels}x{height}x{width}"


def check_edit(model_patcher, plan: EditPlan, trajectory: Trajectory, where: str) -> UNetFamily:
    """Refuse a plan, trajectory and model that do not belong together.

    Raises:
        InputError: naming the input, what came and what was expected.
    """
    family = unet_family(model_patcher, where)
    signature = model_signature(model_patcher, where)
    require(
        trajectory.model == signature,
        where,
        "trajectory",
        f"inverted with {trajectory.model}",
        f"one of this model: {signature}. Invert the clip again with this checkpoint",
    )
    require(
        plan.frames == trajectory.frames,
        where,
        "plan",
        f"of {plan.frames} frames",
        f"{trajectory.frames} frames, as the trajectory has",
    )
    require(
        plan.descriptors.model == trajectory.model,
        where,
        "plan",
        f"made with descriptors of {plan.descriptors.model}",
        f"descriptors of the trajectory's model: {trajectory.model}",
    )
    require(
        plan.descriptors.clip == trajectory.clip,
        where,
        "plan",
        "of another clip than the trajectory",
        "descriptors and trajectory of the same LATENT",
    )
    return family


def patch_edit(
    model_patcher,
    plan: EditPlan,
    trajectory: Trajectory,
    settings: EditSettings,
    where: str,
    frames: tuple[int, ...] | None = None,
    text: NodeText | None = None,
    latents_in_ram: bool | None = None,
):
    """A clone of MODEL that runs the whole method in any sampler.

    Args:
        settings: ``budget`` is taken from AdaFlowSlimAttention where that node is wired before.
        frames: frame numbers that will be sampled; all by default.
        text: of the node that will sample, where that is known.
        latents_in_ram: as a run that goes on noted it; None: where that is better.

    Raises:
        InputError: see :func:`check_edit`; or a share or chunk out of range.
    """
    family = check_edit(model_patcher, plan, trajectory, where)
    for name in ("feature_share", "attention_share"):
        share = getattr(settings, name)
        require(0.0 <= share <= 1.0, where, name, share, "a share of the steps from 0 to 1")
    require(settings.chunk >= 0, where, "chunk", settings.chunk, "0 (automatic) or a number of frames")
    slim: SlimSettings | None = model_patcher.model_options["transformer_options"].get(SLIM_KEY)
    if slim is not None:
        settings = replace(settings, budget=slim.budget)
    if model_patcher.model_options["transformer_options"].get("patches_replace", {}).get("attn1"):
        logger.warning(
            "%s: another patch replaces self-attention (attn1) in some blocks; the method does not act there",
            where,
        )
    frames = frames or tuple(range(plan.frames))
    patch = EditPatch(where, plan, trajectory, settings, family, frames, text, latents_in_ram)
    reserved = settings.chunk or PRELOAD_FRAMES
    return add_wrappers(
        model_patcher,
        {
            WrappersMP.PREPARE_SAMPLING: limit_memory_estimate(reserved),
            WrappersMP.SAMPLER_SAMPLE: patch.sampler_sample,
            WrappersMP.CALC_COND_BATCH: patch.calc_cond_batch,
            WrappersMP.DIFFUSION_MODEL: patch.diffusion_model,
        },
    )


def refuse_stochastic(sampler_name: str, where: str) -> None:
    """Raise InputError for a sampler that adds noise of its own."""
    if is_stochastic(sampler_name):
        raise InputError(
            where,
            "sampler_name",
            f"{sampler_name}, which adds fresh noise at each step: it differs from frame to frame and leaves the "
            "inverted trajectory, so the edit flickers and loses the source's structure",
            "a deterministic sampler such as euler, ddim or dpmpp_2m",
        )
