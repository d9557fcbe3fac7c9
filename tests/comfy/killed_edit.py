"""A whole small edit in a process of its own, forked or a new interpreter: it notes its work in a file as it goes, and
dies where it is told to."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from adaflow_pack.adaflow.video import VideoClip, probe
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.joint_edit import AdaFlowJointKeyframeEdit
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from graph import select
from models import clip_latent, conditioning, small_model
from small_vae import small_vae

FRAMES, SIZE, STEPS, CHUNK, REFINE = 5, (8, 8), 3, 2, 1
SAVED, SAVED_CHUNK = 72, 8  # frames of two segments: those that were edited, again and again, each a little paler
STAGES = ("inversion", "selection", "joint", "propagation", "saving")
FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}  # as Python's audit hooks name them
FRESH = """
import os, sys
from pathlib import Path
benchmarks, folder = sys.argv[1:]
sys.path.insert(0, benchmarks)
from harness import start_comfyui
start_comfyui(Path(folder))
import torch
torch.set_num_threads(1)
os.fsync = lambda _: None
from killed_edit import KilledEdit
KilledEdit(Path(folder)).run()
"""  # as conftest.py has it


class Work(NamedTuple):
    """At ``at`` seconds ``stage`` began (of ``kind`` "begin"), ended ("end"), or was about to do some work.

    That is a forward of the UNet ("step", ``units`` the time of the diffusion), frames that the VAE decodes at once
    ("decode", ``units`` a hash of each one's latent), or a change below the output folder ("file", ``units`` what is
    done and the name of the file).
    """

    at: float
    stage: str
    kind: str
    units: tuple[str, ...]


class WorkLog:
    """Lines in a file, each appended at once, so that they outlive the process that writes them."""

    def __init__(self, path: Path):
        self.path, self.stage, self.last, self.delay, self._noted = path, "", None, 0.0, 0

    def note(self, kind: str, *units) -> None:
        """Add a line. After number ``last`` the process dies in ``delay`` seconds, but before any further work."""
        line = " ".join(map(str, (time.monotonic(), self.stage, kind, *units))) + "\n"
        if self.last is not None and self._noted > self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())
        os.close(file)
        if self._noted == self.last:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, whatever it does
            signal.setitimer(signal.ITIMER_REAL, max(self.delay, 1e-6))
        self._noted += 1

    @contextmanager
    def doing(self, stage: str):
        self.stage = stage
        self.note("begin")
        yield
        self.note("end")

    def read(self) -> list[Work]:
        parts = map(str.split, self.path.read_text().splitlines())
        return [Work(float(at), stage, kind, tuple(units)) for at, stage, kind, *units in parts]


class KilledEdit:
    """The edit below ``folder``, with ComfyUI's folders in it; one that is started again goes on with what is there."""

    def __init__(self, folder: Path):
        self.output, self._folder = folder / "output", folder
        self.log, self._result = WorkLog(folder / "work.txt"), folder / "result.json"
        self._model, self._vae = small_model("sd1"), small_vae()
        self._latent = {"samples": clip_latent(FRAMES, SIZE, seed=6)}
        self._source, self._positive, self._negative = (conditioning("sd1", seed) for seed in (1, 2, 3))

    def clean(self) -> None:
        """Begin with nothing on the disk."""
        for path in (self.log.path, self._result):
            path.unlink(missing_ok=True)
        for name in ("adaflow_runs", "killed"):
            shutil.rmtree(self.output / name, ignore_errors=True)

    def videos(self) -> list[str]:
        """Names of the finished videos."""
        return [path.name for path in (self.output / "killed").glob("[!.]*")]

    def fork(self, last: int | None = None, delay: float = 0.0) -> int:
        """Start it in a process that begins with the memory of this one, and give its id.

        It dies after ``last`` lines of its log and ``delay`` seconds, as :meth:`WorkLog.note` has it.
        """
        pid = os.fork()
        if pid == 0:
            try:
                self.log.last, self.log.delay = last, delay
                self.run()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return pid

    def start_fresh(self) -> int:
        """Start it in a new interpreter, which shares nothing with this one but the disk, and give its id."""
        command = [sys.executable, "-c", FRESH, str(Path(__file__).parents[2] / "benchmarks"), str(self._folder)]
        environment = dict(os.environ)
        if environment.pop("PYTHONDONTWRITEBYTECODE", ""):  # else each one would compile all of PyTorch's Python again
            environment["PYTHONPYCACHEPREFIX"] = str(self._folder / "compiled")
        return subprocess.Popen(command, env=environment).pid

    def finish(self, pid: int) -> list[str]:
        """Wait for a process; hashes of what it made."""
        assert os.waitpid(pid, 0)[1] == 0
        return json.loads(self._result.read_text())

    def run(self) -> None:
        """Edit in this process, which is good for nothing else afterwards."""
        unet, output = self._model.model.diffusion_model, str(self.output)
        forward, decode = unet._forward, self._vae.decode

        def note_file(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS:
                changed = arguments[1 if event in ("os.rename", "os.link") else 0]
                if str(changed).startswith(output) and (event != "open" or arguments[1] not in ("r", "rb", None)):
                    self.log.note("file", event, Path(changed).name)

        def noted_forward(x, timesteps, *args, **kwargs):
            self.log.note("step", float(timesteps[0]))
            return forward(x, timesteps, *args, **kwargs)

        def noted_decode(latents):
            self.log.note("decode", *(zlib.crc32(latent.numpy().tobytes()) for latent in latents.cpu()))
            return decode(latents)

        unet._forward, self._vae.decode = noted_forward, noted_decode
        sys.addaudithook(note_file)
        with torch.inference_mode():
            self._result.write_text(json.dumps([hashlib.sha256(part).hexdigest() for part in self._made()]))

    def _made(self) -> list[bytes]:
        """Do all stages: the latents they make, the video's frames and its file."""
        with self.log.doing("inversion"):
            inputs = self._model, self._source, self._latent, STEPS, "float16", CHUNK, "resume", REFINE
            trajectory, descriptors, noisiest = AdaFlowDDIMInvert.execute(*inputs).args
        with self.log.doing("selection"):
            plan = select(descriptors, max_clip=2)
        with self.log.doing("joint"):
            inputs = self._model, self._positive, self._negative, trajectory, plan, STEPS
            sampling = 3.0, "dpmpp_2m", "ddim_uniform", 0, 0.8, 0.8
            keyframes, edit = AdaFlowJointKeyframeEdit.execute(*inputs, *sampling).args
        with self.log.doing("propagation"):
            latent = AdaFlowTokenPropagate.execute(edit, True, CHUNK).args[0]
        rows = torch.arange(SAVED)
        shown = {"samples": latent["samples"][rows % FRAMES] * (1 - 0.003 * rows[:, None, None, None])}
        options = {"fps": 8.0, "codec": "ffv1", "quality": 10, "filename_prefix": "killed/clip", "chunk": SAVED_CHUNK}
        with self.log.doing("saving"):
            video = AdaFlowSaveVideo.execute(shown, **options, vae=self._vae).args[0]
        file = Path(video.get_stream_source())
        latents = [part["samples"].numpy().tobytes() for part in (noisiest, keyframes, latent)]
        return [*latents, *(frames.tobytes() for frames in VideoClip(probe(file)).frames(1)), file.read_bytes()]
