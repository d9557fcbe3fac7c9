"""AdaFlowSaveVideo: latents or images into a video file, a chunk at a time, with the source's sound."""

import itertools
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PurePath

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, io, ui

from ..adaflow.errors import InputError, require, require_one_of
from ..adaflow.runs import Run, remove_old_runs
from ..adaflow.video import VideoClip
from ..adaflow.video_output import hidden_beside
from ..adaflow.video_segments import SegmentedWriter, coding_identity, disk_needs
from ..adaflow.video_writer import CODECS, PIXEL_FORMATS, VideoWriter
from .common import RESUME, disk_errors_explained, resumable_run, resume_input
from .encode_video import auto_chunk, require_finite, require_image_vae
from .lazy_video import clip_of
from .patching.fingerprint import fingerprint, vae_fingerprint
from .patching.preview import NodeText
from .patching.vae import ChunkedVAE, announce_vae
from .types import CATEGORY
from .validation import CheckedNode

NODE = "AdaFlow Save Video"
MAX_FPS = 1000.0
DEFAULT_QUALITY = 18
LONGEST_PREFIX = 200  # bytes: a file system takes 255 with the number, and what a temporary name adds


def _decoded(samples: torch.Tensor, vae, chunk: int, first: int) -> Iterator[torch.Tensor]:
    """Images (n, height, width, 3) of latents (frames, channels, h, w) from frame ``first`` on, a chunk at a time."""
    for images in ChunkedVAE(vae, chunk, NODE).decode(samples[first:]):
        cause = "finite pixels: the VAE overflows in half precision, start ComfyUI with --fp32-vae or --bf16-vae"
        require_finite(images, first, NODE, "vae", cause)
        yield images.float()
        first += len(images)


def _require_latents(samples: torch.Tensor, vae) -> None:
    require(
        samples.ndim == 4 and len(samples) > 0,
        NODE,
        "frames",
        f"a LATENT of shape {tuple(samples.shape)}",
        "(frames, channels, height, width)",
    )
    require_image_vae(vae, NODE)
    channels = getattr(vae, "latent_channels", samples.shape[1])
    got = f"a LATENT of {samples.shape[1]} channels"
    require(channels == samples.shape[1], NODE, "frames", got, f"{channels} channels, which the VAE decodes")
    for first in range(0, len(samples), 64):
        cause = "finite latents: the edit before this node broke down (half precision, or too high a cfg)"
        require_finite(samples[first : first + 64], first, NODE, "frames", cause)


def _require_images(frames) -> None:
    require(isinstance(frames, torch.Tensor), NODE, "frames", f"a {type(frames).__name__}", "a LATENT or an IMAGE")
    require(
        frames.ndim == 4 and len(frames) > 0 and frames.shape[-1] in (3, 4),
        NODE,
        "frames",
        f"an IMAGE of shape {tuple(frames.shape)}",
        "(frames, height, width, 3)",
    )


def _size(frames, vae) -> tuple[int, int, int]:
    """``(number of frames, width, height)`` of a LATENT, once decoded, or an IMAGE batch."""
    if isinstance(frames, dict) and "samples" in frames:
        _require_latents(frames["samples"], vae)
        count, _, height, width = frames["samples"].shape
        return count, width * vae.upscale_ratio, height * vae.upscale_ratio
    _require_images(frames)
    return len(frames), frames.shape[2], frames.shape[1]


def _announce_disk(run: Run, needs: tuple[int, int], text: NodeText) -> None:
    """Show the disk that a save will take, (surely, about) bytes, less what the run has; refuse what surely lacks."""
    folder = run.folder.parent
    least, about = 0 if run.progress else needs[0], max(0, needs[1] - run.size())
    removable = remove_old_runs(folder, least)
    free = shutil.disk_usage(folder).free
    text.put("disk", f"save: about {about / 1e9:.2f} GB of disk at its peak ({free / 1e9:.1f} free)")
    kept = f" (with the {removable / 1e9:.3f} GB of older runs, which were kept, it would not be enough)"
    room = f"{free / 1e9:.3f} GB that are free{kept if removable else ''}"
    require(
        least <= free,
        NODE,
        "frames",
        f"so large that the save takes at least {least / 1e9:.3f} GB of disk",
        f"at most the {room}: use a smaller size, or start ComfyUI with its output folder on a larger disk "
        "(--output-directory)",
    )


