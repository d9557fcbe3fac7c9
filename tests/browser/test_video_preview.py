"""The finished video plays in AdaFlow Save Video, also where a picture of its progress was shown before."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "scripts") not in sys.path:
    sys.path.append(str(ROOT / "scripts"))

import front_end  # noqa: E402
from comfy_client import ServerProcess  # noqa: E402
from demo_clip import render  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not front_end.CHROMIUM, reason="no Chromium; set CHROMIUM or install it"),
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI"),
]
SHOWN = """() => {
    const node = window.app.graph._nodes.find(n => n.type === 'AdaFlowSaveVideo')
    const video = node.videoContainer?.querySelector('video')
    return video && video.videoWidth ? [video.src, video.videoWidth, video.videoHeight] : null
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerProcess(Path(os.environ["COMFYUI_PATH"]), tmp_path_factory.mktemp("preview"), cpu=True) as running:
        render(running.base / "input" / "clip.mp4", frames=8, width=128, height=128, fps=8)
        yield running


@pytest.mark.xfail(
    strict=True,
    reason="AdaFlow Save Video's picture of its progress stays in the front end, which then loads no video; the test "
    "passes once the node reports progress without a picture",
)
def test_the_saved_video_plays_in_its_node(server):
    with front_end.front_end(server.url) as page:
        front_end.load_workflow(page, ROOT / "workflows" / "adaflow-slim-ksampler.json")
        front_end.swap_node(page, "CheckpointLoaderSimple", "AdaFlowLoadDemoModel")
        for kind, name, value in (
            ("AdaFlowLoadVideo", "file", "clip.mp4"),
            ("AdaFlowLoadVideo", "size", 128),
            ("AdaFlowLoadVideo", "frame_count", 8),
            ("KSampler", "steps", 2),
        ):
            assert front_end.set_widget(page, kind, name, value) == 1
        front_end.fit_view(page)  # the front end loads previews of nodes in sight
        assert front_end.queue_and_wait(page, 300) == "success"
        page.wait_for_function(SHOWN, timeout=20_000)
        source, width, height = page.evaluate(SHOWN)
        assert "AdaFlow_" in source
        assert (width, height) == (128, 128)
