"""EditPlan: clips, keyframe draws, KV selections and correspondences; what one edit knows before it samples."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .correspondence import matching_dtype
from .descriptors import Area, Descriptors, layer_sizes, resize_tokens
from .keyframes import Clips, KeyframeDraws
from .matching import BoundedCache, Matches, Size
from .memory import Room
from .propagation import blend_weight
from .slimming import select_kv_by_blocks

POOL_BYTES = 1 << 30  # of keyframes' descriptors held while tokens are selected
BLOCK_BYTES = 128 << 20  # of them in float32 that are compared in one go


class KeyframePool:
    """Descriptor maps of some keyframes: the first ones stay on the device, the others are read whenever asked for.

    Args:
        keyframes: frame numbers; a row is a place in them.
        max_bytes: of the maps that stay.
        block_bytes: of the maps in float32 that should be asked for at a time.

    Attributes:
        size: (height, width) of the maps.
        block: rows to ask for at a time.
    """

    def __init__(
        self,
        descriptors: Descriptors,
        keyframes: tuple[int, ...],
        area: Area | None,
        device,
        max_bytes: int = POOL_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ):
        self._descriptors, self._keyframes, self._area, self._device = descriptors, keyframes, area, device
        self._free, self._held = max_bytes, {}
        self.size = descriptors.size if area is None else area[:2]
        self.block = max(1, block_bytes // self.row_bytes(descriptors, area))

    @staticmethod
    def row_bytes(descriptors: Descriptors, area: Area | None) -> int:
        """Of one keyframe's map in float32."""
        height, width = descriptors.size if area is None else area[:2]
        return descriptors.shape[1] * height * width * 4

    def maps(self, rows: list[int]) -> Tensor:
        """(rows, channels, height, width) float32."""
        return torch.cat([self._map(row) for row in rows]).float()

    def _map(self, row: int) -> Tensor:
        if row in self._held:
            return self._held[row]
        values = self._descriptors.stored([self._keyframes[row]], self._area, self._device)
        if values.nbytes <= self._free:
            self._free -= values.nbytes
            self._held[row] = values = values.clone()  # not a part of the file's memory map
        return values


@dataclass(frozen=True)
class Propagation:
    """Which keyframes each of some frames takes its attention outputs from.

    Attributes:
        frames: frame numbers.
        keyframes: for each frame, its keyframe.
        neighbours: for each frame, the keyframe it is blended with, or its own keyframe again where there is none.
        weights: for each frame, the weight of ``keyframes``'s output; 1 where there is no neighbour.
    """

    frames: tuple[int, ...]
    keyframes: tuple[int, ...]
    neighbours: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass
