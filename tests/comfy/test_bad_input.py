"""Bad input is refused at the node, in words that name the node, the input, what came and what was expected."""

import pytest
import torch
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.adaflow.runs import open_run
from adaflow_pack.adaflow.storage import save_tensor
from adaflow_pack.nodes.descriptors import AdaFlowExtractDescriptors
from adaflow_pack.nodes.encode_video import AdaFlowEncodeVideo
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.patching.preview import NodeText
from adaflow_pack.nodes.save_video import AdaFlowSaveVideo
from adaflow_pack.nodes.slim import AdaFlowSlimAttention
from graph import Graph, plain_euler, select
from models import clip_latent, small_model


@pytest.fixture(scope="module")
def graph():
    with torch.inference_mode():
        yield Graph("sd1", frames=4, steps=2)


@pytest.fixture(scope="module")
def other():
    """The same length, another clip."""
    with torch.inference_mode():
        yield Graph("sd1", frames=4, steps=2, latent=clip_latent(4, seed=9))


@pytest.fixture(scope="module")
def sdxl():
    with torch.inference_mode():
        yield Graph("sdxl", frames=4, steps=2)


def refuses(node, name, *facts):
    """The error names the node, the input and these facts."""
    pattern = rf"(?s){node}: input '{name}' is .*" + ".*".join(str(fact) for fact in facts)
    return pytest.raises(InputError, match=pattern)


