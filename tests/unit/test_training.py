"""The parts of ``training/`` that decide whether a broken training goes on as if it had not been broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adaflow_pack.adaflow.demo.weights import pack, unpack
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from video_files import make

sys.path.append(str(Path(__file__).resolve().parents[2] / "training"))

import common
from common import Clock, Learner, Log, Muon, orthogonal, schedule
from train import take_finished

TRAINING = Path(common.__file__).parent


def small_learner() -> tuple[nn.Module, Learner]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.BatchNorm1d(32), nn.Linear(32, 16)).bfloat16()
    return module, Learner(module, lambda x, y: (module(x).float() - y.float()).square().mean(), 1e-2)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(24, 16, generator=generator).bfloat16() for _ in range(count)]
    return [(x, x.flip(1)) for x in inputs]


def test_a_resumed_training_has_the_weights_of_an_unbroken_one(tmp_path):
    whole, broken = small_learner(), small_learner()
    pairs = batches(12)
    for i, pair in enumerate(pairs):
        whole[1].step(i / 12, *pair)
    for i, pair in enumerate(pairs[:7]):
        broken[1].step(i / 12, *pair)
    broken[1].save(tmp_path / "state.safetensors", 7.0)
    resumed = small_learner()
    assert resumed[1].load(tmp_path / "state.safetensors") == 7.0
    for i, pair in enumerate(pairs[7:], 7):
        resumed[1].step(i / 12, *pair)
    expected, found = whole[1].averaged(), resumed[1].averaged()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    for one, other in zip(whole[1].master, resumed[1].master, strict=True):
        assert torch.equal(one, other)


def test_a_small_problem_is_learnt():
    _, learner = small_learner()
    losses = [learner.step(i / 300, *pair).item() for i, pair in enumerate(batches(300))]
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])


@pytest.mark.parametrize("shape", [(3, 40, 100), (2, 100, 40), (1, 16, 16)])
def test_singular_values_are_brought_near_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.max() < 1.3
    assert values[:, : values.shape[1] // 2].min() > 0.6  # the smallest ones need more iterations


def test_muon_moves_each_matrix_by_the_rate():
    parameters = [torch.randn(32, 8, 3, 3), torch.randn(32, 72), torch.randn(64, 32)]
    before = [value.clone() for value in parameters]
    for value in parameters:
        value.grad = torch.randn_like(value)
    Muon(parameters, torch.tensor(0.01), decay=0.0).step()
    for old, new in zip(before, parameters, strict=True):
        assert (new - old).square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)


def test_the_rate_rises_stays_and_falls():
    assert schedule(0.0, 0) < schedule(0.0, 100) < schedule(0.0, 500) == schedule(0.49, 500) > schedule(0.8, 500) > 0


class Seconds:
    """Stands for the module ``time``, so that each step of :func:`trained` takes a second."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def seconds(monkeypatch) -> Seconds:
    monkeypatch.setattr(common, "time", Seconds())
    return common.time


def trained(seconds: Seconds, clock: Clock, state: Path, killed_after: int = 10**9) -> tuple[Learner, list[float]]:
    """A call's learner, and the seconds used before each of its steps; a killed call gets no chance to save."""
    learner, used = small_learner()[1], []
    for count in clock.steps(learner, state):
        if count == killed_after:
            break
        used.append(clock.used)
        learner.step(clock.share, *batches(1)[0])
        seconds.now += 1.0
    return learner, used


def test_a_stages_seconds_add_up_over_calls(tmp_path, seconds):
    state = tmp_path / "state.safetensors"
    first = Clock(8.0, call_ends=seconds.now + 5.0)
    assert trained(seconds, first, state)[1] == [0.0, 1.0, 2.0, 3.0, 4.0] and not first.finished
    seconds.now += 100.0  # between the calls
    second = Clock(8.0, call_ends=float("inf"))
    assert trained(seconds, second, state)[1] == [5.0, 6.0, 7.0] and second.finished
    third = Clock(8.0, call_ends=float("inf"))
    learner, used = trained(seconds, third, state)
    assert used == [] and third.finished
    assert learner.steps == 8 and learner.samples == 8 * 24


def test_a_call_that_ends_with_the_stage_unfinished_never_counts_as_finished(tmp_path, seconds):
    clock = Clock(80.0, call_ends=seconds.now + 7.5)
    trained(seconds, clock, tmp_path / "state.safetensors")
    seconds.now += 1000.0  # what follows the training takes longer than was left of it
    assert not clock.finished


