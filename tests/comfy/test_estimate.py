"""What a run is said to need, against what small models take; shown before it starts, and refused in time."""

import logging
import re
import shutil

import pytest
import torch
from adaflow_pack.adaflow import runs
from adaflow_pack.adaflow.descriptors import layer_sizes
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.adaflow.estimate import edit_needs, inversion_needs
from adaflow_pack.adaflow.runs import open_run
from adaflow_pack.adaflow.trajectory import tensor_bytes, trajectory_bytes
from adaflow_pack.adaflow.video_segments import SegmentedWriter, disk_needs
from adaflow_pack.nodes.descriptors import AdaFlowExtractDescriptors
from adaflow_pack.nodes.encode_video import AdaFlowEncodeVideo
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.patching import memory
from adaflow_pack.nodes.patching.families import unet_family
from adaflow_pack.nodes.patching.memory import unet_sizes
from adaflow_pack.nodes.patching.patch import deterministic_samplers
from adaflow_pack.nodes.patching.resume import FILE_BYTES, UNBOUNDED, checkpoint_bytes
from adaflow_pack.nodes.patching.taps import self_attentions
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from broken_runs import forwards
from graph import AFRESH, Graph, plain_euler, select
from models import SHAPES, clip_latent, conditioning, small_model
from small_vae import small_vae
from tensor_memory import TensorMemory


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sizes_are_those_of_the_activations(shape):
    """Every self-attention and every encoder block of a real forward gives what the sizes say."""
    model, height, width = small_model(shape), 14, 22
    sizes, unet = unet_sizes(model.model, unet_family(model, "test"), torch.device("cpu")), model.model.diffusion_model
    tokens = [h * w for h, w in layer_sizes(height, width)]
    given, hooks = [], []
    modules = [attn for _, attn in self_attentions(unet)] + [block[-1] for block in unet.input_blocks]
    for module in modules:
        hooks.append(module.register_forward_hook(lambda *call: given.append(call[-1].numel())))
    context = conditioning(shape)[0][0]
    y = torch.zeros(1, model.model.adm_channels) if model.model.adm_channels else None
    unet(torch.zeros(1, 4, height, width), torch.ones(1), context, y, transformer_options={})
    for hook in hooks:
        hook.remove()
    expected = [tokens[layer.level] * layer.channels for layer in sizes.attentions]
    assert sorted(given) == sorted(expected + [tokens[level] * channels for level, channels in sizes.skips])
    assert sizes.value_bytes == 4
    assert sizes.weight_bytes == pytest.approx(model.model_size(), rel=0.01)


def edit_of(model, frames, keyframes, size, steps=2):
    """An ADAFLOW_EDIT of the small model with clips of equal length."""
    graph = Graph("sd1", latent=clip_latent(frames, size), steps=steps, model=model)
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=frames // keyframes, mode="fixed")
    return graph.joint(plan, model=graph.slim(2))[1]


@pytest.mark.parametrize(
    ("frames", "keyframes", "size"), [(8, 2, (16, 24)), (12, 12, (16, 24)), (600, 2, (8, 8))],
    ids=["few", "keyframes count", "frames count"],
)  # fmt: skip
def test_an_edit_takes_what_is_said(frames, keyframes, size):
    model = small_model("sd1")
    edit = edit_of(model, frames, keyframes, size)
    with TensorMemory() as measured:
        AdaFlowTokenPropagate.execute(edit, False, 2, AFRESH)
    sizes = unet_sizes(model.model, unet_family(model, "test"), torch.device("cpu"))
    needs = edit_needs(sizes, (frames, 4, *size), keyframes, 2, 2, True)
    total = needs.device + needs.ram
    assert total.least <= measured.peak
    assert 0.6 * measured.peak <= total.about - sizes.weight_bytes <= 1.5 * measured.peak


def test_a_noise_mask_takes_what_is_said():
    model, shape, peaks = small_model("sd1"), (300, 4, 8, 8), []
    graph = Graph("sd1", latent=clip_latent(shape[0], shape[2:]), steps=2, model=model)
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=shape[0] // 2, mode="fixed")
    for mask in (None, torch.rand(1, 64, 64)):
        patched = graph.patch(plan, chunk=8)
        with TensorMemory() as measured:
            plain_euler(patched, graph.latent, graph.sigmas()[-2:], graph.positive, graph.negative, 3.0, mask=mask)
        peaks.append(measured.peak)
    sizes = unet_sizes(model.model, unet_family(model, "test"), torch.device("cpu"))
    without, masked = (edit_needs(sizes, shape, 2, 2, 8, True, masked=masked).device for masked in (False, True))
    assert masked.least - without.least <= peaks[1] - peaks[0]
    assert masked.about - without.about == pytest.approx(peaks[1] - peaks[0], rel=0.15)


