"""The compile switch: same results, nothing left behind, and going on without it where it cannot.

All but one test use torch.compile's backend ``eager``, which traces and generates no code; all but one compile the last
blocks of the decoder only, since tracing takes its time.
"""

import gc
import shutil
from dataclasses import replace

import comfy.model_management
import oracles
import pytest
import torch
from adaflow_pack.nodes.patching import compiled, fast_blocks, patch
from graph import Graph, plain_euler, select
from models import SD2_FULL, clip_latent, random_model
from test_clean_up import Boom, cancel, failing, failing_attention, leftovers
from test_conditioning import hints, out_of_memory_above, random_controlnet, with_control
from torch._dynamo.utils import counters


@pytest.fixture(scope="module")
def graph():
    with torch.inference_mode():
        yield Graph("sd2", frames=6, steps=2)


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    counters.clear()


@pytest.fixture
def blocks(monkeypatch):
    """The blocks that ran compiled."""
    ran, run = [], compiled.BlockCompiler.run

    def counting(self, block, *args):
        out = run(self, block, *args)
        if not self.failed:
            ran.append(block)
        return out

    monkeypatch.setattr(compiled.BlockCompiler, "run", counting)
    return ran


def kinds(blocks) -> set[str]:
    return {type(block).__name__ for block in blocks}


def plan(graph):
    return select(graph.descriptors, -1.0, -1.0, max_clip=3)


@pytest.fixture
def few_blocks(graph, monkeypatch):
    """Compile the decoder's last ones only."""
    last = set(graph.model.model.diffusion_model.output_blocks[9:].modules())
    takes = compiled.BlockCompiler.takes
    monkeypatch.setattr(
        compiled.BlockCompiler, "takes", lambda self, block, args: block in last and takes(self, block, args)
    )
    return last


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_compiled_equals_plain(shape, blocks):
    """With a last chunk that is shorter than the others, and no graph for it alone."""
    graph = Graph(shape, frames=7, steps=2)
    expected = graph.edit(plan(graph), chunk=3, interpolation=True)
    found = graph.edit(plan(graph), chunk=3, interpolation=True, compile=True)
    assert oracles.relative_error(found, expected) < 1e-5
    assert kinds(blocks) == {"ResBlock", "SpatialTransformer"}
    every = [
        name for name, part in graph.model.model.diffusion_model.named_modules() if type(part) in map(type, blocks)
    ]
    assert len(set(blocks)) == len(every) - 1  # all but the one whose feature is injected
    assert counters["stats"]["unique_graphs"] <= len(every)  # not one for each step, chunk and pass


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_generated_code_equals_plain(graph, blocks, few_blocks, monkeypatch):
    """The real compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    few_blocks -= set(graph.model.model.diffusion_model.output_blocks[9].modules())
    expected = graph.edit(plan(graph), chunk=2)
    assert oracles.relative_error(graph.edit(plan(graph), chunk=2, compile=True), expected) < 1e-5
    assert kinds(blocks) == {"ResBlock", "SpatialTransformer"}


def test_with_a_controlnet(graph, blocks, few_blocks):
    control, hint = random_controlnet("sd1"), hints(1)
    conds = {"positive": with_control(graph.positive, control, hint), "negative": graph.negative}
    expected = graph.edit(plan(graph), chunk=2, **conds)
    assert oracles.relative_error(expected, graph.edit(plan(graph), chunk=2)) > 1e-3
    assert oracles.relative_error(graph.edit(plan(graph), chunk=2, compile=True, **conds), expected) < 1e-5
    assert blocks


def lora(model, scale=0.3):
    """MODEL with a LoRA of every convolution and projection of its transformers, in ComfyUI's own way."""
    generator = torch.Generator().manual_seed(11)
    model, patches = model.clone(), {}
    for name, weight in model.model.named_parameters():
        if name.endswith("weight") and weight.ndim == 2 and "transformer_blocks" in name:
            patches[name] = (scale * weight.std() * torch.randn(weight.shape, generator=generator),)
    assert len(model.add_patches(patches)) == len(patches) > 0
    return model


def test_with_a_lora(graph, blocks, few_blocks):
    """Patched into the weights; the plain model's are back afterwards."""
    before = {name: value.clone() for name, value in graph.model.model.state_dict().items()}
    expected = graph.edit(plan(graph), chunk=2, model=lora(graph.model))
    assert oracles.relative_error(expected, graph.edit(plan(graph), chunk=2)) > 1e-3
    found = graph.edit(plan(graph), chunk=2, model=lora(graph.model), compile=True)
    assert oracles.relative_error(found, expected) < 1e-5
    assert (
        oracles.relative_error(graph.edit(plan(graph), chunk=2, compile=True), graph.edit(plan(graph), chunk=2)) < 1e-5
    )
    assert all(torch.equal(value, before[name]) for name, value in graph.model.model.state_dict().items())
    assert blocks


def test_blocks_whose_weights_are_made_on_the_fly_run_as_they_are(graph, blocks, few_blocks):
    """So ComfyUI applies a LoRA where it keeps weights in RAM."""
    unet = graph.model.model.diffusion_model
    ff = unet.output_blocks[9][1].transformer_blocks[0].ff.net[2]
    ff.weight_function = [lambda weight: 1.5 * weight]
    try:
        expected = graph.edit(plan(graph), chunk=2)
        found = graph.edit(plan(graph), chunk=2, compile=True)
    finally:
        del ff.weight_function
    assert oracles.relative_error(found, expected) < 1e-5
    assert oracles.relative_error(graph.edit(plan(graph), chunk=2), expected) > 1e-3
    assert unet.output_blocks[9][0] in blocks and unet.output_blocks[9][1] not in blocks


