"""What is right for each image? The forms in which competitions hand out their labels.

A form is a function (table's cells: a dict of column name → list of strings, flags) → Labels, and an entry in
LABEL_FORMS. Where there is no table, the images' own paths say their labels: from_paths.
"""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from common import UserError, listing, say
from kit.data.tables import Table, check_unique, column, image_column, is_blank, is_number, refuse
from kit.score.metrics import METRICS


class Labels(NamedTuple):
    """names: of the images; classes: the names of the K classes, labels or numbers; targets: by the task, as in
    kit/score/tasks.py; cells: what stands for the target in folds.csv and in the pictures; said: a few words; columns:
    of the training table that they were read from."""

    names: list
    task: str
    classes: list
    targets: np.ndarray
    cells: list
    said: str
    columns: tuple = ()

    def part(self, rows):
        """→ the Labels of some images."""
        names, cells = ([cells[i] for i in rows] for cells in (self.names, self.cells))
        return self._replace(names=names, cells=cells, targets=self.targets[rows])

    def with_second(self, label):
        """→ the Labels whose second of two classes is `label`."""
        if self.task != "classes" or len(self.classes) != 2 or self.classes[1] == label:
            return self
        return self._replace(classes=self.classes[::-1], targets=1 - self.targets)

    def ranges(self):
        """→ of numbers, what prepared.json says of them: the least and the largest of each."""
        if self.task != "numbers":
            return {}
        bounds = np.nanmin(self.targets, axis=0), np.nanmax(self.targets, axis=0)
        return dict(ranges=np.stack(bounds, axis=1).astype(float).tolist())


def in_order(cells):
    """→ the different cells in order: by value where all are numbers."""
    return sorted(set(cells), key=float if is_number(*set(cells)) else None)


def of_classes(path, names, cells, said):
    """One class for each image → Labels."""
    blank = [name for name, cell in zip(names, cells, strict=True) if is_blank(cell)]
    refuse(path, blank, "has no label for *: label or remove them, or see --drop-unlabelled")
    spellings = {}
    for label in filter(is_number, dict.fromkeys(cells)):  # 1 and 1.0 would be two classes
        first = spellings.setdefault(float(label), label)
        refuse(path, first != label, f"has the labels {first} and {label}, which are one number: spell them alike")
    classes = in_order(cells)
    refuse(path, len(classes) < 2, f"has one class only ({cells[0]}): a classifier needs two")
    number_of = {label: number for number, label in enumerate(classes)}
    targets = np.array([number_of[cell] for cell in cells], np.int64)
    return Labels(names, "classes", classes, targets, cells, f"{len(classes)} classes in {said}")


def of_sets(names, sets, classes, said, mark=" "):
    """A set of labels for each image → Labels."""
    number_of, targets = {label: number for number, label in enumerate(classes)}, np.zeros((len(names), len(classes)))
    for row, labels in zip(targets, sets, strict=True):
        row[[number_of[label] for label in labels]] = 1
    cells, said = (
        [mark.join(labels) for labels in sets],
        f"{len(classes)} labels in {said}, any number of them an image",
    )
    return Labels(names, "labels", classes, targets.astype(np.float32), cells, said)


def one_column(args, path, columns):
    """→ (its name, its cells) of the only label column."""
    refuse(
        path,
        len(columns) > 1 and [*columns],
        f"--label-form {args.label_form} reads one column, and these are *: see --label-column",
    )
    return next(iter(columns.items()))


def class_form(args, path, names, columns):
    """One label in one column."""
    name, cells = one_column(args, path, columns)
    several = sum(" " in cell for cell in cells) if name == "category_id" else 0
    if several:
        say(f"{path.name}: {several} images have several categories, of which the first counts (see --label-form list)")
        cells = [cell.partition(" ")[0] for cell in cells]
    return of_classes(path, names, cells, f"column {name!r}")


def zeros_and_ones(path, columns):
    """→ float [N, K] of the columns' cells. Raises UserError where one is neither 0 nor 1."""
    wrong = {cell for cells in columns.values() for cell in cells if not is_number(cell) or float(cell) not in (0, 1)}
    refuse(path, sorted(wrong), f"has other cells than 0 and 1 in {listing([*columns], 3)}: *")
    return np.array([*columns.values()]).T.astype(float)


