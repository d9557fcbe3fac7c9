"""Out of memory at every stage: fewer frames at a time, the same result; one frame that does not fit is an error."""

import re
from contextlib import contextmanager

import comfy.model_management
import pytest
import torch
from adaflow_pack.adaflow import keyframes, matching, slimming
from adaflow_pack.adaflow.memory import is_out_of_memory
from adaflow_pack.adaflow.runs import remove_old_runs
from adaflow_pack.nodes.common import RESUME
from adaflow_pack.nodes.descriptors import AdaFlowExtractDescriptors
from adaflow_pack.nodes.encode_video import AdaFlowEncodeVideo
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from broken_runs import forwards
from graph import AFRESH, Graph, select
from models import clip_latent
from small_vae import small_vae
from test_video_nodes import SAVE, frames_of

FRAMES, STEPS = 8, 2


@pytest.fixture(scope="module")
def graph():
    with torch.inference_mode():
        yield Graph("sd1", FRAMES, steps=STEPS)


@pytest.fixture(scope="module")
def vae():
    return small_vae()


def allocation_error() -> RuntimeError:
    """What torch raises when RAM does not suffice, of its own accord."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    return caught.value


ERRORS = {"of the GPU": lambda: torch.OutOfMemoryError("injected"), "of RAM": allocation_error}


@contextmanager
def holding(owner, method: str, most: int, error=ERRORS["of the GPU"]):
    """Let ``owner.method`` work on at most so many rows; gives the shapes that it was asked for."""
    original, shapes = getattr(owner, method), []

    def limited(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        if x.shape[0] > most:
            raise error()
        return original(x, *args, **kwargs)

    setattr(owner, method, limited)
    try:
        yield shapes
    finally:
        delattr(owner, method)


def test_what_counts_as_out_of_memory():
    assert all(is_out_of_memory(make()) for make in ERRORS.values())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def invert(graph, chunk):
    trajectory, descriptors, noisiest = AdaFlowDDIMInvert.execute(
        graph.model, graph.source, {"samples": graph.latent}, STEPS, "float32", chunk, AFRESH
    ).args
    return [trajectory.level(1), trajectory.level(STEPS), descriptors.maps([0, 3, FRAMES - 1]), noisiest["samples"]]


def extract(graph, chunk):
    descriptors = AdaFlowExtractDescriptors.execute(graph.model, {"samples": graph.latent}, 0, 2, -1, 0, None, chunk)
    return [descriptors.args[0].maps(list(range(FRAMES)))]


def edit(graph, chunk, keyframe_every=4):
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=keyframe_every, mode="fixed")
    return [graph.edit(plan, chunk=chunk, cfg=1.0)]


STAGES = {
    "inversion": invert,
    "descriptors": extract,
    "propagation": edit,
    "joint edit": lambda graph, chunk: edit(graph, chunk, keyframe_every=1),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_chunk_is_halved_and_the_size_that_fits_remembered(graph, stage, error):
    run, unet = STAGES[stage], graph.model.model.diffusion_model
    whole = run(graph, 2)
    with holding(unet, "_forward", 2, ERRORS[error]) as shapes:
        found = run(graph, FRAMES)
    tried = [shape[0] for shape in shapes if shape[0] > 2]
    assert tried and len(tried) <= 4  # 8 and 4 in each sampling run, of which an edit has two; not in each step
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_one_frame_that_does_not_fit_is_an_error_with_numbers(graph, stage):
    whole = STAGES[stage](graph, 2)
    numbers = r"out of memory with 1 frame .*96x64 pixels.* [\d.]+ of [\d.]+ GB are free on \w+: use .*smaller size"
    with holding(graph.model.model.diffusion_model, "_forward", 0), pytest.raises(RuntimeError, match=numbers):
        STAGES[stage](graph, FRAMES)
    assert all(torch.equal(a, b) for a, b in zip(STAGES[stage](graph, 2), whole, strict=True))


def test_another_error_is_not_taken_for_lack_of_memory(graph):
    def fail():
        raise RuntimeError("shapes do not match")

    for stage in STAGES.values():
        with forwards(graph.model, 1, fail) as calls, pytest.raises(RuntimeError, match="shapes do not match"):
            stage(graph, FRAMES)
        assert len(calls) == 1


def invert_on(graph, chunk):
    latent = {"samples": clip_latent(FRAMES, seed=3)}
    trajectory, _, noisiest = AdaFlowDDIMInvert.execute(
        graph.model, graph.source, latent, STEPS, "float32", chunk, RESUME[0]
    ).args
    return [trajectory.level(1), noisiest["samples"]]


def edit_on(graph, chunk):
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=4, mode="fixed")
    _, prepared = graph.joint(plan, cfg=1.0)
    return [AdaFlowTokenPropagate.execute(prepared, False, chunk, RESUME[0]).args[0]["samples"]]


@pytest.mark.parametrize("chunk", [0, FRAMES])
@pytest.mark.parametrize("run", [invert_on, edit_on])
def test_the_size_that_fitted_is_kept_for_the_run_that_goes_on(graph, run, chunk, comfy_folders):
    """A run cancelled after it ran short of memory does not try the large chunk again, whatever the user has set."""
    unet, runs = graph.model.model.diffusion_model, comfy_folders / "output" / "adaflow_runs"
    remove_old_runs(runs, max_age=-1.0)
    with holding(unet, "_forward", 2) as shapes:
        whole = run(graph, chunk)
    assert max(shape[0] for shape in shapes) > 2
    remove_old_runs(runs, max_age=-1.0)
    with holding(unet, "_forward", 2) as again, pytest.raises(comfy.model_management.InterruptProcessingException):
        limited = unet._forward

        def cancelled(*args, **kwargs):
            if len(again) == len(shapes) - 1:
                raise comfy.model_management.InterruptProcessingException
            return limited(*args, **kwargs)

        unet._forward = cancelled
        run(graph, chunk)
    with holding(unet, "_forward", 2) as shapes:
        assert all(torch.equal(a, b) for a, b in zip(run(graph, chunk), whole, strict=True))
    assert shapes and max(shape[0] for shape in shapes) <= 2


def test_keyframe_selection_compares_fewer_frames(graph, monkeypatch):
    whole = select(graph.descriptors)
    compared, original = [], keyframes.nearest_tokens

    def limited(query, key, *args):
        compared.append(query.shape[0])
        if query.shape[0] > 2:
            raise torch.OutOfMemoryError("injected")
        return original(query, key, *args)

    monkeypatch.setattr(keyframes, "nearest_tokens", limited)
    assert select(graph.descriptors).clips == whole.clips
    assert [n for n in compared if n > 2] == [7, 4]
    monkeypatch.setattr(keyframes, "nearest_tokens", lambda *_: limited(torch.zeros(3), None))
    with pytest.raises(RuntimeError, match=r"out of memory with 1 frame .* 12x8 tokens.* GB are free on"):
        select(graph.descriptors)


def matched_edit(graph):
    return edit(graph, FRAMES)[0]


def selected_edit(graph):
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=1, mode="fixed")
    return graph.edit(plan, chunk=FRAMES, cfg=1.0, model=graph.slim(2))


COMPARING = {
    "matching": (matched_edit, matching, "nearest_indices", "to match 8 frames of 12x8 tokens"),
    "selection": (selected_edit, slimming, "best_cosines", "to select tokens of 8 keyframes of 12x8 tokens"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", COMPARING)
def test_descriptors_are_compared_in_smaller_blocks_and_no_frames_are_taken_away(graph, stage, error, monkeypatch):
    run, module, name, _ = COMPARING[stage]
    with holding(graph.model.model.diffusion_model, "_forward", FRAMES) as wanted:
        whole = run(graph)
    original, calls = getattr(module, name), []

    def limited(*args):
        calls.append(1)
        if len(calls) == 2:
            raise ERRORS[error]()
        return original(*args)

    monkeypatch.setattr(module, name, limited)
    with holding(graph.model.model.diffusion_model, "_forward", FRAMES) as shapes:
        assert torch.equal(run(graph), whole)
    assert len(calls) > 2 and shapes == wanted


@pytest.mark.parametrize("stage", COMPARING)
def test_one_keyframe_that_cannot_be_compared_is_an_error_with_numbers(graph, stage, monkeypatch):
    run, module, name, doing = COMPARING[stage]

    def fail(*_):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(module, name, fail)
    numbers = (
        rf"out of memory with one keyframe .* GB, {doing}.*; [\d.]+ of [\d.]+ GB are free on \w+: use .*smaller size"
    )
    with pytest.raises(RuntimeError, match=numbers):
        run(graph)


def encode(vae, chunk):
    images = torch.rand(FRAMES, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    return AdaFlowEncodeVideo.execute(images, vae, chunk).args[0]["samples"]


def save(vae, chunk):
    latent = {"samples": clip_latent(FRAMES, seed=2)}
    video = AdaFlowSaveVideo.execute(latent, **{**SAVE, "fps": 8.0, "codec": "ffv1"}, vae=vae, chunk=chunk).args[0]
    return torch.from_numpy(frames_of(video.get_stream_source()))


VAE_STAGES = {"encode": encode, "decode": save}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", VAE_STAGES)
def test_the_vae_gets_fewer_frames_and_no_tiles(vae, stage, error):
    run = VAE_STAGES[stage]
    whole = run(vae, 1)
    with holding(vae.first_stage_model, stage, 2, ERRORS[error]) as shapes:
        found = run(vae, FRAMES)
    assert torch.allclose(found.float(), whole.float(), atol=1e-4 if stage == "encode" else 1)
    assert len({shape[1:] for shape in shapes}) == 1  # whole frames throughout
    assert [shape[0] for shape in shapes] == [8, 4, 2, 2, 2, 2]
    assert not {"encode_tiled_", "decode_tiled_"} & set(vars(vae))


@pytest.mark.parametrize("stage", VAE_STAGES)
def test_one_frame_that_does_not_fit_the_vae_is_left_to_its_tiles_and_then_is_an_error(vae, stage, comfy_folders):
    with holding(vae.first_stage_model, stage, 0) as shapes:
        numbers = rf"out of memory with 1 frame .* to {stage} frames .* GB are free on .*smaller size.*--cpu-vae"
        with pytest.raises(RuntimeError, match=numbers):
            VAE_STAGES[stage](vae, FRAMES)
    assert [shape[0] for shape in shapes[:4]] == [8, 4, 2, 1] and len(shapes) == 5
    assert not [path for path in (comfy_folders / "output").rglob("*") if re.search("partial", path.name)]
    calls = []
    original = getattr(vae.first_stage_model, stage)

    def once(x):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected")
        return original(x)

    setattr(vae.first_stage_model, stage, once)
    try:
        assert len(VAE_STAGES[stage](vae, 1)) == FRAMES
    finally:
        delattr(vae.first_stage_model, stage)
