"""The benchmarks run, on tiny models: what they find on a GPU is in ``benchmarks/results``."""

import json
import subprocess
import sys

import pytest


def run(root, tmp_path, script: str, *arguments: str) -> dict:
    out = tmp_path / "result.json"
    command = [sys.executable, str(root / "benchmarks" / script), *arguments, "--commit", "given", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert {"gpu", "torch", "commit", "command"} <= set(result) and result["command"].startswith("python benchmarks/")
    return result


def test_performance(root, tmp_path):
    arguments = ["--small", "--frames", "8", "--cases", "2:2", "4:2:eager:3:2", "--steps", "1"]
    result = run(root, tmp_path, "performance.py", *arguments)
    assert [case["keyframes"] for case in result["cases"]] == [2, 4]
    assert [(case["memory"], case["chunk"], case["compiled"]) for case in result["cases"]] == [
        (0, 0, False),
        (3, 2, False),
    ]
    first, further = (
        result[f"inversion, {part}"]["seconds"] for part in ("first step, descriptors taken", "each further step")
    )
    assert first + 2 * further == pytest.approx(result["inversion, 3 steps, descriptors taken"]["seconds"], abs=0.01)
    for case in result["cases"]:
        assert len(case["seconds of each step"]) == 3  # one that does not count, one of each kind
        assert case["step injecting"]["seconds"] == case["seconds of each step"][1]
        assert case["step past injection"]["seconds"] == case["seconds of each step"][2]
        whole = sum(case["extrapolated, seconds"].values()) / 60
        assert case["extrapolated, whole edit in minutes"] == pytest.approx(whole, abs=0.02)


def test_performance_without_matching_tells_no_whole_and_begins_nothing_after_its_deadline(root, tmp_path):
    arguments = ["--small", "--frames", "4", "--cases", "2:2", "4:2", "--steps", "1", "--no-matching"]
    result = run(root, tmp_path, "performance.py", *arguments)
    assert "step injecting" in result["cases"][0] and not [key for key in result["cases"][0] if "extrapolated" in key]
    result = run(root, tmp_path, "performance.py", *arguments, "--deadline", "0.001")
    assert result["cases"] == [] and len(result["left out for lack of time"]) == 2


def test_norms(root, tmp_path):
    result = run(root, tmp_path, "norms.py", "--small")
    assert [row["channels"] for row in result["norms"]] == [64, 96]
    assert [row["forward"] for row in result["forwards"]] == ["plain", "self-attention given"]
    rows = [*result["norms"], *result["blocks"], *result["forwards"]]
    assert all(row["difference"] < 1e-5 and row["times faster"]["fast"] > 0 for row in rows)


def test_attention(root, tmp_path):
    pytest.importorskip("triton")
    result = run(root, tmp_path, "attention.py", "--small")
    assert [row["tokens"] for row in result["rows"]] == [15, 6]
    assert [row["tokens"] for row in result["prompts"]] == [15, 6]
    assert all(row["difference"] < 1e-3 for row in result["rows"] + result["prompts"])


def test_edit_quality(root, tmp_path):
    """Two calls with other settings each fill the same piece, of which the report makes its table."""
    sys.path.append(str(root / "benchmarks"))
    import quality_report

    command = [sys.executable, str(root / "benchmarks" / "edit_quality.py"), "--small", "--pieces", str(tmp_path)]
    command += ["--commit", "given", "--edits", "foreground", "--frames", "4", "--budgets", "1"]
    chosen = ["frame by frame", quality_report.SHORT.format(1)]
    for name in chosen:
        done = subprocess.run([*command, "--settings", name], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    _, (piece,) = quality_report.read_pieces(tmp_path)
    settings = [name for name in piece["measures"] if any(part in name for part in chosen)]
    base = [quality_report.TRUTH, quality_report.CEILING, quality_report.NO_EDIT]
    assert list(piece["measures"]) == base + settings
    assert len(settings) == 2 + 4  # each injected or not, short clips also blended or not
    assert set(piece["seconds"]) == set(settings)
    assert all(0 < piece["measures"][name]["warping"] < 1 for name in piece["measures"])
    assert all(5 < piece["measures"][name]["psnr"] < 60 for name in settings)
    assert quality_report.table([piece]).count("\n") == 1 + len(piece["measures"])


def long_run(frames: int, peak: float, ms: float) -> dict:
    """A run of ``benchmarks/long_clip.py`` that took ``ms`` a frame in each stage, and as much of CPU time."""
    stages = ("encode", "invert", "select", "joint", "propagate", "save")
    spent = {"seconds": frames * ms / 1000, "cpu": frames * ms / 1000}
    whole = {clock: len(stages) * value for clock, value in spent.items()}
    return {"frames": frames, "peak": peak, **whole, "stages": dict.fromkeys(stages, spent), "memory": []}


@pytest.mark.parametrize("gigabytes, ms, memory, time", [(2.4, 11.4, True, True), (2.6, 11.6, False, False)])
def test_long_clip_judges_what_was_measured(root, tmp_path, gigabytes, ms, memory, time):
    out = tmp_path / "result.json"
    runs = [long_run(200, 1.5e9, 50.0), long_run(600, 1.6e9, 10.0), long_run(10_000, gigabytes * 1e9, ms)]
    out.write_text(json.dumps({"commit": "given", "runs": runs}))
    command = [sys.executable, str(root / "benchmarks" / "long_clip.py"), "--out", str(out), "--frames"]
    done = subprocess.run([*command, "10000", "200", "600"], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "within" in line]
    assert ["NOT within" not in line for line in lines] == [memory, time, time]
    assert f"CPU time a frame: {ms / 10 - 1:+.1%} beside 600 frames" in lines[2]
    refused = subprocess.run([*command, "200", "601"], capture_output=True, text=True)
    assert refused.returncode == 1 and "cannot be gone on with: it has" in refused.stderr
    assert json.loads(out.read_text())["runs"] == runs
