"""The sample submission: its rows, the test images behind them, and the form of its cells."""

import re
from dataclasses import replace
from typing import NamedTuple

from common import UserError, listing, say

import numpy as np
import pandas as pd

from kit.data import tables
from kit.data.decode import IMAGE_ENDINGS
from kit.data.labels import split_cell
from kit.data.tables import is_number, refuse
from kit.score.metrics import METRICS
from kit.score.tasks import Task
from kit.submit.submission import RANKED, SUBMISSIONS


class Sample(NamedTuple):
    """What a sample submission asks for. Its ids are numbered from 0."""

    form: dict  # prepared.json's `submission`: value, columns, header, id_column, separator, values, and more of labels
    task: Task  # with the classes in their final order
    images: list[str]  # of the test set, each once
    submission_ids: np.ndarray  # int [images]: the id whose prediction an image counts for
    layout: pd.DataFrame  # a row for each row: submission_id, target (the class asked for; -1: all), cells c0, c1, …

    def part(self, count: int) -> "Sample":
        """Return the sample's first `count` ids."""
        kept = self.submission_ids < count
        images = [image for image, keep in zip(self.images, kept, strict=True) if keep]
        layout = self.layout[self.layout.submission_id < count]
        return self._replace(images=images, submission_ids=self.submission_ids[kept], layout=layout)


def read_sample(path, source, task, tests, flags, label_columns=(), form=None):
    """Read the sample submission. → Sample. Raises UserError where it can't be filled.

    source: the test images; tests: the Table of test images, or None; flags: Flags; label_columns: of the training
    table. form: what an earlier sample asked for, as this one must; the task's classes then keep their order."""
    rows, separator = tables.read_rows(path, tables.NO_SAMPLE)
    headed = is_header(rows, source, task.names) if flags.submit_header == "auto" else flags.submit_header == "yes"
    header, rows = rows[0] if headed else None, rows[headed:]
    refuse(path, not rows, "names no test image: download it again, or see --submit-header")
    id_column = find_id_column(rows, source, tests)
    ids = None if id_column is None else [row[id_column] for row in rows]
    images, submission_ids, row_ids, targets = find_test_images(path, ids, source, tests, flags, task.names)
    columns = [i for i in range(len(rows[0])) if i != id_column]
    values = find_value_columns(task, header, columns, label_columns, form)
    if form is None:
        names = [header[i].strip() for i in values] if header else None
        cells = [[row[i].strip() for i in values] for row in rows]
        form = choose_form(path, task, names, cells, targets[0] is not None, flags)
        task, form = order_classes(path, task, names, form, flags)
    form = form | dict(header=header, id_column=id_column, separator=separator, values=values)
    number_of = {None: -1} | {name: k for k, name in enumerate(task.names)}
    layout = pd.DataFrame(rows).add_prefix("c")
    layout.insert(0, "submission_id", row_ids)
    layout.insert(1, "target", [number_of[target] for target in targets])
    return Sample(form, task, images, submission_ids, layout)


def is_header(rows, source, classes):
    """Return whether the first row is a header: no row of a test image, not even of one that is missing."""
    first = [cell.strip() for cell in rows[0]]
    cells = first[1:] or first
    if sorted(cells) == sorted(classes) and len(cells) > 1:  # also where classes and images are called 1, 2, …
        return source.find(rows[0][0]) is None
    if any(source.find(cell) is not None or cell.lower().endswith(IMAGE_ENDINGS) for cell in rows[0]):
        return False
    if {*cells} <= {*classes}:  # classes name columns where the rows below hold other values
        return not all(cell.strip() in classes for row in rows[1:] for cell in row[1:] or row)
    return not all(c in classes or tables.is_blank(c) or is_number(c) for c in cells)


def find_value_columns(task, header, columns, label_columns, form):
    """Return the numbers of the columns to be filled, out of those that hold no ids: the ones that the header names
    after classes or after the training table's label columns, else all. Prints the names of the others."""
    if not header or len(columns) < 2:
        return columns
    if form:
        return form["values"]
    named = [i for i in columns if header[i].strip() in task.names]
    all_there = {header[i].strip() for i in named} == {*task.names}
    one_of_two = task.is_binary and len(named) == 1 and not is_number(*task.names)
    as_labels = [i for i in columns if header[i].strip() in label_columns]
    values = named if all_there or one_of_two else as_labels or columns
    if len(values) < len(columns):
        others = [header[i].strip() for i in columns if i not in values]
        say(f"these columns of the sample stay as they are: {listing(others)}")
    return values


def find_id_column(rows, source, tests):
    """Return the number of the sample's column of ids, by which the test images are found; None where there is none."""
    columns = [*zip(*rows[: tables.CHECKED_ROWS], strict=True)]
    unique = [len({*cells}) == len(cells) for cells in columns]  # or class numbers would be images of a pixel table
    hits = [unique[i] * sum(source.find(cell) is not None for cell in cells) for i, cells in enumerate(columns)]
    if max(hits):
        return hits.index(max(hits))
    for i, cells in enumerate(columns):
        if key_column(tests, cells):
            return i
    return None if tests and len(rows) == len(tests) and (len(columns) == 1 or is_number(*rows[0])) else 0


def key_column(tests, ids, besides=None):
    """Return the column of the Table of test images that holds most of the ids, and at least half of them, or None."""
    columns = {name: {*cells} for name, cells in tests.columns.items() if name != besides} if tests else {}
    hits = {name: len({*ids} & cells) for name, cells in columns.items() if len(cells) > 1}
    best = max(hits, key=hits.get, default=None)
    return best if best and hits[best] >= len({*ids}) / 2 else None


def find_test_images(path, ids, source, tests, flags, classes):
    """Find the images that the sample's rows ask for. → (test images, int [images]: the number of each image's id,
    int [rows]: the same for each row, [rows]: the class that a row asks for, None where it asks for all).

    ids: of the rows; None: the rows are those of `tests`, the Table of test images. An id stands for an image or, where
    that table says so, for several."""
    column = key = None
    if tests:
        given = flags.image_column if flags.image_column in tests.columns else None
        column = tables.image_column(tests, source, given)
    if ids and source.table:  # ids go before the row numbers that name its images
        key = key_column(tests, ids, besides=column)
    ids = ids or tests.columns[column]
    direct = not key and any(source.find(cell) is not None for cell in ids[: tables.CHECKED_ROWS])
    key = key or (None if direct else key_column(tests, ids))
    targets = [None] * len(ids)
    if key and flags.target_column in tests.columns:
        row_of = {cell: i for i, cell in enumerate(tests.columns[key])}
        lost = [cell for cell in ids if cell not in row_of]
        refuse(path, lost, f"names * and {tests.path} doesn't: name the right --test-csv")
        names = column, flags.target_column
        ids, targets = ([tests.columns[name][row_of[cell]] for cell in ids] for name in names)
        refuse(path, sorted({*targets} - {*classes}), "asks for *, which the training table hasn't")
    elif not key and not direct and (split := split_targets(ids, source, classes)):
        ids, targets = split
    else:
        tables.check_unique(path, ids)
    number_of = id_of_image = {cell: number for number, cell in enumerate(dict.fromkeys(ids))}
    if key and targets[0] is None:
        rows = zip(tests.columns[column], tests.columns[key], strict=True)
        pairs = dict.fromkeys((image, cell) for image, cell in rows if cell in number_of)
        shared = tables.repeated(image for image, _ in pairs)[:1]
        refuse(path, shared, "asks for two ids that share the image *: one prediction can't serve both")
        lacking = number_of.keys() - {*tests.columns[key]}  # they may be names of images
        pairs = [*pairs, *((cell, cell) for cell in number_of if cell in lacking)]
        id_of_image = {image: number_of[cell] for image, cell in pairs}
    return [*id_of_image], np.array([*id_of_image.values()]), np.array([number_of[cell] for cell in ids]), targets


def split_targets(ids, source, classes):
    """Split ids made of an image's and a class' name. → (the images' names, the classes'), or None for other ids."""
    pattern = re.compile(rf"(..+?)({'|'.join(map(re.escape, classes))})", re.DOTALL)
    matches = [pattern.fullmatch(cell) for cell in ids]
    images = [match[1].rstrip("_-") for match in matches if match]
    if None in matches or any(source.find(image) is None for image in images[: tables.CHECKED_ROWS]):
        return None
    return images, [match[2] for match in matches]


def choose_form(path, task, names, values, long, flags):
    """Return what prepared.json says of the value columns. names: of these columns, or None; values: the sample's value
    cells; long: whether a row asks for one class."""
    classes, width = task.names, len(values[0])
    refuse(path, not width, "has 0 value columns: there must be one at least")
    value = pick_value(task, names, values, long, flags.metric) if flags.submit_value == "auto" else flags.submit_value
    unfit = f"can't be filled with --submit-value {value}: the task is {task.key}"
    refuse(path, task.key not in SUBMISSIONS[value].tasks, unfit)
    form = dict(value=value, columns=None)
    if value == "top":
        refuse(path, width > len(classes), f"has {width} value columns for {len(classes)} classes: see --label-column")
        style = list_style(values[0][0], classes, " ")
        ranks = int(flags.metric[3:]) if flags.metric in RANKED and width == 1 else 0
        return form | style | dict(top=max(width, len(split_cell(values[0][0], style["between"])), ranks))
    if value in ("label", "scored", "set"):
        refuse(path, width > 1 or long, f"has {width} value columns: --submit-value {value} fills one")
        return form | (list_style(values[0][0], classes, flags.separator) if value == "set" else {})
    if long:
        return form | dict(columns=classes if value == "probability" else None)
    if width > 1 or not (value == "number" or task.rows_sum_to_1):
        return form | dict(columns=columns_of(path, classes, names, width, value))
    few = f"has one value column for {len(classes)} numbers, {listing(classes)}: see --label-column"
    refuse(path, value == "number" and len(classes) > 1, few)
    lacks = value != "number" and not task.is_binary and not flags.positive
    refuse(path, lacks, f"has one column for {len(classes)} classes: --submit-value label fills it")
    return form


