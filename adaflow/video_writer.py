"""Video files written as a stream, chunk by chunk, with sound carried over; a reader never sees half a file."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from .errors import InputError, require
from .video_decode import EXACT, open_video
from .video_output import VideoOutput

BT709 = 1
MPEG_RANGE = 1
PIXEL_FORMATS = ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le")
"""What a user may choose in place of a codec's own; not every encoder takes each."""


@dataclass(frozen=True)
class Codec:
    """An encoder, the container it goes into and its settings.

    Attributes:
        worst_crf: None where quality is not adjustable.
        bits: of a pixel, generously, with CRF 18; grainy pictures take so much, smooth ones a tenth.
        smallest: width and height, pixels.
        unpacked: the filter that makes of packets in the file what the encoder gave.
    """

    encoder: str
    muxer: str
    extension: str
    pixel_format: str
    bits: float
    worst_crf: int | None = None
    options: dict = field(default_factory=dict)
    smallest: tuple[int, int] = (1, 1)
    unpacked: str = ""

    def frame_bytes(self, width: int, height: int, quality: int) -> float:
        """To be expected of a frame in a file: CRF 6 lower doubles it."""
        bits = self.bits if self.worst_crf is None else min(12, self.bits * 2 ** ((18 - quality) / 6))
        return width * height * bits / 8

    def pixel_formats(self) -> list[str]:
        """Those that the encoder takes, its own first."""
        known = {form.name for form in av.Codec(self.encoder, "w").video_formats or ()}
        return [self.pixel_format, *(name for name in PIXEL_FORMATS if name in known and name != self.pixel_format)]


CODECS = {
    "h264": Codec("libx264", "mp4", "mp4", "yuv420p", 0.5, 51, unpacked="h264_mp4toannexb"),
    "h265": Codec(
        "libx265",
        "mp4",
        "mp4",
        "yuv420p",
        0.5,
        51,
        {"x265-params": "log-level=error:info=0"},
        (64, 32),
        "hevc_mp4toannexb",
    ),
    "vp9": Codec("libvpx-vp9", "webm", "webm", "yuv420p", 0.5, 63, {"row-mt": "1", "cpu-used": "3"}),
    "prores": Codec("prores_ks", "mov", "mov", "yuv422p10le", 4),
    "ffv1": Codec("ffv1", "matroska", "mkv", "bgr0", 16),
}


def _filtered(packets, name: str, stream):
    """Packets of a stream after one of FFmpeg's bitstream filters."""
    bitstream = BitStreamFilterContext(name, stream)
    for packet in packets:
        for changed in bitstream.filter(packet):
            changed.time_base = stream.time_base
            yield changed