class EditPlan:
    """What the method decides from the descriptors alone, before any sampling.

    Matches and selections depend on descriptors only, so they are made once for each keyframe, when first asked for,
    and kept.

    Args:
        descriptors: of all frames.
        clips: where the content changes.
        draws: which keyframes each step uses.
    """

    descriptors: Descriptors
    clips: Clips
    draws: KeyframeDraws
    cache_bytes: int = 1 << 30
    device: torch.device | str = "cpu"
    _matches: Matches = field(init=False, repr=False)
    _kept: BoundedCache = field(init=False, repr=False)
    _room: Room = field(init=False, repr=False)
    _draws: dict[int, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self):
        if self.clips.frames != self.descriptors.frames:
            raise ValueError(f"clips of {self.clips.frames} frames, descriptors of {self.descriptors.frames}")
        self.draws.check(self.clips)
        self._matches = Matches(self.descriptors, self.clips, self.cache_bytes, self.device)
        self._kept, self._draws = BoundedCache(self.cache_bytes), {}
        self._room = Room(held=POOL_BYTES, block=BLOCK_BYTES)

    @property
    def frames(self) -> int:
        return self.clips.frames

    def keyframes(self, step: int) -> tuple[int, ...]:
        """Ascending keyframes of a sampling step, one for each clip."""
        if step not in self._draws:
            self._draws[step] = self.draws.at(step, self.clips)
        return self._draws[step]

    def expect(self, steps: range, interpolate: bool, between: Callable[[], None] = lambda: None) -> None:
        """Say which steps are being sampled, so that matches for all of them are made with one reading of a clip.

        Args:
            between: called now and then while matches are made; may raise to stop.
        """
        self._matches.expect([self.keyframes(step) for step in steps], interpolate, between)

    @property
    def matching_seconds(self) -> float:
        """Spent on matches so far."""
        return self._matches.seconds

    def propagation(self, frames: list[int], keyframes: tuple[int, ...], interpolate: bool) -> Propagation:
        """Where ``frames`` take their outputs from, given a step's ascending ``keyframes``.

        With ``interpolate`` a frame is blended with the keyframe of the neighbouring clip on its other side
        (arXiv 2307.10373, section 4.2); the frames before the first and after the last keyframe have none.
        """
        own = [keyframes[self.clips.of(frame)] for frame in frames]
        neighbours, weights = list(own), [1.0] * len(frames)
        if interpolate:
            for row, (frame, keyframe) in enumerate(zip(frames, own, strict=True)):
                other = self.clips.of(frame) + (1 if frame > keyframe else -1)
                if frame != keyframe and 0 <= other < len(keyframes):
                    neighbours[row] = keyframes[other]
                    weights[row] = blend_weight(frame, keyframe, keyframes[other])
        return Propagation(tuple(frames), tuple(own), tuple(neighbours), tuple(weights))

    def matches(self, frames: list[int], keyframes: tuple[int, ...], size: Size, area: Area | None = None) -> Tensor:
        """Nearest token of each frame's keyframe, for each of the frame's tokens.

        Args:
            frames: frame numbers.
            keyframes: keyframe of each frame.
            size: (height, width) of the layer.
            area: part of the latent the layer works on.

        Returns:
            (frames, height * width) int16 or int32, on the CPU.
        """
        return self._matches.of(frames, keyframes, size, area)

    def kept(self, keyframes: tuple[int, ...], budget: int, size: Size, area: Area | None = None) -> Tensor | None:
        """Flat indices of the keys and values that each keyframe keeps, or None for all.

        Returns:
            (keyframes, budget * height * width) int32, on the CPU.
        """
        if len(keyframes) <= budget:
            return None
        kept = self._kept.get((keyframes, budget, size, area))
        return self._select(keyframes, budget, area)[size] if kept is None else kept

    def _select(self, keyframes: tuple[int, ...], budget: int, area: Area | None) -> dict[Size, Tensor]:
        """Select keys and values at every resolution, the descriptors read once, and keep all.

        Out of memory, it starts again with fewer keyframes at a time.
        """
        while True:
            try:
                found = self._select_by_blocks(keyframes, budget, area)
                break
            except RuntimeError as error:
                height, width = self.descriptors.size if area is None else area[:2]
                doing = f"to select tokens of {len(keyframes)} keyframes of {width}x{height} tokens"
                self._room.shrink(error, KeyframePool.row_bytes(self.descriptors, area), len(keyframes), doing)
        for size, part in found.items():
            self._kept.put((keyframes, budget, size, area), part)
        return found

    def _select_by_blocks(self, keyframes: tuple[int, ...], budget: int, area: Area | None) -> dict[Size, Tensor]:
        pool = KeyframePool(self.descriptors, keyframes, area, self.device, self._room.held, self._room.block)
        sizes = layer_sizes(*pool.size)

        def tokens(rows: list[int]) -> list[Tensor]:
            levels = None
            for place, row in enumerate(rows):  # resized one by one: the bits do not depend on the block
                maps = pool.maps([row])
                dtype = matching_dtype(maps.device)
                if levels is None:
                    levels = [maps.new_empty(len(rows), h * w, maps.shape[1], dtype=dtype) for h, w in sizes]
                for level, size in zip(levels, sizes, strict=True):
                    level[place] = resize_tokens(maps, size)[0]
            return levels

        kept = select_kv_by_blocks(tokens, len(keyframes), budget, pool.block)
        return {size: part.cpu() for size, part in zip(sizes, kept, strict=True)}
