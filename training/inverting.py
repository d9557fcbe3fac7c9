"""A clip inverted by the pack outside of its node, as benchmarks/edit_quality.py and training/evaluate.py need it."""

from __future__ import annotations

from pathlib import Path

import torch
from common import pack_module
from torch import Tensor


def invert(
    model, prompt, latents: Tensor, steps: int, folder: Path, where: str, chunk: int = 0, refine: int = 0
) -> tuple:
    """Trajectory, descriptors and noisiest latent of a clip's ``latents`` (frames, 4, h, w), always begun anew.

    Args:
        prompt: CONDITIONING of the clip.
        folder: where the run is kept.
        where: who asks, for messages.
        chunk: frames at once; 0 leaves it to the pack.
        refine: rounds in which each step is done again with the noise of its own result.
    """
    families, inversion = pack_module("nodes.patching.families"), pack_module("nodes.patching.inversion")
    trajectories, descriptors = pack_module("adaflow.trajectory"), pack_module("adaflow.descriptors")
    sigmas = inversion.inversion_sigmas(model, steps)
    signature = families.model_signature(model, where)
    fingerprint = trajectories.clip_fingerprint(latents)
    identity = trajectories.trajectory_identity(latents.shape, sigmas, signature, fingerprint, torch.float32)
    run = pack_module("adaflow.runs").open_run(folder, "inversion", identity, afresh=True)
    path = run.path("descriptors.safetensors")
    shape = (len(latents), inversion.descriptor_channels(model, where), *latents.shape[2:])
    slice_rgb = latents.new_zeros(len(latents), latents.shape[2], 3)
    writer = descriptors.DescriptorWriter(path, shape, signature, fingerprint, run.key, slice_rgb, torch.float32)
    levels, text = trajectories.TrajectoryWriter(run), pack_module("nodes.patching.preview").NodeText(where)
    noisiest = inversion.invert(model, prompt, latents, steps, levels, writer, where, text, chunk, None, refine)
    trajectory = trajectories.Trajectory(run)
    trajectory.source = prompt
    return trajectory, descriptors.Descriptors(path, run), noisiest
