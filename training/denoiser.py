"""The UNet and its text encoder together: noise prediction on the autoencoder's latents, one caption in ten empty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import Clock, Learner, Log, initialise, pack_module
from torch import Tensor, nn

RATE, BATCH, EMPTY, UNKNOWN = 5e-4, 256, 0.1, 0.02
UNKNOWN_TOKEN = 49405  # a token of no caption: what the shipped model takes for every word it has never met
SILENT = ("out.2.weight", "out_layers.3.weight", "proj_out.weight")


@dataclass
class Latents:
    """values (n, 4, h, w) float16 and captions' tokens (n, 77) int32 of pictures of one size."""

    values: Tensor
    tokens: Tensor


class Denoiser(nn.Module):
    """SD's network as a function of noisy latents, timesteps and tokens."""

    def __init__(self, device):
        super().__init__()
        demo = pack_module("nodes.patching.demo_model")
        base = demo.empty_unet(device)
        self.unet = base.diffusion_model
        self.clip = demo.empty_clip().cond_stage_model.clip_l
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("text_projection" not in name and "logit_scale" not in name)
        alpha_bar = 1 / (1 + base.model_sampling.sigmas**2)
        self.register_buffer("alpha_bar", alpha_bar.float().to(device), persistent=False)

    def context(self, tokens: Tensor) -> Tensor:
        """What ComfyUI's CLIP gives for the tokens, (n, 77, 256); its own forward adds in place, without a gradient."""
        from comfy.ldm.modules.attention import optimized_attention

        text = self.clip.transformer.text_model
        x = text.embeddings(tokens, dtype=self.unet.out[2].weight.dtype)
        mask = torch.full((tokens.shape[1],) * 2, -torch.finfo(x.dtype).max, dtype=x.dtype, device=x.device).triu_(1)
        for layer in text.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
            x = x + layer.mlp(layer.layer_norm2(x))
        return text.final_layer_norm(x)

    def forward(self, noisy: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
        """eps (n, 4, h, w) for latents at the ``steps`` (n,) of 0 to 999, variance-preserving."""
        return self.unet._forward(noisy, steps, self.context(tokens), transformer_options={})


def tokenise(captions: list[str]) -> Tensor:
    """SD 1.x's tokens, (n, 77) int32, as ComfyUI reads captions without weights or brackets."""
    import comfy.sd1_clip

    tokenizer = comfy.sd1_clip.SD1Tokenizer()
    known = {c: [t for t, _ in tokenizer.tokenize_with_weights(c)["l"][0]] for c in set(captions)}
    return torch.tensor([known[caption] for caption in captions], dtype=torch.int32)


def blank(tokens: Tensor, empty: Tensor) -> Tensor:
    """Some captions emptied, some words made unknown, so that the model learns what to do with either."""
    words = (tokens != tokens[:, :1]) & (tokens != 49407)
    tokens = tokens.masked_fill(words & (torch.rand(tokens.shape, device=tokens.device) < UNKNOWN), UNKNOWN_TOKEN)
    return torch.where((torch.rand(len(tokens), 1, device=tokens.device) < EMPTY), empty, tokens)


def loss_of(module: Denoiser, values: Tensor, tokens: Tensor, empty: Tensor) -> Tensor:
    """Squared error of the noise, weighted by min(SNR, 5)/SNR but never below a quarter (arXiv 2303.09556)."""
    values = values.float()
    steps = torch.randint(1000, (len(values),), device=values.device)
    alpha_bar = module.alpha_bar[steps].reshape(-1, 1, 1, 1)
    noise = torch.randn_like(values)
    noisy = alpha_bar.sqrt() * values + (1 - alpha_bar).sqrt() * noise
    guess = module(noisy.bfloat16(), steps, blank(tokens, empty)).float()
    weight = (5 * (1 - alpha_bar) / alpha_bar).clamp(0.25, 1.0)
    return (weight * (guess - noise).square()).mean()


def train(folder, pools: list[Latents], clock: Clock, log: Log, begin_with: dict) -> tuple[Denoiser, Learner]:
    """Trains until the stage or the call is over.

    Args:
        pools: of two sizes, the second is used at every fourth step.
        begin_with: packed weights, or none.
    """
    device = pools[0].values.device
    module = Denoiser(device)
    initialise(module, SILENT, torch.Generator().manual_seed(3))
    if begin_with:
        restore(module, begin_with)
    alpha_bar, empty = module.alpha_bar, tokenise([""]).to(device)
    module.to(device).bfloat16().alpha_bar = alpha_bar
    learner = Learner(module, lambda values, tokens: loss_of(module, values, tokens, empty), RATE, average=0.9995)
    for step in clock.steps(learner, folder / "denoiser.safetensors"):
        pool = pools[0] if step % 4 else pools[1]
        size = BATCH if step % 4 else BATCH * pools[0].values[0].numel() // pool.values[0].numel()
        chosen = torch.randint(len(pool.values), (min(size, len(pool.values)),), device=device)
        learner.step(clock.share, pool.values[chosen], pool.tokens[chosen])
        if learner.steps % 100 == 0:
            loss = learner.mean_loss()
            log.add("denoiser", clock.used, step=learner.steps, loss=loss, samples=learner.samples)
    log.add("denoiser", clock.used, step=learner.steps, samples=learner.samples)
    return module, learner


def averaged(module: Denoiser, learner: Learner) -> Denoiser:
    """``module`` in float32 with the averaged weights."""
    module.float().load_state_dict(learner.averaged(), strict=True)
    return module.eval()


@torch.no_grad()
def sample(module: Denoiser, tokens: Tensor, size: tuple[int, int], steps: int, guidance: float, seed: int) -> Tensor:
    """DDIM from noise (arXiv 2010.02502): latents (n, 4, h, w) of unit variance."""
    device = tokens.device
    generator = torch.Generator(device).manual_seed(seed)
    latent = torch.randn(len(tokens), 4, *size, generator=generator, device=device)
    empty = tokenise([""]).to(device).expand_as(tokens)
    grid = torch.arange(1, 1000, 1000 // steps, device=device).flip(0)
    for i, now in enumerate(grid):
        with torch.autocast(device.type, torch.bfloat16):
            both = module(latent.repeat(2, 1, 1, 1), now.expand(2 * len(latent)), torch.cat([tokens, empty]))
        with_text, without = both.float().chunk(2)
        eps = without + guidance * (with_text - without)
        a = module.alpha_bar[now]
        b = module.alpha_bar[grid[i + 1]] if i + 1 < len(grid) else module.alpha_bar[0]
        latent = b.sqrt() * (latent - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return latent


def shipped(module: Denoiser, tokens: Tensor) -> dict[str, Tensor]:
    """UNet, text encoder and the embeddings of the tokens that captions had, by the prefixes the loader reads."""
    demo = pack_module("nodes.patching.demo_model")
    clip = {name: value.float().cpu() for name, value in module.clip.state_dict().items()}
    table = clip.pop(demo.EMBEDDING)
    ids = tokens.unique().cpu()
    state = {f"unet.{name}": value.float().cpu() for name, value in module.unet.state_dict().items()}
    state |= {f"text.{name}": value for name, value in clip.items()}
    return state | {"tokens.ids": ids, "tokens.rows": torch.cat([table[UNKNOWN_TOKEN][None], table[ids.long()]])}


def restore(module: Denoiser, packed: dict[str, Tensor]) -> None:
    """Begin with weights that :func:`shipped` gave."""
    demo, weights = pack_module("nodes.patching.demo_model"), pack_module("adaflow.demo.weights")
    module.unet.load_state_dict(weights.unpack(packed, "unet."))
    text = weights.unpack(packed, "text.") | {demo.EMBEDDING: demo.token_table(packed)}
    module.clip.load_state_dict(text)
