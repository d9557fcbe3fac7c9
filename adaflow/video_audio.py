"""Sound of a source video, cut to a range: copied into an output container, or read as samples."""

import logging
from pathlib import Path

import av
import numpy as np

from .errors import InputError
from .video_decode import seconds, sound_of, start_of

COPIED = {
    "mp4": {"aac", "mp3", "mp3float", "ac3", "eac3", "alac"},
    "mov": {"aac", "mp3", "mp3float", "ac3", "alac", "pcm_s16le", "pcm_s24le"},
    "webm": {"opus", "libopus", "vorbis"},
    "matroska": {
        "aac",
        "mp3",
        "mp3float",
        "ac3",
        "eac3",
        "opus",
        "libopus",
        "vorbis",
        "flac",
        "pcm_s16le",
        "pcm_s24le",
    },
}
ENCODERS = {"mp4": "aac", "mov": "aac", "webm": "libopus", "matroska": "libopus"}
SAMPLE_RATE = 48000
DAMAGE = (av.FFmpegError, ValueError)  # the latter from PyAV, of what it does not take


def _video_start(container) -> float:
    """Time of the file's first video frame, in seconds: what ranges count from."""
    stream = next(iter(container.streams.video), None)
    return start_of(stream) if stream is not None else 0.0


def _seek(container, time: float) -> None:
    if time > 2:
        try:
            container.seek(int((time - 1) * av.time_base))
        except av.FFmpegError:
            container.seek(0)


class AudioTrack:
    """The sound of ``source`` from ``start`` on, muxed into ``output`` as the picture advances.

    Packets are copied where the container takes the codec, else re-encoded (AAC, Opus in WebM and Matroska). Cuts fall
    between packets (some 20 ms). Damaged sound ends the track with a warning, never the video.

    Args:
        source: the file.
        output: an av output container, before its first packet.
        muxer: "mp4", "mov", "webm" or "matroska".
        start: seconds after the source's first video frame.
        where: named in errors.
    """

    def __init__(self, source: Path, output, muxer: str, start: float, where: str):
        self._source = Path(source)
        try:
            self._input = av.open(str(self._source.resolve()), metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            got = f"'{self._source.name}', which cannot be opened"
            raise InputError(where, "audio", got, "a readable video file") from error
        self._output = output
        self._encoder = self._waiting = None
        stream = sound_of(self._input)
        self._packets = iter(())
        if stream is None:
            return
        self._start = max(0.0, start) + _video_start(self._input)
        self._whole = start <= 0
        _seek(self._input, self._start)
        codec = stream.codec_context
        if codec.name in COPIED[muxer] and (codec.extradata or codec.name != "aac"):
            self._stream = output.add_stream_from_template(stream)
            self._packets = self._copied(stream)
        else:
            self._stream = self._encoder = output.add_stream(ENCODERS[muxer], rate=SAMPLE_RATE)
            self._encoder.codec_context.layout = "mono" if codec.channels == 1 else "stereo"
            self._packets = self._encoded(stream)

    def feed(self, until: float) -> None:
        """Mux the sound up to ``until`` seconds of the output."""
        try:
            while True:
                self._waiting = self._waiting or next(self._packets, None)
                if self._waiting is None or _middle(self._waiting) >= until:
                    return
                self._output.mux(self._waiting)
                self._waiting = None
        except DAMAGE as error:
            logging.warning("AdaFlow: the sound of '%s' ends at %.2f s: %s", self._source.name, until, error)
            self._packets, self._waiting = iter(()), None

    def finish(self, until: float) -> None:
        """Mux the sound up to the output's end, with what the encoder still holds."""
        self.feed(until)
        if self._encoder is not None:
            self._packets = iter(self._encoder.encode(None))
            self.feed(until)
        self.close()

    def close(self) -> None:
        """Close the source without muxing more."""
        self._packets = iter(())
        self._input.close()

    def _copied(self, stream):
        shift = round(self._start / stream.time_base)
        for packet in self._input.demux(stream):
            if packet.pts is None or packet.dts is None:
                continue
            if not self._whole:
                if _middle(packet) < self._start:
                    continue
                shift = min(shift, packet.pts)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = self._stream
            yield packet

    def _encoded(self, stream):
        wanted = self._encoder.codec_context
        for frame in _uniform(self._cut(stream), wanted.layout, SAMPLE_RATE):
            yield from self._encoder.encode(frame)

    def _cut(self, stream):
        shift = None
        for frame in self._input.decode(stream):
            time = seconds(frame)
            if time is None or time + frame.samples / frame.rate / 2 < self._start:
                continue
            if shift is None:
                shift = min(frame.pts, round(self._start / frame.time_base))
            frame.pts -= shift
            yield frame


def _uniform(frames, layout, rate: int):
    """Sound frames as interleaved float32 of one layout and rate, even if a stream changes half-way, damaged or not.

    Not as planes: PyAV reads past their list where a frame has more than eight channels, and crashes.
    """
    kind = resampler = None
    for frame in frames:
        if kind != (frame.format.name, frame.layout.name, frame.sample_rate):
            kind = frame.format.name, frame.layout.name, frame.sample_rate
            resampler = av.AudioResampler(format="flt", layout=layout, rate=rate)
        yield from resampler.resample(frame)


def _middle(packet) -> float:
    return float((packet.pts + (packet.duration or 0) / 2) * packet.time_base)


def read_audio(path: str | Path, start: float = 0.0, duration: float | None = None) -> tuple[np.ndarray, int] | None:
    """Decode a file's first sound track.

    Args:
        path: the file.
        start: seconds after the file's first video frame.
        duration: seconds to read; None reads to the end.

    Returns:
        ``(samples (channels, time) float32, sample rate)``, or None where there is no sound.
    """
    with av.open(str(Path(path).resolve()), metadata_errors="replace") as container:
        stream = sound_of(container)
        if stream is None:
            return None
        start += _video_start(container)
        codec = stream.codec_context
        rate, channels, pieces, origin = codec.sample_rate, codec.layout.nb_channels, [], None
        _seek(container, start)
        try:
            for frame in _uniform(container.decode(stream), codec.layout, rate):
                time = seconds(frame)
                if origin is None:
                    origin = time or 0.0
                if duration is not None and time is not None and time > start + duration:
                    break
                pieces.append(frame.to_ndarray().reshape(-1, channels).T)
        except DAMAGE as error:
            logging.warning("AdaFlow: the sound of '%s' is damaged: %s", Path(path).name, error)
    if not pieces:
        return None
    samples = np.concatenate(pieces, axis=1).astype(np.float32)
    skip = round((start - origin) * rate)
    samples = np.pad(samples, ((0, 0), (-skip, 0))) if skip < 0 else samples[:, skip:]
    return (samples if duration is None else samples[:, : round(duration * rate)]), rate
