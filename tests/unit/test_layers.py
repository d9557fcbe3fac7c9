"""The layers of docs/architecture.md, read from the sources: who may import what, and what may not be named at all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHOD = sorted((ROOT / "adaflow").glob("*.py"))
NODES = sorted((ROOT / "nodes").glob("*.py"))
PATCHING = sorted((ROOT / "nodes" / "patching").glob("*.py"))

METHOD_LIBRARIES = {"torch", "numpy", "einops", "safetensors", "av", "PIL", "triton", "filelock"}
COMFY_FOR_NODES = {
    "comfy_api.latest",
    "folder_paths",
    "comfy.utils",
    "comfy.model_management",
    "comfy.cli_args",
    "comfy.samplers",  # its lists of sampler and scheduler names
    "comfy_execution.validation",  # which link fits which input
    "latent_preview",
    "node_helpers",
}
# Each module of adaflow/ and those it may import: helpers that anyone may use, then the method from the bottom up.
ANYONE = {"errors", "kernels", "memory", "storage", "runs"}
ORDER = [
    {"ddim"},
    {"trajectory"},
    {"descriptors"},
    {"correspondence"},
    {"keyframes"},
    {"matching"},
    {"slimming", "slimming_triton"},
    {"attention", "attention_triton"},
    {"fused", "fused_triton"},
    {"propagation"},
    {"plan", "picture", "estimate"},
]
VIDEO = {"video", "video_audio", "video_decode", "video_output", "video_segments", "video_writer"}


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(dots, module, names) of every import statement, those inside functions too."""
    found = []
    for statement in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(statement, ast.Import):
            found += [(0, alias.name, []) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            found.append((statement.level, statement.module or "", [alias.name for alias in statement.names]))
    return found


def absolute(path: Path) -> list[str]:
    """Modules from outside the pack that a file imports."""
    return [module for dots, module, _ in imports(path) if dots == 0]


def siblings(path: Path) -> set[str]:
    """Modules of its own folder that a file imports by ``from .x import y`` or ``from . import x``."""
    found = set()
    for dots, module, names in imports(path):
        if dots == 1:
            found |= {module.split(".")[0]} if module else set(names)
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", METHOD, ids=name)
def test_the_method_imports_no_comfyui(path):
    outside = {module.split(".")[0] for module in absolute(path)}
    assert outside - METHOD_LIBRARIES - set(sys.stdlib_module_names) == set()
    assert all(dots <= 1 for dots, _, _ in imports(path)), "adaflow/ reaches out of its folder"


@pytest.mark.parametrize("path", METHOD, ids=name)
def test_the_method_imports_only_what_stands_above(path):
    own = path.stem
    if own == "__init__":
        return
    used = siblings(path) - ANYONE
    if own in ANYONE:
        assert used == set()
    elif own in VIDEO:
        assert used <= VIDEO
    else:
        place = next((i for i, group in enumerate(ORDER) if own in group), len(ORDER))
        above = set().union(*ORDER[: place + 1])
        assert used <= above, f"{own} imports {used - above}, which stands below it"


@pytest.mark.parametrize("path", NODES, ids=name)
def test_nodes_keep_to_comfyuis_public_modules(path):
    outside = set(absolute(path))
    comfy = {
        module for module in outside if module.split(".")[0] not in METHOD_LIBRARIES | set(sys.stdlib_module_names)
    }
    assert comfy - COMFY_FOR_NODES == set()


@pytest.mark.parametrize("path", METHOD + NODES + PATCHING + [ROOT / "__init__.py"], ids=name)
def test_no_absolute_import_of_the_packs_own_folders_and_no_pickle(path):
    assert {module.split(".")[0] for module in absolute(path)} & {
        "nodes",
        "adaflow",
        "adaflow_pack",
        "scripts",
    } == set()
    assert {module.split(".")[0] for module in absolute(path)} & {"pickle", "dill", "cloudpickle", "joblib"} == set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save"), f"torch.{node.attr} in line {node.lineno}: safetensors only"


def test_the_package_imports_where_there_is_no_comfyui(tmp_path):
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("some_name", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["some_name"] = module
spec.loader.exec_module(module)
assert callable(module.comfy_entrypoint) and module.WEB_DIRECTORY == "./web"
assert "nodes" not in sys.modules and {str(ROOT)!r} not in sys.path
assert not any(name.split(".")[0].startswith("comfy") for name in sys.modules)
"""
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
