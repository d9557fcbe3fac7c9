"""Everything that is per frame or wired from elsewhere keeps working: ControlNet, LoRA, prompts, masks, patches."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.lora
import comfy.samplers
import oracles
import pytest
import torch
from adaflow_pack.nodes.patching.windows import slice_conditioning, slice_control, take
from comfy.patcher_extension import WrappersMP
from graph import Graph, each_frame, plain_euler, select
from models import SD1, SDXL, conditioning, initialise, random_model

FRAMES, SIZE = 6, (8, 12)


@pytest.fixture(scope="module")
def graph():
    with torch.inference_mode():
        yield Graph("sd1", frames=FRAMES, size=SIZE, steps=3)


def random_controlnet(shape="sd1", seed=7):
    config = {k: v for k, v in (SDXL if shape == "sdxl" else SD1).items() if k not in ("out_channels",)}
    config.pop("transformer_depth_output")
    net = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=torch.float32)
    initialise(net, seed)
    return comfy.controlnet.ControlNet(net.eval(), load_device=torch.device("cpu"))


def hints(seed, frames=FRAMES):
    return torch.rand(frames, 3, SIZE[0] * 8, SIZE[1] * 8, generator=torch.Generator().manual_seed(seed))


def with_control(cond, control, hint, strength=0.7, interval=(0.0, 1.0)):
    """CONDITIONING as core's ControlNetApplyAdvanced makes it; chains onto one that is there."""
    out = []
    for embedding, options in cond:
        applied = control.copy().set_cond_hint(hint, strength, interval)
        applied.set_previous_controlnet(options.get("control"))
        out.append([embedding, {**options, "control": applied, "control_apply_to_uncond": False}])
    return out


class Recorder:
    """Watches the UNet's forwards: which frames, their input and the ControlNet residuals they got."""

    def __init__(self):
        self.calls = []

    def patch(self, model):
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "recorder", self)
        return model

    def __call__(self, executor, x, *args, **kwargs):
        step_pass = args[4].get("adaflow")
        if hasattr(step_pass, "where"):
            frames = step_pass.where.frames
        else:
            frames = step_pass.state.keyframes[getattr(step_pass, "rows", slice(None))]
        control = args[3] and {section: list(residuals) for section, residuals in args[3].items()}  # the UNet pops them
        self.calls.append((type(step_pass).__name__, frames, x.clone(), args[0].clone(), args[1].clone(), control))
        return executor(x, *args, **kwargs)


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_a_controlnet_sees_each_frames_own_hint(shape):
    """Its residuals in every pass are those of evaluating it frame by frame."""
    graph = Graph(shape, frames=FRAMES, size=SIZE, steps=2)
    control, hint = random_controlnet(shape), hints(1)
    recorder = Recorder()
    positive, negative = (with_control(c, control, hint) for c in (graph.positive, graph.negative))
    model = recorder.patch(graph.model)
    graph.edit(select(graph.descriptors, max_clip=2), chunk=2, model=model, positive=positive, negative=negative)
    seen = set()
    for name, frames, x, timesteps, context, residuals in recorder.calls:
        if name.startswith("Source"):
            assert residuals is None
            continue
        for row in range(x.shape[0]):
            frame = frames[row % len(frames)]
            extra = {}
            if shape == "sdxl":
                branch = positive if torch.equal(context[row], positive[0][0][0]) else negative
                pooled = branch[0][1]["pooled_output"]
                extra["y"] = graph.model.model.encode_adm(width=96, height=64, pooled_output=pooled)
            alone = control.control_model(
                x=x[row : row + 1],
                hint=hint[frame : frame + 1],
                timesteps=timesteps[row : row + 1],
                context=context[row : row + 1],
                **extra,
            )
            for section in ("output", "middle"):
                for got, expected in zip(reversed(residuals[section]), reversed(alone[section]), strict=True):
                    if expected is not None:
                        assert oracles.relative_error(got[row : row + 1], expected * 0.7) < 1e-5
            seen.add((name, frame))
    assert {frame for _, frame in seen} == set(range(FRAMES))
    assert {name for name, _ in seen} == {"EditJointPass", "EditPropagationPass"}


