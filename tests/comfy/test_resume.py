"""A run that was broken off goes on after its last whole step and ends with the bits of an unbroken one."""

import gc
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management
import comfy.samplers
import pytest
import torch
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.adaflow.runs import open_run, remove_old_runs
from adaflow_pack.adaflow.storage import save_tensor
from adaflow_pack.nodes.common import resumable_run
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.patching import patch, resume
from adaflow_pack.nodes.patching.fingerprint import fingerprint, model_fingerprint, vae_fingerprint
from adaflow_pack.nodes.patching.preview import NodeText
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from broken_runs import ENDS, Boom, boom, forwards
from graph import AFRESH, Graph, select
from models import clip_latent, small_model
from small_vae import small_vae

FRAMES, STEPS = 5, 4


@pytest.fixture(scope="module")
def graph():
    with torch.inference_mode():
        yield Graph("sd1", FRAMES, steps=STEPS)


def invert(graph, resume="resume", model=None, latent=None, source=None, precision="float16", chunk=2, refine=0):
    """All that an inversion gives, as tensors."""
    latent = graph.latent if latent is None else latent
    inverted = AdaFlowDDIMInvert.execute(
        model or graph.model, source or graph.source, {"samples": latent}, STEPS, precision, chunk, resume, refine
    )
    trajectory, descriptors, noisiest = inverted.args
    levels = [trajectory.level(level) for level in range(STEPS + 1)]
    return [*levels, descriptors.maps(list(range(FRAMES))), descriptors.slice_rgb(), noisiest["samples"]]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


PER_STEP = -(-FRAMES // 2)  # forwards of an inversion step without rounds, two frames at a time


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("at", "refine"), [(1, 0), (2, 0), (4, 0), (7, 0), (8, 0), (12, 0), (4, 1), (6, 1), (7, 1), (16, 2), (34, 2)]
)
def test_an_inversion_goes_on_after_its_last_whole_step(graph, at, refine, end, caplog):
    action, error = ENDS[end]
    per_step = PER_STEP * (1 + refine)
    with forwards(graph.model) as calls:
        whole = invert(graph, AFRESH, refine=refine)
    assert len(calls) == STEPS * per_step
    with pytest.raises(error), forwards(graph.model, at, action):
        invert(graph, AFRESH, refine=refine)
    done = (at - 1) // per_step
    with forwards(graph.model) as calls, caplog.at_level(logging.INFO):
        assert same(invert(graph, refine=refine), whole)
    assert len(calls) == (STEPS - done) * per_step  # the broken step is all that was done twice
    assert (f"resumed after step {done} of {STEPS}" in caplog.text) == (done > 0)


def test_an_inversion_that_breaks_again_and_again_ends_the_same(graph):
    whole = invert(graph, AFRESH)
    gc.collect()
    with pytest.raises(Boom), forwards(graph.model, 5, boom):
        invert(graph, AFRESH)
    for _ in range(2):
        with pytest.raises(Boom), forwards(graph.model, 4, boom):
            invert(graph)
    assert same(invert(graph), whole)


def test_a_finished_inversion_is_read_and_a_switch_does_it_again(graph):
    whole = invert(graph, AFRESH)
    with forwards(graph.model) as calls:
        assert same(invert(graph), whole)
        assert not calls
        assert same(invert(graph, AFRESH), whole)
        assert len(calls) == STEPS * PER_STEP


def test_cancel_stops_the_check_of_an_earlier_run(comfy_folders):
    folder = comfy_folders / "output" / "adaflow_runs"
    run = open_run(folder, "edit", {})
    save_tensor(run.path("x"), torch.zeros(10), torch.float32)
    run.commit(["x"], [], step=1)
    run.close()
    arguments = ("edit", {}, 0, "AdaFlowTokenPropagate", "resume", NodeText("AdaFlowTokenPropagate"))
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        resumable_run(*arguments)
    assert resumable_run(*arguments).progress == {"step": 1}


def lora(model, strength):
    """A clone with one weight changed by a patch, as a LoRA does."""
    clone = model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    shape = clone.model_state_dict()[key].shape
    clone.add_patches({key: (torch.ones(shape),)}, strength)
    return clone


def with_patch(model, strength):
    """A clone with a patch that closes over a number, as FreeU does."""
    clone = model.clone()
    clone.set_model_output_block_patch(lambda h, skip, options: (h * strength, skip))
    return clone


def own_clip():
    """A clip that nothing else here inverts."""
    return clip_latent(FRAMES, seed=5)


def clip_with_one_other_value():
    latent = own_clip()
    latent[FRAMES - 2, 3, 7, 11] += 1e-3
    return latent


OTHERS = {
    "the model again": (lambda g: {"model": small_model("sd1", 0)}, True),
    "another checkpoint": (lambda g: {"model": small_model("sd1", 1)}, False),
    "a LoRA": (lambda g: {"model": lora(g.model, 0.5)}, False),
    "another patch": (lambda g: {"model": with_patch(g.model, 1.01)}, False),
    "another clip": (lambda g: {"latent": clip_with_one_other_value()}, False),
    "another prompt": (lambda g: {"source": g.positive}, False),
    "float32": (lambda g: {"precision": "float32"}, False),
    "a larger chunk": (lambda g: {"chunk": 3}, True),
    "a smaller chunk": (lambda g: {"chunk": 1}, True),
}


