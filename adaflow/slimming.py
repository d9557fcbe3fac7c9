"""Adaptive Attention Slimming: which keys and values a keyframe attends to under a budget (arXiv 2502.05433, 3.3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from .correspondence import nearest_tokens


def token_importance(tokens: Tensor, query: Tensor) -> Tensor:
    """``g_i(u)``: the best cosine of each keyframe's token to any token of the query keyframe i.

    Args:
        tokens: L2-normalised descriptors of keyframes, as ``cosines`` takes them, (keyframes, tokens, channels).
        query: those of keyframe i, (tokens, channels).

    Returns:
        (keyframes, tokens) float32.
    """
    importance, _ = nearest_tokens(tokens, query[None])
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
    return select_kv_by_blocks(lambda rows: [tokens[rows]], keyframes, budget, keyframes)[0]


def select_kv_by_blocks(
    tokens: Callable[[list[int]], list[Tensor]], keyframes: int, budget: int, block: int
) -> list[Tensor]:
    """The same at several resolutions, with the descriptors of two blocks of keyframes in memory at a time.

    Args:
        tokens: rows -> their L2-normalised descriptors at each resolution, (rows, tokens, channels).
        keyframes: how many there are, more than ``budget``.
        block: keyframes read at a time.

    Returns:
        For each resolution (keyframes, budget * tokens) int32 flat indices, on the descriptors' device.
    """
    blocks = [list(range(start, min(start + block, keyframes))) for start in range(0, keyframes, block)]
    kept: list[list[Tensor]] = []
    for queries in blocks:
        query_tokens = tokens(queries)
        importance = [torch.empty(len(queries), keyframes, part.shape[1], device=part.device) for part in query_tokens]
        for keys in blocks:
            key_tokens = query_tokens if keys is queries else tokens(keys)
            for found, query_part, key_part in zip(importance, query_tokens, key_tokens, strict=True):
                for row, query in enumerate(query_part):
                    found[row, keys] = token_importance(key_part, query)
        kept.append([_select_rows(part, queries, budget) for part in importance])
    return [torch.cat(parts) for parts in zip(*kept, strict=True)]


def _select_rows(importance: Tensor, queries: list[int], budget: int) -> Tensor:
    selected = [select_tokens(part, query, budget) for part, query in zip(importance, queries, strict=True)]
    return torch.stack(selected).to(torch.int32)
