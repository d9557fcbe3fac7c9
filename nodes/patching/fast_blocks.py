"""ResBlocks and SpatialTransformers of a UNet, run in channels_last with fused norms; the same as their own forwards.

Used where ``wanted`` says so, for blocks that ComfyUI's own classes make up and that nobody hooked. Convolutions leave
their bias to the kernel that reads their output next; tokens and images are views of the same memory.
"""

import inspect
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from comfy import ops
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock, CrossAttention, FeedForward, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, Upsample
from torch import Tensor, nn

from ...adaflow import fused
from ...adaflow.attention import prompt_attention
from ...adaflow.kernels import HALF

WIDE_BYTES = 256 << 20  # of a feed forward's widest activation
VARIABLE = "ADAFLOW_BLOCKS"  # "own" or "fast", for benchmarks and tests: overrules the choice by device
BLOCK_PATCHES = {
    "attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch",
}  # fmt: skip
_OPERATIONS = (nn, ops.disable_weight_init, ops.manual_cast)
_CONVS, _GROUP_NORMS, _LAYER_NORMS, _LINEARS = (
    tuple(getattr(kinds, name) for kinds in _OPERATIONS) for name in ("Conv2d", "GroupNorm", "LayerNorm", "Linear")
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Those of ComfyUI's that compute just attention and heed no attn_precision, which asks for scores in float32.
_PLAIN_ATTENTION = (attention.attention_pytorch, attention.attention_xformers, attention.attention_flash)
_PASSES_OPTIONS = "transformer_options" in inspect.signature(CrossAttention.forward).parameters


def wanted(x: Tensor) -> bool:
    """Whether a forward of the UNet on ``x`` is to run its blocks like this."""
    return not torch.is_grad_enabled() and x.ndim == 4 and run_on(x.device, x.dtype)


def run_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks are to run like this on ``device``, with activations of ``dtype``."""
    asked = os.environ.get(VARIABLE)
    if asked == "own":
        return False
    if device.type != "cuda":
        return asked == "fast"
    return dtype in HALF and fused.kernels_work(device)


def run(
    block: nn.Module,
    forward: Callable,
    args: tuple,
    given: Callable[[int], Tensor | None],
    prompts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The output of ``block``, by its own ``forward`` if it is not built or used as is known here.

    Args:
        args: of that: ``(x, emb)`` of a ResBlock, ``(x, context, transformer_options)`` of a SpatialTransformer.
        given: by number of a transformer block in it, the output of its self-attention after the output projection,
            (batch, tokens, channels), if that does not depend on ``x``.
        prompts: a context, (batch, tokens, channels), and what it repeats for batch / prompts consecutive images each,
            (prompts, tokens, channels).
    """
    if type(block) is ResBlock and len(args) == 2 and _is_known_res_block(block, args[0]):
        return _res_block(block, *args)
    if type(block) is SpatialTransformer and len(args) == 3 and _is_known_transformer(block, args[0]):
        return _transformer(block, *args, given, prompts)
    return forward(*args)


def run_out(out: nn.Module, forward: Callable, x: Tensor) -> Tensor:
    """The output of a UNet's last layers: norm, SiLU, convolution."""
    if not (_is(out, nn.Sequential) and len(out) == 3 and _is_norm(out[0], x) and _is(out[1], nn.SiLU)):
        return forward(x)
    return out[2](_image(_group_norm(out[0], _tokens(x), silu=True), x.shape[2:]))


def run_upsample(block: Upsample, forward: Callable, x: Tensor, output_shape=None) -> Tensor:
    """The output of ``block``: nearest tokens, convolution."""
    if block.dims != 2 or not block.use_conv or x.ndim != 4:
        return forward(x, output_shape=output_shape)
    to = (2 * x.shape[2], 2 * x.shape[3]) if output_shape is None else tuple(output_shape[2:4])
    return block.conv(_image(fused.upsample(_tokens(x), tuple(x.shape[2:]), to), to))


def _is(module: nn.Module, *kinds: type) -> bool:
    """Whether it is just that, with nothing hung on its forward."""
    return not (
        type(module) not in kinds or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )


def _is_norm(module: nn.Module, x: Tensor, kinds=_GROUP_NORMS) -> bool:
    """Whether it is one whose weights :func:`_weights` can give."""
    return _is(module, *kinds) and (hasattr(module, "weight_function") or _is_ready(module, x))


def _is_ready(module: nn.Module, x: Tensor) -> bool:
    """Whether its weights can be used as they are: plain ones, on the device, that no function is to change."""
    if getattr(module, "weight_function", None) or getattr(module, "bias_function", None):
        return False
    weights = [weight for weight in module._parameters.values() if weight is not None]
    return all(
        type(weight) in (nn.Parameter, Tensor) and weight.device == x.device and weight.dtype in _FLOATS
        for weight in weights
    )


def _weights(norm: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, as they are or as ComfyUI makes them for ``x``."""
    if norm.weight is None or _is_ready(norm, x):
        return norm.weight, norm.bias
    return ops.cast_bias_weight(norm, x)


def _is_conv(module: nn.Module, x: Tensor) -> bool:
    """Whether it is one whose weights can be used as they are."""
    if not _is(module, *_CONVS) or module.padding_mode != "zeros" or not _is_ready(module, x):
        return False
    return module.weight.dtype == x.dtype


class HeldLayouts:
    """Weights of convolutions, held in channels_last: cuDNN would copy them into that layout in every call."""

    def __init__(self):
        self._held: list[nn.Module] = []

    def hold(self, unet: nn.Module, x: Tensor) -> None:
        """Those in ``unet`` that work on images like ``x`` as they are."""
        for module in unet.modules():
            if _is_conv(module, x) and module.weight[0, 0].numel() > 1 and module.weight.is_contiguous():
                _lay_out(module.weight, torch.channels_last)
                self._held.append(module)

    def release(self) -> None:
        """Give them their layout back, whatever weights the modules have by now."""
        for module in self._held:
            if not module.weight.is_contiguous():
                _lay_out(module.weight, torch.contiguous_format)
        self._held.clear()


def _lay_out(weight: Tensor, layout: torch.memory_format) -> None:
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.data = weight.data.contiguous(memory_format=layout)


def _is_known_res_block(block: ResBlock, x: Tensor) -> bool:
    if block.updown or block.use_scale_shift_norm or block.exchange_temb_dims or x.ndim != 4:
        return False
    if not (_is(block.in_layers, nn.Sequential) and _is(block.out_layers, nn.Sequential)):
        return False
    if len(block.in_layers) != 3 or len(block.out_layers) != 4 or not _is(block.out_layers[2], nn.Dropout):
        return False
    (norm_in, silu_in, _), (norm_out, silu_out, dropout, _) = block.in_layers, block.out_layers
    if not (_is_norm(norm_in, x) and _is_norm(norm_out, x) and _is(silu_in, nn.SiLU) and _is(silu_out, nn.SiLU)):
        return False
    return not (dropout.training and dropout.p)


def _is_known_transformer(block: SpatialTransformer, x: Tensor) -> bool:
    return _is_norm(block.norm, x)


def _is_known_inner(inner: nn.Module, x: Tensor, options: dict) -> bool:
    """Whether a transformer's block is without patches, and of Stable Diffusion's kind."""
    if set(options.get("patches", ())) & BLOCK_PATCHES:
        return False
    if any(options.get("patches_replace", {}).get(kind) for kind in ("attn1", "attn2")):
        return False
    if not _is(inner, BasicTransformerBlock) or inner.ff_in or not inner.is_res or inner.disable_self_attn:
        return False
    if inner.attn2 is None or inner.switch_temporal_ca_to_sa:
        return False
    return all(_is_norm(norm, x, _LAYER_NORMS) for norm in (inner.norm2, inner.norm3))


def _tokens(x: Tensor) -> Tensor:
    """(batch, height * width, channels) of an image: a view if it is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _image(tokens: Tensor, size) -> Tensor:
    """Undoes :func:`_tokens`: a channels_last view."""
    return tokens.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


def _group_norm(norm: nn.GroupNorm, tokens: Tensor, silu: bool, shift: Tensor | None = None) -> Tensor:
    return fused.group_norm(tokens, norm.num_groups, *_weights(norm, tokens), norm.eps, silu, shift)


def _conv(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output of a convolution, and the bias that is still to be added, if any."""
    if not _is_conv(conv, x):
        return conv(x), None
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups), conv.bias


def _is_projection(conv: nn.Module, x: Tensor) -> bool:
    """Whether it is a convolution that works on each token by itself."""
    if not _is_conv(conv, x) or conv.groups != 1 or set(conv.kernel_size) != {1} or set(conv.stride) != {1}:
        return False
    return conv.padding in ((0, 0), "valid")


def _project(module: nn.Module, tokens: Tensor, size) -> Tensor:
    """A projection of tokens, or a convolution of their image, as tokens."""
    if _is(module, nn.Identity):
        return tokens
    if _is_projection(module, tokens):
        return F.linear(tokens, module.weight.flatten(1), module.bias)
    return _tokens(module(_image(tokens, size)))


def _res_block(block: ResBlock, x: Tensor, emb: Tensor) -> Tensor:
    size, tokens = x.shape[2:], _tokens(x)
    h, bias = _conv(block.in_layers[2], _image(_group_norm(block.in_layers[0], tokens, silu=True), size))
    shift = None if block.skip_t_emb else block.emb_layers(emb)
    if bias is not None:
        shift = bias.expand(x.shape[0], -1) if shift is None else shift + bias
    h = _group_norm(block.out_layers[0], _tokens(h), silu=True, shift=shift)
    h, bias = _conv(block.out_layers[3], _image(h, size))
    return _image(fused.add(_project(block.skip_connection, tokens, size), _tokens(h), bias), size)


def _transformer(block: SpatialTransformer, x: Tensor, context, options: dict, given: Callable, prompts) -> Tensor:
    if not isinstance(context, list):
        context = [context] * len(block.transformer_blocks)
    options["activations_shape"] = list(x.shape)
    size, tokens = x.shape[2:], _tokens(x)

    def project(module: nn.Module, h: Tensor) -> Tensor:
        return module(h) if block.use_linear else _project(module, h, size)

    h = project(block.proj_in, _group_norm(block.norm, tokens, silu=False))
    for number, inner in enumerate(block.transformer_blocks):
        options["block_index"] = number
        if _is_known_inner(inner, x, options):
            h = _inner(inner, h, context[number], options, given(number), prompts)
        else:
            h = inner(h, context=context[number], transformer_options=options)
    return _image(project(block.proj_out, h) + tokens, size)


def _inner(inner: BasicTransformerBlock, x: Tensor, context, options: dict, attended: Tensor | None, prompts) -> Tensor:
    passed = {"transformer_options": options} if _PASSES_OPTIONS else {}
    if attended is None:
        attended = inner.attn1(inner.norm1(x), context=None, value=None, **passed)
    x, n = _add_layer_norm(inner.norm2, x, attended)
    if _is_plain_attention(inner.attn2, options) and context is not None:
        once = prompts is not None and context is prompts[0]  # a patch may have put another in its place
        attended = _prompt_attention(inner.attn2, n, prompts[1] if once else context)
    else:
        attended = inner.attn2(n, context=context, value=None, **passed)
    last = _accumulating(inner.ff, x)
    x, n = _add_layer_norm(inner.norm3, x, attended, None if last is None else last.bias)
    return _add_feed_forward(inner.ff, n, x, last)


def _is_plain_attention(attn: nn.Module, options: dict) -> bool:
    """Whether it computes just attention, by ComfyUI's own choice of function, which nobody replaced."""
    if not _is(attn, CrossAttention) or "optimized_attention_override" in options:
        return False
    return attention.optimized_attention in _PLAIN_ATTENTION


def _prompt_attention(attn: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
    return attn.to_out(prompt_attention(attn.to_q(x), attn.to_k(context), attn.to_v(context), attn.heads))


def _add_layer_norm(norm: nn.LayerNorm, x: Tensor, y: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return fused.add_layer_norm(x, y.to(x.dtype), *_weights(norm, x), norm.eps, after)


def _is_geglu(ff: nn.Module) -> bool:
    return _is(ff, FeedForward) and _is(ff.net, nn.Sequential) and len(ff.net) == 3 and _is(ff.net[0], GEGLU)


def _accumulating(ff: nn.Module, x: Tensor) -> nn.Module | None:
    """A feed forward's last projection, if its product can be added up in ``x``, to which its bias was added before."""
    return ff.net[2] if _is_geglu(ff) and _is_plain_linear(ff.net[2], x) else None


def _is_plain_linear(module: nn.Module, x: Tensor) -> bool:
    """Whether it is one whose weight can be used as it is, and that has a bias."""
    if not _is(module, *_LINEARS) or module.bias is None or not _is_ready(module, x):
        return False
    return module.weight.dtype == module.bias.dtype == x.dtype


def _gated(proj: nn.Module, n: Tensor) -> Tensor:
    """A feed forward's first projection, and its GEGLU."""
    if _is_plain_linear(proj, n):
        return fused.gated_linear(n, proj.weight, proj.bias)
    return fused.geglu(proj(n))


def _add_feed_forward(ff: nn.Module, n: Tensor, x: Tensor, last: nn.Module | None) -> Tensor:
    """``ff(n) + x``, written over ``x``; of some images at a time, since the widest activations are in there.

    Args:
        last: of :func:`_accumulating`.
    """
    if not _is_geglu(ff):
        return ff(n) + x
    (gated, dropout, narrow), wide = ff.net, ff.net[0].proj.out_features
    together = max(1, WIDE_BYTES // (n.shape[1] * wide * n.element_size()))
    for images, rest in zip(n.split(together), x.split(together), strict=True):
        between = dropout(_gated(gated.proj, images))
        if last is None:
            rest += narrow(between)
        else:
            rest.flatten(0, 1).addmm_(between.flatten(0, 1), last.weight.t())
    return x
