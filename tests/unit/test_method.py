"""Fast paths of the method against the float64 oracles, on fresh random inputs."""

import copy
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from adaflow_pack.adaflow import slimming
from adaflow_pack.adaflow.attention import extended_attention, frame_attention, gathered_attention
from adaflow_pack.adaflow.correspondence import best_cosines, index_dtype, nearest_indices, nearest_tokens
from adaflow_pack.adaflow.ddim import bracket, ddim_timesteps, inversion_step, sigma_to_mu
from adaflow_pack.adaflow.descriptors import DescriptorWriter, resize_tokens
from adaflow_pack.adaflow.keyframes import Clips, CutThresholds, KeyframeDraws, cut_clips
from adaflow_pack.adaflow.plan import EditPlan, KeyframePool
from adaflow_pack.adaflow.propagation import blend_weight, gather_outputs, output_rows
from adaflow_pack.adaflow.slimming import select_kv, select_kv_by_blocks, select_tokens, token_importance
from torch.nn.functional import normalize

TOLERANCE = 1e-5


@pytest.fixture
def rng():
    """A generator with a fresh seed each run; the seed is in the report of a failure."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator


def tokens(rng, *shape):
    return normalize(torch.randn(*shape, generator=rng, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 9])
def test_slim_extended_attention_equals_the_oracle(rng, budget):
    q, k, v = torch.randn(3, 5, 21, 24, generator=rng, dtype=torch.float64)
    descriptors = tokens(rng, 5, 21, 16)
    expected = oracles.slim_attention(q, k, v, 3, descriptors, budget)
    kept = select_kv(descriptors.float(), budget)
    assert (kept is None) == (budget >= 5)
    out = extended_attention(q.float(), k.float(), v.float(), 3, kept)
    assert oracles.relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize("block", [1, 2, 3, 7])
@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("spare_bytes", [0, 700, 1 << 20])
def test_selection_by_blocks_keeps_the_same_tokens(rng, monkeypatch, block, group, spare_bytes):
    """Never more than two blocks of descriptors in memory, and each pair of keyframes multiplied once if it may be."""
    level, asked, multiplied = tokens(rng, 7, 20, 8), [], []

    def read(rows):
        asked.append(len(rows))
        return level.float()[rows.start : rows.stop]

    def counted(a, b, tile_elements=33 * 20):
        multiplied.append(len(a) * len(b))
        return best_cosines(a, b, tile_elements)

    monkeypatch.setattr(slimming, "best_cosines", counted)
    kept = select_kv_by_blocks(read, 7, 3, block, group, spare_bytes)
    for query in range(7):
        importance = oracles.importance(level, query)
        importance[query] = 2.0
        order = importance.flatten().argsort(descending=True)[: 3 * 20]
        assert kept[query].tolist() == sorted(order.tolist())
    assert max(asked) <= max(block, group)
    if group == 1:
        pairs = 7 * 6 // 2
        assert sum(multiplied) == pairs if block == 7 or spare_bytes == 1 << 20 else sum(multiplied) > pairs


@pytest.mark.parametrize("tile", [1, 50, 20 * 30, 1 << 24])
def test_both_directions_of_a_product_equal_the_oracle(rng, tile):
    a, b = tokens(rng, 3, 20, 16), tokens(rng, 2, 20, 16)
    of_a, of_b = best_cosines(a.float(), b.float(), tile)
    for i in range(3):
        for j in range(2):
            cosines = a[i] @ b[j].T
            assert oracles.relative_error(of_a[j, i], cosines.max(1).values) < TOLERANCE
            assert oracles.relative_error(of_b[i, j], cosines.max(0).values) < TOLERANCE


@pytest.mark.parametrize("together", [0, 1, 2, 3, 9])
def test_query_frames_attended_together_equal_the_oracle(rng, together):
    q, k, v = torch.randn(3, 5, 21, 24, generator=rng, dtype=torch.float64)
    descriptors = tokens(rng, 5, 21, 16)
    kept, row_bytes = select_kv(descriptors.float(), 2), 2 * 2 * 21 * 24 * 4
    out = gathered_attention(q.float(), k.float(), v.float(), 3, kept, together * row_bytes + row_bytes // 2)
    assert oracles.relative_error(out, oracles.slim_attention(q, k, v, 3, descriptors, 2)) < TOLERANCE


def test_a_budget_of_all_keyframes_is_dense_attention(rng):
    q, k, v = torch.randn(3, 4, 9, 8, generator=rng)
    every = torch.arange(36).expand(4, -1)
    dense = extended_attention(q, k, v, 2)
    assert oracles.relative_error(extended_attention(q, k, v, 2, every), dense) < TOLERANCE
    assert oracles.relative_error(extended_attention(q[:1], k[:1], v[:1], 2), frame_attention(q, k, v, 2)[:1]) < 1e-6


def test_a_shuffled_keyframe_order_changes_nothing(rng):
    q, k, v = torch.randn(3, 6, 10, 8, generator=rng)
    descriptors = tokens(rng, 6, 10, 16).float()
    order = torch.randperm(6, generator=rng)
    out = extended_attention(q, k, v, 2, select_kv(descriptors, 2))
    shuffled = extended_attention(q[order], k[order], v[order], 2, select_kv(descriptors[order], 2))
    assert oracles.relative_error(shuffled, out[order]) < TOLERANCE


def test_importance_equals_the_oracle_and_own_tokens_stay(rng):
    descriptors = tokens(rng, 4, 12, 8)
    for query in range(4):
        g = token_importance(descriptors.float(), descriptors[query].float())
        assert oracles.relative_error(g, oracles.importance(descriptors, query)) < TOLERANCE
        kept = select_tokens(torch.full_like(g, 5.0), query, 1)  # every other token claims to matter more
        assert kept.tolist() == list(range(query * 12, query * 12 + 12))


@pytest.mark.parametrize("tile", [1, 7 * 30, 1 << 24])
def test_tiled_matching_equals_the_oracle(rng, tile):
    query, key = tokens(rng, 3, 31, 16), tokens(rng, 3, 30, 16)
    similarity, index = nearest_tokens(query.float(), key.float(), tile_elements=tile)
    for frame in range(3):
        assert torch.equal(index[frame], oracles.nearest(query[frame], key[frame]))
        assert oracles.relative_error(similarity[frame], (query[frame] @ key[frame].T).max(1).values) < TOLERANCE


def test_the_pool_of_keyframes_holds_no_more_than_it_may(rng, tmp_path):
    maps = normalize(torch.randn(9, 8, 4, 6, generator=rng), dim=1)
    writer = DescriptorWriter(tmp_path / "d.safetensors", maps.shape, "model", "clip", "made", torch.rand(9, 4, 3))
    writer.write(list(range(9)), maps)
    descriptors, keyframes = writer.close(), (0, 3, 4, 8)
    read, original = [], descriptors.stored
    descriptors.stored = lambda frames, *args: (read.extend(frames), original(frames, *args))[1]
    pool = KeyframePool(descriptors, None, "cpu")
    assert pool.sizes == [(4, 6), (2, 3), (1, 2), (1, 1)]
    assert pool.frame_bytes == (24 + 6 + 2 + 1) * 8 * 4

    def ask(frames, level):
        read.clear()
        expected = original(list(frames)).float()
        assert torch.equal(pool.tokens(frames, level), resize_tokens(expected, pool.sizes[level]))
        assert pool.held_bytes <= most
        return read

    most = 2 * pool.frame_bytes + 1
    pool.hold(most)
    assert ask((0, 3, 4), 0) == [0, 3, 4] and ask((8,), 1) == [8]
    assert ask((4, 3, 0), 2) == [4]  # the first two stay, the others are read again
    most = pool.frame_bytes
    pool.hold(most)
    assert ask((0, 3), 3) == [3]
    plan = EditPlan(descriptors, Clips((0, 3, 4, 8), 9), KeyframeDraws())
    for size in pool.sizes:
        kept = plan.kept(keyframes, 2, size)
        assert torch.equal(kept, select_kv(descriptors.tokens(list(keyframes), size), 2))
        read.clear()
        assert torch.equal(plan.kept(keyframes, 2, size), kept) and not read  # made once, for all sizes
    plan.release()
    assert torch.equal(plan.kept(keyframes, 2, (4, 6)), select_kv(descriptors.tokens(list(keyframes)), 2)) and read
    assert plan.kept(keyframes, 4, (4, 6)) is None


class DescriptorsInMemory:
    """Stands for Descriptors: random maps (frames, channels, height, width), and which frames were read together."""

    def __init__(self, rng, frames, size):
        self.frames, self.size, self.shape, self.reads = frames, size, (frames, 8, *size), []
        self._maps = normalize(torch.randn(frames, 8, *size, generator=rng), dim=1)

    def stored(self, frames, area=None, device=None):
        self.reads.append(tuple(frames))
        return self._maps[frames]


def test_frames_are_matched_in_the_same_groups_whatever_was_matched_before(rng):
    """A run that goes on asks in another order than an unbroken one, and a batch's size may change last bits."""
    clips, keyframes, asked = Clips((0, 3, 26), 40), (1, 20, 33), []
    for order in (list(range(40)), torch.randperm(40, generator=rng).tolist()):
        descriptors = DescriptorsInMemory(rng, 40, (4, 6))
        plan = EditPlan(descriptors, clips, KeyframeDraws())
        found = {}
        for start in range(0, 40, 7):
            frames = order[start : start + 7]
            own = tuple(keyframes[clips.of(frame)] for frame in frames)
            found |= dict(zip(frames, plan.matches(frames, own, (4, 6)), strict=True))
        asked.append({read for read in descriptors.reads if len(read) > 1})
        for frame in (0, 19, 39):
            tokens = descriptors._maps[[frame, keyframes[clips.of(frame)]]].flatten(2).transpose(1, 2).double()
            assert torch.equal(found[frame].long(), oracles.nearest(tokens[0], tokens[1]))
    assert asked[0] == asked[1]


