"""Skip connections of keyframes that wait for one another: in host memory until the decoder takes them.

A forward that is paused holds its encoder's outputs in a list of ComfyUI's, which only the decoder reads. So they are
not taken away: their storages are emptied where they are, and filled again before the decoder block that reads them.
"""

import weakref

import torch
from torch import Tensor


class ParkedSkips:
    """Those of one chunk of a joint pass. Copies are queued on the stream that computes.

    Attributes:
        away: how many are in host memory.
    """

    def __init__(self):
        self._here: dict[int, weakref.ref] = {}
        self._away: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    @property
    def away(self) -> int:
        return len(self._away)

    def made(self, number: int, skip: Tensor) -> None:
        """The output of an encoder block, (batch, channels, height, width); the forward keeps it, this does not."""
        self._here[number] = weakref.ref(skip)

    def leave(self) -> None:
        """Empty all that were made and are still held: until they come back nothing may read them."""
        for number, held in self._here.items():
            skip = held()
            if skip is not None and skip.untyped_storage().nbytes() == skip.nbytes:  # not a part of something else
                storage = skip.untyped_storage()
                kept = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=skip.is_cuda)
                self._away[number] = storage, kept.copy_(_bytes(storage), non_blocking=True)
                storage.resize_(0)
        self._here.clear()

    def come_back(self, number: int) -> None:
        """Fill one again, if it was emptied."""
        if number in self._away:
            storage, kept = self._away.pop(number)
            storage.resize_(kept.nbytes)
            _bytes(storage).copy_(kept, non_blocking=True)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),))
