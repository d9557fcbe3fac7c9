"""The parts of ``training/`` that decide whether a broken training goes on as if it had not been broken."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "training"))

from common import Clock, Learner, Log, Muon, orthogonal, schedule


def small_learner() -> tuple[nn.Module, Learner]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.BatchNorm1d(32), nn.Linear(32, 16)).bfloat16()
    return module, Learner(module, lambda x, y: (module(x).float() - y.float()).square().mean(), 1e-2)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(24, 16, generator=generator).bfloat16() for _ in range(count)]
    return [(x, x.flip(1)) for x in inputs]


def test_a_resumed_training_has_the_weights_of_an_unbroken_one(tmp_path):
    whole, broken = small_learner(), small_learner()
    pairs = batches(12)
    for i, pair in enumerate(pairs):
        whole[1].step(i / 12, *pair)
    for i, pair in enumerate(pairs[:7]):
        broken[1].step(i / 12, *pair)
    broken[1].save(tmp_path / "state.safetensors")
    resumed = small_learner()
    resumed[1].load(tmp_path / "state.safetensors")
    for i, pair in enumerate(pairs[7:], 7):
        resumed[1].step(i / 12, *pair)
    expected, found = whole[1].averaged(), resumed[1].averaged()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    for one, other in zip(whole[1].master, resumed[1].master, strict=True):
        assert torch.equal(one, other)


def test_a_small_problem_is_learnt():
    _, learner = small_learner()
    losses = [learner.step(i / 300, *pair).item() for i, pair in enumerate(batches(300))]
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])


@pytest.mark.parametrize("shape", [(3, 40, 100), (2, 100, 40), (1, 16, 16)])
def test_singular_values_are_brought_near_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.max() < 1.3
    assert values[:, : values.shape[1] // 2].min() > 0.6  # the smallest ones need more iterations


def test_muon_moves_each_matrix_by_the_rate():
    parameters = [torch.randn(32, 8, 3, 3), torch.randn(32, 72), torch.randn(64, 32)]
    before = [value.clone() for value in parameters]
    for value in parameters:
        value.grad = torch.randn_like(value)
    Muon(parameters, torch.tensor(0.01), decay=0.0).step()
    for old, new in zip(before, parameters, strict=True):
        assert (new - old).square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)


def test_the_rate_rises_stays_and_falls():
    assert schedule(0.0, 0) < schedule(0.0, 100) < schedule(0.0, 500) == schedule(0.49, 500) > schedule(0.8, 500) > 0


def test_a_stages_seconds_add_up_over_calls(tmp_path):
    Log(tmp_path / "log.jsonl").add("stage", 7.0, step=3)
    clock = Clock(Log(tmp_path / "log.jsonl"), "stage", 8.0, call_ends=float("inf"))
    assert 7.0 <= clock.used < 8.0
    assert not clock.finished
    assert Clock(Log(tmp_path / "log.jsonl"), "stage", 6.0, float("inf")).finished
