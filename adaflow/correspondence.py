"""Which token of one frame resembles a token of another most: tiled cosine matching (arXiv 2502.05433, section 3)."""

import functools

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24  # of one similarity tile: 64 MiB in float32


def matching_dtype(device: torch.device | str) -> torch.dtype:
    """What descriptors are compared in: float16 on GPUs where its products are summed and kept in float32.

    float16 has the precision of stored descriptors; a cosine is then off by some 1e-4, and of tokens that resemble one
    nearly alike another one may be found.
    """
    return torch.float16 if torch.device(device).type == "cuda" and _sums_half_in_single(str(device)) else torch.float32


@functools.cache
def _sums_half_in_single(device: str) -> bool:
    try:
        one = torch.ones(16, 16, dtype=torch.float16, device=device)
        torch.mm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # PyTorch before 2.8, or a GPU that cannot
        return False
    return True


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Products of all pairs of tokens, (tokens_a, tokens_b) float32.

    Args:
        a, b: L2-normalised descriptors of type :func:`matching_dtype` or float32, (tokens, channels).
    """
    if a.dtype == torch.float16:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return a @ b.T


def nearest_indices(query: Tensor, key: Tensor, out: Tensor, tile_elements: int = TILE_ELEMENTS) -> None:
    """For each query token the most similar key token, as :func:`nearest_tokens` finds it, of two frames.

    Args:
        query, key: as for :func:`cosines`.
        out: (tokens_q,) of any integer type, gets the indices.
    """
    tile = max(1, tile_elements // len(key))
    for start in range(0, len(query), tile):
        out[start : start + tile] = cosines(query[start : start + tile], key).argmax(dim=1)


def nearest_tokens(query: Tensor, key: Tensor, tile_elements: int = TILE_ELEMENTS) -> tuple[Tensor, Tensor]:
    """For each query token the most similar key token.

    The similarity matrix is made in tiles of at most ``tile_elements``, never whole.

    Args:
        query: L2-normalised descriptors as for :func:`cosines`, (frames, tokens_q, channels).
        key: those to be found, (frames, tokens_k, channels), or one frame for all: (1, tokens_k, channels).

    Returns:
        similarity (frames, tokens_q), cosine of the best match, float32; index (frames, tokens_q) of it, int64.
    """
    frames, tokens_q, _ = query.shape
    tokens_k = key.shape[1]
    similarity = torch.empty(frames, tokens_q, device=query.device)
    index = torch.empty(frames, tokens_q, dtype=torch.int64, device=query.device)
    rows = max(1, min(tokens_q, tile_elements // tokens_k))
    for frame in range(frames):
        one = key[frame if key.shape[0] > 1 else 0]
        for start in range(0, tokens_q, rows):
            best = cosines(query[frame, start : start + rows], one).max(dim=1)
            similarity[frame, start : start + rows] = best.values
            index[frame, start : start + rows] = best.indices
    return similarity, index


def best_cosines(a: Tensor, b: Tensor, tile_elements: int = TILE_ELEMENTS) -> tuple[Tensor, Tensor]:
    """Best cosine of every token to each frame of the other side: both directions of all pairs from one product.

    Args:
        a, b: L2-normalised descriptors as for :func:`cosines`, (frames, tokens, channels), with as many tokens.

    Returns:
        of a's tokens to each frame of b, (frames_b, frames_a, tokens); of b's to each of a, (frames_a, frames_b,
        tokens); float32.
    """
    (frames_a, tokens, _), frames_b = a.shape, b.shape[0]
    of_a = torch.empty(frames_b, frames_a, tokens, device=a.device)
    of_b = torch.empty(frames_a, frames_b, tokens, device=a.device)
    keys = b.flatten(0, 1)
    together = max(1, tile_elements // (tokens * len(keys)))
    rows = min(tokens, max(1, tile_elements // len(keys)))
    for first in range(0, frames_a, together):
        frames = slice(first, min(first + together, frames_a))
        for start in range(0, tokens, rows):
            query = a[frames, start : start + rows]
            found = cosines(query.flatten(0, 1), keys).view(*query.shape[:2], frames_b, tokens)
            of_a[:, frames, start : start + rows] = found.amax(dim=3).permute(2, 0, 1)
            best = found.amax(dim=1)
            of_b[frames] = best if start == 0 else torch.maximum(of_b[frames], best)
    return of_a, of_b


def index_dtype(tokens: int) -> torch.dtype:
    """The smallest integer type that numbers ``tokens`` tokens."""
    return torch.int16 if tokens <= torch.iinfo(torch.int16).max + 1 else torch.int32
