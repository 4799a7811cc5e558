"""The submission: fill the cells of the competition's sample, and check what was written.

A form is an entry in SUBMISSIONS: what the value cells of a row hold, and whether a written cell can be right. The rest
of the sample stays as it is: the header, the order, the column of ids, further columns, the separator.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import listing, read_table, replacing, say, warn, write_csv

import numpy as np
import pandas as pd

from kit.data.tables import is_number
from kit.score import thresholds
from kit.score.metrics import METRICS
from kit.score.tasks import Task

RANKED = ("map3", "map5")  # metrics of so many ranked labels


class Form(NamedTuple):
    """How one kind of value cell is filled and checked. `form` is prepared.json's `submission`; for `cells` it has a
    key `width` too, the number of value columns."""

    cells: Callable[[np.ndarray, list, Task, str, dict], list[str]]  # (a row's predictions [K], numbers of the K that
    # its columns ask for, task, metric, form) → value cells
    right: Callable[[str, Task, dict], bool]  # (a written cell, task, form) → whether it can be right
    tasks: tuple[str, ...]  # keys of TASKS that it suits
    noun: str  # what a value cell holds


def prediction_cells(row, columns, task, metric, form):
    """Return the predictions of the columns; a single value column holds their sum."""
    values = row[columns] if form["width"] > 1 else [row[columns].sum()]
    return [f"{value:.9g}" for value in values]


def label_cells(row, columns, task, metric, form):
    """Return the class that the metric reads, where 03 has moved the cuts: the most probable; for QWK, the one nearest
    to the expected grade."""
    read = METRICS[metric].read or (lambda p: p.argmax(axis=1))
    return [task.names[read(row[None])[0]]]


def top_cells(row, columns, task, metric, form):
    """Return the most probable classes, the most probable first, in one cell or in one each."""
    labels = [task.names[k] for k in np.argsort(-row, kind="stable")[: form["top"]]]
    return labels if form["width"] > 1 else [join_labels(labels, form)]


def scored_cells(row, columns, task, metric, form):
    """Return the most probable class and, after a blank, its probability."""
    return [f"{task.names[row.argmax()]} {row.max():.9g}"]


def set_cells(row, columns, task, metric, form):
    """Return the labels above 0.5, where 03 has moved the thresholds; if none, the most probable."""
    chosen = np.flatnonzero(row > 0.5)
    return [join_labels([task.names[k] for k in (chosen if len(chosen) else [row.argmax()])], form)]


def number_cells(row, columns, task, metric, form):
    """Return the numbers: where the metric rounds them, whole ones in their range, for platforms that don't round."""
    if METRICS[metric].read and METRICS[metric].task == task.key:
        row = np.clip(METRICS[metric].read(row), *np.transpose(task.ranges))
    return prediction_cells(row, columns, task, metric, form)


def join_labels(labels, form):
    """Return labels in one cell, as the sample writes them."""
    cell = form.get("between", " ").join(labels)
    return f"[{cell}]" if form.get("brackets") else cell


def is_probability(cell, task, form):
    return 0 <= float(cell) <= 1


def is_label(cell, task, form):
    return cell in task.names


def is_labels(cell, task, form):
    cell = cell[1:-1] if form.get("brackets") else cell
    return cell in task.names or all(label in task.names for label in cell.split(form.get("between", " ")))


def is_scored_label(cell, task, form):
    label, _, score = cell.rpartition(" ")
    return label in task.names and 0 <= float(score) <= 1


def is_in_range(cell, task, form):
    lows, highs = zip(*task.ranges, strict=True)
    return min(lows) - 1e-6 * abs(min(lows)) <= float(cell) <= max(highs) + 1e-6 * abs(max(highs))


SUBMISSIONS: dict[str, Form] = {
    "probability": Form(prediction_cells, is_probability, ("classes", "labels"), "a probability"),
    "label": Form(label_cells, is_label, ("classes",), "a class"),
    "top": Form(top_cells, is_labels, ("classes", "labels"), "the most probable labels"),
    "scored": Form(scored_cells, is_scored_label, ("classes",), "a class and its probability"),
    "set": Form(set_cells, is_labels, ("labels",), "a set of labels"),
    "number": Form(number_cells, is_in_range, ("numbers",), "a number"),
}


def has_cuts(task, metric, form):
    """Return whether the submission is written with fitted cuts (kit/score/thresholds.py): not where labels are ranked
    or probabilities added up, whose order cuts would change."""
    return thresholds.needs_cuts(metric, len(task)) and form["value"] != "top" and "summed" not in form


def fit_cuts(targets, predictions, task, metric, form):
    """Return the submission's cuts, as thresholds.fit does, fitted on out-of-fold predictions [N, K]; print them."""
    if not has_cuts(task, metric, form):
        return None
    cuts = thresholds.fit(metric, targets, predictions)
    are_written = form["value"] == "probability" and cuts is not None
    moved = "; the submission's probabilities are moved to match" * are_written
    say(f"{thresholds.describe(metric, cuts, task.names)}{moved}")
    return cuts


