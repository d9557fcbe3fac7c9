"""Whatever stands on the disk, or happens to it: the right result, or an error that says what to do."""

import logging
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from adaflow_pack.adaflow.runs import FORMAT, DamagedRunError, remove_old_runs
from adaflow_pack.nodes.encode_video import AdaFlowEncodeVideo
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.load_video import AdaFlowLoadVideo
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from broken_runs import Boom, boom, change_manifest, flip, forwards, runs_of, truncate
from comfy_execution.utils import CurrentNodeContext
from graph import AFRESH, Graph, select
from models import small_model
from small_vae import small_vae
from test_video_nodes import write_clip

FRAMES, STEPS, CHUNK = 5, 3, 2
PER_STEP = -(-FRAMES // CHUNK)  # forwards of an inversion step


@pytest.fixture(scope="module")
def graph():
    with torch.inference_mode():
        yield Graph("sd1", FRAMES, steps=STEPS)


@pytest.fixture(scope="module")
def levels(graph):
    """What an unbroken inversion gives."""
    with torch.inference_mode():
        return read(invert(graph, AFRESH))


@pytest.fixture(autouse=True)
def no_earlier_runs(comfy_folders):
    remove_old_runs(comfy_folders / "output" / "adaflow_runs", max_age=-1.0)


def invert(graph, resume="resume", latent=None, model=None):
    latent = graph.latent if latent is None else latent
    return AdaFlowDDIMInvert.execute(
        model or graph.model, graph.source, {"samples": latent}, STEPS, "float16", CHUNK, resume
    ).args


def read(inverted) -> list[torch.Tensor]:
    """All that an inversion gives."""
    trajectory, descriptors, noisiest = inverted
    levels = [trajectory.level(level) for level in range(STEPS + 1)]
    return [*levels, descriptors.maps(list(range(FRAMES))), descriptors.slice_rgb(), noisiest["samples"]]


def edit_of(graph, inverted, model=None):
    """ADAFLOW_EDIT of an inversion's outputs."""
    return graph.joint(select(inverted[1]), trajectory=inverted[0], model=model)[1]


def propagate(edit, resume="resume"):
    """Every frame, edited."""
    return AdaFlowTokenPropagate.execute(edit, True, CHUNK, resume).args[0]["samples"]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


DAMAGE = {
    "level truncated": (lambda run: truncate(run / "x_0001.safetensors"), "x_0001.safetensors is missing or damaged"),
    "level bit-flipped": (lambda run: flip(run / "x_0002.safetensors"), "x_0002.safetensors is missing or damaged"),
    "level removed": (lambda run: (run / "x_0000.safetensors").unlink(), "x_0000.safetensors is missing or damaged"),
    "state bit-flipped": (lambda run: flip(next(run.glob("state_*"))), "is missing or damaged"),
    "descriptors bit-flipped": (lambda run: flip(run / "descriptors.safetensors"), "descriptors.safetensors is"),
    "older format": (lambda run: change_manifest(run, format="adaflow-run-0"), f"adaflow-run-0, not {FORMAT}"),
    "of another model": (lambda run: change_manifest(run, identity={"model": "SDXL"}), "made from other inputs"),
    "manifest torn": (lambda run: truncate(run / "manifest.json"), "its manifest is damaged"),
}


@pytest.mark.parametrize("done", ["broken off", "finished"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_inversion_is_noticed_and_done_again(graph, levels, damage, done, comfy_folders, caplog):
    if done == "finished":
        invert(graph)
    else:
        with pytest.raises(Boom), forwards(graph.model, 2 * PER_STEP + 1, boom):
            invert(graph)
    do, why = DAMAGE[damage]
    do(runs_of(comfy_folders, "inversion")[-1])
    with caplog.at_level(logging.INFO):
        assert same(read(invert(graph)), levels)
    assert why in caplog.text and "begins afresh" in caplog.text
    caplog.clear()
    with forwards(graph.model) as calls, caplog.at_level(logging.INFO):
        assert same(read(invert(graph)), levels)  # what took its place is sound
    assert not calls and "begins afresh" not in caplog.text


@pytest.mark.parametrize("done", ["broken off", "finished"])
@pytest.mark.parametrize("do", [truncate, flip, os.unlink])
def test_a_damaged_edit_is_noticed_and_done_again(graph, do, done, comfy_folders, caplog):
    edit = edit_of(graph, invert(graph))
    with forwards(graph.model) as calls:
        whole = propagate(edit, AFRESH)
    if done == "broken off":
        with pytest.raises(Boom), forwards(graph.model, len(calls) - 1, boom):
            propagate(edit, AFRESH)
    do(next(runs_of(comfy_folders, "edit")[-1].glob("latent_*")))
    with caplog.at_level(logging.INFO):
        assert torch.equal(propagate(edit), whole)
    assert "is missing or damaged: begins afresh" in caplog.text


@pytest.mark.parametrize("do", [truncate, flip, os.unlink])
@pytest.mark.parametrize("name", ["x_0002.safetensors", "x_0000.safetensors", "descriptors.safetensors"])
def test_damage_to_a_trajectory_in_use_is_noticed_and_the_advice_helps(graph, name, do, comfy_folders):
    """ComfyUI keeps the node's result: the files change under an object that was sound when it was made."""
    inverted = invert(graph)
    edit = edit_of(graph, inverted)
    whole = propagate(edit, AFRESH)
    do(inverted[0].run.path(name))
    with pytest.raises(DamagedRunError, match=rf"{name} in .* is missing or damaged.*'start afresh' in AdaFlow DDIM"):
        propagate(edit_of(graph, inverted), AFRESH)
    assert torch.equal(propagate(edit_of(graph, invert(graph, AFRESH)), AFRESH), whole)


def test_a_file_that_was_only_touched_is_still_good(graph):
    inverted = invert(graph)
    whole = propagate(edit_of(graph, inverted), AFRESH)
    for path in inverted[0].run.folder.glob("*.safetensors"):
        copy = path.with_suffix(".copy")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
    assert torch.equal(propagate(edit_of(graph, inverted), AFRESH), whole)


def test_the_same_clip_inverted_twice_at_once(graph):
    """Two prompts on one clip: while the first one's result is in use, the second has a folder of its own."""
    first = invert(graph, AFRESH)
    second = invert(graph, AFRESH)
    assert first[0].run.folder != second[0].run.folder
    assert same(read(first), read(second))
    whole = propagate(edit_of(graph, first), AFRESH)
    with pytest.raises(Boom), forwards(graph.model, 9, boom):
        propagate(edit_of(graph, second), AFRESH)
    assert torch.equal(propagate(edit_of(graph, first)), whole)
    assert torch.equal(propagate(edit_of(graph, second)), whole)


def test_nothing_of_a_finished_run_is_lost_when_others_fail(graph, levels):
    inverted = invert(graph)
    edit = edit_of(graph, inverted)
    whole = propagate(edit, AFRESH)
    other = small_model("sd1", 3)
    for at in (1, PER_STEP + 1, STEPS * PER_STEP):
        with pytest.raises(Boom), forwards(other, at, boom):
            invert(graph, AFRESH, model=other)
        with pytest.raises(Boom), forwards(other, at, boom):
            propagate(edit_of(graph, inverted, other), AFRESH)
    del inverted
    with forwards(graph.model) as calls:
        assert same(read(invert(graph)), levels)
        assert torch.equal(propagate(edit), whole)
    assert not calls


def test_a_source_file_replaced_between_runs_starts_afresh(graph, comfy_folders):
    """The same name, size and length, another picture: nothing of the first clip gets into the second one's result."""
    target, vae = comfy_folders / "input" / "replaced.mp4", small_vae()

    def run(resume="resume"):
        video = AdaFlowLoadVideo.execute("replaced.mp4", 0, 0, 1, 0, 8).args[0]
        latent = AdaFlowEncodeVideo.execute(video, vae).args[0]["samples"]
        return invert(graph, resume, latent=latent)

    write_clip(target, FRAMES, (64, 64), seed=1)
    before = AdaFlowLoadVideo.fingerprint_inputs("replaced.mp4")
    with pytest.raises(Boom), forwards(graph.model, 2 * PER_STEP + 1, boom):
        run()
    write_clip(target, FRAMES, (64, 64), seed=2)
    assert AdaFlowLoadVideo.fingerprint_inputs("replaced.mp4") != before  # ComfyUI loads it anew
    with forwards(graph.model) as calls:
        resumed = read(run())
    assert len(calls) == STEPS * PER_STEP
    assert same(resumed, read(run(AFRESH)))


def test_the_node_says_that_it_resumed_and_from_where(graph, monkeypatch):
    shown = []
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append((node_id, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    with pytest.raises(Boom), forwards(graph.model, 2 * PER_STEP + 1, boom):
        invert(graph)
    with CurrentNodeContext("prompt", "17", 0):
        inverted = invert(graph)
    assert any(node == "17" and f"resumed after step 2 of {STEPS}" in text for node, text in shown)
    edit = edit_of(graph, inverted)
    with forwards(graph.model) as calls:
        propagate(edit, AFRESH)
    with pytest.raises(Boom), forwards(graph.model, len(calls) - 1, boom):
        propagate(edit, AFRESH)
    shown.clear()
    with CurrentNodeContext("prompt", "23", 0):
        propagate(edit)
    assert any(node == "23" and f"resumed after step {STEPS - 1} of {STEPS}" in text for node, text in shown)
    assert "resumed" in shown[-1][1]  # what comes later does not hide it
