"""Blocks run in channels_last with fused norms equal ComfyUI's own, here with PyTorch's operations for the kernels."""

from contextlib import nullcontext

import comfy.model_management
import oracles
import pytest
import torch
from adaflow_pack.nodes.patching import fast_blocks
from broken_runs import Boom, boom
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, Upsample
from comfy.ops import manual_cast
from comfy.patcher_extension import WrappersMP
from graph import Graph, plain_euler, select
from models import small_model
from test_clean_up import cancel, failing, leftovers, plain
from test_compile import lora
from test_conditioning import hints, random_controlnet, with_control


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setenv(fast_blocks.VARIABLE, "fast")


@pytest.fixture
def ran(monkeypatch):
    """Blocks that ran fast, and blocks that ran as they are."""
    ran, run = ([], []), fast_blocks.run

    def counting(block, forward, args, *more):
        def own(*args):
            ran[1].append(block)
            return forward(*args)

        ran[0].append(block)
        return run(block, own, args, *more)

    monkeypatch.setattr(fast_blocks, "run", counting)
    return ran


def blocks_of(model, kind):
    return [module for module in model.model.diffusion_model.modules() if type(module) is kind]


def refuse(*_):
    raise AssertionError("the block ran as it is")


def nothing_given(number):
    return None


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_res_blocks_equal_their_own_forward(shape, channels_last):
    with torch.inference_mode():
        for block in blocks_of(small_model(shape), ResBlock):
            x, emb = torch.randn(3, block.channels, 5, 7), torch.randn(3, block.emb_channels)
            expected = block(x, emb)
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            found = fast_blocks.run(block, refuse, (x, emb), nothing_given)
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert oracles.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_transformers_equal_their_own_forward(shape, channels_last, together, monkeypatch):
    """With the feed forward of so many images at a time."""
    with torch.inference_mode():
        for block in blocks_of(small_model(shape), SpatialTransformer):
            x, context = torch.randn(3, block.in_channels, 5, 7), torch.randn(3, 7, 24)
            wide = block.transformer_blocks[0].ff.net[0].proj.out_features
            monkeypatch.setattr(fast_blocks, "WIDE_BYTES", together * 35 * wide * 4)
            expected = block(x, context, {})
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            found = fast_blocks.run(block, refuse, (x, context, {}), nothing_given)
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert oracles.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("options", [{"skip_t_emb": True}, {"up": True}, {"down": True}, {"use_scale_shift_norm": True},
                                     {"out_channels": 96, "use_conv": True}, {"kernel_size": 1}, {"dropout": 0.3}],
                         ids=str)  # fmt: skip
def test_res_blocks_of_other_kinds(options):
    """Down and up, and those whose time scales a norm, run as they are."""
    with torch.inference_mode():
        block = ResBlock(64, 48, options.pop("dropout", 0.0), **options).eval()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        x, emb = torch.randn(2, 64, 6, 4), torch.randn(2, 48)
        own = []
        found = fast_blocks.run(block, lambda *args: own.append(1) or block(*args), (x, emb), nothing_given)
        assert oracles.relative_error(found, block(x, emb)) < 1e-5
        assert bool(own) == bool({"up", "down", "use_scale_shift_norm"} & set(options))


@pytest.fixture
def prompts(monkeypatch):
    """How many images attended to how many prompts by fast blocks, with PyTorch's attention as ComfyUI's choice."""
    shapes, attend = [], fast_blocks.prompt_attention

    def noting(q, k, v, heads):
        shapes.append((len(q), len(k)))
        return attend(q, k, v, heads)

    monkeypatch.setattr(fast_blocks, "prompt_attention", noting)
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    return shapes


@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_attention_to_a_prompt_equals_its_own_forward(shape, prompts):
    """The prompt is one, expanded over the images, as ComfyUI has it."""
    with torch.inference_mode():
        for block in blocks_of(small_model(shape), SpatialTransformer):
            x, context = torch.randn(3, block.in_channels, 5, 7), torch.randn(1, 7, 24).expand(3, -1, -1)
            prompts.clear()
            found = fast_blocks.run(block, refuse, (x, context, {}), nothing_given)
            assert len(prompts) == len(block.transformer_blocks)
            assert oracles.relative_error(found, block(x, context, {})) < 1e-5