@pytest.mark.parametrize("refine", [0, 1])
def test_an_inversion_of_many_frames_takes_what_is_said(refine):
    model, shape = small_model("sd1"), (600, 4, 8, 8)
    with TensorMemory() as measured:
        latent = {"samples": clip_latent(shape[0], shape[2:])}
        AdaFlowDDIMInvert.execute(model, conditioning("sd1", 1), latent, 2, "float32", 0, AFRESH, refine)
    sizes = unet_sizes(model.model, unet_family(model, "test"), torch.device("cpu"))
    needs = inversion_needs(sizes, shape, 32)
    total = needs.device + needs.ram
    assert total.least <= measured.peak
    assert 0.6 * measured.peak <= total.about - sizes.weight_bytes <= 1.5 * measured.peak


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_the_disk_takes_what_is_said(precision):
    model, latent = small_model("sd1"), clip_latent(7)
    trajectory, descriptors, _ = AdaFlowDDIMInvert.execute(
        model, conditioning("sd1", 1), {"samples": latent}, 3, precision, resume=AFRESH
    ).args
    dtype = getattr(torch, precision)
    said = trajectory_bytes(latent.shape, 4, dtype) + tensor_bytes(descriptors.shape, dtype)
    state = tensor_bytes(latent.shape, torch.float32)  # of a step before, gone when a step is whole
    assert trajectory.run.size() - 20_000 <= said - state <= trajectory.run.size()  # but for headers and the picture


@pytest.fixture(scope="module")
def edited():
    with torch.inference_mode():
        yield Graph("sd1", frames=6, steps=4)


@pytest.mark.parametrize("sampler", [name for name in deterministic_samplers() if name not in UNBOUNDED])
def test_an_edit_takes_no_more_disk_than_is_said(edited, sampler, monkeypatch):
    """With every sampler, and no less than the tensors that are said to be kept."""
    sizes, write = [], runs.write_text_durably

    def measured(path, text):
        write(path, text)
        sizes.append(sum(file.stat().st_size for file in path.parent.iterdir()))

    _, edit = edited.joint(sampler=sampler)
    monkeypatch.setattr(runs, "write_text_durably", measured)
    AdaFlowTokenPropagate.execute(edit, False, 2, AFRESH)
    said, latent = edit.checkpoint_bytes(tuple(range(6))), tensor_bytes(edited.latent.shape, torch.float32)
    assert said % (latent + FILE_BYTES) == 0
    assert said // (latent + FILE_BYTES) * latent <= max(sizes) <= said


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [("euler", 2), ("dpmpp_2m", 51), ("heun", 100), ("dpm_2", 100), ("dpm_adaptive", 1)],
)
def test_what_an_edit_of_fifty_steps_keeps(sampler, kept):
    assert checkpoint_bytes(sampler, (30, 4, 8, 8), 50) == kept * (30 * 4 * 8 * 8 * 4 + FILE_BYTES)


@pytest.fixture
def graph():
    return Graph("sd1", frames=6, steps=3)


def lines_of(caplog, where):
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(where + ": ")]


def test_what_is_needed_is_shown_before_the_first_forward(graph, caplog):
    with caplog.at_level(logging.INFO), forwards(graph.model, 1, lambda: caplog.records.append("forward")):
        AdaFlowDDIMInvert.execute(graph.model, graph.source, {"samples": graph.latent}, 3, resume=AFRESH)
    at = caplog.records.index("forward")
    before = [record.getMessage() for record in caplog.records[:at]]
    assert any(re.search(r"6 frames, 3 steps, 96x64 pixels: needs about .* GB of RAM \(.* free\)", m) for m in before)
    assert any(re.search(r"inversion: 0\.\d+ GB of disk \([\d.]+ free\)", m) for m in before)


