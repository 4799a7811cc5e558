"""The benchmarks that need a GPU or much time, at their smallest; what they must find is asserted, not how fast."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

MAY_MOUNT = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_gpu_bench_runs_on_a_cpu():
    command = [sys.executable, ROOT / "tests" / "bench" / "gpu.py", "--tiny"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    table = result.stdout.partition("| CPU |")[2]
    rows = "bare model", "kit's training loop", "inference, views d4", "step of ranger21", "thesis' whole job"
    assert [words for words in rows if f"\n| {words}" not in table] == []


@pytest.mark.slow
def test_twenty_kills_and_the_same_bytes(tmp_path):
    """Ranger21 and AdamW, 0 and 2 workers, at random moments and during saves."""
    command = [sys.executable, ROOT / "tests" / "bench" / "kill.py", "20", "--folder", tmp_path / "kill"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((tmp_path / "kill" / "kills.json").read_text())
    assert all(row["equal"] for row in rows)
    training = [row for row in rows if "within_epoch" in row]
    assert sum(row["kills"] for row in training) >= 20
    assert sum(row["within_epoch"] for row in training) >= 4
    assert sum(row["during_save"] for row in training) >= 4


@pytest.mark.slow
def test_fuzzing_for_a_few_seconds():
    command = [sys.executable, ROOT / "tests" / "bench" / "fuzz.py", "--seconds", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = dict(part.split(" ", 1)[::-1] for part in result.stdout.strip().split(", "))
    assert set(counts) == {f"{kind} {end}" for kind in ("images", "archives", "tables") for end in ("read", "refused")}


@pytest.mark.slow
@pytest.mark.skipif(not MAY_MOUNT or MAY_MOUNT.returncode, reason="needs a small disk: Linux' unshare")
def test_full_disks_and_the_same_bytes_on_larger_ones(tmp_path):
    """Each of the five commands at four sizes of disk; no traceback, no half file, and resume copies are optional."""
    command = ["unshare", "-rm", sys.executable, ROOT / "tests" / "bench" / "full_disk.py"]
    result = subprocess.run([*command, "--folder", tmp_path, "--most", "4"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    rows = {row["script"]: row for row in json.loads((tmp_path / "full.json").read_text())}
    assert [name for name, row in rows.items() if not row["refused"]] == []
    assert rows["01"]["warned"] > 0


@pytest.mark.slow
def test_many_classes_at_a_small_size(tmp_path):
    command = [sys.executable, ROOT / "tests" / "bench" / "large.py", "--folder", tmp_path / "large"]
    command += ["--train", "500", "--test", "100", "--classes", "110"]  # of more than 100, logits are kept otherwise
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    steps = [line.split(" | ")[0].strip("| ") for line in result.stdout.splitlines()[2:]]
    assert steps == ["00", "01 head", "02 head", "03 head", "all"]
