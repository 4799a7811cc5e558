"""Labels of the training images, in the forms in which competitions give them.

A label form is a function (path of the table, names of the images, {column: cells}, Flags) → TrainingLabels, and an
entry in LABEL_FORMS. Without a table, the images' paths name their classes. Flags are those of kit/data/prepared.py.
"""

import re
from dataclasses import dataclass, replace

from common import UserError, listing, say

import numpy as np

from kit.data.tables import Table, check_unique, column, image_column, is_blank, is_number, refuse
from kit.score.metrics import METRICS
from kit.score.tasks import Classes, Labels, Numbers, Task


@dataclass
class TrainingLabels:
    """The labels of N training images."""

    names: list[str]  # of the images
    task: Task  # with the names of the K classes, labels or numbers
    targets: np.ndarray  # [N] or [N, K], as the task has them
    cells: list[str]  # the targets as folds.csv and the pictures show them
    summary: str  # a few words on what they are, and where they were read
    columns: tuple[str, ...] = ()  # of the training table that they were read from

    def part(self, rows: np.ndarray) -> "TrainingLabels":
        """Return the labels of some images; the ranges of numbers become those of these images."""
        names, cells = ([cells[i] for i in rows] for cells in (self.names, self.cells))
        targets = self.targets[rows]
        return replace(self, names=names, cells=cells, targets=targets, task=self.task.fitted(targets))

    def with_task(self, task: Task) -> "TrainingLabels":
        """Return the labels with the classes in the order of `task`."""
        return self if task == self.task else replace(self, task=task, targets=task.parse(self.cells))


def in_order(cells):
    """Return the different cells in order: by value where all are numbers."""
    different = dict.fromkeys(cells)
    return sorted(different, key=float if is_number(*different) else None)


def class_labels(path, names, cells, source):
    """Return the TrainingLabels of one class for each image. source: a few words on where they were read."""
    blank = [name for name, cell in zip(names, cells, strict=True) if is_blank(cell)]
    refuse(path, blank, "has no label for *: label or remove them, or see --drop-unlabelled")
    spellings = {}
    for label in filter(is_number, dict.fromkeys(cells)):  # 1 and 1.0 would be two classes
        first = spellings.setdefault(float(label), label)
        refuse(path, first != label, f"has the labels {first} and {label}, which are one number: spell them alike")
    classes = in_order(cells)
    refuse(path, len(classes) < 2, f"has one class only ({cells[0]}): a classifier needs two")
    task = Classes(classes)
    return TrainingLabels(names, task, task.parse(cells), cells, f"{len(classes)} classes in {source}")


def set_labels(names, sets, labels, source, separator=" "):
    """Return the TrainingLabels of a set of labels for each image. labels: the names of all; source: as above."""
    number_of = {label: f"{number}" for number, label in enumerate(labels)}
    targets = Labels(labels).read_targets([" ".join(number_of[label] for label in members) for members in sets])
    cells = [separator.join(members) for members in sets]
    summary = f"{len(labels)} labels in {source}, any number of them per image"
    return TrainingLabels(names, Labels(labels), targets, cells, summary)


def only_column(path, columns, flags):
    """Return (name, cells) of the only label column."""
    several = [*columns] if len(columns) > 1 else []
    refuse(path, several, f"--label-form {flags.label_form} reads one column, and these are *: see --label-column")
    return next(iter(columns.items()))


def class_form(path, names, columns, flags):
    """One label in one column."""
    name, cells = only_column(path, columns, flags)
    several = sum(" " in cell for cell in cells) if name == "category_id" else 0
    if several:
        say(f"{path.name}: {several} images have several categories, of which the first counts (see --label-form list)")
        cells = [cell.partition(" ")[0] for cell in cells]
    return class_labels(path, names, cells, f"column {name!r}")


def columns_with_1(path, columns):
    """Return the names of the columns in which each image has a 1. Raises UserError for cells that aren't 0 or 1."""
    wrong = {cell for cells in columns.values() for cell in cells if not is_number(cell) or float(cell) not in (0, 1)}
    refuse(path, sorted(wrong), f"has other cells than 0 and 1 in {listing([*columns], 3)}: *")
    labels, marks = np.array([*columns], object), np.array([*columns.values()], float).T > 0
    return [labels[row].tolist() for row in marks]