def test_matches_of_all_resolutions_on_a_device_equal_the_oracle(rng):
    clips, frames = Clips((0, 3, 12), 20), torch.randperm(20, generator=rng)[:13].tolist()
    keyframes = tuple((1, 7, 19)[clips.of(frame)] for frame in frames)
    maps = DescriptorsInMemory(rng, 20, (6, 9))
    tables = EditPlan(maps, clips, KeyframeDraws()).matches_on(frames, keyframes, None, "cpu")
    assert list(tables) == [(1, 2), (2, 3), (3, 5), (6, 9)]
    plan = EditPlan(maps, clips, KeyframeDraws())
    for size, table in tables.items():
        assert torch.equal(table, plan.matches(frames, keyframes, size))
        exact = resize_tokens(maps.stored([*frames, *keyframes]).double(), size)
        for row, query, key in zip(table, exact[:13], exact[13:], strict=True):
            assert torch.equal(row.long(), oracles.nearest(query, key))


def propagated(plan, steps, interpolate):
    """What propagation asks of a plan, chunk after chunk: {(step, frame, keyframe): matches at (4, 6)}."""
    found = {}
    for step in steps:
        keyframes = plan.keyframes(step)
        frames = [frame for frame in range(plan.frames) if frame not in keyframes]
        for start in range(0, len(frames), 7):
            where = plan.propagation(frames[start : start + 7], keyframes, interpolate)
            for of in {where.keyframes, where.neighbours}:
                matches = plan.matches(list(where.frames), of, (4, 6))
                found |= {(step, f, p): row for f, p, row in zip(where.frames, of, matches, strict=True)}
    return found


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("steps_kept", [100, 3, 0])
def test_matches_made_ahead_are_those_made_when_asked_for(rng, interpolate, steps_kept):
    """And no frame is read more than once where the cache holds all steps; a run that goes on finds the same bits."""
    starts = (0, *sorted(torch.randperm(39, generator=rng)[:3].add(1).tolist()))
    clips, steps = Clips(starts, 40), range(6)
    descriptors = [DescriptorsInMemory(rng, 40, (4, 6))]
    descriptors += [copy.copy(descriptors[0]) for _ in range(2)]
    cache_bytes = steps_kept * 40 * (24 + 6 + 2 + 1) * 2 * (1 + interpolate)
    plain, ahead, resumed = (EditPlan(d, clips, KeyframeDraws(seed=3), cache_bytes) for d in descriptors)
    for made in descriptors:
        made.reads = []
    found = {}
    for step in steps:
        ahead.expect(range(step, 6), interpolate)
        found |= propagated(ahead, [step], interpolate)
    resumed.expect(range(4, 6), interpolate)
    later = propagated(resumed, range(4, 6), interpolate)
    expected = propagated(plain, steps, interpolate)
    assert found.keys() == expected.keys() and later.keys() == {key for key in found if key[0] >= 4}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(later[key], expected[key]) for key in later)
    for (_, frame, keyframe), row in expected.items():
        tokens = descriptors[0]._maps[[frame, keyframe]].flatten(2).transpose(1, 2).double()
        assert torch.equal(row.long(), oracles.nearest(tokens[0], tokens[1]))
    whole = [read for read in descriptors[1].reads if len(read) > 1]
    if steps_kept == 100 and not interpolate:
        alone = {start for start, stop in pairwise((*starts, 40)) if stop - start == 1}
        assert sorted(frame for read in whole for frame in read) == [f for f in range(40) if f not in alone]
    elif steps_kept == 0:
        assert len(whole) > len(clips)


