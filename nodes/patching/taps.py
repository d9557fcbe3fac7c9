"""Hooks on a UNet's self-attentions, on the injected ResBlock and on whole blocks, held for one evaluation.

A pass (see ``passes.py``) travels in ``transformer_options["adaflow"]``; the DIFFUSION_MODEL wrapper binds it to the
forward that is running, and the hooks hand that forward's activations to it. A context variable carries the binding,
so that a forward paused in one greenlet does not see another's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, Upsample
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...adaflow.descriptors import layer_sizes
from . import fast_blocks
from .families import UNetFamily

PASS_KEY = "adaflow"
ALIKE_KEY = "adaflow_prompts_alike"
_running: ContextVar["UNetCall | None"] = ContextVar("adaflow_unet_call", default=None)


class StopForward(Exception):
    """Raised by a pass that has all it wants of a forward; the wrapper catches it and returns zeros."""


@dataclass(frozen=True)
class Layer:
    """One self-attention: section ("input", "middle", "output"), block number in it, transformer block in that."""

    section: str
    block: int
    depth: int


@dataclass(frozen=True)
class UNetCall:
    """One forward of the UNet.

    Attributes:
        step_pass: the pass it belongs to.
        branches: for each of the conditionings batched in it, ComfyUI's uuid and the number of its branch, since
            areas of one branch are put into others under the same uuid; the batch is (branches, frames).
        size: (height, width) of the latent, or of the area that is evaluated.
        levels: resolutions of the UNet.
        fast: whether blocks are run as ``fast_blocks.py`` does.
        prompts: where all frames of a branch have the same one, the prompts as ComfyUI repeats them, (branches *
            frames, tokens, channels), and those of each branch once, (branches, tokens, channels).
    """

    step_pass: "UNetPass"
    branches: tuple
    size: tuple[int, int]
    levels: int
    fast: bool = False
    prompts: tuple[Tensor, Tensor] | None = field(default=None, compare=False)

    def layer_size(self, tokens: int) -> tuple[int, int]:
        """(height, width) of the layer that has so many tokens.

        Raises:
            RuntimeError: no layer of an unpatched UNet has.
        """
        for height, width in layer_sizes(*self.size, self.levels):
            if height * width == tokens:
                return height, width
        raise RuntimeError(
            f"AdaFlow: a self-attention works on {tokens} tokens, no resolution of a {self.size[1]}x{self.size[0]} "
            f"latent. Another patch merges or tiles tokens (ToMe, HyperTile, Kohya deep shrink): remove that"
        )


class UNetPass:
    """What happens at the taps during the forwards of one pass. The base leaves the UNet as it is.

    Attributes:
        channels_last: whether the forward is to run in that memory format.
    """

    channels_last = False

    def block(
        self, call: UNetCall, block: nn.Module, attentions: list["Tap"], forward: Callable, args: tuple
    ) -> Tensor:
        """Output of a ResBlock or SpatialTransformer with these self-attentions; ``forward`` is its own."""
        if not call.fast:
            return forward(*args)
        layers = {layer.depth: layer for layer, _ in attentions}
        tokens = args[0].shape[2:].numel()
        return fast_blocks.run(
            block, forward, args, lambda depth: self.given(call, layers[depth], tokens), call.prompts
        )

    def given(self, call: UNetCall, layer: Layer, tokens: int) -> Tensor | None:
        """What :meth:`self_attention` returns at a layer of so many tokens, if that does not depend on its input."""
        return None

    def self_attention(self, call: UNetCall, layer: Layer, attn: nn.Module, x: Tensor, context, value) -> Tensor | None:
        """Output of ``attn`` after its output projection, (batch, tokens, channels), or None to leave it alone."""
        return None

    def given_feature(self, call: UNetCall) -> Tensor | None:
        """What takes the place of the branch-internal feature of the injected ResBlock, or None."""
        return None

    def conv_feature(self, call: UNetCall, feature: Tensor) -> None:
        """Sees that feature, (batch, channels, height, width), where it is computed."""

    def descriptor(self, call: UNetCall, feature: Tensor) -> None:
        """Sees the output of the descriptor block, (batch, channels, height, width)."""

    def skip_made(self, number: int, skip: Tensor) -> None:
        """Sees the output of an encoder block, (batch, channels, height, width), which a decoder block will read."""

    def skip_wanted(self, number: int) -> None:
        """The next decoder block will read the output of encoder block ``number``."""


Tap = tuple[Layer, nn.Module]  # a self-attention and its place


def self_attentions(unet: nn.Module) -> Iterator[Tap]:
    """Every self-attention of a UNet with its place."""
    sections = {"input": unet.input_blocks, "middle": [unet.middle_block or ()], "output": unet.output_blocks}
    for section, blocks in sections.items():
        for number, block in enumerate(blocks):
            for transformer in (part for part in block if isinstance(part, SpatialTransformer)):
                for depth, inner in enumerate(transformer.transformer_blocks):
                    if not inner.disable_self_attn:
                        yield Layer(section, number, depth), inner.attn1


@contextmanager
def tapped(unet: nn.Module, family: UNetFamily):
    """Hold the hooks on ``unet``, but for blocks that somebody else holds.

    Every one is gone when the context is left, whatever the reason.
    """
    layouts = fast_blocks.HeldLayouts()
    undo = [layouts.release]

    def put(module: nn.Module, forward: Callable) -> None:
        undo.append(replace_method(module, "forward", forward))

    def attention_forward(layer: Layer, attn: nn.Module):
        original = attn.forward

        def forward(x, context=None, value=None, *args, **kwargs):
            call = _running.get()
            out = None if call is None else call.step_pass.self_attention(call, layer, attn, x, context, value)
            return original(x, context, value, *args, **kwargs) if out is None else out

        return forward

    def block_forward(block: nn.Module, attentions: list[Tap]):
        original = block.forward

        def forward(*args, **kwargs):
            call = _running.get()
            if call is None or kwargs:
                return original(*args, **kwargs)
            feature = call.step_pass.given_feature(call) if block is conv and conv_is_free else None
            if feature is not None:
                out = block.skip_connection(args[0]) + feature
            else:
                out = call.step_pass.block(call, block, attentions, original, args)
            if block in joining and not (block._forward_hooks or torch.is_grad_enabled()):
                # ComfyUI keeps it through the block, as large as three activations, and reads it no more
                args[0].set_()
            return out

        return forward

    def upsample_forward(block: Upsample):
        original = block.forward

        def forward(x, output_shape=None):
            call = _running.get()
            if call is None or not call.fast:
                return original(x, output_shape=output_shape)
            return fast_blocks.run_upsample(block, original, x, output_shape)

        return forward

    def out_forward(out: nn.Module):
        original = out.forward

        def forward(x):
            call = _running.get()
            return original(x) if call is None or not call.fast else fast_blocks.run_out(out, original, x)

        return forward

    def first_forward(first: nn.Module):
        original, fast_forwards = first.forward, count(1)

        def forward(*args, **kwargs):
            call = _running.get()
            if call is not None and call.fast and next(fast_forwards) == 2:  # for one it would be a copy more
                layouts.hold(unet, args[0])
            return original(*args, **kwargs)

        return forward

    def skips_forward(block: nn.Module, made: int | None, wanted: int | None):
        original = block.forward

        def forward(*args, **kwargs):
            out, call = original(*args, **kwargs), _running.get()
            if call is not None and made is not None:
                call.step_pass.skip_made(made, out)
            if call is not None and wanted is not None:
                call.step_pass.skip_wanted(wanted)
            return out

        return forward

    def conv_hook(module, args, output):
        call = _running.get()
        if call is None:
            return None
        call.step_pass.conv_feature(call, output)
        return call.step_pass.given_feature(call)

    def descriptor_hook(module, args, output):
        call = _running.get()
        if call is not None:
            call.step_pass.descriptor(call, output)

    conv = unet.output_blocks[family.conv_block][0]
    conv_is_free = not any(module._forward_hooks or module._forward_pre_hooks for module in conv.modules())
    # the first of a decoder block: what goes in was joined for it from the block before and a skip connection
    joining = {block[0] for block in unet.output_blocks if not (block._forward_hooks or block._forward_pre_hooks)}
    try:
        attentions = list(self_attentions(unet))
        for layer, attn in attentions:
            put(attn, attention_forward(layer, attn))
        for block in unet.modules():
            if type(block) in (ResBlock, SpatialTransformer) and "forward" not in vars(block):
                inside = set(block.modules())
                put(block, block_forward(block, [tap for tap in attentions if tap[1] in inside]))
            if type(block) is Upsample and "forward" not in vars(block):
                put(block, upsample_forward(block))
        if "forward" not in vars(unet.out):
            put(unet.out, out_forward(unet.out))
        put(unet.input_blocks[0][0], first_forward(unet.input_blocks[0][0]))
        if unet.middle_block is not None:
            for number, block in enumerate(unet.input_blocks):
                put(block[-1], skips_forward(block[-1], number, None))
            following = [unet.middle_block, *unet.output_blocks][:-1]
            for number, block in zip(reversed(range(len(unet.input_blocks))), following, strict=True):
                put(block[-1], skips_forward(block[-1], None, number))
        undo.append(conv.out_layers[-1].register_forward_hook(conv_hook).remove)
        undo.append(unet.output_blocks[family.descriptor_block][-1].register_forward_hook(descriptor_hook).remove)
        yield
    finally:
        for restore in reversed(undo):
            restore()


def replace_method(module: nn.Module, name: str, method: Callable) -> Callable[[], None]:
    """Give a module a method of its own; returns what takes it off again and puts back one that was there."""
    replaced = vars(module).get(name)
    setattr(module, name, method)

    def restore() -> None:
        vars(module).pop(name, None)
        if replaced is not None:
            setattr(module, name, replaced)

    return restore


def run_unet(executor, family: UNetFamily, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """Body of the DIFFUSION_MODEL wrapper: run a forward under the pass that its transformer options name.

    Args:
        x: (branches * frames, channels, height, width).
        args: timesteps, context, y, control, transformer_options, as ComfyUI passes them.
    """
    options = args[4]
    step_pass = options.get(PASS_KEY)
    if step_pass is None:
        return executor(x, *args, **kwargs)
    fast = fast_blocks.wanted(x)
    if fast or step_pass.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    branches = tuple(zip(options["uuids"], options["cond_or_uncond"], strict=True))
    repeated = args[1] if options.get(ALIKE_KEY) and not _prompts_may_change(options) else None
    prompts = None if repeated is None else (repeated, repeated[:: len(x) // len(branches)])
    call = UNetCall(step_pass, branches, tuple(x.shape[-2:]), family.levels, fast, prompts)
    token = _running.set(call)
    try:
        return executor(x, *args, **kwargs)
    except StopForward:
        return x.new_zeros(x.shape[0], executor.class_obj.out_channels, *x.shape[2:])
    finally:
        _running.reset(token)


def _prompts_may_change(options: dict) -> bool:
    """Whether another pack's wrapper may give the UNet other prompts than ComfyUI made of the conditioning."""
    wrappers = options.get("wrappers", {})
    return any(
        held and not str(key).startswith(PASS_KEY)
        for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
        for key, held in wrappers.get(kind, {}).items()
    )


def with_pass(model_options: dict, step_pass: UNetPass, conds: list) -> dict:
    """A copy of ``model_options`` whose forwards, of these processed ``conds``, run under ``step_pass``."""
    prompts = [cond["model_conds"].get("c_crossattn") for branch in conds for cond in branch or ()]
    alike = all(prompt is not None and prompt.cond.shape[0] == 1 for prompt in prompts)
    alike = alike and "model_function_wrapper" not in model_options  # which may give every frame another
    options = {**model_options["transformer_options"], PASS_KEY: step_pass, ALIKE_KEY: alike}
    return {**model_options, "transformer_options": options}


def split_branches(call: UNetCall, x: Tensor) -> list[tuple[object, Tensor]]:
    """The parts of a batch, each with its branch."""
    return list(zip(call.branches, torch.chunk(x, len(call.branches)), strict=True))
