"""Whether kernels that are not PyTorch's own choice run on a device; where they do not, PyTorch's take their place."""

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)
HALF = (torch.float16, torch.bfloat16)  # in which kernels take the place of PyTorch's own choice


def kernels_run(probe: Callable[[], object], what: str) -> bool:
    """Whether ``probe``, a small call of them, ends without an error; if not, a message says why.

    Args:
        what: is not run, and what is done instead.
    """
    try:
        probe()
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know, no cuDNN
        logger.warning("AdaFlow: %s: %s", what, error)
        return False
    return True
