"""Tasks: labels and numbers through all four scripts; many classes, and classes with few images."""

import json
import re
import shutil
from types import SimpleNamespace

from common import UserError, read_table

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import TINY, done, kit, png, refused, write_csv, write_zip
from scipy import special
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from kit.folds.split import assign_folds
from kit.score import thresholds
from kit.score.tasks import Classes, Labels, Numbers, task_from_json
from kit.train.linear_probe import C_VALUES, fit_head
from kit.train.losses import LOSSES, binary_cross_entropy, squared_error
from kit.train.settings import for_task

COLOURS = ["red", "green", "blue"]
RANGES = np.array([[0, 8], [-1, 1], [100, 300]])  # of three numbers
CLASSES = [f"c{k}" for k in range(6)]  # c4 has two images and c5 one
METRIC = dict(labels="column-auc", sets="f1-samples", numbers="mcrmse", number="rmse", classes="accuracy", binary="auc")
TRAIN, PREPARE = "01_train_fold.py", "--size 32 --folds 2 --groups none".split()
FLAGS = [*TINY, *"--epochs 12 --lr 1e-2 --augment none".split()]
QUICK = [*TINY, *"--epochs 1 --augment none".split()]
BOTH = pytest.mark.parametrize("kind", ["labels", "numbers"])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """An experiment's picture takes longer than its training here."""
    monkeypatch.setattr("kit.report.pictures.draw_classes", lambda *_: None)


# ---------------------------------------------------------------- small competitions


def noisy(rng, levels):
    """A noisy image, uint8 [24, 24, 3]; levels: of red, green and blue, 0 to 1."""
    return (rng.integers(0, 40, (24, 24, 3)) + 200 * np.asarray(levels)).astype(np.uint8)


def draw_targets(kind, count, rng):
    """→ (levels [n, 3] of the colours, the targets as kit/score/tasks.py has them)."""
    if kind in ("numbers", "number"):
        levels = rng.random((count, 3))
        values = RANGES[:, 0] + levels * np.ptp(RANGES, axis=1)
        return levels, values.round(3).astype(np.float32)[:, : 3 if kind == "numbers" else 1]
    if kind in ("labels", "sets"):
        levels = np.arange(count)[:, None] >> np.arange(3) & 1
        return levels, levels.astype(np.float32)
    targets = np.arange(count) % (2 if kind == "binary" else 4)
    return targets[:, None] + 1 >> np.arange(3) & 1, targets


def cells(kind, targets):
    """→ the cells of each image beside its name."""
    if kind in ("numbers", "number"):
        return [["" if np.isnan(value) else f"{value:g}" for value in row] for row in targets]
    if kind == "labels":
        return [[int(value) for value in row] for row in targets]
    if kind == "sets":
        return [[" ".join(np.array(COLOURS)[row > 0])] for row in targets]
    return [[CLASSES[target] if kind == "classes" else target] for target in targets]


