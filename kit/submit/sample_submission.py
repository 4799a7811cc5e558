"""The sample submission: its rows, the test images behind them, and the form of its cells."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from common import UserError, listing, say
from kit.data.decode import IMAGE_ENDINGS
from kit.data.labels import split_cell
from kit.data.tables import CHECKED_ROWS, check_unique, image_column, is_blank, is_number, read_cells, refuse
from kit.score.metrics import METRICS
from kit.score.tasks import Task
from kit.submit.submission import RANKED, SUBMISSIONS


@dataclass
class SampleFlags:
    """How the sample submission is to be read, as 00's flags say it."""

    header: str = "auto"  # whether it has a header: auto, yes or no
    value: str = "auto"  # what its cells hold: a key of SUBMISSIONS
    separator: str = " "  # between the labels of a list
    image_column: str | None = None  # of the table of test images; None: found by the images
    target_column: str | None = None  # of that table: the class that an id asks for
    metric: str = "auto"  # a key of METRICS
    positive: list[str] | None = None  # the class whose probability is submitted; of more than two, several add up
    per_id: str = "mean"  # mean or max of the predictions of an id's several images


class Sample(NamedTuple):
    """What a sample submission asks for. Its ids are numbered from 0."""

    form: dict  # prepared.json's `submission`: value, columns, header, and what is unusual
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

    source: the test images; tests: the Table of test images, or None; label_columns: of the training table. form: what
    an earlier sample asked for, as this one must; the task's classes then keep their order."""
    rows, separator = read_cells(path, "put the competition's sample there, or name it with --sample-submit")
    headed = is_header(rows, source, task.names) if flags.header == "auto" else flags.header == "yes"
    header, rows = rows[0] if headed else None, rows[headed:]
    refuse(path, not rows, "names no test image: download it again, or see --submit-header")
    width, id_column = len(rows[0]), find_id_column(rows, source, tests)
    ids = None if id_column is None else [row[id_column] for row in rows]
    images, submission_ids, row_ids, targets = find_test_images(path, ids, len(rows), source, tests, flags, task.names)
    values = find_value_columns(task, header, [i for i in range(width) if i != id_column], label_columns, form)
    earlier = form
    if form is None:
        names = [header[i].strip() for i in values] if header else None
        cells = [[row[i].strip() for i in values] for row in rows]
        form = choose_form(path, task, names, cells, targets[0] is not None, flags)
    unusual = dict(id_column=id_column, separator=separator, values=values)
    usual = dict(id_column=0, separator=",", values=[*range(1, width)])
    form = {key: value for key, value in form.items() if key not in usual} | dict(header=header)
    form |= {key: value for key, value in unusual.items() if value != usual[key]}
    if earlier is None:
        task, form = order_classes(path, task, form, flags)
    number_of = {None: -1} | {name: k for k, name in enumerate(task.names)}
    layout = pd.DataFrame(rows, columns=[f"c{i}" for i in range(width)])
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
    return not all(c in classes or is_blank(c) or is_number(c) for c in cells)


def find_value_columns(task, header, columns, label_columns, form):
    """Return the numbers of the columns to be filled, out of those that hold no ids: the ones that the header names
    after classes or after the training table's label columns, else all. Prints the names of the others."""
    if not header or len(columns) < 2:
        return columns
    if form:
        return form.get("values", columns)
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
    first_rows = rows[:CHECKED_ROWS]
    columns = [[row[i] for row in first_rows] for i in range(len(rows[0]))]
    unique = [len({*cells}) == len(cells) for cells in columns]  # or class numbers would be images of a pixel table
    hits = [unique[i] * sum(source.find(cell) is not None for cell in cells) for i, cells in enumerate(columns)]
    if max(hits):
        return hits.index(max(hits))
    for i, cells in enumerate(columns):
        if key_column(tests, cells):
            return i
    if tests and len(rows) == len(tests) and (len(rows[0]) == 1 or is_number(*rows[0])):
        return None
    return 0


