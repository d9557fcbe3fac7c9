"""What a result must say of where it comes from."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def commit(given: str | None = None) -> str:
    """``given``, or that of the working tree; "unknown" where it is no clone."""
    if given:
        return given
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def machine() -> dict[str, str]:
    """The GPU, if any, and the versions that matter for speed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    about = {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        about["cuda"] = str(torch.version.cuda)
    try:
        about["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        about["triton"] = "none"
    return about
