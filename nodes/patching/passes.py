"""The passes of one sampling step: what each does at the UNet's self-attentions and at the injected ResBlock.

``StepState`` belongs to one evaluation of the model at one sigma. The joint passes fill it, the propagation passes
read it, and it is dropped with the evaluation.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...adaflow.attention import extended_attention, frame_attention
from ...adaflow.descriptors import Area
from ...adaflow.plan import EditPlan, Propagation
from ...adaflow.propagation import gather_outputs
from .compiled import BlockCompiler
from .families import UNetFamily
from .lockstep import Exchange
from .taps import Layer, StopForward, UNetCall, UNetPass, split_branches

# (keyframes, size, area) -> slot of each frame's keyframe and matches of its tokens, on the model's device
MatchTables = dict[tuple, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Injection:
    """What the source branch gives the others in this step (arXiv 2211.12572, section 4)."""

    conv: bool
    attention: bool


@dataclass
class SourceFeatures:
    """Activations of the source branch that are injected.

    Attributes:
        queries, keys: by layer, of the keyframes, chunk after chunk, (frames, tokens, channels).
        conv: branch-internal feature of the injected ResBlock: of the keyframes, chunk after chunk, in the joint pass;
            of the frames of the current chunk in propagation.
    """

    queries: dict[Layer, list[Tensor]] = field(default_factory=dict)
    keys: dict[Layer, list[Tensor]] = field(default_factory=dict)
    conv: list[Tensor] = field(default_factory=list)


@dataclass
class StepState:
    """What one step knows.

    Attributes:
        plan, budget, family: as the edit has them.
        keyframes: ascending, of this step.
        injection: what is injected in this step.
        areas: part of the latent that each conditioning (by uuid) is evaluated on; None is all of it.
        sources: features of the source branch by area.
        outputs: the keyframes' attention outputs, after the output projection, by (uuid, layer), chunk after chunk.
    """

    plan: EditPlan
    budget: int
    family: UNetFamily
    keyframes: tuple[int, ...]
    injection: Injection
    areas: dict[object, Area | None]
    sources: dict[Area | None, SourceFeatures] = field(default_factory=dict)
    outputs: dict[tuple[object, Layer], list[Tensor]] = field(default_factory=dict)

    def source(self, branch) -> SourceFeatures:
        """Source features of the area that conditioning ``branch`` is evaluated on."""
        return self.sources.setdefault(self.areas[branch], SourceFeatures())

    def injects_attention(self, layer: Layer) -> bool:
        return self.injection.attention and layer.section == "output" and layer.block in self.family.attention_blocks

    def keyframe_outputs(self, branch, layer: Layer) -> Tensor:
        """Attention outputs of all keyframes, (keyframes, tokens, channels)."""
        return _joined(self.outputs[branch, layer])

    def forget(self) -> None:
        """Drop what the joint passes stored, to run them again or to free the source's part of it."""
        self.sources.clear()
        self.outputs.clear()


def _joined(parts: list[Tensor]) -> Tensor:
    """The chunks of ``parts`` as one tensor, which replaces them."""
    if len(parts) > 1:
        parts[:] = [torch.cat(parts)]
    return parts[0]


def _inject_conv(state: StepState, call: UNetCall, feature: Tensor, chunk: int = 0) -> Tensor | None:
    if not state.injection.conv:
        return None
    return torch.cat([state.source(branch).conv[chunk].to(feature.dtype) for branch in call.branches])


class SourceJointPass(UNetPass):
    """A chunk of the source branch's keyframes: attention inside each frame; what will be injected is captured."""

    def __init__(self, state: StepState):
        self.state = state

    def conv_feature(self, call: UNetCall, feature: Tensor) -> None:
        for branch, part in split_branches(call, feature):
            self.state.source(branch).conv.append(part)
        if not self.state.injection.attention:
            raise StopForward

    def self_attention(self, call, layer, attn, x, context, value):
        call.layer_size(x.shape[1])  # raises where another patch changed the tokens
        q, k = attn.to_q(x), attn.to_k(x if context is None else context)
        if self.state.injects_attention(layer):
            for (branch, queries), (_, keys) in zip(split_branches(call, q), split_branches(call, k), strict=True):
                self.state.source(branch).queries.setdefault(layer, []).append(queries)
                self.state.source(branch).keys.setdefault(layer, []).append(keys)
        v = attn.to_v(_first(value, context, x))
        out = attn.to_out(frame_attention(q, k, v, attn.heads))
        if layer.section != "output" or layer.block < self.state.family.conv_block:  # all that propagation reads
            for branch, part in split_branches(call, out):
                self.state.outputs.setdefault((branch, layer), []).append(part)
        return out


