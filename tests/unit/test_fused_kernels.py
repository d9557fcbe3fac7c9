"""The fused Triton kernels against the oracles, in Triton's interpreter on the CPU; ``test_gpu.py`` runs them compiled.

The plain operations that take their place without a GPU are held against the same oracles.
"""

import oracles
import pytest
import torch
from adaflow_pack.adaflow import fused
from interpreted_kernel import interpreted

TOLERANCE = {"float16": 4e-4, "float32": 2e-5}
COUNTS = {"group_norm": 6, "geglu": 3, "gated_linear": 6, "add": 2, "add_layer_norm": 8, "upsample": 4}


@pytest.fixture(scope="module")
def errors():
    return interpreted("interpreted_fused.py")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", COUNTS)
def test_a_kernel_equals_its_oracle(errors, name, dtype):
    found = errors[f"{name}-{dtype}"]
    assert len(found) == COUNTS[name] and max(found) < TOLERANCE[dtype]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_the_plain_group_norm_equals_its_oracle(silu, shifted):
    x, weight, bias = torch.randn(3, 35, 60), torch.randn(60).double(), torch.randn(60)
    shift = torch.randn(3, 60) if shifted else None
    found = fused.group_norm(x, 6, weight, bias, 1e-5, silu, shift)
    assert found.is_contiguous()
    assert oracles.relative_error(found, oracles.group_norm(x, 6, weight, bias, 1e-5, silu, shift)) < 1e-5


def test_the_other_plain_operations_equal_their_oracles():
    x, y, weight, bias = torch.randn(3, 7, 40), torch.randn(3, 7, 40), torch.randn(40).double(), torch.randn(40)
    assert oracles.relative_error(fused.geglu(x), oracles.geglu(x)) < 1e-6
    wide, wide_bias = torch.randn(48, 40), torch.randn(48)
    product = x.double() @ wide.double().T + wide_bias.double()
    assert oracles.relative_error(fused.gated_linear(x, wide, wide_bias), oracles.geglu(product)) < 1e-6
    assert oracles.relative_error(fused.add(x, y, bias), x.double() + y.double() + bias.double()) < 1e-6
    total, out = fused.add_layer_norm(x, y, weight, bias, 1e-5)
    assert torch.equal(total, x + y)
    assert oracles.relative_error(out, oracles.layer_norm(total, weight, bias, 1e-5)) < 1e-5
    more, same = fused.add_layer_norm(x, y, weight, bias, 1e-5, weight)
    assert torch.equal(more, total + weight.float()) and torch.equal(same, out)
    rows, columns = ([0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3])  # of 3x4 tokens, 5x8
    nearest = fused.upsample(x[:, :, :5].repeat(1, 2, 1)[:, :12], (3, 4), (5, 8)).unflatten(1, (5, 8))
    assert torch.equal(nearest, x[:, :, :5].repeat(1, 2, 1)[:, :12].unflatten(1, (3, 4))[:, rows][:, :, columns])


def test_kernels_that_cannot_run_are_said_and_not_used(caplog):
    """Without a GPU they cannot be launched."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels run")
    fused.kernels_work.cache_clear()
    assert not fused.kernels_work(torch.device("cpu"))
    assert "run as they are" in caplog.text
    fused.kernels_work.cache_clear()
