"""A long clip through a real server, from file to file: the memory and time it takes, for test and benchmark."""

import itertools
import threading
import time
from pathlib import Path

import av
import psutil
from demo_clip import render
from server_graph import basic_prompt, node

SHOT = 50  # frames; also the length of a clip of the edit, so that keyframes grow with the frames
KV_BUDGET = 8
POINTS = 300  # of memory over time that are kept


class MemoryWatch(threading.Thread):
    """Samples the resident memory of a process while a block runs.

    Attributes:
        samples: (seconds from the start, resident bytes, the node at work), in order.
        node: the node at work, set from outside.
    """

    def __init__(self, pid: int, every: float = 0.05):
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int, str]] = []
        self.node = ""
        self._process, self._every, self._end = psutil.Process(pid), every, threading.Event()

    def run(self) -> None:
        started = time.monotonic()
        while not self._end.wait(self._every):
            self.samples.append((time.monotonic() - started, self._process.memory_info().rss, self.node))

    def cpu_seconds(self) -> float:
        """What the process has used until now, in all its threads."""
        times = self._process.cpu_times()
        return times.user + times.system

    def __enter__(self) -> "MemoryWatch":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self._end.set()
        self.join()

    def peak(self, node: str | None = None) -> int:
        """Most bytes, in all or while ``node`` was at work."""
        return max((size for _, size, at in self.samples if node in (None, at)), default=0)

    def thinned(self) -> list[tuple[float, int, str]]:
        """At most ``POINTS`` samples: of each stretch the largest."""
        every = -(-len(self.samples) // POINTS)
        stretches = (self.samples[start : start + every] for start in range(0, len(self.samples), every))
        return [max(stretch, key=lambda sample: sample[1]) for stretch in stretches]


def long_prompt(object_info: dict, file: str, size: int, steps: int) -> dict:
    """The basic edit of a whole file with slimmed attention, a keyframe in every ``SHOT`` frames."""
    prompt = basic_prompt(object_info, file, frames=0, steps=steps)
    prompt["load"]["inputs"]["size"] = size
    prompt["slim"] = node("AdaFlowSlimAttention", model=["model", 0], kv_budget=KV_BUDGET, plan=["select", 0])
    prompt["joint"]["inputs"]["model"] = ["slim", 0]
    prompt["select"]["inputs"] |= {"mean_threshold": -1.0, "window_threshold": -1.0, "max_clip": SHOT}
    prompt["source"]["inputs"]["text"] = "a red car on a summer's day"
    prompt["positive"]["inputs"]["text"] = "a blue car on a summer's day"
    prompt["save"]["inputs"]["filename_prefix"] = "test/long"
    return prompt


def edit_long_clip(server, frames: int, size: int, steps: int, clip: Path | None = None) -> dict:
    """Edit a clip on a running server, and say what that took.

    Args:
        size: width and height that are edited, pixels.
        clip: a file in the server's input folder that has the frames; None: one that the demo world draws.

    Returns:
        ``frames``, ``seconds``, ``cpu`` seconds of the server's process, ``peak`` resident bytes; ``stages``: the last
        three of each node; ``memory``: some of (seconds, bytes, node).
    """
    if clip is None:
        clip = server.base / "input" / f"long-{frames}.mp4"
        render(clip, frames, size, size, fps=24, shots=max(1, frames // SHOT))
    prompt = long_prompt(server.object_info(), clip.name, size, steps)
    with MemoryWatch(server.process.pid) as watch:
        marks, begun = [], (time.monotonic(), watch.cpu_seconds())

        def passed() -> tuple[float, float]:
            return time.monotonic() - begun[0], watch.cpu_seconds() - begun[1]

        def follow(progress) -> None:
            if progress.node_id != watch.node:
                watch.node = progress.node_id
                marks.append((progress.node_id, *passed()))

        outputs = server.run(prompt, follow)
        marks.append(("", *passed()))
    (file,) = server.files(outputs["save"])
    require_frames(server.fetch(file, server.base / "edit.mp4"), frames)
    stages = {
        name: {"seconds": round(end - start, 2), "cpu": round(used - before, 2), "peak": watch.peak(name)}
        for (name, start, before), (_, end, used) in itertools.pairwise(marks)
    }
    _, seconds, cpu = marks[-1]
    about = {"frames": frames, "seconds": round(seconds, 1), "cpu": round(cpu, 1), "peak": watch.peak()}
    return {**about, "stages": stages, "memory": watch.thinned()}


def require_frames(path: Path, frames: int) -> None:
    """Assert that a video has just so many frames."""
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == frames
