"""Fits the colours in which previews show the demo model's latents: a convolution of 3x3 latent values to RGB.

    COMFYUI_PATH=/path/to/ComfyUI python training/preview_colours.py

Writes ``demo_model/preview.json``: by least squares over pictures of the demo world that no stage of the training has
met, from latents as a UNet takes them to the mean colours, from -1 to 1, of the 8x8 pixels that each stands for.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from common import ROOT, pack_module, start_comfyui
from data import HELD_OUT, LANDSCAPE, world_pictures

SEEDS = range(HELD_OUT + 300_000, HELD_OUT + 300_480)


def main() -> None:
    start_comfyui()
    demo_model = pack_module("nodes.patching.demo_model")
    model, _, vae = demo_model.load_demo_model()
    images = world_pictures(SEEDS, LANDSCAPE, "cpu").images.float() / 255
    latents = torch.cat([vae.encode(part) for part in images.movedim(1, -1).split(16)])
    latents = F.pad(model.model.latent_format.process_in(latents), (1, 1, 1, 1), mode="replicate")
    around = F.unfold(latents, 3).movedim(1, 2).flatten(0, 1).double()  # (places, 4 * 3 * 3)
    colours = (2 * F.avg_pool2d(images, 8) - 1).movedim(1, -1).flatten(0, 2).double()
    known = torch.cat([around, torch.ones_like(around[:, :1])], 1)
    fitted = torch.linalg.lstsq(known, colours).solution
    error = (known @ fitted - colours).square().mean().sqrt() / 2
    print(f"root mean square of the error {error:.3f}, of colours from 0 to 1, whose own is {colours.std() / 2:.3f}")
    weight, bias = fitted[:-1].T.reshape(3, 4, 3, 3), fitted[-1]
    rounded = {"weight": (weight * 1e4).round() / 1e4, "bias": (bias * 1e4).round() / 1e4}
    (ROOT / "demo_model" / "preview.json").write_text(
        json.dumps({name: values.tolist() for name, values in rounded.items()}) + "\n"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
