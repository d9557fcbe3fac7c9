"""The kernel that rates tokens against the oracle, in Triton's interpreter; ``test_gpu.py`` runs it compiled."""

import pytest
import torch
from adaflow_pack.adaflow import slimming
from interpreted_kernel import interpreted

TOLERANCE = {"float16": 1e-4, "float32": 1e-6}  # products are exact in float32, sums of them are not


@pytest.fixture(scope="module")
def errors():
    return interpreted("interpreted_slimming.py")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernel_equals_the_oracle(errors, dtype):
    found = errors[dtype]
    assert len(found) == 2 * (6 + 6 + 1 + 4) + (6 + 2 + 0 + 2) and max(found) < TOLERANCE[dtype]


def test_without_a_gpu_it_is_not_used():
    assert not slimming._kernel_works(torch.device("cpu"))
