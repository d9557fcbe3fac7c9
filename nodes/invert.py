"""AdaFlowDDIMInvert: DDIM inversion of the source clip, with its descriptors from the first pass."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..adaflow.descriptors import Descriptors, DescriptorWriter
from ..adaflow.errors import require, require_one_of
from ..adaflow.runs import Run
from ..adaflow.trajectory import (
    Trajectory,
    TrajectoryWriter,
    clip_fingerprint,
    tensor_bytes,
    trajectory_bytes,
    trajectory_identity,
)
from .common import (
    RESUME,
    chunk_input,
    clip_latent,
    disk_errors_explained,
    middle_column,
    resumable_run,
    resume_input,
)
from .patching.families import model_signature, unet_family
from .patching.fingerprint import fingerprint, model_fingerprint
from .patching.inversion import descriptor_channels, inversion_sigmas, invert
from .patching.preview import NodeText, latent_rgb, sampling_callback
from .types import CATEGORY
from .types import Descriptors as DescriptorsType
from .types import Trajectory as TrajectoryType
from .validation import CheckedNode

DESCRIPTORS = "descriptors.safetensors"
PRECISIONS = {"float16": torch.float16, "float32": torch.float32}


class AdaFlowDDIMInvert(CheckedNode):
    """Inverts a clip and stores its latents at every noise level."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowDDIMInvert",
            display_name="AdaFlow DDIM Invert",
            category=CATEGORY,
            description="Walks the source clip up to noise, step by step, and keeps every level on disk. The edit "
            "starts from the noisiest level and copies structure from all of them.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint that will edit: Stable Diffusion 1.x, 2.x or SDXL."),
                io.Conditioning.Input(
                    "source",
                    tooltip="Encoded prompt that describes the source clip as it is. The closer it fits, the better "
                    "the clip is kept.",
                ),
                io.Latent.Input("latent", tooltip="The clip, one latent a frame, from AdaFlow Encode Video."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=999,
                    tooltip="Inversion steps, 1 to 999, default 50. At least the steps of the edit. More follow the "
                    "source more exactly, and take time and disk in proportion.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="float16",
                    tooltip="How latents are stored on disk, default float16. float32 doubles the disk space and keeps "
                    "the last digits.",
                    optional=True,
                ),
                chunk_input(optional=True),
                resume_input(),
                io.Int.Input(
                    "refine",
                    default=0,
                    min=0,
                    max=5,
                    optional=True,
                    tooltip="Rounds that refine each step, 0 to 5, default 0. In each the step is done again with the "
                    "noise that the model sees in its result, so that the edit's steps lead back to the clip more "
                    "exactly. Take 1 or 2 where what the edit should keep comes out blurred or changed, above all "
                    "with few steps. Each round takes as much time as the whole inversion without any, and no disk.",
                ),
            ],
            outputs=[
                TrajectoryType.Output(display_name="trajectory", tooltip="The clip's latents at every noise level."),
                DescriptorsType.Output(display_name="descriptors", tooltip="Token descriptors, from the first pass."),
                io.Latent.Output(
                    display_name="noisiest",
                    tooltip="The last level. A sampler with its noise off starts from it.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, source, latent, steps, precision="float16", chunk=0, resume=RESUME[0], refine=0
    ) -> io.NodeOutput:
        where = "AdaFlowDDIMInvert"
        unet_family(model, where)
        samples = clip_latent(latent, where)
        channels = model.model.latent_format.latent_channels
        require(samples.shape[1] == channels, where, "latent", f"of {samples.shape[1]} channels", f"{channels}")
        require(len(source) > 0, where, "source", "empty", "an encoded prompt")
        require_one_of(precision, PRECISIONS, where, "precision")
        text = NodeText(where)
        with disk_errors_explained(where):
            run = _open(model, source, samples, steps, PRECISIONS[precision], where, resume, text, refine)
            with run.closed_on_error():
                noisiest = _invert(model, source, samples, steps, run, chunk, where, text, refine)
                trajectory, descriptors = Trajectory(run), Descriptors(run.path(DESCRIPTORS), run)
        trajectory.source, trajectory.noise_mask = source, latent.get("noise_mask")
        return io.NodeOutput(trajectory, descriptors, {**latent, "samples": noisiest})


def _open(
    model, source, samples: Tensor, steps: int, dtype, where: str, resume: str, text: NodeText, refine: int
) -> Run:
    """The run of these inputs, once there is room for it."""
    sigmas, signature = inversion_sigmas(model, steps), model_signature(model, where)
    identity = trajectory_identity(
        samples.shape,
        sigmas,
        signature,
        clip_fingerprint(samples),
        dtype,
        weights=model_fingerprint(model),
        source=fingerprint(source),
        **({"refine": refine} if refine else {}),
    )
    features = (samples.shape[0], descriptor_channels(model, where), *samples.shape[2:])
    size = trajectory_bytes(samples.shape, len(sigmas), dtype) + tensor_bytes(features, dtype)
    return resumable_run("inversion", identity, size, where, resume, text)


def _invert(model, source, samples: Tensor, steps: int, run: Run, chunk: int, where: str, text, refine: int) -> Tensor:
    """Do what the run has not done yet; returns the noisiest latent."""
    trajectory, descriptors = TrajectoryWriter(run), None
    total = trajectory.levels - 1
    if trajectory.level > 0:
        text.put("resume", f"resumed after step {trajectory.level} of {total}")
    else:
        identity = run.identity
        shape = (samples.shape[0], descriptor_channels(model, where), *samples.shape[2:])
        picture = latent_rgb(model, middle_column(samples))
        descriptors = DescriptorWriter(
            run.path(DESCRIPTORS), shape, identity["model"], identity["clip"], run.key, picture, trajectory.dtype
        )
    try:
        callback = sampling_callback(model, total * (1 + refine))
        return invert(model, source, samples, steps, trajectory, descriptors, where, text, chunk, callback, refine)
    except BaseException:
        if descriptors is not None:
            descriptors.discard()
        raise