def test_patched_transformers_run_as_they_are(graph, blocks, few_blocks):
    """An attn2 patch of IP-Adapter's kind, and a patch between blocks of FreeU's."""
    model = graph.model.clone()
    model.set_model_attn2_patch(lambda q, k, v, options: (q, k, 1.3 * v))
    model.set_model_output_block_patch(lambda h, skip, options: (1.1 * h, 0.9 * skip))
    expected = graph.edit(plan(graph), chunk=2, model=model)
    assert oracles.relative_error(graph.edit(plan(graph), chunk=2, model=model, compile=True), expected) < 1e-5
    assert kinds(blocks) == {"ResBlock"}


def test_it_goes_on_without_a_compiler(graph, blocks, few_blocks, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no C compiler was found")

    held = graph_modules()
    monkeypatch.setattr(compiled, "BACKEND", broken)
    caplog.set_level("INFO")
    expected = graph.edit(plan(graph), chunk=2)
    assert oracles.relative_error(graph.edit(plan(graph), chunk=2, compile=True), expected) < 1e-5
    assert not blocks
    said = [record.getMessage() for record in caplog.records if "runs uncompiled" in record.getMessage()]
    assert len(said) == 1 and "no C compiler was found" in said[0]
    assert not leftovers(graph.model) and graph_modules() == held


def test_out_of_memory_halves_the_chunk(graph, blocks, few_blocks):
    model = out_of_memory_above(graph.model, 2)
    expected = graph.edit(plan(graph), chunk=2)
    assert oracles.relative_error(graph.edit(plan(graph), chunk=4, model=model, compile=True), expected) < 1e-5
    assert blocks


def test_nothing_is_compiled_where_blocks_run_fast(graph, blocks, monkeypatch):
    told = []
    monkeypatch.setattr(patch.NodeText, "put", lambda text, key, line: told.append((key, line)))
    monkeypatch.setenv(fast_blocks.VARIABLE, "fast")
    expected = graph.edit(plan(graph), chunk=2)
    assert "compile" not in dict(told)
    assert torch.equal(graph.edit(plan(graph), chunk=2, compile=True), expected)
    assert not blocks and "own kernels" in dict(told)["compile"]


def graph_modules() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.fx.GraphModule) for thing in gc.get_objects())


@pytest.mark.parametrize("end", ["success", "exception", "exception deep inside", "cancel"])
def test_nothing_is_left_behind(graph, end, blocks, few_blocks):
    def plain():
        return plain_euler(graph.model, graph.noisiest, graph.sigmas(), graph.positive, graph.negative, 3.0)

    def boom():
        raise Boom

    before, held = plain(), graph_modules()
    strides = {name: value.stride() for name, value in graph.model.model.state_dict().items()}
    run = {"plan": plan(graph), "chunk": 2, "compile": True, "shares": (0.0, 0.0)}
    if end == "success":
        graph.edit(**run)
    elif end == "cancel":
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            graph.edit(model=failing(graph.model, cancel, at=7), **run)
    elif end == "exception":
        with pytest.raises(Boom):
            graph.edit(model=failing(graph.model, boom, at=8), **run)
    else:
        with pytest.raises(Boom):
            graph.edit(model=failing_attention(graph.model, at=7), **run)
    assert blocks
    blocks.clear()
    assert not leftovers(graph.model)
    assert torch.equal(plain(), before)
    assert {name: value.stride() for name, value in graph.model.model.state_dict().items()} == strides
    assert graph_modules() == held


def test_an_edit_begun_plain_goes_on_compiled(graph):
    _, edit = graph.joint(plan(graph))
    identities = [edit.identity(replace(edit.settings, compile=on), (0, 1)) for on in (False, True)]
    assert identities[0] == identities[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_generated_code_equals_plain_on_a_gpu_at_full_size(blocks, monkeypatch):
    """SD 2.1's size in half precision, every block, and no memory of the GPU kept."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv(fast_blocks.VARIABLE, "own")
    source = [[torch.randn(1, 77, 1024), {}]]
    graph = Graph("sd2", latent=clip_latent(40, (48, 84)), steps=1, model=full_size_model(), source=source)
    clips = select(graph.descriptors, -1.0, -1.0, max_clip=8, mode="fixed")

    def step(**changes):
        model = graph.patch(clips, graph.slim(3), (1.0, 1.0), chunk=16, **changes)
        sigmas = [graph.trajectory.sigmas[-1], 0.0]
        return plain_euler(model, graph.latent, sigmas, source, [[source[0][0].flip(1), {}]], 7.5)

    plain = step()
    gc.collect()
    held = torch.cuda.memory_allocated()
    found = oracles.relative_error(step(compile=True), plain)
    print(f"compiled against plain, float16: {found:.1e}")
    assert kinds(blocks) == {"ResBlock", "SpatialTransformer"}
    assert found < 1e-2
    blocks.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() <= held + 2**20


def full_size_model():
    model = random_model(SD2_FULL, "eps", 0, torch.float16, draw_on="cuda")
    model.model.diffusion_model.out[-1].weight.mul_(0.5)
    return model
