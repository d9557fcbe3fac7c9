"""A process killed at any moment of an edit: run again, it ends in the same bits, with at most one step done twice, or
one chunk of frames that are decoded and saved."""

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
from pathlib import Path

import pytest
import torch
from adaflow_pack.adaflow import video_segments
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.joint_edit import AdaFlowJointKeyframeEdit
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from graph import select
from models import clip_latent, conditioning, small_model
from small_vae import small_vae
from test_video_nodes import SAVE, frames_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which this system cannot")
FRAMES, SIZE, STEPS, CHUNK, KILLS, KILLS_WHILE_SAVING = 5, (8, 8), 3, 2, 20, 8


class Prompt:
    """The whole edit as ComfyUI runs it, in processes of its own that start from the same memory."""

    def __init__(self, folders):
        self.model, self.vae, self.output = small_model("sd1"), small_vae(), folders / "output"
        self.latent = {"samples": clip_latent(FRAMES, SIZE, seed=6)}
        self.source, self.positive, self.negative = (conditioning("sd1", seed) for seed in (1, 2, 3))
        self.result = folders / "result.json"
        self._shared = mmap.mmap(-1, 24)  # with the processes, whatever becomes of them

    def counts(self) -> tuple[int, int, float]:
        """Forwards of the UNet, frames that went to the VAE, and when the first of them did, seconds."""
        return struct.unpack("qqd", self._shared[:])

    def _count(self, *counts) -> None:
        self._shared[:] = struct.pack("qqd", *counts)

    def start(self) -> int:
        """Fork a process that runs the prompt; its id."""
        self._count(0, 0, 0.0)
        self.result.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                with torch.inference_mode():
                    self.result.write_text(json.dumps(self._run_counted()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return pid

    def _run_counted(self) -> list[str]:
        unet = self.model.model.diffusion_model
        forward, decode = unet._forward, self.vae.decode

        def counted_forward(*args, **kwargs):
            forwards, *others = self.counts()
            self._count(forwards + 1, *others)
            return forward(*args, **kwargs)

        def counted_decode(latents):
            forwards, decoded, first = self.counts()
            self._count(forwards, decoded + len(latents), first or time.monotonic())
            return decode(latents)

        unet._forward, self.vae.decode = counted_forward, counted_decode
        return self._run()

    def _run(self) -> list[str]:
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
        file = Path(video.get_stream_source())
        parts = [part["samples"].numpy().tobytes() for part in (noisiest, keyframes, latent)]
        parts += [frames_of(file).tobytes(), file.read_bytes()]
        return [hashlib.sha256(part).hexdigest() for part in parts]

    def finish(self, pid: int) -> list[str]:
        assert os.waitpid(pid, 0)[1] == 0
        return json.loads(self.result.read_text())

    def clean(self) -> None:
        for name in ("adaflow_runs", "killed"):
            shutil.rmtree(self.output / name, ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_killed_edit_ends_in_the_same_bits_with_one_step_done_twice(comfy_folders, monkeypatch):
    monkeypatch.setattr(video_segments, "SEGMENT", CHUNK)
    prompt, seed = Prompt(comfy_folders), random.randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)
    prompt.clean()
    begun = time.monotonic()
    whole = prompt.finish(prompt.start())
    seconds, (total, _, saving) = time.monotonic() - begun, prompt.counts()
    resumed, killed_while_saving = 0, 0
    for number in range(KILLS):
        prompt.clean()
        pid = prompt.start()
        earliest = (saving - begun) / seconds if number < KILLS_WHILE_SAVING else 0.0
        time.sleep(moments.uniform(earliest, 1.0) * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done, decoded, _ = prompt.counts()
        assert prompt.finish(prompt.start()) == whole
        again, decoded_again, _ = prompt.counts()
        largest_step = 3 * FRAMES  # forwards: source, joint and propagation of every frame by itself at the most
        assert done + again <= total + largest_step
        resumed += again < total
        finished = [path.name for path in (prompt.output / "killed").iterdir() if not path.name.startswith(".")]
        assert len(finished) in (1, 2)  # a video has its name when it is whole; killed after that, there are two
        if len(finished) == 1:
            assert decoded + decoded_again <= FRAMES + CHUNK
            killed_while_saving += decoded > 0
        names = [path.name for path in prompt.output.rglob("*")]
        assert not [name for name in names if name.startswith(("save-", "segment-")) or "partial" in name]
    assert resumed > KILLS // 4
    assert killed_while_saving
