"""An in-process ComfyUI on the CPU: the one at ``COMFYUI_PATH``, imported as its own ``main.py`` would."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # models.py and graph.py

if os.environ.get("COMFYUI_PATH"):
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    _argv, sys.argv = sys.argv, ["main.py"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
        import comfy.model_management
        import comfy.sample
        import comfy.samplers
        import comfy.sd
        import comfy.utils
    finally:
        sys.argv = _argv


torch.set_num_threads(1)  # the models are so small that sharing an operation among threads costs more than it gains

collect_ignore_glob = [] if os.environ.get("COMFYUI_PATH") else ["test_*.py"]  # they import comfy at their top


def pytest_report_header():
    if collect_ignore_glob:
        return "tests/comfy left out: COMFYUI_PATH names no ComfyUI; scripts/test sets one up"
    return None


@pytest.fixture(scope="session", autouse=True)
def comfy_folders(tmp_path_factory):
    """ComfyUI's input, output and temp folders, fresh for this run."""
    if not os.environ.get("COMFYUI_PATH"):
        yield None
        return
    import folder_paths

    base = tmp_path_factory.mktemp("comfyui")
    for kind in ("input", "output", "temp"):
        (base / kind).mkdir()
        getattr(folder_paths, f"set_{kind}_directory")(str(base / kind))
    yield base


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Files need not survive a power loss here, and waiting for the disk at each step takes longer than the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def no_gradients():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
        yield
