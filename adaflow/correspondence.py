"""Which token of one frame resembles a token of another most: tiled cosine matching (arXiv 2502.05433, section 3)."""

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24  # of one similarity tile: 64 MiB in float32


def nearest_tokens(query: Tensor, key: Tensor, tile_elements: int = TILE_ELEMENTS) -> tuple[Tensor, Tensor]:
    """For each query token the most similar key token.

    The similarity matrix is made in tiles of at most ``tile_elements``, never whole.

    Args:
        query: L2-normalised descriptors, (frames, tokens_q, channels).
        key: L2-normalised descriptors, (frames, tokens_k, channels), or one frame for all: (1, tokens_k, channels).

    Returns:
        similarity (frames, tokens_q), cosine of the best match, float32; index (frames, tokens_q) of it, int64.
    """
    frames, tokens_q, _ = query.shape
    tokens_k = key.shape[1]
    similarity = torch.empty(frames, tokens_q, device=query.device)
    index = torch.empty(frames, tokens_q, dtype=torch.int64, device=query.device)
    rows = max(1, min(tokens_q, tile_elements // tokens_k))
    for frame in range(frames):
        transposed = key[frame if key.shape[0] > 1 else 0].transpose(0, 1)
        for start in range(0, tokens_q, rows):
            best = (query[frame, start : start + rows] @ transposed).max(dim=1)
            similarity[frame, start : start + rows] = best.values
            index[frame, start : start + rows] = best.indices
    return similarity, index


def index_dtype(tokens: int) -> torch.dtype:
    """The smallest integer type that numbers ``tokens`` tokens."""
    return torch.int16 if tokens <= torch.iinfo(torch.int16).max + 1 else torch.int32