def onehot_form(path, names, columns, flags):
    """A column for each class, a 1 in one of them."""
    sets = columns_with_1(path, columns)
    wrong = [name for name, labels in zip(names, sets, strict=True) if len(labels) != 1]
    refuse(path, wrong, "has no single 1 for *: see --label-form binary")
    return class_labels(path, names, [label for [label] in sets], f"{len(columns)} columns, a 1 in one of them")


def binary_form(path, names, columns, flags):
    """A column for each label, 0 or 1."""
    return set_labels(names, columns_with_1(path, columns), [*columns], f"{len(columns)} columns")


def split_cell(cell, separator):
    """Return the labels in a cell: between separators or, in [1, 2] and ['a', 'b'], as Python and JSON write lists."""
    if cell.startswith("[") and cell.endswith("]"):
        return [label.strip(" '\"") for label in cell[1:-1].split(",")]
    return [label.strip() for label in cell.split(separator)]


def list_form(path, names, columns, flags):
    """The labels of an image in one cell, between --separator; a blank cell has none."""
    name, cells = only_column(path, columns, flags)
    refuse("--separator", not flags.separator, "is empty: give what stands between the labels")
    sets = [[*dict.fromkeys(filter(None, split_cell(cell, flags.separator)))] for cell in cells]
    labels = in_order([label for members in sets for label in members])
    refuse(path, len(labels) < 2, f"has fewer than two labels in column {name!r}: see --separator")
    odd = [label for label in labels if {*label} & {*",;|\t"}]
    refuse(path, odd, f"has labels such as * where {flags.separator!r} stands between two: see --separator")
    return set_labels(names, sets, labels, f"column {name!r}", flags.separator)


def number_form(path, names, columns, flags):
    """A number in each column; a blank cell is a missing one."""
    bad = [f"{cell!r}" for cells in columns.values() for cell in cells if not (is_blank(cell) or is_number(cell))]
    refuse(path, bad[:5], f"has cells in {listing([*columns])} that are no numbers: *")
    table = np.array([[np.nan if is_blank(cell) else float(cell) for cell in cells] for cells in columns.values()]).T
    flat = [k for k, numbers in zip(columns, table.T, strict=True) if len({*numbers[np.isfinite(numbers)]}) < 2]
    refuse(path, flat, "has no two different numbers in column *: there is nothing to learn")
    cells = [" ".join(f"{value:.6g}" for value in row) for row in table]
    targets = table.astype(np.float32)
    task = Numbers([*columns], []).fitted(targets)
    count = "a number" if len(columns) == 1 else f"{len(columns)} numbers"
    return TrainingLabels(names, task, targets, cells, f"{count} in {listing([*columns], 3)}")


LABEL_FORMS = {
    "class": class_form,
    "onehot": onehot_form,
    "binary": binary_form,
    "list": list_form,
    "number": number_form,
}
FORMS_OF_TASK = {  # one label column; several of zeros and ones, with a single 1 in each row; other zeros and ones
    "classes": ("class", "onehot", "binary"),
    "labels": ("list", "binary", "binary"),
    "numbers": ("number", "number", "number"),
}


def pick_form(columns, metric):
    """Return the key of LABEL_FORMS that the cells of the label columns and the metric imply."""
    one, single, several = FORMS_OF_TASK["classes" if metric == "auto" else METRICS[metric].task]
    if len(columns) == 1:
        return one
    cells = [cell for cells in columns.values() for cell in cells]
    if not is_number(*cells) or not {*map(float, cells)} <= {0, 1}:
        return "number"
    return single if (np.array([*columns.values()], float).sum(axis=0) == 1).all() else several


