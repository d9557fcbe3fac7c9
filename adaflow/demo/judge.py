"""A small network that names what a picture of the demo world shows: kind, colour, season, hour and style."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .scene import ATTRIBUTES


class Judge(nn.Module):
    """Five convolutions that halve the picture, then one answer per attribute. 0.7 M parameters."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers, before = [], 3
        for channels in (width, 2 * width, 4 * width, 6 * width, 6 * width):
            layers += [nn.Conv2d(before, channels, 3, 2, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            before = channels
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(2 * before, len(names)) for names in ATTRIBUTES.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits (n, names) per attribute for images (n, 3, height, width) from -1 to 1, about 128 pixels high."""
        maps = self.body(images)
        seen = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        return [head(seen) for head in self.heads]

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Tensor]:
        """Numbers (n,) of the likeliest name per attribute for images (n, 3, height, width) from 0 to 1."""
        return [logits.argmax(1) for logits in self(images * 2 - 1)]


def load_judge(path: Path, device: str = "cpu") -> Judge:
    """The trained network of ``path``, float32."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.to(device).eval()
