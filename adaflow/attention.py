"""Extended attention: a frame's queries over the keys and values of many frames (arXiv 2307.10373, section 4.1).

Of that the plain backend is PyTorch's scaled dot-product attention with the kept rows gathered first. A Triton kernel
that reads them by index takes its place where ``KERNEL_FASTER`` says that it was measured to be faster, and cuDNN's
attention that of PyTorch's own choice where ``CUDNN_FASTER`` says so. Attention to a prompt, whose keys are few, has a
Triton kernel wherever that runs.
"""

import functools
import os

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernels import HALF, kernels_run

BACKEND_VARIABLE = "ADAFLOW_ATTENTION"  # "sdpa", "cudnn" or "triton", for benchmarks and tests: overrules the tables
PROMPT_KEYS, PROMPT_CHANNELS = 256, 256  # at most, of a prompt and of a head, that the kernel for prompts takes
GATHER_BYTES = 128 << 20  # of kept keys and values that are copied together: of as many query frames as fit
# Compute capability -> channels of a head -> numbers of a layer's tokens at which benchmarks/attention.py found the
# kernel to be faster, at 20 keyframes' worth of keys and values.
KERNEL_FASTER: dict[tuple[int, int], dict[int, range]] = {(9, 0): {64: range(1, 1009)}}
# The same where PyTorch's attention, after a gather, is faster with cuDNN than with what it chooses by itself.
CUDNN_FASTER: dict[tuple[int, int], dict[int, range]] = {}
CUDNN_FIRST = [
    getattr(SDPBackend, name)
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    if hasattr(SDPBackend, name)  # PyTorch before 2.5 knows no cuDNN
]


def frame_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Self-attention inside each frame.

    Args:
        q, k, v: (frames, tokens, heads * channels).

    Returns:
        (frames, tokens, heads * channels).
    """
    q, k, v = (rearrange(x, "f s (h c) -> f h s c", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "f h s c -> f s (h c)")


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of each image to its prompt.

    Args:
        q: (images, tokens, heads * channels).
        k, v: (prompts, keys, heads * channels), each of images / prompts consecutive images.

    Returns:
        (images, tokens, heads * channels).

    Raises:
        ValueError: images are no multiple of the prompts.
    """
    share, left = divmod(len(q), len(k))
    if left:
        raise ValueError(f"{len(q)} images cannot share {len(k)} prompts evenly")
    keys, channels = k.shape[1], q.shape[2] // heads
    known = q.device.type == "cuda" and q.dtype in HALF and keys <= PROMPT_KEYS and channels <= PROMPT_CHANNELS
    known = known and k.dtype == v.dtype == q.dtype and os.environ.get(BACKEND_VARIABLE) != "sdpa"
    if known and _prompt_kernel_works(q.device, q.dtype, keys, channels):
        from . import attention_triton

        return attention_triton.prompt_attention(q, k, v, heads)
    if share > 1:
        k, v = (x.repeat_interleave(share, 0) for x in (k, v))
    return frame_attention(q, k, v, heads)


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
    backend = _backend(q, heads)
    if backend == "triton" and _kernel_works(q.device):
        from .attention_triton import slim_attention

        return slim_attention(q, k, v, heads, kept)
    if backend == "cudnn" and _cudnn_works(q.device):
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):  # where cuDNN refuses a shape, the next one takes it
            return gathered_attention(q, k, v, heads, kept)
    return gathered_attention(q, k, v, heads, kept)


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, kept: Tensor, gather_bytes: int = GATHER_BYTES
) -> Tensor:
    """The same, for ``kept`` that is given, with the kept rows copied together.

    Args:
        gather_bytes: of the copies of keys and values of the query frames that are attended together; one at least.
    """
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    together = max(1, gather_bytes // (2 * kept.shape[1] * k.shape[2] * k.element_size()))
    out = q.new_empty(q.shape)
    for start in range(0, q.shape[0], together):
        frames = slice(start, start + together)
        rows = kept[frames].flatten()
        keys, values = (x.index_select(0, rows).view(*kept[frames].shape, -1) for x in (flat_k, flat_v))
        out[frames] = frame_attention(q[frames], keys, values, heads)
    return out


def _backend(q: Tensor, heads: int) -> str:
    """The fastest one known for these queries: "sdpa", "cudnn" or "triton"."""
    if q.device.type != "cuda" or q.dtype not in HALF:
        return "sdpa"
    asked = os.environ.get(BACKEND_VARIABLE)
    if asked in ("sdpa", "cudnn", "triton"):
        return asked
    capability = torch.cuda.get_device_capability(q.device)
    for name, table in (("triton", KERNEL_FASTER), ("cudnn", CUDNN_FASTER)):
        if q.shape[1] in table.get(capability, {}).get(q.shape[2] // heads, range(0)):
            return name
    return "sdpa"


@functools.cache
def _cudnn_works(device: torch.device) -> bool:
    """Whether PyTorch can be told to try cuDNN first, and it runs there; if not, a message says why, once."""

    def probe() -> None:  # no cuDNN for it; a PyTorch before 2.6 knows no priority
        tokens = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=device)
        with sdpa_kernel(CUDNN_FIRST[:1], set_priority=True):
            F.scaled_dot_product_attention(tokens, tokens, tokens)

    return kernels_run(probe, "cuDNN's attention does not run here, PyTorch chooses")


@functools.cache
def _kernel_works(device: torch.device) -> bool:
    """Whether the kernel compiles and runs there; if not, a message says why, once."""

    def probe() -> None:
        from .attention_triton import slim_attention

        tokens = torch.zeros(1, 16, 64, dtype=torch.float16, device=device)
        slim_attention(tokens, tokens, tokens, 1, torch.zeros(1, 16, dtype=torch.int32, device=device))

    return kernels_run(probe, "the attention kernel does not run here, PyTorch's own is used")


@functools.cache
def _prompt_kernel_works(device: torch.device, dtype: torch.dtype, keys: int, channels: int) -> bool:
    """Whether the kernel for prompts compiles and runs there at such a size; if not, a message says why, once."""

    def probe() -> None:
        from . import attention_triton

        q, k = (torch.zeros(1, rows, channels, dtype=dtype, device=device) for rows in (16, keys))
        attention_triton.prompt_attention(q, k, k, 1)

    what = f"the attention kernel for prompts of {keys} tokens does not run here with heads of {channels} channels"
    return kernels_run(probe, f"{what}, PyTorch's own is used")