def test_prompts_that_images_share_are_projected_once(prompts):
    """Not those that a patch put in their place."""
    block = blocks_of(small_model("sd2"), SpatialTransformer)[0]
    with torch.inference_mode():
        x, once = torch.randn(6, block.in_channels, 5, 7), torch.randn(2, 7, 24)
        repeated, other = once.repeat_interleave(3, 0), torch.randn(6, 7, 24)
        for context, count in ((repeated, 2), (other, 6)):
            found = fast_blocks.run(block, refuse, (x, context, {}), nothing_given, (repeated, once))
            assert oracles.relative_error(found, block(x, context, {})) < 1e-5
            assert set(prompts) == {(6, count)}
            prompts.clear()


@pytest.mark.parametrize("per_frame", [False, True])
def test_a_run_projects_the_prompts_of_its_branches_once(prompts, per_frame):
    """Unless each frame has its own."""
    graph = Graph("sd2", steps=2)
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=3, mode="fixed")
    if per_frame:
        graph.positive = [[torch.cat([graph.positive[0][0] * (1 + i / 9) for i in range(len(graph.latent))]), {}]]
    prompts.clear()
    graph.edit(plan)
    assert prompts and any(keys > 2 for _, keys in prompts) == per_frame


def by_function(model, scale):
    def wrapper(apply, args):
        conditions = {**args["c"], "c_crossattn": scale(args["c"]["c_crossattn"])}
        return apply(args["input"], args["timestep"], **conditions)

    model.set_model_unet_function_wrapper(wrapper)


def by_wrapper(model, scale):
    def wrapper(executor, x, timesteps, context, *args, **kwargs):
        return executor(x, timesteps, scale(context), *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another pack", wrapper)


@pytest.mark.parametrize("change", [by_function, by_wrapper])
def test_prompts_that_another_pack_gives_each_frame_are_projected_for_each(prompts, change, monkeypatch):
    """As prompt travel does, where ComfyUI's conditioning has one prompt for all frames."""
    graph = Graph("sd2", steps=2)
    plan, model, edits = select(graph.descriptors, -1.0, -1.0, max_clip=3, mode="fixed"), graph.model.clone(), {}

    def scale(prompt):
        return prompt * torch.linspace(0.5, 1.5, len(prompt))[:, None, None]

    change(model, scale)
    plain = graph.edit(plan)
    for kind in ("fast", "own"):
        monkeypatch.setenv(fast_blocks.VARIABLE, kind)
        prompts.clear()
        edits[kind] = graph.edit(plan, model=model)
        assert bool(prompts) == (kind == "fast")
    assert oracles.relative_error(edits["fast"], edits["own"]) < 1e-5
    assert oracles.relative_error(edits["own"], plain) > 1e-2


def test_attention_to_a_prompt_that_is_changed_stays_as_it_is(prompts, monkeypatch):
    """By a hook, a forward of its own, another function of attention, or another choice of ComfyUI's."""
    block = blocks_of(small_model("sd2"), SpatialTransformer)[0]
    attn2, x, context = block.transformer_blocks[0].attn2, torch.randn(2, 32, 5, 7), torch.randn(2, 7, 24)
    original = attn2.forward

    def override(function, *args, **kwargs):
        return 2 * function(*args, **kwargs)

    def found_and_own(options):
        before = len(prompts)
        found = fast_blocks.run(block, refuse, (x, context, dict(options)), nothing_given)
        assert len(prompts) == before
        own = block(x, context, dict(options))
        assert oracles.relative_error(found, own) < 1e-5
        return own

    with torch.inference_mode():
        plain = block(x, context, {})
        handle = attn2.register_forward_hook(lambda module, args, output: 2 * output)
        changed = [found_and_own({})]
        handle.remove()
        attn2.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)
        changed.append(found_and_own({}))
        del attn2.forward
        with_override = found_and_own({"optimized_attention_override": override})
        if hasattr(attention, "wrap_attn"):  # the older ComfyUI knows no such thing
            changed.append(with_override)
        monkeypatch.setattr(attention, "optimized_attention", lambda *args, **kwargs: 2 * args[0])
        changed.append(found_and_own({}))
        assert all(oracles.relative_error(own, plain) > 1e-3 for own in changed)


