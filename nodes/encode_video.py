"""AdaFlowEncodeVideo: frames into latents, a chunk at a time."""

import hashlib
from collections.abc import Iterator

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import InputImpl, io

from ..adaflow.errors import InputError, require
from .lazy_video import clip_of
from .patching.preview import NodeText
from .patching.vae import ChunkedVAE, announce_vae
from .types import CATEGORY
from .validation import CheckedNode

NODE = "AdaFlow Encode Video"
CHUNK_BYTES = 128 << 20
MOST_AUTO = 16


def auto_chunk(width: int, height: int) -> int:
    """Frames per chunk: at most 128 MiB of float32 pixels and 16 frames."""
    return max(1, min(MOST_AUTO, CHUNK_BYTES // (width * height * 3 * 4)))


def require_image_vae(vae, where: str) -> None:
    """Raise :class:`InputError` unless ``vae`` encodes single images, as those of SD 1.x, SD 2.x and SDXL do."""
    require(vae is not None, where, "vae", "missing", "a VAE, from the checkpoint loader or Load VAE")
    dims = getattr(vae, "latent_dim", 2)
    require(dims == 2, where, "vae", f"one with {dims}-dimensional latents", "an image VAE (SD 1.x, SD 2.x, SDXL)")


def require_finite(latents: torch.Tensor, first: int, where: str, what: str, cause: str) -> None:
    """Raise :class:`InputError` naming the first frame of ``latents`` that holds NaN or infinity."""
    bad = (~torch.isfinite(latents)).flatten(1).any(1).nonzero()
    if len(bad):
        raise InputError(where, what, f"not finite (NaN or infinity) in frame {first + int(bad[0])}", cause)


def _chunks_of(images: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    for first in range(0, len(images), chunk):
        yield images[first : first + chunk, ..., :3].float()


def _describe(source) -> tuple[int, int, int, float, object]:
    """``(frames, width, height, fps or 0, function from chunk to iterator of (n, height, width, 3) tensors)``."""
    fps = 0.0
    if isinstance(source, InputImpl.VideoFromComponents):
        components = source.get_components()
        source, fps = components.images, float(components.frame_rate)
    if isinstance(source, torch.Tensor):
        require(
            source.ndim == 4 and len(source) > 0 and source.shape[-1] in (3, 4),
            NODE,
            "source",
            f"an IMAGE of shape {tuple(source.shape)}",
            "(frames, height, width, 3)",
        )
        count, height, width, _ = source.shape
        return count, width, height, fps, lambda chunk: _chunks_of(source, chunk)
    clip = clip_of(source, NODE, "source")

    def decoded(chunk: int) -> Iterator[torch.Tensor]:
        for frames in clip.frames(chunk):
            yield torch.from_numpy(frames).float() / 255

    return clip.count(), clip.width, clip.height, float(clip.fps), decoded


class AdaFlowEncodeVideo(CheckedNode):
    """Encodes a video frame by frame; only one chunk of it is ever decoded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaFlowEncodeVideo",
            display_name=NODE,
            category=CATEGORY,
            description="Encodes every frame of a video into latents, a chunk at a time, so that a long video "
            "never stands decoded in memory.",
            inputs=[
                io.MultiType.Input(
                    "source",
                    types=[io.Video, io.Image],
                    tooltip="The frames: a VIDEO (best from AdaFlow Load Video, which streams and fits the size) or an "
                    "IMAGE batch. Width and height must be multiples of 8 pixels.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint that edits (SD 1.x, SD 2.x or SDXL)."),
                io.Int.Input(
                    "chunk",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Frames decoded and encoded at a time. Range 0 to 1024, default 0: chosen by size. More is "
                    "a little faster and takes more memory; the result is the same.",
                ),
            ],
            outputs=[io.Latent.Output("LATENT", display_name="latent", tooltip="One latent per frame.")],
        )

    @classmethod
    def execute(cls, source, vae, chunk=0) -> io.NodeOutput:
        require_image_vae(vae, NODE)
        count, width, height, fps, chunks = _describe(source)
        expected = "multiples of 8 pixels: put AdaFlow Load Video or Resize Image before this node"
        require(width % 8 == 0 and height % 8 == 0, NODE, "source", f"{width}x{height} pixels", expected)
        progress = comfy.utils.ProgressBar(count)
        samples, done = None, 0
        chunk = chunk or auto_chunk(width, height)
        shape = (count, getattr(vae, "latent_channels", 4), height // 8, width // 8)
        announce_vae("encode", vae, (width, height), count, chunk, NODE, "source", NodeText(NODE), shape)
        encoder = ChunkedVAE(vae, chunk, NODE)
        for latents in (latents for pixels in chunks(chunk) for latents in encoder.encode(pixels)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            cause = "finite latents: the VAE overflows in half precision, start ComfyUI with --fp32-vae or --bf16-vae"
            require_finite(latents, done, NODE, "vae", cause)
            if samples is None:
                samples = torch.empty(count, *latents.shape[1:], dtype=latents.dtype)
            samples[done : done + len(latents)] = latents
            done += len(latents)
            progress.update_absolute(done, count)
        digest = hashlib.blake2b(memoryview(samples.contiguous().numpy()).cast("B"), digest_size=16).hexdigest()
        about = {"fps": fps, "width": width, "height": height, "frames": count, "fingerprint": digest}
        return io.NodeOutput({"samples": samples, "adaflow_source": about})
