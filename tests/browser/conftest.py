"""One real server for the browser tests, with a small clip in its input folder."""

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


@pytest.fixture(scope="session")
def browser_server(tmp_path_factory):
    """The ComfyUI at ``COMFYUI_PATH``; ``clip.mp4`` is 12 frames of 128x128 with sound, in two shots."""
    if not front_end.CHROMIUM:
        pytest.skip("no Chromium; set CHROMIUM or install it")
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("COMFYUI_PATH names no ComfyUI; scripts/test sets one up")
    with ServerProcess(Path(os.environ["COMFYUI_PATH"]), tmp_path_factory.mktemp("browser"), cpu=True) as running:
        render(running.base / "input" / "clip.mp4", frames=12, width=128, height=128, fps=12)
        yield running
