"""02_oof.py: scores against scikit-learn's, missing folds, forecast, undefined scores, comparisons and blends."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

from common import file_hash, softmax, write_csv, write_json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, done, refused
from PIL import Image
from scipy.special import expit
from scipy.stats import rankdata
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    roc_auc_score,
)

from kit.data.prepared import Prepared
from kit.score import thresholds
from kit.score.metrics import expectation
from kit.score.tasks import Classes, Numbers
from kit.submit.hidden_test import fit_thresholds
from kit.submit.submission import fit_cuts, label_cells, number_cells, prediction_cells
from kit.train.checkpoint import load_fold
from kit.train.inference import TTAS, predict

QUICK = ["--draws", 100]
FIGURE = r"(-?\d+\.\d{4}|nan)"
ROW = re.compile(rf"(\S.*?)  +{FIGURE} \({FIGURE} to {FIGURE}\)" + rf"(?:  +{FIGURE} \({FIGURE} to {FIGURE}\))?")
VERDICT = re.compile(
    r"(.+): (\w+) against (\w+): (.+)\n    Δ = (\S+), 95 % (\S+) … (\S+), better in (\d+) % of samples"
)
CV = re.compile(rf"CV {FIGURE} \((.+?), pooled, (.+)\), 95 % {FIGURE} to {FIGURE}")


def printed(out):
    """Return the rows of scores in 02's output, {title: [pooled, low, high, mean, low, high]}."""
    rows = [ROW.fullmatch(line).groups() for line in out.splitlines() if ROW.fullmatch(line)]
    return {title: [float(x) for x in figures if x is not None] for title, *figures in rows}


def last_line(out):
    """Return the CV line: score, (metric, what is scored), (low, high)."""
    score, metric, what, low, high = CV.fullmatch(out.splitlines()[-1]).groups()
    return float(score), (metric, what), (float(low), float(high))


def read_ledger(output):
    return pd.read_csv(output / "experiments.csv", dtype=str, keep_default_na=False).set_index("experiment")


def experiment(output, exp, targets, logits, metric="auc", groups=None, **config):
    """Write a finished experiment of three folds as 00 and 01 would, and return the flags for 02. logits: float [N, K],
    or one for each kind."""
    groups = np.arange(len(targets)) if groups is None else np.asarray(groups)
    logits = logits if isinstance(logits, dict) else dict.fromkeys(("best", "last", "views"), logits)
    classes = [f"class {k}" for k in range(logits["views"].shape[1])]
    folds = pd.DataFrame(dict(image_name=[f"{i:06}.png" for i in range(len(targets))], target=targets))
    folds.insert(1, "label", [classes[k] for k in targets])
    write_experiment(output, exp, Classes(classes), folds.assign(group=groups, fold=groups % 3), logits, metric, config)
    return ["--input", output / "input", "--output", output, *QUICK]


def write_experiment(output, exp, task, folds, logits, metric, config=None, sizes=()):
    """Write the files of a finished experiment: folds.csv, prepared.json, and for each fold logits, epochs, record and
    an empty foldK.pt. logits: {kind: float [N, K]}."""
    prepared, folder = output / "prepared", output / exp
    write_csv(prepared / "folds.csv", folds)
    folds_hash = file_hash(prepared / "folds.csv")
    about = dict(made_from={}, folds=3, seed=777, groups="none", submission={}, sizes=[*sizes], folds_hash=folds_hash)
    Prepared(folder=prepared, task=task, metric=metric, **about).write()
    config = dict(model="made up", keep="best", tta="none", folds_hash=folds_hash) | (config or {}) | dict(changed={})
    write_json(folder / "config.json", config)
    for fold in range(3):
        rows = (folds.fold == fold).to_numpy()
        columns = {f"{kind}_{k}": logits[kind][rows, k] for kind in logits for k in range(len(task))}
        table = folds.loc[rows, ["image_name", "target"]].reset_index(drop=True)
        write_csv(folder / f"fold{fold}.csv", pd.concat([table, pd.DataFrame(columns)], axis=1))
        names = ["loss", *dict.fromkeys(["accuracy", metric])]
        figures = {f"{part}_{name}": [0.5, 0.6] for part in ("train", "valid") for name in names}
        write_csv(folder / f"fold{fold}_epochs.csv", pd.DataFrame(dict(epoch=[1, 2], **figures, lr=1e-3, seconds=1.5)))
        write_json(folder / f"fold{fold}.json", dict(fold=fold, epoch=2, config=config, metric=metric))
        (folder / f"fold{fold}.pt").touch()


