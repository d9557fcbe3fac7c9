"""Large tensors in safetensors files that are filled piece by piece and read by memory map.

``safetensors`` writes a file in one call from tensors in memory. A trajectory does not fit there, so the header, which
depends on names, types and shapes alone, is written first and the data region is filled through a memory map.
"""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

_CODES = {torch.float16: ("F16", np.float16), torch.float32: ("F32", np.float32), torch.int32: ("I32", np.int32)}


class SafetensorsWriter:
    """A safetensors file whose tensors are written in pieces.

    The file stands under ``<path>.partial`` until :meth:`close`, which renames it: a reader never sees half a file.

    Args:
        path: the final path.
        shapes: tensor name -> (dtype, shape); dtype one of float16, float32, int32.
        metadata: text to text, stored in the header.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]):
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        header: dict[str, object] = {"__metadata__": metadata}
        offset = 0
        for name, (dtype, shape) in shapes.items():
            size = int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype][0], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(start + offset)
        self._views = {
            name: np.memmap(
                self._partial,
                _CODES[dtype][1],
                "r+",
                offset=start + header[name]["data_offsets"][0],
                shape=tuple(shape),
            )
            for name, (dtype, shape) in shapes.items()
        }

    def write(self, name: str, index: int | slice, values: torch.Tensor) -> None:
        """Write ``values`` at ``index`` of the first dimension of tensor ``name``."""
        view = self._views[name]
        view[index] = values.detach().to("cpu", torch.from_numpy(np.empty(0, view.dtype)).dtype).numpy()

    def close(self) -> Path:
        """Flush, give the file its final name and return that."""
        for view in self._views.values():
            view.flush()
        self._views = {}
        self._partial.replace(self.path)
        return self.path

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._views = {}
        self._partial.unlink(missing_ok=True)


class SafetensorsReader:
    """Slices of the tensors of a safetensors file, read through its memory map when asked for."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._file = safe_open(str(self.path), framework="pt")
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str, index: slice | list[int] | int) -> torch.Tensor:
        """``tensor[index]`` of tensor ``name``, perhaps a view of the map, so not to be written to.

        A list of rows keeps its order.
        """
        stored = self._file.get_slice(name)
        if isinstance(index, list):
            return torch.cat([stored[i : i + 1] for i in index])
        return stored[index]
