"""The four scripts on real images, scikit-learn's handwritten digits; the demo competition; --help; argument files."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, done, load_path, png, refused, run_main, write_csv, write_zip
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, roc_auc_score

NAMES = "zero one two three four five six seven eight nine".split()
TRAIN, TEST = 750, 250
LEARN = "--model test_resnet --weights none --size 32 --epochs 4 --batch-size 25 --lr 8e-3 --min-lr 1e-4".split()


def digits(folder, label_of):
    """Write a competition of the first 1000 digits, but no sample_submit.csv. → names and labels of the test images."""
    folder.mkdir()
    data = load_digits()
    images = [png((image * 15.9).astype(np.uint8)) for image in data.images]
    labels = [label_of(digit) for digit in data.target]
    names = [f"{i:04}" for i in range(TRAIN + TEST)]  # without the file's suffix, as on Kaggle
    for part, rows in (("train", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        write_zip(folder / f"{part}.zip", {f"{names[i]}.png": images[i] for i in rows})
    write_csv(folder / "train.csv", [("image_name", "label"), *((names[i], labels[i]) for i in range(TRAIN))])
    return names[TRAIN:], labels[TRAIN : TRAIN + TEST]


def cross_validate_and_submit(flags):
    """Run 00, 01 and 03. → the CV and the submission's path."""
    done("00_prepare.py", *flags, "--size", 32, "--folds", 3, "--groups", "none")  # 8 × 8 px hold no features
    done("01_train_fold.py", *flags, *LEARN, "--fold", "all", "--augment", "none")
    done("03_infer.py", *flags)
    (submission,) = (flags[3] / "base").glob("submission_base_CV*.csv")
    return float(submission.stem.split("_CV")[1]), submission


@pytest.mark.slow
def test_ten_string_classes_with_a_header(tmp_path):
    names, labels = digits(tmp_path / "input", lambda digit: NAMES[digit])
    columns = sorted(NAMES, reverse=True)
    write_csv(tmp_path / "input" / "sample_submit.csv", [("image_id", *columns), *((n, *[0.1] * 10) for n in names)])
    cv, submission = cross_validate_and_submit(["--input", tmp_path / "input", "--output", tmp_path / "output"])
    assert cv < 0.8, "log loss, the metric of a probability of each of more than two classes"
    table = pd.read_csv(submission, dtype={"image_id": str})
    assert list(table.columns) == ["image_id", *columns]
    assert table.image_id.tolist() == names
    assert accuracy_score(labels, table[columns].idxmax(axis=1)) > 0.75


def test_two_classes_without_a_header(tmp_path):
    names, labels = digits(tmp_path / "input", lambda digit: int(digit > 4))
    write_csv(tmp_path / "input" / "sample_submit.csv", [(name, 0) for name in names])
    cv, submission = cross_validate_and_submit(["--input", tmp_path / "input", "--output", tmp_path / "output"])
    assert cv > 0.9
    table = pd.read_csv(submission, header=None, dtype={0: str})
    assert table[0].tolist() == names
    assert roc_auc_score(labels, table[1]) > 0.9


# ---------------------------------------------------------------- the demo


def draw(folder, *more):
    run_main(load_path(ROOT / "input" / "make_demo.py"), "--folder", folder, "--products", 24, "--test-products", 8,
             "--side", 40, *more)  # fmt: skip


def test_demo_is_a_competition_whose_test_products_are_new(tmp_path):
    draw(tmp_path / "a")
    draw(tmp_path / "b")
    draw(tmp_path / "c", "--seed", 1)
    files = ["sample_submit.csv", "solution.csv", "sources.csv", "test.zip", "train.csv", "train.zip"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "train.zip").read_bytes() != (tmp_path / "c" / "train.zip").read_bytes()
    sources = pd.read_csv(tmp_path / "a" / "sources.csv")
    part = sources.image_name.str.split("/").str[0]
    assert not set(sources.source[part == "train"]) & set(sources.source[part == "test"])
    assert sources.source[part == "train"].value_counts().max() > 1
    labels = pd.read_csv(tmp_path / "a" / "train.csv").set_index("image_name").label
    train = sources[part == "train"]
    by_source = labels.loc[train.image_name.str.split("/").str[1]].groupby(train.source.to_numpy()).nunique()
    assert (by_source == 1).all()
    assert set(pd.read_csv(tmp_path / "a" / "solution.csv").usage) == {"Public", "Private"}


@pytest.mark.parametrize("script", ["00_prepare.py", "01_train_fold.py", "02_oof.py", "03_infer.py"])
def test_help_shows_commands_and_defaults(script):
    out = done(script, "--help")
    commands = re.findall(rf"^    python ({script}.*?)(?:  .*)?$", out, re.M)
    assert len(commands) >= 2
    assert "(default: output)" in out
    assert "None" not in out
    for command in commands:  # each names flags and arguments that are there
        given = [word for word in command.split()[1:] if word.startswith("--")]
        assert all(f"{flag} " in out for flag in given)


@pytest.mark.parametrize("script", ["00_prepare.py", "02_oof.py"])
def test_00_and_02_start_without_torch(script):
    code = f"""
import runpy, sys
sys.argv = ["{script}", "--help"]
try:
    runpy.run_path("{ROOT / script}", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert not sys.modules.keys() & {{"torch", "timm", "albumentations"}}
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_an_argument_file_may_name_another_and_hold_comments(tmp_path):
    (tmp_path / "first.args").write_text("# a comment\n--epochs 5 --lr 1e-3   # of mine\n\n--seed 3\n")
    (tmp_path / "second.args").write_text(f"@{tmp_path / 'first.args'}\n--lr 2e-3\n")
    out = done("01_train_fold.py", "--fold", 0, "--print-config", f"@{tmp_path / 'second.args'}", "--seed", 4)
    assert json.loads(out).items() >= dict(epochs=5, lr=2e-3, seed=4).items()
    assert "nowhere.args" in refused("01_train_fold.py", "--fold", 0, f"@{tmp_path / 'nowhere.args'}")
