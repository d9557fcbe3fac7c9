"""Video files written as a stream, chunk by chunk, with sound carried over; a reader never sees half a file."""

import json
import math
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from .errors import InputError, require
from .video_audio import AudioTrack
from .video_decode import EXACT

BT709 = 1
MPEG_RANGE = 1
FINE = Fraction(1, 90_000)
"""Time base of a file whose frames are unevenly spaced."""
PIXEL_FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le")
"""What a user may choose in place of a codec's own; not every encoder takes each."""


@dataclass(frozen=True)
class Codec:
    """An encoder, the container it goes into and its settings. ``worst_crf`` None: quality is not adjustable."""

    encoder: str
    muxer: str
    extension: str
    pixel_format: str
    worst_crf: int | None = None
    options: dict = field(default_factory=dict)

    def pixel_formats(self) -> list[str]:
        """Those that the encoder takes, its own first."""
        known = {form.name for form in av.Codec(self.encoder, "w").video_formats or ()}
        return [self.pixel_format, *(name for name in PIXEL_FORMATS if name in known and name != self.pixel_format)]


CODECS = {
    "h264": Codec("libx264", "mp4", "mp4", "yuv420p", 51),
    "h265": Codec("libx265", "mp4", "mp4", "yuv420p", 51, {"x265-params": "log-level=error"}),
    "vp9": Codec("libvpx-vp9", "webm", "webm", "yuv420p", 63, {"row-mt": "1", "cpu-used": "3"}),
    "prores": Codec("prores_ks", "mov", "mov", "yuv422p10le"),
    "ffv1": Codec("ffv1", "matroska", "mkv", "bgr0"),
}


