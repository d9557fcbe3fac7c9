"""Slicing what ComfyUI's conditioning holds per frame: tensors of batch N, masks, ControlNet hints, chained ones too.

ComfyUI repeats a batch that is shorter than the latent's and cuts one that is longer, so frame i sees entry
``i % len``; the slices here keep to that.
"""

import copy

from comfy.conds import CONDConstant
from torch import Tensor


def take(batch: Tensor, frames: list[int]) -> Tensor:
    """Entries of ``batch`` that ``frames`` see; a batch of one stays one."""
    return batch if batch.shape[0] == 1 else batch[[frame % batch.shape[0] for frame in frames]]


def slice_control(control, frames: list[int], done: dict[int, object]):
    """A shallow copy of a ControlNet (and of those chained before it) with the hints of ``frames``.

    The copy shares the network and whatever ``pre_run`` prepared, and must not be cleaned up. ``done`` keeps the
    copies of one window, so that branches that shared a ControlNet still do and are batched together.
    """
    if control is None:
        return None
    if id(control) not in done:
        part = done[id(control)] = copy.copy(control)
        part.previous_controlnet = slice_control(control.previous_controlnet, frames, done)
        part.cond_hint = None
        if getattr(control, "cond_hint_original", None) is not None:
            part.cond_hint_original = take(control.cond_hint_original, frames)
        part.extra_concat_orig = [take(extra, frames) for extra in getattr(control, "extra_concat_orig", [])]
        if hasattr(control, "control_input"):  # T2I-Adapter's features of the hint before
            part.control_input = None
    return done[id(control)]


def _slice_model_cond(cond, frames: list[int]):
    if isinstance(cond, CONDConstant):
        return cond
    if isinstance(cond.cond, Tensor) and cond.cond.ndim:
        return cond._copy_with(take(cond.cond, frames))
    if isinstance(cond.cond, list):
        return cond._copy_with([take(entry, frames) for entry in cond.cond])
    return cond


def slice_conds(conds: list[list[dict] | None], frames: list[int]) -> list[list[dict] | None]:
    """Processed conditioning, as ``calc_cond_batch`` gets it, of the rows ``frames`` of the latent."""
    controls: dict[int, object] = {}
    out = []
    for branch in conds:
        if branch is None:
            out.append(None)
            continue
        parts = []
        for cond in branch:
            part = {**cond, "model_conds": {k: _slice_model_cond(v, frames) for k, v in cond["model_conds"].items()}}
            if "control" in cond:
                part["control"] = slice_control(cond["control"], frames, controls)
            if "mask" in cond:
                part["mask"] = take(cond["mask"], frames)
            parts.append(part)
        out.append(parts)
    return out


def slice_conditioning(conditioning: list, frames: list[int], total: int) -> list:
    """CONDITIONING, as nodes pass it, of some of the ``total`` frames of a clip."""
    controls: dict[int, object] = {}

    def part(key: str, value):
        if key == "control":
            return slice_control(value, frames, controls)
        batched = isinstance(value, Tensor) and value.ndim > 1
        if batched and (value.shape[0] == total or key in ("cross_attn", "pooled_output", "mask")):
            return take(value, frames)
        return value

    return [
        [part("cross_attn", embedding), {key: part(key, value) for key, value in options.items()}]
        for embedding, options in conditioning
    ]
