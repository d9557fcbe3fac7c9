"""Compiled forwards for propagation: a UNet's ResBlocks and transformers, one by one, through torch.compile.

Block by block, because what ComfyUI does between them (ControlNet residuals, skip connections, other packs' patches)
then stays as it is. A transformer is given its self-attentions' outputs, which propagation only gathers.
"""

import logging
import traceback
import types
from collections.abc import Callable
from contextlib import contextmanager

import comfy.model_management
import torch
from torch import Tensor, nn

from ...adaflow.attention import frame_attention
from ...adaflow.memory import is_out_of_memory
from .fast_blocks import BLOCK_PATCHES
from .taps import replace_method

logger = logging.getLogger(__name__)
BACKEND = "inductor"
LONGEST_REASON = 300


class BlockCompiler:
    """Compiles blocks when first asked for, and forgets them when it is closed.

    Blocks that do what a compiled form would miss run as they are; when the compiler itself fails all do, with a
    message.

    Args:
        tell: gets a line for the user.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.failed = False
        self._tell = tell
        self._built: dict[nn.Module, _Built] = {}
        self._compiled: dict[tuple, tuple[Callable, Callable]] = {}

    def takes(self, block: nn.Module, args: tuple) -> bool:
        """Whether ``block`` can be :meth:`run` compiled as it is now: see :class:`_Built`."""
        if self.failed:
            return False
        if block not in self._built:
            self._built[block] = _Built(block)
        return self._built[block].is_plain(args)

    def run(self, block: nn.Module, forward: Callable, args: tuple, outputs: dict[nn.Module, Tensor]) -> Tensor:
        """The output of ``block``.

        Args:
            forward: its own.
            args: of that: ``(x, emb)`` of a ResBlock, ``(x, context, transformer_options)`` of a SpatialTransformer.
            outputs: by self-attention of the block, after its output projection, (batch, tokens, channels).
        """
        try:
            if not outputs:
                return self._function(_res_block, block, args[0])(block, *args)
            with _passed_through(outputs):
                return self._function(_transformer, block, args[0])(block, *args[:2], tuple(outputs.values()))
        except Exception as error:  # whatever a compiler raises that is missing, or fails
            if is_out_of_memory(error) or isinstance(error, comfy.model_management.InterruptProcessingException):
                raise
            self._give_up(error)
        return forward(*args)

    def close(self) -> None:
        """Drop everything compiled: torch.compile keeps it with the code objects until it is told."""
        for own, _ in self._compiled.values():
            torch._dynamo.reset_code(own.__code__)
        self._compiled.clear()

    def _function(self, function: Callable, block: nn.Module, x: Tensor) -> Callable:
        """The compiled form of ``function``, for blocks built like this one and inputs of this shape."""
        key = self._built[block].structure, tuple(x.shape), x.dtype
        if key not in self._compiled:
            if not self._compiled:
                self._tell("compiling the propagation, which makes the first step slow")
            own = _own_code(function)
            self._compiled[key] = own, torch.compile(own, backend=BACKEND, fullgraph=True, dynamic=False)
        return self._compiled[key][1]

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        self.close()
        trace = "".join(traceback.format_exception(error))  # as text: a record of the log would keep what it holds
        logger.warning("AdaFlow: torch.compile failed\n%s", trace)
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        self._tell(f"the propagation runs uncompiled, since torch.compile failed: {reason}")


class _Built:
    """How a block is built.

    Attributes:
        structure: the same for blocks built alike.
    """

    def __init__(self, block: nn.Module):
        self.structure = repr(block)
        self._modules = list(block.modules())
        self._self_attends = all(not part.disable_self_attn for part in getattr(block, "transformer_blocks", ()))

    def is_plain(self, args: tuple) -> bool:
        """Whether no patch, hook or weight made on the fly acts inside, and the weights are where the input is."""
        options = args[2] if len(args) > 2 else {}
        if "optimized_attention_override" in options or set(options.get("patches", ())) & BLOCK_PATCHES:
            return False
        if any(options.get("patches_replace", {}).get(kind) for kind in ("attn1", "attn2")):
            return False
        return self._self_attends and not any(_is_special(module, args[0].device) for module in self._modules)


def _is_special(module: nn.Module, device: torch.device) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    if getattr(module, "weight_function", None) or getattr(module, "bias_function", None):
        return True
    return any(weight is not None and weight.device != device for weight in module._parameters.values())


def _own_code(function: Callable) -> Callable:
    """A copy with a code object of its own, since torch.compile limits how many forms one may have."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _res_block(block, x, emb):
    return type(block).forward(block, x, emb)


def _transformer(block, x, context, outputs):
    """A SpatialTransformer's forward, by patches of ComfyUI's kind: ``outputs`` are those of its self-attentions."""
    options = {
        "block": ("output", 0),
        "given": outputs,
        "patches": {"attn1_patch": [_give]},
        "patches_replace": {"attn2": {("output", 0): _cross_attention}},
    }
    return type(block).forward(block, x, context, options)


def _give(n, context, value, options):
    return options["given"][options["block_index"]], None, None


def _cross_attention(q, k, v, options):
    return frame_attention(q, k, v, options["n_heads"])


def _first(x, *args, **kwargs):
    return x


@contextmanager
def _passed_through(attentions):
    """While held, these return their input."""
    undo = [replace_method(attn, "forward", _first) for attn in attentions]
    try:
        yield
    finally:
        for restore in undo:
            restore()
