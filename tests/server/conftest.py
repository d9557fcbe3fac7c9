"""Real ComfyUI servers, started once a session on a folder of their own with the checkout among the custom nodes."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "scripts", ROOT / "tests" / "server"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _start(tmp_path_factory, variable: str, name: str):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no ComfyUI; scripts/test sets one up")
    from comfy_client import ServerProcess

    return ServerProcess(Path(path), tmp_path_factory.mktemp(name), cpu=True)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The ComfyUI at ``COMFYUI_PATH``, on the CPU: a running :class:`comfy_client.ServerProcess`."""
    with _start(tmp_path_factory, "COMFYUI_PATH", "server") as running:
        yield running


@pytest.fixture(scope="session")
def old_server(tmp_path_factory):
    """The oldest ComfyUI that is supported, at ``ADAFLOW_COMFYUI_OLD``."""
    with _start(tmp_path_factory, "ADAFLOW_COMFYUI_OLD", "old-server") as running:
        yield running


@pytest.fixture(params=["server", "old_server"])
def any_server(request):
    """Each of the two in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def clip(server) -> str:
    """Name of a clip with sound in the server's input folder: 12 frames of 128x128 at 12 fps, two shots."""
    from demo_clip import render

    return render(server.base / "input" / "clip.mp4", frames=12, width=128, height=128, fps=12).name


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    return server.object_info()