def noisy(targets, classes, signal, seed=0):
    """Return logits that know `signal` of the target."""
    return signal * np.eye(classes)[targets] + np.random.default_rng(seed).normal(size=(len(targets), classes))


@pytest.fixture
def copied(trained, tmp_path):
    """Return (flags, output folder) of a copy of the trained experiment, to be damaged."""
    shutil.copytree(trained.output, tmp_path / "output")
    return ["--input", trained.input, "--output", tmp_path / "output"], tmp_path / "output"


# ---------------------------------------------------------------- one experiment


def test_scores_and_tables_equal_scikit_learns(copied):
    flags, output = copied
    base, folds = output / "base", pd.read_csv(output / "prepared" / "folds.csv")
    out = done("02_oof.py", *flags)
    made = pd.concat([pd.read_csv(base / f"fold{k}.csv") for k in range(3)]).set_index("image_name")
    made = made.loc[folds.image_name]
    rows = printed(out)
    titles = dict(best="best epoch (optimistic: chosen by this score)", last="last epoch", views="d4 views (submitted)")
    for kind, title in titles.items():
        score = softmax(made[[f"{kind}_0", f"{kind}_1"]])[:, 1]
        by_fold = [roc_auc_score(folds.target[folds.fold == k], score[folds.fold == k]) for k in range(3)]
        pooled, low, high, mean, *_ = rows[title]
        assert pooled == pytest.approx(roc_auc_score(folds.target, score), abs=6e-5)
        assert mean == pytest.approx(np.mean(by_fold), abs=6e-5)
        assert 0 <= low < pooled < high <= 1
    assert rows[titles["views"]][0] != rows[titles["best"]][0], "eight views are not one"
    assert last_line(out) == (rows[titles["views"]][0], ("AUC", "d4 views"), tuple(rows[titles["views"]][1:3]))
    oof = pd.read_csv(base / "oof.csv")
    assert oof[["image_name", "fold"]].equals(folds[["image_name", "fold"]])
    assert oof.probability_1.to_numpy() == pytest.approx(score, abs=1e-8)
    wrong = {(a, b): int(((folds.target == a) & ((score > 0.5) == b)).sum()) for a in (0, 1) for b in (0, 1)}
    lines = [line.split() for line in out.splitlines()]
    assert ["0", str(wrong[0, 0]), str(wrong[0, 1])] in lines
    assert ["1", str(wrong[1, 0]), str(wrong[1, 1])] in lines
    epochs = pd.read_csv(base / "fold2_epochs.csv")
    assert ["2", *(f"{value:.4f}" for value in [*epochs.train_auc, *epochs.valid_auc])] in lines, "table 4.2"
    for name in ("confusion.png", "roc.png", "curves.png"):
        assert min(Image.open(base / name).size) > 300


def test_oof_predictions_come_from_the_model_that_did_not_see_the_image(trained):
    folds = pd.read_csv(trained.output / "prepared" / "folds.csv")
    images = np.load(trained.output / "prepared" / "train_32.npy", mmap_mode="r")
    done("02_oof.py", *trained.flags, *QUICK)
    oof = pd.read_csv(trained.base / "oof.csv")
    for fold in range(3):
        saved, model = load_fold(trained.base / f"fold{fold}.pt", torch.device("cpu"))
        held_out = np.flatnonzero(folds.fold == fold)
        logits = predict(TTAS[saved["config"]["tta"]](model), images, held_out, 5, torch.device("cpu"))
        assert oof.filter(like="probability_").to_numpy()[held_out] == pytest.approx(softmax(logits), abs=1e-5)


