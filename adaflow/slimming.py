"""Adaptive Attention Slimming: which keys and values a keyframe attends to under a budget (arXiv 2502.05433, 3.3)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .correspondence import best_cosines
from .kernels import kernels_run

PRODUCT_TOKENS = 4096  # of each side of a product, if keyframes are compared in groups


def token_importance(tokens: Tensor, query: Tensor) -> Tensor:
    """``g_i(u)``: the best cosine of each keyframe's token to any token of the query keyframe i.

    Args:
        tokens: L2-normalised descriptors of keyframes, as ``cosines`` takes them, (keyframes, tokens, channels).
        query: those of keyframe i, (tokens, channels).

    Returns:
        (keyframes, tokens) float32.
    """
    return best_cosines(query[None], tokens)[1][0]


def select_tokens(importance: Tensor, query: int, budget: int) -> Tensor:
    """The ``budget * tokens`` most important tokens, keyframe ``query``'s own among them whatever rounding says.

    Args:
        importance: (keyframes, tokens).

    Returns:
        (budget * tokens,) ascending flat indices ``keyframe * tokens + token``, int32.
    """
    importance = importance.clone()
    importance[query] = torch.inf
    kept = importance.flatten().topk(budget * importance.shape[1], sorted=False).indices
    return kept.int().sort().values


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
    group = max(1, PRODUCT_TOKENS // tokens.shape[1])
    return select_kv_by_blocks(lambda rows: tokens[rows.start : rows.stop], keyframes, budget, keyframes, group)


def select_kv_by_blocks(
    tokens: Callable[[range], Tensor], keyframes: int, budget: int, block: int, group: int = 1, spare_bytes: int = 0
) -> Tensor:
    """The same with the descriptors of two blocks of keyframes in memory at a time.

    A product of two groups of keyframes rates the tokens of both, so that each pair is multiplied once, as long as
    what the later keyframes need of it fits in ``spare_bytes``; beyond, the same product is made again. Nothing waits
    for the device. What is found depends on ``group``, by rounding, and on neither ``block`` nor ``spare_bytes``.

    Args:
        tokens: rows -> their L2-normalised descriptors, (rows, tokens, channels).
        keyframes: how many there are, more than ``budget``.
        block: keyframes asked for at a time; whole groups are taken.
        group: keyframes on each side of a product.
        spare_bytes: of importances that are kept for later blocks.

    Returns:
        (keyframes, budget * tokens) int32 flat indices, on the descriptors' device.
    """
    block = max(1, block // group) * group
    blocks = [range(start, min(start + block, keyframes)) for start in range(0, keyframes, block)]
    later: dict[tuple[int, int], Tensor] = {}  # (query block, an earlier block) -> importance of the earlier's tokens
    kept = None
    for place, queries in enumerate(blocks):
        query_tokens = tokens(queries)
        count = query_tokens.shape[1]
        importance = torch.empty(len(queries), keyframes, count, device=query_tokens.device)
        for other, keys in enumerate(blocks):
            part = importance[:, keys.start : keys.stop]
            if (place, other) in later:
                known = later.pop((place, other))
                spare_bytes += known.nbytes
                part.copy_(known)
            elif other == place:
                _rate(query_tokens, query_tokens, group, part, part)
            elif other < place:
                _rate(tokens(keys), query_tokens, group, None, part)
            else:
                back = None
                if 4 * len(keys) * len(queries) * count <= spare_bytes:
                    back = later[other, place] = torch.empty(len(keys), len(queries), count, device=part.device)
                    spare_bytes -= back.nbytes
                _rate(query_tokens, tokens(keys), group, part, back)
        if kept is None:
            kept = torch.empty(keyframes, budget * count, dtype=torch.int32, device=importance.device)
        for row, query in enumerate(queries):
            kept[query] = select_tokens(importance[row], query, budget)
    return kept


def _rate(first: Tensor, second: Tensor, group: int, of_second: Tensor | None, of_first: Tensor | None) -> None:
    """Rate the tokens of two blocks of keyframes, or of one among themselves, group by group.

    Where the kernel for it runs, all at once.

    Args:
        first, second: descriptors of the earlier and of the later block, or twice the same tensor.
        of_second: gets the importance of second's tokens to each of first, (first, second, tokens).
        of_first: that of first's tokens to each of second, (second, first, tokens).
    """
    same = first is second
    if first.dtype == torch.float16 and _kernel_works(first.device):
        from .slimming_triton import rate

        rate(first, second, of_second, of_first)
        return
    for a in range(0, len(first), group):
        rows = slice(a, a + group)
        for b in range(a if same else 0, len(second), group):
            if same and a == b and group == 1:  # a keyframe's own tokens are kept without being rated
                continue
            columns = slice(b, b + group)
            for_first, for_second = best_cosines(first[rows], second[columns])
            if of_second is not None:
                of_second[rows, columns] = for_second
            if of_first is not None and not (same and a == b):
                of_first[columns, rows] = for_first


@functools.cache
def _kernel_works(device: torch.device) -> bool:
    """Whether the kernel that rates tokens compiles and runs there; if not, a message says why, once."""

    def probe() -> None:
        from .slimming_triton import rate

        tokens = torch.zeros(2, 16, 64, dtype=torch.float16, device=device)
        rated = torch.empty(2, 2, 16, device=device)
        rate(tokens, tokens, rated, rated)

    if device.type != "cuda":
        return False
    return kernels_run(probe, "the kernel that rates tokens does not run here, products are made one by one")