def dit():
    """A diffusion transformer in a ModelPatcher, as SD3 loads."""
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
    import comfy.supported_models

    config = comfy.supported_models.SD3({"in_channels": 16, "depth": 2, "patch_size": 2, "input_size": None,
        "adm_in_channels": 32, "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24,
        "out_features": 128}}, "num_patches": 64, "pos_embed_max_size": 8, "dtype": torch.float32})  # fmt: skip
    model = config.get_model({}, device="cpu")
    assert isinstance(model.diffusion_model, mmdit.MMDiT)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def test_a_transformer_where_a_unet_is_needed(graph):
    model = dit()
    with refuses("AdaFlowDDIMInvert", "model", "not a UNet", "Stable Diffusion 1.x"):
        AdaFlowDDIMInvert.execute(model, graph.source, {"samples": graph.latent}, 2)
    with refuses("AdaFlowSlimAttention", "model", "not a UNet"):
        AdaFlowSlimAttention.execute(model, 4)
    with refuses("AdaFlowPatchModel", "model", "not a UNet"):
        graph.patch(model=model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_latents(graph, value, comfy_folders):
    bad = graph.latent.clone()
    bad[2, 0, 0, 0] = value
    files = set(comfy_folders.rglob("*"))
    with refuses("AdaFlowDDIMInvert", "latent", "not finite", "1 frame,", "first is 2", "fp32-vae"):
        AdaFlowDDIMInvert.execute(graph.model, graph.source, {"samples": bad}, 2)
    with refuses("AdaFlowExtractDescriptors", "latent", "not finite"):
        AdaFlowExtractDescriptors.execute(graph.model, {"samples": bad}, 0, 1, -1, 0)
    assert set(comfy_folders.rglob("*")) == files


def test_nan_predictions_name_the_step(graph, comfy_folders):
    model = graph.model.clone()
    model.set_model_output_block_patch(lambda h, skip, options: (h * float("nan"), skip))
    with pytest.raises(RuntimeError, match=r"AdaFlowDDIMInvert.*inversion step 1 of 2.*half precision"):
        AdaFlowDDIMInvert.execute(model, graph.source, {"samples": graph.latent}, 2)
    with pytest.raises(RuntimeError, match=r"not finite.*step 1 of 2.*half precision"):
        graph.joint(model=model)
    assert not list(comfy_folders.rglob("*.partial"))


@pytest.mark.parametrize("shape", [(4, 16, 8, 12), (0, 4, 8, 12), (4, 8, 12), (4, 4, 2, 8, 12)])
def test_latents_of_another_kind(graph, shape):
    with refuses("AdaFlowDDIMInvert", "latent"):
        AdaFlowDDIMInvert.execute(graph.model, graph.source, {"samples": torch.zeros(shape)}, 2)


def test_an_empty_source_prompt(graph):
    with refuses("AdaFlowDDIMInvert", "source", "empty"):
        AdaFlowDDIMInvert.execute(graph.model, [], {"samples": graph.latent}, 2)


@pytest.mark.parametrize("changes", [{"mean": 1.5}, {"window": -2.0}, {"max_clip": 0}])
def test_thresholds_out_of_range(graph, changes):
    with refuses("AdaFlowKeyframeSelect", r"\w+", next(iter(changes.values()))):
        select(graph.descriptors, **changes)


@pytest.mark.parametrize("schedule", ["", "0,9", "0,1,2", "a", "0;-1"])
def test_schedules_that_do_not_fit(graph, schedule):
    with refuses("AdaFlowKeyframeSelect", "schedule"):
        select(graph.descriptors, -1.0, -1.0, max_clip=2, mode="schedule", schedule=schedule)


def test_a_budget_below_one_frame(graph):
    with refuses("AdaFlowSlimAttention", "kv_budget", 0, "at least 1"):
        graph.slim(0)


@pytest.mark.parametrize("shares", [(-0.1, 0.5), (0.5, 1.2), (float("nan"), 0.5)])
def test_shares_out_of_range(graph, shares):
    for run in (lambda: graph.patch(shares=shares), lambda: graph.joint(shares=shares)):
        with refuses(r"\w+", r"(feature|attention)_share", "from 0 to 1"):
            run()


@pytest.mark.parametrize("steps", [0, 3, 50])
def test_steps_that_the_trajectory_does_not_hold(graph, steps):
    from adaflow_pack.nodes.joint_edit import AdaFlowJointKeyframeEdit

    with refuses("AdaFlowJointKeyframeEdit", "steps", steps, "1 to 2", "invert with more steps"):
        AdaFlowJointKeyframeEdit.execute(
            graph.model, graph.positive, graph.negative, graph.trajectory, select(graph.descriptors), steps, 3.0,
            "ddim", "ddim_uniform", 0, 0.8, 0.8,
        )  # fmt: skip
    sigmas = torch.linspace(10, 0, 4)
    with refuses("AdaFlowPatchModel", "steps", 3, "at most 2"):
        plain_euler(graph.patch(), graph.latent, sigmas, graph.positive, graph.negative, 3.0)


def test_a_trajectory_of_another_model(graph, sdxl):
    with refuses("AdaFlowJointKeyframeEdit", "trajectory", "SD 1.x", "SDXL", "Invert the clip again"):
        graph.joint(model=sdxl.model, plan=select(graph.descriptors))
    with refuses("AdaFlowPatchModel", "trajectory", "SDXL", "SD 1.x"):
        sdxl.patch(select(sdxl.descriptors), model=graph.model)
    with refuses("AdaFlowPatchModel", "trajectory", "EPS", "V_PREDICTION"):
        graph.patch(model=small_model("sd2-v"))


def test_a_plan_of_another_length_or_clip(graph, other):
    longer = Graph("sd1", frames=5, steps=2)
    with refuses("AdaFlowJointKeyframeEdit", "plan", "5 frames", "4 frames"):
        graph.joint(select(longer.descriptors))
    v = Graph("sd2-v", frames=4, steps=2, latent=graph.latent)
    with refuses("AdaFlowPatchModel", "plan", "V_PREDICTION", "EPS"):
        graph.patch(select(v.descriptors))
    with refuses("AdaFlowPatchModel", "plan", "another clip"):
        graph.patch(select(other.descriptors))


@pytest.mark.parametrize("latent", [clip_latent(3), clip_latent(4, (8, 8)), clip_latent(5)])
def test_a_latent_that_is_not_the_inverted_clip(graph, latent):
    with refuses("AdaFlowPatchModel", "latent", f"{latent.shape[0]} frames", "4 frames of 4x8x12"):
        plain_euler(graph.patch(), latent, graph.sigmas(), graph.positive, graph.negative, 3.0)


def test_a_plan_that_does_not_fit_the_batch_of_slim_attention(graph):
    model = graph.slim(2, select(graph.descriptors))
    with refuses("AdaFlowSlimAttention", "plan", "4 frames", "3 frames"):
        plain_euler(model, graph.noisiest[:3], graph.sigmas(), graph.positive, graph.negative, 3.0)


def test_a_token_merging_patch_is_named(graph):
    """ToMe and its kind change the number of tokens under our feet."""
    model = graph.model.clone()
    model.set_model_attn1_patch(lambda n, context, value, options: (n[:, ::3], context[:, ::3], value[:, ::3]))
    with pytest.raises(RuntimeError, match="ToMe"):
        graph.joint(model=model)


def test_a_block_number_the_model_has_not(sdxl):
    with refuses("AdaFlowExtractDescriptors", "block", 9, "0 to 8"):
        AdaFlowExtractDescriptors.execute(sdxl.model, {"samples": sdxl.latent}, 0, 1, 9, 0)


def test_no_room_on_the_disk(graph, monkeypatch, comfy_folders):
    """The size is known before work starts, and what removing older runs could free."""
    from adaflow_pack.nodes import common

    older = open_run(comfy_folders / "output" / "adaflow_runs", "edit", {"older": True})
    save_tensor(older.path("x"), torch.zeros(10), torch.float32)
    older.commit(["x"], [])
    older.close()
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with refuses("AdaFlowDDIMInvert", "latent", "10.00 GB of disk", "0.00 GB free", "older runs, which were kept"):
        common.resumable_run("inversion", {}, 10**10, "AdaFlowDDIMInvert", "resume", NodeText("AdaFlowDDIMInvert"))
    assert older.path("x").exists()
    with refuses("AdaFlowDDIMInvert", "latent", "GB of disk", "fewer frames or steps"):
        AdaFlowDDIMInvert.execute(graph.model, graph.source, {"samples": graph.latent}, 2)
    assert not list(comfy_folders.rglob("*.partial"))


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "a/../../x", "leak/x", "leak/new/x", "a\0b", "x" * 5000])
def test_a_file_name_that_leads_out_of_the_output_folder(prefix, comfy_folders, tmp_path):
    """Also where it is wired, so that ComfyUI cannot show it to the node before the prompt runs."""
    leak = comfy_folders / "output" / "leak"
    leak.symlink_to(tmp_path)
    before = set(comfy_folders.rglob("*"))
    try:
        with refuses("AdaFlow Save Video", "filename_prefix", "a name inside ComfyUI's output folder"):
            AdaFlowSaveVideo.execute(torch.zeros(1, 8, 8, 3), 8.0, "h264", 18, prefix)
    finally:
        leak.unlink()
    assert not list(tmp_path.iterdir()) and set(comfy_folders.rglob("*")) == before - {leak}


