"""What does the competition want back? Fills the cells of its sample submission, and checks what was written.

A form is an entry in SUBMISSIONS: what the value cells of a row hold, and whether a written cell is right. Everything
else of the sample stays as it is: the header, the order, the id's place, further columns, what separates them.
"""

import csv
import io
from typing import NamedTuple

import numpy as np
import pandas as pd

from common import read_json, read_table, write_csv
from kit.score.metrics import METRICS

RANKED = ("map3", "map5")  # metrics of so many ranked labels


class Form(NamedTuple):
    """cells: a function (predictions of a row [K], its columns' classes or None, prepared) → its value cells. right: a
    function (cell, prepared) → whether a written cell can be right. tasks: that it suits."""

    cells: callable
    right: callable
    tasks: tuple


def probability_cells(row, columns, prepared):
    """Probabilities, or numbers in their own units."""
    return [f"{row[c]:.9g}" for c in columns]


def label_cells(row, columns, prepared):
    """The class that the metric reads: the most probable, or for QWK the one nearest to the expected grade."""
    read = METRICS[prepared["metric"]].read or (lambda p: p.argmax(axis=1))
    return [prepared["classes"][read(row[None])[0]]]


def top_cells(row, columns, prepared):
    """The k most probable classes, the most probable first, in one cell or in k."""
    submission = prepared["submission"]
    labels = [prepared["classes"][c] for c in np.argsort(-row, kind="stable")[: submission["top"]]]
    return labels if submission["width"] > 1 else [joined(labels, submission)]


def scored_cells(row, columns, prepared):
    """The most probable class and, after a blank, its probability."""
    return [f"{prepared['classes'][row.argmax()]} {row.max():.9g}"]


def scored(cell, prepared):
    label, _, score = cell.rpartition(" ")
    return label in prepared["classes"] and 0 <= float(score) <= 1


def set_cells(row, columns, prepared):
    """The labels above one half, to which 03 has moved their thresholds; where none is, the most probable."""
    chosen = np.flatnonzero(row > 0.5)
    labels = [prepared["classes"][c] for c in (chosen if len(chosen) else [row.argmax()])]
    return [joined(labels, prepared["submission"])]


def joined(labels, form):
    """→ labels in one cell, as the sample writes them."""
    cell = form.get("between", " ").join(labels)
    return f"[{cell}]" if form.get("brackets") else cell


def in_range(cell, prepared):
    lows, highs = zip(*prepared["ranges"], strict=True)
    return min(lows) - 1e-6 * abs(min(lows)) <= float(cell) <= max(highs) + 1e-6 * abs(max(highs))


def known(cell, prepared):
    mark = prepared["submission"].get("between", " ")
    cell = cell[1:-1] if prepared["submission"].get("brackets") else cell
    return cell in prepared["classes"] or all(label in prepared["classes"] for label in cell.split(mark))


SUBMISSIONS = {
    "probability": Form(probability_cells, lambda cell, prepared: 0 <= float(cell) <= 1, ("classes", "labels")),
    "label": Form(label_cells, lambda cell, prepared: cell in prepared["classes"], ("classes",)),
    "top": Form(top_cells, known, ("classes", "labels")),
    "scored": Form(scored_cells, scored, ("classes",)),
    "set": Form(set_cells, known, ("labels",)),
    "number": Form(probability_cells, in_range, ("numbers",)),
}


def write_tests(folder, sample):
    """Writes test.csv, a row for each test image, and sample.csv, a row for each of the sample's."""
    images = pd.DataFrame(dict(image_name=sample.images))
    write_csv(folder / "test.csv", images if in_turn(sample.units) else images.assign(unit=sample.units))
    write_csv(folder / "sample.csv", sample.layout)


def read_tests(folder, remedy):
    """→ (test.csv with a column unit, the layout) as `write_tests` wrote them. Older prepared data have no sample.csv:
    there a row is an image and a value."""
    images = read_table(folder / "test.csv", remedy)
    images = images if "unit" in images else images.assign(unit=np.arange(len(images)))
    if not (folder / "sample.csv").exists():
        width = len(read_json(folder / "prepared.json", remedy)["submission"]["columns"] or [0])
        layout = pd.DataFrame(dict(unit=images.unit, target=-1, c0=images.image_name))
        return images, layout.assign(**{f"c{i}": "" for i in range(1, 1 + width)})
    layout = read_table(folder / "sample.csv", remedy, dtype=str)
    return images, layout.astype(dict(unit=int, target=int))


def in_turn(units):
    """Whether each image is a unit of its own, in the units' order."""
    return np.array_equal(units, np.arange(len(units)))


def per_unit(predictions, units, how):
    """Predictions of images [M, K] → of units [U, K]: the mean or the max of several images."""
    if in_turn(units):
        return predictions
    return getattr(pd.DataFrame(predictions).groupby(np.asarray(units)), how)().to_numpy()


def submission_rows(layout, predictions, prepared):
    """The submission's rows, header included where the sample has one, from predictions [units, K]."""
    form, classes = prepared["submission"], prepared["classes"]
    places = filled_places(form, layout)
    prepared = prepared | dict(submission=form | dict(width=len(places)))
    columns = [classes.index(label) for label in form["columns"] or []]
    cells, rows = SUBMISSIONS[form["value"]].cells, layout[layout.columns[2:]].to_numpy(object).tolist()
    for row, unit, target in zip(rows, layout.unit, layout.target, strict=True):
        wanted = [target] if target >= 0 else columns
        if not wanted and form["value"] == "probability":
            summed = positives(prepared)
            filled = probability_cells(predictions[unit, summed].sum(keepdims=True), [0], prepared)
        else:
            filled = cells(predictions[unit], wanted or [0], prepared)
        for place, cell in zip(places, filled, strict=True):
            row[place] = cell
    return [form["header"], *rows] if form["header"] else rows


def filled_places(form, layout):
    """→ the numbers of the columns that are filled: by default all but the first."""
    return form.get("values") or [*range(1, layout.shape[1] - 2)]


def positives(prepared):
    """→ the numbers of the classes whose probability a single column wants."""
    positive = prepared["positive"]
    named = positive if isinstance(positive, list) else prepared["classes"][1:]
    return [prepared["classes"].index(label) for label in named]


def check_submission(path, layout, prepared):
    """Reads the written file back and checks rows, names, order and values. An AssertionError is a fault of the kit."""
    form, text = prepared["submission"], path.read_bytes().decode()
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=form.get("separator", ",")))
    assert not form["header"] or rows.pop(0) == form["header"], "the header differs from the sample's"
    places = filled_places(form, layout)
    kept = [i for i in range(layout.shape[1] - 2) if i not in places]
    expected = layout[[f"c{i}" for i in kept]].to_numpy(object).tolist()
    assert all(len(row) == layout.shape[1] - 2 for row in rows), "a row has another number of columns than the sample's"
    assert [[row[i] for i in kept] for row in rows] == expected, "rows, names or their order differ from the sample's"
    right = SUBMISSIONS[form["value"]].right
    assert all(right(row[i], prepared) for row in rows for i in places), f"a value is no {form['value']}"
