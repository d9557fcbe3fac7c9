"""A whole edit as ComfyUI samples it: the keyframes alone, for a look, or every frame."""

from dataclasses import dataclass, replace

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...adaflow.errors import require, require_one_of
from ...adaflow.plan import EditPlan
from ...adaflow.runs import Run
from ...adaflow.trajectory import Trajectory
from .evaluator import EditSettings
from .fingerprint import fingerprint, model_fingerprint
from .memory import chunk_to_go_on_with
from .patch import check_edit, course_of_run, deterministic_samplers, patch_edit, refuse_stochastic
from .preview import NodeText, sampling_callback
from .resume import checkpoint_bytes, finished_latent, is_resumable, resumable
from .windows import slice_conditioning, take

FORMAT = "adaflow-edit-1"


@dataclass(frozen=True)
class Edit:
    """Everything an edit needs: ADAFLOW_EDIT.

    Attributes:
        model: MODEL as the user wired it, LoRA and patches included.
        positive, negative: CONDITIONING; entries and ControlNet hints may be one a frame.
    """

    model: object
    positive: list
    negative: list
    trajectory: Trajectory
    plan: EditPlan
    settings: EditSettings
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    seed: int

    def check(self, where: str) -> None:
        """Raise InputError for what can be told before sampling."""
        check_edit(self.model, self.plan, self.trajectory, where)
        refuse_stochastic(self.sampler_name, where)
        require_one_of(self.sampler_name, deterministic_samplers(), where, "sampler_name")
        require_one_of(self.scheduler, comfy.samplers.SCHEDULER_NAMES, where, "scheduler")
        require(0.0 <= self.cfg <= 100.0, where, "cfg", self.cfg, "a guidance scale from 0 to 100")
        limit = self.trajectory.steps
        require(
            1 <= self.steps <= limit,
            where,
            "steps",
            self.steps,
            f"1 to {limit}, the steps that the trajectory holds; or invert with more steps",
        )
        require(
            bool(self.trajectory.source), where, "trajectory", "without a source prompt", "one of AdaFlowDDIMInvert"
        )

    @property
    def _sampler(self) -> str:
        # ComfyUI's ddim is euler, but for a noise mask, where it would put random noise in place of the trajectory
        return "euler" if self.sampler_name == "ddim" else self.sampler_name

    def identity(self, settings: EditSettings, frames: tuple[int, ...]) -> dict:
        """Everything that the result of :meth:`sample` depends on, to open its run with.

        Chunk and compiling are left out: they change nothing beyond rounding, and a run resumed keeps its chunk.
        """
        return {
            "format": FORMAT,
            "clip": self.trajectory.clip,
            "frames": list(frames),
            "model": model_fingerprint(self.model),
            "prompts": fingerprint([self.positive, self.negative]),
            "trajectory": fingerprint(self.trajectory),
            "plan": fingerprint(self.plan),
            "settings": fingerprint(replace(settings, chunk=0, compile=False)),
            "sampling": [self.steps, self.cfg, self._sampler, self.scheduler, self.seed],
        }

    def checkpoint_bytes(self, frames: tuple[int, ...]) -> int:
        """The most bytes on disk that the run of :meth:`sample` takes."""
        return checkpoint_bytes(self._sampler, (len(frames), *self.trajectory.shape[1:]), self.steps)

    def sample(self, settings: EditSettings, where: str, frames: tuple[int, ...], run: Run, text: NodeText) -> Tensor:
        """Sample all frames, or some alone with these as the keyframes of every step.

        Args:
            run: of this edit's :meth:`identity`; gone on with and filled.
            text: where to say what is sampled and how long it takes.

        Returns:
            (frames, channels, height, width) as a LATENT holds it.
        """
        if run.finished:  # nothing is needed for it but the disk
            return self.model.model.process_latent_out(finished_latent(run))
        if not is_resumable(self._sampler, self.steps):
            text.put(
                "resume", f"an edit with {self._sampler} cannot be resumed: broken off, it starts from its first step"
            )
        total, rows = self.trajectory.frames, list(frames)
        settings = replace(settings, chunk=chunk_to_go_on_with(settings.chunk, run.progress.get("chunk", 0)))
        positive, negative = (slice_conditioning(c, rows, total) for c in (self.positive, self.negative))
        in_ram = run.progress.get("latents_in_ram")
        patched = patch_edit(self.model, self.plan, self.trajectory, settings, where, tuple(rows), text, in_ram)
        sigmas = comfy.samplers.KSampler(
            patched, self.steps, patched.load_device, self.sampler_name, self.scheduler, 1.0, patched.model_options
        ).sigmas
        clean = patched.model.latent_format.process_out(self.trajectory.at(0.0, rows))
        return comfy.sample.sample_custom(
            patched,
            torch.zeros_like(clean),
            self.cfg,
            resumable(self._sampler, run, course_of_run),
            sigmas,
            positive,
            negative,
            clean,
            noise_mask=None if self.trajectory.noise_mask is None else take(self.trajectory.noise_mask, rows),
            callback=sampling_callback(patched, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )
