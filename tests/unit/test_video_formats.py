"""The kinds of files that users have: uneven frame rates, containers, pixel formats, alpha, every sort of sound."""

from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.adaflow.video import LONGEST_GAP, VideoClip, probe, rhythm
from adaflow_pack.adaflow.video_audio import read_audio
from adaflow_pack.adaflow.video_decode import seconds
from adaflow_pack.adaflow.video_writer import CODECS, VideoWriter
from video_files import assert_levels, decode, frames_for, frequency, grey, level, make, packets, set_matrix, sounding

UNEVEN = [0, 100, 150, 400, 420, 900, 1000, 1100, 1800, 1900]  # milliseconds


# --- Frame rates that vary


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.webm"])
def test_the_times_of_an_uneven_file_are_known(tmp_path, name):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    clip = VideoClip(probe(make(tmp_path / name, frames=10, times=UNEVEN, codec=codec)))
    assert clip.times() == pytest.approx(np.array(UNEVEN) / 1000, abs=0.002)
    assert float(clip.fps) == pytest.approx(9 / 1.9, rel=0.002)
    part = clip.sub(3, stride=2)
    assert part.times() == pytest.approx([0, 0.5, 0.7, 1.5], abs=0.002)
    assert part.audio_range() == pytest.approx((0.4, 1.5 + 0.5), abs=0.004)  # the last as long as they are on average
    assert_levels(decode(part), [3, 5, 7, 9])


def test_a_phone_clip_keeps_picture_and_sound_together(tmp_path):
    """Upright, uneven, with sound: every frame of a range is shown when the sound of its moment is heard."""
    times = [round(1000 * (i / 20 if i < 20 else 1 + (i - 20) / 5)) for i in range(30)]  # half-way it turns dark
    path = make(tmp_path / "phone.mp4", frames=30, times=times, sound="aac", options={"bf": "0"})
    set_matrix(path, 0, 1, -1, 0)
    clip = VideoClip(probe(path), first_frame=10, size=(48, 64))
    with VideoWriter(
        tmp_path / "out.mp4",
        clip.fps,
        48,
        64,
        quality=5,
        times=clip.times(),
        audio_source=path,
        audio_range=clip.audio_range(),
    ) as writer:
        for frames in clip.frames(7):
            writer.write(frames)
    out = VideoClip(probe(tmp_path / "out.mp4"))
    expected = np.array(times[10:]) / 1000 - 0.5
    assert out.times() == pytest.approx(expected, abs=0.001)
    assert max(abs(a - b) for a, b in zip(grey(decode(out)), grey(decode(clip)), strict=True)) <= 3
    samples, rate = read_audio(tmp_path / "out.mp4")
    for at in (0.2, 1.5, 2.2):
        assert frequency(samples, rate, at) == pytest.approx(200 + 400 * (0.5 + at), abs=15)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration / av.time_base == pytest.approx(expected[-1] + 1 / float(clip.fps), abs=0.1)


@pytest.mark.parametrize("codec", list(CODECS))
def test_uneven_times_are_written_into_every_container(tmp_path, codec):
    path = tmp_path / f"out.{CODECS[codec].extension}"
    with VideoWriter(path, 5, 64, 48, codec=codec, times=[t / 1000 for t in UNEVEN]) as writer:
        writer.write(frames_for(10, 64, 48))
    clip = VideoClip(probe(path))
    assert clip.times() == pytest.approx(np.array(UNEVEN) / 1000, abs=0.001)
    assert_levels(decode(clip), range(10))
    with av.open(str(path)) as container:
        assert container.duration / av.time_base >= 2.0


def test_rounded_times_are_not_uneven_and_a_misstated_rate_is_measured(tmp_path):
    ntsc = [round(i * 1001 / 30) for i in range(120)]  # Matroska's milliseconds
    assert VideoClip(probe(make(tmp_path / "a.mkv", 120, (16, 16), 30, times=ntsc))).times() is None
    rate, times = rhythm([i * 1001 / 30000 for i in range(2000)], Fraction(30))
    assert (rate, times) == (Fraction(30000, 1001), None)
    rate, times = rhythm([i / 30 for i in range(2000)], Fraction(30))
    assert (rate, times) == (30, None)


