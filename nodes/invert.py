"""AdaFlowDDIMInvert: DDIM inversion of the source clip, with its descriptors from the first pass."""

import torch
from comfy_api.latest import io

from ..adaflow.descriptors import DescriptorWriter
from ..adaflow.errors import require, require_one_of
from ..adaflow.trajectory import TrajectoryWriter, clip_fingerprint, trajectory_bytes
from .common import chunk_input, clip_latent, middle_column, remove_when_unused, run_file
from .patching.families import model_signature, unet_family
from .patching.inversion import descriptor_channels, inversion_sigmas, invert
from .patching.preview import latent_rgb, sampling_callback
from .types import CATEGORY, Descriptors, Trajectory

PRECISIONS = {"float16": torch.float16, "float32": torch.float32}


class AdaFlowDDIMInvert(io.ComfyNode):
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
            ],
            outputs=[
                Trajectory.Output(display_name="trajectory", tooltip="The clip's latents at every noise level."),
                Descriptors.Output(display_name="descriptors", tooltip="Token descriptors, from the first pass."),
                io.Latent.Output(
                    display_name="noisiest",
                    tooltip="The last level. A sampler with its noise off starts from it.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, source, latent, steps, precision="float16", chunk=0) -> io.NodeOutput:
        where = "AdaFlowDDIMInvert"
        unet_family(model, where)
        samples = clip_latent(latent, where)
        channels = model.model.latent_format.latent_channels
        require(samples.shape[1] == channels, where, "latent", f"of {samples.shape[1]} channels", f"{channels}")
        require(len(source) > 0, where, "source", "empty", "an encoded prompt")
        require_one_of(precision, PRECISIONS, where, "precision")
        dtype = PRECISIONS[precision]
        sigmas, signature = inversion_sigmas(model, steps), model_signature(model, where)
        clip = clip_fingerprint(samples)
        features = (samples.shape[0], descriptor_channels(model, where), *samples.shape[2:])
        levels = trajectory_bytes(samples.shape, len(sigmas), dtype)
        path = run_file("trajectory", levels, where)
        trajectory = TrajectoryWriter(path, samples.shape, sigmas, signature, clip, dtype)
        path = run_file("descriptors", trajectory_bytes(features, 1, dtype), where)
        descriptors = DescriptorWriter(
            path, features, signature, clip, latent_rgb(model, middle_column(samples)), dtype
        )
        try:
            callback = sampling_callback(model, len(sigmas) - 1)
            noisiest = invert(model, source, samples, steps, trajectory, descriptors, where, chunk, callback)
            outputs = trajectory.close(), descriptors.close()
        except BaseException:
            trajectory.discard()
            descriptors.discard()
            raise
        for output in outputs:
            remove_when_unused(output)
        outputs[0].source, outputs[0].noise_mask = source, latent.get("noise_mask")
        return io.NodeOutput(*outputs, {**latent, "samples": noisiest})