def write_tests(folder, sample):
    """Write test.csv, a row for each test image, and sample.csv, a row for each of the sample's, from a Sample."""
    images = pd.DataFrame(dict(image_name=sample.images))
    ids = sample.submission_ids
    write_csv(folder / "test.csv", images if is_one_each(ids) else images.assign(submission_id=ids))
    write_csv(folder / "sample.csv", sample.layout)


def read_tests(folder, remedy):
    """Return (test.csv with a column submission_id, the sample's layout), as `write_tests` wrote them."""
    images = read_table(folder / "test.csv", remedy)
    images = images if "submission_id" in images else images.assign(submission_id=np.arange(len(images)))
    layout = read_table(folder / "sample.csv", remedy, dtype=str)
    return images, layout.astype(dict(submission_id=int, target=int))


def is_one_each(submission_ids):
    """Return whether each image has an id of its own, in order."""
    return np.array_equal(submission_ids, np.arange(len(submission_ids)))


def per_id(predictions, submission_ids, how):
    """Return predictions [ids, K] from those of images [M, K]: the "mean" or the "max" of an id's images."""
    if is_one_each(submission_ids):
        return predictions
    return getattr(pd.DataFrame(predictions).groupby(np.asarray(submission_ids)), how)().to_numpy()


def value_columns(form, layout):
    """Return the numbers of the columns that are filled: by default all but the first."""
    return form.get("values") or [*range(1, layout.shape[1] - 2)]


def submission_rows(layout, predictions, task, metric, form):
    """Return the submission's rows, with the sample's header if it has one, from predictions [ids, K].

    A single value column takes the classes that form["summed"] names, otherwise the last of the K names."""
    filled = value_columns(form, layout)
    form = form | dict(width=len(filled))
    numbers = [task.names.index(name) for name in form["columns"] or form.get("summed") or task.names[-1:]]
    cells, rows = SUBMISSIONS[form["value"]].cells, layout[layout.columns[2:]].to_numpy(object).tolist()
    for row, i, target in zip(rows, layout.submission_id, layout.target, strict=True):
        values = cells(predictions[i], [target] if target >= 0 else numbers, task, metric, form)
        for column, value in zip(filled, values, strict=True):
            row[column] = value
    if form.get("decimal") == ",":
        rows = [[cell.replace(".", ",") if is_number(cell) else cell for cell in row] for row in rows]
    return [form["header"], *rows] if form["header"] else rows


def check_submission(path, layout, task, form):
    """Read the written file and check rows, names, order and values. An AssertionError is a fault of the kit."""
    text = path.read_bytes().decode()
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=form.get("separator", ",")))
    assert not form["header"] or rows.pop(0) == form["header"], "the header differs from the sample's"
    if form.get("decimal") == ",":  # the layout has points
        rows = [[new if is_number(new := cell.replace(",", ".")) else cell for cell in row] for row in rows]
    filled = value_columns(form, layout)
    kept = [i for i in range(layout.shape[1] - 2) if i not in filled]
    expected = layout[[f"c{i}" for i in kept]].to_numpy(object).tolist()
    assert all(len(row) == layout.shape[1] - 2 for row in rows), "a row has another number of columns than the sample's"
    assert [[row[i] for i in kept] for row in rows] == expected, "rows, names or their order differ from the sample's"
    right = SUBMISSIONS[form["value"]].right
    assert all(right(row[i], task, form) for row in rows for i in filled), f"a value is no {form['value']}"
    warn_of_other_cells(layout, [*zip(*rows, strict=True)], filled, task if form["value"] == "label" else None)


def warn_of_other_cells(layout, columns, filled, task):
    """Warn where the written cells are of another kind than the sample's or, where these are labels of a `task`, none
    of them is a class."""
    for i in filled:
        asked = {*layout[f"c{i}"]} - {""}
        if asked and is_number(*asked) != is_number(*columns[i]):
            kinds = ("numbers", "words")[:: 1 if is_number(*asked) else -1]
            warn("the sample's cells are {} and the written ones {}: compare the two files".format(*kinds))
        elif task and asked and not is_number(*asked) and not asked & {*task.names}:
            warn(f"no class is among the sample's words ({listing(sorted(asked), 3)}): compare the two files")


def write_submission(path: Path, layout, predictions, task, metric, form):
    """Write predictions [ids, K] as the submission, and check it before it gets its name."""
    rows = submission_rows(layout, predictions, task, metric, form)
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            newline = form.get("newline", "\n")
            csv.writer(file, lineterminator=newline, delimiter=form.get("separator", ",")).writerows(rows)
        check_submission(temporary, layout, task, form)
