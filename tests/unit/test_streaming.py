"""Descriptors, clips, matches and selections of a long video take the memory of a short one's."""

import re
import sys
from pathlib import Path

import pytest
import torch
from adaflow_pack.adaflow import matching, slimming
from adaflow_pack.adaflow.descriptors import Descriptors, DescriptorWriter
from adaflow_pack.adaflow.keyframes import Clips, CutThresholds, KeyframeDraws, cut_clips
from adaflow_pack.adaflow.memory import SmallestBlockError
from adaflow_pack.adaflow.picture import WIDEST, yt_picture
from adaflow_pack.adaflow.plan import EditPlan, KeyframePool
from adaflow_pack.adaflow.slimming import select_kv_by_blocks
from tensor_memory import TensorMemory

CHANNELS, SIZE, CLIP = 16, (6, 8), 10
FRAME_BYTES = CHANNELS * SIZE[0] * SIZE[1] * 4  # of descriptors in float32


def write(path: Path, frames: int, chunk: int = 8) -> Descriptors:
    """Descriptors of shots of ``CLIP`` frames, each a fresh random map that drifts."""
    writer = DescriptorWriter(path, (frames, CHANNELS, *SIZE), "model", "clip", "made", torch.zeros(frames, SIZE[0], 3))
    shot = None
    for start in range(0, frames, chunk):
        numbers, maps = list(range(start, min(start + chunk, frames))), []
        for number in numbers:
            shot = torch.randn(CHANNELS, *SIZE) if number % CLIP == 0 else shot + 0.01 * torch.randn_like(shot)
            maps.append(shot)
        writer.write(numbers, torch.stack(maps))
    return writer.close()


def peak(work) -> int:
    with TensorMemory() as measured:
        work()
    return measured.peak


@pytest.fixture(scope="module")
def short_and_long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("descriptors")
    return [write(folder / f"{frames}.safetensors", frames) for frames in (40, 400)]


def test_writing_takes_a_chunk(tmp_path):
    picture = SIZE[0] * 3 * 4  # a column of each frame is kept to be shown
    peaks = [peak(lambda n=n: write(tmp_path / f"{n}.safetensors", n)) - n * picture for n in (40, 400)]
    assert peaks[1] <= peaks[0] + FRAME_BYTES


def test_cutting_takes_a_reference_and_a_few_frames(short_and_long):
    def cut(descriptors):
        clips = cut_clips(descriptors.tokens, descriptors.frames, SIZE, CutThresholds())
        assert clips.starts == tuple(range(0, descriptors.frames, CLIP))

    peaks = [peak(lambda d=d: cut(d)) for d in short_and_long]
    assert peaks[1] == peaks[0] < 60 * FRAME_BYTES


def test_matching_takes_a_group_of_frames_and_the_cache(short_and_long):
    def match(descriptors):
        clips = Clips(tuple(range(0, descriptors.frames, CLIP)), descriptors.frames)
        plan = EditPlan(descriptors, clips, KeyframeDraws(), cache_bytes=20_000)
        for start in range(0, descriptors.frames, 4):
            frames = list(range(start, start + 4))
            plan.matches(frames, tuple(clips.starts[clips.of(frame)] for frame in frames), SIZE)

    peaks = [peak(lambda d=d: match(d)) for d in short_and_long]
    assert peaks[1] <= peaks[0] + 20_000 < 80 * FRAME_BYTES


def test_selecting_tokens_takes_a_pool_of_limited_size(short_and_long):
    """Beyond the pool and two blocks only the result and the importance of a block's tokens grow with the keyframes."""

    def select(descriptors, keyframes, pool_bytes):
        pool = KeyframePool(descriptors, None, "cpu")
        pool.hold(pool_bytes)
        select_kv_by_blocks(lambda rows: pool.tokens(keyframes[rows.start : rows.stop], 0), len(keyframes), 2, 4)

    _, descriptors = short_and_long
    few, many = tuple(range(0, 400, 40)), tuple(range(0, 400, 5))
    result = 2 * SIZE[0] * SIZE[1] * 4 * 3  # a keyframe's, in int32, beside the parts it is joined of
    importance = 2 * 4 * SIZE[0] * SIZE[1] * 4  # a keyframe's token to those of a block, and a working copy
    for pool_bytes in (0, 10 * FRAME_BYTES):
        peaks = [peak(lambda k=k, b=pool_bytes: select(descriptors, k, b)) for k in (few, many)]
        grown = (len(many) - len(few)) * (result + importance) + pool_bytes
        assert peaks[1] - peaks[0] <= grown < len(many) * FRAME_BYTES


