"""Trains the demo model on one GPU, in calls that may each be short: what a call leaves, the next one goes on from.

    COMFYUI_PATH=/path/to/ComfyUI python training/train.py --photos FOLDER --work FOLDER --out FOLDER --minutes 9

``--photos``: the folder that training/photos.py filled. Repeat the command until it says that all is trained, or add
``--last`` to one in which the UNet may learn for as long as is left; each call leaves weights to try in ``--out``.
Stages: autoencoder, latents, classifier, denoiser (UNet and text encoder), report. About 13 minutes on an H100. With
``--autoencoder`` the first and the third are those of another training, and all of the time is the UNet's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import autoencoder
import classifier
import denoiser
import torch
from common import Clock, Log, pack_module, save_whole, start_comfyui
from data import CLASSIFIER_FIRST, HELD_OUT, LANDSCAPE, WIDE, Photographs, photo_pictures, world_pictures
from safetensors.torch import load_file
from torchvision.utils import make_grid, save_image

SETTINGS = {
    "seconds": {"autoencoder": 215.0, "classifier": 8.0, "denoiser": 480.0},
    "pictures": {"world": [70000, 14000], "photo": [28000, 6000]},
    "classifier pictures": 20000,
    "report": {"captions": 200, "steps": 25, "guidance": 4.0},
}
SMALL = {
    "seconds": {"autoencoder": 2.0, "classifier": 1.0, "denoiser": 2.0},
    "pictures": {"world": [12, 4], "photo": [4, 4]},
    "classifier pictures": 16,
    "report": {"captions": 4, "steps": 2, "guidance": 4.0},
}

SHIPPED = "autoencoder-shipped.safetensors"  # in --work: packed, of another training
EARLIER = ("autoencoder", "classifier")  # stages before the denoiser's


def take_finished(given: Path, work: Path, log: Log) -> None:
    """Make the autoencoder of ``given`` and the classifier beside it those of ``work``; their log goes before its own.

    Args:
        given: a weights.safetensors; nothing is read of it but the autoencoder.

    Raises:
        ValueError: it holds no autoencoder, or ``work`` holds a training that began without one.
    """
    if (work / SHIPPED).exists():
        return
    if log.path.exists():
        raise ValueError(f"{work} holds a training with an autoencoder of its own; --autoencoder needs an empty folder")
    vae = {name: value for name, value in load_file(given).items() if name.startswith("vae.")}
    if not vae:
        raise ValueError(f"{given} holds no autoencoder")
    shutil.copyfile(given.with_name("classifier.safetensors"), work / "classifier.safetensors")
    beside = given.with_name("training-log.jsonl")
    lines = beside.read_text().splitlines() if beside.exists() else []
    whole = max((i + 1 for i, line in enumerate(lines) if json.loads(line)["stage"] in EARLIER), default=0)
    log.path.write_text("".join(f"{line}\n" for line in lines[:whole]))
    save_whole(vae, work / SHIPPED)
    log.add("autoencoder and classifier taken as they are", 0.0, weights=f"{given.resolve().parent.name}/{given.name}")


def pictures(counts: dict, photographs: Photographs, device, log: Log) -> list[tuple[torch.Tensor, list[str]]]:
    """Images and captions of both sizes, world and photographs together."""
    pools = []
    for i, size in enumerate((LANDSCAPE, WIDE)):
        started = time.monotonic()
        first = i * HELD_OUT // 2
        world = world_pictures(range(first, first + counts["world"][i]), size, device)
        middle = time.monotonic()
        photo = photo_pictures(photographs, counts["photo"][i], size, first)
        pools.append((torch.cat([world.images, photo.images]), world.captions + photo.captions))
        log.add("pictures", 0.0, size=str(size), world=middle - started, photo=time.monotonic() - middle)
    return pools


def keep_latents(path: Path, module, pools) -> None:
    """Write the latents and tokens that the UNet learns from."""
    tensors = {}
    for i, (images, captions) in enumerate(pools):
        tensors |= {f"values{i}": autoencoder.latents(module, images), f"tokens{i}": denoiser.tokenise(captions)}
    save_whole(tensors, path)


@torch.no_grad()
def report(module, auto, judge, device, log: Log, out: Path, seconds: float, settings: dict) -> None:
    """How well captions become pictures, by the classifier; a sheet of them to look at. All as it is shipped."""
    count = settings["captions"]
    scenes = world_pictures(range(HELD_OUT, HELD_OUT + count), LANDSCAPE, device)
    tokens = denoiser.tokenise(scenes.captions).to(device)
    size = (LANDSCAPE[0] // 8, LANDSCAPE[1] // 8)
    drawn = denoiser.sample(module, tokens, size, settings["steps"], settings["guidance"], 0)
    images = (auto.decode(drawn).clamp(-1, 1) + 1) / 2
    bytes_ = (images * 255).round().byte()
    names = [*pack_module("adaflow.demo.judge").ATTRIBUTES, "all"]
    right = classifier.accuracy(judge, bytes_, scenes.truth)
    log.add("samples", seconds, **dict(zip(names, right, strict=True)))
    right = classifier.accuracy(judge, scenes.images, scenes.truth)
    log.add("classifier on rendered", seconds, **dict(zip(names, right, strict=True)))
    psnr = autoencoder.held_out_psnr(auto, scenes.images)
    plain = scenes.truth[:, -1] == 0
    log.add("autoencoder on held-out world", seconds, all=psnr.mean().item(), photo=psnr[plain].mean().item())
    save_image(make_grid(images[:48], 8), out / "samples.jpg")
    (out / "samples.txt").write_text("\n".join(scenes.captions[:48]) + "\n")


def run(options: argparse.Namespace, settings: dict) -> bool:
    """Whether all is trained."""
    ends = time.monotonic() + options.minutes * 60
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(time.time_ns() % 2**31)
    log = Log(options.work / "log.jsonl")
    if options.autoencoder:
        take_finished(options.autoencoder, options.work, log)
    start_comfyui()
    photographs = Photographs(options.photos, device)
    begin_with = load_file(options.begin_with) if options.begin_with else {}
    log.add(
        "start",
        0.0,
        begin_with=bool(begin_with),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    )

    def clock(stage: str) -> Clock:
        return Clock(settings["seconds"][stage], ends, last=options.last and stage == "denoiser")

    kept = options.work / "latents.safetensors"
    pools = [] if kept.exists() else pictures(settings["pictures"], photographs, device, log)
    weights = pack_module("adaflow.demo.weights")
    if (options.work / SHIPPED).exists():
        vae = load_file(options.work / SHIPPED)
    else:
        auto = autoencoder.train(
            options.work, [images for images, _ in pools], clock("autoencoder"), log, device, begin_with
        )
        if auto is None:
            return False
        vae = weights.pack({f"vae.{name}": value for name, value in autoencoder.shipped(auto).items()})
    auto = autoencoder.as_shipped(vae, device)  # so that the UNet learns on its latents, and the report is of it
    if pools:
        keep_latents(kept, auto, pools)
        del pools
    seeds = range(CLASSIFIER_FIRST, CLASSIFIER_FIRST + settings["classifier pictures"])
    judge = classifier.train(
        options.work, lambda: world_pictures(seeds, LANDSCAPE, device), clock("classifier"), log, device
    )
    if judge is None:
        return False
    tensors = load_file(kept, device=str(device))
    latents = [denoiser.Latents(tensors[f"values{i}"], tensors[f"tokens{i}"]) for i in range(2)]
    timer = clock("denoiser")
    module, learner = denoiser.train(options.work, latents, timer, log, begin_with)
    module = denoiser.averaged(module, learner)
    tokens = torch.cat([pool.tokens for pool in latents])
    packed = weights.pack(denoiser.shipped(module, tokens)) | vae
    save_whole(packed, options.out / "weights.safetensors")
    half = {name: value.half().cpu() for name, value in judge.state_dict().items()}
    save_whole(half, options.out / "classifier.safetensors")
    seconds = {entry["stage"]: entry["seconds"] for entry in log.entries() if entry["stage"] in EARLIER}
    used = settings | {"seconds": seconds | {"denoiser": round(timer.total, 1)}}
    (options.out / "settings.json").write_text(json.dumps(used, indent=2) + "\n")
    denoiser.restore(module, packed)
    report(module, auto, judge, device, log, options.out, timer.used, settings["report"])
    (options.out / "training-log.jsonl").write_text(log.path.read_text())
    return timer.finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="JPEG files to crop from")
    parser.add_argument("--work", type=Path, required=True, help="where a call leaves its state for the next")
    parser.add_argument("--out", type=Path, required=True, help="where weights, log and samples go")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long this call may train")
    parser.add_argument("--last", action="store_true", help="end the training with this call")
    parser.add_argument(
        "--begin-with", type=Path, help="weights.safetensors of another training, instead of random ones"
    )
    parser.add_argument(
        "--autoencoder",
        type=Path,
        help="weights.safetensors whose autoencoder is finished, as is classifier.safetensors beside it",
    )
    parser.add_argument("--small", action="store_true", help="seconds of training, to try the script")
    options = parser.parse_args()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    done = run(options, SMALL if options.small else SETTINGS)
    print("all is trained" if done else "not done: repeat the command to go on")


if __name__ == "__main__":
    main()