def test_the_cv_of_the_finished_folds(copied):
    flags, output = copied
    done("02_oof.py", *flags, *QUICK)
    assert read_ledger(output).loc["base", "folds"] == "3 of 3"
    (output / "base" / "fold1.pt").unlink()
    out = done("02_oof.py", *flags, *QUICK)
    parts = [pd.read_csv(output / "base" / f"fold{k}.csv") for k in (0, 2)]
    scores = [softmax(part[["views_0", "views_1"]])[:, 1] for part in parts]
    expected = roc_auc_score(pd.concat(parts).target, np.concatenate(scores))
    cv, what, _ = last_line(out)
    assert cv == pytest.approx(expected, abs=6e-5)
    assert what == ("AUC", "d4 views, 2 of 3 folds")
    by_fold = [roc_auc_score(part.target, score) for part, score in zip(parts, scores, strict=True)]
    assert printed(out)["d4 views (submitted)"][3] == pytest.approx(np.mean(by_fold), abs=6e-5)
    oof = pd.read_csv(output / "base" / "oof.csv")
    assert sorted(oof.fold.unique()) == [0, 2]
    row = read_ledger(output).loc["base"]
    assert (row.folds, row.fold1, row.fold1_train_auc) == ("2 of 3", "", "")
    assert [float(row.fold0), float(row.fold2)] == pytest.approx(by_fold, abs=1e-6)
    assert "only 2 of 3 folds are finished" in (output / "base" / "report.html").read_text()
    for k in (0, 2):
        (output / "base" / f"fold{k}.json").unlink()
    assert "has no finished fold" in refused("02_oof.py", *flags)
    assert "nowhere has no finished fold" in refused("02_oof.py", "nowhere", *flags)


def test_other_folds_and_damaged_predictions_are_refused(copied):
    flags, output = copied
    base = output / "base"
    content = (base / "fold0.csv").read_text()
    shutil.copy(base / "fold1.csv", base / "fold0.csv")
    assert "fold0.csv doesn't hold the images of fold 0" in refused("02_oof.py", *flags)
    rows = content.splitlines()
    cells = rows[2].split(",")
    rows[2] = ",".join([*cells[:2], "nan", *cells[3:]])
    (base / "fold0.csv").write_text("\n".join(rows) + "\n")
    assert cells[0] in refused("02_oof.py", *flags)
    folds = output / "prepared" / "folds.csv"
    rows = folds.read_text().splitlines()
    rows[1] = rows[1][:-1] + str((int(rows[1][-1]) + 1) % 3)
    folds.write_text("\n".join(rows) + "\n")
    assert "folds.csv" in refused("02_oof.py", *flags)
    prepared = json.loads((output / "prepared" / "prepared.json").read_text())
    write_json(output / "prepared" / "prepared.json", prepared | dict(folds_hash=file_hash(folds)))
    assert "other folds" in refused("02_oof.py", *flags)


def test_intervals_resample_groups(tmp_path):
    """Ten copies of each image are one piece of evidence: drawn one by one, they would look like ten."""
    targets = np.arange(90) % 2
    logits, many = noisy(targets, 2, 0.7), np.repeat(np.arange(90), 10)
    widths = {}
    for name, rows, groups in (("alone", np.arange(90), None), ("copies", many, many), ("images", many, None)):
        flags = experiment(tmp_path / name, "base", targets[rows], logits[rows], groups=groups)
        cv, _, (low, high) = last_line(done("02_oof.py", *flags, "--draws", 300))
        assert low < cv < high
        widths[name] = high - low
    assert widths["copies"] == pytest.approx(widths["alone"], rel=0.15)
    assert widths["images"] < 0.5 * widths["copies"]


# ---------------------------------------------------------------- the forecast


