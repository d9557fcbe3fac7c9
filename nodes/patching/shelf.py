"""Where activations of the keyframes wait between the passes of a step: on the device, or in host memory."""

from collections.abc import Hashable

import torch
from torch import Tensor


class Shelf:
    """Tensors by key, put chunk after chunk of the keyframes, (frames, ...).

    In host memory they are pinned where the device is a GPU. Copies are queued on the stream that computes, so that
    whatever is computed after one finds it done, and PyTorch keeps a pinned buffer until the copies from it are.

    Attributes:
        on_host: whether what is put goes to host memory.
    """

    def __init__(self, device: torch.device, on_host: bool):
        self.device, self.on_host = device, on_host
        self._parts: dict[Hashable, list[Tensor]] = {}

    def put(self, key: Hashable, part: Tensor) -> None:
        """Add the next chunk."""
        self._parts.setdefault(key, []).append(self._on_host(part) if self.on_host else part)

    def chunk(self, key: Hashable, number: int) -> Tensor:
        """One chunk, on the device."""
        return self._parts[key][number].to(self.device, non_blocking=True)

    def rows(self, key: Hashable, start: int, stop: int) -> Tensor:
        """Frames ``start`` to ``stop`` of all chunks together, on the device."""
        parts = self._parts[key]
        if all(part.device == self.device for part in parts) and not self.on_host:
            if len(parts) > 1:
                parts[:] = [torch.cat(parts)]
            return parts[0][start:stop]
        rows, first = torch.empty(stop - start, *parts[0].shape[1:], dtype=parts[0].dtype, device=self.device), 0
        for part in parts:
            begin, end = max(start, first), min(stop, first + len(part))
            if begin < end:
                rows[begin - start : end - start].copy_(part[begin - first : end - first], non_blocking=True)
            first += len(part)
        return rows

    def drop(self, unless: str) -> None:
        """Forget all but the keys that begin with a word."""
        self._parts = {key: parts for key, parts in self._parts.items() if key[0] == unless}

    def clear(self) -> None:
        self._parts.clear()

    def move_to_host(self) -> None:
        """What is here, and what comes."""
        self.on_host = True
        for parts in self._parts.values():
            for number, part in enumerate(parts):
                parts[number] = self._on_host(part)

    def _on_host(self, part: Tensor) -> Tensor:
        buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        return buffer.copy_(part, non_blocking=True)
