"""Mistakes in prepared data, folds and flags: exit code 2, one line with culprit and remedy, nothing changed.

test_bad_files.py has those in the competition's tables, archives and images.
"""

import json
import os
import shutil
import stat
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, done, kit, refused
from damage import PREPARE, build_world, edited, flags_of, refused_untouched, snapshot, without

TRAIN = [*TINY, "--fold", 0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small competition, prepared and trained. → its folder, for reading only."""
    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    done("01_train_fold.py", *flags_of(folder), *TINY, "--fold", "all")
    done("02_oof.py", *flags_of(folder), "--draws", 100)
    return folder


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the world for damaging. → its folder."""
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


# ---------------------------------------------------------------- folds, models, flags


def cut(name):
    def damage(output):
        path = output / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def other_settings(output):
    path = output / "base" / "fold0.pt"
    saved = torch.load(path)
    torch.save(saved | dict(config=saved["config"] | dict(lr=9.0)), path)


def record(**changes):
    def damage(output):
        path = output / "base" / "fold1.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | dict(config=content["config"] | changes)))

    return damage


def pickled(output):
    (output / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch " + bytes(output / "owned") + b"'\ntR.")


def nan_prediction(output):
    path = output / "base" / "fold0.csv"
    first, second, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, second.rpartition(",")[0] + ",nan", *others]) + "\n")


def nothing(output):
    pass


