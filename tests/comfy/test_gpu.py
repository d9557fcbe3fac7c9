"""On a CUDA device: the same results as on the CPU, the full size in half precision, and no memory left behind.

What it measures is written as JSON to ``$ADAFLOW_GPU_RESULTS``, if set; a run on one is in ``benchmarks/results``.
"""

import copy
import gc
import json
import os
import time
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import oracles
import pytest
import torch
from adaflow_pack.adaflow import attention, fused, matching
from adaflow_pack.adaflow import plan as plan_module
from adaflow_pack.adaflow.correspondence import matching_dtype, nearest_indices
from adaflow_pack.nodes.patching import fast_blocks, patch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import WrappersMP
from graph import Graph, plain_euler, select
from models import SD2_FULL, SHAPES, clip_latent, random_model, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; benchmarks/results has a run on one"),
]
RESULTS = {}


@pytest.fixture(scope="module", autouse=True)
def results():
    """Exact float32 while the module runs; the results file at its end."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    path = os.environ.get("ADAFLOW_GPU_RESULTS")
    if path and torch.cuda.is_available():
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        Path(path).write_text(json.dumps(about | RESULTS, indent=2) + "\n")


@pytest.mark.parametrize("interpolation", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_gives_what_the_cpu_gives(shape, interpolation, monkeypatch):
    for module in (matching, plan_module):  # in half precision another token may follow where two resemble it alike
        monkeypatch.setattr(module, "matching_dtype", lambda device: torch.float32)
    edits = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        graph = Graph(shape, steps=3, model=small_model(shape, device=device))
        plan = select(graph.descriptors, -1.0, -1.0, max_clip=2, mode="schedule", schedule="0,3,4")
        edits.append(graph.edit(plan, interpolation, model=graph.slim(2)).cpu())
    found = oracles.relative_error(edits[1], edits[0])
    RESULTS[f"edit on GPU against CPU, float32, {shape}, interpolation {interpolation}"] = found
    assert found < 2e-4


def test_tokens_matched_in_half_precision_are_as_near_as_the_nearest():
    query, key = torch.nn.functional.normalize(torch.randn(2, 4032, 640, dtype=torch.float64, device="cuda"), dim=-1)
    key = torch.nn.functional.normalize(query[torch.randperm(4032, device="cuda")] + 0.5 * key, dim=-1)
    dtype, found = matching_dtype("cuda"), torch.empty(4032, dtype=torch.int16, device="cuda")
    nearest_indices(query.to(dtype), key.to(dtype), found)
    cosines = query @ key.T
    lost = (cosines.max(1).values - cosines.gather(1, found.long()[:, None])[:, 0]).max().item()
    RESULTS[f"cosine lost by matching in {dtype}, at most"] = lost
    assert lost < 1e-3


@pytest.mark.parametrize("frames, tokens, channels", [(3, 4032, 640), (9, 1001, 640), (40, 63, 320), (5, 252, 1000)])
def test_the_kernel_that_rates_tokens_equals_the_oracle(frames, tokens, channels):
    from adaflow_pack.adaflow.slimming_triton import rate

    maps = torch.randn(frames + 2, tokens, channels, device="cuda") + 0.3 * torch.randn(channels, device="cuda")
    maps = torch.nn.functional.normalize(maps, dim=-1).half()
    first, second = maps[:frames], maps[frames:]
    of_second, of_first = (maps.new_empty(*n, tokens, dtype=torch.float32) for n in ((frames, 2), (2, frames)))
    rate(first, second, of_second, of_first)
    among = of_second.new_empty(frames, frames, tokens)
    rate(first, first, among, among)
    errors = []
    for i in range(frames):
        rated = oracles.importance(maps.double(), i)
        errors.append(oracles.relative_error(of_second[i], rated[frames:]))
        others = [frame for frame in range(frames) if frame != i]
        errors.append(oracles.relative_error(among[i, others], rated[others]))
    for j in range(2):
        errors.append(oracles.relative_error(of_first[j], oracles.importance(maps.double(), frames + j)[:frames]))
    RESULTS[f"kernel that rates tokens, {frames} frames of {tokens} tokens, {channels} channels"] = max(errors)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("heads, channels", [(8, 40), (5, 64), (8, 80), (8, 160)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_the_attention_kernel_equals_the_oracle(dtype, tolerance, heads, channels):
    from adaflow_pack.adaflow.attention_triton import slim_attention

    tokens, kept_tokens = 1001, 3003
    shapes = (3, tokens), (7, tokens), (7, tokens)
    q, k, v = (torch.randn(*shape, heads * channels, device="cuda").to(dtype) for shape in shapes)
    kept = torch.stack([torch.randperm(7 * tokens, device="cuda")[:kept_tokens].sort().values for _ in range(3)])
    out = slim_attention(q, k, v, heads, kept.int())
    flat_k, flat_v = (x.flatten(0, 1).double() for x in (k, v))
    expected = [oracles.attention(q[i].double(), flat_k[rows], flat_v[rows], heads) for i, rows in enumerate(kept)]
    found = oracles.relative_error(out, torch.stack(expected))
    plain = oracles.relative_error(attention.gathered_attention(q, k, v, heads, kept), torch.stack(expected))
    RESULTS[f"attention kernel, heads of {channels}, {dtype}"] = {"kernel": found, "PyTorch's": plain}
    assert found < tolerance


@pytest.mark.parametrize("keys", [77, 231])
@pytest.mark.parametrize("heads, channels", [(8, 40), (5, 64), (8, 80), (8, 160)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_the_attention_kernel_for_prompts_equals_the_oracle(dtype, tolerance, heads, channels, keys, monkeypatch):
    """Where it compiles: heads of 160 channels and long prompts take more shared memory than small GPUs have."""
    monkeypatch.delenv(attention.BACKEND_VARIABLE, raising=False)
    q, k, v = (torch.randn(3, tokens, heads * channels, device="cuda").to(dtype) for tokens in (1001, keys, keys))
    expected = torch.stack([oracles.attention(*(x[i].double() for x in (q, k, v)), heads) for i in range(3)])
    found = oracles.relative_error(attention.prompt_attention(q, k, v, heads), expected)
    plain = oracles.relative_error(attention.frame_attention(q, k, v, heads), expected)
    compiled = attention._prompt_kernel_works(q.device, dtype, keys, channels)
    assert compiled or channels * keys > 64 * 128
    RESULTS[f"attention kernel for prompts of {keys} tokens, heads of {channels}, {dtype}"] = {
        "kernel": found if compiled else "does not run",
        "PyTorch's": plain,
    }
    assert found < tolerance


@pytest.mark.parametrize("channels, tokens", [(320, 4032), (960, 1008), (2560, 66), (1920, 252)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-4), (torch.bfloat16, 3e-3)])
def test_the_fused_kernels_equal_the_oracles(dtype, tolerance, channels, tokens):
    x, y = ((torch.randn(3, tokens, channels, device="cuda") + 5).to(dtype) for _ in range(2))
    shift, (weight, bias) = (torch.randn(n, channels, device="cuda").to(dtype) for n in (3, 2))
    total, normed = fused.add_layer_norm(x, y, weight, bias, 1e-5)
    found = {
        "group_norm": (
            fused.group_norm(x, 32, weight, bias.float(), 1e-5, True, shift),
            oracles.group_norm(x, 32, weight, bias, 1e-5, True, shift),
        ),
        "add": (fused.add(x, y, bias), x.double() + y.double() + bias.double()),
        "geglu": (fused.geglu(x - 5), oracles.geglu(x - 5)),
        "add_layer_norm": (normed, oracles.layer_norm(total, weight, bias, 1e-5)),
        "add_layer_norm, after": (
            fused.add_layer_norm(x, y, weight, bias, 1e-5, shift[0])[0],
            total.double() + shift[0].double(),
        ),
    }
    errors = {name: oracles.relative_error(*pair) for name, pair in found.items()}
    RESULTS[f"fused kernels, {channels} channels, {tokens} tokens, {dtype}"] = errors
    assert max(errors.values()) < tolerance


@pytest.mark.parametrize("channels, tokens", [(320, 4032), (640, 1008), (1280, 66)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-4), (torch.bfloat16, 3e-3)])
def test_a_product_with_geglu_equals_the_oracle(dtype, tolerance, channels, tokens):
    x, weight = torch.randn(3, tokens, channels, device="cuda"), torch.randn(8 * channels, channels, device="cuda")
    x, weight, bias = (t.to(dtype) for t in (x, weight / channels**0.5, weight[:, 0]))
    product = x.double() @ weight.double().T + bias.double()
    found = oracles.relative_error(fused.gated_linear(x, weight, bias), oracles.geglu(product))
    by_kernel = fused._product_is_faster(x, weight) and fused._product_works(x.device, dtype)
    assert by_kernel == (torch.cuda.get_device_capability() == (9, 0) and channels < 1280)
    RESULTS[f"product with GEGLU, {channels} channels, {dtype}"] = {
        "relative error": found,
        "by the kernel": by_kernel,
    }
    assert found < tolerance


def test_a_product_with_geglu_of_what_tiles_cannot_be_copied_from_is_pytorchs():
    """Rows that begin at no multiple of 16 bytes."""
    x, weight = torch.randn(9 * 320 + 1, device="cuda").half(), torch.randn(2560, 320, device="cuda").half()
    odd, bias = x[1:].view(1, 9, 320), weight[:, 0]
    assert not fused._product_is_faster(odd, weight)
    assert torch.equal(
        fused.gated_linear(odd, weight, bias), fused.geglu(torch.nn.functional.linear(odd, weight, bias))
    )


@pytest.mark.parametrize("channels, size, to", [(320, (24, 42), (48, 84)), (1280, (6, 11), (12, 21))])
def test_the_upsampling_kernel_gives_pytorchs_bits(channels, size, to):
    image = torch.randn(3, channels, *size, device="cuda").half()
    found = fused.upsample(image.permute(0, 2, 3, 1).flatten(1, 2).contiguous(), size, to)
    expected = torch.nn.functional.interpolate(image, to, mode="nearest")
    assert torch.equal(found.unflatten(1, to).permute(0, 3, 1, 2), expected)


@pytest.fixture(scope="module")
def full_size():
    """SD 2.1's UNet with random weights, half precision, and the clip that it inverted at 384x672."""
    with torch.inference_mode():
        model = random_model(SD2_FULL, "eps", 0, torch.float16, draw_on="cuda")
        model.model.diffusion_model.out[-1].weight.mul_(0.5)
        context = [[torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(4)), {}]]
        graph = Graph("sd2", latent=clip_latent(240, (48, 84)), steps=2, model=model, source=context)
        graph.positive = [[context[0][0].flip(1), {}]]
        graph.negative = [[context[0][0].flip(2), {}]]
        yield graph


