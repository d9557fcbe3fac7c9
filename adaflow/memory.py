"""Running out of memory in a stage that works block by block: what that is, and going on with smaller blocks; memory
that is free but not given back; and copies to a device that nothing waits for."""

import contextlib
import ctypes
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class SmallestBlockError(RuntimeError):
    """Out of memory with as little at a time as there can be; the message says how much that is."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on an accelerator, or in RAM, for which torch has no exception of its own."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


def give_back_ram() -> None:
    """Have the C library give what is free in its heap back to the system, where it can (glibc).

    Of activations that come and go around others that stay, as those of keyframes do, it else keeps the most there was.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; Windows has no name for it
        ctypes.CDLL(None).malloc_trim(0)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``; to a GPU it is copied when what was told to it before is done, and nobody waits."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@dataclass
class Room:
    """Bytes that a stage may fill, less after each time that memory ran out.

    What is computed must not depend on it.

    Attributes:
        held: of what is kept so that it is read only once.
        block: of what is worked on at a time.
    """

    held: int
    block: int

    def rows(self, row_bytes: int, rows: int) -> int:
        """How many of ``rows`` are worked on at a time, at least one."""
        return max(1, min(rows, self.block // row_bytes))

    def shrink(self, error: Exception, row_bytes: int, rows: int, doing: str) -> None:
        """Hold nothing any more, and when that was so already, work on half as many of ``rows`` at a time.

        To be called while ``error`` is handled; what was held is free once it no longer is.

        Args:
            doing: what is done with the rows, and their size.

        Raises:
            SmallestBlockError: it was one row, and nothing was held.
            RuntimeError: ``error`` itself, if it was not lack of memory.
        """
        if not is_out_of_memory(error):
            raise error
        tried = self.rows(row_bytes, rows)
        if self.held:
            self.held = 0
        elif tried > 1:
            self.block = tried // 2 * row_bytes
        else:
            raise SmallestBlockError(
                f"AdaFlow: out of memory with one keyframe at a time, of {row_bytes / 1e9:.2f} GB, {doing}"
            ) from error
        left = self.rows(row_bytes, rows)
        logger.warning(
            "AdaFlow: out of memory with %d keyframes at a time, %s; going on with %d and nothing held",
            tried,
            doing,
            left,
        )