def with_candidates(output, tests, **changed):
    """Add to prepared.json what 00_prepare.py finds about the test set: candidates, of which 20 clusters are chosen."""
    candidate = dict(split_up=0, distance=0.1, similarity=0.5, test_similarity=0.5)
    candidate |= dict(nearly_best=False, chosen=False, near_enough=True)
    candidates = [
        candidate | dict(name="each image alone", clusters=0, score=0.95),
        candidate | dict(name="20 clusters", clusters=20, score=0.8, nearly_best=True, chosen=True),
        candidate | dict(name="14 clusters", clusters=14, score=0.7, nearly_best=True),
        candidate | dict(name="10 clusters", clusters=10, score=None),
    ]
    path = output / "prepared" / "prepared.json"
    write_json(path, json.loads(path.read_text()) | dict(candidates=candidates) | changed)
    write_csv(path.with_name("test.csv"), pd.DataFrame(dict(image_name=[f"t{i}.png" for i in range(tests)])))


FORECAST = "8 in 10: the whole test set scores "


def forecast_of(out):
    """Return the bounds in the forecast line of 02's output, the rest of the line, and how many lines follow."""
    lines = out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith(FORECAST))
    low, high, rest = re.fullmatch(r".*scores (-?\d\.\d{3}) to (\d\.\d{3}) (\(.*\))", lines[at]).groups()
    return float(low), float(high), rest, len(lines) - 1 - at


def test_the_leaderboard_forecast_is_printed_before_the_cv(tmp_path):
    targets = np.arange(120) % 2
    logits = noisy(targets, 2, 1.5)
    flags = experiment(tmp_path, "base", targets, logits)
    without = done("02_oof.py", *flags)
    assert FORECAST not in without, "folds weren't compared with the test set"
    with_candidates(tmp_path, 40)
    out = done("02_oof.py", *flags)
    cv = last_line(out)[0]
    assert out.splitlines()[-1] == without.splitlines()[-1]
    low, high, rest, after = forecast_of(out)
    odds = (1 - cv) / cv
    assert rest == f"(matched folds, 20 clusters; plain folds would say {1 / (1 + odds * 4 / 19):.3f})"
    assert low < 1 / (1 + odds * 12 / 7) < cv < high <= 1
    assert after == 2, "what it rests on, and the CV"
    with_candidates(tmp_path, 4000)
    narrower = forecast_of(done("02_oof.py", *flags))
    assert low < narrower[0] < narrower[1] < high, "a larger test set varies less"
    path = tmp_path / "base" / "report.html"
    assert FORECAST in path.read_text()
    with_candidates(tmp_path, 40, candidates=None)
    assert done("02_oof.py", *flags) == without
    assert FORECAST not in path.read_text()


def test_the_forecast_of_a_loss_and_of_an_undefined_cv(tmp_path):
    targets = np.arange(120) % 3
    flags = experiment(tmp_path / "loss", "base", targets, noisy(targets, 3, 2.0), metric="logloss")
    with_candidates(tmp_path / "loss", 10)
    out = done("02_oof.py", *flags)
    low, high, rest, _ = forecast_of(out)
    cv = last_line(out)[0]
    assert 0 <= low < cv < high
    assert rest.endswith(f"would say {cv * 0.95 / 0.8:.3f})")
    flags = experiment(tmp_path / "none", "base", np.zeros(60, int), noisy(np.zeros(60, int), 2, 1.0))
    with_candidates(tmp_path / "none", 10)
    out = done("02_oof.py", *flags)
    assert np.isnan(last_line(out)[0])
    assert FORECAST not in out


# ---------------------------------------------------------------- the metric


