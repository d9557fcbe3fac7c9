"""Matches of every frame's tokens in its keyframes, made for many steps while a clip's descriptors are at hand.

Which token of a keyframe a token follows (arXiv 2502.05433, 3.4) depends on descriptors alone, and the keyframes of
every step are known before the first one.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .correspondence import index_dtype, matching_dtype, nearest_indices
from .descriptors import Area, Descriptors, layer_sizes, resize_tokens
from .keyframes import Clips
from .memory import Room

Size = tuple[int, int]
Pair = tuple[int, int]  # frame, keyframe
MATCH_FRAMES = 8  # resized together
CLIP_BYTES = 512 << 20  # of a clip's descriptors that are held at once; those of a longer clip are read as needed
KEYFRAME_BYTES = 512 << 20  # of keyframes' descriptors at every resolution that are held at once


class BoundedCache:
    """Tensors by key, the least recently used dropped beyond ``max_bytes``."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor at ``key``, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep a tensor that :meth:`get` did not have."""
        self._bytes += value.nbytes - (self._entries[key].nbytes if key in self._entries else 0)
        self._entries[key] = value
        while self._bytes > self.max_bytes and len(self._entries) > 1:
            self._bytes -= self._entries.popitem(last=False)[1].nbytes


class Matches:
    """Matches of frames in keyframes, made when first asked for and kept.

    Args:
        cache_bytes: of matches that are kept, in RAM.
        device: where they are made.

    Attributes:
        seconds: spent on making them.
    """

    def __init__(self, descriptors: Descriptors, clips: Clips, cache_bytes: int, device: torch.device | str = "cpu"):
        self._descriptors, self._clips, self._device = descriptors, clips, device
        self._cache, self._areas = BoundedCache(cache_bytes), set()
        self._room = Room(held=CLIP_BYTES, block=KEYFRAME_BYTES)
        self._draws: list[tuple[int, ...]] = []
        self._interpolate, self._between = False, lambda: None
        self.seconds = 0.0

    def expect(
        self, draws: Sequence[tuple[int, ...]], interpolate: bool, between: Callable[[], None] = lambda: None
    ) -> None:
        """Say which keyframes this step and those to come have: what is made next serves as many as the cache holds.

        Args:
            draws: ascending keyframes of each step.
            interpolate: whether frames are blended with the neighbouring clip's keyframe.
            between: called now and then while matches are made; may raise to stop.
        """
        self._draws, self._interpolate, self._between = list(draws), interpolate, between

    def of(self, frames: Sequence[int], keyframes: Sequence[int], size: Size, area: Area | None = None) -> Tensor:
        """Nearest token of each frame's keyframe, for each of the frame's tokens.

        Returns:
            (frames, height * width) int16 or int32, on the CPU.
        """
        sizes = layer_sizes(*self._size(area))
        first = sum(height * width for height, width in sizes[: sizes.index(size)])
        return torch.stack(self._rows(frames, keyframes, area))[:, first : first + size[0] * size[1]]

    def on(
        self, frames: Sequence[int], keyframes: Sequence[int], area: Area | None, device: torch.device | str
    ) -> dict[Size, Tensor]:
        """The same at every resolution on a device, with one copy to it that is not waited for.

        Returns:
            (height, width) -> (frames, height * width) int16 or int32, parts of one tensor.
        """
        rows = self._rows(frames, keyframes, area)
        sizes, on_gpu = layer_sizes(*self._size(area)), torch.device(device).type == "cuda"
        table = torch.empty(len(rows), len(rows[0]), dtype=rows[0].dtype, pin_memory=on_gpu)
        table = torch.stack(rows, out=table).to(device, non_blocking=on_gpu)
        parts = table.split([height * width for height, width in sizes], dim=1)
        return dict(reversed(list(zip(sizes, parts, strict=True))))  # the finest of equal sizes, as of() finds it

    def _rows(self, frames: Sequence[int], keyframes: Sequence[int], area: Area | None) -> list[Tensor]:
        """Of each pair the matches at all resolutions, one after the other."""
        pairs = list(zip(frames, keyframes, strict=True))
        rows = {pair: self._cache.get((*pair, area)) for pair in pairs}
        missing: dict[tuple[int, int], list[Pair]] = {}
        for frame, keyframe in (pair for pair, row in rows.items() if row is None):
            missing.setdefault((self._clips.of(frame), self._clips.of(keyframe)), []).append((frame, keyframe))
        if missing:
            started = time.perf_counter()
            self._areas.add(area)
            for (clip, other), asked in missing.items():
                rows |= self._make(clip, other, asked, area)
            self.seconds += time.perf_counter() - started
        return [rows[pair] for pair in pairs]

    def _size(self, area: Area | None) -> Size:
        return self._descriptors.size if area is None else area[:2]

    def _make(self, clip: int, other: int, asked: list[Pair], area: Area | None) -> dict[Pair, Tensor]:
        """Match frames of a clip with keyframes of the same or another one: those asked for and those expected.

        Out of memory, it goes on with fewer keyframes at a time.
        """
        expected = [pair for pair in self._expected(clip, other, area) if self._cache.get((*pair, area)) is None]
        pairs, made = dict.fromkeys(asked + expected), {}
        height, width = self._size(area)
        while left := [pair for pair in pairs if pair not in made]:
            try:
                self._make_by_blocks(clip, left, area, made)
            except RuntimeError as error:
                keyframes = len({keyframe for _, keyframe in left})
                doing = f"to match {MATCH_FRAMES} frames of {width}x{height} tokens with them"
                self._room.shrink(error, self._keyframe_bytes(area), keyframes, doing)
        for pair, row in made.items():
            self._cache.put((*pair, area), row)
        return {pair: made[pair] for pair in asked}

    def _make_by_blocks(self, clip: int, pairs: list[Pair], area: Area | None, made: dict[Pair, Tensor]) -> None:
        """Put the matches of ``pairs``, frames of one clip, into ``made``, with as many keyframes at a time as fit."""
        stored = self._reader(clip, area)
        keyframes = sorted({keyframe for _, keyframe in pairs})
        block = self._room.rows(self._keyframe_bytes(area), len(keyframes))
        coming = None  # rows on their way from the device, while the next ones are made
        for first in range(0, len(keyframes), block):
            tokens = {keyframe: self._tokens(stored([keyframe])) for keyframe in keyframes[first : first + block]}
            for frames in self._runs(clip):
                chosen = [pair for pair in pairs if pair[0] in frames and pair[1] in tokens]
                if chosen:
                    self._between()
                    queries = self._tokens(stored(list(frames)))
                    before, coming = coming, self._match(chosen, frames, queries, tokens)
                    made |= before() if before else {}
        made |= coming() if coming else {}

    def _keyframe_bytes(self, area: Area | None) -> int:
        """Of a keyframe's tokens at every resolution, as they are compared."""
        tokens = sum(height * width for height, width in layer_sizes(*self._size(area)))
        return tokens * self._descriptors.shape[1] * matching_dtype(self._device).itemsize

    def _expected(self, clip: int, other: int, area: Area | None) -> list[Pair]:
        """The pairs of two clips that the coming steps need, as many steps as the cache holds."""
        counts = [height * width for height, width in layer_sizes(*self._size(area))]
        step_bytes = self._clips.frames * sum(counts) * index_dtype(counts[0]).itemsize * (1 + self._interpolate)
        steps = max(1, self._cache.max_bytes // (step_bytes * len(self._areas)))
        found = []
        for draw in self._draws[:steps]:
            for frame in range(*self._clips.bounds(clip)):
                side = clip if not self._interpolate else clip + (1 if frame > draw[clip] else -1)
                if frame != draw[clip] and other in (clip, side):
                    found.append((frame, draw[other]))
        return found

    def _runs(self, clip: int) -> list[range]:
        """A clip's frames as they are resized together.

        They depend on the clip alone, not on what was matched before: a resumed run finds the bits of an unbroken one.
        """
        start, stop = self._clips.bounds(clip)
        return [range(first, min(first + MATCH_FRAMES, stop)) for first in range(start, stop, MATCH_FRAMES)]

    def _reader(self, clip: int, area: Area | None) -> Callable[[list[int]], Tensor]:
        """Frame numbers -> their stored maps on the device; those of the clip are read once, if they may be held."""
        start, stop = self._clips.bounds(clip)

        def read(frames: list[int]) -> Tensor:
            return self._descriptors.stored(frames, area, self._device)

        one = read([start])
        if one.nbytes * (stop - start) > self._room.held:
            return read
        held = read(list(range(start, stop)))

        def held_or_read(frames: list[int]) -> Tensor:
            inside = start <= frames[0] < stop
            return held[frames[0] - start : frames[-1] + 1 - start] if inside else read(frames)

        return held_or_read

    def _tokens(self, maps: Tensor) -> list[Tensor]:
        """At every resolution (frames, tokens, channels), as they are compared."""
        maps = maps.float()
        return [resize_tokens(maps, size).to(matching_dtype(maps.device)) for size in layer_sizes(*maps.shape[2:])]

    def _match(
        self, pairs: list[Pair], frames: range, queries: list[Tensor], keys: dict[int, list[Tensor]]
    ) -> Callable[[], dict[Pair, Tensor]]:
        """Each pair's matches at all resolutions, one after the other in a row, once the device has found them.

        At the coarse resolutions all ``frames`` are compared in one product, whichever are asked for: what is found
        does not depend on that.
        """
        counts = [level.shape[1] for level in queries]
        slots = {keyframe: slot for slot, keyframe in enumerate(dict.fromkeys(keyframe for _, keyframe in pairs))}
        table = queries[0].new_empty(len(slots), len(frames), sum(counts), dtype=index_dtype(counts[0]))
        for frame, keyframe in pairs:
            row = table[slots[keyframe], frame - frames.start]
            nearest_indices(queries[0][frame - frames.start], keys[keyframe][0][0], row[: counts[0]])
        for keyframe, slot in slots.items():
            for level, part in list(enumerate(table[slot].split(counts, dim=1)))[1:]:
                found = part.new_empty(part.numel())
                nearest_indices(queries[level].flatten(0, 1), keys[keyframe][level][0], found)
                part.copy_(found.view_as(part))
        copy, copied = table, None
        if table.is_cuda:
            copy = torch.empty(table.shape, dtype=table.dtype, pin_memory=True).copy_(table, non_blocking=True)
            copied = torch.cuda.current_stream(table.device).record_event()

        def rows() -> dict[Pair, Tensor]:
            if copied is not None:
                copied.synchronize()
            return {(f, k): copy[slots[k], f - frames.start].clone() for f, k in pairs}  # no views that keep all alive

        return rows