@pytest.mark.parametrize(
    "times",
    [[0.0, 0.1, None, 0.9], [0.0, 0.1, 0.1, 0.9], [0.0, 0.5, 0.1, 0.9], [0.0, 0.1, 0.3, LONGEST_GAP + 1], [3.0, 9.0]],
    ids=["one missing", "twice", "backwards", "a gap of a minute", "two frames"],
)
def test_where_times_are_unusable_the_stated_rate_counts(times):
    assert rhythm(times, Fraction(25)) == (25, None)


def test_a_frame_without_a_time_has_none():
    """Damaged files have frames of which the number is known but not the time base."""
    times = [(3, Fraction(1, 4)), (None, Fraction(1, 4)), (3, None)]
    assert [seconds(SimpleNamespace(pts=pts, time_base=base)) for pts, base in times] == [0.75, None, None]


# --- Containers, codecs, pixel formats


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "size"),
    [
        ("a.mov", "prores_ks", "yuv422p10le", (64, 48)),
        ("b.mov", "qtrle", "argb", (63, 47)),
        ("c.mov", "mjpeg", "yuvj420p", (64, 48)),
        ("d.mp4", "libx265", "yuv420p10le", (64, 48)),
        ("e.mp4", "libx264", "yuv444p", (63, 47)),
        ("f.webm", "libvpx-vp9", "yuv420p", (63, 47)),
        ("g.webm", "libvpx-vp9", "yuva420p", (64, 48)),
        ("h.mkv", "ffv1", "yuva444p10le", (63, 47)),
        ("i.mkv", "libx264", "yuv422p10le", (64, 47)),
        ("j.gif", "gif", "rgb8", (63, 47)),
    ],
)
def test_every_frame_comes_in_its_own_size_and_colours(tmp_path, name, codec, pix_fmt, size):
    clip = VideoClip(probe(make(tmp_path / name, frames=12, codec=codec, pix_fmt=pix_fmt, size=size)))
    frames = decode(clip)
    assert (clip.count(), clip.fps, frames.shape) == (12, 10, (12, size[1], size[0], 3))
    off = 40 if codec == "gif" else 8  # of levels: GIF has 256 colours
    assert max(abs(got - level(i)) for i, got in enumerate(grey(frames))) <= off
    assert np.abs(frames[:, 6:16, 6:24].astype(int) - (200, 30, 30)).mean() <= off


def test_square_pixels_are_made_of_others(tmp_path):
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for picture in frames_for(3, 48, 48):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        output.mux(stream.encode(None))
    info = probe(path)
    assert (info.width, info.height) == (64, 48)
    frames = decode(VideoClip(info))
    assert frames.shape == (3, 48, 64, 3)
    assert_levels(frames, range(3))


def test_alpha_is_left_out_and_changes_no_colour(tmp_path):
    """As in ComfyUI's own nodes: what is transparent shows the colour that stands there."""
    path = tmp_path / "a.mov"
    pictures = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 4), dtype=np.uint8)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("qtrle", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "argb"
        for picture in pictures:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="argb")))
        output.mux(stream.encode(None))
    clip = VideoClip(probe(path))
    assert clip.info.pixel_format == "argb"
    assert np.array_equal(decode(clip), pictures[..., :3])


