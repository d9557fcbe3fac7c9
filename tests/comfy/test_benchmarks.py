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
    arguments = ["--small", "--frames", "8", "--keyframes", "2", "4", "--budgets", "2", "--steps", "1"]
    result = run(root, tmp_path, "performance.py", *arguments)
    assert [case["keyframes"] for case in result["cases"]] == [2, 4]
    for case in result["cases"]:
        assert len(case["seconds of each step"]) == 3  # one that does not count, one of each kind
        assert case["step injecting"]["seconds"] == case["seconds of each step"][1]
        assert case["step past injection"]["seconds"] == case["seconds of each step"][2]
        whole = sum(case["extrapolated, seconds"].values()) / 60
        assert case["extrapolated, whole edit in minutes"] == pytest.approx(whole, abs=0.02)


def test_attention(root, tmp_path):
    pytest.importorskip("triton")
    result = run(root, tmp_path, "attention.py", "--small")
    assert [row["tokens"] for row in result["rows"]] == [15, 6]
    assert all(row["difference"] < 1e-3 for row in result["rows"])
