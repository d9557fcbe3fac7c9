"""Nothing is left behind, whatever happens in between: a plain run on the same MODEL gives the same bits as before."""

import gc

import comfy.model_management
import pytest
import torch
from adaflow_pack.adaflow.runs import remove_old_runs
from adaflow_pack.nodes.descriptors import AdaFlowExtractDescriptors
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.patching.taps import _running, self_attentions
from comfy.patcher_extension import WrappersMP
from graph import AFRESH, Graph, plain_euler, select


class Boom(Exception):
    """A failure inside somebody's patch."""


@pytest.fixture(scope="module")
def graph():
    with torch.inference_mode():
        yield Graph("sd1", frames=5, steps=3)


def plain(graph):
    return plain_euler(graph.model, graph.noisiest, graph.sigmas(), graph.positive, graph.negative, 3.0)


def leftovers(model):
    """Everything of ours that could still hang on a MODEL or its UNet."""
    unet = model.model.diffusion_model
    found = [name for name, module in unet.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    found += [name for name, module in unet.named_modules() if "forward" in vars(module)]
    found += [name for name in vars(model.model) if name == "memory_required"]
    found += [key for wrappers in model.wrappers.values() for key in wrappers]
    found += [key for key in model.model_options["transformer_options"] if "adaflow" in key]
    found += [] if _running.get() is None else ["a running call"]
    return found


def failing(model, action, at: int, kind=WrappersMP.DIFFUSION_MODEL):
    """A clone that runs ``action`` in its ``at``-th forward."""
    calls = iter(range(1, 10**6))

    def wrapper(executor, *args, **kwargs):
        if next(calls) == at:
            action()
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(kind, "test", wrapper)
    return clone


def failing_attention(model, at: int):
    """A clone whose ``at``-th cross-attention raises, deep inside the UNet."""
    calls = iter(range(1, 10**6))

    def attn2(q, k, v, options):
        if next(calls) == at:
            raise Boom
        return q

    clone = model.clone()
    clone.set_model_attn2_replace(attn2, "output", 5)
    return clone


def cancel():
    comfy.model_management.interrupt_current_processing(True)


STAGES = {
    "invert": lambda g, m: AdaFlowDDIMInvert.execute(m, g.source, {"samples": g.latent}, 3, chunk=2, resume=AFRESH),
    "a round of the inversion": lambda g, m: AdaFlowDDIMInvert.execute(
        m, g.source, {"samples": g.latent}, 3, resume=AFRESH, refine=3
    ),
    "descriptors": lambda g, m: AdaFlowExtractDescriptors.execute(m, {"samples": g.latent}, 0, 4, -1, 0, chunk=1),
    "joint edit": lambda g, m: g.joint(model=m),
    "propagation": lambda g, m: g.edit(model=m, chunk=1),
    "patched model": lambda g, m: plain_euler(
        g.patch(model=m, chunk=2), g.latent, g.sigmas(), g.positive, g.negative, 3.0
    ),
    "slim attention": lambda g, m: plain_euler(g.slim(2, model=m), g.noisiest, g.sigmas(), g.positive, g.negative, 3.0),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("end", ["success", "exception", "exception deep inside", "cancel"])
def test_nothing_is_left_behind(graph, stage, end, comfy_folders):
    runs = comfy_folders / "output" / "adaflow_runs"
    gc.collect()  # what other tests left lets go of its runs
    remove_old_runs(runs, max_age=-1.0)
    before, files = plain(graph), set(comfy_folders.rglob("*.partial"))
    stored = set(comfy_folders.rglob("*.safetensors"))
    if end == "success":
        STAGES[stage](graph, graph.model)
    elif end == "cancel":
        if stage == "slim attention":
            pytest.skip("the chunks of a plain sampler are the sampler's own: ComfyUI checks for Cancel itself")
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            STAGES[stage](graph, failing(graph.model, cancel, at=3))
    elif end == "exception":

        def boom():
            raise Boom

        with pytest.raises(Boom):
            STAGES[stage](graph, failing(graph.model, boom, at=2))
    else:
        if stage == "descriptors":
            pytest.skip("its forward stops before the block whose patch fails")
        with pytest.raises(Boom):
            STAGES[stage](graph, failing_attention(graph.model, at=2))
    assert not leftovers(graph.model)
    assert torch.equal(plain(graph), before)
    gc.collect()
    assert set(comfy_folders.rglob("*.partial")) == files
    remove_old_runs(runs, max_age=-1.0)  # what a run could go on with lies there, and is in nobody's use
    assert set(comfy_folders.rglob("*.safetensors")) == stored  # nothing refers to what the stage made


def test_hooks_are_held_only_during_an_evaluation(graph):
    states = []

    def callback(*_):
        states.append(leftovers(graph.model))

    model = failing(graph.patch(), callback, at=10**9)
    model.add_wrapper_with_key(
        WrappersMP.PREDICT_NOISE, "test", lambda executor, *a, **k: (callback(), executor(*a, **k))[1]
    )
    plain_euler(model, graph.latent, graph.sigmas(), graph.positive, graph.negative, 3.0)
    assert len(states) == 3 and not any(states)


def test_another_packs_forward_is_put_back(graph):
    """A forward that somebody hung on an attention stands there again afterwards."""
    _, attn = next(self_attentions(graph.model.model.diffusion_model))
    original, calls = attn.forward, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    attn.forward = theirs
    try:
        graph.edit()
        assert vars(attn)["forward"] is theirs
        assert not calls  # the method computes this layer itself
        plain(graph)
        assert calls
    finally:
        del attn.forward


def test_the_callers_model_is_not_the_patched_one(graph):
    for patched in (graph.patch(), graph.slim(2)):
        assert patched is not graph.model
        assert patched.model is graph.model.model
        assert not leftovers(graph.model)


def test_nodes_wired_twice_act_once(graph):
    once = plain_euler(graph.patch(), graph.latent, graph.sigmas(), graph.positive, graph.negative, 3.0)
    again = graph.patch(model=graph.patch())
    assert torch.equal(plain_euler(again, graph.latent, graph.sigmas(), graph.positive, graph.negative, 3.0), once)


def tensor_bytes():
    return sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)


def test_memory_returns_to_where_it_was(graph):
    graph.edit()
    gc.collect()
    before = tensor_bytes()
    for _ in range(2):
        graph.edit(select(graph.descriptors))
    gc.collect()
    assert tensor_bytes() <= before + 4096