def key_column(tests, ids, besides=()):
    """Return the column of the Table of test images that holds most of the ids, and at least half of them; else
    None."""
    best, most = None, len({*ids}) / 2
    for name, cells in tests.columns.items() if tests else ():
        hits = len({*ids} & {*cells})
        if name not in besides and len({*cells}) > 1 and hits >= most and (best is None or hits > most):
            best, most = name, hits
    return best


def find_test_images(path, ids, count, source, tests, flags, classes):
    """Find the images that the sample's rows ask for. → (test images, int [images]: the number of each image's id,
    int [rows]: the same for each row, [rows]: the class that a row asks for, None where it asks for all).

    ids: of the rows, or None; count: of rows. An id stands for an image or, where the table of test images says so, for
    several."""
    given = flags.image_column if tests and flags.image_column in tests.columns else None
    column = image_column(tests, source, given) if tests else None
    if ids is None:
        images = tests.columns[column]
        return images, np.arange(len(images)), np.arange(count), [None] * count
    # In a table of pixels, ids go before the row numbers that name its images.
    key = key_column(tests, ids, besides=[column]) if hasattr(source, "table") else None
    direct = not key and any(source.find(cell) is not None for cell in ids[:CHECKED_ROWS])
    key = key or (None if direct else key_column(tests, ids))
    targets = [None] * count
    if key and flags.target_column in tests.columns:
        ids, targets = look_up_targets(path, ids, tests, key, column, flags.target_column, classes)
    elif key:
        check_unique(path, ids)
        return find_several_images(path, ids, tests.columns[key], tests.columns[column])
    elif not direct and (split := split_targets(ids, source, classes)):
        ids, targets = split
    else:
        check_unique(path, ids)
    number_of = {name: number for number, name in enumerate(dict.fromkeys(ids))}
    return [*number_of], np.arange(len(number_of)), np.array([number_of[name] for name in ids]), targets


def look_up_targets(path, ids, tests, key, images, targets, classes):
    """Return (the image, the class) of each id, where the table of test images has columns `key`, `images`,
    `targets`."""
    rows = {cell: i for i, cell in enumerate(tests.columns[key])}
    lost = [cell for cell in ids if cell not in rows]
    refuse(path, lost, f"names * and {tests.path} doesn't: name the right --test-csv")
    images, targets = ([tests.columns[name][rows[cell]] for cell in ids] for name in (images, targets))
    refuse(path, sorted({*targets} - {*classes}), "asks for *, which the training table hasn't")
    return images, targets


def find_several_images(path, ids, keys, images):
    """Return what find_test_images does, where the table of test images (its columns keys and images) has an image or
    more for each id. An id that it hasn't is taken for the name of an image."""
    number_of, id_of_image = {cell: number for number, cell in enumerate(ids)}, {}
    for key, image in zip(keys, images, strict=True):
        if key in number_of and id_of_image.setdefault(image, number_of[key]) != number_of[key]:
            raise UserError(f"{path} asks for two ids that share the image {image}: one prediction can't serve both")
    for cell in number_of.keys() - {*keys}:
        id_of_image[cell] = number_of[cell]
    return [*id_of_image], np.array([*id_of_image.values()]), np.arange(len(ids)), [None] * len(ids)


def split_targets(ids, source, classes):
    """Split ids made of an image's and a class' name. → (the images' names, the classes' names), or None where they
    aren't."""
    images, targets = [], []
    for cell in ids:
        fitting = [name for name in classes if cell.endswith(name) and len(cell) > len(name) + 1]
        if not fitting:
            return None
        targets.append(max(fitting, key=len))
        images.append(cell.removesuffix(targets[-1]).rstrip("_-"))
    return (images, targets) if all(source.find(image) is not None for image in images[:CHECKED_ROWS]) else None