def test_upsampling_equals_its_own_forward(ran):
    for block in blocks_of(small_model("sd2"), Upsample):
        for shape in (None, (2, 1, 5, 9)):
            x = torch.randn(2, block.channels, 3, 5)
            found = fast_blocks.run_upsample(block, refuse, x, shape)
            assert oracles.relative_error(found, block(x, output_shape=shape)) < 1e-6


def test_a_feed_forward_is_added_up_in_place_or_as_it_is(monkeypatch):
    """The same where its last projection does not work as it is: here, of another type."""
    block = next(iter(blocks_of(small_model("sd2"), SpatialTransformer)))
    inner, x = block.transformer_blocks[0], torch.randn(2, 6, block.in_channels)
    found = fast_blocks._accumulating(inner.ff, x)
    assert found is inner.ff.net[2] and found.bias is not None
    assert fast_blocks._accumulating(inner.ff, x.double()) is None
    normed = inner.norm3(x)
    plain = fast_blocks._add_feed_forward(inner.ff, normed, x.clone(), None)
    summed = fast_blocks._add_feed_forward(inner.ff, normed, x + found.bias, found)
    assert oracles.relative_error(summed, inner.ff(normed) + x) < 1e-6
    assert oracles.relative_error(summed, plain) < 1e-6


def test_weights_of_another_type_are_cast():
    """As ComfyUI does where it keeps weights in another precision than it computes in."""
    with torch.inference_mode():
        block = ResBlock(64, 48, 0.0, out_channels=96, operations=manual_cast, dtype=torch.bfloat16).eval()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        args = torch.randn(2, 64, 6, 4), torch.randn(2, 48)
        assert oracles.relative_error(fast_blocks.run(block, refuse, args, nothing_given), block(*args)) < 1e-5


@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_inversion_and_edit_equal_the_plain_ones(shape, ran, monkeypatch):
    """With injection in the first of two steps; every block runs fast, in every pass."""
    noisiest, edits = [], []
    for kind in ("fast", "own"):
        monkeypatch.setenv(fast_blocks.VARIABLE, kind)
        graph = Graph(shape, frames=5, steps=2)
        noisiest.append(graph.noisiest)
    assert oracles.relative_error(*noisiest) < 1e-5
    unet = graph.model.model.diffusion_model
    for kind in ("fast", "own"):
        monkeypatch.setenv(fast_blocks.VARIABLE, kind)
        edits.append(edit(graph, interpolation=True, shares=(0.5, 0.5)))
    assert oracles.relative_error(*edits) < 1e-5
    assert not ran[1]
    blocks = {module for module in unet.modules() if type(module) in (ResBlock, SpatialTransformer)}
    assert blocks <= set(ran[0]) and len(set(ran[0])) == 2 * len(blocks)  # the first inversion had a model of its own
    assert not leftovers(graph.model)


def edit(graph, **changes):
    return graph.edit(select(graph.descriptors, -1.0, -1.0, max_clip=2), chunk=2, **changes)


@pytest.fixture(scope="module")
def graph():
    with torch.inference_mode():
        yield Graph("sd2", frames=5, steps=2)


def both(graph, monkeypatch, **changes):
    """Edits by the UNet's own blocks and by fast ones."""
    edits = []
    for kind in ("own", "fast"):
        monkeypatch.setenv(fast_blocks.VARIABLE, kind)
        edits.append(edit(graph, **changes))
    return edits


def test_propagation_computes_nothing_of_self_attention(graph, monkeypatch):
    """Not even the norm before it, which the joint pass does compute."""
    norm = graph.model.model.diffusion_model.output_blocks[9][1].transformer_blocks[0].norm1
    seen = []
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    try:
        for kind in ("own", "fast"):
            monkeypatch.setenv(fast_blocks.VARIABLE, kind)
            edit(graph, shares=(0.0, 0.0))
            seen.append(None)
    finally:
        handle.remove()
    own, fast = seen[: seen.index(None)], seen[seen.index(None) + 1 : -1]
    assert 0 < sum(fast) < sum(own)


