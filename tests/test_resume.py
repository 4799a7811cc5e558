"""Resume: a killed fold ends with the same bytes, damaged resume files, locks of folds."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, done, refused

from kit import experiment, locks
from kit.train import checkpoint, inference

FOLD = [*TINY, "--fold", 0, "--exp", "new", "--batch-size", 4]


@pytest.fixture
def flags(trained, tmp_path):
    shutil.copytree(trained.output, tmp_path / "output")
    return ["--input", trained.input, "--output", tmp_path / "output"]


@pytest.fixture(scope="module")
def killed(trained, tmp_path_factory):
    """Kill a fold that saves after each step, in its last epoch. → the experiment's folder, only read."""
    output = tmp_path_factory.mktemp("killed") / "output"
    shutil.copytree(trained.output, output)
    flags = ["--input", trained.input, "--output", output]
    command = [sys.executable, ROOT / "01_train_fold.py", *flags, *FOLD, "--save-minutes", "1e-9"]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    path = output / "new" / "fold0.resume.pt"
    while process.poll() is None:
        if path.exists() and (state := checkpoint.read_checked(path)["progress"])["epoch"] == 2 and state["step"] > 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return output / "new"
        time.sleep(0.01)
    raise AssertionError("the fold ended before it could be killed")


def test_a_killed_fold_resumes_within_its_epoch_and_ends_with_the_same_bytes(flags, killed):
    folder = flags[3] / "new"
    shutil.copytree(killed, folder)
    assert len(pd.read_csv(folder / "fold0_epochs.csv")) == 1
    out = done("01_train_fold.py", *flags, *FOLD)
    assert "goes on in epoch 2 after" in out
    assert "epoch 1/2" not in out, "the first epoch is not trained again"
    assert len(pd.read_csv(folder / "fold0_epochs.csv")) == 2
    assert not list(folder.glob("*resume*"))
    assert not list(folder.glob(".tmp*"))
    resumed = (folder / "fold0.pt").read_bytes()
    shutil.rmtree(folder)
    done("01_train_fold.py", *flags, *FOLD)
    assert (folder / "fold0.pt").read_bytes() == resumed
    assert "is finished" in done("01_train_fold.py", *flags, *FOLD)


@pytest.mark.parametrize("damage", ["bit", "truncated", "other settings"])
def test_a_damaged_resume_file_is_renamed_and_the_fold_starts_over(flags, killed, damage):
    folder = flags[3] / "new"
    shutil.copytree(killed, folder)
    path = folder / "fold0.resume.pt"
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
    if damage == "other settings":
        config = json.loads((folder / "config.json").read_text()) | dict(seed=1)
        (folder / "config.json").write_text(json.dumps(config))
    path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    more = ["--seed", 1] if damage == "other settings" else []
    out = done("01_train_fold.py", *flags, *FOLD, *more)
    assert f"{path} can't be used" in out
    assert "epoch 1/2" in out, "the fold starts over"
    assert (folder / "fold0.resume.damaged").exists()


def test_a_fold_has_one_process_at_a_time(flags):
    command = [sys.executable, ROOT / "01_train_fold.py", *flags, *FOLD, "--epochs", 200]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    while "epoch   1/200" not in process.stdout.readline():  # its first epoch is done
        pass
    line = refused("01_train_fold.py", *flags, *FOLD, "--epochs", 200)
    assert f"fold 0 of new is being worked on by process {process.pid} on" in line
    process.kill()
    process.wait()
    assert (flags[3] / "new" / ".fold0.lock").exists()
    config = flags[3] / "new" / "config.json"
    config.write_text(config.read_text().replace('"epochs": 200', '"epochs": 2'))
    (flags[3] / "new" / "fold0.resume.pt").unlink(missing_ok=True)
    done("01_train_fold.py", *flags, *FOLD)  # a dead process holds no lock


def test_a_fold_that_another_process_finishes_first_is_left_alone(flags, monkeypatch):
    """The other process ends while this one waits for the lock."""
    folder, plain = flags[3] / "new", locks.locked

    def slow(path, *arguments, **options):
        if not (folder / "fold0.pt").exists():
            folder.mkdir(exist_ok=True)
            for ending in ("csv", "json", "pt"):
                (folder / f"fold0.{ending}").write_bytes(b"the other's")
        return plain(path, *arguments, **options)

    monkeypatch.setattr(experiment, "locked", slow)
    assert "fold 0 of new is finished" in done("01_train_fold.py", *flags, *FOLD)
    assert (folder / "fold0.pt").read_bytes() == b"the other's"


def test_a_stop_during_tta_repeats_no_epoch(flags, monkeypatch):
    """A fold that stops while its held-out images are predicted in all views resumes there."""

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kit.train.monitor.EpochMonitor.forecast", lambda *_: None)  # it counts the views
        patch.setitem(inference.TTAS, "d4", stopped)
        with pytest.raises(KeyboardInterrupt):
            done("01_train_fold.py", *flags, *FOLD)
    out = done("01_train_fold.py", *flags, *FOLD)
    assert "goes on in epoch 3" in out
    assert "train loss" not in out
    resumed = [(flags[3] / "new" / f"fold0.{ending}").read_bytes() for ending in ("pt", "csv")]
    done("01_train_fold.py", *flags, *FOLD, "--overwrite")
    assert resumed == [(flags[3] / "new" / f"fold0.{ending}").read_bytes() for ending in ("pt", "csv")]


def test_save_minutes_0_writes_no_resume_file(flags):
    done("01_train_fold.py", *flags, *FOLD, "--save-minutes", 0, "--epochs", 2)
    assert not list((flags[3] / "new").glob("*resume*"))


def test_every_random_state_is_restored(tmp_path):
    import random

    import numpy as np

    before = checkpoint.random_states()
    first = torch.rand(3), np.random.rand(3), random.random(), np.random.normal()
    checkpoint.restore_random_states(torch_roundtrip(before, tmp_path))
    again = torch.rand(3), np.random.rand(3), random.random(), np.random.normal()
    assert torch.equal(first[0], again[0])
    assert (first[1] == again[1]).all()
    assert first[2:] == again[2:]


def torch_roundtrip(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.slow
def test_all_scripts_twice_give_the_same_bytes(trained, tmp_path):
    """00 to 03, with different numbers of workers: folds.csv, oof.csv, pictures and submission."""
    for name, workers in (("a", 0), ("b", 2)):
        flags = ["--input", trained.input, "--output", tmp_path / name]
        done("00_prepare.py", *flags, "--size", 32, "--folds", 3)
        done("01_train_fold.py", *flags, *TINY, "--fold", "all", "--workers", workers, "--deterministic")
        done("02_oof.py", *flags)
        done("03_infer.py", *flags, "--workers", workers)
    names = ["prepared/folds.csv", "prepared/train_32.npy", "prepared/duplicates.png", "prepared/samples.png"]
    names += ["base/oof.csv", "base/roc.png", "base/fold2.pt", "base/fold2.csv", "base/augmented.png"]
    names += [f"base/{path.name}" for path in (tmp_path / "a" / "base").glob("submission*")]
    assert len(names) == 10
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
