"""What a run is said to need, against what was measured on a GPU, and when it is refused."""

import json

import pytest
from adaflow_pack.adaflow.errors import InputError
from adaflow_pack.adaflow.estimate import (
    EDIT_LATENTS,
    Amount,
    Attention,
    Needs,
    Pace,
    UNetSizes,
    describe,
    duration,
    edit_needs,
    inversion_needs,
    plural,
    refuse_too_large,
)

GIB = 2**30
BLOCKS = {0: 320, 1: 640, 2: 1280, 3: 1280}


def sd21() -> UNetSizes:
    """Stable Diffusion 2.1 in half precision."""
    encoder = [Attention(level, BLOCKS[level], False, True) for level in (0, 0, 1, 1, 2, 2, 3)]
    levels = {block: 2 - (block - 3) // 3 for block in range(3, 12)}
    decoder = [Attention(level, BLOCKS[level], block >= 4, block < 4) for block, level in levels.items()]
    skips = [(0, 320)] * 3 + [(1, 320)] + [(1, 640)] * 2 + [(2, 640)] + [(2, 1280)] * 2 + [(3, 1280)] * 3
    return UNetSizes((*encoder, *decoder), tuple(skips), (2, 1280), 2, 2 * 865_900_000)


@pytest.mark.parametrize(
    ("file", "chunk"), [("h100-stages-1000.json", 32), ("h100-stages-250-125.json", 8)], ids=["40 keyframes", "125"]
)
@pytest.mark.parametrize("injecting", [True, False], ids=["injecting", "past"])
def test_an_edit_takes_what_was_measured_on_an_h100(root, file, chunk, injecting):
    measured = json.loads((root / "benchmarks" / "results" / file).read_text())
    peak = measured["step injecting" if injecting else "step past injection"]["peak GiB"] * GIB
    shape = (measured["frames"], 4, 48, 84)
    device = edit_needs(sd21(), shape, measured["clips"], 2, chunk, injecting).device
    assert device.least <= peak
    assert 0.65 * peak <= device.about <= 1.35 * peak


def test_what_waits_in_host_memory_moves_from_the_device_to_ram():
    here, there = (edit_needs(sd21(), (1000, 4, 48, 84), 400, 2, 8, True, on_host) for on_host in (False, True))
    keyframe = sd21().keyframe_bytes((48, 84), 2, True)
    assert here.device.least - there.device.least == here.device.about - there.device.about == 400 * keyframe.least
    assert there.ram.least - here.ram.least == 400 * keyframe.least
    assert there.ram.about - here.ram.about == 400 * keyframe.about  # with the skip connections


def test_latents_that_are_sampled_in_ram_leave_those_that_were_given_on_the_device():
    shape = (4000, 4, 48, 84)
    here, there = (edit_needs(sd21(), shape, 160, 2, 8, True, True, in_ram) for in_ram in (False, True))
    one = 4000 * 4 * 48 * 84 * 4
    assert here.device.about - there.device.about == (EDIT_LATENTS - 4) * one
    assert here.device.least - there.device.least == 2 * one
    assert there.ram.about - here.ram.about == EDIT_LATENTS * one
    masked = edit_needs(sd21(), shape, 160, 2, 8, True, True, True, True)
    assert masked.device.about - there.device.about == one  # as it is given; the sampler's own are in RAM


@pytest.mark.parametrize("file", ["h100-stages-1000.json", "h100-stages-250-125.json"])
def test_an_inversion_takes_what_was_measured_on_an_h100(root, file):
    measured = json.loads((root / "benchmarks" / "results" / file).read_text())
    peak = measured["inversion, 2 steps, descriptors taken"]["peak GiB"] * GIB
    device = inversion_needs(sd21(), (measured["frames"], 4, 48, 84), 32).device  # its chunk was automatic
    assert device.least <= peak
    assert 0.65 * peak <= device.about <= 1.35 * peak


def needs(device: tuple[int, int], ram: tuple[int, int]) -> Needs:
    return Needs(Amount(*(value * 10**9 for value in device)), Amount(*(value * 10**9 for value in ram)))


def refuse(needed: Needs, **free: int) -> None:
    free = {kind.replace("_", " "): value * 10**9 for kind, value in free.items()}
    refuse_too_large(needed, free, "Node", "plan", "900 keyframes", "use fewer")


def test_only_what_surely_does_not_fit_is_refused():
    refuse(needs((10, 50), (1, 2)), GPU_memory=20, RAM=1)
    with pytest.raises(InputError, match=r"Node: input 'plan' is 900 keyframes, .* 21.00 GB of GPU .* 20.00 GB"):
        refuse(needs((21, 50), (1, 2)), GPU_memory=20, RAM=8)
    with pytest.raises(InputError, match=r"at least 9.00 GB of RAM; expected .* 8.00 GB that are free: use fewer"):
        refuse(needs((1, 2), (9, 9)), GPU_memory=20, RAM=8)
    refuse(needs((5, 9), (4, 9)), RAM=9)
    with pytest.raises(InputError, match=r"at least 9.00 GB of RAM"):
        refuse(needs((5, 9), (4, 9)), RAM=8)  # without a GPU both stand in RAM


def test_the_line_for_the_user_names_what_is_needed_and_free():
    needed = needs((10, 50), (1, 2))
    assert describe(needed, {"RAM": 3 * 10**9, "GPU memory": 80 * 10**9}) == (
        "needs about 50.00 GB of GPU memory (80.0 free), 2.00 GB of RAM (3.0 free)"
    )
    assert describe(needed, {"RAM": 3 * 10**9}) == "needs about 52.00 GB of RAM (3.0 free)"


def test_the_time_is_told_from_a_part_of_the_first_step_and_from_a_whole_one():
    told, now = [], [100.0]
    pace = Pace(50, told.append, lambda: now[0])
    pace.begin_step(10)  # a run that goes on
    pace.measured(3.0)
    assert told == ["takes about 2 min: 40 x 3.0 s"]
    pace.measured(9.0)
    pace.begin_step(10)  # a sampler that asks the model twice a step
    assert len(told) == 1
    now[0] += 360.0
    pace.begin_step(11)
    assert told[1:] == ["takes about 4.0 h: 40 x 6 min"]
    now[0] += 1.0
    pace.begin_step(12)
    pace.measured(1.0)
    assert len(told) == 2


def test_what_is_done_once_is_not_counted_for_every_step():
    told, now = [], [100.0]
    pace = Pace(10, told.append, lambda: now[0])
    pace.begin_step(0)
    pace.once(30.0)
    now[0] += 35.0
    pace.begin_step(1)
    assert told == ["takes about 50 s: 10 x 5.0 s"]


@pytest.mark.parametrize(("seconds", "words"), [(0.26, "0.3 s"), (61, "61 s"), (600, "10 min"), (54_000, "15.0 h")])
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("number", "words"), [(0, "0 frames"), (1, "1 frame"), (2, "2 frames")])
def test_one_takes_no_plural(number, words):
    assert plural(number, "frame") == words