def frame_by_frame(graph, positive, negative, model=None):
    """ComfyUI's plain sampling of each frame alone, with its own entries of the conditioning."""
    out = []
    for frame in range(FRAMES):
        conds = [slice_conditioning(c, [frame], FRAMES) for c in (positive, negative)]
        start = graph.noisiest[frame : frame + 1]
        out.append(plain_euler(model or graph.model, start, graph.sigmas(), *conds, 3.0))
    return torch.cat(out)


def reduced(graph, positive, negative, model=None):
    """The method with every frame its own keyframe, no injection and no extended attention: plain sampling."""
    model = graph.slim(1, model=model)
    return graph.edit(
        each_frame(graph.descriptors), model=model, shares=(0.0, 0.0), positive=positive, negative=negative
    )


def test_the_method_reduces_to_plain_sampling(graph):
    expected = frame_by_frame(graph, graph.positive, graph.negative)
    assert oracles.relative_error(reduced(graph, graph.positive, graph.negative), expected) < 1e-5


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.4, 1.0)])
def test_chained_controlnets_with_strength_and_interval(graph, interval):
    one, two = random_controlnet(seed=7), random_controlnet(seed=8)
    conds = [
        with_control(with_control(c, one, hints(1), 0.5), two, hints(2), 0.3, interval)
        for c in (graph.positive, graph.negative)
    ]
    expected = frame_by_frame(graph, *conds)
    assert oracles.relative_error(reduced(graph, *conds), expected) < 1e-5
    assert oracles.relative_error(expected, frame_by_frame(graph, graph.positive, graph.negative)) > 1e-3


def test_a_short_hint_batch_repeats_as_in_core(graph):
    control = random_controlnet()
    short = with_control(graph.positive, control, hints(1, frames=4))
    long = with_control(graph.positive, control, torch.cat([hints(1, frames=4)] * 2))
    assert torch.equal(graph.edit(positive=short), graph.edit(positive=long))
    part = slice_control(short[0][1]["control"], [5], {})
    assert torch.equal(part.cond_hint_original, hints(1, frames=4)[1:2])
    assert take(torch.arange(1), [3, 4]).tolist() == [0]


def test_per_frame_prompts(graph):
    prompts = conditioning("sd1", 11, batch=FRAMES)
    expected = frame_by_frame(graph, prompts, graph.negative)
    assert oracles.relative_error(reduced(graph, prompts, graph.negative), expected) < 1e-5
    assert oracles.relative_error(graph.edit(positive=prompts, chunk=1), graph.edit(positive=prompts, chunk=9)) < 1e-5


def test_masked_and_combined_prompts(graph):
    mask = torch.zeros(FRAMES, 64, 96)
    for frame in range(FRAMES):
        mask[frame, :, : 16 * frame] = 1.0
    second = [[conditioning("sd1", 12)[0][0], {"mask": mask, "mask_strength": 1.0}]]
    combined = graph.positive + second
    expected = frame_by_frame(graph, combined, graph.negative)
    assert oracles.relative_error(reduced(graph, combined, graph.negative), expected) < 1e-5
    assert torch.isfinite(graph.edit(positive=combined)).all()


def test_area_and_timed_prompts(graph):
    area = [[conditioning("sd1", 13)[0][0], {"area": (4, 6, 2, 4), "strength": 0.8}]]
    timed = [[conditioning("sd1", 14)[0][0], {"start_percent": 0.3, "end_percent": 1.0}]]
    for extra in (area, timed):
        conds = graph.positive + extra
        expected = frame_by_frame(graph, conds, graph.negative)
        assert oracles.relative_error(reduced(graph, conds, graph.negative), expected) < 1e-5
        whole = graph.edit(positive=conds, chunk=100)
        assert oracles.relative_error(graph.edit(positive=conds, chunk=1), whole) < 1e-5
        assert oracles.relative_error(whole, graph.edit()) > 1e-4


