"""A video file under a temporary name that takes packets and sound, and its place when it is whole."""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av

from .storage import replace_durably, take_free_name
from .video_audio import AudioTrack

FINE = Fraction(1, 90_000)
"""Time base of a file whose frames are unevenly spaced."""


def hidden_beside(path: Path, mark: str) -> Path:
    """A temporary name in the folder of ``path``."""
    return path.with_name(f".{path.stem}.{mark}.partial")


class VideoOutput:
    """The file that packets of one video stream are muxed into, by frame number, with the sound that belongs to them.

    It carries no date and no random number: the same packets give the same bytes.

    Args:
        path: the target, which appears on :meth:`finish`.
        muxer: FFmpeg's name of the container.
        fps: frames per second.
        add_stream: makes the video stream in the container that it is given.
        times: seconds of every frame after the first, increasing; None spaces them evenly.
        audio_source: a file whose sound is carried over.
        audio_range: ``(start, duration)`` of that sound in seconds; the video's own duration ends it too.
        metadata: text to text, or to anything JSON can hold.
        names: to be taken in place of ``path``, the first that is free when the file is whole; nothing is overwritten.
        partial: where the file grows, on the file system of ``path``; None makes up a name beside that.
        where: the node named in errors.

    Attributes:
        frames: muxed so far, as far as they are shown without a gap.
    """

    def __init__(
        self,
        path: Path,
        muxer: str,
        fps: Fraction,
        add_stream: Callable,
        times: Sequence[float] | None = None,
        audio_source: str | Path | None = None,
        audio_range: tuple[float, float] | None = None,
        metadata: dict | None = None,
        names: Iterable[Path] | None = None,
        partial: Path | None = None,
        where: str = "VideoOutput",
    ):
        self.path, self.fps = path, fps
        self.frames = 0
        self._times, self._track = times, None
        self._muxed, self._delay = 0, None  # packets; frames by which decoding is ahead of showing
        self._sound_length = audio_range[1] if audio_range else math.inf
        self._names, self._partial = names, partial or hidden_beside(path, uuid.uuid4().hex[:8])
        options = {"fflags": "+bitexact"}
        if muxer in ("mp4", "mov"):
            options["movflags"] = "use_metadata_tags"
        self._container = av.open(str(self._partial), "w", format=muxer, options=options)
        try:
            for key, value in (metadata or {}).items():
                self._container.metadata[key] = value if isinstance(value, str) else json.dumps(value)
            self.stream = add_stream(self._container)
            if times is not None:
                self.stream.time_base = FINE
            if audio_source is not None:
                start = audio_range[0] if audio_range else 0.0
                self._track = AudioTrack(Path(audio_source), self._container, muxer, start, where)
        except BaseException:
            self.discard()
            raise

    def mux(self, packets: Iterable[av.Packet], first: int = 0) -> None:
        """Add packets whose times count frames from frame ``first``, and the sound up to the last of them."""
        for packet in packets:
            shown, decoded = (first + round(time * packet.time_base * self.fps) for time in (packet.pts, packet.dts))
            if self._delay is None:
                self._delay = shown - decoded
            if self._times is None:
                packet.pts, packet.dts = shown, self._muxed - self._delay
                packet.duration, packet.time_base = 1, 1 / self.fps
            else:
                packet.pts = packet.dts = round(self._time(shown) / FINE)
                packet.duration, packet.time_base = round(self._time(shown + 1) / FINE) - packet.pts, FINE
            self._muxed += 1
            packet.stream = self.stream
            self._container.mux(packet)
            self.frames = max(self.frames, shown + 1)
            if self._track is not None:
                self._track.feed(self._sound_end())

    def _time(self, frame: int) -> float:
        """Seconds from the first frame to frame ``frame``, or to the end of the one before."""
        if self._times is None:
            return float(frame / self.fps)
        if frame < len(self._times):
            return float(self._times[frame])
        return float(self._times[frame - 1] + 1 / self.fps)

    def _sound_end(self) -> float:
        return min(self._time(self.frames), self._sound_length)

    def finish(self) -> None:
        """Put the whole file in its place, once it is on the disk."""
        if self._track is not None:
            self._track.finish(self._sound_end())
        self._container.close()
        with open(self._partial, "rb+") as written:
            os.fsync(written.fileno())
        if self._names is None:
            replace_durably(self._partial, self.path)
        else:
            self.path = take_free_name(self._partial, self._names)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._track is not None:
            self._track.close()
        with suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()
        self._partial.unlink(missing_ok=True)
