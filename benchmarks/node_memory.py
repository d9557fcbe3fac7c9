"""Peak memory of AdaFlow Encode Video and AdaFlow Save Video over clips of several lengths: it must not grow with them.

GPU memory where there is CUDA, and resident memory of the process, in which the latents lie. The VAE has Stable
Diffusion's size and random weights, in half precision on a GPU; the clips are a texture that slides.

    COMFYUI_PATH=... python benchmarks/node_memory.py --frames 200 4000 --out node-memory.json
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from provenance import ROOT

FULL = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}  # of Stable Diffusion's VAE, beside the small one's
WARM_UP = 32  # frames
WRITTEN = 16  # frames at a time


def write_clip(path: Path, frames: int, width: int, height: int) -> None:
    """An H.264 file of a texture that slides."""
    from adaflow_pack.adaflow.video_writer import VideoWriter

    blocks = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    texture = blocks.repeat(8, 0).repeat(8, 1)
    with VideoWriter(path, 24, width, height) as writer:
        for first in range(0, frames, WRITTEN):
            numbers = range(first, min(frames, first + WRITTEN))
            writer.write(np.stack([np.roll(texture, (i // 2, i), (0, 1)) for i in numbers]))


def measured(what: str, function):
    """``(result, seconds and peaks)`` of a call."""
    from long_edit import MemoryWatch

    harness.reset_peak()
    begun = time.perf_counter()
    with MemoryWatch(os.getpid()) as watch:
        result = function()
        harness.synchronize()
    found = {"seconds": round(time.perf_counter() - begun, 2), "resident GB": round(watch.peak() / 1e9, 3)}
    if torch.cuda.is_available():
        found["GPU GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    print(f"{what}: {found}", flush=True)
    return result, found


def both_nodes(frames: int, width: int, height: int, vae, folder: Path) -> dict:
    """Encode a clip of so many frames and save it again."""
    from adaflow_pack.nodes.encode_video import AdaFlowEncodeVideo
    from adaflow_pack.nodes.load_video import AdaFlowLoadVideo
    from adaflow_pack.nodes.save_video import AdaFlowSaveVideo

    clip = folder / "input" / f"{frames}.mp4"
    write_clip(clip, frames, width, height)
    video = AdaFlowLoadVideo.execute(clip.name, 0, 0, 1, 0, 8).args[0]
    encoded, encode = measured(f"encode {frames}", lambda: AdaFlowEncodeVideo.execute(video, vae))
    latent = encoded.args[0]
    _, save = measured(
        f"save {frames}", lambda: AdaFlowSaveVideo.execute(latent, 0.0, "h264", 18, f"video/{frames}", vae, video)
    )
    return {"frames": frames, "latents GB": latent["samples"].nbytes / 1e9, "encode": encode, "save": save}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[200, 4000])
    parser.add_argument("--size", type=int, nargs=2, default=[448, 256], help="width and height, pixels")
    parser.add_argument("--small", action="store_true", help="a VAE of a few channels, to try this on a CPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="written into the result where this is no clone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="node-memory-") as folder, torch.inference_mode():
        harness.start_comfyui(Path(folder))
        sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "server")]
        from small_vae import small_vae

        dtype = torch.float16 if torch.cuda.is_available() else torch.float32
        vae = small_vae(dtype=dtype, **({} if options.small else FULL))
        base = Path(folder).resolve()
        both_nodes(WARM_UP, *options.size, vae, base)
        runs = []
        for frames in options.frames:
            runs.append(both_nodes(frames, *options.size, vae, base))
            if options.out:  # after each, since the next one may take long
                about = {"comfyui": harness.comfyui_version(), "size": options.size, "dtype": str(dtype)}
                harness.write_result(options.out, {**about, "small": options.small, "runs": runs}, options.commit)


if __name__ == "__main__":
    main()
