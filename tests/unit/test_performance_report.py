"""The page that benchmarks/performance_report.py writes, from results made up here."""

import importlib
import json

import pytest


@pytest.fixture
def benchmarks(root, monkeypatch):
    """Modules of the benchmarks folder by name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def made_up_case(**changes):
    seconds = {"step injecting": {"seconds": 6.0, "peak GiB": 5.0}, "step past injection": {"seconds": 4.0}}
    return {"keyframes": 40, "budget": 20, "compiled": False, "peak GiB": 5.5} | seconds | changes


def test_every_case_stands_in_the_table(benchmarks, tmp_path, monkeypatch):
    report = benchmarks("performance_report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    both = [made_up_case(), made_up_case(compiled=True, **{"extrapolated, whole edit in minutes": 7.21})]
    content = {"options": {"frames": 1000, "memory": 6.0}, "cases": both}
    (tmp_path / "h200-performance-x.json").write_text(json.dumps(content))
    table = report.case_table(report.cases())
    assert "eager, on 6 GiB" in table and "compiled, on 6 GiB" in table
    assert "| H200 | 1000 | 40 | 20 | 6.0 | 4.0 | 5.5 | 7.2 |" in table
    assert report.attention_table() == report.ratio_table() == report.profile_table() == report.MISSING


def test_targets_are_held_against_what_several_files_say(benchmarks, tmp_path, monkeypatch):
    report = benchmarks("performance_report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(name, cases, frames=1000, memory=0.0, **more):
        content = {"options": {"frames": frames, "memory": memory}, "cases": cases, **more}
        (tmp_path / f"h100-performance-{name}.json").write_text(json.dumps(content))

    inversion = {
        "inversion, 5 steps, descriptors taken": {"seconds": 20.0, "peak GiB": 7.25},
        "inversion, first step, descriptors taken": {"seconds": 6.0},
        "inversion, each further step": {"seconds": 3.5},
    }
    whole = {"matching, 50 draws": {"seconds": 11.0, "peak GiB": 2.0}, "extrapolated, whole edit in minutes": 7.4}
    broken_off = {"keyframes": 40, "budget": 20, "compiled": True, "seconds of each step": [7.0]}
    failed = broken_off | {"error": "OutOfMemoryError"}
    write("a", [made_up_case(**whole), broken_off, failed], **inversion)
    write("b", [made_up_case(memory=4.0, **{"step injecting": {"seconds": 9.0, "peak GiB": 3.9}, "peak GiB": 3.9})])
    steps = {"step injecting": {"seconds": 25.0, "peak GiB": 6.0}, "step past injection": {"seconds": 15.0}}
    write("c", [made_up_case(keyframes=160, **steps)], frames=4000)
    (tmp_path / "h100-performance-d.json").write_text(json.dumps({"options": {"frames": 1000, "memory": 0.0}}))
    rows = {line.split(" | ")[0].strip("| "): line for line in report.target_table(report.cases()).splitlines()}
    assert "| 6 s | 6.00 s | yes |" in rows["step injecting, eager"]
    assert "| not measured |" in rows["step injecting, compiled"]
    assert "| 5.2 s | 4.00 s | yes |" in rows["step past injection, eager"]
    assert "| 7.5 min | 7.4 min | yes |" in rows["inversion, selection and 50 steps, eager"]
    assert "| 15 s | 13.5 s | yes |" in rows["descriptors and matching, 50 draws"]
    assert "| 6 GiB | 7.2 GiB | **no** |" in rows["peak GPU memory"]
    assert "| 4 GiB | 3.9 GiB | yes |" in rows["peak GPU memory in a low-memory setting, a GPU made to have 4 GiB"]
    assert (
        "| 1.5 times | 1.43 times | yes |" in rows["50 steps there, against the whole GPU"]
    )  # (360 + 40) / (240 + 40)
    assert "| not measured |" in rows["peak GPU memory of 400 keyframes in one joint pass"]
    per_frame = rows["time for each frame of a step, 4000 frames against 1000"]  # (1000 + 150) / 4 / (240 + 40)
    assert "| 1.1 times | 1.03 times | yes |" in per_frame
    assert "| 1.1 times | 1.00 times | yes |" in rows["peak GPU memory of a step, 4000 frames against 1000"]


def test_4000_frames_on_a_small_gpu_are_held_against_1000_on_a_whole_one(benchmarks, tmp_path, monkeypatch):
    report = benchmarks("performance_report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    both = {1000: made_up_case(), 4000: made_up_case(keyframes=160, memory=6.0, **{"peak GiB": 6.6})}
    for frames, case in both.items():
        content = {"options": {"frames": frames, "memory": 0.0}, "cases": [case]}
        (tmp_path / f"h200-performance-{frames}.json").write_text(json.dumps(content))
    table = report.target_table(report.cases())
    assert "1000, 4000 on a GPU made to have 6 GiB | - | 1.1 times | 0.25 times | yes |" in table
    assert "6 GiB | TokenFlow ends at about 560 frames | 1.1 times | 1.20 times | **no** |" in table
    tables = report.sections()
    assert "6.00 s" in tables["targets on an H200"] and "6.00 s" not in tables["targets on an H100"]


def test_a_backend_that_does_not_run_is_said(benchmarks, tmp_path, monkeypatch):
    report, timed = benchmarks("performance_report"), {"ms": 2.0, "TFLOP/s": 300.0}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    row = {"tokens": 15, "heads": 2, "query frames": 2, "budget": 2, "gather and SDPA": timed, "kernel": timed}
    content = {"gpu": "H", "commit": "0" * 40, "rows": [row | {"gather and cuDNN": {"error": "no viable backend"}}]}
    (tmp_path / "h100-attention.json").write_text(json.dumps(content))
    assert "| 15 | 2 | 2 | 2 | 2.000 (300) | does not run | 2.000 (300) | 1.00 |" in report.attention_table()


def test_a_section_is_replaced_and_a_missing_one_noticed(benchmarks):
    report = benchmarks("performance_report")
    page = "a\n<!-- cases -->\nold\n<!-- end of cases -->\nb"
    assert report.write_section(page, "cases", "new \\1") == page.replace("old", "new \\1")
    with pytest.raises(ValueError, match="0 sections ratios"):
        report.write_section(page, "ratios", "new")


def test_the_page_is_what_the_results_say(benchmarks):
    """No number on it was edited by hand, or is older than its file."""
    report = benchmarks("performance_report")
    page = report.PAGE.read_text()
    for name, content in report.sections().items():
        assert report.write_section(page, name, content) == page, name


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized>", "convolutions"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half>", "layout changes for convolutions"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("_slim_attention", "attention"),
        ("triton_poi_fused_add_0", "generated by torch.compile"),
        ("void at::native::RowwiseMomentsCUDAKernel<c10::Half>", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies, gathers, concatenations"),
    ],
)
def test_kernels_are_told_apart(benchmarks, kernel, family):
    assert benchmarks("kernel_families").family(kernel) == family