class VideoWriter:
    """Encodes frames to ``path`` as they come; a context manager.

    The file stands under a temporary name beside ``path`` and takes its place on a clean exit; after an exception, or
    with no frame written, nothing is left. Formats with halved chroma need even sizes: an odd last column or row is
    repeated once.

    Args:
        path: the target; the name's ending should be that of ``CODECS[codec]``.
        fps: frames per second, above 0.
        width, height: of the frames to come, in pixels.
        codec: a key of ``CODECS``; "ffv1" is lossless.
        quality: constant rate factor, 0 (best) to the codec's ``worst_crf``; ignored where the codec has none.
        pixel_format: one of the codec's ``pixel_formats()``; None takes its own.
        times: seconds of every frame to come after the first, increasing; None spaces them evenly.
        audio_source: a file whose sound is carried over.
        audio_range: ``(start, duration)`` of that sound in seconds; the video's own duration ends it too.
        metadata: text to text, or to anything JSON can hold.
        where: the node named in errors.

    Raises:
        InputError: an unusable setting or frame, an unreadable sound source, or no frame at all by the exit.
    """

    def __init__(
        self,
        path: str | Path,
        fps: Fraction | float,
        width: int,
        height: int,
        *,
        codec: str = "h264",
        quality: int = 18,
        pixel_format: str | None = None,
        times: Sequence[float] | None = None,
        audio_source: str | Path | None = None,
        audio_range: tuple[float, float] | None = None,
        metadata: dict | None = None,
        where: str = "VideoWriter",
    ):
        require(codec in CODECS, where, "codec", repr(codec), "one of " + ", ".join(CODECS))
        require(fps > 0 and math.isfinite(fps), where, "fps", fps, "a frame rate above 0")
        require(width > 0 and height > 0, where, "size", f"{width}x{height}", "at least one pixel")
        self.path, self.width, self.height, self.where = Path(path), width, height, where
        self.fps = Fraction(fps).limit_denominator(1001 if isinstance(fps, float) else 1_000_000)
        self.frames_written = 0
        self._codec = CODECS[codec]
        worst = self._codec.worst_crf
        require(worst is None or 0 <= quality <= worst, where, "quality", quality, f"0 (best) to {worst} for {codec}")
        self._format = pixel_format or self._codec.pixel_format
        known = self._codec.pixel_formats()
        expected = f"one of {', '.join(known)} for {codec}"
        require(self._format in known, where, "pixel_format", repr(pixel_format), expected)
        self._levels = np.iinfo(np.uint16 if "10" in self._format else np.uint8)
        self._times = times
        self._sound_length = audio_range[1] if audio_range else math.inf
        self._reformatter = VideoReformatter()
        self._track = None
        self._partial = self.path.with_name(f".{self.path.stem}.{uuid.uuid4().hex[:8]}.partial")
        self._output = av.open(
            str(self._partial),
            "w",
            format=self._codec.muxer,
            options={"movflags": "use_metadata_tags"} if self._codec.muxer in ("mp4", "mov") else {},
        )
        try:
            for key, value in (metadata or {}).items():
                self._output.metadata[key] = value if isinstance(value, str) else json.dumps(value)
            self._stream = self._add_stream(quality)
            if audio_source is not None:
                start = audio_range[0] if audio_range else 0.0
                self._track = AudioTrack(Path(audio_source), self._output, self._codec.muxer, start, where)
        except BaseException:
            self._discard()
            raise

    def _add_stream(self, quality: int):
        options = dict(self._codec.options)
        if self._codec.worst_crf is not None:
            options["crf"] = str(quality)
        stream = self._output.add_stream(self._codec.encoder, rate=self.fps, options=options)
        if self._codec.encoder == "libvpx-vp9":
            stream.bit_rate = 0
        if self._times is not None:
            stream.time_base = FINE
            if self._codec.encoder.startswith("libx26"):
                stream.max_b_frames = 0  # a frame coded ahead of its time makes the file's length come out short
        if self._codec.encoder == "libx265":
            stream.codec_context.codec_tag = "hvc1"
        stream.pix_fmt = self._format
        self._subsampled = self._format.startswith(("yuv420", "yuv422"))
        stream.width = self.width + self.width % 2 * self._subsampled
        stream.height = self.height + self.height % 2 * self._subsampled
        if self._format.startswith("yuv"):
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = MPEG_RANGE
        return stream

    def write(self, frames) -> None:
        """Encode frames, (n, height, width, 3), uint8 or float in 0..1 (clipped); numpy or a CPU torch tensor."""
        frames = np.asarray(frames)
        expected = (self.height, self.width, 3)
        require(
            frames.ndim == 4 and frames.shape[1:] == expected,
            self.where,
            "frames",
            f"of shape {frames.shape}",
            f"(n, {self.height}, {self.width}, 3)",
        )
        for frame in frames:
            self._encode(self._quantised(frame))

    def _quantised(self, frame: np.ndarray) -> np.ndarray:
        """The frame in as many levels as the pixel format needs, with even sides where it needs those."""
        most = self._levels.max
        if frame.dtype == np.uint8:
            frame = frame * np.asarray(most // 255, self._levels.dtype)
        else:
            if not np.isfinite(frame).all():
                got = f"not finite (NaN or infinity) in frame {self.frames_written}"
                raise InputError(self.where, "frames", got, "finite numbers in 0..1")
            frame = (frame.astype(np.float32).clip(0, 1) * most + 0.5).astype(self._levels.dtype)
        if self._subsampled and (self.width % 2 or self.height % 2):
            frame = np.pad(frame, ((0, self.height % 2), (0, self.width % 2), (0, 0)), mode="edge")
        return np.ascontiguousarray(frame)

    def _encode(self, array: np.ndarray) -> None:
        frame = av.VideoFrame.from_ndarray(array, format="rgb24" if self._levels.bits == 8 else "rgb48le")
        if self._format.startswith("yuv"):
            frame = self._reformatter.reformat(
                frame,
                format=self._format,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC.value | EXACT,
            )
        else:
            frame = self._reformatter.reformat(frame, format=self._format)
        frame.pts, frame.time_base = self.frames_written, 1 / self.fps
        self._mux(self._stream.encode(frame))
        self.frames_written += 1
        if self._track is not None:
            self._track.feed(self._sound_end())

    def _mux(self, packets) -> None:
        for packet in packets:
            if self._times is not None:
                shown, end = self._time(packet.pts), self._time(packet.pts + 1)
                packet.pts = packet.dts = round(shown / FINE)
                packet.duration, packet.time_base = round(end / FINE) - packet.pts, FINE
            self._output.mux(packet)

    def _time(self, frame: int) -> float:
        """Seconds from the first frame to frame ``frame``, or to the end of the one before."""
        if self._times is None:
            return float(frame / self.fps)
        if frame < len(self._times):
            return float(self._times[frame])
        return float(self._times[frame - 1] + 1 / self.fps)

    def _sound_end(self) -> float:
        return min(self._time(self.frames_written), self._sound_length)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            require(self.frames_written > 0, self.where, "frames", "empty", "at least one frame")
            self._mux(self._stream.encode(None))
            if self._track is not None:
                self._track.finish(self._sound_end())
            self._output.close()
            self._partial.replace(self.path)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        if self._track is not None:
            self._track.close()
        with suppress(av.FFmpegError, OSError, ValueError):
            self._output.close()
        self._partial.unlink(missing_ok=True)
