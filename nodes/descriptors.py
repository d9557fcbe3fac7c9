"""AdaFlowExtractDescriptors: token descriptors in the published setting."""

import comfy.utils
import torch
from comfy_api.latest import io

from ..adaflow.descriptors import DescriptorWriter
from ..adaflow.errors import require
from ..adaflow.runs import digest
from ..adaflow.trajectory import clip_fingerprint, tensor_bytes
from .common import (
    chunk_input,
    clip_latent,
    disk_errors_explained,
    middle_column,
    remove_when_unused,
    temporary_file,
)
from .patching.families import model_signature
from .patching.fingerprint import fingerprint, model_fingerprint
from .patching.inversion import descriptor_channels, extract_descriptors, zero_conditioning
from .patching.preview import NodeText, latent_rgb
from .types import CATEGORY, Descriptors
from .validation import CheckedNode


class AdaFlowExtractDescriptors(CheckedNode):
    """Mean diffusion features of the clean frames."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowExtractDescriptors",
            display_name="AdaFlow Extract Descriptors",
            category=CATEGORY,
            description="Token descriptors as published: the mean feature over several noise draws. AdaFlow DDIM "
            "Invert gives nearly the same for free; use this one to compare, or to cut a clip without inverting it.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint that will edit: Stable Diffusion 1.x, 2.x or SDXL."),
                io.Latent.Input("latent", tooltip="The clip, one latent a frame."),
                io.Int.Input(
                    "time",
                    default=0,
                    min=0,
                    max=999,
                    tooltip="Diffusion time of the pass, 0 to 999, default 0. Higher times see coarser content.",
                ),
                io.Int.Input(
                    "ensemble",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Noise draws to average, 1 to 64, default 8. Each costs one pass of every frame.",
                ),
                io.Int.Input(
                    "block",
                    default=-1,
                    min=-1,
                    max=11,
                    tooltip="Decoder block to read, 0 to 11, default -1: 8 for SD 1.x and 2.x, 5 for SDXL.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**32 - 1, tooltip="Of the noise draws, 0 to 4294967295, default 0."
                ),
                io.Conditioning.Input(
                    "empty_prompt",
                    optional=True,
                    tooltip="The empty prompt, encoded, as published. Without it a conditioning of zeros is used.",
                ),
                chunk_input(optional=True),
            ],
            outputs=[Descriptors.Output(display_name="descriptors", tooltip="For AdaFlow Keyframe Select.")],
        )

    @classmethod
    def execute(cls, model, latent, time, ensemble, block, seed, empty_prompt=None, chunk=0) -> io.NodeOutput:
        where = "AdaFlowExtractDescriptors"
        signature = model_signature(model, where)
        samples = clip_latent(latent, where)
        blocks = len(model.model.diffusion_model.output_blocks)
        require(-1 <= block < blocks, where, "block", block, f"-1 (automatic) or 0 to {blocks - 1}")
        number = None if block < 0 else block
        shape = (samples.shape[0], descriptor_channels(model, where, number), *samples.shape[2:])
        text = NodeText(where)
        prompt, clip = empty_prompt or zero_conditioning(model), clip_fingerprint(samples)
        made_by = digest({"weights": model_fingerprint(model), "clip": clip, "prompt": fingerprint(prompt),
            "settings": [time, ensemble, block, seed]})  # fmt: skip
        picture = latent_rgb(model, middle_column(samples))
        progress = comfy.utils.ProgressBar(samples.shape[0])
        with disk_errors_explained(where):
            path = temporary_file("descriptors", tensor_bytes(shape, torch.float16), where, text)
            writer = DescriptorWriter(path, shape, signature, clip, made_by, picture)
            try:
                extract_descriptors(
                    model,
                    prompt,
                    samples,
                    time,
                    ensemble,
                    seed,
                    writer,
                    where,
                    text,
                    number,
                    chunk,
                    progress.update_absolute,
                )
                descriptors = writer.close()
            except BaseException:
                writer.discard()
                raise
        remove_when_unused(descriptors)
        return io.NodeOutput(descriptors)