def _resumable_writer(
    samples: torch.Tensor, vae, chunk: int, resume: str, target: Path, settings: dict
) -> SegmentedWriter:
    """A writer that goes on where a save of the same was broken off, once what it needs is told."""
    text, size = NodeText(NODE), (settings["width"], settings["height"])
    announce_vae("decode", vae, size, len(samples), chunk, NODE, "frames", text)
    identity = {"latents": fingerprint(samples), "vae": vae_fingerprint(vae), **coding_identity(**settings)}
    run = resumable_run("save", identity, 0, NODE, resume, text)
    with run.closed_on_error():
        _announce_disk(run, disk_needs(len(samples), *size, settings["codec"], settings["quality"], chunk), text)
        writer = SegmentedWriter(run, target, **settings)
        if writer.frames_written:
            text.put("resume", f"resumed from frame {writer.frames_written} of {len(samples)}")
    return writer


def _frame_rate(fps: float, frames, clip: VideoClip | None) -> Fraction | float:
    if fps > 0:
        return fps
    if clip is not None:
        return clip.fps
    about = frames.get("adaflow_source", {}) if isinstance(frames, dict) else {}
    known = about.get("fps", 0)
    expected = "frames per second above 0, or source wired (or a LATENT of AdaFlow Encode Video), which tells it"
    require(known > 0, NODE, "fps", fps, expected)
    return known


def _times(rate: Fraction | float, count: int, clip: VideoClip | None) -> np.ndarray | None:
    """When the frames are shown: as the source's, if its rate varies and neither their number nor it was changed."""
    same = clip is not None and count == clip.count() and math.isclose(rate, clip.fps, rel_tol=1e-6)
    return clip.times() if same else None


class AdaFlowSaveVideo(CheckedNode):
    """Decodes, encodes and saves a video as a stream."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaFlowSaveVideo",
            display_name=NODE,
            category=CATEGORY,
            description="Saves latents or images as a video in ComfyUI's output folder, with the source's sound. "
            "Latents are decoded a chunk at a time, so that a long video never stands decoded in memory.",
            inputs=[
                io.MultiType.Input(
                    "frames",
                    types=[io.Latent, io.Image],
                    tooltip="The video's frames: a LATENT (then wire the VAE too) or an IMAGE batch.",
                ),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=MAX_FPS,
                    step=0.01,
                    tooltip="Frames per second. Range 0 to 1000, default 0: the source's. Turning it up plays faster; "
                    "sound is not stretched.",
                ),
                io.Combo.Input(
                    "codec",
                    options=list(CODECS),
                    default="h264",
                    tooltip="Default h264 (MP4), which everything plays; h265 (MP4) and vp9 (WebM) are smaller; prores "
                    "(MOV) is for editing programs; ffv1 (MKV) loses nothing and is large.",
                ),
                io.Int.Input(
                    "quality",
                    default=DEFAULT_QUALITY,
                    min=0,
                    max=63,
                    tooltip="Constant rate factor (CRF), no unit. Range 0 (best, largest) to 51 for h264 and h265, 63 "
                    "for vp9; default 18, nearly invisible loss. Not used by prores and ffv1.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/AdaFlow",
                    tooltip="Folder and start of the file's name under ComfyUI's output folder; a number follows. "
                    "Default video/AdaFlow. %date:yyyy-MM-dd% and %width% are filled in.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes a LATENT. Not needed for IMAGE."),
                io.Video.Input(
                    "source",
                    optional=True,
                    tooltip="The source VIDEO: its sound goes into the file, cut to the range AdaFlow Load Video took, "
                    "and its frame rate is used while fps is 0. Default: none, a silent file.",
                ),
                io.Int.Input(
                    "chunk",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="Frames decoded at a time. Range 0 to 1024, default 0: chosen by size. More is a little "
                    "faster and takes more memory; the result is the same.",
                ),
                io.Combo.Input(
                    "pixel_format",
                    options=["auto", *PIXEL_FORMATS],
                    default="auto",
                    optional=True,
                    tooltip="How colours are stored. Default auto: yuv420p for h264, h265 and vp9, which everything "
                    "plays; yuv422p10le for prores; RGB for ffv1. 444 keeps colours as fine as brightness, 10 bits "
                    "avoid bands in skies; few players show them. vp9 takes 8 bits, prores 422 or 444 in 10.",
                ),
                resume_input(
                    "resume (default): a save of the same latents with the same settings that was cancelled or crashed "
                    "goes on after the last chunk that was decoded, and ends in the same file. start "
                    "afresh: all frames are decoded again. An IMAGE batch always is."
                ),
            ],
            outputs=[io.Video.Output("VIDEO", display_name="video", tooltip="The saved file.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def check_constants(cls, constants: dict, wired: dict) -> None:
        """The file's name, before anything runs."""
        if "filename_prefix" in constants:
            require_inside(constants["filename_prefix"])

    @classmethod
    def execute(
        cls, frames, fps, codec, quality, filename_prefix, vae=None, source=None, chunk=0, pixel_format="auto",
        resume=RESUME[0],
    ) -> io.NodeOutput:  # fmt: skip
        require_one_of(codec, CODECS, NODE, "codec")
        require_one_of(resume, RESUME, NODE, "resume")
        require(0.0 <= fps <= MAX_FPS, NODE, "fps", fps, f"0 (the source's) to {MAX_FPS:g} frames per second")
        coding = {"codec": codec, "quality": quality, "pixel_format": None if pixel_format == "auto" else pixel_format}
        with disk_errors_explained(NODE):
            return cls._save(frames, fps, coding, filename_prefix, vae, source, chunk, resume)

    @classmethod
    def _save(cls, frames, fps, coding: dict, prefix, vae, source, chunk, resume) -> io.NodeOutput:
        clip = clip_of(source, NODE, "source") if source is not None else None
        count, width, height = _size(frames, vae)
        rate = _frame_rate(fps, frames, clip)
        names, subfolder = _names(prefix, CODECS[coding["codec"]].extension, width, height)
        target = next(names)
        _require_writable(target, prefix)
        sound = clip is not None and clip.info.has_audio
        settings = {
            "fps": rate,
            "width": width,
            "height": height,
            **coding,
            "times": _times(rate, count, clip),
            "audio_source": clip.info.path if sound else None,
            "audio_range": clip.audio_range() if sound else None,
            "metadata": cls._metadata(),
            "names": itertools.chain([target], names),
            "where": NODE,
        }
        chunk = chunk or auto_chunk(width, height)
        if isinstance(frames, torch.Tensor):
            writer = VideoWriter(target, **settings)
            images = (piece[..., :3].float().cpu() for piece in frames.split(chunk))
        else:
            writer = _resumable_writer(frames["samples"], vae, chunk, resume, target, settings)
            chunk = min(chunk, writer.chunk or chunk)  # more may not have fitted
            images = _decoded(frames["samples"], vae, chunk, writer.frames_written)
        progress = comfy.utils.ProgressBar(count)
        with writer:
            for piece in images:
                comfy.model_management.throw_exception_if_processing_interrupted()
                writer.write(piece.numpy())
                progress.update_absolute(writer.frames_written, count)  # with a picture the video would not show
        saved = ui.SavedResult(writer.path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(writer.path)), ui=ui.PreviewVideo([saved]))

    @classmethod
    def _metadata(cls) -> dict[str, str]:
        """The workflow, as ComfyUI's own Save Video stores it."""
        if args.disable_metadata or cls.hidden is None:
            return {}
        known = dict(cls.hidden.extra_pnginfo or {})
        if cls.hidden.prompt is not None:
            known["prompt"] = cls.hidden.prompt
        return {key: json.dumps(value) for key, value in known.items()}


