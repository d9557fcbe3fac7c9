"""The windowed evaluation of a step: joint pass over the keyframes, then propagation to all frames, chunk by chunk.

Section 7 of the method. Source branch: none after its window; in propagation only as far as the injected ResBlock;
a keyframe's own prediction comes from the joint pass.
"""

import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import comfy.model_management
import torch
from torch import Tensor

from ...adaflow.estimate import Pace, UNetSizes, plural
from ...adaflow.memory import is_out_of_memory, to_device
from ...adaflow.plan import EditPlan
from ...adaflow.trajectory import Trajectory
from . import lockstep
from .compiled import BlockCompiler
from .families import UNetFamily
from .memory import batched_by, give_back, halved, has_host
from .parking import ParkedSkips
from .passes import (
    EditJointPass,
    EditPropagationPass,
    Injection,
    SourceJointPass,
    SourcePropagationPass,
    StepState,
)
from .shelf import Shelf
from .taps import tapped, with_pass
from .windows import slice_conds

logger = logging.getLogger(__name__)
MAX_BATCH = {"cuda": 48}  # frames times branches in one forward by kind of device: it would be no faster with more
MAX_BATCH_ELSEWHERE = 32
SKIP_PATCHES = {"input_block_patch", "input_block_patch_after_skip"}  # ComfyUI's names
AHEAD_SHARE = 0.5  # of what is free beside a chunk, for selecting the next step's tokens
MEMORY_SHARE = 0.65  # of what is free, for the activations of one forward


@dataclass(frozen=True)
class EditSettings:
    """What a user chooses of an edit.

    Attributes:
        feature_share, attention_share: share of the first steps in which the source's feature of the injected
            ResBlock, and its queries and keys, replace the edit's (arXiv 2211.12572).
        interpolate: blend each frame with the neighbouring clip's keyframe (arXiv 2307.10373, section 4.2).
        budget: keyframes' worth of keys and values that a keyframe attends to.
        chunk: frames evaluated at once; 0 chooses from the free memory.
        start_from_trajectory: replace the sampler's start by the trajectory's latent of the first sigma.
        compile: run propagation through torch.compile, where it can and nothing faster runs it.
    """

    feature_share: float = 0.8
    attention_share: float = 0.8
    interpolate: bool = False
    budget: int = 20
    chunk: int = 0
    start_from_trajectory: bool = True
    compile: bool = False


def step_of(sigma: float, sample_sigmas: Tensor) -> int:
    """Number of the step that ``sigma`` belongs to: of a sampler's stops within a step, that step."""
    reached = int((sample_sigmas >= sigma * (1 - 1e-4)).sum())
    return min(max(reached - 1, 0), max(len(sample_sigmas) - 2, 0))


def auto_chunk(unet: UNetSizes, shape, branches: int, device: torch.device) -> int:
    """Frames in one forward: as many as a share of the free memory takes and ``MAX_BATCH`` allows, at least 1.

    Args:
        shape: of the whole latent, (frames, channels, height, width).
        branches: conditionings batched in one forward.
    """
    fitting = MEMORY_SHARE * comfy.model_management.get_free_memory(device) / unet.frame_bytes(shape[2:])
    return max(1, int(min(fitting, MAX_BATCH.get(device.type, MAX_BATCH_ELSEWHERE)) / branches))


def prompts_on_device(conds: list[list[dict] | None], device: torch.device) -> list[list[dict] | None]:
    """Processed conditioning whose prompts are on ``device``; what has an entry for each frame stays where it is.

    ComfyUI copies a prompt to the device with every forward, and waits for it.
    """

    def moved(value):
        prompt = isinstance(getattr(value, "cond", None), Tensor) and value.cond.ndim and value.cond.shape[0] == 1
        return value._copy_with(to_device(value.cond, device)) if prompt else value

    def placed(cond: dict) -> dict:
        return {**cond, "model_conds": {key: moved(value) for key, value in cond["model_conds"].items()}}

    return [branch and [placed(cond) for cond in branch] for branch in conds]


