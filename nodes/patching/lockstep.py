"""Chunks of keyframes through the UNet in lockstep: each pauses at a self-attention until all have published there.

The keyframes then need not sit in one batch, and activations grow with the chunk instead of their number. A greenlet
for each chunk does it in one thread, so nothing runs at the same time as anything else.
"""

import contextvars
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

try:
    from greenlet import getcurrent, greenlet
except ImportError:  # a ComfyUI without it: all keyframes go in one batch
    greenlet = None

T = TypeVar("T")


def available() -> bool:
    """Whether several workers can run; one always can."""
    return greenlet is not None


def run_in_lockstep(workers: list[Callable[[], T]]) -> list[T]:
    """Run workers in turn, each up to its next pause, until all have returned.

    An exception of one ends the others where they paused, with their ``finally`` blocks run, and is raised here.
    """
    if len(workers) == 1:
        return [workers[0]()]
    threads = [greenlet(worker) for worker in workers]
    results: list[T] = [None] * len(workers)
    try:
        for thread in threads:
            thread.gr_context = contextvars.copy_context()
        while not all(thread.dead for thread in threads):
            for index, thread in enumerate(threads):
                if not thread.dead:
                    results[index] = thread.switch()
    finally:
        for thread in threads:
            if not thread.dead:
                thread.throw()
    return results


class Exchange:
    """Where the chunks of one joint pass publish tensors and take everybody's.

    Args:
        parties: number of chunks; each publishes once under every key, in the same order of keys.
    """

    def __init__(self, parties: int):
        self.parties = parties
        self._published: dict[Hashable, dict[int, Tensor]] = {}
        self._joined: dict[Hashable, tuple[Tensor, int]] = {}

    def swap(self, key: Hashable, party: int, part: Tensor) -> Tensor:
        """Publish ``part`` (frames, ...) and return all parties' parts, joined along frames in order of party."""
        if self.parties == 1:
            return part
        parts = self._published.setdefault(key, {})
        parts[party] = part
        getcurrent().parent.switch()
        if len(parts) != self.parties:
            raise RuntimeError(f"AdaFlow: {len(parts)} of {self.parties} chunks of keyframes reached {key}")
        if key not in self._joined:
            self._joined[key] = torch.cat([parts[index] for index in range(self.parties)]), self.parties
        joined, waiting = self._joined.pop(key)
        if waiting > 1:
            self._joined[key] = joined, waiting - 1
        else:
            del self._published[key]
        return joined
