"""The three nodes that read and write video, in a real ComfyUI, with a small random VAE."""

import asyncio
import json
import os
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import comfy.model_management
import comfy.utils
import execution
import folder_paths
import numpy as np
import pytest
import torch
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.adaflow.video import VideoClip, probe
from adaflow_pack.adaflow.video_writer import VideoWriter
from adaflow_pack.nodes.encode_video import AdaFlowEncodeVideo
from adaflow_pack.nodes.lazy_video import AdaFlowVideo
from adaflow_pack.nodes.load_video import AdaFlowLoadVideo
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from comfy_api.latest import InputImpl, Types, io
from small_vae import small_vae

import nodes as comfy_nodes

RATE = 44100
LOAD = {"first_frame": 0, "frame_count": 0, "stride": 1, "size": 0, "multiple": 8}
SAVE = {"fps": 0.0, "codec": "h264", "quality": 10, "filename_prefix": "video/test"}


def write_clip(path: Path, frames: int = 12, size=(32, 24), sound: bool = True, seed: int = 0) -> Path:
    """A noise clip with a tone."""
    pictures = np.random.default_rng(seed).integers(0, 255, (frames, *size[::-1], 3), dtype=np.uint8)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        track = output.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for picture in pictures:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        output.mux(stream.encode(None))
        if track is not None:
            wave = np.sin(np.arange(int(frames / 10 * RATE)) * 0.06).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, "flt", "mono")
            frame.sample_rate = RATE
            output.mux(track.encode(frame))
            output.mux(track.encode(None))
    return path


@pytest.fixture(scope="module")
def vae():
    return small_vae()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's input, output and temp folders, empty; the input folder holds ``clip.mp4``."""
    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    write_clip(tmp_path / "input" / "clip.mp4")
    return tmp_path


def load(**changes) -> tuple:
    return AdaFlowLoadVideo.execute(**{"file": "clip.mp4", **LOAD, **changes}).result


def frames_of(path) -> np.ndarray:
    return np.concatenate(list(VideoClip(probe(path)).frames(8)))


