"""A clip ten times as long takes hardly more memory: the decoded video is never held, from file to file."""

import pytest
from comfy_client import ServerProcess
from long_edit import edit_long_clip

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
SIZE, DRAWN, STEPS = 64, 256, 1
FEW, MANY = 60, 600
DECODED = (MANY - FEW) * DRAWN * DRAWN * 3  # bytes of the frames that the long clip has more


def test_memory_does_not_grow_with_the_frames(server, tmp_path):
    with ServerProcess(server.comfyui, tmp_path, cpu=True) as alone:
        few, many = (edit_long_clip(alone, frames, SIZE, STEPS, DRAWN) for frames in (FEW, MANY))
    assert many["peak"] - few["peak"] < DECODED / 2
