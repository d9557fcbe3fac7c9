"""A process killed at any moment of an edit: run again, it ends in the same bits, with at most one step done twice."""

import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import time
import traceback

import pytest
import torch
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.joint_edit import AdaFlowJointKeyframeEdit
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from graph import select
from models import clip_latent, conditioning, small_model
from small_vae import small_vae
from test_video_nodes import SAVE, frames_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which this system cannot")
FRAMES, SIZE, STEPS, CHUNK, KILLS = 5, (8, 8), 3, 2, 20


class Prompt:
    """The whole edit as ComfyUI runs it, in processes of its own that start from the same memory."""

    def __init__(self, folders):
        self.model, self.vae, self.output = small_model("sd1"), small_vae(), folders / "output"
        self.latent = {"samples": clip_latent(FRAMES, SIZE, seed=6)}
        self.source, self.positive, self.negative = (conditioning("sd1", seed) for seed in (1, 2, 3))
        self.result = folders / "result.json"
        self.forwards = mmap.mmap(-1, 8)  # shared with the processes, whatever becomes of them

    def count(self) -> int:
        return struct.unpack("q", self.forwards[:8])[0]

    def start(self) -> int:
        """Fork a process that runs the prompt; its id."""
        self.forwards[:8] = struct.pack("q", 0)
        self.result.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                with torch.inference_mode():
                    self.result.write_text(json.dumps(self._run()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return pid

    def _run(self) -> list[str]:
        unet = self.model.model.diffusion_model
        original = unet._forward

        def counted(*args, **kwargs):
            self.forwards[:8] = struct.pack("q", self.count() + 1)
            return original(*args, **kwargs)

        unet._forward = counted
        trajectory, descriptors, noisiest = AdaFlowDDIMInvert.execute(
            self.model, self.source, self.latent, STEPS, "float16", CHUNK
        ).args
        plan = select(descriptors, max_clip=2)
        keyframes, edit = AdaFlowJointKeyframeEdit.execute(
            self.model,
            self.positive,
            self.negative,
            trajectory,
            plan,
            STEPS,
            3.0,
            "dpmpp_2m",
            "ddim_uniform",
            0,
            0.8,
            0.8,
        ).args
        latent = AdaFlowTokenPropagate.execute(edit, True, CHUNK).args[0]
        options = {**SAVE, "fps": 8.0, "codec": "ffv1", "filename_prefix": "killed/clip"}
        video = AdaFlowSaveVideo.execute(latent, **options, vae=self.vae, chunk=CHUNK).args[0]
        parts = [part["samples"].numpy() for part in (noisiest, keyframes, latent)] + [
            frames_of(video.get_stream_source())
        ]
        return [hashlib.sha256(part.tobytes()).hexdigest() for part in parts]

    def finish(self, pid: int) -> list[str]:
        assert os.waitpid(pid, 0)[1] == 0
        return json.loads(self.result.read_text())

    def clean(self) -> None:
        for name in ("adaflow_runs", "killed"):
            shutil.rmtree(self.output / name, ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_killed_edit_ends_in_the_same_bits_with_one_step_done_twice(comfy_folders):
    prompt, seed = Prompt(comfy_folders), random.randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)
    prompt.clean()
    begun = time.monotonic()
    whole = prompt.finish(prompt.start())
    seconds, total = time.monotonic() - begun, prompt.count()
    resumed = 0
    for _ in range(KILLS):
        prompt.clean()
        pid = prompt.start()
        time.sleep(moments.random() * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done = prompt.count()
        assert prompt.finish(prompt.start()) == whole
        largest_step = 3 * FRAMES  # forwards: source, joint and propagation of every frame by itself at the most
        assert done + prompt.count() <= total + largest_step
        resumed += prompt.count() < total
        finished = [path.name for path in (prompt.output / "killed").iterdir() if not path.name.startswith(".")]
        assert len(finished) in (1, 2)  # a video has its name when it is whole; killed after that, there are two
    assert resumed > KILLS // 4
