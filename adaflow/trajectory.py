"""The inverted source video: its latents at every noise level of the grid, on disk and memory-mapped."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from .ddim import bracket, sigma_to_mu
from .storage import SafetensorsReader, SafetensorsWriter

FORMAT = "adaflow-trajectory-1"


def clip_fingerprint(latent: Tensor) -> str:
    """A short hash of a clean latent (frames, channels, height, width): tells one clip from another."""
    frames = latent.shape[0]
    picked = latent[:: max(1, frames // 16), :, ::2, ::2].detach().to("cpu", torch.float16).contiguous()
    digest = hashlib.sha256(repr(tuple(latent.shape)).encode())
    digest.update(picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def trajectory_bytes(shape: tuple[int, ...], levels: int, dtype: torch.dtype) -> int:
    """Bytes on disk of a trajectory of ``levels`` noise levels of latents of ``shape``."""
    return levels * int(torch.Size(shape).numel()) * dtype.itemsize


class TrajectoryWriter:
    """Takes VP latents level by level, level 0 being the clean one.

    Args:
        path: file to make.
        shape: (frames, channels, height, width).
        sigmas: ascending noise levels; ``sigmas[0]`` belongs to the clean latent.
        model: signature of the model that inverts.
        clip: :func:`clip_fingerprint` of the clean latent.
        dtype: float16 or float32.
    """

    def __init__(self, path: Path, shape, sigmas: list[float], model: str, clip: str, dtype=torch.float16):
        metadata = {"format": FORMAT, "sigmas": json.dumps(list(sigmas)), "model": model, "clip": clip}
        names = {f"x_{level:04d}": (dtype, tuple(shape)) for level in range(len(sigmas))}
        self._writer = SafetensorsWriter(path, names, metadata)

    def write(self, level: int, x: Tensor) -> None:
        """Store the VP latent of all frames at ``level``."""
        self._writer.write(f"x_{level:04d}", slice(None), x)

    def close(self) -> "Trajectory":
        return Trajectory(self._writer.close())

    def discard(self) -> None:
        self._writer.discard()


class Trajectory:
    """Reads a trajectory. Nothing is held in memory but what was asked for.

    Attributes:
        sigmas: ascending noise levels, level 0 the clean latent's.
        frames, shape: number of frames; (frames, channels, height, width).
        model, clip: signatures of the inverting model and of the clip.
        source: conditioning of the source prompt, as the caller's framework has it; set by who inverts.
        noise_mask: where the edit may change the clip, (frames or 1, height, width); set by who inverts.
    """

    def __init__(self, path: Path):
        self._reader = SafetensorsReader(path)
        metadata = self._reader.metadata
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a trajectory of format {FORMAT}")
        self.path = Path(path)
        self.sigmas: list[float] = json.loads(metadata["sigmas"])
        self.model, self.clip = metadata["model"], metadata["clip"]
        self.shape = self._reader.shape("x_0000")
        self.frames = self.shape[0]
        self.source: object = None
        self.noise_mask: Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def level(self, level: int, frames: list[int] | slice = slice(None)) -> Tensor:
        """VP latents of ``frames`` at one level, float32."""
        return self._reader.read(f"x_{level:04d}", frames).to(torch.float32, copy=True)

    def at(self, sigma: float, frames: list[int] | slice = slice(None)) -> Tensor:
        """VE latents of ``frames`` at any noise level, float32.

        Between two levels the VE latent is interpolated linearly in sigma, the straight line of the inversion step
        itself; above the last level that line is continued; at 0 and below the first the clean latent stands.
        """
        if sigma <= 0.0:
            return self.level(0, frames)
        lo, hi, weight = bracket(self.sigmas, sigma)
        if weight in (0.0, 1.0):
            level = hi if weight else lo
            return self.level(level, frames) / sigma_to_mu(self.sigmas[level])
        low = self.level(lo, frames) / sigma_to_mu(self.sigmas[lo])
        high = self.level(hi, frames) / sigma_to_mu(self.sigmas[hi])
        return low.lerp(high, weight)