def test_patched_transformers_keep_their_patches(graph, ran, monkeypatch):
    """An attn2 patch of IP-Adapter's kind, a replacement, and a patch between blocks of FreeU's."""
    patched, replaced = graph.model.clone(), graph.model.clone()
    patched.set_model_attn2_patch(lambda q, k, v, options: (q, k, 1.3 * v))
    patched.set_model_output_block_patch(lambda h, skip, options: (1.1 * h, 0.9 * skip))
    replaced.set_model_attn2_replace(lambda q, k, v, options: 0.5 * q, "output", 9)
    plain = edit(graph)
    for model in (patched, replaced):
        expected, found = both(graph, monkeypatch, model=model)
        assert oracles.relative_error(found, expected) < 1e-5
        assert oracles.relative_error(plain, expected) > 1e-3


def test_with_a_lora_and_a_controlnet(graph, ran, monkeypatch):
    conds = {
        "positive": with_control(graph.positive, random_controlnet("sd1"), hints(1)),
        "negative": graph.negative,
    }
    expected, found = both(graph, monkeypatch, model=lora(graph.model), **conds)
    assert oracles.relative_error(found, expected) < 1e-5
    assert ran[0] and not ran[1]


def test_hooks_and_weights_made_on_the_fly_act(graph, ran, monkeypatch):
    """On a convolution, a GroupNorm and a LayerNorm, whose forwards fast blocks leave out, and a hook on a norm."""
    plain = edit(graph)  # loads the model, which takes such functions away
    unet = graph.model.model.diffusion_model
    conv = unet.output_blocks[9][0].in_layers[2]
    norm, norm3 = unet.output_blocks[9][1].norm, unet.output_blocks[10][1].transformer_blocks[0].norm3
    hook = unet.output_blocks[11][0].out_layers[0].register_forward_hook(lambda module, args, output: 1.2 * output)
    conv.weight_function = norm.weight_function = norm3.weight_function = [lambda weight: 1.5 * weight]
    try:
        expected, found = both(graph, monkeypatch)
    finally:
        del conv.weight_function, norm.weight_function, norm3.weight_function
        hook.remove()
    assert oracles.relative_error(found, expected) < 1e-5
    assert set(ran[1]) == {unet.output_blocks[11][0]}
    assert oracles.relative_error(plain, expected) > 1e-3


def test_a_run_of_comfyui_alone_is_untouched(graph, ran):
    plain_euler(graph.model, graph.noisiest, graph.sigmas(), graph.positive, graph.negative, 3.0)
    assert not ran[0]


def layouts(graph) -> dict[str, tuple]:
    return {name: value.stride() for name, value in graph.model.model.named_parameters()}


@pytest.mark.parametrize("end", ["success", "exception", "cancel"])
def test_weights_are_in_channels_last_while_fast_blocks_run_and_never_after(graph, monkeypatch, end):
    monkeypatch.setenv(fast_blocks.VARIABLE, "fast")
    before, weights, seen = plain(graph), layouts(graph), []
    convs = [module for module in graph.model.model.diffusion_model.modules() if isinstance(module, torch.nn.Conv2d)]
    wide = [conv for conv in convs if conv.kernel_size != (1, 1)]
    hold = fast_blocks.HeldLayouts.hold
    monkeypatch.setattr(
        fast_blocks.HeldLayouts,
        "hold",
        lambda held, unet, x: (hold(held, unet, x), seen.append([not w.weight.is_contiguous() for w in wide])),
    )
    model = graph.model if end == "success" else failing(graph.model, boom if end == "exception" else cancel, at=6)
    expected = {"success": (), "exception": Boom, "cancel": comfy.model_management.InterruptProcessingException}[end]
    with pytest.raises(expected) if expected else nullcontext():
        edit(graph, model=model)
    assert max(map(sum, seen)) == len(wide) - 2  # all but the first one and the one that the injection hooks
    assert layouts(graph) == weights
    assert torch.equal(plain(graph), before)


def test_a_weight_that_somebody_replaces_meanwhile_stays(graph):
    conv = torch.nn.Conv2d(4, 4, 3)
    held, original = fast_blocks.HeldLayouts(), conv.weight.data.clone()
    held.hold(conv, torch.zeros(1, 4, 8, 8))
    assert not conv.weight.is_contiguous() and torch.equal(conv.weight, original)
    conv.weight = torch.nn.Parameter(original + 1)
    held.release()
    assert torch.equal(conv.weight, original + 1)
    held.hold(conv, torch.zeros(1, 4, 8, 8))
    held.release()
    assert conv.weight.is_contiguous() and torch.equal(conv.weight, original + 1)