def onehot_form(args, path, names, columns):
    """A column for each class, a 1 in one of them."""
    marks = zeros_and_ones(path, columns)
    wrong = [name for name, total in zip(names, marks.sum(axis=1), strict=True) if total != 1]
    refuse(path, wrong, "has no single 1 for *: see --label-form binary")
    labels = [[*columns][number] for number in marks.argmax(axis=1)]
    return of_classes(path, names, labels, f"{len(columns)} columns, a 1 in one of them")


def binary_form(args, path, names, columns):
    """A column for each label, 0 or 1."""
    marks, labels = zeros_and_ones(path, columns), [*columns]
    return of_sets(names, [[labels[k] for k in np.flatnonzero(row)] for row in marks], labels, f"{len(labels)} columns")


def split_cell(cell, mark):
    """→ the labels in a cell: between marks or, of [1, 2] and ['a', 'b'], as Python and JSON write lists."""
    if cell.startswith("[") and cell.endswith("]"):
        return [label.strip(" '\"") for label in cell[1:-1].split(",")]
    return [label.strip() for label in cell.split(mark)]


def list_form(args, path, names, columns):
    """The labels of an image in one cell, between --separator; a blank cell has none."""
    name, cells = one_column(args, path, columns)
    refuse("--separator", not args.separator, "is empty: give what stands between the labels")
    sets = [[*dict.fromkeys(filter(None, split_cell(cell, args.separator)))] for cell in cells]
    classes = in_order([label for labels in sets for label in labels])
    refuse(path, len(classes) < 2, f"has fewer than two labels in column {name!r}: see --separator")
    odd = [label for label in classes if {*label} & {*",;|\t"}]
    refuse(path, odd, f"has labels such as * where {args.separator!r} stands between two: see --separator")
    return of_sets(names, sets, classes, f"column {name!r}", args.separator)


def number_form(args, path, names, columns):
    """A number in each column; a blank cell is a missing one."""
    bad = [f"{cell!r}" for cells in columns.values() for cell in cells if not (is_blank(cell) or is_number(cell))]
    refuse(path, bad[:5], f"has cells in {listing([*columns])} that are no numbers: *")
    table = np.array([[np.nan if is_blank(cell) else float(cell) for cell in cells] for cells in columns.values()]).T
    spans = [np.ptp(numbers[np.isfinite(numbers)]) if np.isfinite(numbers).any() else 0 for numbers in table.T]
    empty = [name for name, span in zip(columns, spans, strict=True) if span == 0]
    refuse(path, empty, "has no two different numbers in column *: there is nothing to learn")
    cells = [" ".join(f"{value:.6g}" for value in row) for row in table]
    what = "a number" if len(columns) == 1 else f"{len(columns)} numbers"
    return Labels(names, "numbers", [*columns], table.astype(np.float32), cells, f"{what} in {listing([*columns], 3)}")


LABEL_FORMS = {
    "class": class_form,
    "onehot": onehot_form,
    "binary": binary_form,
    "list": list_form,
    "number": number_form,
}


def pick_form(args, columns):
    """→ the key of LABEL_FORMS that the columns and the metric ask for."""
    if args.label_form != "auto":
        return args.label_form
    task = METRICS[args.metric].task if args.metric != "auto" else None
    if task == "numbers":
        return "number"
    if len(columns) == 1:
        return "list" if task == "labels" else "class"
    cells = [cell for cells in columns.values() for cell in cells]
    if not is_number(*cells) or not {*map(float, cells)} <= {0, 1}:
        return "number"
    single = (np.array([*columns.values()], float).sum(axis=0) == 1).all() and task != "labels"
    return "onehot" if single else "binary"