class EditJointPass(UNetPass):
    """A chunk of the edit branches' keyframes: extended attention among all keyframes under the KV budget.

    Args:
        exchange: shared by the chunks of one joint pass.
        chunk: number of this chunk.
        rows: keyframes of this chunk.
    """

    def __init__(self, state: StepState, exchange: Exchange, chunk: int, rows: slice):
        self.state, self.exchange, self.chunk, self.rows = state, exchange, chunk, rows

    def conv_feature(self, call: UNetCall, feature: Tensor) -> Tensor | None:
        return _inject_conv(self.state, call, feature, self.chunk)

    def self_attention(self, call, layer, attn, x, context, value):
        state, size = self.state, call.layer_size(x.shape[1])
        v = attn.to_v(_first(value, context, x)).chunk(len(call.branches))
        if not state.injects_attention(layer):
            q = attn.to_q(x).chunk(len(call.branches))
            k = attn.to_k(x if context is None else context).chunk(len(call.branches))
        outs = []
        for row, branch in enumerate(call.branches):
            if state.injects_attention(layer):
                source = state.source(branch)
                queries, keys = source.queries[layer][self.chunk], _joined(source.keys[layer])
            else:
                queries, keys = q[row], self.exchange.swap((branch, layer, "k"), self.chunk, k[row])
            values = self.exchange.swap((branch, layer, "v"), self.chunk, v[row])
            kept = state.plan.kept(state.keyframes, state.budget, size, state.areas[branch])
            kept = None if kept is None else kept[self.rows].to(x.device)
            out = attn.to_out(extended_attention(queries, keys, values, attn.heads, kept))
            state.outputs.setdefault((branch, layer), []).append(out)
            outs.append(out)
        return torch.cat(outs)


class PropagationPass(UNetPass):
    """A chunk of frames: attention outputs are gathered from the keyframes', nothing of attention is computed.

    Args:
        tables: filled at need, and shared by the source's and the edit's pass over the same frames.
        compiler: runs the blocks that it can; None: none.
    """

    def __init__(
        self, state: StepState, where: Propagation, tables: MatchTables, compiler: BlockCompiler | None = None
    ):
        self.state, self.where, self._tables, self._compiler = state, where, tables, compiler
        self._slots = {frame: slot for slot, frame in enumerate(state.keyframes)}

    @property
    def channels_last(self) -> bool:
        return self._compiler is not None and not self._compiler.failed

    def block(self, call, block, attentions, forward, args):
        if self._compiler is None or not self._compiler.takes(block, args):
            return forward(*args)
        size = args[0].shape[2:].numel()
        outputs = {attn: self._output(call, layer, call.layer_size(size)) for layer, attn in attentions}
        return self._compiler.run(block, forward, args, outputs)

    def self_attention(self, call, layer, attn, x, context, value):
        return self._output(call, layer, call.layer_size(x.shape[1]))

    def _output(self, call: UNetCall, layer: Layer, size) -> Tensor:
        """Of one self-attention, (branches * frames, tokens, channels)."""
        parts = []
        for branch in call.branches:
            outputs, area = self.state.keyframe_outputs(branch, layer), self.state.areas[branch]
            out = self._gather(outputs, self.where.keyframes, size, area)
            if self.where.neighbours != self.where.keyframes:
                other = self._gather(outputs, self.where.neighbours, size, area)
                weights = torch.tensor(self.where.weights, device=out.device, dtype=out.dtype)[:, None, None]
                out = torch.lerp(other, out, weights)
            parts.append(out)
        return torch.cat(parts)

    def _gather(self, outputs: Tensor, keyframes: tuple[int, ...], size, area: Area | None) -> Tensor:
        key = (keyframes, size, area)
        if key not in self._tables:
            matches = self.state.plan.matches(list(self.where.frames), keyframes, size, area)
            slots = torch.tensor([self._slots[keyframe] for keyframe in keyframes])
            self._tables[key] = (slots.to(outputs.device), matches.to(outputs.device))
        return gather_outputs(outputs, *self._tables[key])


class SourcePropagationPass(PropagationPass):
    """The source branch of a chunk, up to the injected ResBlock and no further."""

    def conv_feature(self, call: UNetCall, feature: Tensor) -> None:
        for branch, part in split_branches(call, feature):
            self.state.source(branch).conv = [part]
        raise StopForward


class EditPropagationPass(PropagationPass):
    """The edit branches of a chunk, with the feature that :class:`SourcePropagationPass` took."""

    def conv_feature(self, call: UNetCall, feature: Tensor) -> Tensor | None:
        return _inject_conv(self.state, call, feature)


def _first(*tensors: Tensor | None) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)