def test_the_metric_of_00_decides_and_another_is_shown_beside_it(tmp_path):
    targets = np.arange(120) % 4
    logits = {kind: noisy(targets, 4, 1.0, seed) for seed, kind in enumerate(("best", "last", "views"))}
    flags = experiment(tmp_path, "base", targets, logits, metric="logloss", tta="d4", keep="last")
    p = {kind: softmax(values) for kind, values in logits.items()}
    out = done("02_oof.py", *flags)
    rows = printed(out)
    for kind, title in dict(best="best epoch", last="last epoch", views="d4 views (submitted)").items():
        assert rows[title][0] == pytest.approx(log_loss(targets, p[kind]), abs=6e-5)
    assert last_line(out)[:2] == (rows["d4 views (submitted)"][0], ("log loss", "d4 views"))
    other = done("02_oof.py", *flags, "--metric", "balanced-accuracy")
    assert other.splitlines()[-1] == out.splitlines()[-1]
    (title,) = printed(other).keys() - rows.keys()
    pooled, low, high, mean, *_ = printed(other)[title]
    predicted = p["views"].argmax(axis=1)
    assert pooled == pytest.approx(balanced_accuracy_score(targets, predicted), abs=6e-5)
    folds = np.arange(120) % 3
    by_fold = [balanced_accuracy_score(targets[folds == k], predicted[folds == k]) for k in range(3)]
    assert mean == pytest.approx(np.mean(by_fold), abs=6e-5)
    assert low < pooled < high
    row = read_ledger(tmp_path).loc["base"]
    assert row.metric == "logloss"
    assert float(row.cv) == pytest.approx(log_loss(targets, p["views"]), abs=1e-6)
    assert float(row.accuracy) == pytest.approx(accuracy_score(targets, predicted), abs=1e-6)
    assert row.fold0_valid_logloss == "0.5000 0.6000"
    assert "--metric pauc: " in refused("02_oof.py", *flags, "--metric", "pauc")


def test_folds_trained_for_another_metric_are_refused(tmp_path):
    targets = np.arange(60) % 2
    flags = experiment(tmp_path, "base", targets, noisy(targets, 2, 1))
    path = tmp_path / "prepared" / "prepared.json"
    write_json(path, json.loads(path.read_text()) | dict(metric="f1"))
    assert "has no valid_f1" in refused("02_oof.py", *flags)


def test_02_starts_without_torch():
    code = "import runpy, sys; runpy.run_path('02_oof.py'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


def biased(count=600, seed=0):
    """Return targets, 1 in 8 of the second class, and logits that take it for rarer than it is."""
    targets = (np.arange(count) % 8 == 0).astype(int)
    return targets, noisy(targets, 2, 1.5, seed) - [0, 3]


def test_the_cv_is_by_cuts_of_the_other_folds_and_the_cut_of_all_is_printed(tmp_path):
    targets, logits = biased()
    flags = experiment(tmp_path, "base", targets, logits, metric="f1-positive")
    out, p, folds = done("02_oof.py", *flags), softmax(logits), np.arange(600) % 3
    read = np.zeros(600, bool)
    for k in range(3):
        cut = thresholds.fit("f1-positive", targets[folds != k], p[folds != k])[0, 0] - 0.5
        read[folds == k] = p[folds == k, 1] > expit(cut)
    honest = f1_score(targets, read)
    assert last_line(out)[0] == pytest.approx(honest, abs=6e-5)
    assert honest > f1_score(targets, p[:, 1] > 0.5) + 0.1
    cut = expit(thresholds.fit("f1-positive", targets, p)[0, 0] - 0.5)
    basis = "fitted out of fold on all images; each fold is scored by those of the other folds"
    assert f"'class 1' is read above {cut:.3g}, {basis}" in out
    assert 0.01 < cut < 0.3
    matrix = [[int(figure) for figure in row.split()[-2:]] for row in out.splitlines() if re.match(r"class \d  ", row)]
    assert matrix == confusion_matrix(targets, read).tolist(), "as the metric reads them"
    table = pd.read_csv(tmp_path / "base" / "oof.csv")
    assert table["probability_class 1"].to_numpy() == pytest.approx(p[:, 1], abs=1e-6), "not moved"
    assert float(read_ledger(tmp_path).accuracy["base"]) == pytest.approx(accuracy_score(targets, p.argmax(axis=1)))
    for k in (1, 2):
        (tmp_path / "base" / f"fold{k}.pt").unlink()
    assert "each fold is scored by its own: optimistic" in done("02_oof.py", *flags)
    assert "is read above" not in done("02_oof.py", *experiment(tmp_path / "auc", "base", targets, logits))


