"""Video files read as a stream: what a file holds, and a range of its frames decoded chunk by chunk.

Nothing here holds more than two chunks of decoded frames, one in use and one ahead, whatever the length of the clip.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from .errors import InputError, require
from .video_decode import Scaler, ahead, decoded, first, frame_times, open_video, packet_times, sound_of, start_of

SHRINK_PRICE = 0.2
"""How much of an aspect error one e-fold of lost size is worth in :func:`fit_size`."""

LONGEST_GAP = 60.0
"""Seconds between two frames beyond which their times are taken for damaged."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself, checked by decoding its first frame.

    ``width`` and ``height`` are as shown: after the display matrix's rotation and with square pixels. ``frame_count``
    is the number the container declares, None where it declares none; a truncated file declares more than it holds,
    so :meth:`VideoClip.count` measures. ``start`` is the first frame's time in the file, in seconds. ``rotation`` is
    in quarter turns counter-clockwise.
    """

    path: Path
    width: int
    height: int
    frame_count: int | None
    fps: Fraction
    has_audio: bool
    codec: str
    pixel_format: str
    container: str
    start: float
    rotation: int


def _frame_rate(container, stream) -> Fraction | None:
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate:
            return Fraction(rate)
    if stream.frames and container.duration:
        return Fraction(stream.frames * av.time_base, container.duration).limit_denominator(1001)
    return None


def probe(path: str | Path, where: str = "probe") -> VideoInfo:
    """Open a file, decode its first frame and say what it holds.

    Raises:
        InputError: the file is missing, empty, no video, audio only, or not one frame of it decodes.
    """
    path = Path(path)
    with open_video(path, where) as (container, stream):
        frame = next(decoded(container, stream), None)
        if frame is None:
            raise InputError(where, "file", f"'{path.name}', of which no frame decodes", "a video that can be read")
        rate = _frame_rate(container, stream)
        if rate is None:
            raise InputError(where, "file", f"'{path.name}', which states no frame rate", "a video with a frame rate")
        width, height = frame.width, frame.height
        pixel_aspect = stream.sample_aspect_ratio
        if pixel_aspect and pixel_aspect > 0:
            width = max(1, round(width * pixel_aspect))
        rotation = round(frame.rotation / 90) % 4
        if rotation % 2:
            width, height = height, width
        return VideoInfo(
            path=path,
            width=width,
            height=height,
            frame_count=stream.frames or None,
            fps=rate,
            has_audio=sound_of(container) is not None,
            codec=stream.codec_context.name,
            pixel_format=frame.format.name,
            container=container.format.name,
            start=start_of(stream),
            rotation=rotation,
        )


def fit_size(width: int, height: int, size_limit: int, multiple: int = 64) -> tuple[int, int]:
    """Choose ``(width, height)`` in multiples of ``multiple`` whose longer side is at most ``size_limit`` pixels.

    Keeps the aspect ratio as closely as the multiples allow, giving up a little size for it; never enlarges beyond the
    next multiple. ``size_limit`` 0 rounds each side of the source to its nearest multiple.
    """
    require(width > 0 and height > 0, "fit_size", "width, height", f"{width}x{height}", "positive pixel numbers")
    if size_limit == 0:
        return tuple(max(multiple, round(side / multiple) * multiple) for side in (width, height))
    require(size_limit >= multiple, "fit_size", "size", f"{size_limit} pixels", f"0, or at least {multiple} pixels")
    limit = max(multiple, min(size_limit, max(width, height)) // multiple * multiple)
    aspect = width / height
    best = None
    for long_side in range(multiple, limit + 1, multiple):
        short_side = long_side / max(aspect, 1 / aspect) / multiple
        for steps in {max(1, math.floor(short_side)), max(1, math.ceil(short_side))}:
            size = (long_side, steps * multiple) if aspect >= 1 else (steps * multiple, long_side)
            cost = abs(math.log(size[0] / size[1] / aspect)) + SHRINK_PRICE * math.log(limit / long_side)
            if best is None or (cost, -size[0] * size[1]) < best[0]:
                best = ((cost, -size[0] * size[1]), size)
    return best[1]


def rhythm(times: list[float | None], stated: Fraction) -> tuple[Fraction, np.ndarray | None]:
    """Frames per second of frames shown at ``times``, and these times, from 0, if the frame rate varies.

    Args:
        times: of the frames in the order they are shown, seconds; where they are unusable, ``stated`` counts.
        stated: frames per second, kept if no frame strays by more than half a frame from it.
    """
    if len(times) < 3 or not _usable(times):
        return stated, None
    passed = np.asarray(times) - times[0]
    rate = Fraction(float((len(times) - 1) / passed[-1])).limit_denominator(1001)
    for even in (stated, rate):
        if np.abs(passed - np.arange(len(times)) / float(even)).max() <= 0.5 / even:
            return even, None
    return rate, passed


def _usable(times: list[float | None]) -> bool:
    if None in times:
        return False
    gaps = np.diff(times)
    return bool((gaps > 0).all() and (gaps < LONGEST_GAP).all())


@dataclass(frozen=True)
class _Range:
    """What a clip's range holds: ``start`` in seconds after the file's first frame, the rest as the clip gives it."""

    count: int
    start: float
    fps: Fraction
    times: np.ndarray | None


@dataclass
class VideoClip:
    """A range of a video file's frames, resized, decoded when asked for.

    Args:
        info: the file, from :func:`probe`.
        first_frame: the first frame's index in the file.
        frame_count: how many frames the clip has; 0 takes all to the end.
        stride: every stride-th frame of the file is taken.
        size: ``(width, height)`` in pixels; None keeps the file's.
        where: the node named in errors.
    """

    info: VideoInfo
    first_frame: int = 0
    frame_count: int = 0
    stride: int = 1
    size: tuple[int, int] | None = None
    where: str = "VideoClip"
    _known: _Range | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self):
        require(self.first_frame >= 0, self.where, "first_frame", self.first_frame, "0 or more")
        require(self.frame_count >= 0, self.where, "frame_count", self.frame_count, "1 or more, or 0 for all")
        require(self.stride >= 1, self.where, "stride", self.stride, "1 or more")
        if self.size is None:
            self.size = (self.info.width, self.info.height)

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.size[1]

    @property
    def fps(self) -> Fraction:
        """Frames per second at which the clip plays as fast as its source; the mean where the rate varies."""
        return self._range().fps

    def times(self) -> np.ndarray | None:
        """Seconds of each frame after the clip's first, where the file's frame rate varies; None where it does not."""
        return self._range().times

    @property
    def whole(self) -> bool:
        """Whether the clip is its file, unchanged."""
        natural = self.size == (self.info.width, self.info.height)
        return natural and self.first_frame == 0 and self.stride == 1 and self.frame_count == 0

    def audio_range(self) -> tuple[float, float]:
        """``(start, duration)`` in seconds from the file's first frame: the sound that belongs to the clip."""
        known = self._range()
        length = known.count / known.fps if known.times is None else known.times[-1] + 1 / known.fps
        return known.start, float(length)

    def sub(self, first_frame: int = 0, frame_count: int = 0, stride: int = 1, size: tuple[int, int] | None = None):
        """A clip of this clip, in this clip's frame numbers. Raises :class:`InputError` if it does not lie within."""
        left = self.count() - first_frame
        require(left > 0, self.where, "first_frame", first_frame, f"less than the clip's {self.count()} frames")
        most = -(-left // stride)
        require(frame_count <= most, self.where, "frame_count", frame_count, f"at most {most} in this range")
        return replace(
            self,
            first_frame=self.first_frame + first_frame * self.stride,
            frame_count=frame_count or most,
            stride=self.stride * stride,
            size=size or self.size,
        )

    def fingerprint(self) -> str:
        """A short text that changes with the file's content, the range and the size."""
        digest = hashlib.blake2b(digest_size=16)
        length = self.info.path.stat().st_size
        with open(self.info.path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, length - (1 << 20)))
            digest.update(file.read())
        digest.update(repr((length, self.first_frame, self.count(), self.stride, self.size)).encode())
        return digest.hexdigest()

    def count(self) -> int:
        """Exact number of frames in the range, measured once.

        Raises:
            InputError: the range is not all there; says how many frames decode.
        """
        return self._range().count

    def _range(self) -> _Range:
        if self._known is None:
            times = self._file_times()
            count = self._count_in(len(times))
            fps, uneven = rhythm(times[self.first_frame :: self.stride][:count], self.info.fps / self.stride)
            before = times[: self.first_frame + 1]
            start = before[-1] - before[0] if _usable(before) else float(self.first_frame / self.info.fps)
            self._known = _Range(count, start, fps, uneven)
        return self._known

    def _file_times(self) -> list[float | None]:
        """When the file's frames are shown, up to the range's last, in seconds; None for a time that is not stated."""
        wanted = self.first_frame + (self.frame_count - 1) * self.stride + 1 if self.frame_count else None
        declared = self.info.frame_count
        with open_video(self.info.path, self.where) as (container, stream):
            times, sound = packet_times(container, stream)
        if sound and len(times) == declared:
            return times if None in times else sorted(times)
        held = len(times)
        with open_video(self.info.path, self.where) as (container, stream):
            times = frame_times(first(decoded(container, stream), wanted))
        if wanted is None and declared and held < declared and "mov" in self.info.container:
            got = f"'{self.info.path.name}', cut short: it declares {declared} frames, {len(times)} of them decode"
            raise InputError(self.where, "file", got, f"a whole file, or a frame_count of at most {len(times)}")
        return times

    def _count_in(self, total: int) -> int:
        """Frames in the range, of a file in which ``total`` frames decode."""
        name = self.info.path.name
        got = f"{self.first_frame} of '{name}', in which {total} frames decode"
        require(self.first_frame < total, self.where, "first_frame", got, f"0 to {total - 1}")
        most = -(-(total - self.first_frame) // self.stride)
        if self.frame_count > most:
            got = f"{self.frame_count} (from frame {self.first_frame}, stride {self.stride}) of '{name}', in which "
            raise InputError(self.where, "frame_count", got + f"{total} frames decode", f"at most {most}, or 0 for all")
        return self.frame_count or most

    def frames(self, chunk: int) -> Iterator[np.ndarray]:
        """Decode the clip in order, a chunk ahead: arrays (up to ``chunk``, height, width, 3), uint8 RGB.

        Raises:
            InputError: fewer frames decode than :meth:`count` promised; says how many did.
        """
        require(chunk >= 1, self.where, "chunk", chunk, "1 or more")
        yield from ahead(self._chunks(chunk))

    def _chunks(self, chunk: int) -> Iterator[np.ndarray]:
        count, done = self.count(), 0
        batch = None
        last = self.first_frame + (count - 1) * self.stride
        scaler = Scaler(self.size)
        with open_video(self.info.path, self.where) as (container, stream):
            for index, frame in enumerate(first(decoded(container, stream), last + 1)):
                if index < self.first_frame or (index - self.first_frame) % self.stride:
                    continue
                if batch is None:
                    batch = np.empty((min(chunk, count - done), self.height, self.width, 3), np.uint8)
                    filled = 0
                batch[filled] = scaler(frame)
                filled, done = filled + 1, done + 1
                if filled == len(batch):
                    yield batch
                    batch = None
        if done < count:
            got = f"'{self.info.path.name}', of which {done} of the {count} frames asked for decode"
            raise InputError(self.where, "file", got, f"an undamaged file, or a frame_count of at most {done}")
