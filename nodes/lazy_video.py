"""A VIDEO that stays in its file: a range of frames, decoded when somebody asks."""

import io as std_io
import os
import shutil
import uuid
from fractions import Fraction
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import Input, InputImpl, Types

from ..adaflow.errors import InputError
from ..adaflow.video import VideoClip, probe
from ..adaflow.video_audio import read_audio
from ..adaflow.video_writer import VideoWriter

CHUNK = 16


class AdaFlowVideo(Input.Video):
    """ComfyUI's VIDEO over a :class:`VideoClip`.

    Numbers (size, duration, frame count, rate) are known without decoding. ``get_components`` decodes the whole range
    into memory, as any VIDEO does; ``save_to`` and ``get_stream_source`` stream.
    """

    def __init__(self, clip: VideoClip):
        self.clip = clip

    def get_dimensions(self) -> tuple[int, int]:
        """``(width, height)`` in pixels."""
        return self.clip.size

    def get_frame_count(self) -> int:
        """Number of frames in the range."""
        return self.clip.count()

    def get_frame_rate(self) -> Fraction:
        """Frames per second."""
        return self.clip.fps

    def get_duration(self) -> float:
        """Seconds."""
        return float(self.clip.count() / self.clip.fps)

    def get_components(self) -> Types.VideoComponents:
        """Decode everything: images (frames, height, width, 3) float32 in 0..1, sound, rate."""
        clip = self.clip
        images = torch.empty(clip.count(), clip.height, clip.width, 3)
        done = 0
        for frames in clip.frames(CHUNK):
            images[done : done + len(frames)] = torch.from_numpy(frames).float() / 255
            done += len(frames)
        audio = None
        sound = read_audio(clip.info.path, *clip.audio_range()) if clip.info.has_audio else None
        if sound is not None:
            audio = {"waveform": torch.from_numpy(sound[0]).unsqueeze(0), "sample_rate": sound[1]}
        return Types.VideoComponents(images=images, audio=audio, frame_rate=clip.fps)

    def save_to(
        self,
        path: str | std_io.BytesIO,
        format: Types.VideoContainer = Types.VideoContainer.AUTO,
        codec: Types.VideoCodec = Types.VideoCodec.AUTO,
        metadata: dict | None = None,
    ) -> None:
        """Write the range as H.264 in MP4 with its sound; a file that is whole and unchanged is copied, not encoded."""
        if self.clip.whole:
            InputImpl.VideoFromFile(str(self.clip.info.path)).save_to(path, format, codec, metadata)
            return
        if format not in ("auto", "mp4") or codec not in ("auto", "h264"):
            raise InputError(self.clip.where, "format, codec", f"{format}, {codec}", "auto, or mp4 and h264")
        if isinstance(path, (str, os.PathLike)):
            self._encode(Path(path), metadata)
            return
        target = _stored(lambda partial: self._encode(partial, metadata))
        try:
            with open(target, "rb") as file:
                shutil.copyfileobj(file, path)
        finally:
            target.unlink()

    def get_stream_source(self) -> str:
        """Path of a file that holds just this range; encoded into ComfyUI's temp folder when first asked for."""
        if self.clip.whole:
            return str(self.clip.info.path)
        target = _temp_path(f"adaflow_{self.clip.fingerprint()}.mp4")
        if not target.exists():
            self._encode(target, None)
        return str(target)

    def _encode(self, target: Path, metadata: dict | None) -> None:
        clip = self.clip
        with VideoWriter(
            target,
            clip.fps,
            clip.width,
            clip.height,
            times=clip.times(),
            audio_source=clip.info.path if clip.info.has_audio else None,
            audio_range=clip.audio_range(),
            metadata=metadata,
            where=clip.where,
        ) as writer:
            for frames in clip.frames(CHUNK):
                writer.write(frames)


def _temp_path(name: str) -> Path:
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def clip_of(video: Input.Video, where: str, what: str = "video") -> VideoClip:
    """The clip behind any VIDEO of input ``what``; one in memory is first written to ComfyUI's temp folder.

    Raises:
        InputError: it is no VIDEO, or no frame of it decodes.
    """
    if isinstance(video, AdaFlowVideo):
        return video.clip
    if not isinstance(video, Input.Video):
        raise InputError(where, what, f"a {type(video).__name__}", "a VIDEO")
    if isinstance(video, InputImpl.VideoFromComponents):  # its own get_stream_source fails in ComfyUI 0.3.52 and 0.3.75
        path = _stored(lambda partial: video.save_to(str(partial), format="mp4", codec="h264"))
    else:
        path = video.get_stream_source()
        if not isinstance(path, (str, os.PathLike)):
            data = path.getvalue()
            path = _stored(lambda partial: partial.write_bytes(data))
    return VideoClip(probe(path, where), where=where)


def _stored(write) -> Path:
    """A file in ComfyUI's temp folder that ``write(path)`` made as a whole."""
    target = _temp_path(f"adaflow_{uuid.uuid4().hex}.mp4")
    partial = target.with_suffix(".partial.mp4")
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
