"""Every file in workflows/, as shipped, submitted to a real server with a real clip; what comes out is decoded."""

import json
import subprocess
from pathlib import Path

import av
import pytest
from workflow_api import find_nodes, set_input, swap_node, workflow_to_api

pytestmark = [pytest.mark.server, pytest.mark.timeout(1500)]

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
FRAMES, SIZE, FPS = 12, 128, 12


@pytest.fixture(scope="session")
def controlnet(server) -> str:
    """Name of a small random ControlNet that fits the demo model."""
    target = server.base / "models" / "controlnet" / "tiny.safetensors"
    script = Path(__file__).with_name("make_controlnet.py")
    subprocess.run([server.python, str(script), str(server.comfyui), str(target)], check=True, capture_output=True)
    return target.name


@pytest.fixture
def small(object_info, clip, controlnet):
    """A function that makes a prompt of a shipped workflow: small clip, demo model, two steps; nothing else changed."""

    def make(path: Path) -> dict:
        prompt = workflow_to_api(json.loads(path.read_text()), object_info)
        swap_node(prompt, "CheckpointLoaderSimple", "AdaFlowLoadDemoModel", {})
        set_input(prompt, "ControlNetLoader", "control_net_name", controlnet)
        assert set_input(prompt, "AdaFlowLoadVideo", "file", clip) + len(find_nodes(prompt, "AdaFlowDemoClip")) >= 1
        for key, value in {"frames": FRAMES, "fps": FPS, "width": SIZE, "height": SIZE}.items():
            set_input(prompt, "AdaFlowDemoClip", key, value)
        limits = {"size": SIZE, "first_frame": 0, "frame_count": 0, "stride": 1, "multiple": 64}
        for key, value in limits.items():
            set_input(prompt, "AdaFlowLoadVideo", key, value)
        for entry in prompt.values():
            if isinstance(entry["inputs"].get("steps"), int):
                entry["inputs"]["steps"] = 2
        return prompt

    return make


def check_video(path: Path, sound: bool) -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (SIZE, SIZE)
        assert float(stream.average_rate) == pytest.approx(FPS)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == FRAMES
    assert frames[0].std() > 1, "the picture is one flat colour"
    with av.open(str(path)) as container:
        assert bool(container.streams.audio) == sound
        if sound:
            stream = container.streams.audio[0]
            seconds = sum(frame.samples for frame in container.decode(stream)) / stream.rate
            assert seconds == pytest.approx(FRAMES / FPS, abs=0.1)


def check_picture(path: Path) -> None:
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).width >= 8


def test_there_are_workflows():
    assert {"basic", "controlnet", "keyframes", "slim"} <= {
        word for path in WORKFLOWS for word in path.stem.lower().replace("_", "-").split("-")
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_shipped_workflow_runs_as_it_is(path, small, server, tmp_path):
    prompt = small(path)
    outputs = server.run(prompt, timeout=1200)
    saved = [(node, file) for node, entry in outputs.items() for file in server.files(entry)]
    assert saved, "the workflow shows nothing"
    for index, (node, file) in enumerate(saved):
        target = server.fetch(file, tmp_path / f"{index}-{Path(file['filename']).name}")
        if prompt[node]["class_type"] == "AdaFlowSaveVideo":
            check_video(target, sound="source" in prompt[node]["inputs"])
        elif target.suffix in (".png", ".jpg", ".webp"):
            check_picture(target)
    videos = find_nodes(prompt, "AdaFlowSaveVideo")
    assert set(videos) <= set(outputs)
    assert not list((server.base / "output").rglob("*.part*")), "something half-written is left"
