"""The finished video plays in AdaFlow Save Video, which a picture of its progress would prevent."""

from pathlib import Path

import front_end
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
SHOWN = """() => {
    const node = window.app.graph._nodes.find(n => n.type === 'AdaFlowSaveVideo')
    const video = node.videoContainer?.querySelector('video')
    return video && video.videoWidth ? [video.src, video.videoWidth, video.videoHeight] : null
}"""


def test_the_saved_video_plays_in_its_node(browser_server):
    with front_end.front_end(browser_server.url) as page:
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
