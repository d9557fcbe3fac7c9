"""A save that was broken off goes on after the last chunk it decoded, and ends in the bytes of an unbroken one."""

import logging
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from adaflow_pack.adaflow.runs import remove_old_runs
from adaflow_pack.adaflow.video_segments import SEGMENT
from adaflow_pack.adaflow.video_writer import VideoWriter
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from broken_runs import ENDS, flip, runs_of
from graph import AFRESH
from models import clip_latent
from small_vae import small_vae
from test_video_nodes import SAVE, write_clip

FRAMES, CHUNK = 2 * SEGMENT + 20, 16
DONE = SEGMENT + CHUNK  # of a save that is broken off before its sixth chunk
CODECS = ["h264", "h265", "vp9", "prores", "ffv1"]


@pytest.fixture(scope="module")
def vae():
    return small_vae()


@pytest.fixture(scope="module")
def samples():
    with torch.inference_mode():
        return clip_latent(FRAMES, (4, 8), seed=3)


@pytest.fixture(autouse=True)
def no_earlier_runs(comfy_folders):
    remove_old_runs(comfy_folders / "output" / "adaflow_runs", max_age=-1.0)


def save(samples, vae, **changes) -> Path:
    """The file that is saved."""
    options = {**SAVE, "fps": 8.0, "chunk": CHUNK, "filename_prefix": "resumed/clip", **changes}
    video = AdaFlowSaveVideo.execute({"samples": samples}, **options, vae=vae).args[0]
    return Path(video.get_stream_source())


@contextmanager
def decodes(vae, at: int = 0, action=None):
    """Count the frames that the VAE decodes, in the list that is given; before the ``at``-th chunk run ``action``."""
    counts, plain = [], vae.decode

    def counted(latents):
        counts.append(len(latents))
        if len(counts) == at:
            action()
        return plain(latents)

    vae.decode = counted
    try:
        yield counts
    finally:
        del vae.decode


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("codec", CODECS)
def test_it_goes_on_after_the_last_chunk(samples, vae, codec, end, comfy_folders, caplog):
    action, error = ENDS[end]
    whole = save(samples, vae, codec=codec).read_bytes()
    for at in (1, 3, 6, FRAMES // CHUNK):  # chunks; four make a segment
        with pytest.raises(error), decodes(vae, at, action):
            save(samples, vae, codec=codec)
        done = (at - 1) * CHUNK
        caplog.clear()
        with decodes(vae) as counts, caplog.at_level(logging.INFO):
            assert save(samples, vae, codec=codec).read_bytes() == whole
        assert sum(counts) == FRAMES - done
        assert (f"AdaFlow Save Video: resumed from frame {done} of {FRAMES}" in caplog.text) == (done > 0)
        assert runs_of(comfy_folders, "save") == []


def broken(samples, vae, **changes):
    """Leave a save that was broken off after one segment and a chunk."""
    with pytest.raises(ZeroDivisionError), decodes(vae, 6, lambda: 1 / 0):
        save(samples, vae, **changes)


def test_joining_is_done_again_without_decoding(samples, vae, monkeypatch):
    whole = save(samples, vae).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(VideoWriter, "copy", lambda *_: 1 / 0)
        save(samples, vae)
    with decodes(vae) as counts:
        assert save(samples, vae).read_bytes() == whole
    assert counts == []


@pytest.mark.parametrize("images", [False, True], ids=["latents", "images"])
def test_a_save_that_ends_meanwhile_under_the_same_prefix_is_not_overwritten(samples, vae, monkeypatch, images):
    few, others, inner = samples[:3], samples[3:6], []
    finish = VideoWriter.finish

    def finish_after_another(self):
        if not inner:
            inner.append(None)
            inner[0] = save(others, vae, filename_prefix="one/prefix")
            inner.append(inner[0].read_bytes())
        finish(self)

    monkeypatch.setattr(VideoWriter, "finish", finish_after_another)
    if images:
        options = {**SAVE, "fps": 8.0, "filename_prefix": "one/prefix"}
        outer = Path(AdaFlowSaveVideo.execute(torch.rand(3, 32, 64, 3), **options).args[0].get_stream_source())
    else:
        outer = save(few, vae, filename_prefix="one/prefix")
    assert outer != inner[0] and outer.is_file() and inner[0].read_bytes() == inner[1]


def changed(samples):
    other = samples.clone()
    other[FRAMES - 1, 2, 3, 1] += 1e-3
    return other


OTHERS = {
    "the same again": (lambda s, v: {}, True),
    "another name": (lambda s, v: {"filename_prefix": "resumed/other"}, True),
    "another chunk": (lambda s, v: {"chunk": 8}, True),
    "another clip": (lambda s, v: {"samples": changed(s)}, False),
    "another VAE": (lambda s, v: {"vae": small_vae(1)}, False),
    "another quality": (lambda s, v: {"quality": 11}, False),
    "another rate": (lambda s, v: {"fps": 9.0}, False),
    "another format": (lambda s, v: {"pixel_format": "yuv444p"}, False),
    "start afresh": (lambda s, v: {"resume": AFRESH}, False),
}


@pytest.mark.parametrize("change", OTHERS)
def test_only_a_save_of_the_same_goes_on(samples, vae, change):
    make, goes_on = OTHERS[change]
    broken(samples, vae)
    inputs = {"samples": samples, "vae": vae, **make(samples, vae)}
    with decodes(inputs["vae"]) as counts:
        save(**inputs)
    assert sum(counts) == FRAMES - goes_on * DONE


def test_the_chunk_that_fitted_is_not_exceeded_later(samples, vae):
    """Though the user's is larger: it may not fit again, and the last bits may depend on it."""
    broken(samples, vae, chunk=8)
    with decodes(vae) as counts:
        save(samples, vae, chunk=CHUNK)
    assert set(counts[:-1]) == {8}


def test_a_damaged_segment_is_noticed_and_all_is_done_again(samples, vae, comfy_folders, caplog):
    whole = save(samples, vae).read_bytes()
    broken(samples, vae)
    (run,) = runs_of(comfy_folders, "save")
    flip(run / "segment-00000.mp4")
    with decodes(vae) as counts, caplog.at_level(logging.INFO):
        assert save(samples, vae).read_bytes() == whole
    assert sum(counts) == FRAMES and "segment-00000.mp4 is missing or damaged: begins afresh" in caplog.text


def test_sound_and_metadata_are_put_in_at_the_end(samples, vae, comfy_folders):
    """So that a save goes on though the graph was changed elsewhere, and has the sound of its last run."""
    from comfy_api.latest import InputImpl

    path = write_clip(comfy_folders / "input" / "sounding.mp4", FRAMES, seed=1)
    source = InputImpl.VideoFromFile(str(path))
    whole = save(samples, vae, source=source).read_bytes()
    broken(samples, vae)
    with decodes(vae) as counts:
        assert save(samples, vae, source=source).read_bytes() == whole
    assert sum(counts) == FRAMES - DONE


def test_images_are_saved_without_a_run(comfy_folders, monkeypatch):
    monkeypatch.setattr(VideoWriter, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        AdaFlowSaveVideo.execute(torch.rand(3, 16, 16, 3), **{**SAVE, "fps": 5.0, "filename_prefix": "images/x"})
    assert runs_of(comfy_folders, "save") == []
    assert list((comfy_folders / "output" / "images").iterdir()) == []
