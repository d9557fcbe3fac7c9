"""A clip three times as long takes hardly more memory: the decoded video is never held, from file to file."""

import pytest
from comfy_client import ServerProcess
from long_edit import SHOT, edit_long_clip

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
SIZE, STEPS = 64, 2
FEW, MANY = 200, 600
DECODED = (MANY - FEW) * SIZE * SIZE * 3 * 4  # bytes of the difference as an IMAGE


def test_memory_does_not_grow_with_the_frames(server, tmp_path):
    with ServerProcess(server.comfyui, tmp_path, cpu=True) as alone:
        edit_long_clip(alone, SHOT, SIZE, STEPS)  # loads what a process loads once
        few, many = (edit_long_clip(alone, frames, SIZE, STEPS) for frames in (FEW, MANY))
    assert many["peak"] - few["peak"] < DECODED / 2