TRAINER, OOF, INFER = "01_train_fold.py", "02_oof.py", "03_infer.py"
NEW = [*TRAIN, "--exp", "new"]
LATER = {
    "folds.csv edited": (edited("prepared/folds.csv", lambda t: t + "x.png,0,0,99,1\n"), TRAINER, TRAIN, "folds.csv"),
    "folds.csv missing": (without("prepared/folds.csv"), TRAINER, TRAIN, "folds.csv is missing: run"),
    "prepared.json missing": (without("prepared/prepared.json"), OOF, [], "prepared.json is missing"),
    "prepared.json damaged": (cut("prepared/prepared.json"), INFER, [], "prepared.json is damaged"),
    "cache missing": (without("prepared/train_32.npy"), TRAINER, NEW, "train_32.npy is missing"),
    "cache truncated": (cut("prepared/train_32.npy"), TRAINER, NEW, "train_32.npy"),
    "test cache missing": (without("prepared/test_32.npy"), INFER, [], "test_32.npy is missing"),
    "fold out of range": (nothing, TRAINER, [*TINY, "--fold", 2], "folds 0 to 1"),
    "fold negative": (nothing, TRAINER, [*TINY, "--fold", -1], "--fold"),
    "fold a word": (nothing, TRAINER, [*TINY, "--fold", "one"], "--fold one: there are folds 0 to 1, and"),
    "folds by commas": (nothing, TRAINER, [*TINY, "--fold", "0,1"], "there are folds 0 to 1: write 0 1"),
    "other size": (nothing, TRAINER, [*NEW, "--size", 64], "00_prepare.py again, with the same flags and --size 64"),
    "other settings": (nothing, TRAINER, [*TRAIN, "--lr", 1, "--overwrite"], "lr was 0.003 and is now 1.0"),
    "a wrong tag": (nothing, TRAINER, [*NEW, "--model", "convnext_large.fb_in22k_ft_in1"], "did you mean"),
    "--stop-after without saves": (nothing, TRAINER, [*NEW, "--stop-after", "1h", "--save-minutes", 0], "leave one"),
    "a time without unit": (nothing, TRAINER, [*NEW, "--stop-after", "8"], "8.5h, 90m or 300s"),
    "weights missing": (nothing, TRAINER, [*NEW, "--weights", "no.pth"], "no.pth is no file"),
    "weights a folder": (nothing, TRAINER, [*NEW, "--weights", "."], "is no file"),
    "weights of pickled code": (pickled, TRAINER, [*NEW, "--weights", "OUT/evil.pth"], "evil.pth doesn't hold"),
    "weights of another model": (nothing, TRAINER, [*NEW, "--model", "test_vit", "--model-kwargs", "img_size=32",
        "--weights", "OUT/base/fold0.pt"], "fold0.pt"),
    "unknown model": (nothing, TRAINER, [*NEW, "--model", "resnet"], "did you mean"),
    "unknown optimiser": (nothing, TRAINER, [*NEW, "--optimizer", "adamx"], "invalid choice: 'adamx'"),
    "unknown device": (nothing, TRAINER, [*NEW, "--device", "tpu9"], "--device tpu9"),
    "batch larger than the fold": (nothing, TRAINER, [*NEW, "--batch-size", 13], "more than the 12 training images"),
    "lr inf": (nothing, TRAINER, [*NEW, "--lr", "inf"], "must be above 0 and finite"),
    "weights inf": (nothing, INFER, ["base", "--weights", "inf"], "must be at least 0 and finite"),
    "lr 0": (nothing, TRAINER, [*NEW, "--lr", 0], "--lr: 0 must be above 0"),
    "lr -1": (nothing, TRAINER, [*NEW, "--lr=-1"], "must be above 0"),
    "lr nan": (nothing, TRAINER, [*NEW, "--lr", "nan"], "must be above 0"),
    "lr a word": (nothing, TRAINER, [*NEW, "--lr", "fast"], "invalid number value: 'fast'"),
    "epochs 0": (nothing, TRAINER, [*NEW, "--epochs", 0], "--epochs: 0 must be at least 1"),
    "epochs 1.5": (nothing, TRAINER, [*NEW, "--epochs", "1.5"], "invalid whole number value: '1.5'"),
    "unknown flag": (nothing, TRAINER, [*NEW, "--learning-rate", 1], "--learning-rate"),
    "abbreviated flag": (nothing, TRAINER, [*NEW, "--epoch", 1], "--epoch"),
    "unknown choice": (nothing, TRAINER, [*NEW, "--loss", "mse"], "mse"),
    "name of a path": (nothing, TRAINER, [*TRAIN, "--exp", "a/b"], "can't be an experiment's name"),
    "name of the prepared data": (nothing, TRAINER, [*TRAIN, "--exp", "prepared"], "can't be an experiment's name"),
    "name of the unpacked archives": (nothing, TRAINER, [*TRAIN, "--exp", "unpacked"], "can't be an experiment's name"),
    "diverging": (nothing, TRAINER, [*NEW, "--lr", 1e30, "--optimizer", "sgd"], "lower --lr"),
    "no such experiment": (nothing, OOF, ["nowhere"], "nowhere has no finished fold"),
    "no fold finished": (
        lambda o: [(o / "base" / f"fold{k}.{end}").unlink() for k, end in ((0, "pt"), (1, "csv"))],
        INFER,
        [],
        "no finished fold",
    ),
    "a fold's table cut": (cut("base/fold1.csv"), OOF, [], "fold1.csv"),
    "NaN in a prediction": (nan_prediction, OOF, [], "predictions that are NaN or infinite (0"),
    "epochs missing": (without("base/fold1_epochs.csv"), OOF, [], "fold1_epochs.csv is missing"),
    "config damaged": (cut("base/config.json"), TRAINER, [*TRAIN, "--overwrite"], "config.json is damaged"),
    "ledger damaged": (lambda o: (o / "experiments.csv").write_text("a,b\n1,2\n"), OOF, [], "experiments.csv needs a"),
    "score no number": (nothing, OOF, ["--lb-public", "high"], "--lb-public"),
    "experiment named twice": (nothing, OOF, ["base", "base"], "named twice"),
    "a fold's record of other folds": (record(folds_hash="0"), INFER, [], "fold1.pt was trained on other folds"),
    "a fold's record of other settings": (record(lr=9.0), OOF, [], "fold1.pt was trained with other settings"),
    "a fold's record cut": (cut("base/fold1.json"), OOF, [], "fold1.json is damaged"),
    "checkpoint of other settings": (other_settings, INFER, [], "fold0.pt isn't the model of fold0.json"),
    "checkpoint cut": (cut("base/fold0.pt"), INFER, [], "fold0.pt is damaged"),
    "checkpoint of text": (lambda o: (o / "base" / "fold0.pt").write_text("hello"), INFER, [], "fold0.pt is damaged"),
    "solution of other images": (
        lambda o: (o.parent / "input" / "solution.csv").write_text("image_name,label,usage\nx,0,Public\n"),
        INFER,
        [],
        "solution.csv needs columns",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_a_mistake_in_folds_models_or_flags_is_refused(copy, case):
    damage, script, flags, words = LATER[case]
    output = copy / "output"
    damage(output)
    flags = [str(flag).replace("OUT", str(output)) for flag in flags]
    refuse = refused if case == "diverging" else partial(refused_untouched, copy)  # it fails after its first epoch
    folders = flags_of(copy) if case == "diverging" else []
    line = refuse(script, *folders, *flags)
    assert words in line
    assert not (output / "owned").exists()
    assert not list(output.rglob(".tmp*")) + list(output.rglob("fold*resume*"))


# ---------------------------------------------------------------- input and output folders


def test_input_is_only_read(copy):
    before = snapshot(copy / "input")
    for path in [*(copy / "input").rglob("*"), copy / "input"]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    shutil.rmtree(copy / "output")
    done("00_prepare.py", *flags_of(copy), *PREPARE)
    done(TRAINER, *flags_of(copy), *TINY, "--fold", "all")
    done(OOF, *flags_of(copy))
    done(INFER, *flags_of(copy), "--tta", "none")
    assert snapshot(copy / "input") == before


@pytest.mark.parametrize("target", ["a file", "/proc", "/dev/full"])
@pytest.mark.skipif(sys.platform != "linux", reason="names Linux's folders")
def test_an_output_that_cannot_be_written_is_refused(copy, target):
    (copy / "a file").write_text("mine")
    output = copy / target if target == "a file" else Path(target) / "output"
    line = refused("00_prepare.py", "--input", copy / "input", "--output", output, *PREPARE)
    assert "can't be written" in line
    assert (copy / "a file").read_text() == "mine"


@pytest.mark.parametrize("script", ["00_prepare.py", TRAINER, OOF, INFER])
def test_a_full_disk_leaves_the_earlier_files(copy, script, monkeypatch):
    """The disk is full as soon as a script writes to it."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = snapshot(copy)
    monkeypatch.setattr(os, "fsync", full)
    flags = {
        "00_prepare.py": [*PREPARE, "--overwrite"],
        TRAINER: [*TRAIN, "--overwrite"],
        OOF: [],
        INFER: ["--tta", "none"],
    }[script]
    result = kit(script, *flags_of(copy), *flags)
    *warnings, line = result.err.splitlines()
    assert result.code == 2
    assert "can't be written (No space left on device)" in line
    assert all("warning: no resume file" in warning for warning in warnings)
    after = snapshot(copy)
    assert after == before
