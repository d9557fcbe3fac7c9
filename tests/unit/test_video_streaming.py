"""Videos are read and written as a stream: a chunk in use and one ahead, whatever the length."""

import gc
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from adaflow_pack.adaflow import video
from adaflow_pack.adaflow.video import VideoClip, probe
from adaflow_pack.adaflow.video_decode import ahead
from adaflow_pack.adaflow.video_writer import VideoWriter
from video_files import assert_levels, make

ROOT = Path(__file__).resolve().parents[2]


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("adaflow-ahead")]


def wait_for(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_one_item_is_made_ahead_on_a_thread_and_never_two():
    made = []

    def items():
        for number in range(5):
            made.append((number, threading.current_thread()))
            yield number

    stream = ahead(items())
    for number in range(5):
        assert next(stream) == number
        assert wait_for(lambda n=number: len(made) == min(n + 2, 5))
        time.sleep(0.02)
        assert len(made) == min(number + 2, 5)
    assert next(stream, None) is None
    assert threading.current_thread() not in {thread for _, thread in made}
    assert workers() == []


def test_an_error_ahead_comes_where_its_item_would_have():
    def items():
        yield 1
        raise ZeroDivisionError("the second")

    stream = ahead(items())
    assert next(stream) == 1
    with pytest.raises(ZeroDivisionError, match="the second"):
        next(stream)
    assert workers() == []


def test_a_reader_that_stops_early_closes_file_and_thread(tmp_path, monkeypatch):
    opened = []
    plain = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: (opened.append(plain(*a, **k)), opened[-1])[1])
    frames = VideoClip(probe(make(tmp_path / "a.mp4", frames=30))).frames(4)
    next(frames)
    frames.close()
    assert workers() == []
    with pytest.raises(AssertionError, match="not open"):
        next(opened[-1].demux())


def test_decoding_goes_on_while_a_chunk_is_used(tmp_path, monkeypatch):
    clip, scaled = VideoClip(probe(make(tmp_path / "a.mp4", frames=12))), []
    plain = video.Scaler.__call__
    monkeypatch.setattr(video.Scaler, "__call__", lambda self, frame: (scaled.append(frame.pts), plain(self, frame))[1])
    frames = clip.frames(4)
    first = next(frames)
    assert wait_for(lambda: len(scaled) == 8)
    kept = first.copy()
    assert_levels(np.concatenate([first, *frames]), range(12))
    assert np.array_equal(first, kept)


def test_reading_holds_no_more_than_a_few_chunks(tmp_path):
    clip = VideoClip(probe(make(tmp_path / "a.mp4", frames=300, size=(320, 240))))
    clip.count()
    gc.collect()
    tracemalloc.start()
    try:
        for frames in clip.frames(8):
            assert frames.shape[1:] == (240, 320, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    chunk = 8 * 320 * 240 * 3
    assert 2 * chunk < peak < 4 * chunk


COPY = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pack.adaflow.video import VideoClip, probe
from pack.adaflow.video_writer import VideoWriter
clip = VideoClip(probe(sys.argv[2]), frame_count=int(sys.argv[4]))
sound = {"audio_source": sys.argv[2], "audio_range": clip.audio_range()}
with VideoWriter(sys.argv[3], clip.fps, clip.width, clip.height, **sound) as writer:
    for frames in clip.frames(8):
        writer.write(frames)
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(int(peak) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's peak memory in kilobytes")
def test_the_process_that_copies_a_long_video_stays_small(tmp_path):
    """All of it, also what FFmpeg holds: 1200 frames decoded are 69 MB."""
    source = make(tmp_path / "long.mp4", frames=1200, size=(160, 120), fps=30, sound="aac")
    peaks = []
    for frames in (200, 1200):
        command = [sys.executable, "-c", COPY, str(ROOT), str(source), str(tmp_path / "out.mp4"), str(frames)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout.split()[-1]))
        assert VideoClip(probe(tmp_path / "out.mp4")).count() == frames
    assert peaks[1] - peaks[0] < 25e6


def test_writing_holds_no_frame(tmp_path):
    chunk = np.random.default_rng(0).random((8, 96, 128, 3), np.float32)
    with VideoWriter(tmp_path / "a.mp4", 10, 128, 96) as writer:
        writer.write(chunk)
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(20):
                writer.write(chunk)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < chunk.nbytes
