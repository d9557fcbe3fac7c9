"""Extended attention: a frame's queries over the keys and values of many frames (arXiv 2307.10373, section 4.1).

The plain backend is PyTorch's scaled dot-product attention with the kept rows gathered first. A Triton kernel that
reads them by index takes its place where ``KERNEL_FASTER`` says that it was measured to be faster.
"""

import functools
import logging
import os

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

logger = logging.getLogger(__name__)
BACKEND_VARIABLE = "ADAFLOW_ATTENTION"  # "sdpa" or "triton", for benchmarks and tests: overrules the table
# Compute capability -> channels of a head -> numbers of a layer's tokens at which benchmarks/attention.py found the
# kernel to be faster. Empty: it was not measured yet.
KERNEL_FASTER: dict[tuple[int, int], dict[int, range]] = {}


def frame_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Self-attention inside each frame.

    Args:
        q, k, v: (frames, tokens, heads * channels).

    Returns:
        (frames, tokens, heads * channels).
    """
    q, k, v = (rearrange(x, "f s (h c) -> f h s c", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "f h s c -> f s (h c)")


def extended_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, kept: Tensor | None = None) -> Tensor:
    """Each query frame over the tokens of all frames, or over those kept for it.

    Args:
        q: (query_frames, tokens, heads * channels).
        k, v: (frames, tokens, heads * channels).
        kept: (query_frames, kept_tokens) flat indices ``frame * tokens + token`` into ``k`` and ``v``, or None for all.

    Returns:
        (query_frames, tokens, heads * channels).
    """
    if kept is None:
        k, v = (x.flatten(0, 1)[None] for x in (k, v))
        return frame_attention(q.flatten(0, 1)[None], k, v, heads).view_as(q)
    if _kernel_wanted(q, heads) and _kernel_works(q.device):
        from .attention_triton import slim_attention

        return slim_attention(q, k, v, heads, kept)
    return gathered_attention(q, k, v, heads, kept)


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, kept: Tensor) -> Tensor:
    """The same, for ``kept`` that is given, with the kept rows of one query frame after the other copied together."""
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    out = q.new_empty(q.shape)
    for frame in range(q.shape[0]):
        rows = kept[frame].long()
        out[frame] = frame_attention(q[frame][None], flat_k[rows][None], flat_v[rows][None], heads)[0]
    return out


def _kernel_wanted(q: Tensor, heads: int) -> bool:
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    asked = os.environ.get(BACKEND_VARIABLE)
    if asked in ("sdpa", "triton"):
        return asked == "triton"
    by_channels = KERNEL_FASTER.get(torch.cuda.get_device_capability(q.device), {})
    return q.shape[1] in by_channels.get(q.shape[2] // heads, range(0))


@functools.cache
def _kernel_works(device: torch.device) -> bool:
    """Whether the kernel compiles and runs there; if not, a message says why, once."""
    try:
        from .attention_triton import slim_attention

        tokens = torch.zeros(1, 16, 64, dtype=torch.float16, device=device)
        slim_attention(tokens, tokens, tokens, 1, torch.zeros(1, 16, dtype=torch.int32, device=device))
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know
        logger.warning("AdaFlow: the attention kernel does not run here, PyTorch's own is used: %s", error)
        return False
    return True
