"""Large tensors in safetensors files that are filled piece by piece and read by memory map, and durable writing.

``safetensors`` writes a file in one call from tensors in memory. Descriptors do not fit there, so the header, which
depends on names, types and shapes alone, is written first and the data region is filled after it.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

_CODES = {
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.uint16: "U16",
}


def replace_durably(partial: Path, path: Path) -> None:
    """Rename ``partial``, which is on the disk already, so that the name survives a power loss."""
    partial.replace(path)
    sync_folder(path.parent)


def take_free_name(partial: Path, names: Iterable[Path]) -> Path:
    """Rename ``partial``, which is on the disk already, to the first of ``names`` that no file has, and return that.

    Nothing is overwritten, whatever other processes write there meanwhile.
    """
    for path in names:
        try:
            if os.name == "nt":  # where a rename overwrites nothing
                partial.rename(path)
            else:
                os.link(partial, path)
        except FileExistsError:
            continue
        except OSError:  # the file system has no links
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            try:
                partial.replace(path)
            except BaseException:
                path.unlink()
                raise
        sync_folder(path.parent)
        partial.unlink(missing_ok=True)
        return path
    raise FileExistsError(f"{partial} finds no free name")


def sync_folder(path: Path) -> None:
    """Bring to the disk which names stand in a folder."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text_durably(path: Path, text: str) -> None:
    """Put a text file in place of ``path``: whatever happens, the old or the whole new one stands there."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replace_durably(partial, path)


def checksum(path: Path, between: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file, read in pieces of 1 MiB; ``between`` is called before each and may raise."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            between()
            digest.update(piece)
    return digest.hexdigest()


class Beside:
    """Has one thing at a time done in a thread, while the caller goes on.

    As a context it is closed when that is left, by an error too.
    """

    def __init__(self):
        self._thread, self._doing = ThreadPoolExecutor(1, "adaflow-beside"), None

    def do(self, function: Callable, *args) -> None:
        """Begin with the next, once the one before is done; raises what that raised."""
        self._wait()
        self._doing = self._thread.submit(function, *args)

    def _wait(self) -> None:
        doing, self._doing = self._doing, None
        if doing is not None:
            doing.result()

    def close(self) -> None:
        """Wait for the last one; raises what that raised."""
        try:
            self._wait()
        finally:
            self.discard()

    def discard(self) -> None:
        """Wait for the last one, whatever became of it."""
        self._thread.shutdown()

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class SafetensorsWriter:
    """A safetensors file whose tensors are written in pieces.

    The file stands under ``<path>.partial`` until :meth:`close`, which renames it: a reader never sees half a file. It
    is written, not mapped: a full disk raises OSError where a memory map would end the process.

    Args:
        path: the final path.
        shapes: tensor name -> (dtype, shape); dtype one of float16, float32, int32, uint8, uint16.
        metadata: text to text, stored in the header.

    Attributes:
        checksum: SHA-256 of the file, once it is closed and if it was written from its beginning to its end.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]):
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        header: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape) in shapes.items():
            start, end = end, end + int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.checksum: str | None = None
        self._digest, self._hashed, self._size = hashlib.sha256(), 0, 8 + len(text) + end
        self._hashing = ThreadPoolExecutor(1, "adaflow-checksum")  # beside the writing, which takes as long
        self._places = {
            name: (8 + len(text) + header[name]["data_offsets"][0], dtype, int(np.prod(shape[1:])) * dtype.itemsize)
            for name, (dtype, shape) in shapes.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._partial, "wb", buffering=0)  # noqa: SIM115, closed by close() and discard()
        try:
            self._put(0, struct.pack("<Q", len(text)) + text)
            self._file.truncate(self._size)
        except OSError:
            self.discard()
            raise

    def _put(self, offset: int, data) -> None:
        self._file.seek(offset)
        left, hashing = memoryview(data).cast("B"), None
        if offset == self._hashed:
            hashing = self._hashing.submit(self._digest.update, left)
            self._hashed += len(left)
        elif offset < self._hashed:  # what was hashed is overwritten
            self._hashed = -1
        try:
            while left:  # an unbuffered write may take a part only
                left = left[self._file.write(left) :]
        finally:
            if hashing is not None:  # ``data`` is the caller's again
                hashing.result()

    def write(self, name: str, first: int, values: torch.Tensor) -> None:
        """Write rows ``first``, ``first`` + 1, ... of tensor ``name`` along its first dimension."""
        start, dtype, row_bytes = self._places[name]
        self._put(start + first * row_bytes, values.detach().to("cpu", dtype).contiguous().numpy())

    def close(self) -> Path:
        """Bring the file to the disk, give it its final name and return that."""
        self._hashing.shutdown()
        os.fsync(self._file.fileno())
        self._file.close()
        replace_durably(self._partial, self.path)
        if self._hashed == self._size:
            self.checksum = self._digest.hexdigest()
        return self.path

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._hashing.shutdown()
        self._file.close()
        self._partial.unlink(missing_ok=True)


def save_tensor(path: Path, values: torch.Tensor, dtype: torch.dtype) -> str:
    """Write one tensor as ``x`` to a safetensors file, durably, and return the file's checksum."""
    writer = SafetensorsWriter(path, {"x": (dtype, tuple(values.shape))}, {})
    try:
        writer.write("x", 0, values)
        writer.close()
    except BaseException:
        writer.discard()
        raise
    return writer.checksum


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
