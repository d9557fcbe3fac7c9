"""The method in a few lines of float64 each, written from the papers and independent of the code under test."""

import math
from itertools import pairwise

import torch


def attention(q, k, v, heads):
    """(S, C) queries over (M, C) keys and values."""
    out = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        out.append(torch.softmax(qh @ kh.T / math.sqrt(qh.shape[-1]), -1) @ vh)
    return torch.cat(out, -1)


def importance(descriptors, i):
    """g_i(u): every token of every keyframe against all tokens of keyframe i. descriptors: (K, S, C), normalised."""
    return torch.stack([(frame @ descriptors[i].T).max(1).values for frame in descriptors])


def slim_attention(q, k, v, heads, descriptors, budget):
    """Extended attention of (K, S, C) under a budget of keyframes' worth of tokens."""
    frames, tokens, _ = q.shape
    out = []
    for i in range(frames):
        g = importance(descriptors, i)
        g[i] = 2.0
        order = g.flatten().argsort(descending=True, stable=True)[: min(budget, frames) * tokens]
        out.append(attention(q[i], k.flatten(0, 1)[order], v.flatten(0, 1)[order], heads))
    return torch.stack(out)


def nearest(query, key):
    """Most similar token of ``key`` (S, C) for each token of ``query``."""
    return (query @ key.T).argmax(1)


def clip_starts(descriptors, size, mean=0.75, window=0.6, max_clip=400):
    """Cuts of (N, S, C) descriptors by the definition, one frame, one window at a time."""
    height, width = size
    side = min(max(1, max(size) // 16), height, width)
    stride = max(1, side // 2)
    starts, r = [0], 0
    for j in range(1, len(descriptors)):
        m = (descriptors[r] @ descriptors[j].T).max(1).values.view(height, width)
        low = min(
            float(m[y : y + side, x : x + side].mean())
            for y in range(0, height - side + 1, stride)
            for x in range(0, width - side + 1, stride)
        )
        if float(m.mean()) < mean or low < window or j - r == max_clip:
            starts.append(j)
            r = j
    return starts


def alpha_bar(t):
    """alpha_bar of step t, counted from 0, of Stable Diffusion's 1000-step scaled linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return float((1 - betas).cumprod(0)[t])


def invert(x0, eps, steps, refine=0):
    """The whole DDIM inversion: x0, eps(x, t) -> list of latents on the grid; each step's noise is that of its start,
    then ``refine`` times that of its own result."""
    grid = [0, *range(1, 1000, 1000 // steps)]
    xs = [x0]
    for previous, t in pairwise(grid):
        a, b = alpha_bar(previous), alpha_bar(t)
        x = xs[-1]
        for _ in range(refine + 1):
            noise = eps(x, t)
            x = math.sqrt(b) * (xs[-1] - math.sqrt(1 - a) * noise) / math.sqrt(a) + math.sqrt(1 - b) * noise
        xs.append(x)
    return xs


def relative_error(value, reference):
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def group_norm(x, groups, weight, bias, eps, silu, shift=None):
    """Of (N, S, C), or of that plus ``shift`` (N, C); one group of one image at a time."""
    x = x.double() if shift is None else x.double() + shift.double()[:, None]
    out = torch.empty_like(x)
    for image in range(x.shape[0]):
        for part, into in zip(x[image].chunk(groups, -1), out[image].chunk(groups, -1), strict=True):
            into[:] = (part - part.mean()) / ((part - part.mean()).square().mean() + eps).sqrt()
    out = out * weight.double() + bias.double()
    return out / (1 + torch.exp(-out)) if silu else out


def layer_norm(x, weight, bias, eps):
    """Over the last dimension."""
    x = x.double() - x.double().mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def geglu(x):
    """Half of the channels times the exact GELU of the other half."""
    value, gate = x.double().chunk(2, -1)
    return value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