def exact_rate(fps: Fraction | float) -> Fraction:
    """Frames per second as a fraction, such as 30000/1001 for 29.97."""
    return Fraction(fps).limit_denominator(1001 if isinstance(fps, float) else 1_000_000)


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
        in_order: code no frame ahead of its time, which makes a file of uneven times come out short.
        audio_source: a file whose sound is carried over.
        audio_range: ``(start, duration)`` of that sound in seconds; the video's own duration ends it too.
        metadata: text to text, or to anything JSON can hold.
        names: to be taken in place of ``path``, the first that is free when the file is whole; nothing is overwritten.
        partial: where the file grows, on the file system of ``path``; None makes up a name beside that.
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
        in_order: bool = False,
        audio_source: str | Path | None = None,
        audio_range: tuple[float, float] | None = None,
        metadata: dict | None = None,
        names: Iterable[Path] | None = None,
        partial: Path | None = None,
        where: str = "VideoWriter",
    ):
        require(codec in CODECS, where, "codec", repr(codec), "one of " + ", ".join(CODECS))
        require(fps > 0 and math.isfinite(fps), where, "fps", fps, "a frame rate above 0")
        least = CODECS[codec].smallest  # x265 writes beyond its memory where frames are narrower than 50 pixels
        fits = width >= least[0] and height >= least[1]
        require(fits, where, "size", f"{width}x{height}", f"at least {least[0]}x{least[1]} pixels for {codec}")
        self.path, self.width, self.height, self.where = Path(path), width, height, where
        self.fps = exact_rate(fps)
        self.frames_written = 0
        self._codec = CODECS[codec]
        worst = self._codec.worst_crf
        require(worst is None or 0 <= quality <= worst, where, "quality", quality, f"0 (best) to {worst} for {codec}")
        self._format = pixel_format or self._codec.pixel_format
        known = self._codec.pixel_formats()
        expected = f"one of {', '.join(known)} for {codec}"
        require(self._format in known, where, "pixel_format", repr(pixel_format), expected)
        self._levels = np.iinfo(np.uint16 if "10" in self._format else np.uint8)
        self._in_order = in_order or times is not None
        self._reformatter = VideoReformatter()
        self._output = VideoOutput(
            self.path,
            self._codec.muxer,
            self.fps,
            lambda container: self._add_stream(container, quality),
            times,
            audio_source,
            audio_range,
            metadata,
            names,
            partial,
            where,
        )
        self._stream = self._output.stream

    def _add_stream(self, container, quality: int):
        options = dict(self._codec.options)
        if self._codec.worst_crf is not None:
            options["crf"] = str(quality)
        self._give_the_same_bits_each_time(options)
        stream = container.add_stream(self._codec.encoder, rate=self.fps, options=options)
        if self._codec.encoder == "libvpx-vp9":
            stream.bit_rate = 0
        if self._in_order and self._codec.encoder.startswith("libx26"):
            stream.max_b_frames = 0
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

    def _give_the_same_bits_each_time(self, options: dict[str, str]) -> None:
        """Work around encoders that read memory which they never wrote; a resumed file shall be the unbroken one."""
        if self._codec.encoder == "libx264" and torch.backends.cpu.get_cpu_capability() == "AVX512":
            options["x264-params"] = "asm=avx2"
        if self._codec.encoder == "libx265" and min(self.width, self.height) <= 64:  # one row or column of its blocks
            options["x265-params"] += ":ctu=16"

    def write(self, frames) -> None:
        """Encode frames, (n, height, width, 3), uint8 or float in 0..1 (clipped); numpy or a CPU torch tensor."""
        self.write_levels(self.levels(frames))

    def levels(self, frames) -> np.ndarray:
        """Frames, as :meth:`write` takes them, in the levels and with the even sides that the pixel format needs.

        Returns:
            (n, height, width, 3), uint8, or uint16 for ten bits.

        Raises:
            InputError: they are not finite, or of another size.
        """
        frames = np.asarray(frames)
        expected = (self.height, self.width, 3)
        require(
            frames.ndim == 4 and frames.shape[1:] == expected,
            self.where,
            "frames",
            f"of shape {frames.shape}",
            f"(n, {self.height}, {self.width}, 3)",
        )
        found = [self._quantised(frame, self.frames_written + number) for number, frame in enumerate(frames)]
        height, width = self._stream.height, self._stream.width
        return np.stack(found) if found else np.empty((0, height, width, 3), self._levels.dtype)

    def write_levels(self, levels: np.ndarray) -> None:
        """Encode what :meth:`levels` gave, of this writer or another one with its settings."""
        for frame in levels:
            self._encode(frame)

    def copy(self, path: Path) -> None:
        """Take over the frames of a file that a writer of the same settings made, without encoding them again."""
        with open_video(path, self.where) as (container, stream):
            packets = (packet for packet in container.demux(stream) if packet.size)
            if self._codec.unpacked:
                packets = _filtered(packets, self._codec.unpacked, stream)
            self._output.mux(packets, self.frames_written)
        self.frames_written = self._output.frames

    def _quantised(self, frame: np.ndarray, number: int) -> np.ndarray:
        """The frame in as many levels as the pixel format needs, with even sides where it needs those."""
        most = self._levels.max
        if frame.dtype == np.uint8:
            frame = frame * np.asarray(most // 255, self._levels.dtype)
        else:
            if not np.isfinite(frame).all():
                got = f"not finite (NaN or infinity) in frame {number}"
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
        self._output.mux(self._stream.encode(frame))
        self.frames_written += 1

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.finish()
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        """Put the whole file in its place."""
        require(self.frames_written > 0, self.where, "frames", "empty", "at least one frame")
        packets = self._stream.encode(None)
        if self.frames_written <= 2:  # which are always in order; x265 leaves the dts of so few uninitialised
            for packet in packets:
                packet.dts = packet.pts
        self._output.mux(packets)
        self._output.finish()
        self.path = self._output.path

    def discard(self) -> None:
        """Leave nothing behind."""
        self._output.discard()
