"""Reading and writing video as a stream, on clips made here."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.adaflow.video import VideoClip, fit_size, probe
from adaflow_pack.adaflow.video_audio import read_audio
from adaflow_pack.adaflow.video_writer import CODECS, VideoWriter
from video_files import RATE, assert_levels, decode, frames_for, frequency, grey, level, make, picture, set_matrix, tone


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return make(tmp_path_factory.mktemp("video") / "clip.mp4", frames=30, sound="aac")


def test_probe_says_what_the_file_holds(mp4):
    info = probe(mp4)
    assert (info.width, info.height, info.frame_count, info.fps, info.has_audio) == (64, 48, 30, 10, True)
    assert (info.codec, info.rotation, info.start) == ("h264", 0, 0.0)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_frames_come_in_order_in_chunks(mp4, chunk):
    clip = VideoClip(probe(mp4))
    pieces = list(clip.frames(chunk))
    assert [len(p) for p in pieces] == [min(chunk, 30 - i) for i in range(0, 30, chunk)]
    assert pieces[0].dtype == np.uint8
    assert_levels(np.concatenate(pieces), range(30))


def test_range_and_stride_take_the_named_frames(mp4):
    clip = VideoClip(probe(mp4), first_frame=5, frame_count=6, stride=3)
    assert clip.count() == 6
    assert_levels(decode(clip), [5, 8, 11, 14, 17, 20])
    assert clip.fps == Fraction(10, 3)
    assert clip.audio_range() == pytest.approx((0.5, 1.8))


def test_stride_to_the_end_counts_the_last_partial_step(mp4):
    clip = VideoClip(probe(mp4), first_frame=1, stride=4)
    assert clip.count() == 8
    assert_levels(decode(clip), range(1, 30, 4))


def test_a_clip_of_a_clip(mp4):
    clip = VideoClip(probe(mp4), first_frame=2, frame_count=12, stride=2).sub(1, 3, 2)
    assert_levels(decode(clip), [4, 8, 12])
    with pytest.raises(InputError, match="at most 6"):
        VideoClip(probe(mp4), first_frame=2, frame_count=12, stride=2).sub(1, 7, 2)


def test_a_range_beyond_the_end_names_the_number_of_frames(mp4):
    with pytest.raises(InputError, match=r"frame_count.*30 frames decode.*at most 10"):
        VideoClip(probe(mp4), first_frame=20, frame_count=11, where="Load").count()
    with pytest.raises(InputError, match=r"first_frame.*30 frames decode"):
        VideoClip(probe(mp4), first_frame=30).count()


def test_resizing_keeps_the_picture_upright(mp4):
    frames = decode(VideoClip(probe(mp4), frame_count=2, size=(128, 64)))
    assert frames.shape == (2, 64, 128, 3)
    assert np.abs(frames[0, 16, 32].astype(int) - (200, 30, 30)).max() < 12
    assert_levels(frames, [0, 1])


def test_fingerprint_follows_content_and_range(mp4, tmp_path):
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(mp4.read_bytes())
    other = make(tmp_path / "other.mp4", frames=30, fps=12)
    prints = [VideoClip(probe(p), **k).fingerprint() for p, k in [(mp4, {}), (other, {}), (mp4, {"stride": 2})]]
    assert len(set(prints)) == 3
    assert VideoClip(probe(copy)).fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("matrix", "size", "red"),
    [((0, 1, -1, 0), (48, 64), (1, 0)), ((-1, 0, 0, -1), (64, 48), (1, 1)), ((0, -1, 1, 0), (48, 64), (0, 1))],
    ids=["90 clockwise", "180", "90 counter-clockwise"],
)
def test_rotation_is_honoured(tmp_path, matrix, size, red):
    path = make(tmp_path / "turned.mp4", frames=3)
    set_matrix(path, *matrix)
    info = probe(path)
    assert (info.width, info.height) == size
    frame = decode(VideoClip(info))[0].astype(int)
    assert frame.shape == (*size[::-1], 3)
    redness = frame[..., 0] - frame[..., 1]
    halves = redness.reshape(2, frame.shape[0] // 2, 2, frame.shape[1] // 2).mean((1, 3))
    x, y = red
    assert np.unravel_index(halves.argmax(), (2, 2)) == (y, x)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "size"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p", (64, 48)),
        ("b.webm", "libvpx", "yuv420p", (64, 48)),
        ("c.mkv", "ffv1", "yuv444p", (63, 47)),
        ("d.mkv", "libx264", "yuv420p10le", (64, 48)),
        ("e.mkv", "ffv1", "bgra", (64, 48)),
        ("f.mkv", "libx264", "yuvj420p", (64, 48)),
        ("g.ts", "libx264", "yuv420p", (64, 48)),
        ("h.avi", "mpeg4", "yuv420p", (64, 48)),
    ],
)
def test_formats(tmp_path, name, codec, pix_fmt, size):
    path = make(tmp_path / name, frames=12, codec=codec, pix_fmt=pix_fmt, size=size)
    clip = VideoClip(probe(path))
    assert clip.count() == 12
    frames = decode(clip)
    assert frames.shape == (12, size[1], size[0], 3)
    assert max(abs(got - level(i)) for i, got in enumerate(grey(frames))) <= 8
    assert probe(path).fps == 10


def test_gif(tmp_path):
    path = make(tmp_path / "a.gif", frames=12, codec="gif", pix_fmt="rgb8")
    clip = VideoClip(probe(path))
    assert (clip.count(), clip.fps) == (12, 10)
    assert max(abs(got - level(i)) for i, got in enumerate(grey(decode(clip)))) <= 40


def test_variable_frame_rate_gives_every_frame_once(tmp_path):
    times = [0, 100, 150, 400, 420, 900, 1000, 1100, 1800, 1900]
    path = make(tmp_path / "vfr.mkv", frames=10, times=times)
    clip = VideoClip(probe(path))
    assert clip.count() == 10
    assert_levels(decode(clip), range(10))


def test_one_frame(tmp_path):
    clip = VideoClip(probe(make(tmp_path / "one.mp4", frames=1)))
    assert clip.count() == 1
    assert_levels(decode(clip), [0])


def truncated(tmp_path, share: float):
    """An MP4 whose index comes first, cut off within its frames."""
    path = make(tmp_path / "cut.mp4", frames=60, options={"g": "10", "bf": "0"}, container={"moov_size": "8000"})
    data = path.read_bytes()
    start = data.index(b"mdat")
    path.write_bytes(data[: start + int((len(data) - start) * share)])
    return path


def test_a_truncated_file_gives_what_is_there_and_refuses_the_rest(tmp_path):
    path = truncated(tmp_path, 0.5)
    with pytest.raises(InputError, match=r"declares 60 frames, \d+ of them decode") as error:
        VideoClip(probe(path), where="Load").count()
    held = int(str(error.value).split("frames, ")[1].split()[0])
    assert 10 < held < 50
    clip = VideoClip(probe(path), frame_count=held - 1)
    assert_levels(decode(clip), range(held - 1))
    with pytest.raises(InputError, match=f"{held} frames decode"):
        VideoClip(probe(path), frame_count=held + 1).count()


def test_an_index_that_is_cut_off_is_refused(tmp_path, mp4):
    path = tmp_path / "headless.mp4"
    path.write_bytes(mp4.read_bytes()[:2000])
    with pytest.raises(InputError, match="headless"):
        probe(path, "Load")


def test_files_that_are_no_video(tmp_path):
    with pytest.raises(InputError, match=r"^Load: input 'file' is 'gone.mp4', which does not exist"):
        probe(tmp_path / "gone.mp4", "Load")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(InputError, match="0 bytes"):
        probe(empty, "Load")
    text = tmp_path / "text.mp4"
    text.write_text("no video " * 500)
    with pytest.raises(InputError, match=r"text\.mp4"):
        probe(text, "Load")
    with pytest.raises(InputError):
        probe(tmp_path, "Load")


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone_is_no_video_not_even_with_a_cover_picture(tmp_path, cover):
    path = tmp_path / "sound.mp3"
    with av.open(str(path), "w") as output:
        track = output.add_stream("libmp3lame", rate=RATE)
        if cover:
            picture_stream = output.add_stream("mjpeg", rate=1)
            picture_stream.width, picture_stream.height, picture_stream.pix_fmt = 64, 48, "yuvj420p"
        track.codec_context.layout = "mono"
        frame = av.AudioFrame.from_ndarray(tone(1.0), "flt", "mono")
        frame.sample_rate = RATE
        output.mux(track.encode(frame))
        output.mux(track.encode(None))
        if cover:
            output.mux(
                picture_stream.encode(av.VideoFrame.from_ndarray(picture(0, 64, 48)).reformat(format="yuvj420p"))
            )
            output.mux(picture_stream.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == cover
    with pytest.raises(InputError, match="audio only"):
        probe(path, "Load")


@pytest.mark.parametrize("codec", list(CODECS))
def test_what_is_written_comes_back(tmp_path, codec):
    path = tmp_path / f"out.{CODECS[codec].extension}"
    frames = frames_for(12, 64, 48)
    with VideoWriter(path, 12.5, 64, 48, codec=codec, quality=10, metadata={"prompt": {"a": 1}, "note": "x"}) as writer:
        writer.write(frames[:5])
        writer.write(frames[5:].astype(np.float32) / 255)
    info = probe(path)
    assert (info.width, info.height, info.fps) == (64, 48, Fraction(25, 2))
    got = decode(VideoClip(info)).astype(int)
    error = np.abs(got - frames)[:, 4:20, 4:28]  # inside the red patch: colour survives, not only brightness
    assert error.max() <= (0 if codec == "ffv1" else 6)
    assert_levels(got, range(12))
    with av.open(str(path)) as container:
        metadata = {key.lower(): value for key, value in container.metadata.items()}
    assert (metadata["prompt"], metadata["note"]) == ('{"a": 1}', "x")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_ntsc_rate_survives_as_a_float(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 30000 / 1001, 64, 48) as writer:
        writer.write(frames_for(3, 64, 48))
    assert probe(tmp_path / "a.mp4").fps == Fraction(30000, 1001)


def test_odd_sizes_are_padded_where_chroma_is_halved(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 10, 63, 47, quality=10) as writer:
        writer.write(frames_for(3, 63, 47))
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height) == (64, 48)
    last = decode(VideoClip(info))[1].astype(int)
    assert np.abs(last[-1] - last[-2]).max() <= 6
    with VideoWriter(tmp_path / "a.mkv", 10, 63, 47, codec="ffv1") as writer:
        writer.write(frames_for(3, 63, 47))
    assert np.array_equal(decode(VideoClip(probe(tmp_path / "a.mkv"))), frames_for(3, 63, 47))


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, mp4):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 10, 64, 48, audio_source=mp4) as writer:
        writer.write(frames_for(40, 64, 48))
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_bytes() == b"old"


def test_unusable_frames_and_settings_are_refused(tmp_path):
    path = tmp_path / "out.mp4"
    bad = np.ones((2, 48, 64, 3), np.float32)
    bad[1, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN or infinity\\) in frame 1"), VideoWriter(path, 10, 64, 48) as writer:
        writer.write(bad)
    with pytest.raises(InputError, match=r"shape \(2, 48, 32, 3\)"), VideoWriter(path, 10, 64, 48) as writer:
        writer.write(bad[:, :, :32])
    with pytest.raises(InputError, match="at least one frame"), VideoWriter(path, 10, 64, 48):
        pass
    with pytest.raises(InputError, match=r"'size' is 48x48; expected at least 64x32 pixels for h265"):
        VideoWriter(path, 10, 48, 48, codec="h265")  # which would break the process
    for settings in ({"fps": 0}, {"codec": "nope"}, {"quality": 52}, {"audio_source": tmp_path / "gone.mp4"}):
        with pytest.raises(InputError):
            VideoWriter(**{"path": path, "fps": 10, "width": 64, "height": 48, **settings})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("codec", "copied"), [("h264", "aac"), ("vp9", None), ("ffv1", "aac")])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_sound_is_carried_over_cut_to_the_range(tmp_path, mp4, codec, copied, start):
    path = tmp_path / f"out.{CODECS[codec].extension}"
    with VideoWriter(path, 10, 64, 48, codec=codec, audio_source=mp4, audio_range=(start, 1.5)) as writer:
        for _ in range(15):
            writer.write(frames_for(1, 64, 48))
    with av.open(str(path)) as container:
        name = container.streams.audio[0].codec_context.name
    assert name == copied if copied else name in ("opus", "libopus")
    samples, rate = read_audio(path)
    assert samples.shape[1] / rate == pytest.approx(1.5, abs=0.06)
    for at in (0.3, 1.1):
        assert frequency(samples, rate, at) == pytest.approx(200 + 400 * (start + at), abs=15)


def test_sound_ends_with_the_picture(tmp_path, mp4):
    with VideoWriter(tmp_path / "a.mp4", 10, 64, 48, audio_source=mp4) as writer:
        writer.write(frames_for(7, 64, 48))
    samples, rate = read_audio(tmp_path / "a.mp4")
    assert samples.shape[1] / rate == pytest.approx(0.7, abs=0.06)


def test_a_silent_source_gives_a_silent_file(tmp_path):
    silent = make(tmp_path / "silent.mp4", frames=5)
    assert read_audio(silent) is None
    with VideoWriter(tmp_path / "a.mp4", 10, 64, 48, audio_source=silent) as writer:
        writer.write(frames_for(5, 64, 48))
    assert not probe(tmp_path / "a.mp4").has_audio


def test_read_audio_cuts_to_the_sample(mp4):
    samples, rate = read_audio(mp4, 2.5, 0.25)
    assert (samples.shape, rate) == ((1, RATE // 4), RATE)
    whole, _ = read_audio(mp4)
    at = int(2.5 * RATE)
    assert np.abs(samples - whole[:, at : at + RATE // 4]).max() < 1e-3


@pytest.mark.parametrize(
    ("size", "limit", "multiple", "expected"),
    [
        ((768, 432), 672, 64, (576, 320)),
        ((768, 432), 672, 32, (672, 384)),
        ((432, 768), 672, 32, (384, 672)),
        ((640, 480), 672, 64, (512, 384)),
        ((512, 512), 512, 64, (512, 512)),
        ((1920, 1080), 0, 64, (1920, 1088)),
        ((20, 10), 0, 64, (64, 64)),
        ((20, 10), 672, 64, (64, 64)),
    ],
)
def test_fit_size(size, limit, multiple, expected):
    assert fit_size(*size, limit, multiple) == expected


def test_fit_size_stays_within_its_limit_and_near_the_aspect():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = (int(v) for v in rng.integers(100, 4000, 2))
        limit = int(rng.integers(64, 2000))
        got = fit_size(width, height, limit)
        assert got[0] % 64 == got[1] % 64 == 0 and min(got) >= 64 and max(got) <= limit
        if limit >= 512 and min(width, height) >= 512 and max(width / height, height / width) < 2:
            assert abs(math.log(got[0] / got[1] * height / width)) < 0.15
