"""The Triton kernel against the oracle, in Triton's interpreter on the CPU; ``test_gpu.py`` runs it compiled.

The interpreter multiplies bfloat16 wrongly, so that is left to the GPU.
"""

import pytest
import torch
from adaflow_pack.adaflow import attention
from interpreted_kernel import CASES, interpreted

TOLERANCE = {"float16": 1e-3, "float32": 1e-5}


@pytest.fixture(scope="module")
def errors():
    return interpreted("interpreted_kernel.py")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_kernel_equals_the_oracle(errors, case):
    found = errors["-".join(map(str, case))]
    assert len(found) == 3 and max(found) < TOLERANCE[case[2]]


def test_on_the_cpu_the_plain_backend_is_used(monkeypatch):
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "triton")
    q, k = torch.randn(2, 7, 32), torch.randn(3, 7, 32)
    kept = torch.stack([torch.randperm(21)[:10] for _ in range(2)])
    plain = attention.gathered_attention(q, k, k, 2, kept)
    assert torch.equal(attention.extended_attention(q, k, k, 2, kept), plain)


def test_a_kernel_that_cannot_run_is_said_and_not_used(caplog):
    """Without a GPU it cannot be launched."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernel runs")
    attention._kernel_works.cache_clear()
    assert not attention._kernel_works(torch.device("cpu"))
    assert "PyTorch's own is used" in caplog.text
    attention._kernel_works.cache_clear()
