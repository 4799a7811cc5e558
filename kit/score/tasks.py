"""What is asked of an image: one class of several, a set of labels, or numbers?

    task      targets                                     predictions float [N, K]
    classes   int64 [N]                                   softmax: a probability for each class
    labels    float32 [N, K], 0 or 1                      sigmoid: a probability for each label
    numbers   float32 [N, K], NaN where one is missing    sigmoid, scaled to the range of the training targets

prepared.json holds `task`, `classes` (the names of the K classes, labels or numbers) and, of numbers, `ranges`: the
least and the largest training target of each. In folds.csv, `target` is a class' number, or the labels' numbers or the
numbers themselves between blanks.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from common import softmax
from kit.score.metrics import sk

STRATA = 10  # quantiles of numbers that each fold gets its share of


class Task(NamedTuple):
    """noun: what one of the K is called. loss: the key of LOSSES that stands in for one that doesn't fit."""

    noun: str
    loss: str
    metric: callable  # K → the key of METRICS that decides by default


TASKS = {
    "classes": Task("class", "ce", lambda count: "auc" if count == 2 else "accuracy"),
    "labels": Task("label", "bce", lambda count: "column-auc"),
    "numbers": Task("number", "bce", lambda count: "rmse" if count == 1 else "mcrmse"),
}


def task_of(prepared):
    return prepared.get("task", "classes")  # older prepared data know no other


def read_targets(prepared, cells):
    """→ the targets of the column `target` of folds.csv, or of a part of it."""
    task, count = task_of(prepared), len(prepared["classes"])
    if task == "classes":
        return np.asarray(cells, np.int64)
    if task == "numbers":
        return np.array([str(cell).split(" ") for cell in cells], np.float32).reshape(-1, count)
    targets = np.zeros((len(cells), count), np.float32)
    for row, cell in zip(targets, cells, strict=True):
        row[[int(number) for number in str(cell).split()]] = 1
    return targets


def written(task, targets):
    """→ the column `target` of folds.csv: a list of whole numbers or strings."""
    if task == "classes":
        return [int(target) for target in targets]
    if task == "numbers":
        return [" ".join(f"{value:.9g}" for value in row) for row in targets]
    return [" ".join(map(str, np.flatnonzero(row))) for row in targets]


def predictions(prepared, logits):
    """Logits [N, K] → predictions float [N, K] (common.softmax), numbers in their own units."""
    if task_of(prepared) == "classes":
        return softmax(logits)
    return from_unit(prepared, special.expit(np.asarray(logits, np.float64)))


def to_unit(prepared, targets):
    """Targets as losses take them: numbers from 0 to 1, by the training targets' range; others as they are."""
    if task_of(prepared) != "numbers":
        return targets
    low, high = np.array(prepared["ranges"], np.float32).T
    return (targets - low) / np.where(high > low, high - low, 1)


def from_unit(prepared, values):
    """The inverse of to_unit; also of predictions."""
    if task_of(prepared) != "numbers":
        return values
    low, high = np.array(prepared["ranges"], np.float64).T
    return low + values * (high - low)


def perfect(prepared, targets):
    """→ the predictions float64 [N, K] that are right."""
    if task_of(prepared) == "classes":
        return np.eye(len(prepared["classes"]))[targets]
    return np.asarray(targets, np.float64)


def strata(task, targets):
    """→ what every fold gets its share of: classes int [N], labels bool [N, K], or the quantiles of numbers int [N]
    (of several, of the mean of their standard scores)."""
    if task == "classes":
        return targets
    if task == "labels":
        return targets > 0
    table = pd.DataFrame(targets)
    score = ((table - table.mean()) / table.std().replace(0, 1)).mean(axis=1).fillna(0)
    return pd.qcut(score.rank(method="first"), min(STRATA, max(1, len(score) // 10)), labels=False).to_numpy(np.int64)


def parse(prepared, cells):
    """→ the targets that cells say, spelt as in the training table: of labels and numbers, between blanks. Raises
    KeyError or ValueError for what is no target."""
    number_of = {label: number for number, label in enumerate(prepared["classes"])}
    if task_of(prepared) == "classes":
        return np.array([number_of[cell] for cell in cells])
    if task_of(prepared) == "numbers":
        return read_targets(prepared, cells)
    mark = prepared["submission"].get("between", " ")
    sets = [[number_of[label] for label in cell.split(mark) if label] for cell in cells]
    return read_targets(prepared, [" ".join(map(str, labels)) for labels in sets])


def examples(prepared, folds, most=10):
    """→ {title: rows of folds.csv that a picture should show}: of some classes or labels, or from small numbers to
    large ones."""
    task, classes = task_of(prepared), prepared["classes"]
    if task == "classes":
        return {f"label {label}": np.flatnonzero(folds.label == label) for label in classes[:most]}
    targets = read_targets(prepared, folds.target)
    if task == "labels":
        return {f"label {classes[c]}": np.flatnonzero(targets[:, c]) for c in np.argsort(-targets.sum(axis=0))[:most]}
    order = np.argsort(targets[:, 0], kind="stable")
    order = order[np.isfinite(targets[order, 0])]
    found = {}
    for p in [part for part in np.array_split(order, 5) if len(part)]:
        title = f"{classes[0]} from {targets[p[0], 0]:.4g} to {targets[p[-1], 0]:.4g}"
        found[title] = np.concatenate([found.get(title, p[:0]), p])  # two fifths may hold one number alone
    return found


def table_of_each(prepared, targets, predictions, most=20):
    """→ a table with a row for each label (how often it is right, its AUC) or number (mean, correlation, RMSE). Of
    many, the commonest ones."""
    rows = {}
    for c, name in enumerate(prepared["classes"]):
        known = np.isfinite(targets[:, c])
        target, predicted = targets[known, c].astype(np.float64), predictions[known, c]
        if task_of(prepared) == "labels":
            area = sk("roc_auc_score")(target, predicted) if 0 < target.sum() < len(target) else np.nan
            rows[name] = dict(images=int(target.sum()), AUC=area)
            continue
        varied = len(target) > 1 and target.std() > 0 and predicted.std() > 0
        correlation = np.corrcoef(target, predicted)[0, 1] if varied else np.nan
        error = np.sqrt(np.mean((target - predicted) ** 2))
        rows[name] = dict(images=len(target), mean=target.mean(), predicted=predicted.mean(), r=correlation, RMSE=error)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(TASKS[task_of(prepared)].noun)
    return table.sort_values("images", ascending=False, kind="stable")[:most] if len(table) > most else table
