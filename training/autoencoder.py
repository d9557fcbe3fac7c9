"""The autoencoder: mean squared and absolute error, latents held at unit variance and read through a little noise."""

from __future__ import annotations

import copy

import torch
from common import Clock, Learner, Log, initialise, pack_module, save_whole
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

RATE, NOISE = 8e-4, 0.02
BATCHES = ((0, 64, 96), (0, 24, None), (0, 64, 96), (1, 10, None))  # in turn: size, pictures, side of a part in pixels
SD_SCALE = 0.18215  # SD 1.x: latents of unit variance are those of its autoencoder times this
SILENT = ("conv2.weight", "conv2.bias", "attn_1.proj_out.weight")


class Autoencoder(nn.Module):
    """ComfyUI's AutoencoderKL with a batch norm without weights between its halves while it is trained."""

    def __init__(self):
        super().__init__()
        from comfy.ldm.models.autoencoder import AutoencoderKL

        config = copy.deepcopy(pack_module("nodes.patching.demo_model").VAE)
        self.kl = AutoencoderKL(ddconfig=config, embed_dim=4)
        self.norm = nn.BatchNorm2d(4, affine=False, momentum=0.02)

    def encode(self, images: Tensor) -> Tensor:
        """Latents (n, 4, h/8, w/8) of mean 0 and variance 1 for images (n, 3, h, w) from -1 to 1."""
        return self.norm(self.kl.quant_conv(self.kl.encoder(images))[:, :4])

    def decode(self, latents: Tensor) -> Tensor:
        return self.kl.decoder(self.kl.post_quant_conv(latents))

    def forward(self, images: Tensor) -> Tensor:
        latents = self.encode(images)
        return self.decode(latents + NOISE * torch.randn_like(latents))


def as_input(images: Tensor) -> Tensor:
    """uint8 (n, 3, h, w) to bfloat16 from -1 to 1."""
    return (images.float() / 127.5 - 1).bfloat16()


def loss_of(module: Autoencoder, images: Tensor) -> Tensor:
    """Squared error of uint8 ``images`` (n, 3, h, w) seen from -1 to 1, and a little of the absolute one."""
    images = as_input(images)
    out, images = module(images).float(), images.float()
    return mse_loss(out, images) + 0.03 * l1_loss(out, images)


def draw(pools: list[Tensor], size: int, count: int, side: int | None) -> Tensor:
    """Pictures, or one square of each, of one of the sizes; no more than there are."""
    pool = pools[size]
    count = min(count, len(pool))
    chosen = torch.randint(len(pool), (count,), device=pool.device)
    if side is None:
        return pool[chosen]
    top, left = (int(torch.randint(length - side + 1, ())) for length in pool.shape[2:])
    return pool[chosen, :, top : top + side, left : left + side]


def train(folder, pools: list[Tensor], clock: Clock, log: Log, device, begin_with: dict) -> Autoencoder | None:
    """The trained autoencoder in float32; None when the call ends before the training does.

    Args:
        pools: uint8 pictures of two sizes, (n, 3, h, w) each.
        begin_with: packed weights, or none.
    """
    module = Autoencoder().to(device)
    state, done = folder / "autoencoder.safetensors", folder / "autoencoder-mean.safetensors"
    if done.exists():
        module.load_state_dict(load_file(done, device=str(device)))
        return module.eval()
    initialise(module, SILENT, torch.Generator().manual_seed(1))
    if begin_with:
        restore(module, begin_with)
    module.bfloat16().norm.float()
    learner = Learner(module, lambda images: loss_of(module, images), RATE)
    for step in clock.steps(learner, state):
        learner.step(clock.share, draw(pools, *BATCHES[step % len(BATCHES)]))
        if learner.steps % 500 == 0:
            log.add("autoencoder", clock.used, step=learner.steps, loss=learner.mean_loss())
    log.add("autoencoder", clock.used, step=learner.steps)
    if not clock.finished:
        return None
    module.float().load_state_dict(learner.averaged())
    settle(module, pools[0])
    save_whole(module.state_dict(), done)
    state.unlink(missing_ok=True)
    return module


@torch.no_grad()
def settle(module: Autoencoder, pool: Tensor, count: int = 4096) -> None:
    """Set the norm's mean and variance to those of the averaged weights' own latents."""
    module.norm.momentum = None
    module.norm.reset_running_stats()
    module.train()
    chosen = torch.randperm(len(pool), device=pool.device)[:count]
    for part in chosen.split(128):
        module.encode(pool[part].float() / 127.5 - 1)
    module.eval()


@torch.no_grad()
def shipped(module: Autoencoder) -> dict[str, Tensor]:
    """AutoencoderKL's state dict, the norm folded into its two 1x1 convolutions, latents in SD 1.x's units."""
    state = {name: value.float().cpu() for name, value in module.kl.state_dict().items()}
    deviation = (module.norm.running_var.float().cpu() + module.norm.eps).sqrt()
    factor = 1 / deviation / SD_SCALE
    weight, bias = state["quant_conv.weight"].clone(), state["quant_conv.bias"].clone()
    weight[:4] *= factor[:, None, None, None]
    bias[:4] = (bias[:4] - module.norm.running_mean.float().cpu()) * factor
    weight[4:], bias[4:] = 0.0, -30.0  # the log-variance, which nothing is to sample from
    state |= {"quant_conv.weight": weight, "quant_conv.bias": bias}
    state["post_quant_conv.weight"] = state["post_quant_conv.weight"] * SD_SCALE
    return state


def as_shipped(packed: dict[str, Tensor], device) -> Autoencoder:
    """What the pack makes of weights that :func:`shipped` gave, in float32, with latents of unit variance."""
    module = Autoencoder()
    restore(module, packed)
    return module.to(device).eval()


def restore(module: Autoencoder, packed: dict[str, Tensor]) -> None:
    """Begin with weights that :func:`shipped` gave, packed under ``vae.``; latents of unit variance again."""
    state = pack_module("adaflow.demo.weights").unpack(packed, "vae.")
    state["quant_conv.weight"][:4] *= SD_SCALE
    state["quant_conv.bias"][:4] *= SD_SCALE
    state["post_quant_conv.weight"] /= SD_SCALE
    module.kl.load_state_dict(state)


@torch.no_grad()
def latents(module: Autoencoder, images: Tensor, batch: int = 256) -> Tensor:
    """float16 latents of unit variance, (n, 4, h/8, w/8)."""
    found = []
    for part in images.split(batch):
        with torch.autocast(part.device.type, torch.bfloat16):
            found.append(module.encode(as_input(part)).half())
    return torch.cat(found)


@torch.no_grad()
def held_out_psnr(module: Autoencoder, images: Tensor) -> Tensor:
    """dB of each picture of ``images`` (n, 3, h, w) uint8, through the latents of a float32 module and back."""
    errors = []
    for part in images.split(128):
        target = part.float() / 127.5 - 1
        out = module.decode(module.encode(target)).clamp(-1, 1)
        errors.append((out - target).square().flatten(1).mean(1))
    return -10 * (torch.cat(errors) / 4).log10()
