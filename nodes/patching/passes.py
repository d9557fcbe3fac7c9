"""The passes of one sampling step: what each does at the UNet's self-attentions and at the injected ResBlock.

``StepState`` belongs to one evaluation of the model at one sigma. The joint passes fill it, the propagation passes
read it, and it is dropped with the evaluation.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...adaflow.attention import extended_attention, frame_attention
from ...adaflow.descriptors import Area
from ...adaflow.memory import to_device
from ...adaflow.plan import EditPlan, Propagation
from ...adaflow.propagation import gather_outputs, output_rows
from .compiled import BlockCompiler
from .families import UNetFamily
from .lockstep import Exchange
from .parking import ParkedSkips
from .shelf import Shelf
from .taps import Layer, StopForward, UNetCall, UNetPass, split_branches


@dataclass(frozen=True)
class Injection:
    """What the source branch gives the others in this step (arXiv 2211.12572, section 4)."""

    conv: bool
    attention: bool


@dataclass
class StepState:
    """What one step knows.

    Attributes:
        plan, budget, family: as the edit has them.
        keyframes: ascending, of this step.
        injection: what is injected in this step.
        areas: part of the latent that each branch (of :class:`UNetCall`) is evaluated on; None is all of it.
        shelf: activations of the keyframes: ("output", branch, layer), attention outputs after the output projection;
            ("query", area, layer), ("key", area, layer) and ("conv", area), the source branch's that are injected.
        conv: the source branch's feature of the injected ResBlock, of the frames that are propagated next.
    """

    plan: EditPlan
    budget: int
    family: UNetFamily
    keyframes: tuple[int, ...]
    injection: Injection
    areas: dict[object, Area | None]
    shelf: Shelf
    conv: "SourceFeatures" = field(default_factory=lambda: SourceFeatures())

    def injects_attention(self, layer: Layer) -> bool:
        return self.injection.attention and layer.section == "output" and layer.block in self.family.attention_blocks


class SourceFeatures:
    """A feature of the source branch, of some frames, by area."""

    def __init__(self):
        self._rows: dict[int, int] = {}
        self._by_area: dict[Area | None, Tensor] = {}

    def holds(self, frames: Iterable[int]) -> bool:
        """Whether those of all ``frames`` are here."""
        return bool(self._by_area) and all(frame in self._rows for frame in frames)

    def put(self, frames: Iterable[int], area: Area | None, features: Tensor) -> None:
        """Take those of ``frames``, the same for all areas, (frames, channels, height, width)."""
        self._rows = {frame: row for row, frame in enumerate(frames)}
        self._by_area[area] = features

    def of(self, frames: Iterable[int], area: Area | None) -> Tensor:
        """Those of ``frames``, which may come more than once."""
        features, rows = self._by_area[area], [self._rows[frame] for frame in frames]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return features[rows[0] : rows[0] + len(rows)]
        return features.index_select(0, to_device(torch.tensor(rows), features.device))

    def clear(self) -> None:
        """Forget all."""
        self._rows, self._by_area = {}, {}


class SourceJointPass(UNetPass):
    """A chunk of the source branch's keyframes: attention inside each frame; what will be injected is captured."""

    def __init__(self, state: StepState):
        self.state = state

    def conv_feature(self, call: UNetCall, feature: Tensor) -> None:
        for branch, part in split_branches(call, feature):
            self.state.shelf.put(("conv", self.state.areas[branch]), part)
        if not self.state.injection.attention:
            raise StopForward

    def self_attention(self, call, layer, attn, x, context, value):
        call.layer_size(x.shape[1])  # raises where another patch changed the tokens
        q, k = attn.to_q(x), attn.to_k(x if context is None else context)
        if self.state.injects_attention(layer):
            for kind, tensor in (("query", q), ("key", k)):
                for branch, part in split_branches(call, tensor):
                    self.state.shelf.put((kind, self.state.areas[branch], layer), part)
        v = attn.to_v(_first(value, context, x))
        out = attn.to_out(frame_attention(q, k, v, attn.heads))
        if layer.section != "output" or layer.block < self.state.family.conv_block:  # all that propagation reads
            for branch, part in split_branches(call, out):
                self.state.shelf.put(("output", branch, layer), part)
        return out


