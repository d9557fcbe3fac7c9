"""Chunks of keyframes in lockstep against all of them in one batch."""

import random
import weakref
from contextlib import nullcontext
from itertools import chain, count, pairwise

import comfy.model_management
import oracles
import pytest
import torch
from adaflow_pack.nodes.patching import evaluator, lockstep, patch
from adaflow_pack.nodes.patching.lockstep import Exchange, run_in_lockstep
from adaflow_pack.nodes.patching.parking import ParkedSkips
from adaflow_pack.nodes.patching.shelf import Shelf
from comfy.patcher_extension import WrappersMP
from graph import Graph, each_frame, plain_euler, select
from models import SHAPES


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_uneven_chunks_equal_one_batch(shape, shares):
    graph = Graph(shape, frames=7, size=(6, 9), steps=2)
    plan = each_frame(graph.descriptors)
    model = graph.slim(3)
    whole = graph.edit(plan, model=model, shares=shares, chunk=7)
    for chunk in (1, 3, 4):
        parts = graph.edit(plan, model=model, shares=shares, chunk=chunk)
        assert oracles.relative_error(parts, whole) < 1e-5, chunk


@pytest.mark.parametrize("interpolation", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_waiting_in_host_memory_changes_no_bit(shape, interpolation, monkeypatch):
    graph = Graph(shape, frames=7, steps=3)
    plan, moved, original, edits = select(graph.descriptors, -1.0, -1.0, max_clip=2), [], Shelf._on_host, {}
    monkeypatch.setattr(Shelf, "_on_host", lambda shelf, part: moved.append(part.shape) or original(shelf, part))
    for on_host in (False, True):
        monkeypatch.setattr(patch, "better_on_host", lambda *_, answer=on_host: answer)
        for chunk in (7, 2):
            edits[on_host, chunk] = graph.edit(plan, interpolation, model=graph.slim(2), chunk=chunk)
        assert bool(moved) == on_host
    assert all(torch.equal(edits[True, chunk], edits[False, chunk]) for chunk in (7, 2))


def test_predictions_for_latents_in_ram_are_copied_run_by_run():
    rows = sorted(random.sample(range(40), 25))
    runs = [rows[start:stop] for start, stop in evaluator._runs(rows)]
    assert list(chain(*runs)) == rows
    assert all(run == list(range(run[0], run[0] + len(run))) for run in runs)
    assert all(before[-1] + 1 < after[0] for before, after in pairwise(runs)), "as few as there can be"


@pytest.mark.parametrize("patched", [False, True], ids=["alone", "with a patch that may hold on to them"])
def test_skip_connections_of_chunks_that_wait_go_to_host_memory(patched, monkeypatch):
    """Whatever a chunk has left behind is empty while another is computed, but for what it made last."""
    graph = Graph("sd1", frames=7, steps=2)
    plan, model, parked, emptied = each_frame(graph.descriptors), graph.model.clone(), [], []
    monkeypatch.setattr(patch, "better_on_host", lambda *_: True)
    made, leave = ParkedSkips.made, ParkedSkips.leave

    def made_and_seen(skips, number, skip):
        parked.append((skips, number, weakref.ref(skip)))
        made(skips, number, skip)

    def leave_and_look(skips):
        leave(skips)
        emptied.append(
            {n: s().untyped_storage().nbytes() for owner, n, s in parked if owner is skips and s() is not None}
        )

    monkeypatch.setattr(ParkedSkips, "made", made_and_seen)
    monkeypatch.setattr(ParkedSkips, "leave", leave_and_look)
    if patched:
        model.set_model_input_block_patch(lambda h, options: h)
    whole = graph.edit(plan, model=model, chunk=7)
    assert not emptied
    parts = graph.edit(plan, model=model, chunk=2)
    assert oracles.relative_error(parts, whole) < 1e-5
    assert bool(emptied) != patched
    for sizes in emptied:  # in the encoder all are empty, in the decoder all but the next one's
        assert sum(size > 0 for size in sizes.values()) <= 4
    assert not emptied or max(len(sizes) for sizes in emptied) == 12


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 1.0)])
def test_keys_and_values_of_one_layer_are_held_at_a_time(shares, monkeypatch):
    graph, held, publish = Graph("sd1", frames=7, steps=2), [], Exchange.publish

    def published(exchange, key, chunk, part):
        publish(exchange, key, chunk, part)
        held.append({layer for branch, layer, kind in exchange._published})

    monkeypatch.setattr(Exchange, "publish", published)
    graph.edit(each_frame(graph.descriptors), shares=shares, chunk=2)
    assert {len(layers) for layers in held} == {1} and len(set.union(*held)) > 1