def columns_of(path, classes, names, width, value):
    """Return the class, label or number of each value column: by its name; numbers also by the beginning of the name,
    or in the training table's order, and then a line says so."""
    if width == len(classes) and sorted(names or classes) == sorted(classes):
        return names or classes
    problem = f"has {width} value columns ({listing(names or [])}), and the classes are *"
    fits = value == "number" and width == len(classes)
    refuse(path, [] if fits else classes, f"{problem}: there must be one column, or one for each class")
    fitting = [[c for c in classes if c.startswith(name) or name.startswith(c)] for name in names]
    single = [found[0] for found in fitting if len(found) == 1]
    columns = single if len({*single}) == len(classes) else classes
    pairs = [f"{name} ← {c}" for name, c in zip(names, columns, strict=True)]
    how = "" if columns is single else ", so they are taken in order"
    say(f"the sample's columns have other names{how}: {listing(pairs)}")
    return columns


def pick_value(task, names, values, long, metric):
    """Return the key of SUBMISSIONS that the sample's value cells ask for."""
    classes, first = task.names, values[0]
    if long or len(first) > 1:
        ranked = task.can_rank and (metric in RANKED or not is_number(*first))
        named = names is not None and {*names} <= {*classes}
        return "top" if ranked and not long and {*first} <= {*classes} and not named else task.column_value
    if task.single_value:
        return task.single_value
    parts = split_cell(first[0], list_style(first[0], classes, " ")["between"])
    if metric in RANKED or (len(parts) > 1 and first[0] not in classes and {*parts} <= {*classes}):
        return "top"
    if is_number(first[0].rpartition(" ")[2]) and first[0].rpartition(" ")[0] in classes:
        return "scored"
    words = not is_number(*classes) and all(row[0] in classes for row in values)
    of_labels = metric != "auto" and METRICS[metric].of_labels
    return "label" if not task.is_binary or words or of_labels else "probability"


def list_style(cell, classes, usual):
    """Return dict(between, brackets): what stands between the labels in a cell, and whether brackets stand around them.
    The separator is the one that makes classes of all its parts, else the usual one."""
    brackets = cell.startswith("[") and cell.endswith("]")
    for separator in (usual, " ", ", ", ",", "; ", ";", "|"):
        parts = (cell[1:-1] if brackets else cell).split(separator)
        if len(parts) > 1 and {part.strip(" '\"") for part in parts} <= {*classes}:
            return dict(between=separator, brackets=brackets)
    return dict(between=", " if brackets else usual, brackets=brackets)


def order_classes(path, task, names, form, flags):
    """Decide which class a single column of probabilities wants: by --positive, the sample's header or, of two numbers,
    the larger. → (the task, where it is the second of two; the form, with `summed` where more than two classes have
    several that it wants the sum of). names: of the value columns, or None."""
    classes, given = task.names, flags.positive
    wants_one = form["value"] == "probability" and not form["columns"]
    refuse("--positive", given and not task.rows_sum_to_1, f"names a class, and the task is {task.key}: leave it out")
    if given and len(classes) > 2 and wants_one and {*given} < {*classes}:
        return task, form | dict(summed=given)
    if given and (len(classes) > 2 or len(given) > 1 or given[0] not in classes):
        several = ", or some of more beside --submit-value probability" * (len(classes) > 2)
        raise UserError(f"--positive {' '.join(given)}: give one of two classes{several}; these are {listing(classes)}")
    if not task.is_binary:
        return task, form
    named = [name for name in names or [] if wants_one and name in classes]
    positive = (given or named or [None])[0]
    if not positive and (wants_one or flags.metric == "f1-positive") and not is_number(*classes):
        of_metric = flags.metric == "f1-positive"
        wants = "--metric f1-positive scores" if of_metric else f"{path} wants the probability of"
        refuse(wants, classes, "one class (*): name it with --positive")
    return replace(task, names=classes if positive != classes[0] else classes[::-1]), form
