"""300 damaged videos go the way of a short workflow: each gives frames or a clear error, whatever FFmpeg makes of it.

They are read in processes of their own, of limited memory, so that a crash names its seed and ends nothing else.
"""

import json
import re
import select
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from video_files import make, sounding

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs limits of memory for a process")

ROOT = Path(__file__).resolve().parents[2]
SEEDS, FRAMES = 300, 24
PATIENCE = 30.0  # seconds for one file
MOST_ADDRESSES, MOST_MEMORY = 2 << 30, 200e6
SOUND = {
    "a.mp4": ("aac", "mono"),
    "b.mkv": ("flac", "mono"),
    "c.webm": ("libopus", "stereo"),
    "d.mov": ("pcm_s16le", "stereo"),
    "e.mkv": ("aac", "hexadecagonal"),  # 16 channels
}


class Reader:
    """A process that reads video files; another one after it died."""

    def __init__(self, command: list[str], patience: float = PATIENCE):
        self._command, self._patience = command, patience
        self._start()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def __call__(self, path: Path) -> dict:
        """What the process said of the file; ``failed`` where it died or hung."""
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        if select.select([self._process.stdout], [], [], self._patience)[0]:
            line = self._process.stdout.readline()
            if line:
                return json.loads(line)
            said = f"the process ended with {self._process.wait()}"
        else:
            said = f"no answer within {self._patience:g} s"
        self.close()
        self._start()
        return {"name": path.name, "failed": said}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def damaged(source: Path, others: list[Path], seed: int) -> bytes:
    """A video's bytes cut off, with bits flipped, or with a piece of another file spliced in, often at its start."""
    draws, data = np.random.default_rng(seed), bytearray(source.read_bytes())
    kind, header = seed % 3, draws.random() < 0.5
    if kind == 0:
        return bytes(data[: draws.integers(1, len(data))])
    if kind == 1:
        start = data.rindex(b"moov") if source.suffix in (".mp4", ".mov") and header else 0  # the index at their end
        end = min(len(data), start + 2000) if header else len(data)
        for at in draws.integers(start, end, 2 ** draws.integers(0, 9)):
            data[at] ^= 1 << int(draws.integers(8))
        return bytes(data)
    other, length = others[draws.integers(len(others))].read_bytes(), int(draws.integers(16, 2000))
    target, start = (0, 0) if header else (int(draws.integers(len(data))), int(draws.integers(len(other))))
    data[target : target + length] = other[start : start + length]
    return bytes(data)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name, (codec, layout) in SOUND.items():
        sounding(folder / name, codec, FRAMES, layout)
    gif = make(folder / "f.gif", FRAMES, codec="gif", pix_fmt="rgb8")
    indexed = make(folder / "g.mp4", FRAMES, options={"g": "6"}, container={"moov_size": "4000"})  # the index first
    return [*(folder / name for name in SOUND), gif, indexed]


@pytest.fixture
def read_all(tmp_path):
    """A function from files to what came of each, by two processes side by side."""
    command = [sys.executable, str(Path(__file__).with_name("read_damaged.py")), str(ROOT), str(tmp_path)]
    readers = [Reader([*command, str(MOST_ADDRESSES)]) for _ in range(2)]

    def read(files: list[Path]) -> list[dict]:
        with ThreadPoolExecutor(2) as pool:
            halves = [pool.submit(lambda r, half: [r(f) for f in half], r, files[i::2]) for i, r in enumerate(readers)]
            return [said for half in halves for said in half.result()]

    yield read
    for reader in readers:
        reader.close()


def test_undamaged_they_are_read_whole(sources, read_all):
    assert {said["name"]: said.get("frames") for said in read_all(sources)} == {p.name: FRAMES for p in sources}


def test_each_gives_frames_or_a_clear_error(sources, read_all, tmp_path):
    files = []
    for seed in range(SEEDS):
        source = sources[seed // 3 % len(sources)]
        files.append(tmp_path / f"seed-{seed}{source.suffix}")
        files[-1].write_bytes(damaged(source, sources, seed))
    everything = read_all(files)
    assert len(everything) == SEEDS
    failed = {said["name"]: said["failed"] for said in everything if "failed" in said}
    assert not failed, f"neither frames nor a clear error: {failed}"
    for said in everything:
        assert said.get("frames", 1) >= 1, said
        message = said.get("refused", "Load: input 'file' is 'seed-0', as an example; expected another")
        assert re.fullmatch(r"(Load|Save): input '\w+' is .*(seed-\d|\d).*; expected .+", message), said
    outcomes = Counter("frames" if "frames" in said else "refused" for said in everything)
    assert min(outcomes["frames"], outcomes["refused"]) > SEEDS // 5, outcomes
    assert max(said["memory"] for said in everything) < MOST_MEMORY


@pytest.mark.parametrize(
    ("program", "expected"),
    [("input(); import os; os.abort()", "the process ended with -6"), ("input(); input()", "no answer within 0.5 s")],
    ids=["a crash", "a hang"],
)
def test_a_crash_and_a_hang_are_noticed_and_reading_goes_on(program, expected):
    reader = Reader([sys.executable, "-c", program], patience=5 if "abort" in program else 0.5)
    try:
        for name in ("seed-1.mp4", "seed-2.mp4"):
            assert reader(Path(name)) == {"name": name, "failed": expected}
    finally:
        reader.close()