def held() -> int:
    """Bytes of tensors on the GPU, not of the blocks that they lie in: those may be larger once a layout changed."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def one_step(graph, plan, shares, model=None, **changes):
    model = graph.patch(plan, graph.slim(8, model=model), shares, **changes)
    sigma = graph.trajectory.sigmas[-1]
    return plain_euler(model, graph.latent, [sigma, 0.0], graph.positive, graph.negative, 7.5)


def test_half_precision_at_full_size(full_size):
    plan = select(full_size.descriptors, -1.0, -1.0, max_clip=24, mode="fixed")
    half = one_step(full_size, plan, (1.0, 1.0))
    single = random_model(SD2_FULL, "eps", 0, torch.float32, draw_on="cuda")
    single.model.diffusion_model.load_state_dict(full_size.model.model.diffusion_model.state_dict())
    found = oracles.relative_error(half, one_step(full_size, plan, (1.0, 1.0), model=single))
    RESULTS["one step at full size, float16 against float32"] = found
    assert found < 2e-2


def test_a_step_with_the_attention_kernel(full_size, monkeypatch):
    plan = select(full_size.descriptors, -1.0, -1.0, max_clip=24, mode="fixed")
    steps = []
    for backend in ("sdpa", "triton"):
        monkeypatch.setenv(attention.BACKEND_VARIABLE, backend)
        steps.append(one_step(full_size, plan, (1.0, 1.0)))
    assert attention._kernel_works(torch.device("cuda", torch.cuda.current_device()))
    found = oracles.relative_error(steps[1], steps[0])
    RESULTS["one step at full size, float16, attention kernel against PyTorch's"] = found
    assert found < 1e-2


def test_fast_blocks_are_as_exact_as_their_own_forwards(full_size):
    """Both in float16, against the own forward in float32; every block of the UNet."""
    errors = {}
    with torch.inference_mode():
        for name, block in full_size.model.model.diffusion_model.named_modules():
            if type(block) is ResBlock:
                x, channels = torch.randn(2, block.channels, 12, 21, device="cuda"), block.emb_channels
                rest = (torch.randn(2, channels, device="cuda"),)
            elif type(block) is SpatialTransformer:
                x, rest = torch.randn(2, block.in_channels, 12, 21, device="cuda"), (torch.randn(2, 77, 1024).cuda(),)
            else:
                continue
            half, options = block.to("cuda"), () if type(block) is ResBlock else ({},)
            exact = copy.deepcopy(block).float()(x, *rest, *options)
            args = (x.half(), *(values.half() for values in rest), *options)
            own, fast = half(*args), fast_blocks.run(half, refused, args, lambda number: None)
            errors[name] = [oracles.relative_error(out, exact) for out in (own, fast)]
            assert errors[name][1] < max(1.2 * errors[name][0], 1e-3)
    own, fast = (max(pair[index] for pair in errors.values()) for index in (0, 1))
    RESULTS["blocks at full size, float16 against float32, largest"] = {"own": own, "fast": fast}
    assert len(errors) == 22 + 16


def refused(*_):
    raise AssertionError("the block ran as it is")


def test_a_step_with_fast_blocks(full_size, monkeypatch):
    plan, steps, found = select(full_size.descriptors, -1.0, -1.0, max_clip=24, mode="fixed"), {}, {}
    for kind in ("own", "fast", "own", "fast"):  # the first two warm up
        monkeypatch.setenv(fast_blocks.VARIABLE, kind)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        steps[kind] = one_step(full_size, plan, (1.0, 1.0), chunk=32)
        torch.cuda.synchronize()
        found[kind] = {"seconds": time.perf_counter() - started, "peak GiB": torch.cuda.max_memory_allocated() / 2**30}
    assert fused.kernels_work(torch.device("cuda", torch.cuda.current_device()))
    difference = oracles.relative_error(steps["fast"], steps["own"])
    RESULTS["one step at full size, float16, fast blocks against their own forwards"] = {
        "difference": difference
    } | found
    assert 0 < difference < 1e-2


@pytest.mark.parametrize("what", ["activations", "latents"])
def test_what_waits_in_host_memory(full_size, what, monkeypatch):
    """Activations of keyframes keep every bit; a sampler's arithmetic on latents is rounded otherwise in RAM."""
    plan, found = select(full_size.descriptors, -1.0, -1.0, max_clip=6, mode="fixed"), {}
    for there in (False, True, False, True):  # the first two warm up
        monkeypatch.setattr(patch, "better_on_host", lambda *_, yes=there and what == "activations": yes)
        monkeypatch.setattr(patch, "_better_in_ram", lambda *_, yes=there and what == "latents": yes)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        out = one_step(full_size, plan, (1.0, 1.0), chunk=8)
        torch.cuda.synchronize()
        found[there] = out, time.perf_counter() - started, torch.cuda.max_memory_allocated()
    difference = oracles.relative_error(found[True][0], found[False][0])
    assert difference == 0 if what == "activations" else difference < 1e-6
    assert found[True][2] < found[False][2]
    RESULTS[f"step of 240 frames, 40 keyframes, budget 8, by where {what} are"] = {
        "on the device" if not there else "in RAM": {"seconds": seconds, "peak GiB": peak / 2**30}
        for there, (_, seconds, peak) in found.items()
    } | {"difference": difference}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc"])
