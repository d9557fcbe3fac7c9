"""Run as a program: reads the files named on standard input as the nodes do, and says what came of each, in JSON lines.

Arguments: the pack's folder, a scratch folder, and how many bytes of address space it may take. All memory counts from
when the libraries are loaded, which take much or little by what PyTorch was built for.
"""

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path


def mount(root: str) -> None:
    spec = importlib.util.spec_from_file_location("pack", f"{root}/__init__.py", submodule_search_locations=[root])
    sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def memory(kind: str) -> int:
    """Bytes of this program alone: VmHWM, most resident (``ru_maxrss`` begins at what its parent held), or VmSize."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def pass_through(path: Path, target: Path) -> int:
    """Load, read its frames and write them with the sound, as a short workflow does; the number of frames."""
    from pack.adaflow.video import VideoClip, fit_size, probe
    from pack.adaflow.video_audio import read_audio
    from pack.adaflow.video_writer import VideoWriter

    info = probe(path, "Load")
    clip = VideoClip(info, size=fit_size(info.width, info.height, 64, 8), where="Load")
    sound = {"audio_source": path, "audio_range": clip.audio_range()} if info.has_audio else {}
    if sound:
        read_audio(path, *clip.audio_range())
    with VideoWriter(target, clip.fps, *clip.size, times=clip.times(), where="Save", **sound) as writer:
        for frames in clip.frames(8):
            writer.write(frames)
    return writer.frames_written


def main(root: str, scratch: str, most_memory: str) -> None:
    mount(root)
    from pack.adaflow import video_writer  # noqa: F401  brings all of the libraries
    from pack.adaflow.errors import InputError

    resident, limit = memory("VmHWM"), memory("VmSize") + int(most_memory)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        path, started = Path(line.strip()), time.monotonic()
        said = {"name": path.name}
        try:
            said["frames"] = pass_through(path, Path(scratch) / f"{path.stem}.mp4")
        except InputError as error:
            said["refused"] = str(error)
        except BaseException as error:
            said["failed"] = f"{type(error).__name__}: {error}"
        said["seconds"] = time.monotonic() - started
        said["memory"] = memory("VmHWM") - resident
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
