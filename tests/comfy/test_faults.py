"""A full disk, a folder that may not be written to, and Cancel, at every stage: an error that says what to do, and the
right result once the fault is gone. What was finished before stays as it was."""

import os
import resource
import signal
from contextlib import contextmanager

import comfy.model_management
import pytest
import torch
from adaflow_pack.adaflow.runs import remove_old_runs
from adaflow_pack.nodes.descriptors import AdaFlowExtractDescriptors
from adaflow_pack.nodes.encode_video import AdaFlowEncodeVideo
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.load_video import AdaFlowLoadVideo
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from graph import Graph, select
from models import clip_latent
from small_vae import small_vae
from test_video_nodes import SAVE, frames_of, write_clip

FRAMES, STEPS, CHUNK = 6, 3, 2
NOBODY = 65534


class Stages:
    """Every stage of an edit on one small clip; each returns tensors."""

    def __init__(self, folder):
        self.graph, self.vae = Graph("sd1", FRAMES, steps=STEPS), small_vae()
        self.latent = {"samples": clip_latent(FRAMES, seed=4)}
        self.plan, self.edit = select(self.graph.descriptors, max_clip=2), self.graph.joint()[1]
        write_clip(folder / "input" / "faults.mp4", FRAMES, (96, 64))

    def encode(self):
        video = AdaFlowLoadVideo.execute("faults.mp4", 0, 0, 1, 0, 8).args[0]
        return [AdaFlowEncodeVideo.execute(video, self.vae, CHUNK).args[0]["samples"]]

    def invert(self):
        trajectory, descriptors, noisiest = AdaFlowDDIMInvert.execute(
            self.graph.model, self.graph.source, self.latent, STEPS, "float16", CHUNK
        ).args
        return [trajectory.level(STEPS), trajectory.level(1), descriptors.maps([0, 5]), noisiest["samples"]]

    def extract(self):
        descriptors = AdaFlowExtractDescriptors.execute(self.graph.model, self.latent, 0, 1, -1, 0, None, CHUNK).args[0]
        return [descriptors.maps(list(range(FRAMES)))]

    def select(self):
        return [torch.tensor(select(self.graph.descriptors).clips.starts)]

    def joint(self):
        return [self.graph.joint(self.plan, resume="resume")[0]]

    def propagate(self):
        return [AdaFlowTokenPropagate.execute(self.edit, True, CHUNK).args[0]["samples"]]

    def save(self):
        options = {**SAVE, "fps": 8.0, "codec": "ffv1", "filename_prefix": "faults/clip"}
        video = AdaFlowSaveVideo.execute(self.latent, **options, vae=self.vae, chunk=CHUNK).args[0]
        return [torch.from_numpy(frames_of(video.get_stream_source()))]


ALL = ["encode", "invert", "extract", "select", "joint", "propagate", "save"]
WRITING = ["invert", "extract", "joint", "propagate", "save"]


@pytest.fixture(scope="module")
def stages(comfy_folders):
    with torch.inference_mode():
        yield Stages(comfy_folders)


@pytest.fixture(scope="module")
def whole(stages, comfy_folders):
    """Every stage's result where nothing goes wrong."""
    with torch.inference_mode():
        return {stage: getattr(stages, stage)() for stage in ALL}


@pytest.fixture(autouse=True)
def no_earlier_runs(comfy_folders, whole):
    remove_old_runs(comfy_folders / "output" / "adaflow_runs", max_age=-1.0)


def files_of(folders) -> dict:
    """Path -> time and size of all that ComfyUI's folders hold."""
    found = (path for path in folders.rglob("*") if path.is_file() and path.name != "lock")
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def check_rerun(stages, whole, stage, before, folders):
    """The files that were there before are as they were, no half file is left, and the stage now gives its result."""
    now = files_of(folders)
    assert {path: now.get(path) for path in before} == before
    assert not [path for path in now if "partial" in path.name]
    assert all(torch.equal(a, b) for a, b in zip(getattr(stages, stage)(), whole[stage], strict=True))


@contextmanager
def disk_of(nbytes: int):
    """No file grows beyond ``nbytes``, as on a full disk: the system refuses to write on."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


ADVICE = r"could not be written or read \(.*\)\. Free some disk space, .* queue again: what was finished is kept"


FULL = [(stage, nbytes) for nbytes in (0, 1500) for stage in WRITING]
FULL += [(stage, 20_000) for stage in ("invert", "extract", "save")]  # the files of the others are smaller


@pytest.mark.parametrize(("stage", "nbytes"), FULL)
def test_a_full_disk(stages, whole, stage, nbytes, comfy_folders):
    before = files_of(comfy_folders)
    with disk_of(nbytes), pytest.raises(RuntimeError, match=ADVICE) as caught:
        getattr(stages, stage)()
    assert isinstance(caught.value.__cause__, OSError)
    check_rerun(stages, whole, stage, before, comfy_folders)


def test_a_preview_that_cannot_be_written_costs_nothing_else(stages, whole, comfy_folders, caplog):
    with disk_of(0):
        assert torch.equal(stages.select()[0], whole["select"][0])
    assert "preview could not be written" in caplog.text


@contextmanager
def no_permission(folder):
    """``folder`` may be read and not written to; for root, who may all, by becoming nobody for a while."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(mode)


@pytest.mark.parametrize("stage", WRITING)
def test_a_read_only_folder(stages, whole, stage, comfy_folders, monkeypatch):
    import folder_paths

    for parent in (comfy_folders, *comfy_folders.parents[:2]):  # pytest's folders are closed to others
        parent.chmod(0o755)
    kind = "temp" if stage == "extract" else "output"
    folder = comfy_folders / f"read-only-{kind}-{stage}"
    folder.mkdir()
    before = files_of(comfy_folders)
    with monkeypatch.context() as patch:
        patch.setattr(folder_paths, f"{kind}_directory", str(folder))
        with no_permission(folder), pytest.raises(RuntimeError, match=ADVICE) as caught:
            getattr(stages, stage)()
        assert isinstance(caught.value.__cause__, PermissionError)
    assert list(folder.iterdir()) == []
    check_rerun(stages, whole, stage, before, comfy_folders)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("stage", ALL)
def test_cancel(stages, whole, stage, share, comfy_folders, monkeypatch):
    """At the first, the middle and the last moment at which a stage asks whether it was cancelled."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", lambda: asked.append(1))
        getattr(stages, stage)()
    assert len(asked) >= (2 if stage == "select" else 3)
    remove_old_runs(comfy_folders / "output" / "adaflow_runs", max_age=-1.0)
    left, before = [round(share * (len(asked) - 1))], files_of(comfy_folders)

    def cancelled():
        if left[0] == 0:
            raise comfy.model_management.InterruptProcessingException
        left[0] -= 1

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            getattr(stages, stage)()
    check_rerun(stages, whole, stage, before, comfy_folders)