def _encoded_length(name: str) -> float:
    """Bytes that a file system keeps of a name; infinity where it cannot be written."""
    try:
        return len(os.fsencode(name))
    except UnicodeEncodeError:
        return math.inf


def _require_writable(target: Path, prefix: str) -> None:
    """Raise :class:`InputError` unless a file can be made beside ``target``, under a name longer than it."""
    trial = hidden_beside(target, uuid.uuid4().hex)
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        expected = f"a name and a folder that ComfyUI can write to ({error.strerror} in {target.parent})"
        raise InputError(NODE, "filename_prefix", repr(prefix[:80]), expected) from error


def require_inside(prefix: str) -> None:
    """Raise :class:`InputError` unless files of that prefix lie, links followed, in ComfyUI's output folder."""
    parts, got = PurePath(prefix.replace("\\", "/")).parts, repr(prefix[:80])
    sound = "\0" not in prefix and ".." not in parts and _encoded_length(prefix) <= LONGEST_PREFIX
    output = Path(folder_paths.get_output_directory()).resolve()
    inside = sound and output.joinpath(*parts).parent.resolve().is_relative_to(output)
    expected = f"a name inside ComfyUI's output folder, of at most {LONGEST_PREFIX} bytes (é takes 2, Chinese 3)"
    require(inside, NODE, "filename_prefix", got, expected)


def _names(prefix: str, extension: str, width: int, height: int) -> tuple[Iterator[Path], str]:
    """``(paths, subfolder)``: files under ComfyUI's output folder, numbered on from the next that is free now."""
    require_inside(prefix)
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
    except OSError:
        raise
    except Exception as error:
        expected = "a name inside ComfyUI's output folder"
        raise InputError(NODE, "filename_prefix", repr(prefix), expected) from error
    return (Path(folder) / f"{name}_{number:05}_.{extension}" for number in itertools.count(counter)), subfolder
