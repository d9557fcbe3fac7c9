"""What several nodes share: where run files live and what a LATENT must be."""

import logging
import shutil
import uuid
import weakref
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..adaflow.errors import InputError, require, require_one_of
from ..adaflow.estimate import plural
from ..adaflow.runs import Run, open_run, remove_old_runs
from .patching.preview import NodeText

logger = logging.getLogger(__name__)
RESUME = ["resume", "start afresh"]


def chunk_input(optional: bool = False) -> io.Int.Input:
    """How many frames go through the model at once."""
    return io.Int.Input(
        "chunk",
        default=0,
        min=0,
        max=4096,
        optional=optional,
        tooltip="Frames in one forward of the model, 0 to 4096, default 0: chosen from the free memory. Lower it when "
        "memory runs out; the result does not change.",
    )


def clip_latent(latent: dict, where: str, input_name: str = "latent") -> Tensor:
    """The samples of a LATENT that holds a clip, (frames, channels, height, width).

    Raises:
        InputError: it is not such a latent, is empty, or holds NaN.
    """
    samples = latent["samples"]
    if samples.is_nested or samples.ndim != 4:
        raise InputError(where, input_name, f"of shape {list(samples.shape)}", "(frames, 4, height, width), of images")
    require(samples.shape[0] > 0, where, input_name, "empty", "at least one frame")
    bad = (~torch.isfinite(samples)).flatten(1).any(1).nonzero().flatten()
    require(
        len(bad) == 0,
        where,
        input_name,
        f"not finite (NaN or infinite) in {plural(len(bad), 'frame')}, the first is {int(bad[0]) if len(bad) else 0}",
        "finite values; a VAE in half precision makes such latents: start ComfyUI with --fp32-vae or --bf16-vae",
    )
    return samples


def middle_column(latent: Tensor) -> Tensor:
    """The column of a clip latent whose y-t slice is shown, (frames, channels, height)."""
    return latent[..., latent.shape[-1] // 2]


def require_room(
    name: str, size_bytes: int, folder: Path, where: str, text: NodeText, what: str = "latent", removable: int = 0
) -> None:
    """Say how much disk is needed; raise :class:`InputError` on ``what``, with the numbers, unless so much is free.

    Args:
        removable: bytes of older runs that were kept because removing them would not have been enough.
    """
    free = shutil.disk_usage(folder).free
    text.put("disk", f"{name}: {size_bytes / 1e9:.2f} GB of disk ({free / 1e9:.1f} free)")
    kept = f" (with the {removable / 1e9:.2f} GB of older runs, which were kept, it would not be enough)"
    require(
        size_bytes <= free,
        where,
        what,
        f"so long that the {name} needs {size_bytes / 1e9:.2f} GB of disk",
        f"at most the {free / 1e9:.2f} GB free in {folder.name}{kept if removable else ''}: use fewer frames or steps, "
        "or float16, or start ComfyUI with this folder on a larger disk (--output-directory, --temp-directory)",
    )


def temporary_file(name: str, size_bytes: int, where: str, text: NodeText) -> Path:
    """A new file name under ComfyUI's temp folder, once the disk has room for ``size_bytes``."""
    folder = Path(folder_paths.get_temp_directory()) / "adaflow"
    folder.mkdir(parents=True, exist_ok=True)
    require_room(name, size_bytes, folder, where, text)
    return folder / f"{name}-{uuid.uuid4().hex}.safetensors"


def resume_input(
    tooltip: str = "resume (default): a run with the same inputs that was cancelled or crashed goes on after its last "
    "whole step, and ends with the same result; a finished one is read from the disk. start afresh: all steps are "
    "done again.",
) -> io.Combo.Input:
    """Whether a run that was broken off goes on."""
    return io.Combo.Input("resume", options=RESUME, default=RESUME[0], optional=True, tooltip=tooltip)


def resumable_run(kind: str, identity: dict, size_bytes: int, where: str, resume: str, text: NodeText) -> Run:
    """The run on disk of these inputs, begun or new, once there is room for the rest of it. Older runs make room.

    Args:
        size_bytes: of the whole run on disk; 0 where that cannot be told.
        resume: one of ``RESUME``.
        text: told what the disk is asked for, and when an earlier run is there and cannot be gone on with.

    Raises:
        InputError: there is no room; ``resume`` is none of ``RESUME``.
    """
    require_one_of(resume, RESUME, where, "resume")
    folder = Path(folder_paths.get_output_directory()) / "adaflow_runs"
    stop_if_cancelled = comfy.model_management.throw_exception_if_processing_interrupted
    run = open_run(folder, kind, identity, resume != RESUME[0], stop_if_cancelled)
    if run.note:
        text.put("resume", run.note)
    left = 0 if run.finished else max(0, size_bytes - run.size())
    with run.closed_on_error():
        removable = remove_old_runs(folder, left)
        if left:
            what = "latent" if kind == "inversion" else "trajectory"
            require_room(kind, left, folder, where, text, what, removable)
    return run


def sample_edit(edit, settings, frames: tuple[int, ...], where: str, resume: str) -> Tensor:
    """Sample some frames of an :class:`Edit`, going on with a run of the same inputs; see its ``sample``."""
    text = NodeText(where)
    with disk_errors_explained(where):
        run = resumable_run("edit", edit.identity(settings, frames), edit.checkpoint_bytes(frames), where, resume, text)
        with run.closed_on_error():
            if run.progress:
                text.put("resume", f"resumed after step {run.progress['step']} of {edit.steps}")
            samples = edit.sample(settings, where, frames, run, text)
        run.close()
    return samples


@contextmanager
def disk_errors_explained(where: str):
    """Turn the system's errors of reading and writing files into one that says what to do; what was finished stays."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{where}: a file could not be written or read ({error}). Free some disk space, or check that ComfyUI may "
            "write to its output and temp folders, and queue again: what was finished is kept"
        ) from error


def preview_picture(images: Tensor, node: type[io.ComfyNode]) -> ui.PreviewImage | None:
    """Images to show on ``node``; none where they cannot be written, since the result does not hang on them."""
    try:
        return ui.PreviewImage(images, cls=node)
    except OSError as error:
        logger.warning("AdaFlow: the preview could not be written to ComfyUI's temp folder (%s)", error)
        return None


def remove_when_unused(owner) -> None:
    """Delete ``owner.path`` when nothing refers to ``owner`` any more: ComfyUI has dropped it from its cache."""
    weakref.finalize(owner, Path.unlink, owner.path, missing_ok=True)