def label_columns(args, table, names, header):
    """→ the columns that hold the labels: those given, else `label`, category_id, those that the sample's header names,
    or the only one beside the images' names. header: the sample's first row."""
    if args.label_column:
        return [column(table, name, "--label-column") for name in args.label_column]
    usual = [name for name in ("label", "category_id") if name in table.columns][:1]
    wanted = [name.strip() for name in header or [] if name.strip() in table.columns and name.strip() != names]
    if len(wanted) > 1 and wanted[0] == header[0].strip() and len({*table.columns[wanted[0]]}) == len(table):
        wanted = wanted[1:]  # the ids, where another column names the images
    others = [name for name in table.columns if name != names]
    found = usual or wanted or (others if len(others) == 1 else [])
    return found or [column(table, "label", "--label-column")]


def pivot(args, table, images):
    """A long table, a row for each image and target → a wide one, a column for each target. --target-column names the
    targets, or is `END`: what follows the last _ of the image's name."""
    (values,) = args.label_column if args.label_column and len(args.label_column) == 1 else ["label"]
    values, cells = column(table, values, "--label-column"), table.columns[images]
    if args.target_column == "END":
        cells, targets = zip(*(cell.rpartition("_")[::2] for cell in cells), strict=True)
    else:
        targets = table.columns[column(table, args.target_column, "--target-column")]
    wide, kinds = {}, [*dict.fromkeys(targets)]
    for name, target, value in zip(cells, targets, table.columns[values], strict=True):
        if wide.setdefault(name, {}).setdefault(target, value) != value:
            raise UserError(f"{table.path} has two values of {target} for {name}: keep one row of each")
    rows = {kind: [wide[name].get(kind, "") for name in wide] for kind in kinds}
    return Table(table.path, {images: [*wide]} | rows), kinds


def in_folders(source):
    """Whether the images lie in several folders, whose names may be their labels."""
    return len({key.rpartition("/")[0] for key in source.files}) > 1


def from_paths(args, source):
    """Labels that the images' own paths say: the class is the file's folder, or what --label-pattern finds."""
    keys = sorted(source.files)
    if args.label_pattern:
        try:
            found = [re.search(args.label_pattern, key) for key in keys]
        except re.error as error:
            raise UserError(f"--label-pattern {args.label_pattern!r} is no regular expression ({error})") from None
        keys = [key for key, match in zip(keys, found, strict=True) if match]
        labels = ["_".join(filter(None, match.groups())) or match[0] for match in found if match]
        refuse(source.path, not keys, f"has no image whose path fits --label-pattern {args.label_pattern!r}")
        return of_classes(source.path, keys, labels, f"{len(keys)} paths that fit the pattern")
    labels = [key.rpartition("/")[0].rpartition("/")[2] for key in keys]
    few = Counter(labels).most_common(2)
    if len(few) < 2:
        folders = "images lie in one folder" if few else "no images"
        raise UserError(
            f"{source.path}: {folders}, so no class can be read: name a table with --train-csv, or see --label-pattern"
        )
    return of_classes(source.path, keys, labels, "the folders' names")


def read_labels(args, table, source, header):
    """→ Labels of the training images. table: the training table, None where there is none; source: where the images
    are; header: the sample submission's first row."""
    if table is None:
        return from_paths(args, source)
    path = table.path
    if args.target_column:
        images = column(table, args.image_column or "image_name", "--image-column")
        table, chosen = pivot(args, table, images)
    else:
        images = image_column(table, source, args.image_column)
        chosen = label_columns(args, table, images, header)
    names, columns = table.columns[images], {name: table.columns[name] for name in chosen}
    refuse(path, not all(names), "has rows without an image name: fill them in or remove them")
    if args.drop_unlabelled:
        kept = [i for i, cells in enumerate(zip(*columns.values(), strict=True)) if not all(map(is_blank, cells))]
        refuse(path, not kept, "has no labelled rows")
        names, columns = [names[i] for i in kept], {name: [cells[i] for i in kept] for name, cells in columns.items()}
    rows = [*dict.fromkeys(zip(names, *columns.values(), strict=True))]
    if len(rows) < len(names):
        say(f"{path.name}: {len(names) - len(rows)} rows are repeated, and count once")
    names, *cells = map(list, zip(*rows, strict=True))
    check_unique(path, names)
    columns = dict(zip(columns, cells, strict=True))
    return LABEL_FORMS[pick_form(args, columns)](args, path, names, columns)._replace(columns=(*columns,))