@pytest.mark.parametrize("change", OTHERS)
def test_only_the_same_inputs_go_on(graph, change, comfy_folders):
    make, goes_on = OTHERS[change]
    changes = make(graph)
    remove_old_runs(comfy_folders / "output" / "adaflow_runs", max_age=-1.0)
    with pytest.raises(Boom), forwards(graph.model, 2 * PER_STEP + 1, boom):
        invert(graph, latent=own_clip())
    with forwards(changes.get("model", graph.model)) as calls:
        invert(graph, **{"latent": own_clip(), **changes})
    assert len(calls) == (STEPS - 2 * goes_on) * -(-FRAMES // min(changes.get("chunk", 2), 2))


@pytest.mark.parametrize("strength", [0.4, 0.6])
def test_a_patched_model_is_the_same_one_tomorrow(graph, strength):
    """Fingerprints hold for equal patches made anew, and while the patches are loaded into the weights."""
    first = model_fingerprint(lora(with_patch(graph.model, strength), 0.5))
    again = lora(with_patch(small_model("sd1", 0), strength), 0.5)
    assert model_fingerprint(again) == first
    comfy.model_management.load_models_gpu([again])
    assert model_fingerprint(again) == first
    assert len({first, *(model_fingerprint(lora(with_patch(graph.model, strength), s)) for s in (0.49, 0.51))}) == 3


def patch_of(source):
    """The function ``patch`` of a pack's file, as it is when the pack is loaded."""
    names = {"__name__": "pack", "torch": torch}
    exec(source, names)
    return names["patch"]


WRITTEN = [
    "def patch(x): return torch.sin(x)",
    "def patch(x): return torch.cos(x)",
    "def patch(x): return (lambda h: h * 2)(x)",
    "def patch(x): return (lambda h: h * 3)(x)",
    "def patch(x): return (lambda h: torch.sin(h))(x)",
    "def patch(x): return (lambda h: torch.cos(h))(x)",
    "def patch(x): return x.sum((0, 1))",
    "def patch(x): return x.sum((0, 2))",
    "def patch(x): return x in {1, 2}",
    "def patch(x): return x in {1, 3}",
    "def make(by):\n  return lambda x: x * by()\npatch = make(lambda: 2)",
    "def make(by):\n  return lambda x: x * by()\npatch = make(lambda: 3)",
    "class Patch:\n  def __call__(self, x): return self.act(x)\n  def act(self, x): return x * 2\npatch = Patch()",
    "class Patch:\n  def __call__(self, x): return self.act(x)\n  def act(self, x): return x * 3\npatch = Patch()",
    "class Patch:\n  @staticmethod\n  def act(x): return x * 2\nclass Own(Patch): pass\npatch = Own()",
    "class Patch:\n  @staticmethod\n  def act(x): return x * 3\nclass Own(Patch): pass\npatch = Own()",
    "class Patch(torch.nn.Module):\n  def forward(self, x): return x * 2\npatch = Patch()",
    "class Patch(torch.nn.Module):\n  def forward(self, x): return x * 3\npatch = Patch()",
]


def test_a_pack_whose_code_changed_is_another_one():
    prints = [fingerprint([patch_of(source)]) for source in WRITTEN]
    assert len(set(prints)) == len(WRITTEN)
    moved = [fingerprint([patch_of("\n\n" + source)]) for source in WRITTEN]  # other lines do nothing
    assert moved == prints


def test_what_pytorch_puts_on_its_own_classes_changes_no_fingerprint(monkeypatch):
    """torch.compile replaces nn.Module's functions: a save would not be resumed by a process that compiled nothing."""
    vae, own = small_vae(), torch.nn.Module.__init__
    before = vae_fingerprint(vae)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self, *args, **kwargs: own(self, *args, **kwargs))
    assert vae_fingerprint(vae) == before


def propagate(edit, resume="resume"):
    return AdaFlowTokenPropagate.execute(edit, True, 2, resume).args[0]["samples"]


