"""AdaFlowLoadVideo: a range of a video file, resized, as a VIDEO that is decoded when needed."""

import logging
from dataclasses import replace
from pathlib import Path, PurePath

import folder_paths
from comfy_api.latest import io

from ..adaflow.errors import require
from ..adaflow.video import VideoClip, fit_size, probe
from .lazy_video import AdaFlowVideo, clip_of
from .types import CATEGORY
from .validation import CheckedNode

NODE = "AdaFlow Load Video"
UNWIRED = object()
MOST_FRAMES = 1_000_000
LONGEST_NAME = 1000  # characters, folders included


def input_videos() -> list[str]:
    """Names of the video files in ComfyUI's input folder."""
    folder = Path(folder_paths.get_input_directory())
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []
    return folder_paths.filter_files_content_types(names, ["video"])


def confined_path(name: str) -> Path:
    """The file a combo's value names, "clip.mp4" or "clip.mp4 [output]".

    Raises:
        InputError: it does not exist, or lies (after links are followed) outside ComfyUI's folders.
    """
    inside = "the name of a video in ComfyUI's input folder"
    sound = isinstance(name, str) and name.strip() and "\0" not in name and len(name) <= LONGEST_NAME
    require(sound, NODE, "file", repr(name)[:80], inside)
    plain, folder = folder_paths.annotated_filepath(name)
    plain = plain.strip()
    require(".." not in PurePath(plain.replace("\\", "/")).parts, NODE, "file", f"'{name}', which has '..'", inside)
    path = (Path(folder or folder_paths.get_input_directory()) / plain).resolve()
    getters = (folder_paths.get_input_directory, folder_paths.get_output_directory, folder_paths.get_temp_directory)
    allowed = any(path.is_relative_to(Path(get()).resolve()) for get in getters)
    require(allowed, NODE, "file", f"'{name}', which lies outside ComfyUI's folders", inside)
    require(path.is_file(), NODE, "file", f"'{name}', which does not exist", inside)
    return path


class AdaFlowLoadVideo(CheckedNode):
    """Opens a video file and picks a range; nothing is decoded but the first frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaFlowLoadVideo",
            display_name=NODE,
            category=CATEGORY,
            description="Picks a range of a video and its working size. The video stays in its file: "
            "frames are decoded where they are used, so its length costs no memory.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=input_videos(),
                    upload=io.UploadType.video,
                    tooltip="A video in ComfyUI's input folder; any format FFmpeg reads. Default: the first one. "
                    "Not used while the video input is wired.",
                ),
                io.Int.Input(
                    "first_frame",
                    default=0,
                    min=0,
                    max=MOST_FRAMES,
                    tooltip="Index of the first frame taken, in frames of the source. Range 0 to 1000000, default 0. "
                    "Turning it up starts later.",
                ),
                io.Int.Input(
                    "frame_count",
                    default=0,
                    min=0,
                    max=MOST_FRAMES,
                    tooltip="Number of frames taken. Range 0 to 1000000, default 0: all to the end. "
                    "More frames take time and disk in proportion.",
                ),
                io.Int.Input(
                    "stride",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="One of how many source frames is taken. Range 1 to 1000, default 1: every frame. "
                    "2 halves the frames and the frame rate; the speed of the action stays.",
                ),
                io.Int.Input(
                    "size",
                    default=672,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Limit for the longer side, in pixels. Range 0 to 4096, default 672; 0 keeps the source's "
                    "size, each side rounded to its nearest multiple. The aspect ratio is kept as closely as multiples "
                    "allow; a smaller video is not enlarged. More pixels cost time and memory.",
                ),
                io.Int.Input(
                    "multiple",
                    default=64,
                    min=8,
                    max=256,
                    step=8,
                    tooltip="Width and height become multiples of this many pixels. Range 8 to 256, default 64, which "
                    "every UNet takes. 32 follows the aspect ratio more closely (16:9 at 672 gives 672x384).",
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="A VIDEO to take in place of the file, from Load Video or any other node. Default: none.",
                ),
            ],
            outputs=[
                io.Video.Output("VIDEO", display_name="video", tooltip="The range, still in its file."),
                io.Int.Output("frames", display_name="frame_count", tooltip="Exact number of frames."),
                io.Float.Output("rate", display_name="fps", tooltip="Frames per second of the range."),
                io.Int.Output("width", display_name="width", tooltip="Pixels."),
                io.Int.Output("height", display_name="height", tooltip="Pixels."),
            ],
        )

    @classmethod
    def check_constants(cls, constants: dict, wired: dict) -> None:
        """The file lies in ComfyUI's folders, if it is to be read."""
        if "video" not in wired and "file" in constants:
            confined_path(constants["file"])

    @classmethod
    def fingerprint_inputs(cls, file=None, video=UNWIRED, **rest):
        """Time of change and length of the file: a file overwritten under its name is loaded anew."""
        if video is not UNWIRED or file is None:
            return "wired"
        status = confined_path(file).stat()
        return f"{status.st_mtime_ns}-{status.st_size}"

    @classmethod
    def execute(cls, file, first_frame, frame_count, stride, size, multiple, video=None) -> io.NodeOutput:
        if video is None:
            source = VideoClip(probe(confined_path(file), NODE), where=NODE)
        else:
            source = replace(clip_of(video, NODE), where=NODE)
        require(size == 0 or size >= multiple, NODE, "size", f"{size} pixels", f"0, or at least {multiple} pixels")
        fitted = fit_size(source.width, source.height, size, multiple)
        if source.first_frame == 0 and source.frame_count == 0 and source.stride == 1:
            clip = replace(source, first_frame=first_frame, frame_count=frame_count, stride=stride, size=fitted)
        else:
            clip = source.sub(first_frame, frame_count, stride, fitted)
        count = clip.count()
        logging.info("%s: %d frames of %dx%d at %.3f fps", NODE, count, *fitted, clip.fps)
        if count == 1:
            logging.warning("%s: one frame only; it will be edited as an image, there is nothing to propagate to", NODE)
        return io.NodeOutput(AdaFlowVideo(clip), count, float(clip.fps), *fitted)
