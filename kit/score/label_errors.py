"""Labels that may be wrong, by confident learning.

Confident learning (Northcutt, Jiang, Chuang 2021, arXiv 1911.00068) works on out-of-fold probabilities: a model that
hasn't seen an image is surer of another class than it usually is of that class's own images. It lists wrong labels,
hard images and blind spots of the model alike: a person has to look.
Shapes: N images, K classes; targets int [N], probabilities float [N, K].
"""

from pathlib import Path

import numpy as np
import pandas as pd

from common import write_csv
from kit.score.tasks import Task

COLUMNS = "image_name label suggested probability_label probability_suggested".split()  # of suspects.csv


def above_threshold(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the probabilities that reach their class's threshold, else -1. The threshold is the mean probability that
    a class has in its own images; a class without images has none."""
    counts = np.bincount(targets, minlength=probabilities.shape[1])
    of_label = probabilities[np.arange(len(targets)), targets]
    thresholds = np.bincount(targets, of_label, minlength=len(counts)) / np.maximum(1, counts)
    return np.where((probabilities >= thresholds) & (counts > 0), probabilities, -1)


def suggest(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the class that each label should perhaps be, int [N]: the label itself where nothing speaks against it.

    These are the off-diagonal entries of the paper's confident joint: the most probable of the classes that reach their
    threshold. It must also be more probable than the label, or a class with a low threshold would draw images whose
    label the model prefers."""
    sure = above_threshold(targets, probabilities)
    better = sure.max(axis=1) > probabilities[np.arange(len(targets)), targets]
    return np.where(better, sure.argmax(axis=1), targets)


def expected_count(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return how many labels would be suspected if none were wrong and the probabilities honest: a label drawn from
    them is another than the surest class this often."""
    surest = above_threshold(targets, probabilities).max(axis=1)
    return float((1 - surest[surest >= 0]).sum())


def find(folds: pd.DataFrame, task: Task, targets: np.ndarray, predictions: np.ndarray) -> tuple[pd.DataFrame, float]:
    """Return (a table with COLUMNS and `row` of `folds`, the surest suspects first; how many there would be if all
    labels were right). folds: the N rows of folds.csv. In a set of labels, suggested is "+ NAME" where a label seems to
    be missing, "- NAME" where one seems to be too many."""
    rows, by_chance = [], 0
    for k, labels, p in task.label_problems(targets, predictions):
        suggested = suggest(labels, p)
        by_chance += expected_count(labels, p)
        for i in np.flatnonzero(suggested != labels):
            name = task.names[suggested[i]] if k is None else f"{'+' if suggested[i] else '-'} {task.names[k]}"
            rows.append((folds.image_name[i], folds.label[i], name, p[i, labels[i]], p[i, suggested[i]], i))
    rows.sort(key=lambda row: row[3] - row[4])
    return pd.DataFrame(rows, columns=[*COLUMNS, "row"]), by_chance


def write(path: Path, suspects: pd.DataFrame) -> None:
    """Write suspects.csv, from the table that `find` returned."""
    write_csv(path, suspects[COLUMNS])
