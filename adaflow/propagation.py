"""Attention outputs of every frame from those of its keyframes (arXiv 2502.05433, 3.4; arXiv 2307.10373, 4.2)."""

import torch
from torch import Tensor


def output_rows(slots: Tensor, matches: Tensor) -> Tensor:
    """Where each token's attention output stands among those of the keyframes.

    Args:
        slots: which of the keyframes each frame takes from, (frames,), any integer type.
        matches: each token's match in that keyframe, (frames, tokens), any integer type.

    Returns:
        ``keyframe * tokens + token``, (frames, tokens) int64.
    """
    return slots.to(torch.int64)[:, None] * matches.shape[1] + matches


def gather_outputs(outputs: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """``out_f[u] = out_p[nn(u)]``.

    Args:
        outputs: attention outputs of the keyframes, (keyframes, tokens, channels).
        rows: from :func:`output_rows`, (frames, tokens) int64.
        out: to be filled, (frames, tokens, channels); a new tensor by default.

    Returns:
        (frames, tokens, channels).
    """
    if out is None:
        out = outputs.new_empty(*rows.shape, outputs.shape[2])
    torch.index_select(outputs.flatten(0, 1), 0, rows.flatten(), out=out.flatten(0, 1))
    return out


def blend_weight(frame: int, keyframe: int, neighbour: int) -> float:
    """Weight of ``keyframe``'s output when blended with ``neighbour``'s: ``sigmoid(d_q / (d_p + d_q))``."""
    d_p, d_q = abs(frame - keyframe), abs(frame - neighbour)
    return float(torch.sigmoid(torch.tensor(d_q / (d_p + d_q), dtype=torch.float64)))
