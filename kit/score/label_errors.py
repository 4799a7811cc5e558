"""Which labels may be wrong?

Confident learning (Northcutt, Jiang, Chuang 2021, arXiv 1911.00068), on out-of-fold probabilities: a model that hasn't
seen an image is surer of another class than it usually is of that class' own images. It lists wrong labels, hard images
and blind spots of the model alike: a person has to look.
"""

import numpy as np
import pandas as pd

from common import write_csv
from kit.score import tasks

COLUMNS = "image_name label suggested probability_label probability_suggested".split()


def reaching(targets, probabilities):
    """targets int [N], probabilities float [N, K] → the probabilities that reach their class' threshold, else -1: the
    mean probability that a class has in its own images. A class without images has none to be compared with."""
    counts = np.bincount(targets, minlength=probabilities.shape[1])
    own = probabilities[np.arange(len(targets)), targets]
    thresholds = np.bincount(targets, own, minlength=len(counts)) / np.maximum(1, counts)
    return np.where((probabilities >= thresholds) & (counts > 0), probabilities, -1)


def confident(targets, probabilities):
    """→ the class that each label should perhaps be, int [N]: the label itself where nothing speaks against it.

    The off-diagonal entries of the paper's confident joint: the most probable of the classes that reach their
    threshold. It must also be more probable than the label, or a class with a low threshold would draw images whose
    label the model prefers."""
    sure = reaching(targets, probabilities)
    better = sure.max(axis=1) > probabilities[np.arange(len(targets)), targets]
    return np.where(better, sure.argmax(axis=1), targets)


def expected(targets, probabilities):
    """→ how many suspects there would be if no label were wrong and the probabilities honest: a label drawn from them
    is another than the surest class this often."""
    surest = reaching(targets, probabilities).max(axis=1)
    return float((1 - surest[surest >= 0]).sum())


def problems(oof):
    """→ [(number of the label, or None where the task is classes; targets int [N]; probabilities [N, K]), …]: each
    label is a question of its own, yes or no."""
    if tasks.task_of(oof.prepared) == "classes":
        return [(None, oof.targets, oof.probabilities)]
    columns = enumerate(zip(oof.targets.T, oof.probabilities.T, strict=True))
    return [(c, (target > 0).astype(int), np.stack([1 - p, p], axis=1)) for c, (target, p) in columns]


def find(oof):
    """Of classes or labels → (a table with COLUMNS and `row` (of oof.folds), the surest suspects first; how many there
    would be if all labels were right). Of labels, suggested is "+ NAME" where one seems to be missing, "- NAME" where
    one seems to be too many."""
    classes, rows, by_chance = oof.prepared["classes"], [], 0
    for c, targets, p in problems(oof):
        suggested = confident(targets, p)
        by_chance += expected(targets, p)
        for i in np.flatnonzero(suggested != targets):
            name = classes[suggested[i]] if c is None else f"{'+' if suggested[i] else '-'} {classes[c]}"
            rows.append((oof.folds.image_name[i], oof.folds.label[i], name, p[i, targets[i]], p[i, suggested[i]], i))
    rows.sort(key=lambda row: row[3] - row[4])
    return pd.DataFrame(rows, columns=[*COLUMNS, "row"]), by_chance


def write(oof, table):
    """Writes suspects.csv into the experiment's folder, whole or not at all."""
    write_csv(oof.folder / "suspects.csv", table[COLUMNS])
