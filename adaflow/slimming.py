"""Adaptive Attention Slimming: which keys and values a keyframe attends to under a budget (arXiv 2502.05433, 3.3)."""

import torch
from torch import Tensor

from .correspondence import nearest_tokens


def token_importance(tokens: Tensor, query: int) -> Tensor:
    """``g_i(u)``: the best cosine of every keyframe's token to any token of keyframe ``query``.

    Args:
        tokens: L2-normalised descriptors of all keyframes, (keyframes, tokens, channels).
        query: number of the query keyframe i.

    Returns:
        (keyframes, tokens) float32.
    """
    importance, _ = nearest_tokens(tokens, tokens[query : query + 1])
    return importance


def select_tokens(importance: Tensor, query: int, budget: int) -> Tensor:
    """The ``budget * tokens`` most important tokens, keyframe ``query``'s own among them whatever rounding says.

    Args:
        importance: (keyframes, tokens).

    Returns:
        (budget * tokens,) ascending flat indices ``keyframe * tokens + token``, int64.
    """
    importance = importance.clone()
    importance[query] = torch.inf
    kept = importance.flatten().topk(budget * importance.shape[1], sorted=False).indices
    return kept.sort().values


def select_kv(tokens: Tensor, budget: int) -> Tensor | None:
    """The kept keys and values of every query keyframe.

    Args:
        tokens: L2-normalised descriptors of all keyframes, (keyframes, tokens, channels).
        budget: keyframes' worth of keys and values, at least 1.

    Returns:
        (keyframes, budget * tokens) int32 flat indices, or None when the budget covers all keyframes.
    """
    keyframes = tokens.shape[0]
    if keyframes <= budget:
        return None
    kept = [select_tokens(token_importance(tokens, query), query, budget) for query in range(keyframes)]
    return torch.stack(kept).to(torch.int32)