@pytest.mark.parametrize(
    ("wired", "value", "facts"),
    [
        ({}, "x", "'x'; expected a VIDEO or IMAGE, wired from another node"),
        ({}, None, "None; expected a VIDEO or IMAGE, wired from another node"),
        ({}, {"samples": 1}, "{'samples': 1}; expected a VIDEO or IMAGE, wired from another node"),
        ({"source": "LATENT"}, None, "wired to a LATENT; expected a VIDEO or IMAGE"),
    ],
)
def test_a_socket_that_is_given_a_constant_or_wired_wrongly(wired, value, facts):
    """ComfyUI shows a node None where an input is wired; only the types that it tells beside that say so."""
    message = AdaFlowEncodeVideo.validate_inputs({"vae": "VAE", **wired}, source=value, vae=None, chunk=0)
    assert message == f"AdaFlowEncodeVideo: input 'source' is {facts}"


@pytest.mark.parametrize("received", ["VIDEO", "IMAGE", "*"])
def test_a_socket_that_is_wired(received):
    from comfy.comfy_types import IO

    received = IO.ANY if received == "*" else received
    assert AdaFlowEncodeVideo.validate_inputs({"source": received, "vae": "VAE"}, source=None, vae=None) is True


def test_descriptors_of_the_published_setting_resemble_the_free_ones(graph):
    published = AdaFlowExtractDescriptors.execute(graph.model, {"samples": graph.latent}, 0, 2, -1, 0, graph.source)
    published = published.args[0]
    assert published.shape == graph.descriptors.shape and published.clip == graph.descriptors.clip
    cosine = (published.tokens([0]) * graph.descriptors.tokens([0])).sum(-1)
    assert float(cosine.mean()) > 0.9
    repeated = AdaFlowExtractDescriptors.execute(
        graph.model, {"samples": graph.latent}, 0, 2, -1, 0, graph.source, chunk=1
    ).args[0]
    assert torch.allclose(repeated.tokens([3]), published.tokens([3]), atol=2e-3)
    zeros = AdaFlowExtractDescriptors.execute(graph.model, {"samples": graph.latent}, 0, 1, 6, 0).args[0]
    assert zeros.frames == 4 and zeros.size == published.size
