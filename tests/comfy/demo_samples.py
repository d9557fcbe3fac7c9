"""One picture and one edit by the demo model, as numbers that a change of weights or of the method would move."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH, FRAMES, STEPS = 64, 128, 16, 6
PAN = 0.1  # picture heights a frame
CLIP, BUDGET = 4, 2  # frames a clip, so that there are 4 keyframes; tokens of half of them are kept
TILE = 8  # pixels


def weights_hash() -> str:
    """SHA-256 of the shipped weights."""
    return hashlib.sha256((ROOT / "demo_model" / "weights.safetensors").read_bytes()).hexdigest()


def tile_means(images: Tensor) -> Tensor:
    """Mean colours of small tiles, (frames, 3, 8, 16), of images (frames, height, width, 3)."""
    return torch.nn.functional.avg_pool2d(images.movedim(-1, 1), TILE)


def prompt(clip, text: str):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def picture(model, clip, vae) -> Tensor:
    """Tile means of a picture drawn from noise."""
    import comfy.sample
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", STEPS)
    noise = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    euler, empty = comfy.samplers.sampler_object("euler"), torch.zeros_like(noise)
    wanted = prompt(clip, "a photo of a red house on a meadow in winter by day")
    latent = comfy.sample.sample_custom(
        model, noise, 4.0, euler, sigmas, wanted, prompt(clip, ""), empty, disable_pbar=True, seed=0
    )
    return tile_means(vae.decode(latent))[0]


class DemoEdit:
    """Sixteen frames of the demo world, inverted, and what becomes of them when a red boat is to be blue, and painted.

    The camera pans fast, so that tokens move from frame to frame, and each keyframe attends to half of all tokens.
    """

    def __init__(self, model, clip, vae):
        from adaflow_pack.adaflow.demo import Clip, Scene, Shot
        from graph import Graph

        scene = Scene(11, kind="boat", colour="red", season="summer", time="day", style="photo")
        pan = Shot(scene, FRAMES, camera=-PAN * (FRAMES - 1) / 2, speed=PAN * Clip.fps + scene.velocity, clock=0.0)
        source = Clip((pan,))
        images = source.render(0, FRAMES, HEIGHT, WIDTH).images.movedim(1, -1)
        self.vae = vae
        self.graph = Graph(latent=vae.encode(images), steps=STEPS, model=model, source=prompt(clip, source.caption()))
        self.graph.positive = prompt(clip, source.edited(colour="blue", style="watercolour").caption())
        self.graph.negative = prompt(clip, "")

    def plan(self):
        """A plan that has matched and selected nothing yet."""
        from graph import select

        return select(self.graph.descriptors, mean=-1.0, window=-1.0, max_clip=CLIP)

    def run(self, budget: int = BUDGET, **changes) -> Tensor:
        """Tile means of all frames, (16, 3, 8, 16)."""
        edited = self.graph.edit(self.plan(), model=self.graph.slim(budget), cfg=4.0, **changes)
        return tile_means(self.vae.decode(edited))