def left_in(folder: Path) -> list[str]:
    """All files, without the one that says who may clean up old runs."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.parts[-2:] != ("adaflow_runs", "lock"))


def validate(**changes) -> tuple[bool, list]:
    """What ComfyUI says to a prompt of one AdaFlowLoadVideo node."""
    comfy_nodes.NODE_CLASS_MAPPINGS["AdaFlowLoadVideo"] = AdaFlowLoadVideo
    prompt = {"1": {"class_type": "AdaFlowLoadVideo", "inputs": {"file": "clip.mp4", **LOAD, **changes}}}
    try:
        return asyncio.run(execution.validate_inputs("p", prompt, "1", {}))[:2]
    finally:
        del comfy_nodes.NODE_CLASS_MAPPINGS["AdaFlowLoadVideo"]


# --- AdaFlow Load Video


def test_load_tells_the_range_without_decoding_it(folders):
    video, count, fps, width, height = load(first_frame=2, stride=3)
    assert (count, fps, width, height) == (4, 10 / 3, 32, 24)
    assert (video.get_dimensions(), video.get_frame_count(), video.get_frame_rate()) == ((32, 24), 4, Fraction(10, 3))
    assert video.get_duration() == pytest.approx(1.2)
    assert left_in(folders / "temp") == []


def test_load_fits_the_size(folders):
    write_clip(folders / "input" / "wide.mp4", 2, (320, 180))
    assert load(file="wide.mp4", size=256, multiple=64)[3:] == (256, 128)
    with pytest.raises(InputError, match=r"AdaFlow Load Video: input 'size' is 32 pixels"):
        load(size=32, multiple=64)


def test_load_lists_the_videos_of_the_input_folder(folders):
    (folders / "input" / "notes.txt").write_text("no")
    assert AdaFlowLoadVideo.INPUT_TYPES()["required"]["file"][1]["video_upload"] is True
    options = AdaFlowLoadVideo.define_schema().inputs[0].options
    assert options == ["clip.mp4"]


def test_load_takes_a_wired_video_in_place_of_the_file(folders):
    path = write_clip(folders / "input" / "other.mp4", 5)
    assert load(file="", video=InputImpl.VideoFromFile(str(path)))[1] == 5
    images = torch.rand(3, 48, 64, 3)
    made = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(7)))
    assert load(file="", video=made)[1:3] == (3, 7.0)
    inner = load(first_frame=2, frame_count=8, stride=1)[0]
    assert load(file="", video=inner, first_frame=1, stride=3)[0].clip.first_frame == 3
    with pytest.raises(InputError, match="a Tensor; expected a VIDEO"):
        load(video=images)


def test_the_lazy_video_serves_core_nodes(folders):
    video = load(first_frame=2, frame_count=5)[0]
    components = video.get_components()
    expected = frames_of(folders / "input" / "clip.mp4")[2:7]
    assert torch.equal(components.images, torch.from_numpy(expected).float() / 255)
    assert components.audio["waveform"].shape == (1, 1, RATE // 2)
    assert components.frame_rate == 10

    video.save_to(str(folders / "out.mp4"), metadata={"prompt": {"a": 1}})
    assert np.abs(frames_of(folders / "out.mp4").astype(int) - expected).mean() < 15
    assert probe(folders / "out.mp4").has_audio
    buffer = BytesIO()
    video.save_to(buffer)
    assert len(buffer.getvalue()) > 1000 and left_in(folders / "temp") == []

    source = video.get_stream_source()
    assert VideoClip(probe(source)).count() == 5
    assert video.get_stream_source() == source and left_in(folders / "temp") == [Path(source).name]
    assert video.get_container_format().startswith("mov")
    with pytest.raises(InputError, match="webm"):
        video.save_to(str(folders / "x.webm"), format="webm")


def test_a_whole_video_is_handed_on_as_its_file(folders):
    video = load()[0]
    assert video.get_stream_source() == str((folders / "input" / "clip.mp4").resolve())


@pytest.mark.parametrize(
    "name", ["../secret.mp4", "a/../../secret.mp4", "link.mp4", "/etc/passwd", "gone.mp4", "", "."]
)
def test_load_refuses_files_outside_its_folders(folders, name):
    write_clip(folders / "secret.mp4", 2)
    (folders / "input" / "link.mp4").symlink_to(folders / "secret.mp4")
    message = AdaFlowLoadVideo.validate_inputs(file=name)
    assert isinstance(message, str) and message.startswith("AdaFlow Load Video: input 'file'")
    with pytest.raises(InputError, match="AdaFlow Load Video: input 'file'"):
        load(file=name)
    ok, errors = validate(file=name)
    assert not ok and "AdaFlow Load Video" in errors[0]["details"]


def test_load_takes_subfolders_and_annotated_names(folders):
    (folders / "input" / "sub").mkdir()
    write_clip(folders / "input" / "sub" / "a.mp4", 2)
    write_clip(folders / "output" / "b.mp4", 3)
    assert load(file="sub/a.mp4")[1] == 2
    assert load(file="b.mp4 [output]")[1] == 3
    assert validate(file="b.mp4 [output]")[0]


def test_comfyui_itself_refuses_numbers_out_of_range(folders):
    assert validate()[0]
    for changes in ({"first_frame": -1}, {"stride": 0}, {"frame_count": 10**9}, {"size": 5000}, {"multiple": 0}):
        assert not validate(**changes)[0], changes


def test_load_errors_name_node_input_and_numbers(folders):
    with pytest.raises(InputError, match=r"^AdaFlow Load Video: input 'frame_count' is 13 .*12 frames decode"):
        load(frame_count=13)
    (folders / "input" / "empty.mp4").touch()
    with pytest.raises(InputError, match=r"^AdaFlow Load Video: input 'file' is 'empty.mp4'.*0 bytes"):
        load(file="empty.mp4")


def test_a_changed_file_changes_the_fingerprint(folders):
    before = AdaFlowLoadVideo.fingerprint_inputs(file="clip.mp4", **LOAD)
    assert before == AdaFlowLoadVideo.fingerprint_inputs(file="clip.mp4", **LOAD)
    status = (folders / "input" / "clip.mp4").stat()
    os.utime(folders / "input" / "clip.mp4", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    assert before != AdaFlowLoadVideo.fingerprint_inputs(file="clip.mp4", **LOAD)
    assert AdaFlowLoadVideo.fingerprint_inputs(file="", video=None, **LOAD) == "wired"


def test_one_frame_is_loaded_and_said(folders, caplog):
    write_clip(folders / "input" / "one.mp4", 1)
    assert load(file="one.mp4")[1] == 1
    assert "one frame only" in caplog.text


# --- AdaFlow Encode Video


def encode(source, vae, chunk=0) -> dict:
    return AdaFlowEncodeVideo.execute(source, vae, chunk)[0]


@pytest.mark.parametrize("chunk", [0, 1, 5])
def test_encoding_is_that_of_each_frame_whatever_the_chunk(folders, vae, chunk):
    video = load(first_frame=1)[0]
    images = video.get_components().images
    expected = torch.cat([vae.encode(image[None]) for image in images])
    latent = encode(video, vae, chunk)
    assert latent["samples"].shape == (11, 4, 3, 4) and latent["samples"].device.type == "cpu"
    assert torch.allclose(latent["samples"], expected, atol=1e-5)
    assert torch.allclose(encode(images, vae, chunk)["samples"], expected, atol=1e-5)
    assert latent["adaflow_source"]["fps"] == 10.0


def test_encoding_never_holds_more_than_a_chunk(folders, vae, monkeypatch):
    seen = []
    inner = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: (seen.append(len(pixels)), inner(pixels))[1])
    monkeypatch.setattr(AdaFlowVideo, "get_components", lambda self: pytest.fail("decoded as a whole"))
    encode(load()[0], vae, 5)
    assert seen == [5, 5, 2]


def test_encode_takes_core_videos_and_alpha(folders, vae):
    path = str(folders / "input" / "clip.mp4")
    assert torch.equal(encode(InputImpl.VideoFromFile(path), vae)["samples"], encode(load()[0], vae)["samples"])
    images = torch.rand(2, 16, 16, 4)
    made = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(7)))
    latent = encode(made, vae)
    assert torch.allclose(latent["samples"], vae.encode(images[..., :3]), atol=1e-5)
    assert latent["adaflow_source"]["fps"] == 7.0


def test_encode_refuses_what_it_cannot_use(folders, vae, monkeypatch):
    with pytest.raises(InputError, match=r"^AdaFlow Encode Video: input 'source' is 20x16 pixels"):
        encode(torch.rand(2, 16, 20, 3), vae)
    with pytest.raises(InputError, match=r"IMAGE of shape \(0, 16, 16, 3\)"):
        encode(torch.rand(0, 16, 16, 3), vae)
    with pytest.raises(InputError, match="'vae' is missing"):
        encode(torch.rand(2, 16, 16, 3), None)
    monkeypatch.setattr(vae, "latent_dim", 3)
    with pytest.raises(InputError, match="3-dimensional latents"):
        encode(torch.rand(2, 16, 16, 3), vae)


def test_encode_names_the_frame_whose_latent_is_nan(vae):
    images = torch.rand(7, 16, 16, 3)
    images[4, 3, 3] = float("nan")
    with pytest.raises(InputError, match=r"frame 4; expected finite latents"):
        encode(images, vae, 3)


# --- AdaFlow Save Video


def save(frames, **changes):
    return AdaFlowSaveVideo.execute(frames, **{**SAVE, **changes})


def saved_path(folders: Path, output: io.NodeOutput) -> Path:
    shown = output.ui.as_dict()["images"][0]
    assert shown["type"] == "output"
    return folders / "output" / shown["subfolder"] / shown["filename"]


@pytest.mark.parametrize("chunk", [0, 5])
def test_latents_are_decoded_saved_and_given_the_sources_sound_and_rate(folders, vae, chunk):
    video = load(first_frame=2)[0]
    latent = encode(video, vae)
    output = save(latent, vae=vae, source=video, chunk=chunk, codec="ffv1")
    path = saved_path(folders, output)
    info = probe(path)
    assert (info.width, info.height, info.fps, info.has_audio) == (32, 24, 10, True)
    expected = (vae.decode(latent["samples"]) * 255).round()
    assert np.abs(frames_of(path) - expected.numpy()).max() <= 1
    assert left_in(folders / "output") == [path.name]
    result = output.result[0]
    assert result.get_stream_source() == str(path)
    assert result.get_components().audio["waveform"].shape[-1] / 48000 == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("codec", "ending"), [("h264", "mp4"), ("h265", "mp4"), ("vp9", "webm"), ("prores", "mov")])
def test_images_are_saved(folders, codec, ending):
    images = torch.linspace(0.1, 0.9, 6)[:, None, None, None].expand(6, 48, 64, 3)
    path = saved_path(folders, save(images, fps=29.97, codec=codec))
    assert path.name == f"test_00001_.{ending}" and path.parent.name == "video"
    assert probe(path).fps == Fraction(2997, 100)
    got = frames_of(path).mean((1, 2, 3)) / 255
    assert np.abs(got - images[:, 0, 0, 0].numpy()).max() < 0.02


def test_uneven_frames_keep_their_times_unless_the_rate_is_another(folders, vae):
    times = [0, 0.1, 0.15, 0.4, 0.42, 0.9, 1.0]
    with VideoWriter(folders / "input" / "uneven.mp4", 7, 32, 24, times=times) as writer:
        writer.write(np.random.default_rng(0).random((7, 24, 32, 3)))
    video, _, fps, _, _ = load(file="uneven.mp4", first_frame=1)
    latent = encode(video, vae)
    expected = pytest.approx(np.array(times[1:]) - 0.1, abs=1e-3)
    for changes in ({"fps": 0.0, "source": video}, {"fps": fps, "source": video, "codec": "vp9"}):
        assert VideoClip(probe(saved_path(folders, save(latent, vae=vae, **changes)))).times() == expected
    assert VideoClip(probe(video.get_stream_source())).times() == expected
    for changes in ({"fps": 5.0, "source": video}, {"fps": fps}):
        assert VideoClip(probe(saved_path(folders, save(latent, vae=vae, **changes)))).times() is None
    shorter = {"samples": latent["samples"][:4]}
    assert VideoClip(probe(saved_path(folders, save(shorter, vae=vae, source=video)))).times() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_other_packs_are_taken_in_any_precision(folders, vae, dtype):
    images = torch.rand(3, 16, 24, 4).to(dtype)[:, ::2]  # with alpha, not contiguous
    path = saved_path(folders, save(images, fps=5, codec="ffv1"))
    assert np.abs(frames_of(path) - 255 * images[..., :3].double().numpy()).max() <= 1
    expected = vae.encode(images[..., :3].float())
    assert torch.allclose(encode(images, vae)["samples"], expected, atol=1e-2)


def test_the_pixel_format_is_a_choice(folders):
    images = torch.rand(2, 32, 64, 3)
    path = saved_path(folders, save(images, fps=5, codec="h265", pixel_format="yuv444p10le"))
    assert probe(path).pixel_format == "yuv444p10le"
    assert probe(saved_path(folders, save(images, fps=5))).pixel_format == "yuv420p"
    with pytest.raises(InputError, match=r"^AdaFlow Save Video: input 'pixel_format' is 'yuv420p'.* for prores"):
        save(images, fps=5, codec="prores", pixel_format="yuv420p")
    assert "'pixel_format' is 'rgb565'" in AdaFlowSaveVideo.validate_inputs(pixel_format="rgb565")
    assert AdaFlowSaveVideo.validate_inputs(pixel_format="auto") is True


def test_files_are_numbered_on(folders):
    images = torch.rand(2, 16, 16, 3)
    assert [saved_path(folders, save(images, fps=5)).name for _ in range(2)] == ["test_00001_.mp4", "test_00002_.mp4"]


def test_the_rate_comes_from_the_latent_where_nothing_else_tells_it(folders, vae):
    latent = {**encode(load(stride=2)[0], vae)}
    assert probe(saved_path(folders, save(latent, vae=vae))).fps == 5
    assert probe(saved_path(folders, save(latent, vae=vae, fps=8))).fps == 8
    del latent["adaflow_source"]
    with pytest.raises(InputError, match=r"^AdaFlow Save Video: input 'fps' is 0"):
        save(latent, vae=vae)


def test_the_workflow_is_stored_unless_comfyui_is_told_not_to(folders, monkeypatch):
    hidden = {io.Hidden.prompt: {"1": {}}, io.Hidden.extra_pnginfo: {"workflow": {"nodes": []}}}
    node = AdaFlowSaveVideo.PREPARE_CLASS_CLONE(hidden)
    images = torch.rand(2, 16, 16, 3)
    path = saved_path(folders, node.execute(images, **{**SAVE, "fps": 5}))
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["prompt"]) == {"1": {}}
        assert json.loads(container.metadata["workflow"]) == {"nodes": []}
    monkeypatch.setattr("comfy.cli_args.args.disable_metadata", True)
    path = saved_path(folders, node.execute(images, **{**SAVE, "fps": 5}))
    with av.open(str(path)) as container:
        assert "prompt" not in container.metadata and "workflow" not in container.metadata


def test_save_refuses_what_it_cannot_use(folders, vae):
    latent = {"samples": torch.rand(5, 4, 2, 2)}
    bad = {"samples": latent["samples"].clone()}
    bad["samples"][3, 0, 0, 0] = float("inf")
    for frames, changes, message in [
        (latent, {"fps": 5}, "'vae' is missing"),
        (bad, {"fps": 5, "vae": vae}, r"'frames' is not finite \(NaN or infinity\) in frame 3"),
        ({"samples": torch.rand(5, 16, 2, 2)}, {"fps": 5, "vae": vae}, "LATENT of 16 channels; expected 4"),
        ({"samples": torch.rand(1, 4, 5, 2, 2)}, {"fps": 5, "vae": vae}, r"LATENT of shape \(1, 4, 5, 2, 2\)"),
        (torch.rand(0, 16, 16, 3), {"fps": 5}, r"IMAGE of shape \(0, 16, 16, 3\)"),
        (torch.rand(2, 16, 16, 3), {"fps": 5, "filename_prefix": "../../x"}, "'filename_prefix' is '../../x'"),
        (torch.rand(2, 16, 16, 3), {"fps": 5, "quality": 60}, "'quality' is 60; expected 0 .* 51 for h264"),
        (torch.rand(2, 16, 16, 3), {"fps": 5, "source": 3}, "'source' is a int; expected a VIDEO"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            save(frames, **changes)
        assert str(error.value).startswith("AdaFlow Save Video")
    assert left_in(folders) == ["clip.mp4"]


@pytest.mark.parametrize(
    "prefix",
    ["x" * 201, "\u96ea" * 67, "a/" + "\u00e9" * 100, "\ud800"],
    ids=lambda prefix: f"{len(prefix)} characters",
)
def test_save_refuses_long_names_before_it_decodes(folders, prefix):
    with pytest.raises(InputError, match=r"'filename_prefix' is .* expected a name .* at most 200 bytes"):
        save(torch.rand(2, 16, 16, 3), fps=5, filename_prefix=prefix)
    assert left_in(folders / "output") == []


@pytest.mark.parametrize(
    "prefix", ["x" * 200, "\u96ea" * 66, "a/" + "\u00e9" * 99], ids=lambda prefix: f"{len(prefix)} characters"
)
def test_the_longest_names_can_be_saved(folders, vae, prefix):
    save({"samples": torch.rand(2, 4, 2, 2)}, vae=vae, fps=5, filename_prefix=prefix)
    (name,) = left_in(folders / "output")
    assert name == prefix.split("/")[-1] + "_00001_.mp4"


def test_save_refuses_a_folder_that_it_may_not_write_to_before_it_decodes(folders, vae, monkeypatch):
    touch = Path.touch

    def refusing(self, *args, **kwargs):
        if self.parent.name == "locked":
            raise PermissionError(13, "Permission denied")
        touch(self, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", refusing)
    monkeypatch.setattr(vae, "decode", lambda _: pytest.fail("decoded"), raising=False)
    with pytest.raises(InputError, match=r"'filename_prefix' is 'locked/x'.*Permission denied in .*locked"):
        save({"samples": torch.rand(2, 4, 2, 2)}, vae=vae, fps=5, filename_prefix="locked/x")
    assert left_in(folders / "output") == []


def test_cancel_leaves_nothing_behind_but_what_is_decoded(folders, vae, monkeypatch):
    steps = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: steps.append((value, total))
    )

    def stop_after_two():
        if len(steps) == 2:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop_after_two)
    latent = {"samples": torch.rand(9, 4, 2, 2)}
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(latent, vae=vae, fps=5, chunk=2)
    assert steps == [(2, 9), (4, 9)]
    assert left_in(folders / "output" / "video") == []
    (run,) = (folders / "output" / "adaflow_runs").glob("save-*")
    assert left_in(run) == ["frames-00000-000.safetensors", "frames-00000-001.safetensors", "lock", "manifest.json"]
    steps.clear()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        encode(torch.rand(9, 16, 16, 3), vae, 2)
    assert steps == [(2, 9), (4, 9)]


def test_progress_counts_frames_and_shows_no_picture(folders, monkeypatch):
    """A picture of the progress stays in the front end, which then does not load the finished video."""
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *values, **_: shown.append(values))
    save(torch.rand(2, 16, 24, 3), fps=5)
    assert shown[-1] == (2, 2, None)
