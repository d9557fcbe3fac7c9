"""What each style and look does to a picture, on random smooth pictures of fresh seeds."""

import random
import time

import pytest
import torch
import torch.nn.functional as F
from adaflow_pack.adaflow.demo import STYLES
from adaflow_pack.adaflow.demo.filters import LOOKS, apply_look, apply_style
from adaflow_pack.adaflow.errors import InputError

EVERY = [(apply_style, style) for style in STYLES] + [(apply_look, look) for look in LOOKS[1:]]
STEPPED = ("comic", "pixel art")  # a small change may carry a colour over to the next level


@pytest.fixture
def generator():
    """Random numbers with a fresh seed each run; the seed is in the report of a failure."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def smooth(generator, count=3, height=128, width=192):
    """Random soft colours with a few hard borders, (count, 3, height, width)."""
    fields = torch.randn(count, 4, height // 16, width // 16, generator=generator)
    fields = F.interpolate(fields, (height, width), mode="bicubic")
    return (0.5 + 0.22 * fields[:, :3] + 0.25 * fields[:, 3:].sign()).clamp(0, 1)


def grey(images):
    return (images * torch.tensor((0.299, 0.587, 0.114))[:, None, None]).sum(1)


def chroma(images):
    return images.amax(1) - images.amin(1)


def level(colour, height=32, width=48):
    """A picture of one colour."""
    return torch.tensor(colour)[None, :, None, None].expand(1, 3, height, width)


@pytest.mark.parametrize(("apply", "name"), EVERY)
@pytest.mark.parametrize("size", [(128, 192), (192, 320), (33, 50)])
def test_shape_and_range(apply, name, size, generator):
    images = smooth(generator, 2, *size)
    before = images.clone()
    changed = apply(images, name)
    assert changed.shape == images.shape and changed.dtype == images.dtype
    assert changed.isfinite().all() and changed.min() >= 0 and changed.max() <= 1
    assert torch.equal(images, before)
    for colour in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)):
        assert apply(level(colour), name).isfinite().all()


@pytest.mark.parametrize(("apply", "name"), EVERY)
def test_a_batch_is_its_pictures_one_by_one(apply, name, generator):
    images = smooth(generator, 18, 32, 48)
    changed = apply(images, name)
    assert torch.equal(changed, apply(images, name))
    singles = torch.cat([apply(image[None], name) for image in images])
    assert (changed - singles).abs().max() < 1e-5 if name not in STEPPED else (changed - singles).abs().mean() < 1e-4


def test_the_plain_names_change_nothing(generator):
    images = smooth(generator)
    assert torch.equal(apply_style(images, "photo"), images)
    assert torch.equal(apply_look(images, "day"), images)


@pytest.mark.parametrize(("apply", "name"), [e for e in EVERY if e[1] not in STEPPED])
def test_a_small_change_stays_small(apply, name, generator):
    """What a video needs: a soft change of the picture comes out at most threefold, in the mean."""
    images = smooth(generator).clamp(0.05, 0.95)
    change = F.interpolate(torch.randn(3, 3, 16, 24, generator=generator), images.shape[2:], mode="bilinear")
    change = 0.004 * change.clamp(-2, 2)
    difference = apply(images + change, name) - apply(images, name)
    assert difference.abs().mean() < 3 * change.abs().mean()


@pytest.mark.parametrize(("apply", "name"), EVERY)
def test_nothing_is_finer_than_an_autoencoder_keeps(apply, name, generator):
    """Half the size and back loses little."""
    changed = apply(smooth(generator), name)
    half = F.interpolate(changed, scale_factor=0.5, mode="area")
    back = F.interpolate(half, scale_factor=2, mode="bilinear")
    assert (back - changed).square().mean().sqrt() < 0.09


def test_styles_and_looks_differ_from_each_other(generator):
    images = smooth(generator)
    for options in ([e for e in EVERY if e[0] is apply_style], [(apply_look, look) for look in LOOKS]):
        results = [apply(images, name) for apply, name in options]
        for i, one in enumerate(results):
            for other in results[:i]:
                assert (one - other).abs().mean() > 0.03


def test_pencil_is_grey_lines_on_light_paper(generator):
    sketch = apply_style(smooth(generator), "pencil sketch")
    assert chroma(sketch).max() < 1e-6
    assert apply_style(level((0.8, 0.5, 0.7)), "pencil sketch").min() > 0.75
    border = torch.cat([level((0.8, 0.2, 0.2)), level((0.2, 0.3, 0.8))], -1).repeat(1, 1, 4, 1)
    sketch = apply_style(border, "pencil sketch")[0, 0]
    assert sketch[:, 46:50].mean() < sketch[:, 10:30].mean() - 0.2


def test_watercolour_is_lighter_and_paler(generator):
    images = smooth(generator)
    washed = apply_style(images, "watercolour")
    assert grey(washed).mean() > grey(images).mean() + 0.08
    assert chroma(washed).mean() < chroma(images).mean()
    assert washed.amin() > 0.12  # ink is never black


def test_oil_is_more_colourful_and_keeps_borders(generator):
    images = smooth(generator)
    assert chroma(apply_style(images, "oil painting")).mean() > 1.2 * chroma(images).mean()
    border = torch.cat([level((0.2, 0.2, 0.2), 64), level((0.8, 0.8, 0.8), 64)], -1)
    painted = grey(apply_style(border, "oil painting"))[0]
    assert (painted[:, 56:].mean(1) - painted[:, :40].mean(1)).min() > 0.5


def test_oil_smooths_grain(generator):
    grain = 0.5 + 0.05 * torch.randn(2, 3, 64, 96, generator=generator)
    assert apply_style(grain, "oil painting").std() < 0.6 * grain.std()


def test_comic_has_black_outlines_and_strong_colours(generator):
    images = smooth(generator)
    comic = apply_style(images, "comic")
    assert chroma(comic).mean() > 1.3 * chroma(images).mean()
    border = torch.cat([level((0.9, 0.6, 0.6)), level((0.3, 0.6, 0.9))], -1).repeat(1, 1, 4, 1)
    assert grey(apply_style(border, "comic"))[0, :, 46:50].amin(-1).max() < 0.1


@pytest.mark.parametrize("size", [(128, 192), (192, 320), (33, 50)])
def test_pixel_art_is_blocks(size, generator):
    art = apply_style(smooth(generator, 2, *size), "pixel art")
    blocks = art[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(art, blocks[..., : size[0], : size[1]])


def test_pixel_art_has_few_colours():
    ramp = torch.linspace(0, 1, 192).expand(1, 3, 32, 192)
    assert len(apply_style(ramp, "pixel art")[0, 0, 0].unique()) <= 8
    hues = torch.stack([ramp[:, 0], 1 - ramp[:, 0], 0 * ramp[:, 0]], 1)
    assert len(apply_style(hues, "pixel art")[0, :, 0].unique(dim=1).T) <= 24


def test_night_is_dark_and_blue_and_keeps_contrast(generator):
    images = smooth(generator)
    night = apply_look(images, "night")
    assert grey(night).mean() < 0.5 * grey(images).mean()
    assert (night[:, 2] > 1.2 * night[:, 0]).float().mean() > 0.5
    assert grey(night).std() > 0.25 * grey(images).std()
    assert night[:, 2].mean() - images[:, 2].mean() > night[:, 0].mean() - images[:, 0].mean()


def test_sunset_is_warmer(generator):
    images = smooth(generator)
    sunset = apply_look(images, "sunset")
    assert (sunset[:, 0] - sunset[:, 2]).mean() > (images[:, 0] - images[:, 2]).mean() + 0.15


def test_autumn_turns_leaves_orange_and_leaves_the_sky():
    leaf = apply_look(level((0.25, 0.5, 0.15)), "autumn")[0].mean((1, 2))
    assert leaf[0] > 1.4 * leaf[1] > 2 * leaf[2]
    sky = apply_look(level((0.4, 0.6, 0.9)), "autumn")[0].mean((1, 2))
    assert sky.argmax() == 2


def test_snow_covers_meadows_and_leaves_a_red_car_red():
    for colour in ((0.25, 0.5, 0.15), (0.5, 0.42, 0.3)):
        meadow = apply_look(level(colour), "snow")
        assert grey(meadow).min() > 0.7 and chroma(meadow).max() < 0.15
    road = apply_look(level((0.5, 0.5, 0.5)), "snow")
    assert grey(road)[0, -1].mean() > 0.75
    car = apply_look(level((0.9, 0.1, 0.1)), "snow")
    assert (car[:, 0] - car[:, 1:].amax(1)).min() > 0.35


@pytest.mark.parametrize(("apply", "kind"), [(apply_style, "style"), (apply_look, "look")])
def test_bad_input_is_refused(apply, kind, generator):
    with pytest.raises(InputError, match=kind):
        apply(smooth(generator), "cubist")
    for shape in ((3, 32, 48), (1, 4, 32, 48)):
        with pytest.raises(InputError, match="images"):
            apply(torch.rand(shape), "photo" if kind == "style" else "day")


@pytest.mark.parametrize(("apply", "name"), EVERY)
def test_fast_enough_to_train_with(apply, name, generator):
    """32 pictures in a second of one processor's time, which leaves room for a slow machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images = smooth(generator, 32)
        started = time.process_time()
        apply(images, name)
        assert time.process_time() - started < 4
    finally:
        torch.set_num_threads(threads)
