"""Attention outputs of every frame from those of its keyframes (arXiv 2502.05433, 3.4; arXiv 2307.10373, 4.2)."""

import torch
from torch import Tensor


def gather_outputs(outputs: Tensor, slots: Tensor, matches: Tensor) -> Tensor:
    """``out_f[u] = out_p[nn(u)]``.

    Args:
        outputs: attention outputs of the keyframes, (keyframes, tokens, channels).
        slots: row of ``outputs`` that each frame's keyframe has, (frames,).
        matches: each token's match in that keyframe, (frames, tokens), any integer type.

    Returns:
        (frames, tokens, channels).
    """
    rows = slots.to(torch.int64)[:, None] * outputs.shape[1] + matches
    return outputs.flatten(0, 1).index_select(0, rows.flatten()).view(*matches.shape, outputs.shape[2])


def blend_weight(frame: int, keyframe: int, neighbour: int) -> float:
    """Weight of ``keyframe``'s output when blended with ``neighbour``'s: ``sigmoid(d_q / (d_p + d_q))``."""
    d_p, d_q = abs(frame - keyframe), abs(frame - neighbour)
    return float(torch.sigmoid(torch.tensor(d_q / (d_p + d_q), dtype=torch.float64)))
