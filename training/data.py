"""Pictures with captions: scenes of the world and crops of photographs, filtered and described the same way."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import pack_module
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

HELD_OUT = 1_000_000  # seeds of the world from here on are never shown to autoencoder, UNet and text encoder
CLASSIFIER_FIRST = 1_500_000  # the classifier learns from seeds from here on, which nothing is tried on
LANDSCAPE, WIDE = (128, 192), (192, 320)  # pixels, height and width
LOOKS = ("day", "night", "sunset", "autumn", "snow")


@dataclass
class Pictures:
    """images (n, 3, height, width) uint8 and a caption each; truth (n, 5): attributes, -1 where none can be read."""

    images: Tensor
    captions: list[str]
    truth: Tensor


def truth_of(scene) -> list[int]:
    """Numbers of the attributes that ``scene``'s picture shows; -1: none can be read, as a grey sketch's colour."""
    attributes = pack_module("adaflow.demo").ATTRIBUTES
    shown = ("kind", "style") if scene.style == "pencil sketch" else attributes
    return [names.index(getattr(scene, name)) if name in shown else -1 for name, names in attributes.items()]


def world_pictures(seeds: range, size: tuple[int, int], device, batch: int = 1024) -> Pictures:
    """One view of each seed's scene. Half of them are photos, the rest is shared by the other styles."""
    world = pack_module("adaflow.demo")
    images, captions, truth = [], [], []
    for start in range(0, len(seeds), batch):
        scenes, views = [], []
        for seed in seeds[start : start + batch]:
            scene = world.Scene.random(seed)
            scene = replace(scene, style="photo") if seed % 5 < 2 else scene
            scenes.append(scene)
            views.append(scene.random_view(seed))
            captions.append(scene.caption(seed % world.CAPTION_VARIANTS))
            truth.append(truth_of(scene))
        camera, clock = torch.tensor(views, dtype=torch.float32).T
        rendered = world.render(scenes, camera, clock, *size, device=device)
        images.append((rendered.images * 255).round().byte())
    return Pictures(torch.cat(images), captions, torch.tensor(truth, device=device))


class Photographs:
    """Files decoded once; crops of any size from them."""

    def __init__(self, folder: Path, device):
        files = sorted(folder.glob("*.jpg"))
        with ThreadPoolExecutor() as pool:
            arrays = list(pool.map(lambda file: np.array(Image.open(file).convert("RGB")), files))
        self.images = [torch.from_numpy(array).to(device).permute(2, 0, 1) for array in arrays]

    def crop(self, size: tuple[int, int], draw: random.Random) -> Tensor:
        """(3, height, width) uint8: any part of a photograph down to a third of it, half of them mirrored."""
        image = self.images[draw.randrange(len(self.images))]
        ratio = size[1] / size[0]
        largest = min(image.shape[1], image.shape[2] / ratio)
        height = largest * draw.uniform(0.33, 1.0) if largest > size[0] else largest
        rows, columns = max(8, round(height)), max(8, round(height * ratio))
        rows, columns = min(rows, image.shape[1]), min(columns, image.shape[2])
        top, left = draw.randint(0, image.shape[1] - rows), draw.randint(0, image.shape[2] - columns)
        part = image[None, :, top : top + rows, left : left + columns].float()
        part = interpolate(part, size, mode="bilinear", antialias=True, align_corners=False)[0]
        part = part.flip(-1) if draw.random() < 0.5 else part
        return part.round().clamp(0, 255).byte()


def photo_caption(style: str, look: str, draw: random.Random) -> str:
    """What a filtered photograph is called: its style and look, not what it shows."""
    nouns = {
        "photo": ("a photo", "a photograph", "photo"),
        "pencil sketch": ("a pencil sketch", "pencil sketch", "a sketch in pencil"),
        "watercolour": ("a watercolour", "watercolour", "a watercolour painting"),
        "oil painting": ("an oil painting", "oil painting", "a painting in oil"),
        "comic": ("a comic", "comic", "a comic drawing"),
        "pixel art": ("pixel art", "a pixel art picture", "pixel art picture"),
    }
    places = {
        "day": ("",),
        "night": (" at night", ", night"),
        "sunset": (" at sunset", ", sunset"),
        "autumn": (" in autumn", ", autumn"),
        "snow": (" in winter", " in snow", ", winter"),
    }
    return draw.choice(nouns[style]) + draw.choice(places[look])


def photo_pictures(
    photographs: Photographs, count: int, size: tuple[int, int], seed: int, batch: int = 1024
) -> Pictures:
    """``count`` crops; style and look drawn apart, half of each plain."""
    filters = pack_module("adaflow.demo.filters")
    draw = random.Random(seed)
    images, captions = [], []
    for start in range(0, count, batch):
        amount = min(batch, count - start)
        part = torch.stack([photographs.crop(size, draw) for _ in range(amount)]).float() / 255
        looks = [draw.choice(LOOKS[1:]) if draw.random() < 0.45 else "day" for _ in range(amount)]
        styles = [draw.choice(filters.STYLES[1:]) if draw.random() < 0.6 else "photo" for _ in range(amount)]
        for names, change in ((looks, filters.apply_look), (styles, filters.apply_style)):
            for name in set(names):
                chosen = torch.tensor([other == name for other in names], device=part.device)
                part[chosen] = change(part[chosen], name)
        images.append((part.clamp(0, 1) * 255).round().byte())
        captions += [photo_caption(style, look, draw) for style, look in zip(styles, looks, strict=True)]
    return Pictures(torch.cat(images), captions, torch.full((count, 5), -1, device=part.device))
