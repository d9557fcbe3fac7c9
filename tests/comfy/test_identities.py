"""What must hold whatever the model: equal settings, equal results."""

import comfy.samplers
import oracles
import pytest
import torch
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from graph import AFRESH, Graph, each_frame, plain_euler, select
from models import SHAPES, clip_latent, gentle_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=SHAPES)
def graph(request):
    with torch.inference_mode():
        yield Graph(request.param)


@pytest.fixture(scope="module")
def sd1():
    with torch.inference_mode():
        yield Graph("sd1", frames=8)


def error(a, b):
    return oracles.relative_error(a, b)


@pytest.mark.parametrize("interpolation", [False, True])
def test_chunk_size_changes_nothing(graph, interpolation):
    whole = graph.edit(interpolation=interpolation, chunk=100)
    for chunk in (1, 3):
        assert error(graph.edit(interpolation=interpolation, chunk=chunk), whole) < TOLERANCE


def test_seeds_reproduce_bits(graph):
    first, second = graph.edit(), graph.edit()
    assert torch.equal(first, second)
    other = graph.edit(select(graph.descriptors, seed=1))
    assert not torch.equal(first, other)


def test_a_budget_of_all_keyframes_is_dense(graph):
    plan = each_frame(graph.descriptors)
    dense = graph.edit(plan, model=graph.slim(6))
    assert torch.equal(graph.edit(plan, model=graph.slim(10000)), dense)
    assert error(graph.edit(plan, model=graph.slim(2)), dense) > 1e-4


def test_every_frame_its_own_keyframe_is_the_joint_edit_of_all(graph):
    plan = each_frame(graph.descriptors)
    keyframes, _ = graph.joint(plan)
    assert torch.equal(graph.edit(plan), keyframes)


def test_fixed_draws_keep_the_previewed_keyframes(graph):
    plan = select(graph.descriptors, mode="fixed")
    keyframes, _ = graph.joint(plan)
    assert error(graph.edit(plan)[list(plan.keyframes(0))], keyframes) < TOLERANCE


def test_the_preview_of_resampled_draws_is_of_the_first_draw(sd1):
    resampled, _ = sd1.joint(select(sd1.descriptors, seed=5))
    fixed, _ = sd1.joint(select(sd1.descriptors, mode="fixed", seed=5))
    assert torch.equal(resampled, fixed)


@pytest.mark.parametrize("regional", [False, True])
def test_identical_frames_give_identical_outputs(regional):
    """With regional prompts too, where ComfyUI gives each branch the areas of the other under the same uuid."""
    still = clip_latent(1).expand(5, -1, -1, -1).contiguous()
    graph = Graph("sd1", latent=still, steps=2)
    region = [graph.source[0][0], {"area": (4, 6, 2, 4), "strength": 0.5}]
    positive = [graph.positive[0], region] if regional else graph.positive
    out = graph.edit(select(graph.descriptors, max_clip=2), positive=positive)
    for frame in out[1:]:
        assert error(frame, out[0]) < TOLERANCE


def test_a_plan_in_any_order_gives_the_same_frames(sd1):
    """The order in which a schedule names keyframes is none of the result's business."""
    starts = select(sd1.descriptors, max_clip=3).clips.starts
    forward = ",".join(map(str, starts))
    backward = ",".join(map(str, reversed(starts)))
    plans = [select(sd1.descriptors, max_clip=3, mode="schedule", schedule=s) for s in (forward, backward)]
    assert torch.equal(sd1.edit(plans[0]), sd1.edit(plans[1]))


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_inversion_then_sampling_returns_the_source(shape):
    """Same prompt, cfg 1, full injection, own tokens only: what is left is DDIM's own first-order error."""
    errors = []
    for steps in (10, 50, 100):
        graph = Graph(shape, steps=steps, frames=2, model=gentle_model(shape))
        same = {"positive": graph.source, "negative": graph.source, "cfg": 1.0, "shares": (1.0, 1.0)}
        back, _ = graph.joint(each_frame(graph.descriptors), model=graph.slim(1), **same)
        errors.append(error(back, graph.latent))
    print(f"{shape}: relative error at 10, 50, 100 steps: " + ", ".join(f"{e:.1e}" for e in errors))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.6 * errors[1] < 0.1


def test_a_trajectory_holds_the_inversion_of_each_frame_alone(sd1):
    """Chunks, batches and conditioning slices leave no mark on a frame's inversion."""
    alone = AdaFlowDDIMInvert.execute(
        sd1.model, sd1.source, {"samples": sd1.latent[5:6]}, 4, "float32", resume=AFRESH
    ).args[0]
    chunked = AdaFlowDDIMInvert.execute(sd1.model, sd1.source, {"samples": sd1.latent}, 4, "float32", 3, AFRESH).args[0]
    for level in range(5):
        assert error(alone.level(level)[0], sd1.trajectory.level(level)[5]) < TOLERANCE
        assert error(chunked.level(level), sd1.trajectory.level(level)) < TOLERANCE


def test_half_precision_storage_stays_close(sd1):
    half = AdaFlowDDIMInvert.execute(sd1.model, sd1.source, {"samples": sd1.latent}, 4, "float16").args[0]
    assert error(half.level(4), sd1.trajectory.level(4)) < 1e-3


def test_the_noisiest_latent_starts_any_sampler(sd1):
    """AdaFlowPatchModel by the trajectory's start equals the same from the LATENT with the sampler's noise off."""
    own = plain_euler(sd1.patch(), sd1.latent, sd1.sigmas(), sd1.positive, sd1.negative, 3.0)
    given = plain_euler(sd1.patch(start=False), sd1.noisiest, sd1.sigmas(), sd1.positive, sd1.negative, 3.0)
    assert error(given, own) < TOLERANCE
    assert error(own, sd1.edit()) < TOLERANCE


SAMPLERS = [n for n in comfy.samplers.SAMPLER_NAMES if n not in ("dpm_adaptive", "dpm_fast")]


def test_every_sampler_is_offered_or_refused(sd1):
    from adaflow_pack.nodes.patching.patch import deterministic_samplers, is_stochastic

    offered = deterministic_samplers()
    assert {"euler", "ddim", "heun", "dpm_2", "lms", "dpmpp_2m", "uni_pc", "ipndm", "deis"} <= set(offered)
    for name in set(SAMPLERS) - set(offered):
        assert is_stochastic(name)
        with pytest.raises(ValueError, match=r"sampler_name.*noise at each step"):
            sd1.joint(sampler=name)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if not any(p in n for p in ("ancestral", "sde", "ddpm", "lcm", "seeds", "sa_solver"))])  # fmt: skip # noqa: E501
def test_deterministic_samplers_run_and_repeat(sd1, name):
    first, second = (sd1.joint(sampler=name, scheduler="normal", steps=3)[0] for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", comfy.samplers.SCHEDULER_NAMES)
def test_schedulers_run_off_the_grid(sd1, name):
    assert torch.isfinite(sd1.joint(scheduler=name, steps=3)[0]).all()


def test_a_source_off_the_grid_lies_between_its_neighbours(sd1):
    low, high = sd1.trajectory.sigmas[2:4]
    middle = sd1.trajectory.at((low + high) / 2)
    expected = (sd1.trajectory.at(low) + sd1.trajectory.at(high)) / 2
    assert error(middle, expected) < TOLERANCE


def test_a_clip_of_one_frame_is_its_own_keyframe():
    graph = Graph("sd1", frames=1, steps=2)
    out = graph.edit()
    assert out.shape == (1, 4, 8, 12)
    assert torch.equal(out, graph.joint()[0])
