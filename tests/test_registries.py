"""Registries: one function and one entry add a loss, augmentation, sampler, head, metric, TTA, optimizer, schedule,
tracker, label form or submission form."""

import json

from common import softmax

import albumentations as A
import numpy as np
import pandas as pd
import pytest
import torch
import ttach
from conftest import TINY, done, load, prepare
from torch import nn

from kit.data.labels import LABEL_FORMS, class_labels
from kit.score.metrics import METRICS, Metric
from kit.submit.submission import SUBMISSIONS, Form
from kit.train.augment import AUGMENTATIONS, Augment
from kit.train.checkpoint import load_fold
from kit.train.dataset import SAMPLERS, draw_epoch
from kit.train.inference import TTAS
from kit.train.losses import LOSSES
from kit.train.model import HEADS, Head
from kit.train.optim import OPTIMIZERS, SCHEDULES
from kit.train.trackers import TRACKERS, Tracker, TrackerRun


def focal(logits, targets):
    p = logits.softmax(dim=1).gather(1, targets[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


def every_second(labels):
    return torch.randperm(len(labels))[::2].tolist()


def two_layers(inputs, classes):
    return nn.Sequential(nn.Linear(inputs, 16), nn.GELU(), nn.Linear(16, classes))


def misses(targets, probabilities, weights):
    return float(np.average(probabilities.argmax(axis=1) != targets, weights=weights))


def mirror(model):
    return ttach.ClassificationTTAWrapper(model, ttach.Compose([ttach.HorizontalFlip()]), merge_mode="mean")


def plain_sgd(module, config, steps):
    return torch.optim.SGD(module.parameters(), lr=config["lr"]), None


def test_one_function_and_one_entry_each(toy, monkeypatch):
    logged = {}

    def memory(fold):
        return TrackerRun(
            "1", lambda values, step: logged.setdefault(fold.name, {}).update(values), lambda finished: None
        )

    new = {
        "focal": (LOSSES, focal),
        "noise": (AUGMENTATIONS, Augment(lambda side: [A.GaussNoise(p=1)], tta="mirror")),
        "half": (SAMPLERS, every_second),
        "mlp": (HEADS, Head("features", two_layers)),
        "misses": (METRICS, Metric("misses", misses, larger_is_better=False)),
        "mirror": (TTAS, mirror),
        "plain": (OPTIMIZERS, plain_sgd),
        "memory": (TRACKERS, Tracker("json", memory)),
    }
    for name, (registry, entry) in new.items():
        monkeypatch.setitem(registry, name, entry)
    flags = toy()
    prepare(flags, 32, "--folds", 2, "--metric", "misses")
    more = "--loss focal --augment noise --sampler half --head mlp --optimizer plain --track memory --epochs 3".split()
    done("01_train_fold.py", *flags, *TINY, "--fold", "all", *more)
    folder = flags[3] / "base"
    epochs = pd.read_csv(folder / "fold0_epochs.csv")
    assert {"train_misses", "valid_misses"} <= set(epochs.columns)
    assert logged["base/fold0"]["epoch/valid_misses"] == pytest.approx(epochs.valid_misses.iloc[-1])
    assert "valid_auc" not in epochs
    record = json.loads((folder / "fold0.json").read_text())
    assert record["config"]["tta"] == "mirror", "TTA follows the augmentation"
    assert record["scores"]["misses"] == pytest.approx(epochs.valid_misses.min()), "smaller is better"
    assert record["epoch"] == epochs.epoch[epochs.valid_misses[::-1].idxmin()]
    _, model = load_fold(folder / "fold0.pt", torch.device("cpu"))
    assert [type(layer).__name__ for layer in model.head] == ["Linear", "GELU", "Linear"]
    out = done("02_oof.py", *flags, "--draws", 100)
    assert "misses" in out
    done("03_infer.py", *flags)
    oof = pd.concat([pd.read_csv(folder / f"fold{k}.csv") for k in range(2)])
    cv = np.mean((oof.views_1 > oof.views_0) != oof.target)
    assert (folder / f"submission_base_CV{cv:.4f}.csv").exists()
    assert not np.allclose(oof.views_1, oof.best_1), "the mirrored view counts"


def test_a_new_sampler_and_a_new_loss_reach_the_training(monkeypatch):
    """An epoch then has half of the images, and the loss is the focal one."""
    monkeypatch.setitem(SAMPLERS, "half", every_second)
    labels = np.arange(20) % 2
    drawn = [i for i, _ in draw_epoch(labels, dict(seed=1, sampler="half"), 0, 1)]
    assert len(set(drawn)) == 10
    monkeypatch.setitem(LOSSES, "focal", focal)
    assert load("01_train_fold.py").LOSSES["focal"] is focal


@pytest.mark.parametrize("optimizer", ["ranger21", "adamw"])
def test_a_new_schedule_sets_the_learning_rate_of_each_optimizer(toy, optimizer, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "thirds", lambda step, steps, lr, min_lr, warm_up: lr * step / (3 * steps))
    flags = toy()
    prepare(flags, 32, "--folds", 2)
    done("01_train_fold.py", *flags, *TINY, "--fold", 0, "--schedule", "thirds", "--optimizer", optimizer)
    assert pd.read_csv(flags[3] / "base" / "fold0_epochs.csv").lr.iloc[-1] == pytest.approx(1e-3)


def test_a_new_label_form_and_a_new_submission_form(toy, monkeypatch):
    """The labels are wide and thin, whose first letters become the classes; the submission is in per cent."""

    def first_letters(path, names, columns, flags):
        (cells,) = columns.values()
        return class_labels(path, names, [cell[0] for cell in cells], "first letters")

    percent = Form(
        lambda row, columns, task, metric, form: [f"{100 * row[1]:.1f}"],
        lambda cell, task, form: 0 <= float(cell) <= 100,
        ("classes",),
        "a percentage",
    )
    monkeypatch.setitem(LABEL_FORMS, "letter", first_letters)
    monkeypatch.setitem(SUBMISSIONS, "percent", percent)
    flags = toy()
    path = flags[1] / "train.csv"
    table = pd.read_csv(path, dtype=str)
    table.assign(label=table.label.map({"0": "wide", "1": "thin"})).to_csv(path, index=False)
    prepare(flags, 32, "--folds", 2, "--label-form", "letter", "--submit-value", "percent", "--positive", "w")
    assert json.loads((flags[3] / "prepared" / "prepared.json").read_text())["classes"] == ["t", "w"]
    done("01_train_fold.py", *flags, *TINY, "--fold", "all")
    done("03_infer.py", *flags)
    (submission,) = flags[3].glob("base/submission_base_CV*.csv")
    logits = [np.load(flags[3] / "base" / f"fold{k}_test.npy") for k in (0, 1)]
    expected = 100 * np.mean([softmax(part)[:, 1] for part in logits], axis=0)
    assert np.loadtxt(submission, delimiter=",", usecols=1) == pytest.approx(expected, abs=0.051)