def test_matching_can_be_stopped(rng):
    plan = EditPlan(DescriptorsInMemory(rng, 40, (4, 6)), Clips((0, 20), 40), KeyframeDraws())
    keyframes, called = plan.keyframes(0), []

    def between():
        called.append(plan.matching_seconds)
        if len(called) == 2:
            raise InterruptedError

    plan.expect(range(5), False, between)
    frames = [frame for frame in range(20) if frame != keyframes[0]]
    with pytest.raises(InterruptedError):
        plan.matches(frames, (keyframes[0],) * 19, (4, 6))
    assert plan.matches(frames, (keyframes[0],) * 19, (4, 6)).shape == (19, 24)
    assert plan.matching_seconds > 0


@pytest.mark.parametrize("tile", [1, 7 * 30, 1 << 24])
def test_indices_alone_are_those_found_with_the_similarity(rng, tile):
    query, key = tokens(rng, 1, 31, 16)[0].float(), tokens(rng, 1, 30, 16)[0].float()
    out = torch.empty(31, dtype=torch.int16)
    nearest_indices(query, key, out, tile)
    assert torch.equal(out.long(), nearest_tokens(query[None], key[None])[1][0])


def test_index_types_hold_their_tokens():
    assert index_dtype(32768) is torch.int16
    assert index_dtype(32769) is torch.int32


