"""Mounts the checkout as a package, as ComfyUI does, under the name ``adaflow_pack``.

The checkout itself is never put on ``sys.path``: it holds a folder ``nodes``, and ComfyUI has a module of that name.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = os.environ.get("COMFYUI_PATH")


def mount_pack(name: str = "adaflow_pack"):
    if name not in sys.modules:
        init = ROOT / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(ROOT)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


mount_pack()


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
