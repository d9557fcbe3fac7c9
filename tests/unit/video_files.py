"""Small video files made with plain PyAV, whose frames can be told from one another, and what is read of them."""

import math
import struct
from fractions import Fraction

import av
import numpy as np
from adaflow_pack.adaflow.video import VideoClip

RATE = 44100


def level(index: int) -> int:
    """Grey level that tells frame ``index`` from its neighbours after lossy coding."""
    return 16 + index * 37 % 220


def picture(index: int, width: int, height: int) -> np.ndarray:
    frame = np.full((height, width, 3), level(index), np.uint8)
    frame[: height // 2, : width // 2] = (200, 30, 30)  # red in the top left corner shows which way is up
    return frame


def tone(seconds: float) -> np.ndarray:
    """A chirp, (1, samples): its instantaneous frequency, 200 + 400 t Hz, tells the time in the file."""
    t = np.arange(int(seconds * RATE)) / RATE
    return (0.5 * np.sin(2 * math.pi * (200 * t + 200 * t * t))).astype(np.float32)[None]


def make(
    path,
    frames=20,
    size=(64, 48),
    fps=10,
    codec="libx264",
    pix_fmt="yuv420p",
    sound=None,
    times=None,
    options=None,
    container=None,
):
    """Encode ``picture(0..frames-1)`` with plain PyAV; ``sound`` is an audio encoder, ``times`` are in milliseconds."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=fps, options={"crf": "10", **(options or {})} if "26" in codec else {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        track = output.add_stream(sound, rate=RATE) if sound else None
        if track is not None:
            track.codec_context.layout = "mono"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, *size)).reformat(format=pix_fmt)
            frame.pts, frame.time_base = (
                (index, Fraction(1, fps)) if times is None else (times[index], Fraction(1, 1000))
            )
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(tone(frames / fps), "flt", "mono")
            frame.sample_rate, frame.pts = RATE, 0
            output.mux(track.encode(frame))
            output.mux(track.encode(None))
    return path


def decode(clip: VideoClip, chunk: int = 7) -> np.ndarray:
    return np.concatenate(list(clip.frames(chunk)))


def grey(frames: np.ndarray) -> list[int]:
    """Mean level of each frame's right half."""
    return [round(float(frame[:, frame.shape[1] * 3 // 4 :].mean())) for frame in frames]


def assert_levels(frames: np.ndarray, indices) -> None:
    assert len(frames) == len(indices)
    assert max(abs(got - level(i)) for got, i in zip(grey(frames), indices, strict=True)) <= 3


def frequency(samples: np.ndarray, rate: int, at: float) -> float:
    """Dominant frequency around ``at`` seconds, Hz."""
    piece = samples[0, int((at - 0.05) * rate) : int((at + 0.05) * rate)]
    spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 16))
    return float(spectrum.argmax() * rate / (1 << 16))


def frames_for(count: int, width: int, height: int) -> np.ndarray:
    return np.stack([picture(i, width, height) for i in range(count)])


def set_matrix(path, a, b, c, d) -> None:
    """Write a rotation into the track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes stand between the box's name and its matrix
    assert struct.unpack_from(">9i", data, at) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, at, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def sounding(path, sound, frames=30, layout="mono") -> list[bytes]:
    """Packets of the sound of a file made at ``path``, its picture the codec that the container takes."""
    make(path, frames=frames, codec="libvpx" if path.suffix == ".webm" else "libx264", sound=None)
    silent = path.with_stem("silent")
    path.rename(silent)
    with av.open(str(silent)) as given, av.open(str(path), "w") as output:
        picture = output.add_stream_from_template(given.streams.video[0])
        track = output.add_stream(sound, rate=48000 if "opus" in sound else RATE, layout=layout)
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = picture
                output.mux(packet)
        channels = av.AudioLayout(layout).nb_channels
        frame = av.AudioFrame.from_ndarray(tone(frames / 10).repeat(channels, 1), "flt", layout)
        frame.sample_rate, frame.pts = RATE, 0
        output.mux(track.encode(frame))
        output.mux(track.encode(None))
    return packets(path)


def packets(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]