def test_a_stage_that_ends_with_its_call_brings_its_rate_down(tmp_path, seconds):
    state = tmp_path / "state.safetensors"
    trained(seconds, Clock(80.0, call_ends=seconds.now + 5.0), state)
    seconds.now += 100.0
    clock = Clock(80.0, call_ends=seconds.now + 7.0, last=True)
    _, used = trained(seconds, clock, state)
    assert used == [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert clock.finished and clock.total == 12.0 and clock.share == 1.0
    longer = Clock(13.0, call_ends=seconds.now + 50.0, last=True)
    assert trained(seconds, longer, state)[1] == [12.0] and longer.total == 13.0


def test_a_killed_call_loses_at_most_a_minute_and_no_weights(tmp_path, seconds):
    state = tmp_path / "state.safetensors"
    whole, _ = trained(seconds, Clock(215.0, float("inf")), tmp_path / "whole.safetensors")
    trained(seconds, Clock(215.0, float("inf")), state, killed_after=200)
    seconds.now += 100.0
    learner, used = trained(seconds, Clock(215.0, float("inf")), state)
    assert 140.0 <= used[0] <= 200.0, "weights and seconds are those of the last save"
    assert used[-1] == 214.0 and learner.steps == whole.steps == 215
    for one, other in zip(whole.master, learner.master, strict=True):
        assert torch.equal(one, other)


def test_a_broken_save_leaves_the_one_before(tmp_path, monkeypatch):
    state = tmp_path / "state.safetensors"
    learner = small_learner()[1]
    learner.save(state, 7.0)

    def broken(tensors, path):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        learner.save(state, 8.0)
    assert small_learner()[1].load(state) == 7.0


def test_the_loss_is_the_mean_of_the_steps_since_the_last_one():
    _, learner = small_learner()
    losses = [learner.step(0.0, *pair).item() for pair in batches(7)]
    assert learner.mean_loss() == pytest.approx(sum(losses) / 7)
    losses = [learner.step(0.0, *pair).item() for pair in batches(3)]
    assert learner.mean_loss() == pytest.approx(sum(losses) / 3)


def python(*arguments) -> str:
    """What a Python beside the training's modules prints."""
    environment = os.environ | {"PYTHONPATH": str(TRAINING), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def small_training(tmp_path_factory) -> Path:
    """A folder with ``work`` and ``out`` of a whole training of few pictures and steps."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH names no ComfyUI; scripts/test sets one up")
    base, draw = tmp_path_factory.mktemp("training"), np.random.default_rng(0)
    (base / "photos").mkdir()
    for number in range(3):
        coarse = Image.fromarray(draw.integers(0, 255, (8, 12, 3), dtype=np.uint8))
        coarse.resize((300, 200)).save(base / "photos" / f"{number}.jpg")
    folders = ["--photos", base / "photos", "--work", base / "work", "--out", base / "out"]
    assert "all is trained" in python(TRAINING / "train.py", "--small", *folders)
    return base


def test_the_shipped_autoencoder_is_the_float32_mean_rounded_once(small_training):
    mean = load_file(small_training / "work" / "autoencoder-mean.safetensors")
    mean = {name[3:]: value for name, value in mean.items() if name.startswith("kl.") and "quant_conv" not in name}
    shipped = unpack(load_file(small_training / "out" / "weights.safetensors"), "vae.")
    for name, value in unpack(pack(mean)).items():
        assert torch.equal(value, shipped[name]), name


def finished(folder: Path, names: list[str], stages: list[str]) -> Path:
    """Weights of these tensors' names, a classifier and a log of these stages."""
    folder.mkdir()
    save_file({name: torch.zeros(1) for name in names}, folder / "weights.safetensors")
    save_file({"head": torch.ones(1)}, folder / "classifier.safetensors")
    lines = [json.dumps({"stage": stage, "seconds": float(i)}) for i, stage in enumerate(stages)]
    (folder / "training-log.jsonl").write_text("\n".join(lines))
    return folder / "weights.safetensors"


def test_the_log_of_what_is_taken_is_carried_once_and_ends_where_the_unets_begins(tmp_path):
    stages = ["start", "autoencoder", "start", "autoencoder", "classifier", "denoiser", "autoencoder on held-out world"]
    given = finished(tmp_path / "first", ["vae.a", "unet.b", "text.c"], stages)
    (tmp_path / "work").mkdir()
    log = Log(tmp_path / "work" / "log.jsonl")
    for _ in range(2):  # calls
        take_finished(given, tmp_path / "work", log)
    *carried, taken = log.entries()
    assert [entry["stage"] for entry in carried] == stages[:5]
    assert taken["weights"] == "first/weights.safetensors"
    assert load_file(tmp_path / "work" / "autoencoder-shipped.safetensors").keys() == {"vae.a"}


def test_an_autoencoder_is_taken_neither_from_nowhere_nor_into_another_training(tmp_path):
    (tmp_path / "work").mkdir()
    log = Log(tmp_path / "work" / "log.jsonl")
    with pytest.raises(ValueError, match="no autoencoder"):
        take_finished(finished(tmp_path / "bare", ["unet.b"], []), tmp_path / "work", log)
    assert not list((tmp_path / "work").iterdir())
    log.add("start", 0.0)
    with pytest.raises(ValueError, match="of its own"):
        take_finished(finished(tmp_path / "first", ["vae.a"], []), tmp_path / "work", log)


def test_a_unet_learns_on_an_autoencoder_that_is_finished(small_training, tmp_path):
    first, given = small_training / "out", tmp_path / "finished"
    given.mkdir()
    before = load_file(first / "weights.safetensors")
    vae = {name: value for name, value in before.items() if name.startswith("vae.")}
    save_file(vae, given / "weights.safetensors")
    for name in ("classifier.safetensors", "training-log.jsonl"):
        shutil.copy(first / name, given)
    folders = ["--photos", small_training / "photos", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    finished = ["--autoencoder", given / "weights.safetensors", "--last"]
    assert "all is trained" in python(TRAINING / "train.py", "--small", *folders, *finished)
    after = load_file(tmp_path / "out" / "weights.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in vae.items())
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name.startswith("unet."))
    judges = [load_file(folder / "classifier.safetensors") for folder in (first, tmp_path / "out")]
    assert all(torch.equal(judges[1][name], value) for name, value in judges[0].items())
    old, new = (Log(folder / "training-log.jsonl").entries() for folder in (first, tmp_path / "out"))
    carried, kept = ([e for e in log if e["stage"] in ("autoencoder", "classifier")] for log in (old, new))
    assert kept == carried
    assert "samples" in [entry["stage"] for entry in new]
    assert old[-1] == new[-1] | {"seconds": old[-1]["seconds"]}, "the same autoencoder's dB"
    seconds = json.loads((tmp_path / "out" / "settings.json").read_text())["seconds"]
    assert seconds.pop("denoiser") == pytest.approx(2.0)
    assert seconds == {entry["stage"]: entry["seconds"] for entry in carried}


RECORDED = """
import json, sys, evaluate, torch

def recorded(model, *rest, original=evaluate.invert_and_back):
    def wrapper(apply, call):
        seen.append(float(call["timestep"][0]))
        return apply(call["input"], call["timestep"], **call["c"])

    seen, model = [], model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return original(model, *rest) | {"seen": seen}

evaluate.invert_and_back = recorded
with torch.inference_mode():
    evaluate.main()
"""


def test_trained_weights_are_evaluated_with_the_packs_inversion(small_training, tmp_path):
    make(tmp_path / "clip.mp4", frames=2, size=(64, 64))
    weights = ["--weights", small_training / "out" / "weights.safetensors"]
    judge = ["--judge", small_training / "out" / "classifier.safetensors"]
    small = ["--width", 64, "--frames", 2, "--pictures", 4, "--captions", 2, "--steps", 2]
    files = ["--clips", tmp_path / "clip.mp4", "--out", tmp_path / "found.json"]
    python("-c", RECORDED, *weights, *judge, *small, *files)
    found = json.loads((tmp_path / "found.json").read_text())
    log = (small_training / "out" / "training-log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["stage"] == "autoencoder on held-out world"
    assert found["captions drawn from noise"]["count"] == 2
    clip = found["clip.mp4, dB"]
    first, refined, second, also, *back = clip["seen"]  # noise levels that the network was told
    assert first < second and back == [second, first], "the way up sees the level that it goes to"
    assert (refined, also) == (first, second), "and once more, to refine the step"
    assert all(np.isfinite(value) for name, value in clip.items() if name != "seen")
