"""One picture and one edit by the demo model, as numbers that a change of weights or of the method would move."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH, FRAMES, STEPS = 64, 128, 16, 8
GRID = (8, 16)
KEPT_FRAMES = [0, 5, 10, 15]


def weights_hash() -> str:
    """SHA-256 of the shipped weights."""
    return hashlib.sha256((ROOT / "demo_model" / "weights.safetensors").read_bytes()).hexdigest()


def grid_means(images: Tensor) -> Tensor:
    """Mean colours over a coarse grid, (frames, 3, 8, 16), of images (frames, height, width, 3)."""
    return torch.nn.functional.adaptive_avg_pool2d(images.movedim(-1, 1), GRID)


def prompt(clip, text: str):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def picture(model, clip, vae) -> Tensor:
    """Grid means of a picture drawn from noise."""
    import comfy.sample
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", STEPS)
    noise = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    euler, empty = comfy.samplers.sampler_object("euler"), torch.zeros_like(noise)
    wanted = prompt(clip, "a photo of a red house on a meadow in winter by day")
    latent = comfy.sample.sample_custom(
        model, noise, 4.0, euler, sigmas, wanted, prompt(clip, ""), empty, disable_pbar=True, seed=0
    )
    return grid_means(vae.decode(latent))[0]


class DemoEdit:
    """Sixteen frames of the demo world, inverted, and what becomes of them when a red boat is to be blue."""

    def __init__(self, model, clip, vae):
        from adaflow_pack.adaflow.demo import Clip
        from graph import Graph, select

        source = Clip.random(11, FRAMES, 2, kind="boat", colour="red", season="summer", time="day", style="photo")
        images = source.render(0, FRAMES, HEIGHT, WIDTH).images.movedim(1, -1)
        self.vae = vae
        self.graph = Graph(latent=vae.encode(images), steps=STEPS, model=model, source=prompt(clip, source.caption()))
        self.graph.positive = prompt(clip, source.edited(colour="blue").caption())
        self.graph.negative = prompt(clip, "")
        self.plan = select(self.graph.descriptors, mean=-1.0, window=-1.0, max_clip=4, mode="fixed")

    def run(self, **changes) -> Tensor:
        """Grid means of four of the frames, (4, 3, 8, 16)."""
        return grid_means(self.vae.decode(self.graph.edit(self.plan, cfg=4.0, **changes)[KEPT_FRAMES]))
