"""Chunks of keyframes through the UNet in lockstep: each pauses at a self-attention until all have published there.

The keyframes then need not sit in one batch, and activations grow with the chunk instead of their number. A greenlet
for each chunk does it in one thread, so nothing runs at the same time as anything else.
"""

import contextvars
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

from torch import Tensor

try:
    from greenlet import getcurrent, greenlet
except ImportError:  # a ComfyUI without it: all keyframes go in one batch
    greenlet = None

T = TypeVar("T")


def available() -> bool:
    """Whether several workers can run; one always can."""
    return greenlet is not None


def run_in_lockstep(workers: list[Callable[[], T]], between: Callable[[], None] = lambda: None) -> list[T]:
    """Run workers in turn, each up to its next pause, until all have returned; ``between`` whenever all have paused.

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
            between()
    finally:
        for thread in threads:
            if not thread.dead:
                thread.throw()
    return results


class Exchange:
    """Where the chunks of one joint pass publish tensors, meet, and take everybody's.

    What is published is copied to its place among the others' at once, so that it is held only once.

    Args:
        frames: of each chunk; all publish under the same keys, meet, and take each key once.
    """

    def __init__(self, frames: Sequence[int]):
        self._places = [slice(start, stop) for start, stop in pairwise(accumulate(frames, initial=0))]
        self._published: dict[Hashable, tuple[Tensor, set[int]]] = {}
        self._taken: dict[Hashable, int] = {}

    def publish(self, key: Hashable, chunk: int, part: Tensor) -> None:
        """Give ``part`` (frames, ...) of a chunk to all."""
        if len(self._places) == 1:
            self._published[key] = part, {chunk}
            return
        if key not in self._published:
            self._published[key] = part.new_empty(self._places[-1].stop, *part.shape[1:]), set()
        joined, chunks = self._published[key]
        joined[self._places[chunk]] = part
        chunks.add(chunk)

    def meet(self) -> None:
        """Wait until all others have come as far."""
        if len(self._places) > 1:
            getcurrent().parent.switch()

    def take(self, key: Hashable) -> Tensor:
        """All chunks' parts, joined along frames."""
        joined, chunks = self._published[key]
        if len(chunks) != len(self._places):
            raise RuntimeError(f"AdaFlow: {len(chunks)} of {len(self._places)} chunks of keyframes reached {key}")
        self._taken[key] = self._taken.get(key, 0) + 1
        if self._taken[key] == len(self._places):
            del self._published[key], self._taken[key]
        return joined
