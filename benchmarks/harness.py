"""What the benchmarks share: a ComfyUI in this process, and clocks for its device."""

import gc
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from provenance import ROOT, commit, machine

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "comfy"), str(ROOT / "tests" / "unit")]


def start_comfyui(folder: Path) -> None:
    """Import ComfyUI in this process as its tests do, with its folders under ``folder``, and mount the pack."""
    if not os.environ.get("COMFYUI_PATH"):
        sys.exit("COMFYUI_PATH names no ComfyUI; scripts/test fetches one to .cache/comfyui-0.3.75")
    from conftest import mount_pack

    mount_pack()
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    import folder_paths

    folder = folder.resolve()  # ComfyUI compares it with absolute paths
    for kind in ("input", "output", "temp"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        getattr(folder_paths, f"set_{kind}_directory")(str(folder / kind))


def comfyui_version() -> str:
    """Of the ComfyUI that runs here."""
    from comfyui_version import __version__

    return __version__


def synchronize() -> None:
    """Wait until the GPU, if any, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak(empty: bool = True) -> None:
    """Begin a new peak of GPU memory; with ``empty`` give torch's unused memory back first."""
    gc.collect()
    if torch.cuda.is_available():
        if empty:
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """GiB that torch held on the GPU at most since the last reset; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


@contextmanager
def measured(results: dict, name: str, ballast: float = 0.0):
    """Put seconds and peak GPU memory of a block into ``results``, less ``ballast`` GiB that the benchmark holds."""
    reset_peak()
    synchronize()
    started = time.perf_counter()
    yield
    synchronize()
    seconds, peak = time.perf_counter() - started, peak_gib() - ballast
    results[name] = {"seconds": round(seconds, 3), "peak GiB": round(peak, 2)}
    print(f"{name}: {results[name]['seconds']:.2f} s, {results[name]['peak GiB']:.2f} GiB", flush=True)


def best_ms(function, seconds: float = 0.3) -> float:
    """Median milliseconds of a call, over at least 5 calls and so many seconds, after two that do not count."""
    for _ in range(2):
        function()
    times, begun = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begun < seconds:
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


def write_result(path: Path, content: dict, given_commit: str | None) -> None:
    """Write a result as JSON, with the command, machine and commit that it comes from."""
    about = {"command": "python " + " ".join(COMMAND), **machine(), "commit": commit(given_commit)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(about | content, indent=1) + "\n")
    partial.replace(path)


COMMAND = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
