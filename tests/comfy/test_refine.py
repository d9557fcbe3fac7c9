"""AdaFlow DDIM Invert with rounds that refine each step: what they compute, what they are good for, what is shown."""

import logging
import re
from itertools import pairwise

import comfy.utils
import oracles
import pytest
import torch
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from broken_runs import Boom, boom, forwards
from graph import AFRESH, plain_euler
from models import SHAPES, clip_latent, conditioning, gentle_model, small_model

FRAMES = 3


def invert(model, source, steps, refine, resume=AFRESH, chunk=0, latent=None):
    latent = clip_latent(FRAMES) if latent is None else latent
    arguments = model, source, {"samples": latent}, steps, "float32", chunk, resume
    trajectory, descriptors, noisiest = AdaFlowDDIMInvert.execute(*arguments, refine).args
    return trajectory, descriptors, noisiest["samples"]


@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("shape", ["sd1", "sd2-v", "sdxl"])
def test_levels_are_those_of_the_oracle(shape, refine):
    """A gentle model: of a wild one the rounds would enlarge float32's rounding."""
    model, source, steps = gentle_model(shape), conditioning(shape, 1), 4
    trajectory, _, _ = invert(model, source, steps, refine)
    base, context = model.model, source[0][0].double().expand(FRAMES, -1, -1)
    y = base.encode_adm(width=96, height=64, **source[0][1]).double().expand(FRAMES, -1) if shape == "sdxl" else None
    unet = base.diffusion_model.double()

    def eps(x, t):
        out = unet(x, torch.full((FRAMES,), t), context, y, transformer_options={})
        if SHAPES[shape][1] == "eps":
            return out
        return oracles.alpha_bar(t) ** 0.5 * out + (1 - oracles.alpha_bar(t)) ** 0.5 * x

    clean = base.latent_format.process_in(clip_latent(FRAMES).double())
    try:
        expected, other = (oracles.invert(clean, eps, steps, rounds) for rounds in (refine, refine + 1))
    finally:
        unet.float()
    for level in range(steps + 1):
        assert oracles.relative_error(trajectory.level(level), expected[level]) < 1e-5
    assert oracles.relative_error(other[-1], expected[-1]) > 1e-3


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_each_round_brings_the_way_back_closer_to_the_clip(shape):
    """ComfyUI's own sampling from the noisiest latent, same prompt, nothing injected."""
    model, source, errors = gentle_model(shape), conditioning(shape, 1), []
    for refine in range(4):
        trajectory, _, noisiest = invert(model, source, 8, refine)
        down = [*reversed(trajectory.sigmas[1:]), 0.0]
        back = plain_euler(model, noisiest, down, source, source, 1.0)
        errors.append(oracles.relative_error(back, clip_latent(FRAMES)))
    print(f"{shape}: relative error of 0 to 3 rounds: " + ", ".join(f"{error:.1e}" for error in errors))
    assert all(after < 0.75 * before for before, after in pairwise(errors))


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        yield small_model("sd1")


def test_descriptors_are_of_the_first_evaluation(model):
    source = conditioning("sd1", 1)
    (_, plain, _), (_, refined, _) = (invert(model, source, 2, refine, chunk=2) for refine in (0, 2))
    assert torch.equal(refined.maps(list(range(FRAMES))), plain.maps(list(range(FRAMES))))


def test_rounds_are_part_of_what_a_run_is_and_none_are_what_runs_were_before(model):
    source, own = conditioning("sd1", 1), clip_latent(FRAMES, seed=7)
    identities = [invert(model, source, 2, refine, latent=own)[0].run.identity for refine in (0, 1, 2)]
    assert set(identities[0]) == {"format", "dtype", "shape", "sigmas", "model", "clip", "weights", "source"}
    assert identities[1:] == [identities[0] | {"refine": refine} for refine in (1, 2)]
    with forwards(model) as calls:
        invert(model, source, 2, 0, "resume", latent=own)
        assert not calls
        invert(model, source, 2, 3, "resume", latent=own)
    assert len(calls) == 2 * 4


def test_progress_counts_evaluations_of_a_run_that_goes_on_too(model, monkeypatch):
    shown, source = [], conditioning("sd1", 1)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *values, **_: shown.append(values[:2]))
    invert(model, source, 4, 2)
    assert shown == [(number, 12) for number in range(1, 13)]
    shown.clear()
    with pytest.raises(Boom), forwards(model, 8, boom):  # in the second evaluation of the third step
        invert(model, source, 4, 2)
    assert shown == [(number, 12) for number in range(1, 8)]
    shown.clear()
    invert(model, source, 4, 2, "resume")
    assert shown == [(number, 12) for number in range(7, 13)]


def test_the_node_tells_of_evaluations_and_how_long_they_take(model, caplog):
    with caplog.at_level(logging.INFO):
        invert(model, conditioning("sd1", 1), 3, 1)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("AdaFlowDDIMInvert: ")]
    assert any(": 3 frames, 3 steps of 2 evaluations, 96x64 pixels: needs about" in line for line in lines)
    times = [line for line in lines if "takes about" in line]
    assert len(times) == 2 and all(re.search(r"takes about [\d.]+ s: 6 x [\d.]+ s", line) for line in times)


def test_what_is_not_finite_in_a_round_is_told(model):
    calls = iter(range(1, 10**6))
    broken = model.clone()
    broken.set_model_output_block_patch(lambda h, skip, options: (h * (torch.nan if next(calls) > 12 else 1), skip))
    with forwards(model) as done, pytest.raises(RuntimeError, match=r"not finite.*inversion step 1 of 2"):
        invert(broken, conditioning("sd1", 1), 2, 2)
    assert len(done) == 2  # the twelve blocks of the first evaluation passed