@pytest.mark.parametrize("hooked", [False, True], ids=["alone", "with a hook that reads it"])
def test_what_a_decoder_block_takes_in_is_dropped_before_its_attention(hooked):
    """ComfyUI's forward holds on to it until the block is done."""
    graph = Graph("sd1", frames=5, steps=2)
    plan, seen, sizes = select(graph.descriptors, -1.0, -1.0, max_clip=2), [], []
    before = graph.edit(plan, chunk=1)
    res_block, transformer = graph.model.model.diffusion_model.output_blocks[-1][:2]
    hooks = [
        res_block.in_layers[0].register_forward_pre_hook(lambda norm, args: seen.append(weakref.ref(args[0]))),
        transformer.norm.register_forward_pre_hook(lambda norm, args: sizes.append(seen[-1]().numel())),
    ]
    if hooked:
        hooks.append(res_block.register_forward_hook(lambda block, args, out: None))
    try:
        assert torch.equal(graph.edit(plan, chunk=1), before)
    finally:
        for hook in hooks:
            hook.remove()
    assert sizes and all((size > 0) == hooked for size in sizes)


def test_what_is_parked_comes_back_with_its_bits():
    skips = [torch.randn(2, 3, 4, 5), torch.randn(2, 5, 4, 3).permute(0, 3, 2, 1), torch.randn(9, 4)[2:5]]
    before, park = [skip.clone() for skip in skips], ParkedSkips()
    for number, skip in enumerate(skips):
        park.made(number, skip)
    park.made(3, torch.randn(5))  # nobody holds that one
    park.leave()
    park.leave()
    assert park.away == 2 and [skip.untyped_storage().nbytes() > 0 for skip in skips] == [False, False, True]
    for number in (3, 2, 1, 1, 0):
        park.come_back(number)
    assert park.away == 0 and all(map(torch.equal, skips, before))


@pytest.mark.parametrize("failing", ["joint", "propagation"])
def test_out_of_memory_moves_what_waits_to_host_memory_before_the_chunk_is_halved(failing, monkeypatch, caplog):
    """As on a GPU, which a CPU stands for here."""
    graph = Graph("sd1", frames=6, steps=2)
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=2, mode="fixed")
    whole, rows, failed = graph.edit(plan, chunk=6, cfg=1.0), [], []
    monkeypatch.setattr(evaluator, "has_host", lambda device: True)

    def wrapper(executor, x, *args, **kwargs):
        step_pass = args[4].get("adaflow")
        rows.append(x.shape[0])
        if ("Propagation" in type(step_pass).__name__) == (failing == "propagation") and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("injected")
        return executor(x, *args, **kwargs)

    model = graph.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    assert torch.equal(graph.edit(plan, model=model, chunk=6, cfg=1.0), whole)
    assert failed and "wait in host memory" in caplog.text and "going on with" not in caplog.text


def test_a_forward_never_holds_more_than_a_chunk():
    graph = Graph("sd1", frames=7, steps=2)
    rows = []

    def wrapper(executor, x, *args, **kwargs):
        rows.append(x.shape[0])
        return executor(x, *args, **kwargs)

    model = graph.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    patched = graph.patch(each_frame(graph.descriptors), model, chunk=2)
    plain_euler(patched, graph.latent, graph.sigmas(), graph.positive, graph.negative, 1.0)
    assert max(rows) == 2


def test_out_of_memory_in_the_joint_pass_halves_the_chunk():
    graph = Graph("sd1", frames=6, steps=2)
    plan = each_frame(graph.descriptors)

    def wrapper(executor, x, *args, **kwargs):
        if x.shape[0] > 4 and args[4].get("adaflow") is not None:
            raise torch.OutOfMemoryError("injected")
        return executor(x, *args, **kwargs)

    model = graph.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    assert oracles.relative_error(graph.edit(plan, model=model), graph.edit(plan)) < 1e-5


def test_out_of_memory_with_regional_prompts_gives_up_with_advice():
    """Their keyframes cannot be split, so trying again would never end."""
    graph = Graph("sd1", frames=4, steps=2)

    def wrapper(executor, x, *args, **kwargs):
        if args[4].get("adaflow") is not None:
            raise torch.OutOfMemoryError("injected")
        return executor(x, *args, **kwargs)

    model = graph.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    positive = [graph.positive[0], [graph.source[0][0], {"area": (4, 6, 2, 4), "strength": 0.5}]]
    with pytest.raises(RuntimeError, match=r"out of memory with 4 frames.*fewer keyframes"):
        graph.edit(each_frame(graph.descriptors), model=model, positive=positive)