def test_an_edit_with_a_noise_mask_and_its_latents_in_ram(sampler, monkeypatch):
    """As ComfyUI hands them on; its mask and the latents under it go there with them, and previews come back."""
    graph, edits, seen = Graph("sd2", steps=3, model=small_model("sd2", device=torch.device("cuda"))), {}, []
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=2, mode="schedule", schedule="0,3,4")
    mask = torch.zeros(len(graph.latent), 1, *graph.latent.shape[2:])
    mask[..., : mask.shape[-1] // 2] = 1.0
    for in_ram in (False, True):
        monkeypatch.setattr(patch, "_better_in_ram", lambda *_, yes=in_ram: yes)
        edits[in_ram] = comfy.sample.sample_custom(
            graph.patch(plan, graph.slim(2)),
            torch.zeros_like(graph.latent),
            3.0,
            comfy.samplers.sampler_object(sampler),
            graph.sigmas(),
            graph.positive,
            graph.negative,
            graph.latent,
            noise_mask=mask,
            callback=lambda step, denoised, *_: seen.append(denoised.device.type),
            disable_pbar=True,
            seed=0,
        )
    assert set(seen) == {"cuda"}
    assert oracles.relative_error(edits[True][..., -2:], graph.latent[..., -2:]) < 1e-2
    assert oracles.relative_error(edits[True], graph.latent) > 1e-2
    found = oracles.relative_error(edits[True], edits[False])
    RESULTS[f"edit with a noise mask, {sampler}, latents in RAM against on the device"] = found
    assert found < 1e-3


@pytest.mark.parametrize("injecting", [True, False])
def test_memory_and_time_of_a_step(full_size, injecting):
    """Recorded, not asserted: the peak must only return to where it was."""
    plan = select(full_size.descriptors, -1.0, -1.0, max_clip=24, mode="fixed")
    shares = (1.0, 1.0) if injecting else (0.0, 0.0)
    one_step(full_size, plan, shares)
    gc.collect()
    torch.cuda.synchronize()
    before = held()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    one_step(full_size, plan, shares)
    torch.cuda.synchronize()
    name = "injecting" if injecting else "past injection"
    RESULTS[f"step of 240 frames, 10 keyframes, budget 8, {name}"] = {
        "seconds": time.perf_counter() - started,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "model GiB": before / 2**30,
    }
    gc.collect()
    assert held() <= before + 2**20


@pytest.mark.parametrize("end", ["cancel", "exception"])
def test_memory_returns_after(full_size, end):
    plan = select(full_size.descriptors, -1.0, -1.0, max_clip=24, mode="fixed")
    gc.collect()
    before = held()
    calls = iter(range(100))

    def wrapper(executor, *args, **kwargs):
        if next(calls) == 4:
            if end == "exception":
                raise KeyError("somebody's patch")
            comfy.model_management.interrupt_current_processing(True)
        return executor(*args, **kwargs)

    model = full_size.model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    with pytest.raises((KeyError, comfy.model_management.InterruptProcessingException)):
        one_step(full_size, plan, (1.0, 1.0), model=model)
    gc.collect()
    assert held() <= before + 2**20
