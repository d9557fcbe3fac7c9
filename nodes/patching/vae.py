"""A VAE over many frames: a chunk at a time, fewer when memory runs out."""

import copy
from collections.abc import Iterator

import comfy.model_management
import torch
from torch import Tensor

from ...adaflow.estimate import plural, vae_needs
from .memory import announce, halved


def announce_vae(method, vae, size, count, chunk, where, what, text, latents=None) -> None:
    """Show what frames through ComfyUI's VAE need, then refuse what surely does not fit.

    Args:
        method: "encode" or "decode".
        size: (width, height) in pixels.
        count, chunk: frames, in all and at a time.
        where, what: the node and the input that decides.
        latents: shape of what is made and kept in RAM, if any.

    Raises:
        InputError: more is needed than is free.
    """
    width, height = size
    estimate, kind = getattr(vae, f"memory_used_{method}", None), getattr(vae, "vae_dtype", torch.float32)
    shape = (1, 3, height, width) if method == "encode" else (1, 4, height // 8, width // 8)
    needs = vae_needs(int(estimate(shape, kind)) if estimate else 0, width, height, min(chunk, count), latents)
    device = getattr(vae, "device", None) or comfy.model_management.vae_device()
    got = f"{plural(count, 'frame')}, {width}x{height} pixels"
    announce(needs, device, where, what, got, "use fewer frames or a smaller size", text)


class ChunkedVAE:
    """Encodes and decodes frames through ComfyUI's VAE, ``chunk`` at a time.

    Out of memory, ComfyUI's VAE goes over to tiles, which are slower and may show seams. Here fewer frames are tried,
    first; one that does not fit alone is left to the tiles.

    Args:
        vae: ComfyUI's; it is not changed.
        chunk: frames at a time; after out of memory the number that fitted.
        where: the node, for messages.
    """

    def __init__(self, vae, chunk: int, where: str):
        self.chunk = chunk
        self._vae, self._where = vae, where
        self._without_tiles = copy.copy(vae)
        self._without_tiles.encode_tiled_ = self._without_tiles.decode_tiled_ = _out_of_memory

    def encode(self, pixels: Tensor) -> Iterator[Tensor]:
        """Latents (n, channels, height/8, width/8) of images (frames, height, width, 3), in order, on the CPU."""
        yield from self._run("encode", pixels)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Images (n, height, width, 3) of latents (frames, channels, height/8, width/8), in order, on the CPU."""
        yield from self._run("decode", latents)

    def _run(self, method: str, frames: Tensor) -> Iterator[Tensor]:
        start = 0
        while start < len(frames):
            part = frames[start : start + self.chunk]
            vae = self._without_tiles if len(part) > 1 else self._vae
            try:
                out = getattr(vae, method)(part).to("cpu")
            except RuntimeError as error:
                device = getattr(vae, "device", comfy.model_management.vae_device())
                doing = f"to {method} frames of {' x '.join(map(str, part.shape[1:]))} in {self._where}"
                change = "use a smaller size, or start ComfyUI with --cpu-vae"
                self.chunk = halved(error, len(part), doing, change, device)
                continue
            yield out
            start += len(part)


def _out_of_memory(*_args, **_options):
    raise comfy.model_management.OOM_EXCEPTION("too many frames at a time")
