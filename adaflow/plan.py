"""EditPlan: clips, keyframe draws, KV selections and correspondences; what one edit knows before it samples."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .correspondence import matching_dtype
from .descriptors import Area, Descriptors, layer_sizes, resize_tokens
from .keyframes import Clips, KeyframeDraws
from .matching import BoundedCache, Matches, Size
from .memory import Room, to_device
from .propagation import blend_weight
from .slimming import select_kv_by_blocks

POOL_BYTES = 1 << 30  # of keyframes' descriptors held while tokens are selected; on a GPU a quarter of what is free
BLOCK_BYTES = 128 << 20  # of them in float32 that are compared in one go
COPIES = 16  # of a keyframe's maps to a GPU that may be on their way, each in pinned memory
KEPT_BYTES = 256 << 20  # of kept tokens that stay on the device; those of the last step always do


class KeyframePool:
    """Descriptors of keyframes at every resolution, as they are compared: some stay on the device.

    Those that stay are the first ones asked for, not the last ones: selection goes through all of them again and again.
    Between steps none does, since most steps draw other keyframes.

    Attributes:
        size: (height, width) of the latent, or of the part of it that is worked on.
        sizes: of all layers, the finest first.
    """

    def __init__(self, descriptors: Descriptors, area: Area | None, device: torch.device | str):
        self._descriptors, self._area, self.device = descriptors, area, device
        self._held: dict[int, list[Tensor]] = {}
        self._most, self._copies = 0, deque()
        self.size = descriptors.size if area is None else area[:2]
        self.sizes = layer_sizes(*self.size)

    @property
    def row_bytes(self) -> int:
        """Of one keyframe's map in float32."""
        return self._descriptors.shape[1] * self.size[0] * self.size[1] * 4

    @property
    def held_bytes(self) -> int:
        return len(self._held) * self.frame_bytes

    @property
    def frame_bytes(self) -> int:
        """Of one keyframe that stays."""
        tokens = sum(height * width for height, width in self.sizes)
        return tokens * self._descriptors.shape[1] * matching_dtype(self.device).itemsize

    def hold(self, most: int) -> None:
        """From now on hold at most so many bytes."""
        self._most = most
        while self._held and self.held_bytes > most:
            self._held.popitem()

    def tokens(self, frames: tuple[int, ...], level: int) -> Tensor:
        """(frames, tokens, channels) at one resolution, counted from the finest."""
        return torch.cat([self._tokens(frame, level) for frame in frames])

    def _tokens(self, frame: int, level: int) -> Tensor:
        if frame in self._held:
            return self._held[frame][level]
        maps = self._read(frame)
        dtype = matching_dtype(self.device)
        if self.held_bytes + self.frame_bytes > self._most:
            return resize_tokens(maps, self.sizes[level]).to(dtype)
        self._held[frame] = [resize_tokens(maps, size).to(dtype) for size in self.sizes]
        return self._held[frame][level]

    def _read(self, frame: int) -> Tensor:
        """Stored maps on the device, in float32; the copy to a GPU is not waited for."""
        maps = to_device(self._descriptors.stored([frame], self._area).contiguous(), torch.device(self.device))
        if maps.is_cuda:
            self._copies.append(torch.cuda.current_stream(self.device).record_event())
            if len(self._copies) > COPIES:
                self._copies.popleft().synchronize()
        return maps.float()


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
        self._kept, self._draws = BoundedCache(min(KEPT_BYTES, self.cache_bytes)), {}
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

    def matches_on(
        self, frames: list[int], keyframes: tuple[int, ...], area: Area | None, device: torch.device | str
    ) -> dict[Size, Tensor]:
        """The same at every resolution on a device: one copy, from pinned memory to a GPU, that nothing waits for.

        Returns:
            (height, width) of a layer -> (frames, height * width) int16 or int32, parts of one tensor.
        """
        return self._matches.on(frames, keyframes, area, device)

    def kept(self, keyframes: tuple[int, ...], budget: int, size: Size, area: Area | None = None) -> Tensor | None:
        """Flat indices of the keys and values that each keyframe keeps, or None for all.

        They are made for all resolutions together, without waiting for the device.

        Returns:
            (keyframes, budget * height * width) int32, on the plan's device; not to be written to.
        """
        if len(keyframes) <= budget:
            return None
        key = (keyframes, budget, area, str(self.device))
        kept = self._kept.get(key)
        if kept is None:
            kept = self._select(keyframes, budget, area)
            self._kept.put(key, kept)
        sizes = layer_sizes(*(self.descriptors.size if area is None else area[:2]))
        counts = [budget * len(keyframes) * height * width for height, width in sizes]
        return kept.split(counts)[sizes.index(size)].view(len(keyframes), -1)

    def selection_bytes(self, keyframes: int) -> int:
        """Of descriptors and importances, at the most, while so many keyframes' tokens are selected."""
        pool = KeyframePool(self.descriptors, None, self.device)
        finest = pool.size[0] * pool.size[1]
        held = min(keyframes * pool.frame_bytes, self._held_bytes(pool, keyframes))
        return held + 2 * self._room.block + 8 * keyframes * keyframes * finest

    def release(self) -> None:
        """Give back the device's memory; kept tokens are made again when asked for."""
        self._kept = BoundedCache(self._kept.max_bytes)

    def _select(self, keyframes: tuple[int, ...], budget: int, area: Area | None) -> Tensor:
        """The tokens kept at every resolution, one after the other in a row.

        Out of memory, it starts again with fewer keyframes at a time.
        """
        pool = KeyframePool(self.descriptors, area, self.device)
        while True:
            try:
                return self._select_by_blocks(pool, keyframes, budget)
            except RuntimeError as error:
                height, width = pool.size
                doing = f"to select tokens of {len(keyframes)} keyframes of {width}x{height} tokens"
                self._room.shrink(error, pool.row_bytes, len(keyframes), doing)

    def _select_by_blocks(self, pool: KeyframePool, keyframes: tuple[int, ...], budget: int) -> Tensor:
        pool.hold(self._held_bytes(pool, len(keyframes)))
        block, finest, found = self._room.rows(pool.row_bytes, len(keyframes)), pool.size[0] * pool.size[1], []
        for level, (height, width) in enumerate(pool.sizes):
            group = finest // (height * width)  # products are as large as the finest resolution's
            kept = select_kv_by_blocks(
                lambda rows, level=level: pool.tokens(keyframes[rows.start : rows.stop], level),
                len(keyframes),
                budget,
                block * group,
                group,
                self._room.held,
            )
            found.append(kept.flatten())
        return torch.cat(found)

    def _held_bytes(self, pool: KeyframePool, keyframes: int) -> int:
        """How much the pool may hold."""
        if self._room.held and torch.device(self.device).type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            return max(self._room.held, min(free // 4, keyframes * pool.frame_bytes))
        return self._room.held