@pytest.mark.parametrize("codec", list(CODECS))
def test_every_pixel_format_on_offer_is_written(tmp_path, codec):
    path = tmp_path / f"out.{CODECS[codec].extension}"
    for pixel_format in CODECS[codec].pixel_formats():
        with VideoWriter(path, 10, 64, 48, codec=codec, quality=5, pixel_format=pixel_format) as writer:
            writer.write(frames_for(3, 64, 48))
        clip = VideoClip(probe(path))
        assert clip.info.pixel_format.replace("12le", "10le") == pixel_format  # ProRes 4444 is read in 12 bits
        frames = decode(clip)
        assert_levels(frames, range(3))
        assert np.abs(frames[:, 6:16, 6:24].astype(int) - (200, 30, 30)).max() <= 8
    with pytest.raises(InputError, match=rf"'pixel_format' is 'rgb565'; expected one of .* for {codec}"):
        VideoWriter(path, 10, 64, 48, codec=codec, pixel_format="rgb565")


def test_ten_bits_hold_more_than_256_levels(tmp_path):
    ramp = np.broadcast_to(np.linspace(0.1, 0.9, 1600, dtype=np.float32)[:, None], (1, 16, 1600, 3))
    levels = {}
    for pixel_format in ("yuv444p", "yuv444p10le"):
        with VideoWriter(tmp_path / "a.mkv", 10, 1600, 16, codec="ffv1", pixel_format=pixel_format) as writer:
            writer.write(ramp)
        with av.open(str(tmp_path / "a.mkv")) as container:
            frame = next(container.decode(video=0))
            brightness = frame.to_ndarray(format="gray16le")
        levels[pixel_format] = len(np.unique(brightness))
    assert levels["yuv444p"] <= 256 < 600 < levels["yuv444p10le"]


# --- Sound


@pytest.mark.parametrize(
    ("name", "sound", "codecs"),
    [
        ("a.mp4", "aac", ["h264", "h265", "prores", "ffv1"]),
        ("b.mov", "pcm_s16le", ["prores", "ffv1"]),
        ("c.webm", "libopus", ["vp9", "ffv1"]),
        ("d.mkv", "flac", ["ffv1"]),
        ("e.mkv", "ac3", ["h264", "prores", "ffv1"]),
        ("f.mp4", "libmp3lame", ["h264", "prores", "ffv1"]),
    ],
)
def test_sound_goes_over_bit_for_bit_where_the_container_takes_it(tmp_path, name, sound, codecs):
    given = sounding(tmp_path / name, sound)
    for codec in codecs:
        path = tmp_path / f"out.{CODECS[codec].extension}"
        for start in (0.0, 1.0):
            audio = {"audio_source": tmp_path / name, "audio_range": (start, 1.5)}
            with VideoWriter(path, 10, 64, 48, codec=codec, **audio) as writer:
                writer.write(frames_for(15, 64, 48))
            got = packets(path)
            first = given.index(got[0])
            if sound != "pcm_s16le":  # whose packets a container cuts as it likes
                assert got == given[first : first + len(got)]
            samples, rate = read_audio(path)
            assert samples.shape[1] / rate == pytest.approx(1.5, abs=0.06)
            assert frequency(samples, rate, 1.1) == pytest.approx(200 + 400 * (start + 1.1), abs=15)


@pytest.mark.parametrize(
    ("name", "sound", "codec", "encoded"),
    [("a.mkv", "flac", "h264", "aac"), ("b.mov", "pcm_s16le", "h264", "aac"), ("c.mp4", "aac", "vp9", "opus")],
)
def test_sound_is_encoded_anew_where_the_container_does_not_take_it(tmp_path, name, sound, codec, encoded):
    sounding(tmp_path / name, sound)
    path = tmp_path / f"out.{CODECS[codec].extension}"
    with VideoWriter(path, 10, 64, 48, codec=codec, audio_source=tmp_path / name, audio_range=(1.0, 1.5)) as writer:
        writer.write(frames_for(15, 64, 48))
    with av.open(str(path)) as container:
        assert container.streams.audio[0].codec_context.name.removeprefix("lib") == encoded
    samples, rate = read_audio(path)
    assert frequency(samples, rate, 0.6) == pytest.approx(200 + 400 * 1.6, abs=15)
