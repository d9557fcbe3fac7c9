"""Ways to break off a run and to damage what it left on disk."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
from adaflow_pack.adaflow import runs


class Boom(Exception):
    """Whatever ends a run."""


def boom():
    raise Boom


def cancel():
    comfy.model_management.interrupt_current_processing(True)
    comfy.model_management.throw_exception_if_processing_interrupted()


ENDS = {"an error": (boom, Boom), "Cancel": (cancel, comfy.model_management.InterruptProcessingException)}


@contextmanager
def forwards(model, at: int = 0, action=None):
    """Count the forwards of a model's UNet, in the list that is given; before the ``at``-th, run ``action``."""
    unet, calls = model.model.diffusion_model, []
    original = unet._forward

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            action()
        return original(*args, **kwargs)

    unet._forward = counted
    try:
        yield calls
    finally:
        del unet._forward


def runs_of(folders: Path, kind: str) -> list[Path]:
    """The folders of one kind of run, the one used last at the end."""
    found = (folders / "output" / "adaflow_runs").glob(f"{kind}-*")
    return sorted(found, key=lambda folder: (folder / runs.MANIFEST).stat().st_mtime_ns)


def flip(path: Path) -> None:
    """Change one bit in the last quarter of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) * 7 // 8] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def change_manifest(folder: Path, **changes) -> None:
    """Change entries of a run's manifest, with the checksum that belongs to it then."""
    path = folder / runs.MANIFEST
    manifest = {**json.loads(path.read_text()), **changes}
    del manifest["checksum"]
    path.write_text(json.dumps({**manifest, "checksum": runs.digest(manifest)}))