def test_propagation_gathers_and_blends(rng):
    outputs = torch.randn(3, 7, 5, generator=rng)
    matches = torch.randint(7, (4, 7), generator=rng).to(torch.int16)
    slots = torch.tensor([2, 0, 1, 2])
    rows, out = output_rows(slots, matches), torch.full((4, 7, 5), torch.nan)
    assert gather_outputs(outputs, rows, out) is out and torch.equal(gather_outputs(outputs, rows), out)
    for frame in range(4):
        for token in range(7):
            assert torch.equal(out[frame, token], outputs[slots[frame], matches[frame, token].long()])
    assert blend_weight(4, 3, 7) == pytest.approx(1 / (1 + np.exp(-3 / 4)))


def scene_video(rng, cuts, frames, size, channels=12):
    """Descriptors of shots: each shot a map of its own that drifts a little."""
    out, base = [], None
    for frame in range(frames):
        if frame in cuts or base is None:
            base = torch.randn(size[0] * size[1], channels, generator=rng, dtype=torch.float64)
        out.append(base + 0.25 * torch.randn(base.shape, generator=rng, dtype=torch.float64))
        base = base + 0.08 * torch.randn(base.shape, generator=rng, dtype=torch.float64)
    return normalize(torch.stack(out), dim=-1)


@pytest.mark.parametrize("size", [(5, 9), (6, 33), (1, 1), (34, 3)])
@pytest.mark.parametrize("lookahead", [1, 4, 100])
def test_clips_are_cut_as_the_definition_says(rng, size, lookahead):
    video = scene_video(rng, {7, 8, 19}, 30, size)
    for thresholds in (CutThresholds(), CutThresholds(max_clip=6), CutThresholds(mean=-1, window=-1, max_clip=1)):
        clips = cut_clips(lambda f: video[f].float(), 30, size, thresholds, lookahead)
        expected = oracles.clip_starts(video, size, thresholds.mean, thresholds.window, thresholds.max_clip)
        assert list(clips.starts) == expected
    assert len(cut_clips(lambda f: video[f].float(), 1, size)) == 1


