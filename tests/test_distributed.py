"""DDP (torchrun): two processes (Gloo, on the CPU) equal one; a killed process ends the job, which resumes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common import UserError

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, done, prepare

from kit.train import dataset, distributed

BATCH = 9  # odd: two processes get unequal shares
ONE_MACHINE = ("--standalone", "--nproc-per-node", 2)


def torchrun(script, *arguments, machines=ONE_MACHINE):
    """Start `torchrun script arguments`. → the running process."""
    command = [sys.executable, "-m", "torch.distributed.run", *machines, script]
    return subprocess.Popen(
        [str(word) for word in (*command, *arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def output_of(job):
    """Wait for a job that must succeed. → its stdout."""
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    return out


@pytest.fixture
def flags(toy):
    """Prepare a competition of 57 training and 11 test images in three folds. → the flags to train fold 0."""
    folders = toy(train=57, test=11)
    prepare(folders, 32, "--folds", 3)
    return [*folders, *TINY, "--batch-size", BATCH, "--fold", 0]


def experiment(flags, name):
    """Return fold 0's logits [N, 4], and the losses and scores of its epochs."""
    folder = Path(flags[3]) / name
    logits = pd.read_csv(folder / "fold0.csv").iloc[:, 2:].to_numpy()
    return logits, pd.read_csv(folder / "fold0_epochs.csv").filter(regex="loss|accuracy|auc").to_numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "bound", "torchruns"),
    [
        ("--model test_convnext --optimizer adamw", 1e-5, 2),
        ("--model test_vit --accumulate 2 --grad-checkpointing", 1e-5, 1),  # with Ranger21
        ("--model test_vit --amp fp16 --tune head", 1e-2, 1),  # the GradScaler; fp16 rounds
    ],
)
def test_two_processes_train_as_one(flags, settings, bound, torchruns):
    flags += [*settings.split(), "--lr", "1e-3", "--predict"]
    done("01_train_fold.py", *flags, "--exp", "one")
    machines = ONE_MACHINE
    if torchruns == 2:  # two machines of one process each
        with socket.create_server(("127.0.0.1", 0)) as free:
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        machines = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint)
    jobs = [torchrun("01_train_fold.py", *flags, "--exp", "two", machines=machines) for _ in range(torchruns)]
    assert "".join(output_of(job) for job in jobs).count("fold 0 of two: kept") == 1
    for one, two in zip(experiment(flags, "one"), experiment(flags, "two"), strict=True):
        assert one.shape == two.shape
        assert np.abs(one - two).max() <= bound * max(1, np.abs(one).max())
    files = sorted(path.name for path in (Path(flags[3]) / "two").iterdir() if path.name[0] != ".")
    expected = "augmented.png config.json fold0.csv fold0.json fold0.pt fold0_epochs.csv fold0_test.json fold0_test.npy"
    assert files == expected.split()
    one, two = (np.load(Path(flags[3]) / name / "fold0_test.npy") for name in ("one", "two"))
    assert np.abs(one - two).max() <= bound * max(1, np.abs(one).max())


