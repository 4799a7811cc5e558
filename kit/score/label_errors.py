"""Labels that may be wrong, by confident learning.

Confident learning (Northcutt, Jiang, Chuang 2021, arXiv 1911.00068) works on out-of-fold probabilities: a model that
hasn't seen an image is surer of another class than it usually is of that class's own images. It lists wrong labels,
hard images and blind spots of the model alike: a person has to look.
Shapes: N images, K classes; targets int [N], probabilities float [N, K].
"""

from pathlib import Path

from common import write_csv

import numpy as np
import pandas as pd

from kit.score.metrics import Array

COLUMNS = "image_name label suggested probability_label probability_suggested".split()  # of suspects.csv


def above_threshold(targets: Array, probabilities: Array) -> Array:
    """Return the probabilities that reach their class's threshold, else -1. The threshold is the mean probability that
    a class has in its own images; a class without images has none."""
    counts = np.bincount(targets, minlength=probabilities.shape[1])
    of_label = probabilities[np.arange(len(targets)), targets]
    thresholds = np.bincount(targets, of_label, minlength=len(counts)) / np.maximum(1, counts)
    return np.where((probabilities >= thresholds) & (counts > 0), probabilities, -1)


def suggest(targets: Array, probabilities: Array) -> Array:
    """Return the class that each label should perhaps be, int [N]: the label itself where nothing speaks against it.
    These are the off-diagonal entries of the paper's confident joint: the most probable of the classes that reach their
    threshold. It must also be more probable than the label, or a class with a low threshold would draw images whose
    label the model prefers."""
    sure = above_threshold(targets, probabilities)
    better = sure.max(axis=1) > probabilities[np.arange(len(targets)), targets]
    return np.where(better, sure.argmax(axis=1), targets)


def expected_count(targets: Array, probabilities: Array) -> float:
    """Return how many labels would be suspected if none were wrong and the probabilities calibrated: so often a label
    drawn from them isn't the surest class."""
    surest = above_threshold(targets, probabilities).max(axis=1)
    return float((1 - surest[surest >= 0]).sum())


def write_suspects(path: Path, folds: pd.DataFrame, names: list[str], problems: list) -> tuple[pd.DataFrame, float]:
    """Write suspects.csv, the surest first, and return (it, with the rows of `folds` as its index; how many suspects
    there would be if all labels were right).
    folds: the N rows of folds.csv; names: of the K classes or labels; problems: those of Task.label_problems. In a set
    of labels, suggested is "+ NAME" where a label seems to be missing, "- NAME" where one seems to be too many."""
    found, by_chance = [], 0
    for k, labels, p in problems:
        suggested = suggest(labels, p)
        by_chance += expected_count(labels, p)
        for i in np.flatnonzero(suggested != labels):
            name = names[suggested[i]] if k is None else f"{'+' if suggested[i] else '-'} {names[k]}"
            found.append((i, folds.image_name[i], folds.label[i], name, p[i, labels[i]], p[i, suggested[i]]))
    found.sort(key=lambda suspect: suspect[4] - suspect[5])
    suspects = pd.DataFrame(found, columns=["row", *COLUMNS]).set_index("row")
    write_csv(path, suspects)
    return suspects, by_chance