def draw(folder, kind, train=32, test=8):
    """Writes a small competition whose colours show the target. → the right names, train, tests, classes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    levels, targets = draw_targets(kind, train, rng)
    test_levels, tests = draw_targets(kind, test, np.random.default_rng(1))
    classes = dict(labels=[*COLOURS, "rare"], sets=sorted(COLOURS), numbers=[*"abc"], number=["a"], classes=CLASSES)
    classes = classes.get(kind, ["0", "1"])
    if kind == "numbers":
        targets[5, 1] = np.nan
    if kind == "labels":  # one image has a label that it doesn't show
        targets, tests = (np.pad(part, [(0, 0), (0, 1)]) for part in (targets, tests))
        targets[3, 3] = 1
    if kind == "classes":
        levels[-3:], targets[-3:] = [(0, 0, 0), (0, 0, 0), (1, 1, 1)], [4, 4, 5]
    header = ["tags"] if kind == "sets" else ["label"] if kind in ("classes", "binary") else classes
    names, test_names = [f"{i:03}.png" for i in range(train)], [f"t{i}.png" for i in range(test)]
    pairs = [(name, *row) for name, row in zip(names, cells(kind, targets), strict=True)]
    write_csv(folder / "train.csv", [("image_name", *header), *pairs])
    images = zip(names, levels, strict=True), zip(test_names, test_levels, strict=True)
    for part, drawn in zip(("train", "test"), images, strict=True):
        write_zip(folder / f"{part}.zip", {f"{part}/{name}": png(noisy(rng, level)) for name, level in drawn})
    cell = dict(sets="red blue", classes="c1").get(kind, "0.5")
    rows = [(name, *[cell] * len(header)) for name in reversed(test_names)]
    write_csv(folder / "sample_submit.csv", [("image_name", *header), *rows])
    if kind == "sets":
        targets, tests = (part[:, [2, 1, 0]] for part in (targets, tests))  # as the names are sorted
    return SimpleNamespace(names=names, train=targets, tests=tests[::-1], classes=classes)


def flags_of(folder):
    return ["--input", folder / "input", "--output", folder / "output"]


def make_world(folder, kind, more=FLAGS, **counts):
    """Draws a competition, prepares it and trains both folds."""
    drawn, flags = draw(folder / "input", kind, **counts), flags_of(folder)
    out = done("00_prepare.py", *flags, *PREPARE, "--metric", METRIC[kind])
    out += done(TRAIN, *flags, *more, "--fold", "all")
    task = task_from_json(json.loads((folder / "output" / "prepared" / "prepared.json").read_text()))
    return SimpleNamespace(flags=flags, folder=folder, drawn=drawn, out=out, task=task)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A function: kind → a trained competition of that kind, for reading only."""
    made = {}

    def world(kind):
        if kind not in made:
            made[kind] = make_world(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return world


@pytest.fixture
def copied(worlds, tmp_path):
    """A function: kind → a copy of that competition, to be written to."""

    def copy(kind):
        world = worlds(kind)
        shutil.copytree(world.folder / "output", tmp_path / "output")
        flags = ["--input", world.flags[1], "--output", tmp_path / "output"]
        return SimpleNamespace(**{**vars(world), "flags": flags, "folder": tmp_path, "base": tmp_path / "output/base"})

    return copy


def read_folds(world):
    return read_table(world.folder / "output" / "prepared" / "folds.csv", "")


def oof_of(world, exp="base", kind="views"):
    """→ (folds int [N], targets, logits [N, K]) of both folds' files."""
    tables = [pd.read_csv(world.folder / "output" / exp / f"fold{k}.csv", dtype=dict(target=str)) for k in range(2)]
    columns = [f"{kind}_{c}" for c in range(len(world.task))]
    table = pd.concat(tables, keys=range(2)).fillna("nan" if world.task.key == "numbers" else "")
    targets = world.task.read_targets(table.target)
    return table.index.get_level_values(0).to_numpy(), targets, table[columns].to_numpy(float)


def submitted(folder):
    """→ the only submission's path, and its cells beside the names."""
    (path,) = folder.glob("submission_*.csv")
    return path, pd.read_csv(path, dtype=str, keep_default_na=False).iloc[:, 1:].to_numpy()


def relative_errors(predictions, targets):
    return np.abs(predictions - targets) / np.ptp(RANGES, axis=1)[: predictions.shape[1]]


# ---------------------------------------------------------------- targets and folds


def test_targets_are_written_and_read_back():
    nan = np.nan
    for task, targets in (
        (Classes([*"abc"]), np.array([2, 0, 1])),
        (Labels([*"abc"]), np.array([[0, 0, 0], [1, 0, 1], [0, 1, 0]], np.float32)),
        (Labels([*"ab"]), np.zeros((2, 2), np.float32)),
        (Numbers([*"ab"], []), np.array([[1 / 3, nan], [-1e-9, 16777217], [nan, 5]], np.float32)),
        (Numbers(["a"], []), np.array([[0.1], [2]], np.float32)),
    ):
        task = task.fitted(targets)
        again = task.read_targets(task.write_targets(targets))
        assert again.dtype == targets.dtype
        assert np.array_equal(again, targets, equal_nan=task.key == "numbers"), task
        answers, predictions = task.perfect(targets)
        assert task.key != "classes" or np.array_equal(predictions.argmax(axis=1), answers)


@pytest.mark.parametrize("kind", ["labels", "sets", "numbers", "number"])
def test_the_folds_table_holds_the_targets_and_each_fold_its_share(kind, worlds):
    world = worlds(kind)
    drawn, folds = world.drawn, read_folds(world)
    assert world.task.names == drawn.classes
    targets = world.task.read_targets(folds.target)
    order = [drawn.names.index(name) for name in folds.image_name]
    assert np.array_equal(targets, drawn.train[order], equal_nan=True)
    parts = [targets[folds.fold == k] for k in range(2)]
    assert [len(part) for part in parts] == [16, 16]
    if world.task.key == "labels":
        counts = np.array([part.sum(axis=0) for part in parts])
        assert np.abs(counts[0] - counts[1]).max() <= 2
        missing = "all their images are in one fold, whose model never learns them: rare" in world.out
        assert missing == (kind == "labels")
    else:
        assert world.task.ranges == np.stack([np.nanmin(targets, 0), np.nanmax(targets, 0)], 1).tolist()
        thirds = pd.crosstab(world.task.strata(targets), folds.fold).to_numpy()
        assert thirds.shape == (3, 2)
        assert np.abs(thirds[:, 0] - thirds[:, 1]).max() <= 1
        means = [np.nanmean(world.task.to_01(part)) for part in parts]
        assert means[0] == pytest.approx(means[1], abs=0.1)


def test_each_fold_gets_its_share_of_each_label_and_no_group_is_split():
    rng = np.random.default_rng(0)
    labels, groups = rng.random((400, 6)) < [0.5, 0.2, 0.1, 0.05, 0.02, 0.01], np.arange(400) // 2
    for count in (2, 5):
        folds = assign_folds(groups, labels, count, 777)
        assert (folds[::2] == folds[1::2]).all()
        of_each = np.array([labels[folds == k].sum(axis=0) for k in range(count)])
        assert np.ptp(np.bincount(folds)) <= 4
        seeds = [assign_folds(groups, labels, count, seed) for seed in range(10)]
        parts = np.array([[labels[f == k].sum(axis=0) for k in range(count)] for f in seeds])
        assert np.ptp(parts, axis=1).max() <= 2, "rare labels come first, or the common ones couldn't make up for them"
        rare = labels.sum(axis=0) < count
        assert (of_each[:, rare] <= 1).all()
    assert np.array_equal(folds, assign_folds(groups + 7, labels, 5, 777))
    assert not np.array_equal(folds, assign_folds(groups, labels, 5, 778))


# ---------------------------------------------------------------- losses


def test_loss_and_sampler_are_replaced_and_others_refused(worlds):
    for kind, words in dict(labels="--loss bce --sampler shuffle", numbers="--loss bce --sampler shuffle").items():
        world = worlds(kind)
        assert f"the task is {kind}: {words} in place of those for classes\n" in world.out
        config = json.loads((world.folder / "output" / "base" / "config.json").read_text())
        assert (config["loss"], config["sampler"]) == ("bce", "shuffle")
        assert config["changed"]["loss"] == "bce"
    labels = worlds("labels").flags
    line = refused(TRAIN, *labels, *QUICK, "--fold", 0, "--exp", "other", "--loss", "mse")
    assert "--loss mse is for numbers, and the task is labels" in line
    assert not (worlds("labels").folder / "output" / "other").exists()
    for loss in ("bce", "mse"):
        with pytest.raises(UserError, match=rf"--loss {loss} is for .*numbers, and the task is classes"):
            for_task(dict(loss=loss, sampler="imbalanced"), Classes([*"ab"]), "auc")
    numbers = for_task(dict(loss="mse", sampler="imbalanced"), Numbers(["a"], []), "rmse")
    assert numbers == dict(loss="mse", sampler="shuffle")
    usual = dict(loss="cce", sampler="imbalanced")
    assert for_task(usual, Classes([*"ab"]), "auc") == usual


def test_missing_numbers_do_not_count_in_a_loss():
    torch.manual_seed(0)
    targets, present = torch.rand(6, 2), torch.ones(6, 2, dtype=bool)
    present[1, 0] = present[4, 1] = False
    for loss in (binary_cross_entropy, squared_error):
        logits = torch.randn(6, 2, requires_grad=True)
        found = loss(logits, targets.masked_fill(~present, torch.nan))
        assert found.item() == pytest.approx(loss(logits[present][None], targets[present][None]).item(), rel=1e-5)
        found.backward()
        assert torch.isfinite(logits.grad).all()
        assert ((logits.grad == 0) == ~present).all()
        assert loss(logits, torch.full((6, 2), torch.nan)).item() == 0
    logits, ones = torch.tensor([[2.0, -1]]), torch.tensor([[1.0, 0.25]])
    chance = torch.sigmoid(logits)
    by_hand = -(ones * chance.log() + (1 - ones) * (1 - chance).log()).mean()
    assert LOSSES["bce"](logits, ones).item() == pytest.approx(by_hand.item())
    assert LOSSES["mse"](logits, ones).item() == pytest.approx(((chance - ones) ** 2).mean().item())


def test_both_losses_learn_numbers_within_the_training_range(copied):
    world = copied("numbers")
    done(TRAIN, *world.flags, *FLAGS, "--fold", "all", "--exp", "squared", "--loss", "mse")
    for exp in ("base", "squared"):
        folder = world.folder / "output" / exp
        epochs = pd.concat([pd.read_csv(folder / f"fold{k}_epochs.csv") for k in range(2)])
        assert np.isfinite(epochs[["train_loss", "valid_loss", "train_mcrmse", "valid_mcrmse"]]).all(axis=None)
        _, targets, logits = oof_of(world, exp)
        assert np.isnan(targets).sum() == 1
        predictions = world.task.predictions(1e3 * logits)
        assert (predictions >= np.nanmin(targets, axis=0)).all()
        assert (predictions <= np.nanmax(targets, axis=0)).all()
        predictions = world.task.predictions(logits)
        known = ~np.isnan(targets)
        correlations = [np.corrcoef(targets[k, c], predictions[k, c])[0, 1] for c, k in enumerate(known.T)]
        assert min(correlations) > 0.7, (exp, correlations)
        done("03_infer.py", *world.flags, exp)
        written = submitted(folder)[1].astype(float)
        assert (written >= np.nanmin(targets, axis=0) - 1e-4).all()
        assert (written <= np.nanmax(targets, axis=0) + 1e-4).all()
        assert relative_errors(written, world.drawn.tests).mean() < 0.2


def test_labels_are_learnt(worlds):
    _, targets, logits = oof_of(worlds("labels"))
    assert min(sk.roc_auc_score(targets[:, c], logits[:, c]) for c in range(3)) > 0.8


@BOTH
def test_a_resumed_fold_has_the_same_bytes(kind, copied):
    world = copied(kind)
    more = [*QUICK, "--epochs", 2, "--fold", 0]
    done(TRAIN, *world.flags, *more, "--exp", "whole")
    stops = [kit(TRAIN, *world.flags, *more, "--exp", "parts", "--stop-after", "1s").code for _ in range(3)]
    assert stops == [75] * 3
    assert "goes on in epoch 2 after 1 of 2 steps" in done(TRAIN, *world.flags, *more, "--exp", "parts")
    for ending in ("pt", "csv"):
        whole, parts = ((world.folder / "output" / exp / f"fold0.{ending}").read_bytes() for exp in ("whole", "parts"))
        assert whole == parts, ending


# ---------------------------------------------------------------- thresholds


def sets_above(probabilities, cut):
    """Sets of labels above a threshold, and the most probable one where none is."""
    read = probabilities > cut
    read[np.arange(len(read)), probabilities.argmax(axis=1)] = True
    return read


def best_threshold(targets, probabilities):
    """By hand: the middle one of the thresholds with the best mean F1 of images."""
    scores = [sk.f1_score(targets, sets_above(probabilities, cut), average="samples", zero_division=0)
        for cut in thresholds.GRID]  # fmt: skip
    best = np.flatnonzero(np.isclose(scores, max(scores), rtol=0, atol=1e-12))
    return thresholds.GRID[best[len(best) // 2]]


def test_cv_thresholds_come_from_the_other_folds_and_the_submissions_from_all(copied):
    world = copied("sets")
    rng = np.random.default_rng(3)
    for k in range(2):  # predictions that ask for unlike thresholds in each fold
        path = world.base / f"fold{k}.csv"
        table = pd.read_csv(path, dtype=dict(target=str), keep_default_na=False)
        targets = world.task.read_targets(table.target)
        for c in range(3):
            logits = 3 * targets[:, c] + rng.normal(0, 1.2, len(table)) - (4.5, 2.5)[k]
            for column in ("best", "last", "views"):  # the same without turned views
                table[f"{column}_{c}"] = logits.round(4)
        table.to_csv(path, index=False)
    folds, targets, logits = oof_of(world)
    probabilities, targets = special.expit(logits), targets.astype(int)
    honest = np.concatenate([
        sets_above(probabilities[folds == k], best_threshold(targets[folds != k], probabilities[folds != k]))
        for k in range(2)])  # fmt: skip
    cut = best_threshold(targets, probabilities)
    score, flattered = (sk.f1_score(targets, read, average="samples", zero_division=0)
        for read in (honest, sets_above(probabilities, cut)))  # fmt: skip
    assert score < flattered - 0.01, "or this test could tell nothing"
    assert f"CV {score:.4f} (F1 of images, pooled" in done("02_oof.py", *world.flags, "--draws", 100)
    out = done("03_infer.py", *world.flags)
    path, written = submitted(world.base)
    assert path.name == f"submission_base_CV{score:.4f}.csv"
    assert f"CV {score:.4f} (F1 of images)" in out
    tests = np.mean([special.expit(np.load(world.base / f"fold{k}_test.npy").astype(float)) for k in range(2)], axis=0)
    expected = [" ".join(np.array(world.task.names)[row]) for row in sets_above(tests, cut)]
    assert written[:, 0].tolist() == expected
    assert expected != [" ".join(np.array(world.task.names)[row]) for row in sets_above(tests, 0.5)]


# ---------------------------------------------------------------- probes


def logistic(points, targets, strength):
    """scikit-learn's logistic regression of targets from 0 to 1 (float [n], NaN left out): each image counts twice,
    with its target as the weight of a 1 and the rest as that of a 0."""
    present = ~np.isnan(targets)
    doubled, share = np.concatenate([points[present]] * 2), targets[present]
    model = LogisticRegression(C=strength, max_iter=10000, tol=1e-8)
    return model.fit(doubled, np.repeat([1, 0], present.sum()), sample_weight=np.concatenate([share, 1 - share]))


@BOTH
def test_the_shared_head_is_scikit_learns_logistic_regression(kind):
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(120, 5)) * [1, 9, 0.1, 1, 1] + [0, 50, 0, 0, 1]).astype(np.float32)
    logits = StandardScaler().fit_transform(vectors) @ rng.normal(size=(5, 3)) + [0, -1, 1]
    targets = special.expit(logits).astype(np.float32)
    if kind == "labels":
        targets = (rng.random(targets.shape) < targets).astype(np.float32)
    else:
        targets[3, 1] = targets[50:60, 2] = np.nan
    weight, bias, strength = fit_head(vectors, targets, np.arange(120), 3, False, 777)
    assert (weight.shape, bias.shape, weight.dtype) == ((3, 5), (3,), np.float32)
    assert strength in C_VALUES
    scaler = StandardScaler().fit(vectors)
    for c in range(3):
        model = logistic(scaler.transform(vectors), targets[:, c].astype(float), strength)
        if kind == "labels":
            plain = LogisticRegression(C=strength, max_iter=10000, tol=1e-8)
            plain = plain.fit(scaler.transform(vectors), targets[:, c] > 0)
            assert plain.coef_ == pytest.approx(model.coef_, abs=1e-3)
        expected = model.decision_function(scaler.transform(vectors))
        assert vectors @ weight[c] + bias[c] == pytest.approx(expected, rel=0.02, abs=0.02)
    losses = {}
    folds = assign_folds(np.arange(120), np.nan_to_num(targets) > 0.5, 4, 777)
    for other in C_VALUES:
        found = []
        for fold in range(4):
            seen, points = folds != fold, scaler.transform(vectors)
            models = [logistic(points[seen], column[seen].astype(float), other) for column in targets.T]
            held_out = np.stack([model.decision_function(points[~seen]) for model in models], axis=1)
            found.append(binary_cross_entropy(torch.from_numpy(held_out), torch.from_numpy(targets[~seen])).item())
        losses[other] = np.mean(found)
    assert losses[strength] == pytest.approx(min(losses.values()), rel=1e-3), "C has the least loss in inner folds"


@BOTH
def test_probes_of_labels_and_numbers(kind, copied):
    world = copied(kind)
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet").state_dict(), world.folder / "weights.pth")
    more = [*QUICK, "--weights", world.folder / "weights.pth", "--head", "fresh"]
    out = done(TRAIN, *world.flags, *more, "--tune", "probe", "--fold", "all", "--exp", "probe")
    strengths = re.findall(r"fold \d: a logistic regression on frozen features, C = (\S+)", out)
    assert len(strengths) == 2
    assert "CV " in done("02_oof.py", *world.flags, "probe", "--draws", 100)
    done("03_infer.py", *world.flags, "probe")
    written = submitted(world.folder / "output" / "probe")[1].astype(float)
    if kind == "numbers":
        assert relative_errors(written, world.drawn.tests).mean() < 0.2
    else:
        assert ((written > 0.5) == world.drawn.tests).mean() > 0.9

    still = ["--init", "probe", "--lr", "1e-9", "--min-lr", "1e-9", "--exp", "begun"]
    assert f"C = {strengths[0]}" in done(TRAIN, *world.flags, *more, *still, "--fold", 0)
    heads = [torch.load(world.folder / "output" / exp / "fold0.pt", weights_only=True)["model"]
        for exp in ("probe", "begun")]  # fmt: skip
    for part in ("weight", "bias"):
        assert torch.allclose(heads[0][f"head.{part}"], heads[1][f"head.{part}"], atol=1e-5)

    (path,) = (world.folder / "output" / "prepared").glob("features_test_resnet_32_*.npy")
    features = np.load(path)[:32].mean(axis=1, dtype=np.float32)
    folds = read_folds(world)
    targets = world.task.to_01(world.task.read_targets(folds.target))
    seen, column = (folds.fold != 0).to_numpy(), targets[:, 1].astype(float)
    scaler = StandardScaler().fit(features[seen])
    strength = C_VALUES[np.abs(np.log(C_VALUES / float(strengths[0]))).argmin()]
    model = logistic(scaler.transform(features[seen]), column[seen], strength)
    by_kit = features @ heads[0]["head.weight"][1].numpy() + heads[0]["head.bias"][1].numpy()
    expected = model.decision_function(scaler.transform(features))
    assert by_kit == pytest.approx(expected, rel=0.05, abs=0.05)


# ---------------------------------------------------------------- blends, reports, solutions


@BOTH
def test_two_experiments_are_compared_blended_and_reported(kind, copied):
    world = copied(kind)
    done(TRAIN, *world.flags, *FLAGS, "--fold", "all", "--exp", "other", "--seed", 5)
    out = done("02_oof.py", *world.flags, "base", "other", "--draws", 100)
    assert "mean blend" in out
    assert "greedy blend" in out
    assert ("rank blend" in out) == (kind == "labels")
    solution(world)
    for exps in (["base"], ["other"], ["base", "other"]):
        check_solution(world, done("03_infer.py", *world.flags, *exps), exps)
    cells = {exp: submitted(world.folder / "output" / exp)[1].astype(float) for exp in ("base", "other")}
    path, mixed = submitted(world.folder / "output")
    assert mixed.astype(float) == pytest.approx((cells["base"] + cells["other"]) / 2, rel=1e-5)
    assert np.abs(cells["base"] - cells["other"]).max() > 1e-3
    path.unlink()
    if kind == "numbers":
        line = refused("03_infer.py", *world.flags, "base", "other", "--blend", "rank")
        assert "ranks of numbers are no numbers" in line
    else:
        done("03_infer.py", *world.flags, "base", "other", "--blend", "rank")
        path, ranked = submitted(world.folder / "output")
        ranks = sum(pd.DataFrame(part).rank() for part in cells.values()) / 2 / len(ranked)
        assert ranked.astype(float) == pytest.approx(ranks.to_numpy(), abs=1e-6)
    page = (world.base / "report.html").read_text()
    assert f"<h2>Each {kind.removesuffix('s')}</h2>" in page
    assert 'id="counts"' not in page
    assert "onfusion" not in page
    assert "@@" not in page
    for name in world.task.names:
        assert f"<td>{name}</td>" in page


def solution(world):
    """Writes INPUT/solution.csv into a folder of its own; half of the rows are public."""
    folder = world.folder / "input"
    if not folder.exists():
        shutil.copytree(world.flags[1], folder)
        world.flags[1] = folder
    names = [name for name, *_ in pd.read_csv(folder / "sample_submit.csv").itertuples(index=False)]
    texts = world.task.write_targets(world.drawn.tests)
    if world.task.key == "labels":
        texts = [" ".join(np.array(world.task.names)[row > 0]) for row in world.drawn.tests]
    usage = ["Public", "Private"] * (len(names) // 2)
    write_csv(folder / "solution.csv", [("image_name", "label", "usage"), *zip(names, texts, usage, strict=True)])


def check_solution(world, out, exps):
    """Both halves' scores in the output of 03 are those of the submission."""
    folder = world.folder / "output" / (exps[0] if len(exps) == 1 else ".")
    written = submitted(folder)[1].astype(float)
    scores = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        targets, found = world.drawn.tests[half], written[half]
        if world.task.key == "numbers":
            scores.append(np.sqrt(((targets - found) ** 2).mean(axis=0)).mean())
        else:
            varied = [c for c in range(targets.shape[1]) if 0 < targets[:, c].mean() < 1]
            scores.append(np.mean([sk.roc_auc_score(targets[:, c], found[:, c]) for c in varied]))
    words = re.search(r"leaderboard by solution.csv: .* public (\S+), private (\S+)\n", out).groups()
    assert [float(word) for word in words] == pytest.approx(scores, abs=1e-4)


@BOTH
def test_a_solution_with_unknown_labels_is_refused(kind, copied):
    world = copied(kind)
    solution(world)
    path = world.folder / "input" / "solution.csv"
    text = path.read_text()
    path.write_text(re.sub(r"(?m)^(t3.png,)[^,]*", r"\1purple", text))
    assert "has labels that the training set hasn't" in refused("03_infer.py", *world.flags)


# ---------------------------------------------------------------- many and rare classes


@pytest.mark.slow
def test_many_classes_have_their_logits_beside_the_table(copied, monkeypatch):
    world = copied("classes")  # with classes of one and of two images
    assert "all their images are in one fold, whose model never learns them: c5" in world.out
    done("03_infer.py", *world.flags)
    narrow = submitted(world.base)[1].tolist()
    with monkeypatch.context() as patch:
        patch.setattr("kit.experiment.MOST_COLUMNS", 5)
        done(TRAIN, *world.flags, *FLAGS, "--fold", "all", "--exp", "wide")
        folder = world.folder / "output" / "wide"
        table = pd.read_csv(folder / "fold0.csv", dtype=str)
        assert [*table.columns] == ["image_name", "target", "logits"]
        stored = np.load(folder / "fold0_logits.npy")
        assert (stored.dtype, stored.shape) == (np.float32, (3, len(table), 6))
        columns = pd.read_csv(world.base / "fold0.csv")
        for i, kind in enumerate(("best", "last", "views")):
            assert np.array_equal(stored[i], columns[[f"{kind}_{c}" for c in range(6)]].to_numpy(np.float32))
        done("02_oof.py", *world.flags, "wide", "--draws", 100)
        oof = pd.read_csv(folder / "oof.csv")
        assert [*oof.columns[3:]] == [f"{part}_{k}" for part in ("label", "probability") for k in range(1, 6)]
        assert (oof.label == oof.label_1).mean() > 0.8
        assert (oof.probability_1 >= oof.probability_2).all()
        done("03_infer.py", *world.flags, "wide")
        assert submitted(folder)[1].tolist() == narrow
        beside = folder / "fold1_logits.npy"
        whole = beside.read_bytes()
        for damaged in (whole[:-4], whole[:-4] + b"\0\0\1\1", None):
            beside.unlink()
            if damaged:
                beside.write_bytes(damaged)
            for script in ("02_oof.py", "03_infer.py"):
                line = refused(script, *world.flags, "wide")
                assert "fold1_logits.npy is missing or damaged" in line
                assert "--overwrite" in line
            beside.write_bytes(whole)
        done("03_infer.py", *world.flags, "wide")
    targets = world.drawn.tests
    assert [CLASSES.index(row[0]) for row in narrow] == targets.tolist()


# ---------------------------------------------------------------- matched folds


@BOTH
def test_folds_are_matched_for_every_task(kind, tmp_path):
    drawn, flags = draw(tmp_path / "input", kind, train=64, test=40), flags_of(tmp_path)
    out = done("00_prepare.py", *flags, "--size", 32, "--folds", 2, "--metric", METRIC[kind])
    prepared = json.loads((tmp_path / "output" / "prepared" / "prepared.json").read_text())
    assert prepared["candidates"], out
    (chosen,) = [candidate for candidate in prepared["candidates"] if candidate["chosen"]]
    assert f"{chosen['name']}" in out
    assert np.isfinite(chosen["score"])
    folds = read_table(tmp_path / "output" / "prepared" / "folds.csv", "")
    assert sorted(folds.image_name) == drawn.names
    assert (folds.groupby("group").fold.nunique() == 1).all()
    assert folds.fold.value_counts().min() >= 20
