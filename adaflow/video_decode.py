"""A video file read packet by packet and frame by frame."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from .errors import InputError, require

EXACT = 0x2000 | 0x40000
"""swscale's full chroma interpolation and accurate rounding: without them colours come out 2/255 too dark."""


@contextmanager
def open_video(path: Path, where: str):
    """Yield ``(container, video stream)`` of a file; raise :class:`InputError` if it is no video."""
    path = Path(path)
    require(path.is_file(), where, "file", f"'{path.name}', which does not exist", "an existing video file")
    require(path.stat().st_size > 0, where, "file", f"'{path.name}', which is empty (0 bytes)", "a video file")
    try:
        container = av.open(str(path.resolve()), metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        got = f"'{path.name}', which cannot be opened ({error.__class__.__name__})"
        raise InputError(where, "file", got, "a whole video file: this is truncated, damaged or no video") from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            kind = "audio only" if container.streams.audio else "no picture stream"
            raise InputError(where, "file", f"'{path.name}', which holds {kind}", "a file with a video stream")
        yield container, streams[0]


def sound_of(container):
    """The first sound stream that can be decoded, or None."""
    return next((stream for stream in container.streams.audio if stream.codec_context and stream.time_base), None)


def decoded(container, stream) -> Iterator[av.VideoFrame]:
    """Every frame that decodes, in order; damaged packets are passed over, a damaged end ends the stream."""
    stream.thread_type = "AUTO"
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            yield from _flushed(stream)
            return
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def packet_times(container, stream) -> tuple[list[float | None], bool]:
    """Times of the stream's packets in seconds, and whether each surely gives one shown frame.

    None stands for a time that the file does not state. A packet marked as damaged, or as not shown, is not sure.
    """
    times, sound = [], True
    try:
        for packet in container.demux(stream):
            if packet.size:
                times.append(seconds(packet))
                sound = sound and not (packet.is_corrupt or packet.is_discard)
    except av.FFmpegError:
        sound = False
    return times, sound


def frame_times(frames: Iterator[av.VideoFrame]) -> list[float | None]:
    """Times of decoded frames in seconds; None for one that has none."""
    return [seconds(frame) for frame in frames]


def seconds(timed) -> float | None:
    """Time of a packet or frame; None where it has none, as in a damaged file."""
    return float(timed.pts * timed.time_base) if timed.pts is not None and timed.time_base else None


def start_of(stream) -> float:
    """Time of a stream's first frame as the file states it, seconds; 0 where it does not."""
    return float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0


def _flushed(stream) -> list[av.VideoFrame]:
    try:
        return stream.codec_context.decode(None)
    except av.FFmpegError:
        return []


class Scaler:
    """Turns decoded frames into upright RGB arrays of one size, (height, width, 3) uint8."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        width, height = self.size if turns % 2 == 0 else self.size[::-1]
        shrinks = width * height < frame.width * frame.height
        method = Interpolation.AREA if shrinks else Interpolation.BICUBIC
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        rgb = self._reformatter.reformat(
            frame,
            width,
            height,
            "rgb24",
            interpolation=method.value | EXACT,
            dst_colorspace=Colorspace.DEFAULT,  # PyAV 14 ignores the frame's own where the two are equal,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,  # and its range unless it is named
            dst_color_range=ColorRange.JPEG,
        )
        return np.rot90(rgb.to_ndarray(), turns)


def first(frames: Iterator, count: int | None) -> Iterator:
    """The first ``count`` items; all for None. Unlike islice it does not ask for one more."""
    if count is None:
        yield from frames
        return
    for _ in range(count):
        frame = next(frames, None)
        if frame is None:
            return
        yield frame


def ahead(items: Iterator) -> Iterator:
    """Yield ``items`` as they are, the next of which is made on a thread meanwhile; none of them may be None.

    Closing this closes ``items``, once the one in the making is done.
    """
    with ThreadPoolExecutor(1, "adaflow-ahead") as thread:
        try:
            coming = thread.submit(next, items, None)
            while (item := coming.result()) is not None:
                coming = thread.submit(next, items, None)
                yield item
        finally:
            thread.submit(items.close)