def label_columns(table, images, header, given):
    """Return the columns that hold the labels: those given, else `label`, category_id, those that the sample's header
    names, or the only one beside the column `images`. header: the sample's first row."""
    if given:
        return [column(table, name, "--label-column") for name in given]
    usual = [name for name in ("label", "category_id") if name in table.columns][:1]
    named = [name.strip() for name in header or [] if name.strip() in table.columns and name.strip() != images]
    if len(named) > 1 and named[0] == header[0].strip() and len({*table.columns[named[0]]}) == len(table):
        named = named[1:]  # the first holds ids: another column names the images
    others = [name for name in table.columns if name != images]
    chosen = usual or named or (others if len(others) == 1 else [])
    return chosen or [column(table, "label", "--label-column")]


def pivot(table, images, targets, given):
    """Turn a long table, a row for each image and target, into a wide one. → (Table with a column for each target, the
    targets' names).

    images: the column of image names; targets: the column of the targets' names, or END where they follow the last _ of
    the image's name; given: --label-column, the column of the values."""
    values = column(table, given[0] if given and len(given) == 1 else "label", "--label-column")
    names = table.columns[images]
    if targets == "END":
        names, kinds = zip(*(name.rpartition("_")[::2] for name in names), strict=True)
    else:
        kinds = table.columns[column(table, targets, "--target-column")]
    wide, different = {}, [*dict.fromkeys(kinds)]
    for name, kind, value in zip(names, kinds, table.columns[values], strict=True):
        if wide.setdefault(name, {}).setdefault(kind, value) != value:
            raise UserError(f"{table.path} has two values of {kind} for {name}: keep one row of each")
    rows = {kind: [wide[name].get(kind, "") for name in wide] for kind in different}
    return Table(table.path, {images: [*wide]} | rows), different


def labels_from_paths(source, pattern):
    """Return the TrainingLabels in the images' paths: the class is the file's folder, or what `pattern`, a regular
    expression, finds."""
    keys = sorted(source.files)
    if pattern:
        try:
            matches = {key: match for key in keys if (match := re.search(pattern, key))}
        except re.error as error:
            raise UserError(f"--label-pattern {pattern!r} is no regular expression ({error})") from None
        refuse(source.path, not matches, f"has no image whose path fits --label-pattern {pattern!r}")
        labels = ["_".join(filter(None, match.groups())) or match[0] for match in matches.values()]
        return class_labels(source.path, [*matches], labels, f"{len(matches)} paths that fit the pattern")
    labels = [key.rpartition("/")[0].rpartition("/")[2] for key in keys]
    problem = "images lie in one folder, so no class can be read: name a table with --train-csv, or see --label-pattern"
    refuse(f"{source.path}:", len({*labels}) < 2, problem)
    return class_labels(source.path, keys, labels, "the folders' names")


def read_labels(table, source, header, flags):
    """Return the TrainingLabels. table: the training Table, or None where there is none; source: the training images;
    header: the sample submission's first row. Raises UserError where they can't be read."""
    if table is None:
        return labels_from_paths(source, flags.label_pattern)
    path = table.path
    if flags.target_column:
        images = column(table, flags.image_column or "image_name", "--image-column")
        table, chosen = pivot(table, images, flags.target_column, flags.label_column)
    else:
        images = image_column(table, source, flags.image_column)
        chosen = label_columns(table, images, header, flags.label_column)
    rows = [*zip(*(table.columns[name] for name in (images, *chosen)), strict=True)]
    refuse(path, not all(name for name, *_ in rows), "has rows without an image name: fill them in or remove them")
    if flags.drop_unlabelled:
        rows = [row for row in rows if not all(map(is_blank, row[1:]))]
        refuse(path, not rows, "has no labelled rows")
    different = [*dict.fromkeys(rows)]
    if len(different) < len(rows):
        say(f"{path.name}: {len(rows) - len(different)} rows are repeated, and count once")
    names, *cells = map(list, zip(*different, strict=True))
    check_unique(path, names)
    columns = dict(zip(chosen, cells, strict=True))
    form = pick_form(columns, flags.metric) if flags.label_form == "auto" else flags.label_form
    return replace(LABEL_FORMS[form](path, names, columns, flags), columns=(*columns,))
