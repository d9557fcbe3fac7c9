"""The demo world: what it promises about captions, edits, masks and flow, on scenes of fresh seeds."""

import random
from colorsys import rgb_to_hsv
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from adaflow_pack.adaflow.demo import (
    ATTRIBUTES,
    CAPTION_VARIANTS,
    COLOURS,
    KINDS,
    SEASONS,
    STYLES,
    TIMES,
    Clip,
    Scene,
    flow,
    render,
)
from adaflow_pack.adaflow.demo.layout import Layer
from adaflow_pack.adaflow.errors import InputError

SIZE = (96, 144)


@pytest.fixture
def rng():
    """Random numbers with a fresh seed each run; the seed is in the report of a failure."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    return random.Random(seed)


def scenes_of(rng, count, **attributes):
    """Photo-like scenes of random seeds and attributes, but for those given."""
    return [replace(Scene.random(rng.getrandbits(63)), **{"style": "photo"} | attributes) for _ in range(count)]


def views(scenes, view=0):
    """Camera and clock of each scene."""
    pairs = torch.tensor([scene.random_view(view) for scene in scenes], dtype=torch.float64)
    return pairs[:, 0], pairs[:, 1]


def dilated(masks, pixels):
    return F.max_pool2d(masks.float()[:, None], 2 * pixels + 1, 1, pixels)[:, 0] > 0


def named_colour(rgb):
    """The colour name of a mean colour: white where it is pale, else the hue's nearest."""
    hue, saturation, _ = rgb_to_hsv(*rgb)
    if saturation < 0.28:
        return "white"
    hues = {"red": 0, "yellow": 48, "green": 135, "blue": 222, "purple": 283}
    return min(hues, key=lambda name: abs((hue * 360 - hues[name] + 180) % 360 - 180))