@pytest.mark.slow
def test_batch_norm_on_cpus_uses_shares_of_the_batch_and_warns(flags):
    job = torchrun("01_train_fold.py", *flags, "--epochs", 1, "--fold", 0, 1, "--augment", "none")
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    assert err.count("warning: batch norm on CPUs") == 2, "once per fold, by the first process alone"
    assert out.count(": kept epoch 1") == 2


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_then_resumes(flags):
    flags += ["--optimizer", "adamw", "--lr", "1e-3"]
    output_of(torchrun("01_train_fold.py", *flags, "--exp", "unbroken"))
    job = torchrun("01_train_fold.py", *flags, "--exp", "killed", "--save-minutes", 1e-6)
    killed, unbroken, alone = (Path(flags[3]) / name for name in ("killed", "unbroken", "alone"))
    while not (killed / "fold0.resume.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    os.kill(child(job.pid, rank=1), signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0
    assert re.search("(?m)^01_train_fold.py: (error: process 0 of 2 has lost the others|stopped by SIGTERM)", err), err
    assert "in train_epoch" not in err  # no traceback
    shutil.copytree(killed, alone)
    goes_on = r"goes on in epoch \d after \d of 4 steps"
    assert re.search(goes_on, output_of(torchrun("01_train_fold.py", *flags, "--exp", "killed")))
    for name in ("fold0.pt", "fold0.csv"):
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes()
    assert not (killed / "fold0.resume.pt").exists()
    assert re.search(goes_on, done("01_train_fold.py", *flags, "--exp", "alone"))  # without torchrun as well


def child(pid, rank):
    """Return the process id of that rank among torchrun's children."""
    for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if f"RANK={rank}\0" in Path(f"/proc/{number}/environ").read_text():
            return int(number)
    raise AssertionError("no such process")


@pytest.mark.slow
def test_two_processes_predict_the_test_set_as_one(flags):
    done("01_train_fold.py", *flags[:-1], "all")
    done("03_infer.py", *flags[:4])
    submission = next((Path(flags[3]) / "base").glob("submission_*.csv"))
    one = pd.read_csv(submission, header=None)
    submission.unlink()
    for predictions in (Path(flags[3]) / "base").glob("fold?_test.npy"):
        predictions.unlink()
    out = output_of(torchrun("03_infer.py", *flags[:4], "--batch-size", 4))
    assert out.count("11 rows, checked") == 1
    two = pd.read_csv(submission, header=None)
    assert two[0].tolist() == one[0].tolist()
    assert np.abs(two[1] - one[1]).max() <= 1e-5


def test_each_image_of_a_batch_goes_to_one_process(monkeypatch):
    config = dict(seed=777, sampler="imbalanced", batch_size=BATCH, augment="none")
    experiment = SimpleNamespace(images=np.zeros((50, 8, 8, 3)), targets=np.arange(50) % 2, config=config, workers=0,
                                 device=torch.device("cpu"))  # fmt: skip
    run = SimpleNamespace(experiment=experiment, train_rows=np.arange(50), fold=0)

    def batches_of(rank, world):
        monkeypatch.setattr(dataset, "RANK", rank)
        monkeypatch.setattr(dataset, "WORLD", world)
        return list(dataset.training_loader(run, 1)[0].batch_sampler)

    batches, shares = batches_of(0, 1), [batches_of(rank, 4) for rank in range(4)]
    assert [len(batch) for batch in batches] == [BATCH] * 5
    for batch, *parts in zip(batches, *shares, strict=True):
        assert sorted(batch) == sorted(image for part in parts for image in part)
        assert {len(part) for part in parts} == {2, 3}


def test_rows_are_gathered_in_order_and_without_padding(monkeypatch):
    rows = np.arange(22.0).reshape(11, 2)
    monkeypatch.setattr(distributed, "WORLD", 4)
    monkeypatch.setattr(distributed, "all_gather", lambda mine: [rows[rank::4] for rank in range(4)])
    assert np.array_equal(distributed.gather_rows(rows[1::4]), rows)
    monkeypatch.setattr(
        distributed, "all_gather", lambda mine: [rows[:1], *[np.zeros(0)] * 3]
    )  # fewer rows than processes
    assert np.array_equal(distributed.gather_rows(np.zeros(0)), rows[:1])


@pytest.mark.slow
def test_a_batch_smaller_than_the_processes_is_refused_once(flags):
    job = torchrun("01_train_fold.py", *flags, "--batch-size", 1)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0
    assert err.count("error: --batch-size 1 can't be shared by 2 processes: raise it") == 1


def test_a_failing_second_process_waits_for_the_message_of_the_first():
    """torchrun ends all processes when one ends, and a faster second one must not hide the message of the first."""
    second = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    command = [sys.executable, "-c", "import common; common.fail('a mistake')"]
    job = subprocess.Popen(command, cwd=ROOT, env=os.environ | second, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(timeout=4)
    job.terminate()
    assert job.communicate(timeout=10)[1] == b""


def test_more_processes_than_gpus_are_refused_by_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "LOCAL_WORLD", 2)
    with pytest.raises(UserError, match="started 2 processes for 1 GPUs here: lower"):
        distributed.process_device("auto")
