"""02_oof.py and 03_infer.py: out-of-fold honesty, TTA, the submission, and whatever must be refused."""

import csv
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, done, load, refused
from PIL import Image
from sklearn.metrics import roc_auc_score

import model as models
from data import auc, softmax

CPU = torch.device("cpu")


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained experiment, to be damaged. → flags, output folder."""
    shutil.copytree(trained.output, tmp_path / "output")
    return ["--input", trained.input, "--output", tmp_path / "output"], tmp_path / "output"


# ---------------------------------------------------------------- 02


def test_oof_rows_come_from_models_that_did_not_see_them(trained):
    folds = pd.read_csv(trained.output / "prepared" / "folds.csv")
    images = np.load(trained.output / "prepared" / "train_32.npy", mmap_mode="r")
    done("02_oof.py", *trained.flags)
    oof = pd.read_csv(trained.base / "oof.csv")
    assert oof.image_name.tolist() == folds.image_name.tolist()
    for fold in range(3):
        saved, classifier = models.load_fold(trained.base / f"fold{fold}.pt", CPU)
        assert saved["fold"] == fold
        held_out = np.flatnonzero(folds.fold == fold)
        expected = softmax(models.predict(classifier, images, held_out, 5, CPU))
        assert oof.filter(like="probability_").to_numpy()[held_out] == pytest.approx(expected, abs=1e-5)


def test_scores_of_the_oof_table_are_the_printed_ones(trained):
    out = done("02_oof.py", *trained.flags)
    oof = pd.read_csv(trained.base / "oof.csv")
    pooled = roc_auc_score(oof.label, oof.probability_1)
    by_fold = [roc_auc_score(part.label, part.probability_1) for _, part in oof.groupby("fold")]
    assert f"CV (pooled out-of-fold AUC) {pooled:.4f}" in out
    assert f"best epoch   pooled {pooled:.4f} (" in out
    assert f"mean of the folds {np.mean(by_fold):.4f} (" in out
    assert f"accuracy {np.mean((oof.probability_1 > 0.5) == oof.label):.4f}" in out
    epochs = pd.read_csv(trained.base / "fold2_epochs.csv")
    row = next(line for line in out.splitlines() if line.startswith("2 "))
    cells = [f"{value:.4f}" for value in [*epochs.train_auc, *epochs.valid_auc]]
    assert row.split() == ["2", *cells], "table 4.2: train and valid AUC by epoch"
    for name in ("confusion.png", "roc.png", "curves.png"):
        assert min(Image.open(trained.base / name).size) > 300


def test_missing_folds_are_named(copied):
    flags, output = copied
    (output / "base" / "fold1.pt").unlink()
    for script in ("02_oof.py", "03_infer.py"):
        assert "no finished fold 1" in refused(script, *flags)
    assert "nowhere/config.json is missing" in refused("02_oof.py", "nowhere", *flags)


def test_folds_edited_or_of_another_run_are_refused(copied):
    flags, output = copied
    folds = output / "prepared" / "folds.csv"
    rows = folds.read_text().splitlines()
    rows[1] = rows[1][:-1] + str((int(rows[1][-1]) + 1) % 3)
    folds.write_text("\n".join(rows) + "\n")
    for script in ("02_oof.py", "03_infer.py"):
        assert "folds.csv" in refused(script, *flags)
    done("00_prepare.py", *flags, "--size", 32, "--folds", 3, "--seed", 1, "--overwrite")
    for script in ("02_oof.py", "03_infer.py"):
        assert "other folds" in refused(script, *flags)
    assert "folds_hash" in refused("01_train_fold.py", *flags, *TINY, "--fold", 0)


def test_predictions_of_another_fold_or_without_numbers_are_refused(copied):
    flags, output = copied
    base = output / "base"
    whole = (base / "fold0.csv").read_text()
    shutil.copy(base / "fold1.csv", base / "fold0.csv")
    assert "fold0.csv doesn't hold the images of fold 0" in refused("02_oof.py", *flags)
    rows = whole.splitlines()
    cells = rows[2].split(",")
    rows[2] = ",".join([*cells[:2], "nan", *cells[3:]])
    (base / "fold0.csv").write_text("\n".join(rows) + "\n")
    assert cells[0] in refused("02_oof.py", *flags)


def test_intervals_come_from_groups_and_hold_the_score(trained):
    oof = load("02_oof.py")
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 2
    score = np.clip(targets * 0.3 + rng.uniform(0, 0.7, 60), 0, 1)
    probabilities = np.stack([1 - score, score], axis=1)
    ten_copies = np.repeat(np.arange(60), 10)
    alone = oof.bootstrap_weights(np.arange(60), 500)
    grouped = oof.bootstrap_weights(ten_copies, 500)
    single = oof.bootstrap_weights(np.arange(600), 500)
    assert (grouped.reshape(500, 60, 10) == grouped.reshape(500, 60, 10)[..., :1]).all(), "a group is drawn whole"
    width = lambda w, rows: np.ptp(oof.interval(oof.scored(auc, targets[rows], probabilities[rows], w)[1]))  # noqa: E731
    assert width(grouped, ten_copies) == pytest.approx(width(alone, np.arange(60)), rel=0.15)
    assert width(single, ten_copies) < 0.5 * width(grouped, ten_copies), "drawn images would be sure of too much"
    low, high = oof.interval(oof.scored(auc, targets, probabilities, alone)[1])
    assert low < auc(targets, probabilities) < high
    out = done("02_oof.py", *trained.flags)
    assert "groups of" in out
    assert "best epoch" in out
    assert "last epoch" in out


@pytest.mark.parametrize("metric", ["auc", "accuracy", "logloss", "f1"])
def test_weights_are_repetitions_in_every_metric(metric):
    score = load("02_oof.py").METRICS[metric]
    rng = np.random.default_rng(1)
    for classes in (2, 4):
        targets, weights = rng.integers(0, classes, 200), rng.integers(0, 4, 200)
        probabilities = softmax(rng.normal(size=(200, classes)))
        rows = np.repeat(np.arange(200), weights)
        assert score(targets, probabilities, weights) == pytest.approx(score(targets[rows], probabilities[rows]))


def test_auc_is_scikit_learns():
    rng = np.random.default_rng(2)
    for classes in (2, 3):
        targets, weights = rng.integers(0, classes, 300), rng.integers(0, 3, 300)
        probabilities = softmax(rng.integers(0, 4, (300, classes)))  # with many ties
        expected = np.mean([
            roc_auc_score(targets == c, probabilities[:, c], sample_weight=weights)
            for c in ([1] if classes == 2 else range(classes))
        ])  # fmt: skip
        assert auc(targets, probabilities, weights) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(auc(np.zeros(3, int), np.full((3, 2), 0.5)))


def test_experiments_are_compared_and_blended(copied):
    flags, output = copied
    shutil.copytree(output / "base", output / "worse")
    rng = np.random.default_rng(0)
    for exp, signal in (("base", 2.0), ("worse", 0.2)):
        for path in (output / exp).glob("fold?.csv"):
            table = pd.read_csv(path)
            for kind in ("best", "last"):
                table[f"{kind}_1"] = signal * table.target + rng.normal(size=len(table))
                table[f"{kind}_0"] = 0.0
            table.to_csv(path, index=False)
    out = done("02_oof.py", "base", "worse", *flags)
    assert re.search(r"\nworse against base: base is better: Δ = -0\.\d+, 95 % -\S+ … -\S+, P\(Δ > 0\) = 0\.00", out)
    assert "mean of ranks" in out
    shutil.rmtree(output / "worse")
    shutil.copytree(output / "base", output / "same")
    out = done("02_oof.py", "base", "same", *flags)
    assert "same against base: no evidence either way: Δ = +0.0000, 95 % +0.0000 … +0.0000" in out
    config = json.loads((output / "same" / "config.json").read_text())
    (output / "same" / "config.json").write_text(json.dumps(config | dict(folds_hash="0")))
    assert "other folds" in refused("02_oof.py", "base", "same", *flags)
    assert "named twice" in refused("02_oof.py", "base", "base", *flags)


# ---------------------------------------------------------------- 03


def submission_of(output, exp="base"):
    (path,) = (output / exp).glob("submission_*.csv")
    with open(path, newline="") as file:
        return path, list(csv.reader(file))


def test_tta_is_the_mean_of_eight_views():
    torch.manual_seed(0)
    config = dict(model="test_resnet", model_kwargs={}, size=32, norm="thesis", weights="none", head="linear")
    classifier = models.build_model(config, 3).eval()
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3)).astype(np.uint8)
    views = [np.rot90(mirrored, k, (1, 2)) for mirrored in (images, images[:, :, ::-1]) for k in range(4)]
    assert len({view.tobytes() for view in views}) == 8
    each = [models.predict(classifier, np.ascontiguousarray(view), np.arange(5), 2, CPU) for view in views]
    together = models.predict(models.d4_views(classifier), images, np.arange(5), 2, CPU)
    assert together == pytest.approx(np.mean(each, axis=0), abs=1e-5)
    assert not np.allclose(together, each[0], atol=1e-3), "views of one model differ"


def test_submission_is_the_mean_over_folds_in_the_samples_format(copied):
    flags, output = copied
    out = done("03_infer.py", *flags, "--tta", "none", "--competition-id", 1106)
    path, rows = submission_of(output)
    cv = out.split("CV ")[-1][:6]
    assert path.name == f"submission_base_CV{cv}.csv"
    assert f'signate submit --competition-id=1106 {path} --note "base CV {cv}"' in out
    sample = (flags[1] / "sample_submit.csv").read_text().splitlines()
    assert [row[0] for row in rows] == [line.split(",")[0] for line in sample]
    images = np.load(output / "prepared" / "test_32.npy")
    models_ = [models.load_fold(output / "base" / f"fold{k}.pt", CPU)[1] for k in range(3)]
    each = [softmax(models.predict(m, images, np.arange(len(images)), 7, CPU))[:, 1] for m in models_]
    assert [float(row[1]) for row in rows] == pytest.approx(np.mean(each, axis=0), abs=1e-5)
    solution = pd.read_csv(flags[1] / "solution.csv")
    public = solution.usage == "Public"
    score = roc_auc_score(solution.label[public], np.mean(each, axis=0)[public])
    assert f"public {score:.4f}" in out


def test_several_experiments_are_blended(copied):
    flags, output = copied
    done("01_train_fold.py", *flags, *TINY, "--fold", 0, "--exp", "other", "--seed", 1)
    assert "no finished fold 1" in refused("03_infer.py", "base", "other", *flags)
    for fold in (1, 2):
        done("01_train_fold.py", *flags, *TINY, "--fold", fold, "--exp", "other", "--seed", 1)
    for exps in (["base"], ["other"], ["base", "other"]):
        done("03_infer.py", *exps, *flags, "--tta", "none")
    (blend,) = output.glob("submission_base+other_CV*.csv")
    paths = [submission_of(output)[0], submission_of(output, "other")[0], blend]
    values = [np.loadtxt(path, delimiter=",", usecols=1) for path in paths]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2, abs=1e-6)
    assert not np.allclose(values[0], values[1])
    oof = [softmax_oof(output / exp) for exp in ("base", "other")]
    targets = np.concatenate([pd.read_csv(output / "base" / f"fold{k}.csv").target for k in range(3)])
    assert blend.stem.endswith(f"CV{roc_auc_score(targets, (oof[0] + oof[1])[:, 1]):.4f}")


def softmax_oof(folder):
    return softmax(np.concatenate([pd.read_csv(folder / f"fold{k}.csv").filter(like="best_") for k in range(3)]))


def test_a_model_of_other_folds_or_settings_is_refused(copied):
    flags, output = copied
    path = output / "base" / "fold1.pt"
    saved = torch.load(path)
    torch.save(saved | dict(folds_hash="0"), path)
    assert "fold1.pt was trained on other folds" in refused("03_infer.py", *flags)
    torch.save(saved | dict(config=saved["config"] | dict(lr=1.0)), path)
    assert "fold1.pt was trained with other settings" in refused("03_infer.py", *flags)
    path.write_bytes(path.read_bytes()[:5000])
    assert "fold1.pt is damaged" in refused("03_infer.py", *flags)
    saved["model"] = {
        key: value * torch.nan if value.is_floating_point() else value for key, value in saved["model"].items()
    }
    torch.save(saved, path)
    assert "no numbers" in refused("03_infer.py", *flags, "--tta", "none")
    assert not list((output / "base").glob("submission*"))


def test_a_labelled_or_headed_sample_is_followed(copied, tmp_path):
    flags, output = copied
    path = output / "prepared" / "prepared.json"
    prepared = json.loads(path.read_text())
    for submission, header in (
        (dict(header=["id", "class"], value="label", columns=None), ["id", "class"]),
        (dict(header=["id", "1", "0"], value="probability", columns=["1", "0"]), ["id", "1", "0"]),
    ):
        path.write_text(json.dumps(prepared | dict(submission=submission)))
        done("03_infer.py", *flags, "--tta", "none")
        _, rows = submission_of(output)
        assert rows[0] == header
        if submission["value"] == "label":
            assert {row[1] for row in rows[1:]} <= {"0", "1"}
            labels = [row[1] for row in rows[1:]]
        else:
            values = np.array([row[1:] for row in rows[1:]], float)
            assert values.sum(axis=1) == pytest.approx(np.ones(len(values)))
            assert labels == ["1" if one > zero else "0" for one, zero in values]
