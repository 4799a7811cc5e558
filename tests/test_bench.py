"""Benches of tests/bench at their smallest size: what they find, not how fast."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

BENCHES = sorted((ROOT / "tests" / "bench").glob("*.py"))
MAY_MOUNT = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.stem)
def test_bench_starts_and_shows_its_commands(bench):
    result = subprocess.run([sys.executable, bench, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"python tests/bench/{bench.name}" in result.stdout


@pytest.mark.slow
def test_gpu_bench_runs_on_a_cpu():
    command = [sys.executable, ROOT / "tests" / "bench" / "gpu.py", "--tiny"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    table = result.stdout.partition("| CPU |")[2]
    rows = ["bare model", "kit's training loop", "inference, views d4", "step of ranger21", "thesis' complete job"]
    rows += ["--micro-batch 4 |", "00_prepare.py", "01_train_fold.py", "03_infer.py"]
    assert [words for words in rows if f"\n| {words}" not in table] == []


@pytest.mark.slow
def test_speed_bench_compares_the_complete_job_with_the_model_alone_and_the_listing(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, ROOT / "tests" / "bench" / "speed.py", "--folder", tmp_path, "--job", "--cpu"]
    result = subprocess.run([*command, *"--train 50 --test 50 --repeat 1".split()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line.strip("|").split("|") for line in result.stdout.splitlines() if line.startswith("| complete job")]
    assert [len([cell for cell in cells if cell.strip()]) for _, *cells in rows] == [2, 1, 2]
    (plain, _), (views,), (default, _) = ([float(cell) for cell in cells if cell.strip()] for _, *cells in rows)
    assert 1 < views < plain < default


@pytest.mark.slow
def test_a_family_trains_and_resumes_to_the_same_bytes_in_each_cell_of_the_table():
    command = [sys.executable, ROOT / "tests" / "bench" / "families.py", "vit"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1].count(", resumed to the same bytes |") == 6


@pytest.mark.slow
def test_twenty_kills_leave_the_same_bytes(tmp_path):
    """Kills Ranger21 and AdamW, 0 and 2 workers, at random moments and during saves."""
    command = [sys.executable, ROOT / "tests" / "bench" / "kill.py", "20", "--folder", tmp_path / "kill"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((tmp_path / "kill" / "kills.json").read_text())
    assert all(row["equal"] for row in rows)
    training = [row for row in rows if "within_epoch" in row]
    assert sum(row["kills"] for row in training) >= 20
    assert sum(row["within_epoch"] for row in training) >= 4
    assert sum(row["during_save"] for row in training) >= 4


@pytest.mark.slow
def test_fuzzing_reads_or_refuses_each_input():
    command = [sys.executable, ROOT / "tests" / "bench" / "fuzz.py", "--seconds", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = dict(part.split(" ", 1)[::-1] for part in result.stdout.strip().split(", "))
    assert set(counts) == {f"{kind} {end}" for kind in ("images", "archives", "tables") for end in ("read", "refused")}


@pytest.mark.slow
@pytest.mark.skipif(not MAY_MOUNT or MAY_MOUNT.returncode, reason="needs a small disk: Linux' unshare")
def test_full_disks_give_one_line_and_the_same_bytes_on_larger_ones(tmp_path):
    """Runs five commands at four sizes of disk: no traceback, no incomplete file; a resume file may fail."""
    command = ["unshare", "-rm", sys.executable, ROOT / "tests" / "bench" / "full_disk.py"]
    result = subprocess.run([*command, "--folder", tmp_path, "--most", "4"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    rows = {row["script"]: row for row in json.loads((tmp_path / "full.json").read_text())}
    assert [name for name, row in rows.items() if not row["refused"]] == []
    assert rows["01"]["warned"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "expected"), [
    ("--train 500 --test 100 --classes 110", ["00", "01 head", "02 head", "03 head", "all"]),  # from 101, other code
    ("--growth 60 120", ["00", "01", "03"]),
])  # fmt: skip
def test_large_bench_measures_each_step(tmp_path, flags, expected):
    command = [sys.executable, ROOT / "tests" / "bench" / "large.py", "--folder", tmp_path / "large", *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == expected
    assert all(float(cell) > 0 for row in rows for cell in row[1:])
