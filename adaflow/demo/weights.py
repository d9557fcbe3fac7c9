"""Weights on disk at a byte each: int8 rows with a scale of their own, unpacked to float32 on load."""

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".scale"


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What to write of a state dict.

    A tensor of two dimensions and more, (out, ...), becomes int8 and, under its name + ``.scale``, float32 (out,): the
    largest magnitude of each output channel over 127. Other floating-point tensors become float16; integers stay.
    """
    packed = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            packed[name] = tensor.cpu()
            continue
        value = tensor.detach().to("cpu", torch.float32)
        if value.ndim < 2:
            packed[name] = value.half()
            continue
        rows = value.flatten(1)
        scale = rows.abs().amax(1).clamp(min=1e-12) / 127
        packed[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(value.shape)
        packed[name + SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The float32 state dict of the names that begin with ``prefix``, which is taken off."""
    state = {}
    for name, tensor in packed.items():
        if not name.startswith(prefix) or name.endswith(SCALE):
            continue
        value = tensor.float()
        if name + SCALE in packed:
            value *= packed[name + SCALE].reshape(-1, *[1] * (value.ndim - 1))
        state[name[len(prefix) :]] = value
    return state
