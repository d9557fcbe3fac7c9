"""Extended attention: a frame's queries over the keys and values of many frames (arXiv 2307.10373, section 4.1).

This module is the plain backend, PyTorch's scaled dot-product attention with the kept rows gathered first.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    if kept is None:
        return frame_attention(q.flatten(0, 1)[None], flat_k[None], flat_v[None], heads).view_as(q)
    out = q.new_empty(q.shape)
    for frame in range(q.shape[0]):
        rows = kept[frame].long()
        out[frame] = frame_attention(q[frame][None], flat_k[rows][None], flat_v[rows][None], heads)[0]
    return out
