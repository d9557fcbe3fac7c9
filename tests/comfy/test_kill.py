"""A process killed at any moment of an edit: run again, it ends in the same bits, and nothing is done twice but the
step that was broken off, or the chunk of frames that was being decoded and saved. Of an inversion the step before may
be, too, which goes to the disk meanwhile."""

import os
import random
import signal
from collections import Counter
from itertools import groupby

import pytest
from killed_edit import SAVED, STAGES, STEPS, KilledEdit, Work

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which this system cannot")
KILLS = 4  # of each stage


def counted(log: list[Work]) -> Counter:
    """How often the UNet ran in each step of each stage, and the VAE on each frame."""
    return Counter((work.stage, work.kind, unit) for work in log if work.kind != "file" for unit in work.units)


def moments(log: list[Work], stage: str) -> list[int]:
    """Where in the log of an unbroken edit a stage is at work, while the video does not stand yet."""
    (named,) = (number for number, work in enumerate(log) if work.kind == "file" and work.units[1].startswith("clip_"))
    return [number for number, work in enumerate(log[:named]) if work.stage == stage and work.kind != "end"]


@pytest.mark.timeout(600)
def test_a_killed_edit_ends_in_the_same_bits_with_one_step_done_twice(comfy_folders):
    edit, seed = KilledEdit(comfy_folders), random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    edit.clean()
    whole, log = edit.finish(edit.fork()), edit.log.read()
    once = counted(log)
    assert sum(stage == "inversion" for stage, _, _ in once) == STEPS
    assert [once[unit] for unit in once if unit[0] == "saving"] == [1] * SAVED
    for stage in STAGES:
        for kill in range(KILLS):
            edit.clean()
            last = choose.choice(moments(log, stage))
            delay = choose.uniform(0, log[last + 1].at - log[last].at)
            status = os.waitpid(edit.fork(last, delay), 0)[1]
            assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
            killed = edit.log.read()
            assert killed[-1].stage == stage and not edit.videos()
            again = edit.start_fresh() if kill == 0 else edit.fork()
            assert edit.finish(again) == whole
            done = counted(edit.log.read())
            broken_off = [counted([work]) for work in killed if work.kind in ("step", "decode")]
            lately = [units for units, _ in groupby(map(set, broken_off))][-2 if stage == "inversion" else -1 :]
            twice = {unit for unit in done | once if done[unit] != once[unit]}
            assert twice <= set().union(*lately), twice
            assert all(once[unit] < done[unit] <= 2 * once[unit] for unit in twice)
            assert len(edit.videos()) == 1
            names = [path.name for path in edit.output.rglob("*")]
            assert not [name for name in names if name.startswith(("save-", "segment-")) or "partial" in name]
