"""Reads the five attributes off a picture of the world: the judge of edits, never shown a seed they are tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Clock, Learner, Log, initialise, pack_module, save_whole
from data import Pictures
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

RATE, BATCH = 1e-3, 256


def noisy(images: Tensor) -> Tensor:
    """uint8 to bfloat16 from -1 to 1, blurred, resampled and shaded a little: what an autoencoder may do to it."""
    out = images.float() / 127.5 - 1
    n, _, h, w = out.shape
    soft = interpolate(interpolate(out, scale_factor=0.5, mode="bilinear", antialias=True), (h, w), mode="bilinear")
    out = torch.where(torch.rand(n, 1, 1, 1, device=out.device) < 0.5, soft, out)
    gain = 1 + 0.1 * torch.randn(n, 1, 1, 1, device=out.device)
    shift = 0.06 * torch.randn(n, 3, 1, 1, device=out.device)
    strength = 0.08 * torch.rand(n, 1, 1, 1, device=out.device)
    return (out * gain + shift + strength * torch.randn_like(out)).bfloat16()


def loss_of(module, images: Tensor, truth: Tensor) -> Tensor:
    """Sum over the attributes of the cross entropy, where there is something to read."""
    heads = module(noisy(images))
    return sum(cross_entropy(head.float(), truth[:, i], ignore_index=-1) for i, head in enumerate(heads))


def train(folder, scenes: Callable[[], Pictures], clock: Clock, log: Log, device):
    """The trained classifier in float32; None when the call ends before the training does.

    Args:
        scenes: draws the pictures, where there is something to learn from them.
    """
    judge = pack_module("adaflow.demo.judge")
    module = judge.Judge().to(device)
    done, state = folder / "classifier.safetensors", folder / "classifier-state.safetensors"
    if done.exists():
        module.load_state_dict(load_file(done, device=str(device)))
        return module.eval()
    initialise(module, (), torch.Generator().manual_seed(2))
    module.bfloat16()
    pictures = scenes()
    images, truth = pictures.images, pictures.truth
    learner = Learner(module, lambda images, truth: loss_of(module, images, truth), RATE, average=0.99)
    for _ in clock.steps(learner, state):
        chosen = torch.randint(len(images), (min(BATCH, len(images)),), device=device)
        learner.step(clock.share, images[chosen], truth[chosen])
        if learner.steps % 500 == 0:
            log.add("classifier", clock.used, step=learner.steps, loss=learner.mean_loss())
    log.add("classifier", clock.used, step=learner.steps)
    if not clock.finished:
        return None
    module.float().load_state_dict(learner.averaged())
    save_whole(module.state_dict(), done)
    state.unlink(missing_ok=True)
    return module.eval()


@torch.no_grad()
def accuracy(module, images: Tensor, truth: Tensor) -> list[float]:
    """Share of right answers per attribute, of those that can be read; and of pictures that are right in all."""
    read = torch.cat([torch.stack(module.read(part.float() / 255), 1) for part in images.split(256)])
    right, asked = (read == truth), truth >= 0
    each = [(right[:, i] & asked[:, i]).sum().item() / max(1, asked[:, i].sum().item()) for i in range(5)]
    return [*each, (right | ~asked).all(1).float().mean().item()]
