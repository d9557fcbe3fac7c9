"""The peak of the memory that tensors hold, counted storage by storage as they are made and dropped."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """While held, counts the bytes of the tensors made: ``now``, and at ``peak`` the most at one time.

    Args:
        most: bytes beyond which making a tensor fails, as out of memory does; None: no limit.
    """

    def __init__(self, most: int | None = None):
        super().__init__()
        self.now = self.peak = 0
        self._most = most
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return out

    def _count(self, storage, given) -> None:
        if storage in self._known or storage in given:  # a view, or in place
            return
        if self._most is not None and self.now + storage.nbytes() > self._most:
            raise torch.cuda.OutOfMemoryError("injected")
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size
