"""The Triton kernel against the oracle, in Triton's interpreter on the CPU; ``test_gpu.py`` runs it compiled.

The interpreter multiplies bfloat16 wrongly, so that is left to the GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from adaflow_pack.adaflow import attention
from interpreted_kernel import CASES

TOLERANCE = {"float16": 1e-3, "float32": 1e-5}


@pytest.fixture(scope="module")
def errors(root):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton: torch's builds for NVIDIA GPUs on Linux bring it along")
    script = root / "tests" / "unit" / "interpreted_kernel.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stderr:
        pytest.skip("Triton before 3.7 cannot interpret loops with this numpy")
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


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
