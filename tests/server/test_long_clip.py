"""A clip ten times as long takes hardly more memory: the decoded video is never held, from file to file."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from comfy_client import ServerProcess
from long_edit import MemoryWatch, edit_long_clip, require_frames
from server_graph import node
from workflow_api import with_defaults

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
FEW, MANY, LARGE = 100, 600, 448  # frames; pixels of width and height of the file
HELD = (MANY - FEW) * LARGE**2 * 3  # bytes of the frames more if they were held, in the leanest form: a byte a value
SMALL, STEPS = 64, 1  # pixels that are edited
ALLOWED = HELD / 2  # the latents of 500 frames are 25 MB a copy at LARGE; peaks of the same work differ by tens of MB


def write_clip(server, frames: int) -> Path:
    """A bright square that wanders over a gradient, in the server's input folder."""
    path = server.base / "input" / f"large-{frames}.mp4"
    ramp = np.linspace(0, 200, LARGE, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], np.uint8(90)), axis=-1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = LARGE, LARGE, "yuv420p"
        for number in range(frames):
            shown, left = picture.copy(), 3 * number % (LARGE - 64)
            shown[left : left + 64, 100:164] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def peak_of_encode_and_save(server, frames: int) -> int:
    """Most bytes of the server's process while a clip goes from file to file through a VAE that costs nothing."""
    prompt = {
        "vae": node("TestBlockVAE"),
        "load": node("AdaFlowLoadVideo", file=write_clip(server, frames).name, size=0),
        "encode": node("AdaFlowEncodeVideo", source=["load", 0], vae=["vae", 0]),
        "save": node("AdaFlowSaveVideo", frames=["encode", 0], vae=["vae", 0], fps=24.0, filename_prefix="test/large"),
    }
    prompt = with_defaults(prompt, server.object_info())
    with MemoryWatch(server.process.pid, every=0.02) as watch:
        outputs = server.run(prompt)
    (file,) = server.files(outputs["save"])
    require_frames(server.fetch(file, server.base / "large.mp4"), frames)
    return watch.peak()


@pytest.fixture
def alone(server, tmp_path, monkeypatch):
    """A server that has run nothing yet, with a node for ``block_vae.BlockVAE``."""
    # else malloc keeps what was freed in an arena of each thread, 60 to 130 MB more in one run than in another
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 18))
    (tmp_path / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).parent / "block_vae.py", tmp_path / "custom_nodes")
    with ServerProcess(server.comfyui, tmp_path, cpu=True) as running:
        yield running


def test_encode_and_save_hold_no_clip(alone):
    few, many = (peak_of_encode_and_save(alone, frames) for frames in (FEW, MANY))
    assert many - few < ALLOWED


def test_a_whole_edit_holds_no_clip(alone):
    few, many = (edit_long_clip(alone, n, SMALL, STEPS, write_clip(alone, n))["peak"] for n in (FEW, MANY))
    assert many - few < ALLOWED
