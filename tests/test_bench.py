"""The benchmarks that a GPU or much time is for still run, at a tiny size; their figures are not asserted."""

import subprocess
import sys

from conftest import ROOT


def test_gpu_bench_runs_on_a_cpu():
    command = [sys.executable, ROOT / "tests" / "bench" / "gpu.py", "--tiny"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for words in ("bare model", "kit's training loop", "8 views", "step of ranger21-package", "whole job"):
        assert f"| {words}" in result.stdout or words in result.stdout
    assert result.stdout.count("| ") > 10