def test_the_edit_shows_frames_keyframes_steps_memory_disk_and_time(graph, caplog):
    _, edit = graph.joint(select(graph.descriptors, -1.0, -1.0, max_clip=3))
    with caplog.at_level(logging.INFO):
        AdaFlowTokenPropagate.execute(edit, False, 1, AFRESH)
    lines = lines_of(caplog, "AdaFlowTokenPropagate")
    patterns = [
        r"edit: 0\.\d+ GB of disk",
        r"6 frames, 2 keyframes, 3 steps, 96x64 pixels: needs about .* of RAM",
        r"takes about [\d.]+ s: 3 x [\d.]+ s",  # from the first chunk
        r"takes about [\d.]+ s: 3 x [\d.]+ s",  # from the first step
    ]
    assert len(lines) == len(patterns)
    assert all(re.search(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), lines


def too_little(monkeypatch, nbytes):
    monkeypatch.setattr(memory, "free_memory", lambda device: {"RAM": nbytes})


NUMBERS = r"input '{what}' is 6 frames, .* takes at least 0\.\d\d GB of RAM; expected at most the 0\.00 GB .*{change}"


def test_what_surely_does_not_fit_is_refused_before_any_forward(graph, monkeypatch):
    _, edit = graph.joint(select(graph.descriptors, -1.0, -1.0, max_clip=1))
    too_little(monkeypatch, 1000)
    with forwards(graph.model) as calls:
        with pytest.raises(InputError, match=NUMBERS.format(what="latent", change="fewer frames")):
            AdaFlowDDIMInvert.execute(graph.model, graph.source, {"samples": graph.latent}, 3, resume=AFRESH)
        with pytest.raises(InputError, match=NUMBERS.format(what="latent", change="smaller size")):
            AdaFlowExtractDescriptors.execute(graph.model, {"samples": graph.latent}, 0, 1, -1, 0)
        for run in (
            lambda: AdaFlowTokenPropagate.execute(edit, False, 0, AFRESH),
            lambda: plain_euler(graph.patch(), graph.latent, graph.sigmas(), graph.positive, graph.negative, 3.0),
        ):
            with pytest.raises(InputError, match=NUMBERS.format(what="plan", change="fewer keyframes")):
                run()
    assert not calls


SAVING = {"fps": 8.0, "codec": "h264", "quality": 18, "filename_prefix": "estimate/x"}


def test_the_video_nodes_show_frames_memory_and_disk_and_refuse_in_time(comfy_folders, caplog, monkeypatch):
    vae, images, latent = small_vae(), torch.rand(20, 64, 96, 3), {"samples": torch.rand(20, 4, 8, 12)}
    with caplog.at_level(logging.INFO):
        AdaFlowEncodeVideo.execute(images, vae)
        AdaFlowSaveVideo.execute(latent, **SAVING, vae=vae)
    memory_line = r"20 frames, 96x64 pixels: needs about \d+\.\d\d GB of .*free"
    assert re.search("AdaFlow Encode Video: " + memory_line, caplog.text)
    assert re.search("AdaFlow Save Video: " + memory_line, caplog.text)
    assert re.search(r"AdaFlow Save Video: save: about 0\.00 GB of disk at its peak \([\d.]+ free\)", caplog.text)
    monkeypatch.setattr(vae, "encode", lambda _: pytest.fail("encoded"), raising=False)
    monkeypatch.setattr(vae, "decode", lambda _: pytest.fail("decoded"), raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 20 * 64 * 96 * 3 - 1))
        with pytest.raises(InputError, match=r"'frames' is so large .* at least 0\.000 GB of disk; expected"):
            AdaFlowSaveVideo.execute(latent, **SAVING, vae=vae)
    too_little(monkeypatch, 1000)
    with pytest.raises(InputError, match=r"'source' is 20 frames, .* takes at least 0\.\d\d GB of RAM"):
        AdaFlowEncodeVideo.execute(images, vae)
    with pytest.raises(InputError, match=r"'frames' is 20 frames, .* takes at least 0\.\d\d GB of RAM"):
        AdaFlowSaveVideo.execute(latent, **SAVING, vae=vae)


@pytest.mark.parametrize(("chunk", "frames"), [(1, 70), (16, 148), (31, 70), (63, 64), (64, 70), (16, 20)])
def test_a_save_takes_at_least_the_disk_that_is_said_to_be_sure(tmp_path, chunk, frames):
    run, sizes = open_run(tmp_path, "save", {}), []
    commit = run.commit

    def measured(*args, **progress):
        sizes.append(sum(path.stat().st_size for path in run.folder.iterdir()))  # with what the commit removes
        commit(*args, **progress)

    run.commit = measured
    with SegmentedWriter(run, tmp_path / "x.mp4", 8.0, 64, 32, codec="h264", quality=18, pixel_format=None) as writer:
        for first in range(0, frames, chunk):
            writer.write(torch.zeros(min(chunk, frames - first), 32, 64, 3).numpy())
    needs = disk_needs(frames, 64, 32, "h264", 18, chunk)
    assert needs[0] <= max(sizes) <= needs[1]


def test_a_finished_run_is_read_even_where_a_new_one_would_not_fit(graph, monkeypatch):
    """Nothing is refused that need not be done."""
    arguments = (graph.model, graph.source, {"samples": graph.latent}, 3, "float16")
    first = AdaFlowDDIMInvert.execute(*arguments, resume=AFRESH).args
    too_little(monkeypatch, 1000)
    again = AdaFlowDDIMInvert.execute(*arguments).args
    assert torch.equal(again[2]["samples"], first[2]["samples"])