SAMPLERS = ["ddim", "heun", "dpm_2", "lms", "dpmpp_2m", "uni_pc", "deis", "gradient_estimation", "euler_cfg_pp"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_goes_on_after_its_last_whole_step(graph, sampler, caplog):
    _, edit = graph.joint(sampler=sampler)
    with forwards(graph.model) as calls:
        whole = propagate(edit, AFRESH)
    total = len(calls)
    for share in (0.3, 0.8):
        at = int(share * total)
        with pytest.raises(Boom), forwards(graph.model, at, boom):
            propagate(edit, AFRESH)
        caplog.clear()
        with forwards(graph.model) as calls, caplog.at_level(logging.INFO):
            assert torch.equal(propagate(edit), whole)
        assert len(calls) <= total - at + 1 + total // STEPS  # at most one step was done twice
        assert "resumed after step" in caplog.text
    with forwards(graph.model) as calls:
        assert torch.equal(propagate(edit), whole)
        assert not calls


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("in_ram", [True, False])
def test_an_edit_goes_on_with_its_latents_where_they_were(graph, sampler, in_ram, monkeypatch):
    """In RAM or on the device, whichever is better by now: a sampler's arithmetic differs there in its last bits."""
    where, announce = [], patch.EditPatch._announce

    def noting(edit_patch, guider, sigmas, noise, unet, text, in_ram, masked):
        where.append(in_ram)
        return announce(edit_patch, guider, sigmas, noise, unet, text, in_ram, masked)

    monkeypatch.setattr(patch.EditPatch, "_announce", noting)
    _, edit = graph.joint(sampler=sampler)
    with forwards(graph.model) as calls:
        propagate(edit, AFRESH)
    monkeypatch.setattr(patch, "_better_in_ram", lambda *_: in_ram)
    with pytest.raises(Boom), forwards(graph.model, len(calls) // 2, boom):
        propagate(edit, AFRESH)
    monkeypatch.setattr(patch, "_better_in_ram", lambda *_: not in_ram)
    propagate(edit)
    propagate(edit, AFRESH)
    assert where[-3:] == [in_ram, in_ram, not in_ram]


def test_a_sampler_that_cannot_go_on_starts_afresh_and_says_so(graph, caplog):
    _, edit = graph.joint(sampler="res_multistep_cfg_pp")
    said = "AdaFlowTokenPropagate: an edit with res_multistep_cfg_pp cannot be resumed"
    with pytest.raises(Boom), forwards(graph.model, 9, boom), caplog.at_level(logging.INFO):
        propagate(edit, AFRESH)
    assert said in caplog.text  # before it is broken off
    caplog.clear()
    with caplog.at_level(logging.INFO):
        resumed = propagate(edit)
    assert said in caplog.text
    assert torch.equal(resumed, propagate(edit, AFRESH))


def test_a_sampler_that_calls_the_model_as_often_as_it_likes_leaves_nothing_on_the_disk(graph, caplog, comfy_folders):
    _, whole = graph.joint()
    edit = replace(whole, sampler_name="dpm_adaptive")
    before = set((comfy_folders / "output").rglob("*.safetensors"))
    for resume_or_not in (AFRESH, "resume"):
        with pytest.raises(Boom), forwards(graph.model, 20, boom), caplog.at_level(logging.INFO):
            propagate(edit, resume_or_not)
    assert caplog.text.count("an edit with dpm_adaptive cannot be resumed") == 2
    assert "resumed after" not in caplog.text
    assert set((comfy_folders / "output").rglob("*.safetensors")) == before


def test_a_sampler_that_calls_more_often_than_was_counted_goes_on_with_what_was_noted(graph, monkeypatch):
    """As another pack's may, that looks at the latent; the disk takes no more than was said."""
    monkeypatch.setattr(resume, "calls_of", lambda *_: 3)
    _, edit = graph.joint(sampler="heun")
    whole = propagate(edit, AFRESH)
    with forwards(graph.model) as calls:
        propagate(edit, AFRESH)
    at = len(calls)
    with pytest.raises(Boom), forwards(graph.model, at, boom):
        propagate(edit, AFRESH)
    with forwards(graph.model) as calls:
        assert torch.equal(propagate(edit), whole)
    assert at / 4 < len(calls) < at


def test_a_sampler_whose_calls_cannot_be_counted_cannot_go_on(monkeypatch):
    def wants_a_true_model(model, *_, **__):
        return model.inner_model.inner_model.model_sampling

    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda _: comfy.samplers.KSAMPLER(wants_a_true_model))
    assert not resume.is_resumable("another pack's", STEPS)


@pytest.mark.parametrize(
    "changes", [{"cfg": 3.5}, {"shares": (0.5, 0.8)}, {"scheduler": "normal"}, {"steps": STEPS - 1}, {"plan": 1}]
)
def test_another_edit_starts_afresh(graph, changes):
    _, edit = graph.joint()
    with pytest.raises(Boom), forwards(graph.model, 9, boom):
        propagate(edit, AFRESH)
    if "plan" in changes:
        changes = {"plan": select(graph.descriptors, seed=1)}
    _, other = graph.joint(**changes)
    assert not torch.equal(propagate(other), propagate(edit))
    assert torch.equal(propagate(other), propagate(other, AFRESH))


def test_the_preview_of_the_keyframes_goes_on(graph):
    whole, _ = graph.joint()
    with pytest.raises(Boom), forwards(graph.model, 5, boom):
        graph.joint()
    with forwards(graph.model) as calls:
        assert torch.equal(graph.joint(resume="resume")[0], whole)
    assert len(calls) < 2 * STEPS


def test_a_finished_edit_is_read_though_nothing_is_free(graph, monkeypatch):
    _, edit = graph.joint()
    whole = propagate(edit, AFRESH)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with forwards(graph.model) as calls:
        assert torch.equal(propagate(edit), whole)
    assert not calls
    with pytest.raises(InputError, match="free"):
        propagate(edit, AFRESH)