def test_a_noise_mask_keeps_the_source_elsewhere(graph):
    mask = torch.zeros(FRAMES, 64, 96)
    mask[:, :, 48:] = 1.0
    graph.trajectory.noise_mask = mask
    try:
        out = graph.edit()
    finally:
        graph.trajectory.noise_mask = None
    assert oracles.relative_error(out[..., :5], graph.latent[..., :5]) < 1e-5
    assert oracles.relative_error(out[..., 6:], graph.latent[..., 6:]) > 1e-2


def test_a_lora_on_attn1_changes_the_edit_as_a_plain_run(graph):
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for key, weight in graph.model.model.state_dict().items():
        if "attn1.to_" in key and key.endswith("weight") and weight.ndim == 2:
            name = key.removesuffix(".weight")
            lora[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.2
            lora[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.2
    keys = {key.removesuffix(".weight"): key for key in graph.model.model.state_dict() if "attn1" in key}
    patched = graph.model.clone()
    assert patched.add_patches(comfy.lora.load_lora(lora, keys), 1.0)
    expected = frame_by_frame(graph, graph.positive, graph.negative, patched)
    assert oracles.relative_error(reduced(graph, graph.positive, graph.negative, patched), expected) < 1e-5
    assert oracles.relative_error(expected, frame_by_frame(graph, graph.positive, graph.negative)) > 1e-3
    assert oracles.relative_error(graph.edit(model=patched), graph.edit()) > 1e-3


def test_attn2_and_output_patches_act_on_every_frame(graph):
    """An attn2 replacement of IP-Adapter's kind and FreeU's kind of output patch."""
    seen = {"attn2": 0, "output": 0}

    def attn2(q, k, v, extra_options):
        seen["attn2"] += 1
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"]) * 1.2

    def output(h, skip, options):
        seen["output"] += 1
        return h * 1.1, skip * 0.9

    patched = graph.model.clone()
    patched.set_model_attn2_replace(attn2, "output", 4)
    patched.set_model_output_block_patch(output)
    expected = frame_by_frame(graph, graph.positive, graph.negative, patched)
    assert oracles.relative_error(reduced(graph, graph.positive, graph.negative, patched), expected) < 1e-5
    before = dict(seen)
    assert oracles.relative_error(graph.edit(model=patched), graph.edit()) > 1e-3
    assert all(seen[key] > before[key] for key in seen)


def test_cfg_1_runs_one_branch(graph):
    recorder = Recorder()
    out = graph.edit(model=recorder.patch(graph.model), cfg=1.0)
    assert torch.isfinite(out).all()
    for name, frames, x, *_ in recorder.calls:
        assert x.shape[0] == len(frames), name


def test_the_source_branch_runs_only_where_it_is_needed(graph):
    """3 steps, injection in the first two: no source forward in the last, none of a keyframe in propagation."""
    recorder = Recorder()
    plan = select(graph.descriptors, max_clip=3, mode="fixed")
    graph.joint(plan, model=recorder.patch(graph.model), shares=(0.6, 0.6))
    joint_calls = [name for name, *_ in recorder.calls]
    assert joint_calls.count("SourceJointPass") == 2
    recorder.calls.clear()
    edit = graph.joint(plan, model=recorder.patch(graph.model), shares=(0.6, 0.6))[1]
    recorder.calls.clear()
    from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate

    AdaFlowTokenPropagate.execute(edit, False, 0)
    names = [name for name, *_ in recorder.calls]
    assert names.count("SourcePropagationPass") == 2 and names.count("EditPropagationPass") == 3
    for name, frames, *_ in recorder.calls:
        if "Propagation" in name:
            assert not set(frames) & set(plan.keyframes(0))


@pytest.mark.parametrize("budget", [1, 2, 100])
def test_slim_attention_works_in_a_plain_sampler(graph, budget):
    """With no plan: extended attention among the batch; a budget of 1 is a frame's own tokens, so the plain model."""
    out = plain_euler(graph.slim(budget), graph.noisiest, graph.sigmas(), graph.positive, graph.negative, 3.0)
    plain = plain_euler(graph.model, graph.noisiest, graph.sigmas(), graph.positive, graph.negative, 3.0)
    assert (oracles.relative_error(out, plain) < 1e-5) == (budget == 1)


def test_slim_attention_rates_tokens_by_a_plan(graph):
    """The whole clip sampled as keyframes with a plan is the method with every frame a keyframe and no injection."""
    plan = each_frame(graph.descriptors)
    out = plain_euler(graph.slim(2, plan), graph.noisiest, graph.sigmas(), graph.positive, graph.negative, 3.0)
    expected = graph.edit(plan, model=graph.slim(2), shares=(0.0, 0.0))
    assert oracles.relative_error(out, expected) < 1e-5


def test_a_model_slimmed_with_a_plan_is_cloned_and_edited_like_any_other(graph):
    """ComfyUI copies a MODEL's options deeply when it clones it; the plan among them holds files and caches."""
    plan = select(graph.descriptors, max_clip=2)
    model = graph.slim(2, plan).clone()
    out = plain_euler(model, graph.noisiest, graph.sigmas(), graph.positive, graph.negative, 3.0)
    again = plain_euler(graph.slim(2, plan), graph.noisiest, graph.sigmas(), graph.positive, graph.negative, 3.0)
    assert torch.equal(out, again)
    assert torch.equal(graph.edit(plan, model=model), graph.edit(plan, model=graph.slim(2)))


def test_comfyui_reserves_memory_for_a_chunk_not_the_clip(graph):
    shapes = []

    def prepare(executor, model, noise_shape, *args, **kwargs):
        shapes.append(list(noise_shape))
        return executor(model, noise_shape, *args, **kwargs)

    model = graph.patch(select(graph.descriptors, -1.0, -1.0), chunk=2)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "after", prepare)
    plain_euler(model, graph.latent, graph.sigmas(), graph.positive, graph.negative, 3.0)
    assert shapes == [[2, 4, *SIZE]]


def test_an_inpainting_models_concatenated_latents(graph):
    """c_concat: a mask and a masked latent of its own for every frame."""
    inpaint = random_model(SD1 | {"in_channels": 9}, "eps", 0, torch.float32)
    inpaint.model.set_inpaint()
    nine = Graph("sd1", latent=graph.latent, steps=3, model=inpaint)
    generator = torch.Generator().manual_seed(3)
    options = {
        "concat_latent_image": torch.randn(FRAMES, 4, *SIZE, generator=generator),
        "concat_mask": (torch.rand(FRAMES, 1, *SIZE, generator=generator) > 0.5).float(),
    }
    conds = [[[c[0][0], options]] for c in (nine.positive, nine.negative)]
    expected = frame_by_frame(nine, *conds)
    assert oracles.relative_error(reduced(nine, *conds), expected) < 1e-5
    assert oracles.relative_error(expected, frame_by_frame(nine, nine.positive, nine.negative)) > 1e-3


def out_of_memory_above(model, frames):
    """A clone that has memory for so many rows in one propagation forward."""

    def wrapper(executor, x, *args, **kwargs):
        step_pass = args[4].get("adaflow")
        if hasattr(step_pass, "where") and len(step_pass.where.frames) > frames:
            raise torch.OutOfMemoryError("injected")
        return executor(x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "memory", wrapper)
    return clone


def test_out_of_memory_halves_the_chunk_and_goes_on(graph):
    expected = graph.edit()
    assert oracles.relative_error(graph.edit(model=out_of_memory_above(graph.model, 1)), expected) < 1e-5
    with pytest.raises(RuntimeError, match=r"out of memory with 1 frame at.*smaller size, or fewer keyframes"):
        graph.edit(model=out_of_memory_above(graph.model, 0))
