"""Where activations of the keyframes wait between the passes of a step: on the device, or in host memory."""

from collections.abc import Hashable

import torch
from torch import Tensor

AHEAD = 2  # requests whose rows are brought before they are made: both branches of the next layer
Rows = tuple[Hashable, int, int]


class Shelf:
    """Tensors by key, put chunk after chunk of the keyframes, (frames, ...).

    In host memory they are pinned where the device is a GPU. What follows a request for rows is learned, and brought
    to the device on ``stream`` while it computes. Other copies are queued on the stream that computes, so that
    whatever is computed after one finds it done, and PyTorch keeps a pinned buffer until the copies from it are.

    Args:
        stream: of the device, to bring rows ahead on; None: as the request is made, where nothing runs beside.

    Attributes:
        on_host: whether what is put goes to host memory.
    """

    def __init__(self, device: torch.device, on_host: bool, stream: "torch.cuda.Stream | None" = None):
        self.device, self.on_host, self._stream = device, on_host, stream
        self._parts: dict[Hashable, list[Tensor]] = {}
        self._next: dict[Hashable, Hashable] = {}
        self._first: Hashable | None = None
        self._last: Hashable | None = None
        self._coming: dict[Rows, tuple[Tensor, torch.cuda.Event | None]] = {}

    def put(self, key: Hashable, part: Tensor) -> None:
        """Add the next chunk."""
        self._parts.setdefault(key, []).append(self._on_host(part) if self.on_host else part)

    def chunk(self, key: Hashable, number: int) -> Tensor:
        """One chunk, on the device."""
        return self._parts[key][number].to(self.device, non_blocking=True)

    def forget(self, key: Hashable, number: int) -> None:
        """Drop one chunk; no rows of that key can be asked for afterwards."""
        self._parts[key][number] = None

    def rows(self, key: Hashable, start: int, stop: int) -> Tensor:
        """Frames ``start`` to ``stop`` of all chunks together, on the device."""
        parts = self._parts[key]
        if not self.on_host:
            if len(parts) > 1:
                parts[:] = [torch.cat(parts)]
            return parts[0][start:stop]
        self._learn(key)
        rows = self._take((key, start, stop))
        self._bring_ahead(key, start, stop)
        return rows

    def drop(self, unless: str) -> None:
        """Forget all but the keys that begin with a word."""
        self._parts = {key: parts for key, parts in self._parts.items() if key[0] == unless}

    def clear(self) -> None:
        """Forget all."""
        for forgotten in (self._parts, self._next, self._coming):
            forgotten.clear()
        self._first = self._last = None

    def move_to_host(self) -> None:
        """What is here, and what comes."""
        self.on_host = True
        self._coming.clear()
        for parts in self._parts.values():
            for number, part in enumerate(parts):
                parts[number] = self._on_host(part)

    def _learn(self, key: Hashable) -> None:
        """Note which key follows which; each chunk of frames begins with the same one, and with rows of its own."""
        if self._first is None:
            self._first = key
        if key == self._first:
            self._coming.clear()
        else:
            self._next[self._last] = key
        self._last = key

    def _take(self, asked: Rows) -> Tensor:
        if asked not in self._coming:
            return self._copy(*asked)
        rows, done = self._coming.pop(asked)
        if done is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(done)
            rows.record_stream(computing)  # the allocator must not hand it out again before that has read it
        return rows

    def _bring_ahead(self, key: Hashable, start: int, stop: int) -> None:
        for _ in range(AHEAD):
            key = self._next.get(key)
            if key is None:
                return
            if (key, start, stop) not in self._coming:
                self._coming[key, start, stop] = self._bring(key, start, stop)

    def _bring(self, key: Hashable, start: int, stop: int) -> "tuple[Tensor, torch.cuda.Event | None]":
        if self._stream is None:
            return self._copy(key, start, stop), None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still fill the host's buffers
        with torch.cuda.stream(self._stream):
            return self._copy(key, start, stop), self._stream.record_event()

    def _copy(self, key: Hashable, start: int, stop: int) -> Tensor:
        parts, first = self._parts[key], 0
        rows = torch.empty(stop - start, *parts[0].shape[1:], dtype=parts[0].dtype, device=self.device)
        for part in parts:
            begin, end = max(start, first), min(stop, first + len(part))
            if begin < end:
                rows[begin - start : end - start].copy_(part[begin - first : end - first], non_blocking=True)
            first += len(part)
        return rows

    def _on_host(self, part: Tensor) -> Tensor:
        buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        return buffer.copy_(part, non_blocking=True)