def test_without_greenlet_all_keyframes_go_in_one_batch(monkeypatch):
    graph = Graph("sd1", frames=4, steps=2)
    plan = each_frame(graph.descriptors)
    whole = graph.edit(plan, chunk=4)
    monkeypatch.setattr(lockstep, "greenlet", None)
    assert torch.equal(graph.edit(plan, chunk=2), whole)


def test_regional_prompts_keep_the_keyframes_in_one_batch():
    """ComfyUI decides how it batches several prompts of a branch, so they are not run in lockstep."""
    graph = Graph("sd1", frames=5, steps=2)
    plan = each_frame(graph.descriptors)
    positive = [graph.positive[0], [graph.source[0][0], {"area": (4, 6, 2, 4), "strength": 0.5}]]
    whole = graph.edit(plan, positive=positive, chunk=5)
    assert oracles.relative_error(graph.edit(plan, positive=positive, chunk=2), whole) < 1e-5


def test_workers_take_turns_and_what_they_give_is_joined_in_order():
    exchange, order = Exchange([1, 2, 1]), []

    def worker(party):
        for round_ in range(3):
            order.append((round_, party))
            exchange.publish(round_, party, torch.full(([1, 2, 1][party], 2), 10 * round_ + party))
            exchange.meet()
            assert exchange.take(round_).tolist() == [[10 * round_ + p] * 2 for p in (0, 1, 1, 2)]
        return party

    assert run_in_lockstep([lambda p=p: worker(p) for p in range(3)]) == [0, 1, 2]
    assert order == sorted(order)
    assert not exchange._published and not exchange._taken


def test_a_failure_ends_the_others_with_their_finally_run():
    exchange, ended = Exchange([1, 1, 1]), []

    def worker(party):
        try:
            exchange.publish("a", party, torch.zeros(1))
            exchange.meet()
            if party == 1:
                raise KeyError("boom")
            exchange.meet()
        finally:
            ended.append(party)

    with pytest.raises(KeyError, match="boom"):
        run_in_lockstep([lambda p=p: worker(p) for p in range(3)])
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize("end", ["success", "exception", "cancel"])
def test_nothing_stays_on_the_shelf(end, monkeypatch):
    """Activations on host memory are gone at the end, while an error's traceback is still held."""
    graph = Graph("sd1", frames=6, steps=2)
    plan, parts, calls, original = select(graph.descriptors, -1.0, -1.0, max_clip=2), [], count(), Shelf._on_host
    monkeypatch.setattr(patch, "better_on_host", lambda *_: True)

    def on_host(shelf, part):
        buffer = original(shelf, part)
        parts.append(weakref.ref(buffer))
        return buffer

    def wrapper(executor, x, *args, **kwargs):
        if "EditPropagation" in type(args[4].get("adaflow")).__name__ and next(calls) == 1 and end != "success":
            assert any(part() is not None for part in parts)
            if end == "exception":
                raise KeyError("somebody's patch")
            comfy.model_management.interrupt_current_processing(True)
        return executor(x, *args, **kwargs)

    monkeypatch.setattr(Shelf, "_on_host", on_host)
    model = graph.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    failure = (KeyError, comfy.model_management.InterruptProcessingException)
    with nullcontext() if end == "success" else pytest.raises(failure) as raised:
        graph.edit(plan, model=model, chunk=1)
    assert parts and not [part for part in parts if part() is not None]
    del raised


def test_rows_that_the_next_request_wants_are_brought_before_it():
    parts = {key: torch.randn(5, 2, 3) for key in "abc"}
    shelf, copied = Shelf(torch.device("cpu"), on_host=True), []
    for key, part in parts.items():
        shelf.put(key, part[:2])
        shelf.put(key, part[2:])
    copy, shelf._copy = shelf._copy, lambda *asked: copied.append(asked) or copy(*asked)
    for start, stop, ahead in ((0, 3, 0), (1, 5, 2), (1, 5, 2), (4, 5, 2)):
        for number, key in enumerate(parts):
            before = len(copied)
            assert torch.equal(shelf.rows(key, start, stop), parts[key][start:stop])
            if number and ahead:
                assert (key, start, stop) in copied[:before]
    assert len(copied) <= 4 * len(parts) + 2  # nothing is brought twice, and little in vain
