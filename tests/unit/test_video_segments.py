"""A video written in segments: it plays as one written in a piece, and goes on where it was broken off."""

import errno
import itertools
import os
import random
from pathlib import Path

import av
import numpy as np
import pytest
from adaflow_pack.adaflow import video_segments
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.adaflow.runs import open_run
from adaflow_pack.adaflow.video import VideoClip, probe
from adaflow_pack.adaflow.video_segments import SEGMENT, SegmentedWriter, coding_identity
from adaflow_pack.adaflow.video_writer import CODECS, VideoWriter
from video_files import decode, packets, sounding

WIDTH, HEIGHT, FPS = 64, 48, 24000 / 1001


def moving(count: int, seed: int) -> np.ndarray:
    """A texture that slides, (count, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    texture = np.kron(rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([np.roll(texture, (i // 3, i), (0, 1)) for i in range(count)])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.mp4"
    sounding(path, "aac", frames=120)
    return path


def settings(codec, sound, count, uneven):
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.1, count)) if uneven else None
    return {
        "fps": FPS,
        "width": WIDTH,
        "height": HEIGHT,
        "codec": codec,
        "quality": 20,
        "pixel_format": None,
        "times": times - times[0] if uneven else None,
        "audio_source": sound,
        "audio_range": (0.4, 6.0),
        "metadata": {"prompt": {"a": 1}},
    }


def put(writer, frames, chunk):
    """Write what is not written yet, ``chunk`` frames at a time from a multiple of it on."""
    for first in range(writer.frames_written, len(frames), chunk):
        writer.write(frames[first : first + chunk])


def in_a_piece(path, frames, chosen):
    with VideoWriter(path, **chosen) as writer:
        put(writer, frames, 16)
    return path


def in_segments(path, frames, chosen, chunk=16, root=None):
    with SegmentedWriter(open_run(root or path.parent / "runs", "save", {}), path, **chosen) as writer:
        put(writer, frames, chunk)
    return path


def about(path) -> dict:
    """All that a player is told of the picture and its times."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        found = [packet for packet in container.demux(stream) if packet.size]
        return {
            "times": sorted(packet.pts for packet in found),
            "durations": [packet.duration for packet in sorted(found, key=lambda packet: packet.pts)],
            "decoded in order": all(a.dts < b.dts for a, b in itertools.pairwise(found)),
            "stream": [stream.time_base, stream.average_rate, stream.frames, stream.duration, stream.start_time],
            "codec": [context.name, context.codec_tag, context.profile, context.pix_fmt, context.width, context.height],
            "colours": [context.colorspace, context.color_range, context.color_primaries, context.color_trc],
            "container": [container.duration, container.start_time, dict(container.metadata)],
        }