class EditJointPass(UNetPass):
    """A chunk of the edit branches' keyframes: extended attention among all keyframes under the KV budget.

    Args:
        exchange: shared by the chunks of one joint pass.
        chunk: number of this chunk.
        rows: keyframes of this chunk.
        last: whether no forward after this one takes what was captured of this chunk's source.
        parked: where the chunk's skip connections go while it waits for others; None: they stay.
    """

    def __init__(
        self, state: StepState, exchange: Exchange, chunk: int, rows: slice, last: bool, parked: ParkedSkips | None
    ):
        self.state, self.exchange, self.chunk, self.rows, self.last = state, exchange, chunk, rows, last
        self.parked = parked

    def skip_made(self, number: int, skip: Tensor) -> None:
        if self.parked is not None:
            self.parked.made(number, skip)

    def skip_wanted(self, number: int) -> None:
        if self.parked is not None:
            self.parked.come_back(number)

    def given_feature(self, call: UNetCall) -> Tensor | None:
        return torch.cat(self._captured(call, "conv")) if self.state.injection.conv else None

    def _captured(self, call: UNetCall, kind: str, *layer: Layer) -> list[Tensor]:
        """What :class:`SourceJointPass` captured of this chunk, for each branch."""
        keys = [(kind, self.state.areas[branch], *layer) for branch in call.branches]
        captured = [self.state.shelf.chunk(key, self.chunk) for key in keys]
        if self.last:
            for key in set(keys):
                self.state.shelf.forget(key, self.chunk)
        return captured

    def self_attention(self, call, layer, attn, x, context, value):
        state, size = self.state, call.layer_size(x.shape[1])
        injected = state.injects_attention(layer)

        def publish(kind: str, parts) -> None:
            for branch, part in zip(call.branches, parts, strict=True):
                self.exchange.publish((branch, layer, kind), self.chunk, part)

        def taken(kind: str) -> list[Tensor]:
            return [self.exchange.take((branch, layer, kind)) for branch in call.branches]

        def split(projected: Tensor) -> tuple[Tensor, ...]:
            return projected.chunk(len(call.branches))

        def own_keys() -> tuple[Tensor, ...]:
            return split(attn.to_k(x if context is None else context))

        if self.parked is not None:
            self.parked.leave()
        self.exchange.meet()  # here nobody holds keys and values of the layer before any more
        publish("k", self._captured(call, "key", layer) if injected else own_keys())
        publish("v", split(attn.to_v(_first(value, context, x))))
        self.exchange.meet()
        keys, values = taken("k"), taken("v")
        # made last: while other chunks are waited for, every chunk would hold its own
        queries = self._captured(call, "query", layer) if injected else split(attn.to_q(x))
        outs = []
        for branch, *qkv in zip(call.branches, queries, keys, values, strict=True):
            kept = state.plan.kept(state.keyframes, state.budget, size, state.areas[branch])
            kept = None if kept is None else kept[self.rows].to(x.device)
            out = attn.to_out(extended_attention(*qkv, attn.heads, kept))
            state.shelf.put(("output", branch, layer), out)
            outs.append(out)
        return torch.cat(outs)


class PropagationPass(UNetPass):
    """A chunk of frames: attention outputs are gathered from the keyframes', nothing of attention is computed.

    Args:
        compiler: runs the blocks that it can; None: none.
    """

    def __init__(self, state: StepState, where: Propagation, compiler: BlockCompiler | None = None):
        self.state, self.where, self._compiler = state, where, compiler
        # (keyframes, size, area) -> rows of the keyframes' outputs that the frames take, on the model's device
        self._tables: dict[tuple, Tensor] = {}
        self._slots = {frame: slot for slot, frame in enumerate(state.keyframes)}
        used = [self._slots[keyframe] for keyframe in (*where.keyframes, *where.neighbours)]
        self._first, self._stop = min(used), max(used) + 1
        self._weights: Tensor | None = None

    @property
    def channels_last(self) -> bool:
        return self._compiler is not None and not self._compiler.failed

    def block(self, call, block, attentions, forward, args):
        if self._compiler is None or not self._compiler.takes(block, args):
            return super().block(call, block, attentions, forward, args)
        size = args[0].shape[2:].numel()
        outputs = {attn: self._output(call, layer, call.layer_size(size)) for layer, attn in attentions}
        return self._compiler.run(block, forward, args, outputs)

    def self_attention(self, call, layer, attn, x, context, value):
        return self.given(call, layer, x.shape[1])

    def given(self, call, layer, tokens):
        return self._output(call, layer, call.layer_size(tokens))

    def _output(self, call: UNetCall, layer: Layer, size) -> Tensor:
        """Of one self-attention, (branches * frames, tokens, channels)."""
        out = None
        for number, branch in enumerate(call.branches):
            outputs = self.state.shelf.rows(("output", branch, layer), self._first, self._stop)
            if out is None:
                out = outputs.new_empty(len(call.branches), len(self.where.frames), *outputs.shape[1:])
            area = self.state.areas[branch]
            gather_outputs(outputs, self._rows(self.where.keyframes, size, area, outputs.device), out[number])
            if self.where.neighbours != self.where.keyframes:
                other = gather_outputs(outputs, self._rows(self.where.neighbours, size, area, outputs.device))
                torch.lerp(other, out[number], self._blend(out), out=out[number])
        return out.flatten(0, 1)

    def _rows(self, keyframes: tuple[int, ...], size, area: Area | None, device: torch.device) -> Tensor:
        key = (keyframes, size, area)
        if key not in self._tables:
            slots = to_device(torch.tensor([self._slots[keyframe] - self._first for keyframe in keyframes]), device)
            matches = self.state.plan.matches_on(list(self.where.frames), keyframes, area, device)
            self._tables |= {(keyframes, size, area): output_rows(slots, found) for size, found in matches.items()}
        return self._tables[key]

    def _blend(self, like: Tensor) -> Tensor:
        """Weight of each frame's own keyframe, (frames, 1, 1)."""
        if self._weights is None:
            weights = torch.tensor(self.where.weights, dtype=like.dtype)
            self._weights = to_device(weights, like.device)[:, None, None]
        return self._weights


class SourcePropagationPass(PropagationPass):
    """The source branch of a chunk, up to the injected ResBlock and no further."""

    def conv_feature(self, call: UNetCall, feature: Tensor) -> None:
        for branch, part in split_branches(call, feature):
            self.state.conv.put(self.where.frames, self.state.areas[branch], part)
        raise StopForward


class EditPropagationPass(PropagationPass):
    """The edit branches of a chunk, with the feature that :class:`SourcePropagationPass` took."""

    def given_feature(self, call: UNetCall) -> Tensor | None:
        if not self.state.injection.conv:
            return None
        areas = [self.state.areas[branch] for branch in call.branches]
        return torch.cat([self.state.conv.of(self.where.frames, area) for area in areas])


def _first(*tensors: Tensor | None) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)