def free_what_failed() -> None:
    """Give back the memory of a forward that ran out of it, once its error, which held that, is handled."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def padded(frames: list[int], size: int) -> list[int]:
    """``frames``, the last one repeated to make ``size``."""
    return frames + frames[-1:] * (size - len(frames))


class Ahead:
    """Lets the host prepare one chunk while the device computes the one before; no more, since Cancel is to act soon.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device):
        self._device, self._last = device, None

    def told(self) -> None:
        """A chunk's work was handed to the device: wait for the chunk before it."""
        if self._device.type == "cuda":
            if self._last is not None:
                self._last.synchronize()
            self._last = torch.cuda.current_stream(self._device).record_event()

    def wait(self) -> None:
        """Return when the device has done all that it was told."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class EditEvaluator:
    """Evaluates the model for one sampling run; made when sampling starts, dropped when it ends.

    Args:
        unet: ComfyUI's UNetModel.
        sizes: its widths, on ``device``.
        frames: frame numbers of the rows of the sampled latent: every frame, or the keyframes alone.
        source_cond: processed conditioning of the source prompt.
        sample_sigmas: descending, of the sampler.
        pace: told how long things take.
        device: of the model.
        on_host: whether the keyframes' activations wait in host memory from the start.
        latents_in_ram: whether the sampler works there.
        compiler: for propagation; None: none.
    """

    def __init__(
        self,
        unet,
        sizes: UNetSizes,
        family: UNetFamily,
        plan: EditPlan,
        trajectory: Trajectory,
        settings: EditSettings,
        frames: tuple[int, ...],
        source_cond: dict,
        sample_sigmas: Tensor,
        pace: Pace,
        device: torch.device,
        on_host: bool = False,
        latents_in_ram: bool = False,
        compiler: BlockCompiler | None = None,
    ):
        self.unet, self.family, self.plan, self.trajectory, self.settings = unet, family, plan, trajectory, settings
        self.frames, self.source_cond, self.sample_sigmas = frames, source_cond, sample_sigmas
        self._rows = {frame: row for row, frame in enumerate(frames)}
        self.pace, self.device, self.on_host, self.compiler = pace, device, on_host, compiler
        self._chunk, self._latents_in_ram = settings.chunk, latents_in_ram
        self._sizes = sizes
        # for copies beside the computing; one for all, since the allocator keeps memory by stream
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def steps(self) -> int:
        return len(self.sample_sigmas) - 1

    @property
    def course(self) -> dict:
        """What a run that goes on has to do alike to end in the same bits: see :func:`patch.patch_edit`.

        Frames in one forward (0 before that is chosen), and whether the sampler works in RAM.
        """
        return {"chunk": self._chunk, "latents_in_ram": self._latents_in_ram}

    def __call__(self, executor, model, conds, x: Tensor, timestep: Tensor, model_options: dict) -> list[Tensor]:
        """The body of the CALC_COND_BATCH wrapper: predictions (frames, channels, height, width) of each branch."""
        sigma = float(timestep[0])
        step = step_of(sigma, self.sample_sigmas)
        self.pace.begin_step(step)
        stop_if_cancelled = comfy.model_management.throw_exception_if_processing_interrupted
        self.plan.expect(range(step, self.steps), self.settings.interpolate, stop_if_cancelled)
        evaluation = _Evaluation(self, executor, model, conds, x, timestep, model_options, sigma, step)
        try:
            with tapped(self.unet, self.family), batched_by(self._sizes, model):
                out = evaluation.run()
        finally:
            evaluation.state.shelf.clear()  # an error's traceback would keep it
        self._check_finite(out, step, sigma)
        return out

    def chunk(self, x: Tensor, branches: int) -> int:
        """Frames in one forward; chosen once, from the memory that is free with the model loaded."""
        if not self._chunk:
            self._chunk = auto_chunk(self._sizes, x.shape, branches, self.device)
            logger.info("AdaFlow: %d frames at a time", self._chunk)
        return self._chunk

    def make_room(self, error: Exception, tried: int, x: Tensor, shelf: Shelf, divisible: bool = True) -> None:
        """Go on after an out-of-memory error, or give up.

        First what waits moves to host memory, then the chunk is half of the ``tried`` frames; see :func:`halved`.
        """
        if is_out_of_memory(error) and has_host(self.device) and not self.on_host:
            logger.warning("AdaFlow: out of memory; the keyframes' activations wait in host memory from now on")
            self.on_host = True
            shelf.move_to_host()
            comfy.model_management.soft_empty_cache()
            return
        doing = f"beside {plural(len(self.plan.clips), 'keyframe')} of {8 * x.shape[3]}x{8 * x.shape[2]} pixels"
        change = (
            "use a smaller size, or fewer keyframes (lower thresholds or a higher max_clip in AdaFlow Keyframe Select)"
        )
        self._chunk = halved(error, tried, doing, change, self.device, divisible)

    def rows(self, frames) -> list[int]:
        """Rows of the sampled latent that hold ``frames``."""
        return [self._rows[frame] for frame in frames]

    def _check_finite(self, out: list[Tensor], step: int, sigma: float) -> None:
        if not all(bool(torch.isfinite(prediction).all()) for prediction in out):
            raise RuntimeError(
                f"AdaFlow: the model's prediction is not finite (NaN or infinite) at step {step + 1} of {self.steps}, "
                f"sigma {sigma:.4f}. Most likely half precision overflowed: start ComfyUI with --force-fp32 or "
                "--force-upcast-attention, or lower a LoRA's or ControlNet's strength"
            )


class _Evaluation:
    """One call of :class:`EditEvaluator`: the arguments of ``calc_cond_batch`` and the state of the step."""

    def __init__(self, edit: EditEvaluator, executor, model, conds, x, timestep, model_options, sigma, step):
        self.edit, self.executor, self.model = edit, executor, model
        self.conds = prompts_on_device(conds, edit.device)
        self.x, self.model_options, self.sigma, self.step = x, model_options, sigma, step
        self.timestep = to_device(timestep[:1], edit.device)  # frames are sampled together
        settings = edit.settings
        self.injection = Injection(
            conv=step < settings.feature_share * edit.steps - 1e-6,
            attention=step < settings.attention_share * edit.steps - 1e-6,
        )
        areas = {(cond["uuid"], number): _area(cond, x) for number, branch in enumerate(conds) for cond in branch or ()}
        keyframes = edit.plan.keyframes(step)
        if not set(keyframes) <= set(edit.frames):  # a preview of the keyframes alone keeps those of the first step
            keyframes = edit.frames
        sources = [
            [{**edit.source_cond, "uuid": (edit.source_cond["uuid"], area), **({} if area is None else {"area": area})}]
            for area in dict.fromkeys(areas.values())
        ]
        self.sources = prompts_on_device(sources, edit.device)
        source_areas = {
            (branch[0]["uuid"], number): branch[0].get("area") for number, branch in enumerate(self.sources)
        }
        self.state = StepState(
            edit.plan,
            settings.budget,
            edit.family,
            keyframes,
            self.injection,
            {**areas, **source_areas},
            Shelf(edit.device, edit.on_host, edit.copying),
        )

    def run(self) -> list[Tensor]:
        """Joint pass, then propagation of every frame that is not a keyframe."""
        edit, keyframes, begun = self.edit, self.state.keyframes, time.perf_counter()
        # on the CPU pinned, so that nothing waits for the copies to it
        away = edit.device.type == "cuda" and not self.x.is_cuda
        out = [torch.zeros_like(self.x, pin_memory=away) for _ in self.conds]
        while True:
            chunks = self._joint_chunks()
            try:
                self._select(keyframes)  # before there is anything else of this step on the device
                self._joint(out, chunks)
                break
            except RuntimeError as error:
                self.state.shelf.clear()
                tried = len(chunks[0]) if len(chunks) == 1 else -(-len(chunks[0]) // self._branches())
                edit.make_room(error, tried, self.x, self.state.shelf, divisible=self._may_split())
            free_what_failed()
        self.state.shelf.drop(unless="output")
        chosen, ahead = set(keyframes), Ahead(edit.device)
        left = [frame for frame in edit.frames if frame not in chosen]
        total = len(left)
        if edit.pace.asks:
            ahead.wait()
        while left:
            frames, chunk_begun = left[: self._chunk()], time.perf_counter()
            matched = edit.plan.matching_seconds
            size = len(frames) if edit.compiler is None else min(self._chunk(), total)  # one shape is compiled
            try:
                predictions = self._propagate(left, len(frames), size)
            except RuntimeError as error:
                self.state.conv.clear()
                edit.make_room(error, size, self.x, self.state.shelf)
                predictions = None
            if predictions is None:
                free_what_failed()
                continue
            predictions = [prediction[: len(frames)] for prediction in predictions]
            self._store(out, frames, predictions)
            matching = edit.plan.matching_seconds - matched  # for later steps too
            edit.pace.once(matching)
            if edit.pace.asks:
                ahead.wait()
                seconds = time.perf_counter() - chunk_begun - matching
                edit.pace.measured(chunk_begun - begun + seconds * len(left) / len(frames))
            if len(left) == total:
                self._select_ahead()
            ahead.told()
            left = left[len(frames) :]
        if away:
            ahead.wait()
        return out

    def _select_ahead(self) -> None:
        """Select the tokens of the next step's keyframes while a GPU computes a chunk, if they fit beside it."""
        following = self.step + 1
        if self.edit.device.type != "cuda" or following >= self.edit.steps:
            return
        keyframes = self.edit.plan.keyframes(following)
        if not set(keyframes) <= set(self.edit.frames):
            return
        free = comfy.model_management.get_free_memory(self.edit.device)
        if self.edit.plan.selection_bytes(len(keyframes)) > AHEAD_SHARE * free:
            return
        try:
            self._select(keyframes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise

    def _select(self, keyframes: tuple[int, ...]) -> None:
        """Have the plan find which tokens ``keyframes`` attend to."""
        for area in dict.fromkeys(self.state.areas.values()):
            self.edit.plan.kept(keyframes, self.state.budget, area[:2] if area else tuple(self.x.shape[2:]), area)

    def _branches(self) -> int:
        """Conditionings that are batched in one forward."""
        return sum(len(branch) for branch in self.conds if branch is not None)

    def _chunk(self) -> int:
        return self.edit.chunk(self.x, self._branches())

    def _alone(self) -> int:
        """Frames of one branch by itself that make a batch as large as a chunk of all branches."""
        chunk = self._chunk()
        return chunk * self._branches() if chunk > 1 else 1

    def _may_split(self) -> bool:
        """Whether the keyframes may go in several chunks.

        Chunks in lockstep must be batched alike. ComfyUI batches the prompts of one branch as memory allows, so where a
        branch has several (regional prompts) all keyframes stay in one chunk, as they do without greenlet.
        """
        return lockstep.available() and all(branch is None or len(branch) == 1 for branch in self.conds)

    def _joint_chunks(self) -> list[tuple[int, ...]]:
        """The keyframes in chunks of nearly equal size: one for all branches together, or several for each branch."""
        keyframes, chunk = self.state.keyframes, self._chunk()
        count = 1
        if len(keyframes) > chunk and self._may_split():
            count = max(2, -(-len(keyframes) // self._alone()))
        bounds = [len(keyframes) * index // count for index in range(count + 1)]
        return [keyframes[start:stop] for start, stop in pairwise(bounds)]

    def _joint(self, out: list[Tensor], chunks: list[tuple[int, ...]]) -> None:
        """The joint pass of every branch, in one batch if one chunk holds all keyframes, else branch by branch."""
        if self.injection.conv or self.injection.attention:
            for frames in chunks:
                self._evaluate(self.sources, frames, SourceJointPass(self.state), source=True)
        together, parks = [self.conds], self._parks(chunks)
        if len(chunks) > 1:
            together = [
                [branch if branch is only else None for branch in self.conds] for only in self.conds if only is not None
            ]
        for conds in together:
            exchange, workers, row = lockstep.Exchange([len(frames) for frames in chunks]), [], 0
            last = len(chunks) > 1 and conds is together[-1]  # then each chunk is one forward
            for number, frames in enumerate(chunks):
                parked = ParkedSkips() if parks else None
                step_pass = EditJointPass(self.state, exchange, number, slice(row, row + len(frames)), last, parked)
                workers.append(partial(self._evaluate, conds, frames, step_pass))
                row += len(frames)
            finished = lockstep.run_in_lockstep(workers, partial(give_back, self.edit.device))
            for frames, predictions in zip(chunks, finished, strict=True):
                self._store(out, frames, predictions, conds)

    def _parks(self, chunks: list) -> bool:
        """Whether skip connections of chunks that wait go to host memory: not where a patch may hold on to them."""
        patches = self.model_options["transformer_options"].get("patches", {})
        return len(chunks) > 1 and self.state.shelf.on_host and not SKIP_PATCHES & set(patches)

    def _propagate(self, left: list[int], count: int, size: int) -> list[Tensor]:
        """Predictions of the first ``count`` frames of ``left``, the last one repeated to make ``size``.

        The source branch is evaluated for as many frames at a time as make a batch of the edit branches' size.
        """
        frames = padded(left[:count], size)
        if self.injection.conv and not self.state.conv.holds(frames):
            batch = max(size, self._alone() // len(self.sources))
            known = left[:batch] if self.edit.compiler is None else padded(left[:batch], batch)
            self.state.conv.clear()
            self._evaluate(self.sources, known, SourcePropagationPass(*self._of(known)), source=True)
        return self._evaluate(self.conds, frames, EditPropagationPass(*self._of(frames)))

    def _of(self, frames: list[int]) -> tuple:
        """What a propagation pass over ``frames`` is made from."""
        where = self.edit.plan.propagation(frames, self.state.keyframes, self.edit.settings.interpolate)
        return self.state, where, self.edit.compiler

    def _evaluate(self, conds, frames, step_pass, source: bool = False) -> list[Tensor]:
        """``calc_cond_batch`` of some frames under a pass; the source branch reads the trajectory instead of x."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows = self.edit.rows(frames)
        if source:
            x = self.edit.trajectory.at(self.sigma, list(frames)).to(self.x.dtype)
        else:
            x = self.x.index_select(0, to_device(torch.tensor(rows), self.x.device))
        x, timestep = to_device(x, self.edit.device), self.timestep.expand(len(rows))
        conds = slice_conds(conds, rows)
        return self.executor(self.model, conds, x, timestep, with_pass(self.model_options, step_pass, conds))

    def _store(self, out: list[Tensor], frames, predictions: list[Tensor], conds=None) -> None:
        """Write the predictions of ``frames``, of those branches that ``conds`` does not leave out."""
        rows = self.edit.rows(frames)
        for branch, prediction, cond in zip(out, predictions, conds or self.conds, strict=True):
            if cond is None:
                continue
            if branch.device == prediction.device:
                branch.index_copy_(0, to_device(torch.tensor(rows), branch.device), prediction)
            else:
                for start, stop in _runs(rows):
                    part = branch[rows[start] : rows[start] + stop - start]
                    part.copy_(prediction[start:stop], non_blocking=branch.is_pinned())


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Where in ``rows`` each run of consecutive numbers starts and stops."""
    starts = [0, *(place for place in range(1, len(rows)) if rows[place] != rows[place - 1] + 1), len(rows)]
    return pairwise(starts)


def _area(cond: dict, x: Tensor) -> tuple[int, int, int, int] | None:
    """The part of the latent that ComfyUI evaluates a conditioning on: (height, width, top, left), or None for all."""
    area = cond.get("area")
    if area is None:
        return None
    height, width, top, left = area
    return min(height, x.shape[2] - top), min(width, x.shape[3] - left), top, left