def matched(descriptors) -> list[torch.Tensor]:
    """Every frame's matches in the keyframes of many steps."""
    frames, clips = list(range(descriptors.frames)), Clips((0, 10), descriptors.frames)
    plan = EditPlan(descriptors, clips, KeyframeDraws(seed=1))
    plan.expect(range(30), False)
    draws = [plan.keyframes(step) for step in range(30)]
    return [plan.matches(frames, tuple(draw[clips.of(frame)] for frame in frames), SIZE) for draw in draws]


def selected(descriptors) -> list[torch.Tensor]:
    """The tokens that some keyframes keep, twice: what did not fit is not tried again."""
    plan = EditPlan(descriptors, Clips((0,), descriptors.frames), KeyframeDraws())
    draws = [tuple(range(first, descriptors.frames, 3)) for first in (0, 1)]
    return [plan.kept(keyframes, 2, size) for keyframes in draws for size in (SIZE, (3, 4))]


@pytest.mark.parametrize(("work", "doing"), [(matched, "to match 8 frames"), (selected, "to select tokens of 1[34]")])
def test_where_memory_runs_out_a_stage_goes_on_with_less_and_the_same_bits(work, doing, tmp_path):
    """At every limit, down to where one keyframe at a time does not fit: that is an error with numbers."""
    maps = torch.randn(40, 128, *SIZE)
    writer = DescriptorWriter(tmp_path / "d.safetensors", maps.shape, "model", "clip", "made", torch.zeros(40, 6, 3))
    writer.write(list(range(40)), maps)
    descriptors = writer.close()
    with TensorMemory() as measured:
        whole = work(descriptors)
    limit = fitted = measured.peak
    with pytest.raises(SmallestBlockError, match=rf"out of memory with one keyframe .* GB, {doing}.* 8x6 tokens"):
        while True:
            limit = limit * 17 // 20
            with TensorMemory(limit):
                found = work(descriptors)
            assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
            fitted = limit
    assert fitted < 0.65 * measured.peak


def test_another_error_of_a_stage_is_not_taken_for_lack_of_memory(short_and_long, monkeypatch):
    calls = []

    def fail(*_):
        calls.append(1)
        raise RuntimeError("shapes do not match")

    for module, name, work in ((matching, "nearest_indices", matched), (slimming, "best_cosines", selected)):
        monkeypatch.setattr(module, name, fail)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            work(short_and_long[0])
    assert len(calls) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
def test_what_was_read_of_the_file_does_not_stay_in_the_process(tmp_path):
    """Pages of a memory map count as the process's for as long as it is mapped."""
    frames, shape, picture = 1500, (1500, 160, 24, 24), torch.zeros(1500, 24, 3)  # 276 MB
    writer = DescriptorWriter(tmp_path / "large.safetensors", shape, "model", "clip", "made", picture)
    writer._missing.clear()  # left empty: zeros
    descriptors = writer.close()

    def mapped() -> int:
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    before = mapped()
    for start in range(0, frames, 8):
        descriptors.maps(list(range(start, min(start + 8, frames))))
    assert mapped() - before < 50e6


@pytest.mark.parametrize("frames", [1, 40, 5000, 30_000])
def test_the_picture_of_a_long_video_is_no_wider_than_it_may_be(frames):
    cut = frames // 2
    clips = Clips((0, cut) if cut else (0,), frames)
    columns = torch.zeros(frames, 4, 3)
    columns[cut:] = 0.5
    picture = yt_picture(columns, clips, (frames - 1,), height=8)
    assert picture.shape[2] == {1: 16, 40: 640, 5000: 5000, 30_000: WIDEST}[frames]
    if cut:
        middle = picture.shape[2] // 2
        assert picture[0, 18, middle].tolist() == pytest.approx([1.0, 64 / 255, 64 / 255])  # the line of the cut
        before, after = picture[0, 20, middle // 2, 0], picture[0, 20, middle + middle // 2, 0]
        assert before == 0 and after == pytest.approx(0.5, abs=0.01)