def test_03_writes_labels_by_the_printed_cut_which_hidden_test_sets_find_too(trained, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(trained.output, output, ignore=shutil.ignore_patterns("submission*", "*_test.*", "*.html"))
    path = output / "prepared" / "prepared.json"
    prepared = json.loads(path.read_text())
    form = prepared["submission"] | dict(value="label")
    write_json(path, prepared | dict(metric="f1-positive", submission=form))
    folds = []
    for k in range(3):
        table = pd.read_csv(output / "base" / f"fold{k}.csv", dtype={"image_name": str})
        table[["views_0", "views_1"]] = noisy(table.target.to_numpy(), 2, 1.5, k) - [0, 3]
        write_csv(output / "base" / f"fold{k}.csv", table)
        folds.append(table)
    held_out = pd.concat(folds)
    p = softmax(held_out[["views_0", "views_1"]].to_numpy())
    cuts = thresholds.fit("f1-positive", held_out.target.to_numpy(), p)
    said = f"'1' is read above {expit(cuts[0, 0] - 0.5):.3g}, fitted out of fold on all images\n"
    assert said in done("03_infer.py", "--input", trained.input, "--output", output)
    tests = np.mean([softmax(np.load(output / "base" / f"fold{k}_test.npy")) for k in range(3)], axis=0)
    (path,) = (output / "base").glob("submission_*")
    written = np.loadtxt(path, delimiter=",", usecols=1)
    assert written.tolist() == (tests[:, 1] > expit(cuts[0, 0] - 0.5)).tolist() != tests.argmax(axis=1).tolist()
    about = dict(exp="base", folder=output / "base", folds=[0, 1, 2], metric="f1-positive", form=form)
    ensemble = SimpleNamespace(task=Classes(["0", "1"]), **about)
    assert fit_thresholds([ensemble], lambda parts: parts[0]) == pytest.approx(cuts)


def test_cells_hold_what_is_read_at_the_cuts(capsys):
    """Labels and whole numbers by the cuts; ranked labels and sums of probabilities as they were."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 4, 400)
    p = softmax(noisy(targets, 4, 1.5) + np.eye(4)[3] * 2.5)
    grades, numbers = Classes(list("0123")), Numbers(["grade"], [[0, 3]])
    cuts = fit_cuts(targets, p, grades, "qwk", dict(value="label"))
    expected = (expectation(p)[:, None] > cuts[0]).sum(axis=1)
    assert f"grades are read from {cuts[0, 0]:.3g} in place of 0.5, " in capsys.readouterr().out
    for value, cells in (("label", label_cells), ("probability", prediction_cells)):
        assert np.array_equal(cuts, fit_cuts(targets, p, grades, "qwk", dict(value=value)))
        assert ("probabilities are moved" in capsys.readouterr().out) == (value == "probability")
        rows = [cells(row, [0, 1, 2, 3], grades, "qwk", dict(width=4)) for row in thresholds.apply("qwk", p, cuts)]
        read = [int(row[0]) if value == "label" else np.array(row, float) @ range(4) for row in rows]
        assert np.abs(np.array(read) - expected).max() <= 0.5
    for form in (dict(value="top"), dict(value="probability", summed=["2", "3"])):
        assert fit_cuts(targets, p, grades, "qwk", form) is None
    x = np.linspace(0, 3, 400)[:, None]
    cuts = fit_cuts(np.clip(x + 0.3, 0, 3).astype(np.float32), x, numbers, "qwk-numbers", dict(value="number"))
    assert "numbers are read from 0." in capsys.readouterr().out
    rows = [
        number_cells(row, [0], numbers, "qwk-numbers", dict(width=1))
        for row in thresholds.apply("qwk-numbers", x, cuts)
    ]
    assert np.ravel(rows).tolist() == [str(k) for k in (x > cuts[0]).sum(axis=1)]
    assert number_cells(np.array([1.25]), [0], numbers, "rmse", dict(width=1)) == ["1.25"]


# ---------------------------------------------------------------- undefined scores


def test_an_undefined_training_score_is_nan(tmp_path):
    targets = np.arange(60) % 2
    flags = experiment(tmp_path, "base", targets, noisy(targets, 2, 1))
    for fold, missing in ((0, ""), (1, "nan")):
        path = tmp_path / "base" / f"fold{fold}_epochs.csv"
        pd.read_csv(path).assign(train_auc=[np.nan, 0.75]).to_csv(path, index=False, na_rep=missing)
    lines = [line.split() for line in done("02_oof.py", *flags).splitlines()]
    for fold in "01":
        assert [fold, "nan", "0.7500", "0.5000", "0.6000"] in lines
    assert ["mean", "0.5000", "0.7000", "0.5000", "0.6000"] in lines, "the mean of the folds that have a score"
    assert read_ledger(tmp_path).loc["base", ["fold0_train_auc", "fold1_train_auc"]].tolist() == ["nan 0.7500"] * 2


def test_a_class_missing_in_folds_and_draws(tmp_path):
    """The third class has one image: two folds and a third of the draws lack it, and leave it out of their mean."""
    targets = np.arange(90) % 2
    targets[7] = 2
    logits, worse = noisy(targets, 3, 3), noisy(targets, 3, 0.3)
    flags = experiment(tmp_path, "base", targets, logits)
    experiment(tmp_path, "worse", targets, worse)
    experiment(tmp_path, "same", targets, logits)
    out = done("02_oof.py", "base", "worse", "same", *flags)
    p, folds = softmax(logits), np.arange(90) % 3
    by_fold = []
    for k in range(3):
        rows = folds == k
        present = [c for c in range(3) if c in targets[rows]]
        by_fold.append(np.mean([roc_auc_score(targets[rows] == c, p[rows, c]) for c in present]))
    pooled, low, high, mean, mean_low, mean_high = printed(out)["best epoch (optimistic: chosen by this score)"]
    assert pooled == pytest.approx(roc_auc_score(targets, p, multi_class="ovr"), abs=6e-5)
    assert mean == pytest.approx(np.mean(by_fold), abs=6e-5)
    assert low < pooled < high
    assert mean_low < mean < mean_high
    assert "nan" not in out
    (_, _, _, worse, *figures), (_, _, _, same, *zeros) = VERDICT.findall(out)[:2]
    assert worse == "base scores higher on these images (one seed each)"
    delta, low, high, better = map(float, figures)
    assert low < delta < high < 0 == better
    assert (same, [*map(float, zeros)]) == ("no evidence either way", [0, 0, 0, 0])


def test_one_class_only_gives_no_cv_and_no_verdict(tmp_path):
    """Of three folds one is finished, and all its images are of one class."""
    targets = (np.arange(60) % 3 == 0).astype(int)
    flags = experiment(tmp_path, "base", targets, noisy(targets, 2, 1))
    experiment(tmp_path, "other", targets, noisy(targets, 2, 1, seed=1))
    for exp in ("base", "other"):
        for k in (1, 2):
            (tmp_path / exp / f"fold{k}.pt").unlink()
    out = done("02_oof.py", "base", "other", *flags)
    assert [match[0] for match in CV.findall(out)] == ["nan"] * 3, "of each, and of their blend"
    assert "can't be compared" in out
    assert "scores higher" not in out
    assert "better" not in out
    assert "no evidence" not in out


# ---------------------------------------------------------------- several experiments


def test_experiments_are_compared_and_blended_on_the_folds_that_all_have(tmp_path):
    targets = np.arange(150) % 2
    logits = {exp: noisy(targets, 2, signal, seed) for seed, (exp, signal) in enumerate(dict(a=2.0, b=0.3).items())}
    flags = experiment(tmp_path, "a", targets, logits["a"], metric="logloss")
    experiment(tmp_path, "b", targets, logits["b"], metric="logloss")
    (tmp_path / "a" / "fold0.pt").unlink()
    (tmp_path / "b" / "fold1.pt").unlink()
    rows = np.arange(150) % 3 == 2
    p = {exp: softmax(values)[rows] for exp, values in logits.items()}
    p["mean blend"] = (p["a"] + p["b"]) / 2
    ranks = rankdata(p["a"], axis=0) + rankdata(p["b"], axis=0)
    p["rank blend"] = ranks / ranks.sum(axis=1, keepdims=True)
    out = done("02_oof.py", "a", "b", *flags, "--metric", "auc", "--lb-public", -0.5)
    with_auc, with_loss = out.split("\nlog loss, pooled")
    assert "rank blend" not in printed(with_loss)
    for name, probabilities in p.items():
        assert printed(with_auc)[name][0] == pytest.approx(roc_auc_score(targets[rows], probabilities[:, 1]), abs=6e-5)
        if name != "rank blend":
            assert printed(with_loss)[name][0] == pytest.approx(log_loss(targets[rows], probabilities), abs=6e-5)
    verdicts = [verdict for verdict in VERDICT.findall(out) if verdict[1:3] == ("b", "a")]
    for (metric, _, _, verdict, *figures), sign in zip(verdicts, (-1, 1), strict=True):
        better = "higher" if metric == "AUC" else "lower, so better,"
        assert verdict == f"a scores {better} on these images (one seed each)"
        delta, low, high, share = map(float, figures)
        assert min(sign * low, sign * delta, sign * high) > 0
        assert share < 5
    ledger = read_ledger(tmp_path)
    assert [*ledger.index] == ["a+b", "a", "b"]
    assert ledger.folds.tolist() == ["1 of 3", "2 of 3", "2 of 3"]
    assert ledger.public.tolist() == ["-0.500000", "", ""]
    assert float(ledger.cv["a+b"]) == pytest.approx(log_loss(targets[rows], p["mean blend"]), abs=1e-6)
    (tmp_path / "a" / "fold2.pt").unlink()
    assert "no fold is finished in all experiments (a: 1; b: 0, 2)" in refused("02_oof.py", "a", "b", *flags)
    assert "named twice" in refused("02_oof.py", "a", "a", *flags)


# ---------------------------------------------------------------- many classes


@pytest.mark.parametrize("classes", [12, 15])
def test_confusions_of_many_classes_fit_the_screen(tmp_path, classes):
    targets = np.arange(300) % classes
    flags = experiment(tmp_path, "base", targets, noisy(targets, classes, 1), metric="accuracy")
    path = tmp_path / "prepared" / "prepared.json"
    prepared = json.loads(path.read_text())
    names = [f"{c} of those classes that have an endless name {'x' * 60}" for c in range(classes)]
    write_json(path, prepared | dict(classes=names))
    out = done("02_oof.py", *flags)
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 120
    predicted = softmax(noisy(targets, classes, 1)).argmax(axis=1)
    assert last_line(out)[0] == pytest.approx(accuracy_score(targets, predicted), abs=6e-5)
    counts = np.bincount(targets * classes + predicted, minlength=classes**2).reshape(classes, classes)
    rows = [line.split() for line in out.splitlines()]
    if classes == 12:
        assert [row[-12:] for row in rows if row[-12:] == [*map(str, counts[3])]]
    else:
        np.fill_diagonal(counts, 0)
        shown = [
            (int(row[0]), int(row[row.index("→") + 1]), int(row[-1])) for row in rows if "→" in row and row[0].isdigit()
        ]
        assert [n for *_, n in shown] == sorted(counts.ravel(), reverse=True)[:10]
        assert all(counts[label, prediction] == n for label, prediction, n in shown)