def choose_form(path, task, names, values, long, flags):
    """Return what prepared.json says of the submission. names: of the value columns, or None; values: the sample's
    value cells; long: whether a row asks for one class."""
    classes, width = task.names, len(values[0])
    refuse(path, not width, "has 0 value columns: there must be one at least")
    value = pick_value(task, names, values, long, flags.metric) if flags.value == "auto" else flags.value
    unfit = f"can't be filled with --submit-value {value}: the task is {task.key}"
    refuse(path, task.key not in SUBMISSIONS[value].tasks, unfit)
    if value == "top":
        ranks = int(flags.metric[3:]) if flags.metric in RANKED and width == 1 else 0
        separator, brackets = list_style(values[0][0], classes, " ")
        top = max(width, len(split_cell(values[0][0], separator)), ranks)
        refuse(path, width > len(classes), f"has {width} value columns for {len(classes)} classes: see --label-column")
        return dict(value=value, columns=None, top=top) | unusual_style(separator, brackets, " ")
    if value in ("label", "scored", "set"):
        refuse(path, width > 1 or long, f"has {width} value columns: --submit-value {value} fills one")
        style = list_style(values[0][0], classes, flags.separator)
        return dict(value=value, columns=None) | (unusual_style(*style, None) if value == "set" else {})
    if long:
        return dict(value=value, columns=classes if value == "probability" else None)
    if width == 1 and (value == "number" or task.rows_sum_to_1):
        lacks = value != "number" and not task.is_binary and not flags.positive
        refuse(path, lacks, f"has one column for {len(classes)} classes: --submit-value label fills it")
        few = f"has one value column for {len(classes)} numbers, {listing(classes)}: see --label-column"
        refuse(path, value == "number" and len(classes) > 1, few)
        return dict(value=value, columns=None)
    return dict(value=value, columns=columns_of(path, classes, names, width, value))


def columns_of(path, classes, names, width, value):
    """Return the class, label or number of each value column: by its name; numbers also by the beginning of the name,
    or in the training table's order, and then a line says so."""
    if names is None and width == len(classes):
        return classes
    if names and sorted(names) == sorted(classes):
        return names
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
    parts = split_cell(first[0], list_style(first[0], classes, " ")[0])
    if metric in RANKED or (len(parts) > 1 and first[0] not in classes and {*parts} <= {*classes}):
        return "top"
    if is_number(first[0].rpartition(" ")[2]) and first[0].rpartition(" ")[0] in classes:
        return "scored"
    words = not is_number(*classes) and all(row[0] in classes for row in values)
    of_labels = metric != "auto" and METRICS[metric].of_labels
    return "label" if not task.is_binary or words or of_labels else "probability"


def list_style(cell, classes, usual):
    """Return (what stands between the labels in a cell, whether brackets stand around them): what makes classes of all
    its parts, else the usual separator."""
    brackets = cell.startswith("[") and cell.endswith("]")
    for separator in (usual, " ", ", ", ",", "; ", ";", "|"):
        parts = (cell[1:-1] if brackets else cell).split(separator)
        if len(parts) > 1 and {part.strip(" '\"") for part in parts} <= {*classes}:
            return separator, brackets
    return ", " if brackets else usual, brackets


def unusual_style(separator, brackets, usual):
    """Return what prepared.json says of the separator between labels and the brackets around them, where unusual."""
    return (dict(between=separator) if separator != usual else {}) | (dict(brackets=True) if brackets else {})


def order_classes(path, task, form, flags):
    """Decide which class a single column of probabilities wants: by --positive, the sample's header or, of two numbers,
    the larger. → (the task, where it is the second of two; the form, with `summed` where more than two classes have
    several that it wants the sum of)."""
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
    positive, named_by_header = given[0] if given else None, wants_one and form["header"]
    if not positive and named_by_header:
        name = form["header"][form.get("values", [-1])[0]].strip()
        positive = name if name in classes else None
    if not positive:
        of_metric = flags.metric == "f1-positive"
        unclear = classes if (wants_one or of_metric) and not is_number(*classes) else []
        wants = "--metric f1-positive scores" if of_metric else f"{path} wants the probability of"
        refuse(wants, unclear, "one class (*): name it with --positive")
    return replace(task, names=classes if positive != classes[0] else classes[::-1]), form
