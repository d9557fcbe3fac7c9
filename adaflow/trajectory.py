"""The inverted source video: its latents at every noise level of the grid, on disk and memory-mapped."""

import hashlib
from types import MappingProxyType

import torch
from torch import Tensor

from .ddim import bracket, sigma_to_mu
from .runs import Run
from .storage import SafetensorsReader, save_tensor

FORMAT = "adaflow-trajectory-2"
HASHED_FRAMES = 64  # at a time


def clip_fingerprint(latent: Tensor) -> str:
    """A short hash of every value of a clean latent (frames, channels, height, width)."""
    digest = hashlib.sha256(repr(tuple(latent.shape)).encode())
    for start in range(0, latent.shape[0], HASHED_FRAMES):
        part = latent[start : start + HASHED_FRAMES].detach().to("cpu", torch.float32).contiguous()
        digest.update(part.numpy())
    return digest.hexdigest()[:16]


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes on disk of a tensor."""
    return int(torch.Size(shape).numel()) * dtype.itemsize


def trajectory_identity(shape, sigmas: list[float], model: str, clip: str, dtype: torch.dtype, **made_by) -> dict:
    """Everything that a trajectory depends on, to open its run with.

    Args:
        shape: (frames, channels, height, width).
        sigmas: ascending noise levels; ``sigmas[0]`` belongs to the clean latent.
        model: signature of the model that inverts.
        clip: :func:`clip_fingerprint` of the clean latent.
        dtype: of the levels on disk, float16 or float32.
        made_by: whatever else makes a difference, as plain data; what is not given must mean what it meant before it
            could be, so that the runs on the disk are still found.
    """
    about = {"shape": list(shape), "sigmas": list(sigmas), "model": model, "clip": clip}
    return {"format": FORMAT, "dtype": str(dtype), **about, **made_by}


def trajectory_bytes(shape: tuple[int, ...], levels: int, dtype: torch.dtype) -> int:
    """Bytes on disk of a trajectory of ``levels`` noise levels, with the two states it has while it grows."""
    return levels * tensor_bytes(shape, dtype) + 2 * tensor_bytes(shape, torch.float32)


def _name(level: int) -> str:
    return f"x_{level:04d}.safetensors"


def _state_name(level: int) -> str:
    return f"state_{level:04d}.safetensors"


class TrajectoryWriter:
    """Takes VP latents level by level, level 0 being the clean one, and can go on with those that its run holds.

    Beside the levels, stored as ``dtype``, the last one stands in float32: from there the inversion goes on with the
    very bits that it had.

    Args:
        run: opened with :func:`trajectory_identity`.
    """

    def __init__(self, run: Run):
        self.run = run
        self.dtype = {"torch.float16": torch.float16, "torch.float32": torch.float32}[run.identity["dtype"]]
        self.levels = len(run.identity["sigmas"])

    @property
    def level(self) -> int:
        """The last level written; -1 before the first."""
        return self.run.progress.get("level", -1)

    @property
    def chunk(self) -> int:
        """The ``chunk`` of the last :meth:`write`; 0 before the first."""
        return self.run.progress.get("chunk", 0)

    def state(self) -> Tensor:
        """The VP latent of the last level, float32, as it was given."""
        return SafetensorsReader(self.run.path(_state_name(self.level))).read("x", slice(None)).clone()

    def write(self, x: Tensor, chunk: int = 0, also: dict[str, str | None] = MappingProxyType({})) -> None:
        """Store the VP latent of all frames at the next level.

        Args:
            chunk: frames that went through the model at once.
            also: other files of the run that are whole with this level: name -> checksum, or None if not known.
        """
        old, level = self.level, self.level + 1
        added = {
            name: save_tensor(self.run.path(name), x, dtype)
            for name, dtype in ((_name(level), self.dtype), (_state_name(level), torch.float32))
        }
        dropped, finished = [_state_name(old)] if level else [], level == self.levels - 1
        self.run.commit(added | dict(also), dropped, level=level, chunk=chunk, finished=finished)


class Trajectory:
    """Reads a trajectory. Nothing is held in memory but what was asked for.

    Attributes:
        run: where it lies; in use, so not cleaned up, while this object lives.
        sigmas: ascending noise levels, level 0 the clean latent's.
        frames, shape: number of frames; (frames, channels, height, width).
        model, clip: signatures of the inverting model and of the clip.
        source: conditioning of the source prompt, as the caller's framework has it; set by who inverts.
        noise_mask: where the edit may change the clip, (frames or 1, height, width); set by who inverts.
    """

    def __init__(self, run: Run):
        identity = run.identity
        if identity.get("format") != FORMAT:
            raise ValueError(f"{run.folder} is not a trajectory of format {FORMAT}")
        self.run = run
        self.sigmas: list[float] = identity["sigmas"]
        self.model, self.clip = identity["model"], identity["clip"]
        self.shape = tuple(identity["shape"])
        self.frames = self.shape[0]
        self.source: object = None
        self.noise_mask: Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def level(self, level: int, frames: list[int] | slice = slice(None)) -> Tensor:
        """VP latents of ``frames`` at one level, float32.

        Raises:
            DamagedRunError: its file is not what the inversion wrote.
        """
        reader = SafetensorsReader(self.run.checked(_name(level)))
        if isinstance(frames, list) and max(frames) - min(frames) < 2 * len(frames):  # one read is faster than many
            first = min(frames)
            stored = reader.read("x", slice(first, max(frames) + 1))[[frame - first for frame in frames]]
        else:
            stored = reader.read("x", frames)
        return stored.to(torch.float32, copy=True)

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