def keyframes(path) -> list[int]:
    """Numbers of the frames that need no other."""
    with av.open(str(path)) as container:
        found = [packet for packet in container.demux(video=0) if packet.size]
    order = sorted(range(len(found)), key=lambda i: found[i].pts)
    return [place for place, i in enumerate(order) if found[i].is_keyframe]


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("codec", list(CODECS))
def test_it_plays_as_if_written_in_a_piece(tmp_path, sound, codec, uneven):
    count = random.choice([1, 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + random.randrange(SEGMENT)])
    frames, chosen = moving(count, seed=count), settings(codec, sound, count, uneven)
    extension = CODECS[codec].extension
    plain = in_a_piece(tmp_path / f"plain.{extension}", frames, chosen)
    joined = in_segments(tmp_path / f"joined.{extension}", frames, chosen)
    assert about(joined) == about(plain), count
    assert packets(joined) == packets(plain)  # of the sound
    assert set(range(0, count, SEGMENT)) <= set(keyframes(joined))
    got, expected = (decode(VideoClip(probe(path))).astype(int) for path in (joined, plain))
    assert got.shape == expected.shape == frames.shape
    errors = [np.abs(pictures - frames).mean((1, 2, 3)) for pictures in (got, expected)]
    assert (errors[0] <= errors[1].max() + 2).all(), count
    if codec == "ffv1":
        assert np.array_equal(got, frames)
    assert sorted(path.name for path in tmp_path.iterdir()) == [joined.name, plain.name, "runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("codec", list(CODECS))
def test_it_is_hardly_larger(tmp_path, codec):
    count = 4 * SEGMENT
    frames, chosen = moving(count, seed=1), settings(codec, None, count, False)
    extension = CODECS[codec].extension
    plain = in_a_piece(tmp_path / f"plain.{extension}", frames, chosen)
    joined = in_segments(tmp_path / f"joined.{extension}", frames, chosen)
    assert joined.stat().st_size < 1.1 * plain.stat().st_size


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("codec", list(CODECS))
def test_broken_off_anywhere_it_ends_in_the_same_bytes(tmp_path, sound, codec, uneven, monkeypatch):
    monkeypatch.setattr(video_segments, "SEGMENT", 8)
    count, chunk = random.randrange(30, 50), random.choice([3, 8, 11])
    frames, chosen = moving(count, seed=count), settings(codec, sound, count, uneven)
    extension = CODECS[codec].extension
    whole = in_segments(tmp_path / f"whole.{extension}", frames, chosen, chunk)
    broken, root = tmp_path / f"broken.{extension}", tmp_path / "runs"
    length = -(-8 // chunk) * chunk  # of a segment
    done = 0
    while done < count:
        with (
            pytest.raises(ZeroDivisionError),
            SegmentedWriter(open_run(root, "save", {}), broken, **chosen) as writer,
        ):
            assert writer.frames_written == done
            end = min(count, done + random.randrange(1, 2 * length // chunk + 1) * chunk)
            put(writer, frames[:end], chunk)
            done = end
            raise ZeroDivisionError
        assert not broken.exists()
    assert in_segments(broken, frames, chosen, chunk, root).read_bytes() == whole.read_bytes()


def test_broken_off_while_it_is_joined_it_is_joined_again(tmp_path, sound, monkeypatch):
    monkeypatch.setattr(video_segments, "SEGMENT", 8)
    frames, chosen = moving(20, seed=3), settings("h264", sound, 20, False)
    whole = in_segments(tmp_path / "whole.mp4", frames, chosen)
    copied = []

    def copy(self, path):
        copied.append(path)
        if len(copied) == 2:
            raise KeyboardInterrupt
        original(self, path)

    original = VideoWriter.copy
    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "copy", copy)
        with pytest.raises(KeyboardInterrupt):
            in_segments(tmp_path / "a.mp4", frames, chosen)
    run = open_run(tmp_path / "runs", "save", {})
    assert not (tmp_path / "a.mp4").exists()
    run.path("joined.partial").write_bytes(b"left over by a crash")
    with SegmentedWriter(run, tmp_path / "a.mp4", **chosen) as writer:
        assert writer.frames_written == 20
    assert (tmp_path / "a.mp4").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "runs", "whole.mp4"]


def test_two_saves_of_the_same_under_one_name_give_two_files(tmp_path, monkeypatch):
    """As by two servers: both begin before one of them is done, and join at the same time."""
    names = [tmp_path / f"a_{number}.mkv" for number in range(9)]
    clips = [moving(5, seed=1), moving(5, seed=2)]
    chosen = {**settings("ffv1", None, 5, False), "names": names}
    writers = [SegmentedWriter(open_run(tmp_path / "runs", "save", {}), names[0], **chosen) for _ in clips]
    original = VideoWriter.copy

    def copy(self, path):
        original(self, path)
        if len(writers) == 2:  # the first is about to take its name when the second is joined
            with writers.pop() as other:
                put(other, clips[1], 8)

    monkeypatch.setattr(VideoWriter, "copy", copy)
    with writers[0] as writer:
        put(writer, clips[0], 8)
    assert writer.path == names[1]
    assert np.array_equal(decode(VideoClip(probe(names[1]))), clips[0])
    assert np.array_equal(decode(VideoClip(probe(names[0]))), clips[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_0.mkv", "a_1.mkv", "runs"]


@pytest.mark.parametrize("refused", ["link", "replace"])
def test_it_takes_a_free_name_on_file_systems_without_links_and_on_another_one(tmp_path, monkeypatch, refused):
    names, frames = [tmp_path / f"a_{number}.mkv" for number in range(3)], moving(5, seed=1)
    names[0].write_bytes(b"here already")
    module, error = (os, errno.EPERM) if refused == "link" else (Path, errno.EXDEV)
    original = getattr(module, refused)

    def refusing(source, target):
        if refused == "link" or Path(source).parent != Path(target).parent:
            raise OSError(error, "no")
        return original(source, target)

    monkeypatch.setattr(module, refused, refusing)
    chosen = {**settings("ffv1", None, 5, False), "names": names}
    in_segments(names[0], frames, chosen)
    assert names[0].read_bytes() == b"here already"
    assert np.array_equal(decode(VideoClip(probe(names[1]))), frames)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_0.mkv", "a_1.mkv", "runs"]


def test_a_damaged_segment_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(video_segments, "SEGMENT", 8)
    frames, chosen = moving(20, seed=3), settings("ffv1", None, 20, False)
    with (
        pytest.raises(ZeroDivisionError),
        SegmentedWriter(open_run(tmp_path / "runs", "save", {}), tmp_path / "a.mkv", **chosen) as writer,
    ):
        put(writer, frames[:16], 8)
        raise ZeroDivisionError
    (segment,) = (tmp_path / "runs").glob("save-*/segment-00001.mkv")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1 << random.randrange(8)
    segment.write_bytes(data)
    run = open_run(tmp_path / "runs", "save", {})
    assert "segment-00001.mkv is missing or damaged: begins afresh" in run.note
    with SegmentedWriter(run, tmp_path / "a.mkv", **chosen) as writer:
        assert writer.frames_written == 0
        put(writer, frames, 8)
    assert np.array_equal(decode(VideoClip(probe(tmp_path / "a.mkv"))), frames)


def test_nothing_is_kept_of_a_run_without_a_whole_segment(tmp_path):
    chosen = settings("h264", None, 20, False)
    for frames, message in [(moving(1, 0)[:0], "at least one frame"), (None, "in frame 5")]:
        if frames is None:
            frames = np.ones((9, HEIGHT, WIDTH, 3), np.float32)
            frames[5, 0, 0, 0] = np.nan
        with pytest.raises(InputError, match=message):
            in_segments(tmp_path / "a.mp4", frames, chosen)
    with pytest.raises(InputError, match="'quality' is 52"):
        in_segments(tmp_path / "a.mp4", moving(9, 0), {**chosen, "quality": 52})
    assert [path.name for path in tmp_path.rglob("*") if path.name != "lock"] == ["runs"]


def test_what_a_segment_depends_on():
    chosen = settings("h264", None, 20, False)
    same = [{"metadata": None}, {"audio_range": None}, {"audio_source": "x.mp4"}]
    others = [
        {"fps": 24},
        {"width": 32},
        {"codec": "h265"},
        {"quality": 3},
        {"pixel_format": "yuv444p"},
        {"times": [0]},
    ]
    first = coding_identity(**chosen)
    assert all(coding_identity(**{**chosen, **change}) == first for change in same)
    assert all(coding_identity(**{**chosen, **change}) != first for change in others)


@pytest.mark.parametrize("size", [(64, 32), (64, 64), (192, 128)], ids=str)
@pytest.mark.parametrize("codec", list(CODECS))
def test_the_same_frames_give_the_same_bytes_each_time(tmp_path, codec, size):
    width, height = size
    frames = np.random.default_rng(0).random((24, height, width, 3), np.float32)
    found = set()
    for _ in range(3):
        with VideoWriter(tmp_path / "a", 24, width, height, codec=codec) as writer:
            writer.write(frames)
        found.add((tmp_path / "a").read_bytes())
    assert len(found) == 1