def test_a_small_new_object_is_caught_by_the_window(rng):
    size = (32, 32)
    frame = tokens(rng, 1, 1024, 32)[0]
    changed = frame.clone().view(32, 32, 32)
    changed[4:8, 4:8] = tokens(rng, 4, 4, 32)
    video = torch.stack([frame, changed.reshape(1024, 32)]).float()
    assert cut_clips(lambda f: video[f], 2, size).starts == (0, 1)
    assert cut_clips(lambda f: video[f], 2, size, CutThresholds(window=-1.0)).starts == (0,)


def test_draws_repeat_by_seed_and_stay_in_their_clips():
    clips = Clips((0, 4, 5, 40), 100)
    resampled = [KeyframeDraws(seed=3).at(step, clips) for step in range(50)]
    assert resampled == [KeyframeDraws(seed=3).at(step, clips) for step in range(50)]
    assert resampled != [KeyframeDraws(seed=4).at(step, clips) for step in range(50)]
    assert len(set(resampled)) > 25
    for draw in resampled:
        assert [clips.of(frame) for frame in draw] == [0, 1, 2, 3]
    last = [draw[-1] for draw in resampled]
    assert min(last) < 55 and max(last) > 85  # uniform over 40 .. 99
    fixed = KeyframeDraws("fixed", seed=3)
    assert fixed.at(0, clips) == fixed.at(49, clips) == resampled[0]
    schedule = KeyframeDraws("schedule", schedule=((41, 0, 4, 5), (3, 4, 39, 99)))
    assert schedule.at(0, clips) == (0, 4, 5, 41)
    assert schedule.at(7, clips) == (3, 4, 39, 99)


@pytest.mark.parametrize("frames", [(0, 4, 5), (0, 1, 5, 41), (0, 4, 5, 100)])
def test_a_schedule_must_fit_the_clips(frames):
    with pytest.raises(ValueError, match="step 0 of the schedule"):
        KeyframeDraws("schedule", schedule=(frames,)).check(Clips((0, 4, 5, 40), 100))


@pytest.mark.parametrize("steps", [1, 10, 50, 100])
def test_inversion_equals_the_oracle(rng, steps):
    weight = torch.randn(4, 4, generator=rng, dtype=torch.float64) / 4

    def eps(x, t):
        return torch.tanh(torch.einsum("oc,nchw->nohw", weight, x)) * (1 + t / 1000)

    x0 = torch.randn(2, 4, 5, 6, generator=rng, dtype=torch.float64)
    expected = oracles.invert(x0, eps, steps)
    grid = [0, *ddim_timesteps(steps)]
    sigmas = [((1 - oracles.alpha_bar(t)) / oracles.alpha_bar(t)) ** 0.5 for t in grid]
    x = x0.float()
    for level in range(1, len(grid)):
        x = inversion_step(x, eps(x.double(), grid[level]).float(), sigmas[level - 1], sigmas[level])
        assert oracles.relative_error(x, expected[level]) < TOLERANCE


def test_the_grid_of_50_is_a_subset_of_the_grid_of_100():
    assert ddim_timesteps(50)[:3] == [1, 21, 41] and ddim_timesteps(50)[-1] == 981
    assert set(ddim_timesteps(50)) < set(ddim_timesteps(100))
    for steps in (0, 1000):
        with pytest.raises(ValueError):
            ddim_timesteps(steps)


def test_bracket_interpolates_in_sigma_and_continues_above():
    grid = [0.03, 0.04, 1.0, 10.0]
    assert bracket(grid, 0.52)[:2] == (1, 2)
    assert bracket(grid, 0.52)[2] == pytest.approx(0.5)
    assert bracket(grid, 1.00001) == (2, 3, 0.0)
    assert bracket(grid, 0.0)[2] == 0.0
    assert bracket(grid, 11.0)[2] == pytest.approx(10 / 9)
    assert float(sigma_to_mu(1.0)) == pytest.approx(0.5**0.5)
