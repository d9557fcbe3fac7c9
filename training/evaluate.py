"""What the shipped weights can do, measured through ComfyUI's own loaders and samplers; needs no GPU.

    COMFYUI_PATH=/path/to/ComfyUI python training/evaluate.py [--clips FILE ...] --out FILE

Prints and writes: captions drawn from noise and read by the classifier; the autoencoder on frames of the world that
it was never trained on, and on the clips; each clip inverted as AdaFlow DDIM Invert does, sampled back and compared
with the autoencoder's output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, pack_module, start_comfyui
from data import HELD_OUT, LANDSCAPE, world_pictures
from inverting import invert
from torch import Tensor

FIRST = HELD_OUT + 200_000  # seeds that no stage of the training has met


def psnr(images: Tensor, others: Tensor) -> list[float]:
    """dB of each picture of (n, height, width, 3) from 0 to 1."""
    return (-10 * (images - others).square().flatten(1).mean(1).clamp(min=1e-10).log10()).tolist()


def through(vae, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of (n, height, width, 3) and what the autoencoder makes of them."""
    latents = torch.cat([vae.encode(part) for part in images.split(16)])
    return latents, torch.cat([vae.decode(part) for part in latents.split(16)])


def sampled(model, conditioning, latents: Tensor, sigmas, guidance: float = 1.0, negative=None, noise=None) -> Tensor:
    """ComfyUI's Euler along ``sigmas``."""
    import comfy.sample
    import comfy.samplers

    noise = torch.zeros_like(latents) if noise is None else noise
    sampler = comfy.samplers.sampler_object("euler")
    negative = conditioning if negative is None else negative
    return comfy.sample.sample_custom(
        model, noise, guidance, sampler, sigmas, conditioning, negative, latents, disable_pbar=True, seed=0
    )


def draw_captions(model, clip, vae, judge, count: int, steps: int, guidance: float) -> dict[str, float]:
    """Share of right attributes among pictures drawn from noise, of those their captions name."""
    import comfy.samplers

    scenes = world_pictures(range(FIRST, FIRST + count), LANDSCAPE, "cpu")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", steps)
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    read = []
    for i, caption in enumerate(scenes.captions):
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
        noise = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(i))
        latent = sampled(model, prompt, torch.zeros_like(noise), sigmas, guidance, empty, noise)
        read.append(torch.stack(judge.read(vae.decode(latent).movedim(-1, 1)), 1))
    right, asked = torch.cat(read) == scenes.truth, scenes.truth >= 0
    names = pack_module("adaflow.demo").ATTRIBUTES
    shares = {
        name: (right & asked)[:, i].sum().item() / max(1, asked[:, i].sum().item()) for i, name in enumerate(names)
    }
    return shares | {"all that is named": (right | ~asked).all(1).float().mean().item()}


def invert_and_back(model, clip, vae, images: Tensor, prompt: str, steps: int, refine: int) -> dict:
    """The autoencoder on a clip, and inversion followed by sampling with the same prompt, both against the clip; dB."""
    import comfy.samplers

    latents, decoded = through(vae, images)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        _, _, noisy = invert(model, conditioning, latents, steps, Path(folder), "evaluate", 0, refine)
    down = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", steps)
    back = torch.cat([vae.decode(part) for part in sampled(model, conditioning, noisy, down).split(16)])
    mean = statistics.mean
    return {
        "autoencoder": mean(psnr(decoded, images)),
        "inverted and back": mean(psnr(back, images)),
        "inverted and back, to the autoencoder's": mean(psnr(back, decoded)),
    }


def clip_frames(path: Path, width: int, count: int) -> Tensor:
    """``count`` frames of a file, evenly spread, (count, height, width, 3) from 0 to 1."""
    video = pack_module("adaflow.video")
    whole = video.VideoClip(video.probe(path))
    size = video.fit_size(whole.width, whole.height, width)
    clip = whole.sub(stride=max(1, whole.count() // count), size=size)
    return torch.cat([torch.from_numpy(part) for part in clip.frames(16)])[:count].float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, nargs="*", default=[], help="video files")
    parser.add_argument("--width", type=int, default=320, help="longer side of the clips in pixels")
    parser.add_argument("--frames", type=int, default=8, help="of each clip, evenly spread")
    parser.add_argument("--pictures", type=int, default=200, help="of the world, for the autoencoder")
    parser.add_argument("--captions", type=int, default=200, help="pictures drawn from noise")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=50, help="of inversion and sampling; half of them from noise")
    parser.add_argument("--refine", type=int, default=1, help="rounds of each step of the inversion")
    parser.add_argument("--weights", type=Path, default=ROOT / "demo_model" / "weights.safetensors")
    parser.add_argument("--judge", type=Path, default=ROOT / "demo_model" / "classifier.safetensors")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    start_comfyui()
    model, clip, vae = pack_module("nodes.patching.demo_model").load_demo_model(options.weights)
    judge = pack_module("adaflow.demo.judge").load_judge(options.judge)
    scenes = world_pictures(range(FIRST, FIRST + options.pictures), LANDSCAPE, "cpu")
    images = scenes.images.movedim(1, -1).float() / 255
    values = psnr(through(vae, images)[1], images)
    styles, shown = pack_module("adaflow.demo").ATTRIBUTES["style"], scenes.truth[:, -1].tolist()
    of_style = {s: [v for v, k in zip(values, shown, strict=True) if styles[k] == s] for s in styles}
    by_style = {style: statistics.mean(found) for style, found in of_style.items() if found}
    results = {"autoencoder, world, dB": {"all": statistics.mean(values)} | by_style}
    print(json.dumps(results), flush=True)
    for path in options.clips:
        frames = clip_frames(path, options.width, options.frames)
        results[f"{path.name}, dB"] = invert_and_back(
            model, clip, vae, frames, "a photo", options.steps, options.refine
        )
        print(path.name, results[f"{path.name}, dB"], flush=True)
    if options.captions:
        drawn = draw_captions(model, clip, vae, judge, options.captions, options.steps // 2, options.guidance)
        results["captions drawn from noise"] = {"count": options.captions, "guidance": options.guidance} | drawn
    text = json.dumps(results | {"seconds": round(time.monotonic() - started)}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
