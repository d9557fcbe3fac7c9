"""What a running node shows: pictures of latents without a VAE, by ComfyUI's own linear factors, progress, text."""

import logging

import latent_preview
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

logger = logging.getLogger(__name__)


class NodeText:
    """Lines that stand on the node that runs, each of which goes into the log too.

    Args:
        where: the node, for the log.
    """

    def __init__(self, where: str):
        self._where = where
        self._lines: dict[str, str] = {}

    def put(self, topic: str, line: str) -> None:
        """Add a line, or put it in place of the one about the same topic."""
        logger.info("%s: %s", self._where, line)
        self._lines[topic] = line
        context = get_executing_context()
        if context is not None:  # a server runs the node
            from server import PromptServer

            PromptServer.instance.send_progress_text("\n".join(self._lines.values()), context.node_id)


def sampling_callback(model_patcher, steps: int):
    """ComfyUI's progress bar and preview for a sampler of ``steps`` steps."""
    return latent_preview.prepare_callback(model_patcher, steps)


def latent_rgb(model_patcher, latent: Tensor) -> Tensor:
    """Approximate colours of a latent, one pixel each.

    Args:
        latent: clean, as a LATENT holds it, (frames, channels, ...).

    Returns:
        (frames, ..., 3) in 0 .. 1.
    """
    latent_format = model_patcher.model.latent_format
    values = latent_format.process_in(latent).float()
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    if reshape is not None:  # takes images: a column is one that is a pixel wide
        values = reshape(values) if values.ndim == 4 else reshape(values[..., None])[..., 0]
    pixels, factors = values.movedim(1, -1), latent_format.latent_rgb_factors
    if factors is None:
        return pixels.mean(-1, keepdim=True).expand(*pixels.shape[:-1], 3).sigmoid()
    bias = latent_format.latent_rgb_factors_bias
    rgb = pixels @ torch.tensor(factors, dtype=torch.float32)
    rgb = rgb if bias is None else rgb + torch.tensor(bias, dtype=torch.float32)
    return ((rgb + 1) / 2).clamp(0, 1)
