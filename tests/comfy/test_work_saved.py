"""What the method need not compute is not computed: counted in the UNet's own modules."""

from collections import Counter

import pytest
from adaflow_pack.nodes.patching.families import unet_family
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
