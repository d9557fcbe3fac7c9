"""What the method need not compute is not computed: counted in the UNet's own modules."""

from collections import Counter

import comfy.model_management
import pytest
import torch
from adaflow_pack.nodes.patching.families import unet_family
from adaflow_pack.nodes.patching.memory import unet_sizes
from adaflow_pack.nodes.patching.passes import EditPropagationPass
from adaflow_pack.nodes.patching.taps import _running, self_attentions
from graph import Graph, select
from models import SHAPES

STEPS, FRAMES = 3, 7


@pytest.fixture(params=SHAPES)
def counted(request):
    """A graph, and how often modules run by pass: ("attention" or ("block", number), name of the pass) -> rows."""
    graph = Graph(request.param, frames=FRAMES, steps=STEPS)
    unet, counts = graph.model.model.diffusion_model, Counter()

    def counting(what):
        def hook(module, args, output):
            counts[what, type(_running.get().step_pass).__name__] += args[0].shape[0]

        return hook

    hooks = [
        part.register_forward_hook(counting("attention"))
        for _, attn in self_attentions(unet)
        for part in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    ]
    for number, block in enumerate(unet.output_blocks):
        hooks.append(block[0].in_layers.register_forward_hook(counting(("block", number))))
    yield graph, counts
    for hook in hooks:
        hook.remove()


def test_propagation_computes_no_self_attention_and_no_keyframe_again(counted):
    graph, counts = counted
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=3)  # 3 keyframes
    counts.clear()
    graph.edit(plan, shares=(1.0, 1.0), chunk=2)
    done = dict(counts)
    conv = unet_family(graph.model, "test").conv_block
    last = len(graph.model.model.diffusion_model.output_blocks) - 1
    assert done["attention", "EditJointPass"] > 0 and done["attention", "SourceJointPass"] > 0
    assert not [key for key in done if key[0] == "attention" and "Propagation" in key[1]]
    others, keyframes = FRAMES - len(plan.clips), len(plan.clips)
    # the look at the keyframes that the joint edit node makes evaluates them once more a step
    assert done[("block", last), "EditPropagationPass"] == 2 * others * STEPS
    assert done[("block", last), "EditJointPass"] == 2 * keyframes * STEPS * 2
    assert done[("block", conv), "SourcePropagationPass"] == others * STEPS
    assert not [key for key in done if key[1] == "SourcePropagationPass" and key[0][1] > conv]


def test_past_the_injection_the_source_is_not_evaluated(counted):
    graph, counts = counted
    counts.clear()
    graph.edit(select(graph.descriptors, -1.0, -1.0, max_clip=3), shares=(0.0, 0.0), chunk=2)
    assert counts and not [key for key in counts if "Source" in key[1]]


@pytest.fixture
def edited_with(monkeypatch):
    """Edit with so many bytes free: the result, and the sizes of the batches that propagated the edit."""
    graph = Graph("sd2", frames=18, steps=STEPS)
    unet, plan = graph.model.model.diffusion_model, select(graph.descriptors, -1.0, -1.0, max_clip=9)

    def note(module, args):
        if isinstance(_running.get().step_pass, EditPropagationPass):
            batches.append(len(args[0]))

    def edited(free: int):
        def get_free_memory(device=None, torch_free_too=False):
            return (free, free) if torch_free_too else free

        batches.clear()
        monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)
        return graph.edit(plan, chunk=8), list(batches)

    batches, hook = [], unet.input_blocks[0][0].register_forward_pre_hook(note)
    yield graph, edited
    hook.remove()


def test_branches_share_a_forward_where_that_fits_by_our_estimate(edited_with):
    graph, edited = edited_with
    model = graph.model.model
    both = 16 * unet_sizes(model, unet_family(graph.model, "test"), torch.device("cpu")).frame_bytes((8, 12))
    assert model.memory_required([16, 4, 8, 12], cond_shapes={}) > 10 * both  # ComfyUI would split them
    together, batches = edited(2 * both)
    assert batches == [16, 16] * STEPS  # 16 frames are no keyframes
    apart, batches = edited(both)
    assert batches == [8, 8, 8, 8] * STEPS
    assert (together - apart).norm() < 1e-5 * apart.norm()
    assert "memory_required" not in vars(model)
