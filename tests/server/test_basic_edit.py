"""The basic edit on both supported versions, and Cancel over HTTP."""

from pathlib import Path

import av
import pytest
from comfy_client import Interrupted
from demo_clip import render
from server_graph import basic_prompt

pytestmark = [pytest.mark.server, pytest.mark.timeout(1500)]


@pytest.fixture
def small_clip(any_server) -> str:
    target = any_server.base / "input" / "small.mp4"
    return (target if target.exists() else render(target, frames=6, width=64, height=64, fps=6)).name


def test_a_video_comes_out(any_server, small_clip, tmp_path):
    prompt = basic_prompt(any_server.object_info(), small_clip, frames=4)
    outputs = any_server.run(prompt, timeout=1200)
    (file,) = any_server.files(outputs["save"])
    with av.open(str(any_server.fetch(file, tmp_path / "edit.mp4"))) as container:
        assert len(list(container.decode(video=0))) == 4
    with av.open(str(tmp_path / "edit.mp4")) as container:
        assert container.streams.audio
        assert float(container.streams.video[0].average_rate) == pytest.approx(6)
    (picture,) = any_server.files(outputs["select"])
    assert Path(picture["filename"]).suffix == ".png"


def test_cancel_ends_the_prompt_and_the_next_one_runs(server, clip, object_info):
    def cancel_at_the_edit(progress):
        if progress.node_id in ("invert", "joint") and progress.value >= 1:
            server.interrupt()

    long = basic_prompt(object_info, clip, frames=4, steps=40)
    with pytest.raises(Interrupted):
        server.run(long, cancel_at_the_edit, timeout=600)
    short = basic_prompt(object_info, clip, frames=2, steps=1)
    short["save"]["inputs"]["filename_prefix"] = "test/after-cancel"
    assert server.files(server.run(short, timeout=600)["save"])
    assert not list((server.base / "output").rglob("*.part*"))
