"""The Triton kernels against the oracle, in Triton's interpreter on the CPU; ``test_gpu.py`` runs them compiled.

The interpreter multiplies bfloat16 wrongly, so that is left to the GPU.
"""

import oracles
import pytest
import torch
from adaflow_pack.adaflow import attention
from interpreted_kernel import CASES, PROMPTS, interpreted

TOLERANCE = {"float16": 1e-3, "float32": 1e-5}


@pytest.fixture(scope="module")
def errors():
    return interpreted("interpreted_kernel.py")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_kernel_equals_the_oracle(errors, case):
    found = errors["-".join(map(str, case))]
    assert len(found) == 3 and max(found) < TOLERANCE[case[2]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_kernel_for_prompts_equals_the_oracle(errors, case):
    found = errors["prompt-" + "-".join(map(str, case))]
    assert len(found) == len(PROMPTS) and max(found) < TOLERANCE[case[2]]


def test_tiles_of_keys_hold_a_prompt_and_little_more(errors):
    """Powers of two of 16 or more, which a product needs; 80 for CLIP's 77 tokens."""
    for keys, (first, rest) in enumerate(errors["key tiles"], 1):
        assert keys <= first + rest <= max(16, 2 * keys)
        assert all(side in (16, 32, 64, 128, 256) for side in (first, rest or 16))
    assert errors["key tiles"][76] == [64, 16]


def test_attention_to_a_prompt_on_the_cpu_equals_the_oracle():
    q, k, v = torch.randn(2, 7, 32), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    expected = [oracles.attention(*rows, 4) for rows in zip(q.double(), k.double(), v.double(), strict=True)]
    assert oracles.relative_error(attention.prompt_attention(q, k, v, 4), torch.stack(expected)) < 1e-6
    both = torch.cat([q[:1], q[:1]])
    found = attention.prompt_attention(both, k[:1], v[:1], 4)
    assert oracles.relative_error(found, torch.stack([expected[0]] * 2)) < 1e-6


def test_images_that_cannot_share_prompts_evenly_are_refused():
    q, k = torch.randn(5, 7, 32), torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="5 images cannot share 2 prompts"):
        attention.prompt_attention(q, k, k, 4)


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
    for works, more in ((attention._kernel_works, ()), (attention._prompt_kernel_works, (torch.float16, 77, 40))):
        works.cache_clear()
        caplog.clear()
        assert not works(torch.device("cpu"), *more)
        assert "PyTorch's own is used" in caplog.text
        works.cache_clear()
