"""Slurm: slurm/folds.sbatch on a real Slurm of one node, which `.ci/slurm.sh` starts."""

import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY

if shutil.which("sbatch") is None or "SLURM_CONF" not in os.environ:
    if "CI" in os.environ:
        pytest.fail("CI must test Slurm: see .ci/slurm.sh")
    pytest.skip("no Slurm here: export SLURM_CONF=$(.ci/slurm.sh)", allow_module_level=True)

pytestmark = pytest.mark.slow


def slurm(*command, **environment):
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, **environment},
    ).stdout


def wait_until_done(folder, seconds=240):
    """Wait for all jobs. → the text of their logs. A job that is queued again would wait for two minutes; here it waits
    three seconds, since slurmd refuses one that starts in the second in which it was queued."""
    hastened = {}
    for _ in range(seconds):
        queued = [line.split() for line in slurm("squeue", "--noheader", "--array", "--format=%i %r").splitlines()]
        if not queued:
            return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
        for job, reason in queued:
            if reason == "BeginTime" and time.monotonic() > hastened.get(job, 0) + 10:  # it may be queued several times
                slurm("scontrol", "update", f"JobId={job}", "StartTime=now+3")
                hastened[job] = time.monotonic()
        time.sleep(1)
    raise AssertionError((queued, [path.read_text() for path in folder.glob("*.log")]))


def submit(folder, competition, *flags):
    """Submit as a user does, but with the logs in `folder`, which inner jobs read from the environment. Each fold has
    the node to itself, so that the second is stopped while the first is queued again."""
    names = dict(EXP="quick", INPUT=competition[1], OUTPUT=competition[3], INFER="--batch-size 64")
    own = dict(PREPARE="--folds 2 --groups none --size 32", GPU="--exclusive", SBATCH_OUTPUT=f"{folder}/%x-%j.log")
    environment = {name: str(value) for name, value in (names | own).items()}
    slurm("sbatch", f"--output={own['SBATCH_OUTPUT']}", "slurm/folds.sbatch", *flags, **environment)


def test_folds_train_in_an_array_and_the_submission_follows(toy, tmp_path):
    # each fold is stopped after one of its two steps, and Slurm queues it again
    submit(tmp_path, toy(train=60), *TINY, "--batch-size", 15, "--epochs", 1, "--stop-after", "1s", "--tta", "none")
    log = wait_until_done(tmp_path)
    assert "folds in job" in log
    assert log.count("stopped by --stop-after; run it again to resume after 1 of 2 steps") == 2
    assert "Job is pending" not in log, "the last fold must queue itself again, not the whole array"
    assert log.count("goes on in epoch 1 after 1 of 2 steps") == 2
    assert log.count("10 rows, checked") == 1
    assert len(list((tmp_path / "output" / "quick").glob("submission_quick_CV*.csv"))) == 1


def test_a_fold_that_fails_cancels_02_and_03(toy, tmp_path):
    submit(tmp_path, toy(train=60), *TINY, "--batch-size", 1000)
    log = wait_until_done(tmp_path)
    assert log.count("--batch-size 1000 is more than the 30 training images: lower it") == 2
    assert "rows, checked" not in log


@pytest.mark.parametrize("flag", ["--exp", "--output=elsewhere", "--fold"])
def test_names_come_from_the_environment(flag, tmp_path):
    slurm("sbatch", f"--output={tmp_path}/%j.log", "slurm/folds.sbatch", flag, "1")
    assert f"error: {flag.split('=')[0]} can't be given here" in wait_until_done(tmp_path)
