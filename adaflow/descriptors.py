"""Token descriptors: diffusion features of the clean frames (DIFT, arXiv 2306.03881) at every layer resolution."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .runs import Run
from .storage import Beside, SafetensorsReader, SafetensorsWriter

FORMAT = "adaflow-descriptors-2"
LEVELS = 4
Area = tuple[int, int, int, int]  # height, width, top, left in latent pixels, as ComfyUI's areas


def layer_sizes(height: int, width: int, levels: int = LEVELS) -> list[tuple[int, int]]:
    """(height, width) of a UNet's layers for a latent of ``height`` x ``width``: halved and rounded up each level."""
    sizes = [(height, width)]
    for _ in range(levels - 1):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def resize_tokens(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Descriptor maps as L2-normalised tokens of another resolution.

    Args:
        maps: (frames, channels, height, width).
        size: (height, width) to resize to, bilinearly.

    Returns:
        (frames, height * width, channels).
    """
    if tuple(maps.shape[2:]) != tuple(size):
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return F.normalize(maps.flatten(2).transpose(1, 2), dim=-1)


class DescriptorWriter:
    """Takes feature maps of frames in any order and stores them normalised, while the caller goes on.

    Args:
        path: file to make.
        shape: (frames, channels, height, width).
        model, clip: signatures of the model and of the clip's latent.
        made_by: a hash of everything the descriptors depend on.
        slice_rgb: y-t slice of the clip, (frames, height, 3) in 0 .. 1, to draw the keyframe selection on.
        dtype: float16 or float32.
    """

    def __init__(self, path: Path, shape, model: str, clip: str, made_by: str, slice_rgb: Tensor, dtype=torch.float16):
        names = {"slice_rgb": (torch.float32, tuple(slice_rgb.shape)), "descriptors": (dtype, tuple(shape))}
        about = {"format": FORMAT, "model": model, "clip": clip, "made_by": made_by}
        self._writer = SafetensorsWriter(path, names, about)
        self._writer.write("slice_rgb", 0, slice_rgb)
        self._missing, self._dtype = set(range(shape[0])), dtype
        self._beside = Beside()

    @property
    def checksum(self) -> str | None:
        """SHA-256 of the file, once it is closed, if frames came in ascending order."""
        return self._writer.checksum

    def write(self, frames: list[int], maps: Tensor) -> None:
        """Store features (frames, channels, height, width) of ``frames``.

        Raises:
            OSError: these or the features before could not be written.
        """
        values, copied = F.normalize(maps.float(), dim=1).to(self._dtype), None
        if values.is_cuda:
            on_host = torch.empty(values.shape, dtype=self._dtype, pin_memory=True)
            values = on_host.copy_(values, non_blocking=True)
            copied = torch.cuda.current_stream(maps.device).record_event()
        self._beside.do(self._store, list(frames), values, copied)
        self._missing.difference_update(frames)

    def _store(self, frames: list[int], values: Tensor, copied: "torch.cuda.Event | None") -> None:
        if copied is not None:
            copied.synchronize()
        for frame, one in zip(frames, values, strict=True):
            self._writer.write("descriptors", frame, one[None])

    def close(self) -> "Descriptors":
        """Raises ValueError when a frame was never written, OSError when one could not be."""
        if self._missing:
            self.discard()
            raise ValueError(f"{len(self._missing)} frames have no descriptors, the first is {min(self._missing)}")
        self._beside.close()
        return Descriptors(self._writer.close())

    def discard(self) -> None:
        self._beside.discard()
        self._writer.discard()


class Descriptors:
    """Reads descriptors from disk as needed.

    Attributes:
        frames, shape: number of frames; (frames, channels, height, width).
        model, clip: signatures of the model that made them and of the clip.
        made_by: a hash of everything they depend on: equal for equal descriptors.
        run: where they lie, if they belong to one; in use, so not cleaned up, while this object lives.
    """

    def __init__(self, path: Path, run: Run | None = None):
        reader = SafetensorsReader(path)
        metadata = reader.metadata
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} does not hold descriptors of format {FORMAT}")
        self.path, self.run = Path(path), run
        self.model, self.clip, self.made_by = metadata["model"], metadata["clip"], metadata["made_by"]
        self.shape = reader.shape("descriptors")
        self.frames = self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the maps, the latent's."""
        return self.shape[2], self.shape[3]

    def slice_rgb(self) -> Tensor:
        """y-t slice of the clip, (frames, height, 3) in 0 .. 1."""
        return self._read("slice_rgb", slice(None)).clone()

    def _read(self, name: str, index) -> Tensor:
        # opened anew each time: what a memory map has shown stays in the process's memory until it is closed
        path = self.path if self.run is None else self.run.checked(self.path.name)
        return SafetensorsReader(path).read(name, index)

    def stored(self, frames: list[int], area: Area | None = None, device=None) -> Tensor:
        """Normalised descriptor maps, (frames, channels, height, width), in the precision of the file.

        Args:
            frames: frame numbers.
            area: part of the latent to cut out; all of it by default.

        Raises:
            DamagedRunError: their file is not what the inversion wrote.
        """
        runs = frames if len(frames) != frames[-1] - frames[0] + 1 else slice(frames[0], frames[-1] + 1)
        maps = self._read("descriptors", runs).to(device)
        if area is not None:
            height, width, top, left = area
            maps = maps[:, :, top : top + height, left : left + width]
        return maps

    def maps(self, frames: list[int], area: Area | None = None, device=None) -> Tensor:
        """The same in float32."""
        return self.stored(frames, area, device).float()

    def tokens(self, frames: list[int], size=None, area: Area | None = None, device=None) -> Tensor:
        """Normalised descriptors at a layer's resolution, (frames, height * width, channels), float32.

        Args:
            size: (height, width) of the layer; the stored size by default.
        """
        maps = self.maps(frames, area, device)
        return resize_tokens(maps, size or tuple(maps.shape[2:]))
