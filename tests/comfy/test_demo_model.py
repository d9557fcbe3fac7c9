"""The shipped demo model: its weights, a picture and an edit, held to numbers that were kept when it was trained.

``ADAFLOW_KEEP_DEMO_SAMPLES=1 python -m pytest tests/comfy/test_demo_model.py`` writes ``demo_samples.json`` anew, which
is to be done when the weights or the demo model's row in ``families.FAMILIES`` change, and only then.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import comfy.latent_formats
import latent_preview
import numpy as np
import pytest
import torch
from adaflow_pack.adaflow import matching, slimming
from adaflow_pack.adaflow.demo import Scene, render
from adaflow_pack.adaflow.demo.weights import pack, unpack
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.nodes.demo_clip import AdaFlowDemoClip
from adaflow_pack.nodes.demo_model import AdaFlowLoadDemoModel
from adaflow_pack.nodes.patching import families
from adaflow_pack.nodes.patching.demo_model import DemoConfig
from adaflow_pack.nodes.patching.preview import latent_rgb
from demo_samples import BUDGET, FRAMES, DemoEdit, picture, weights_hash
from models import small_model

KEPT = Path(__file__).with_name("demo_samples.json")
# Root mean squares over all tiles, of colours from 0 to 1. With new weights, see what ``pytest -rP`` prints: an
# unchanged edit, also with ATEN_CPU_CAPABILITY=default or avx2, must be far below TOLERANCE, a mistake above BROKEN.
TOLERANCE = 0.0005
BROKEN = 3 * TOLERANCE


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return AdaFlowLoadDemoModel.execute().args


@pytest.fixture(scope="module")
def edit(demo):
    with torch.inference_mode():
        return DemoEdit(*demo)


@pytest.fixture(scope="module")
def kept(demo, edit) -> dict:
    if os.environ.get("ADAFLOW_KEEP_DEMO_SAMPLES"):
        with torch.inference_mode():
            values = {"picture": picture(*demo), "edit": edit.run()}
        rounded = {name: [round(v, 4) for v in value.flatten().tolist()] for name, value in values.items()}
        KEPT.write_text(json.dumps({"sha256": weights_hash()} | rounded) + "\n")
    return json.loads(KEPT.read_text())


def difference(values: torch.Tensor, kept: list[float]) -> float:
    """Root mean square over all tiles."""
    found = (values.flatten() - torch.tensor(kept)).square().mean().sqrt().item()
    print(f"off by {found:.5f}")
    return found


def wrong_family(monkeypatch, **mistake) -> None:
    monkeypatch.setitem(families.FAMILIES, DemoConfig, replace(families.FAMILIES[DemoConfig], **mistake))


def test_the_weights_are_the_ones_that_were_trained(kept):
    assert weights_hash() == kept["sha256"]


def test_a_picture_is_what_it_was(demo, kept):
    assert difference(picture(*demo), kept["picture"]) < TOLERANCE


@pytest.mark.parametrize("threads", [1, 2])
def test_an_edit_is_what_it_was(edit, kept, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert difference(edit.run(), kept["edit"]) < TOLERANCE
    finally:
        torch.set_num_threads(before)


def test_the_edit_needs_matches_and_a_selection(edit):
    plan = edit.plan()
    keyframes, size = plan.keyframes(0), plan.descriptors.size
    tokens = size[0] * size[1]
    others = [frame for frame in range(plan.frames) if frame not in keyframes]
    matches = plan.matches(others, tuple(keyframes[plan.clips.of(frame)] for frame in others), size)
    assert (matches != torch.arange(tokens)).float().mean() > 0.15
    assert plan.kept(keyframes, BUDGET, size).shape == (len(keyframes), BUDGET * tokens)
    assert len(keyframes) > BUDGET


def test_the_demo_model_has_block_numbers_of_its_own(demo):
    """It is told from an SD 1.x of as many blocks by its config, not by its sizes."""
    for patched in (demo[0], demo[0].clone()):
        assert families.unet_family(patched, "test") is families.FAMILIES[DemoConfig]
    other = small_model("sd1")
    assert len(other.model.diffusion_model.output_blocks) == len(demo[0].model.diffusion_model.output_blocks)
    assert families.unet_family(other, "test") is families.FAMILIES[12]
    assert families.FAMILIES[DemoConfig].conv_block != families.FAMILIES[12].conv_block
    signatures = {families.model_signature(model, "test").split(",")[0] for model in (demo[0], other)}
    assert len(signatures) == 2  # what was inverted by the one is not for the other, whatever their widths


CONV = families.FAMILIES[DemoConfig].conv_block


@pytest.mark.parametrize(
    "mistake",
    [{"conv_block": block} for block in (families.FAMILIES[12].conv_block, CONV - 1, CONV + 1)]
    + [{"attention_blocks": range(*blocks)} for blocks in ((3, 12), (5, 12), (4, 11))],
    ids=str,
)
def test_a_wrong_layer_would_be_seen(edit, kept, monkeypatch, mistake):
    wrong_family(monkeypatch, **mistake)
    assert difference(edit.run(), kept["edit"]) > BROKEN


@pytest.mark.parametrize("block", [7, 9])
def test_a_wrong_descriptor_would_be_seen(demo, kept, monkeypatch, block):
    wrong_family(monkeypatch, descriptor_block=block)
    assert difference(DemoEdit(*demo).run(), kept["edit"]) > BROKEN


@pytest.mark.parametrize("shares", [(0.0, 0.8), (0.8, 0.0)], ids=["no feature", "no queries and keys"])
def test_a_dropped_injection_would_be_seen(edit, kept, shares):
    assert difference(edit.run(shares=shares), kept["edit"]) > BROKEN


def test_matches_left_out_would_be_seen(edit, kept, monkeypatch):
    def same_place(query, key, out):
        out.copy_(torch.arange(len(query)) % len(key))

    monkeypatch.setattr(matching, "nearest_indices", same_place)
    assert difference(edit.run(), kept["edit"]) > BROKEN


def test_slimming_left_out_would_be_seen(edit, kept):
    assert difference(edit.run(budget=FRAMES), kept["edit"]) > BROKEN


def test_the_wrong_tokens_kept_would_be_seen(edit, kept, monkeypatch):
    select = slimming.select_tokens
    monkeypatch.setattr(slimming, "select_tokens", lambda importance, *rest: select(-importance, *rest))
    assert difference(edit.run(), kept["edit"]) > BROKEN


DRAWN = {"kind": "car", "colour": "red", "season": "autumn", "time": "day", "style": "photo"}
SIZE = {"frames": 20, "shots": 3, "fps": 12.0, "width": 128, "height": 64, "seed": 4}


def test_a_drawn_clip_says_what_it_shows_and_changes_only_where_asked():
    images, caption, fps = AdaFlowDemoClip.execute(**DRAWN, **SIZE).args
    other, other_caption, _ = AdaFlowDemoClip.execute(**DRAWN | {"colour": "white"}, **SIZE).args
    assert images.shape == (20, 64, 128, 3) and fps == 12.0
    assert caption.replace("red", "white") == other_caption != caption
    changed = (images != other).any(-1).float().mean()
    assert 0.005 < changed < 0.25


@pytest.mark.parametrize(("wrong", "name"), [({"height": 192}, "width"), ({"shots": 30}, "shots")])
def test_a_clip_that_cannot_be_drawn_is_refused(wrong, name):
    with pytest.raises(InputError, match=name):
        AdaFlowDemoClip.execute(**DRAWN, **SIZE | wrong)


def test_packed_weights_come_back_within_half_a_step():
    state = {"a": torch.randn(5, 7, 3, 3), "b": torch.randn(9), "c": torch.tensor([3, 1])}
    back = unpack({f"x.{name}": value for name, value in pack(state).items()}, "x.")
    step = state["a"].flatten(1).abs().amax(1) / 127
    assert ((back["a"] - state["a"]).flatten(1).abs().amax(1) <= step * 0.501).all()
    torch.testing.assert_close(back["b"], state["b"], rtol=1e-3, atol=1e-6)
    assert back["c"].tolist() == [3, 1]


def test_torchs_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    AdaFlowLoadDemoModel.execute()
    assert torch.equal(torch.rand(3), expected)


def test_previews_show_the_colours_of_the_picture(demo, monkeypatch):
    model, _, vae = demo
    if not hasattr(comfy.latent_formats.LatentFormat, "latent_rgb_factors_reshape"):
        pytest.skip("this ComfyUI takes one latent value for a pixel's preview")
    scenes = [Scene.random(seed) for seed in range(16)]
    images = render(scenes, torch.zeros(16), torch.zeros(16), 128, 192).images
    latent, truth = vae.encode(images.movedim(1, -1)), torch.nn.functional.avg_pool2d(images, 8).movedim(1, -1)
    shown = latent_rgb(model, latent)
    assert (shown - truth).square().mean().sqrt() < 0.6 * truth.std()
    column = latent_rgb(model, latent[..., 12])  # without its neighbours
    assert (column - truth[:, :, 12]).square().mean().sqrt() < 0.9 * truth.std()
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Auto)
    own = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    pixels = torch.from_numpy(np.array(own.decode_latent_to_preview(model.model.latent_format.process_in(latent))))
    assert (pixels / 255 - shown[0]).abs().max() < 0.01