def test_one_seed_gives_the_same_bits_and_a_batch_what_each_scene_gives_alone(rng):
    scenes = scenes_of(rng, 9)
    camera, clock = views(scenes)
    batch, again = (render(scenes, camera, clock, *SIZE) for _ in range(2))
    assert batch.images.shape == (9, 3, *SIZE) and batch.images.dtype == torch.float32
    assert batch.images.min() >= 0 and batch.images.max() <= 1
    assert torch.equal(batch.images, again.images) and torch.equal(batch.layers, again.layers)
    for i, scene in enumerate(scenes):
        alone = render([scene], camera[i : i + 1], clock[i : i + 1], *SIZE)
        assert (alone.images[0] - batch.images[i]).abs().max() < 1e-6
        assert (alone.layers[0] != batch.layers[i]).float().mean() < 1e-3
    others = render(scenes_of(rng, 9), camera, clock, *SIZE)
    assert (others.images - batch.images).abs().mean(dim=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("attribute", ["colour", "season", "time"])
def test_changing_one_attribute_changes_no_geometry(rng, attribute):
    scenes = scenes_of(rng, 10)
    changed = [
        replace(scene, **{attribute: rng.choice([o for o in ATTRIBUTES[attribute] if o != getattr(scene, attribute)])})
        for scene in scenes
    ]
    camera, clock = views(scenes)
    before, after = render(scenes, camera, clock, *SIZE), render(changed, camera, clock, *SIZE)
    assert torch.equal(before.layers, after.layers) and torch.equal(before.masks, after.masks)
    later = (camera + 0.05, clock + 0.2)
    flows = [flow(some, camera, clock, *later, *SIZE) for some in (scenes, changed)]
    assert torch.equal(flows[0][0], flows[1][0]) and torch.equal(flows[0][1], flows[1][1])
    difference = (before.images - after.images).abs().amax(dim=1)
    outside = ~dilated(before.masks, 2)
    inside = [float(difference[i][before.masks[i]].mean()) for i in range(len(scenes))]
    if attribute == "colour":
        assert difference[outside].max() == 0
        assert min(inside) > 0.08
    else:
        land = outside & (before.layers >= Layer.FAR_HILLS) & (before.layers <= Layer.TREES)
        land[:, round(0.66 * SIZE[0]) :] &= torch.tensor([scene.kind != "boat" for scene in scenes])[:, None, None]
        assert min(float(difference[i][land[i]].mean()) for i in range(len(scenes))) > 0.04


def test_a_style_changes_the_picture_and_not_the_layers_in_a_mixed_batch_too(rng):
    photos = scenes_of(rng, len(STYLES) - 1)
    styled = [replace(scene, style=style) for scene, style in zip(photos, STYLES[1:], strict=True)]
    camera, clock = views(photos)
    before, after = render(photos, camera, clock, *SIZE), render(styled, camera, clock, *SIZE)
    assert torch.equal(before.layers, after.layers)
    assert (before.images - after.images).abs().mean(dim=(1, 2, 3)).min() > 0.01
    for i, scene in enumerate(styled):
        alone = render([scene], camera[i : i + 1], clock[i : i + 1], *SIZE)
        assert (alone.images[0] - after.images[i]).abs().mean() < 1e-3, scene


@pytest.mark.parametrize("kind", KINDS)
def test_the_colour_named_is_the_colour_seen(rng, kind):
    scenes = [
        Scene(rng.getrandbits(63), kind, colour, season, time)
        for colour, season, time, _ in product(COLOURS, SEASONS, TIMES, range(2))
    ]
    out = render(scenes, *views(scenes), *SIZE)
    for i, scene in enumerate(scenes):
        seen = out.images[i][:, out.masks[i]].mean(dim=1).tolist()
        assert named_colour(seen) == scene.colour, (scene, seen)


@pytest.mark.parametrize("size", [(96, 96), (96, 144), (96, 160)])
def test_the_object_is_large_and_wholly_inside(rng, size):
    scenes = [scene for kind in KINDS for scene in scenes_of(rng, 16, kind=kind)]
    out = render(scenes, *views(scenes, rng.getrandbits(32)), *size)
    for scene, mask in zip(scenes, out.masks, strict=True):
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        assert rows.min() > 0 and rows.max() < size[0] - 1, scene
        assert columns.min() > 0 and columns.max() < size[1] - 1, scene
        sides = sorted((float(rows.max() - rows.min() + 1), float(columns.max() - columns.min() + 1)))
        assert sides[0] >= 0.19 * size[0], (scene, sides)
        assert 0.035 < mask.float().sum() / size[0] ** 2 < 0.3, scene


def warped_back(images, moved):
    """Each picture fetched from where the flow points, by cubic interpolation."""
    height, width = images.shape[2:]
    x = torch.arange(width) + moved[:, 0] + 0.5
    y = torch.arange(height)[:, None] + moved[:, 1] + 0.5
    places = torch.stack((x / width, y / height), dim=-1) * 2 - 1
    return F.grid_sample(images, places, mode="bicubic", padding_mode="border", align_corners=False)


def test_warping_the_next_frame_back_gives_this_frame(rng):
    scenes = [scene for kind in KINDS for scene in scenes_of(rng, 5, kind=kind)]
    camera0, clock0 = views(scenes)
    camera1, clock1 = camera0 + rng.uniform(0.03, 0.06), clock0 + rng.uniform(0.1, 0.3)
    first, second = render(scenes, camera0, clock0, *SIZE), render(scenes, camera1, clock1, *SIZE)
    moved, visible = flow(scenes, camera0, clock0, camera1, clock1, *SIZE)
    assert 0.7 < visible.float().mean() < 1
    # a pixel at a silhouette mixes two layers that move apart
    inner = visible & ~edges(first.layers)
    warped = (warped_back(second.images, moved) - first.images).abs().amax(dim=1)
    unmoved = (second.images - first.images).abs().amax(dim=1)
    assert warped[inner].mean() < 0.006
    assert warped[inner].mean() < 0.25 * unmoved[inner].mean()
    assert warped[visible].mean() < 0.5 * unmoved[visible].mean()


def test_a_move_by_whole_pixels_is_a_copy(rng):
    scenes = [scene for kind in KINDS for scene in scenes_of(rng, 5, kind=kind)]
    camera, clock = views(scenes)
    moved_camera = camera + rng.choice([-20, 20]) / SIZE[0]  # 5, 10, 15, 20 and 26 pixels by the layers' parallax
    first, second = render(scenes, camera, clock, *SIZE), render(scenes, moved_camera, clock, *SIZE)
    moved, visible = flow(scenes, camera, clock, moved_camera, clock, *SIZE)
    assert (moved[:, 1] == 0).all()
    target = (torch.arange(SIZE[1]) + moved[:, 0].round().long()).clamp(0, SIZE[1] - 1)
    there = second.layers.gather(2, target)
    assert (there == first.layers)[visible].all(), "a covered point is called visible"
    copied = second.images.gather(3, target[:, None].expand_as(second.images))
    # clouds are thin at their rims, and the sky behind them stands still
    land = visible & (first.layers >= Layer.FAR_HILLS) & ~edges(first.layers) & ~edges(second.layers).gather(2, target)
    assert land.float().mean() > 0.15
    error = (copied - first.images).abs().amax(dim=1)
    for layer in first.layers[land].unique():
        differs = error[land & (first.layers == layer)] > 1e-3
        # some: what covers less than half a pixel, such as a tree's tip, is no edge of a layer
        assert differs.float().mean() < 0.06, f"{Layer(int(layer)).name} does not move with its flow"


def edges(layers):
    """Pixels next to another layer."""
    values = layers.float()[:, None]
    return (F.max_pool2d(values, 3, 1, 1) + F.max_pool2d(-values, 3, 1, 1))[:, 0] != 0


def test_what_comes_into_the_picture_and_what_is_covered_is_not_visible(rng):
    scenes = scenes_of(rng, 6, kind="house")
    camera, clock = views(scenes)
    _, visible = flow(scenes, camera, clock, camera + 0.1, clock, *SIZE)
    ground = render(scenes, camera, clock, *SIZE).layers[:, -1, :4] >= 5
    assert ground.all() and not visible[:, -1, :4].any(), "what leaves to the left is still called visible"
    still, seen = flow(scenes, camera, clock, camera, clock, *SIZE)
    assert seen.all() and (still == 0).all()


def test_long_clips_render_frame_by_frame_as_in_chunks_and_keep_their_object(rng):
    clip = Clip.random(rng.getrandbits(63), frames=1000, shots=5, style="photo")
    assert len(clip) == 1000 and len(clip.shots) == 5 and len({shot.scene.seed for shot in clip.shots}) == 5
    first = clip.cuts[2] - 6
    chunk = clip.render(first, 12, *SIZE)
    for frame in rng.sample(range(12), 4):
        alone = clip.render(first + frame, 1, *SIZE)
        assert (alone.images[0] - chunk.images[frame]).abs().max() < 1e-6
    for frame in [0, 999, *(cut - 1 for cut in clip.cuts), *clip.cuts]:
        mask = clip.render(frame, 1, *SIZE).masks[0]
        border = torch.cat((mask[0], mask[-1], mask[:, 0], mask[:, -1]))
        assert mask.any() and not border.any()


def test_nothing_is_visible_across_a_cut_or_past_the_end(rng):
    clip = Clip.random(rng.getrandbits(63), frames=24, shots=3, style="photo")
    _, visible = clip.flow(0, 24, *SIZE)
    seen = visible.float().mean(dim=(1, 2))
    closed = {cut - 1 for cut in clip.cuts} | {23}
    for frame in range(24):
        assert seen[frame] == 0 if frame in closed else seen[frame] > 0.6


def test_clips_mix_stills_and_pans_and_an_edit_keeps_them(rng):
    clips = [Clip.random(rng.getrandbits(63), 96, 2) for _ in range(30)]
    speeds = [shot.speed for clip in clips for shot in clip.shots]
    assert any(speed == 0 for speed in speeds) and any(abs(speed) > 0.02 for speed in speeds)
    for clip in clips[:5]:
        edit = clip.edited(colour="purple", style="comic")
        assert {(s.scene.colour, s.scene.style) for s in edit.shots} == {("purple", "comic")}
        assert [replace(s, scene=None) for s in edit.shots] == [replace(s, scene=None) for s in clip.shots]
        assert [s.scene.seed for s in edit.shots] == [s.scene.seed for s in clip.shots]


def test_captions_name_what_can_be_seen_and_tell_scenes_apart():
    assert CAPTION_VARIANTS >= 6
    every = [Scene(0, *values) for values in product(KINDS, COLOURS, SEASONS, TIMES, STYLES)]
    for variant in range(CAPTION_VARIANTS):
        captions = {}
        for scene in every:
            caption = scene.caption(variant)
            words = caption.replace(",", "").split()
            grey = scene.style == "pencil sketch"
            coloured = (scene.colour, scene.season, scene.time)
            named = {scene.kind, *scene.style.split(), *(() if grey else coloured)}
            assert named <= set(words), caption
            assert not grey or not set(words) & {*COLOURS, *SEASONS, *TIMES}
            told = (scene.kind, scene.style, *(() if grey else coloured))
            assert captions.setdefault(caption, told) == told
    assert len({every[0].caption(variant) for variant in range(CAPTION_VARIANTS)}) == CAPTION_VARIANTS


def test_what_the_world_does_not_have_is_refused():
    with pytest.raises(InputError, match="colour"):
        Scene(1, "car", "pink", "summer", "day")
    with pytest.raises(InputError, match="seed"):
        Scene(-1, "car", "red", "summer", "day")
    scene = Scene(1, "car", "red", "summer", "day")
    with pytest.raises(InputError, match="camera"):
        render([scene], torch.zeros(2), torch.zeros(1), 64, 96)
    with pytest.raises(InputError, match="size"):
        render([scene], torch.zeros(1), torch.zeros(1), 96, 64)
    with pytest.raises(InputError, match="shots"):
        Clip.random(0, 3, 4)
    with pytest.raises(InputError, match="frames"):
        Clip.random(0, 10, 2).render(8, 3, 64, 96)
