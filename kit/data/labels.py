"""Labels of the training images, in the forms in which competitions give them.

A label form is a function (path of the table, names of the images, {column: cells}, Flags) → TrainingLabels, and an
entry in LABEL_FORMS. Without a table, the images' paths name their classes. Flags are those of kit/data/prepared.py.
"""

import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace

from common import UserError, listing, say

import numpy as np

from kit.data.reading import (
    USUAL_LABELS,
    Decision,
    class_values,
    is_unsure,
    pick_image_column,
    pick_label_columns,
    renamed,
    tidied,
)
from kit.data.tables import Table, blanks, check_unique, column, is_number, refuse
from kit.score.metrics import METRICS
from kit.score.tasks import Classes, Labels, Numbers, Task

MARKS = {"true": "1", "false": "0"}  # in lower case
FEW = 20  # different whole numbers, which are classes unless their column says otherwise
CLASS_WORDS = {*"id class category group species type".split()}  # in names of columns of numbers: classes, and …
NUMBER_WORDS = set("age count counts number score weight height length width area price year speed amount".split())


@dataclass
class TrainingLabels:
    """The labels of N training images."""

    names: list[str]  # of the images
    task: Task  # with the names of the K classes, labels or numbers
    targets: np.ndarray  # [N] or [N, K], as the task has them
    cells: list[str]  # the targets as folds.csv and the pictures show them
    summary: str  # a few words on what they are, and where they were read
    columns: tuple[str, ...] = ()  # of the training table that they were read from
    decisions: tuple[Decision, ...] = ()  # how they were read
    image_column: str | None = None  # of the training table

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
    """Classes, one in one column."""
    name, cells = only_column(path, columns, flags)
    several = sum(" " in cell for cell in cells) if name == "category_id" else 0
    if several:
        say(f"{path.name}: {several} images have several categories, of which the first counts (see --label-form list)")
        cells = [cell.partition(" ")[0] for cell in cells]
    return class_labels(path, names, cells, f"column {name!r}")


def columns_with_1(path, columns):
    """Return for each image the columns that hold a 1. Raises UserError for cells that aren't 0 or 1."""
    columns = {name: [MARKS.get(cell.lower(), cell) for cell in cells] for name, cells in columns.items()}
    wrong = {cell for cells in columns.values() for cell in cells if not is_number(cell) or float(cell) not in (0, 1)}
    meaning = " ".join(f"--class-values={cell}=0" for cell in sorted(wrong)[:3])
    where = listing([*columns], 3)
    problem = f"has other cells than 0 and 1 in {where}: *; say what they mean, such as {meaning}"
    refuse(path, [f"{cell!r}" for cell in sorted(wrong)], problem)
    labels, marks = np.array([*columns], object), np.array([*columns.values()], float).T > 0
    return [labels[row].tolist() for row in marks]


def onehot_form(path, names, columns, flags):
    """Classes, a column for each, a 1 in one of them."""
    sets = columns_with_1(path, columns)
    wrong = [name for name, labels in zip(names, sets, strict=True) if len(labels) != 1]
    refuse(path, wrong, "has no single 1 for *: see --label-form binary")
    empty = [name for name in columns if [name] not in sets]
    others = " ".join(shlex.quote(name) for name in columns if name not in empty)
    refuse(path, empty, f"has no 1 in *: give --label-column {others}, and fill the rest of the submission by hand")
    return class_labels(path, names, [label for [label] in sets], f"{len(columns)} columns, a 1 in one of them")


def binary_form(path, names, columns, flags):
    """Sets of labels, a column for each, 0 or 1."""
    return set_labels(names, columns_with_1(path, columns), [*columns], f"{len(columns)} columns")


def split_cell(cell, separator):
    """Return the labels in a cell: between separators or, in [1, 2] and ['a', 'b'], as Python and JSON write lists."""
    if cell.startswith("[") and cell.endswith("]"):
        return [label.strip(" '\"") for label in cell[1:-1].split(",")]
    return [label.strip() for label in cell.split(separator)]


def list_form(path, names, columns, flags):
    """Sets of labels, each in one cell between --separator; a blank cell has none."""
    name, cells = only_column(path, columns, flags)
    refuse("--separator", not flags.separator, "is empty: give what stands between the labels")
    values = class_values(flags)
    parts = [[values.get(label, label) for label in split_cell(cell, flags.separator)] for cell in cells]
    sets = [[*dict.fromkeys(filter(None, labels))] for labels in parts]
    labels = in_order([label for members in sets for label in members])
    refuse(path, len(labels) < 2, f"has fewer than two labels in column {name!r}: see --separator")
    odd = [label for label in labels if {*label} & {*",;|\t"}]
    refuse(path, odd, f"has labels such as * where {flags.separator!r} stands between two: see --separator")
    return set_labels(names, sets, labels, f"column {name!r}", flags.separator)


def number_form(path, names, columns, flags):
    """Numbers, one in each column; a blank cell is a missing one."""
    blank = np.array([blanks(cells) for cells in columns.values()]).T
    cells = np.array([*columns.values()], object).T
    bad = [f"{cell!r}" for cell in cells[~blank] if not is_number(cell)]
    refuse(path, bad[:5], f"has cells in {listing([*columns])} that are no numbers: *")
    table = np.where(blank, "nan", cells).astype(np.float64)
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


def pick_form(path, columns, sample, metric):
    """Return (the key of LABEL_FORMS that the cells of the label columns, the sample and the metric imply, the
    Decision). Raises UserError where classes and numbers are equally likely, or several columns hold classes."""
    task = None if metric == "auto" else METRICS[metric].task
    one, single, several = FORMS_OF_TASK[task or Classes.key]
    if task and (len(columns) == 1 or one == several):
        form, how, why = one, "given", f"--metric {metric}"
    elif len(columns) == 1:
        form, how, why = form_of_column(path, *columns.items(), sample)
    else:
        form, how, why = form_of_columns(path, columns, single, several)
    return form, task_decision(form, how, why)


def task_decision(form, how, why):
    """Return the Decision about the task, in the words of the label form's docstring."""
    words = (LABEL_FORMS[form].__doc__ or form).partition(".")[0]
    return Decision("task", words[0].lower() + words[1:], how, why, "--label-form, --metric")


def form_of_column(path, column_of, sample):
    """Return (form, how sure, evidence) of the only label column, (name, cells), with no metric given."""
    name, cells = column_of
    present = {cell for cell, blank in zip(cells, blanks(cells), strict=True) if not blank}
    refuse(path, not present, f"has no label in column {name!r}: name another with --label-column")
    odd = sorted(cell for cell in present if not is_number(cell))
    mixed = f"has {len(present)} different cells in column {name!r}, all numbers but *: correct these"
    refuse(path, len(present) - len(odd) > max(FEW, 4 * len(odd)) and odd, f"{mixed}, or give --label-form class")
    pairs = f"has cells such as {odd[:1]} in column {name!r}, numbers with a decimal comma or pairs of labels"
    is_pair = all(re.fullmatch(r"\d+,\d+", cell) for cell in present)
    refuse(path, is_pair, f"{pairs}: write points, or see --label-form list")
    if odd:
        return form_of_words(path, name, cells, sample)
    values, asked = {*map(float, present)}, [cells for cells in sample.columns if is_number(*cells)]
    if len(values) == 2:
        return "class", "certain", f"two values, {listing(in_order(present))}"
    decimals = [cell for cell in sorted(present, key=float) if float(cell) % 1]
    if decimals:
        return "number", "certain", f"decimals such as {decimals[0]}"
    average = [cell for cells in asked for cell in cells if len(sample.columns) == 1 and float(cell) % 1]
    if average and float(average[0]) > 1:
        return "number", "likely", f"the sample's cells are decimals, such as {average[0]}"
    words = {*map(str.lower, re.findall("[A-Z]?[a-z]+|[A-Z]+", name))}
    is_count = words & NUMBER_WORDS and not words & CLASS_WORDS
    named = len({*sample.names} & {*present}) > 1
    whole = f"{len(values)} whole numbers from {min(values):.0f} to {max(values):.0f}"
    if named or (not is_count and (is_code(values) or words & CLASS_WORDS)):
        return "class", "certain" if named else "likely", f"{whole}" + ", as the sample's columns" * named
    both = "--metric accuracy (or another one of classes) or --metric rmse (or another one of numbers)"
    raise UserError(f"{path} has {whole} in column {name!r}, which may be classes or numbers: give {both}")


def form_of_words(path, name, cells, sample):
    """Return (form, how sure, evidence) of a label column whose cells aren't numbers: classes, or sets of labels."""
    if name != "category_id":
        several = [cell for cell in cells if re.search(r"\S[ ,;|]+\S", cell)]
        parts = {part for cell in several for part in re.split("[ ,;|]+", cell.strip("[]"))}
        if 10 * len(several) > len(cells) and all(cell.startswith("[") for cell in several):
            return "list", "certain", f"lists such as {several[0]}"
        if 10 * len(several) > len(cells) and is_number(*parts):
            return "list", "certain", f"several numbers such as {several[0]}"
        marks = [cell for cell in {*several} if re.search(r"[|;]|,\S", cell)]
        counts = Counter(part for cell in marks for part in {*re.split("[ ,;|]+", cell)})
        shared = len(marks) > 1 and 2 * sum(count > 1 for count in counts.values()) > len(counts)
        asked = parts & sample.words - {*cells}
        sets = 10 * len(several) > len(cells) and (parts <= {*cells} or shared or asked)
        both = f"has cells such as {several[:1]} in column {name!r}, which may be one class or several labels"
        refuse(path, bool(sets), f"{both}: give --label-form class, or --label-form list (see --separator)")
    return "class", "certain", "its cells aren't all numbers"


def is_code(values):
    """Return whether whole numbers, a set, look like numbers of classes: few, or all from 0 or 1 on."""
    return len(values) <= FEW or values in ({*range(len(values))}, {*range(1, len(values) + 1)})


def form_of_columns(path, columns, single, several):
    """Return (form, how sure, evidence) of several label columns: `single` where each row has one 1, else `several`."""
    cells = {MARKS.get(cell.lower(), cell) for cells in columns.values() for cell in cells}
    numbers = {float(cell) for cell in cells if is_number(cell)}
    if not all(is_number(cell) or not cell or is_unsure(cell) or cell == "none" for cell in cells):
        runs = ", ".join(f"--label-column {name} --output output/{name}" for name in [*columns][:2])
        raise UserError(f"{path} has several targets, {listing(columns)}: run all scripts once for each ({runs}), then "
                        "put the columns of their submissions together")  # fmt: skip
    if numbers <= {-1, 0, 1}:
        marks = [[MARKS.get(cell.lower(), cell) for cell in cells] for cells in columns.values()]
        ones = {sum(is_number(cell) and float(cell) == 1 for cell in row) for row in zip(*marks, strict=True)}
        is_single = ones == {1} and numbers == {0, 1}
        return single if is_single else several, "certain", "zeros and ones" + ", a single 1 in each row" * is_single
    if any(number % 1 for number in numbers):
        return "number", "certain", "decimals"
    if not any(is_code({float(cell) for cell in cells if is_number(cell)}) for cells in columns.values()):
        return "number", "likely", "whole numbers, too many and too uneven for classes"
    runs = f"--label-column {next(iter(columns))} and so on, a run of all scripts for each"
    raise UserError(f"{path} has whole numbers in {listing(columns)}, which may be classes or numbers: give {runs}, or "
                    "--label-form number")  # fmt: skip


def pivot(table, images, targets, given):
    """Turn a long table, a row for each image and target, into a wide one. → (Table with a column for each target, the
    targets' names).

    images: the column of image names; targets: the column of the targets' names, or END where they follow the last _ of
    the image's name; given: --label-column, the column of the values."""
    values = column(table, given[0] if given and len(given) == 1 else "label", "--label-column")
    names = table.columns[images]
    if targets == "END":
        whole = [name for name in names if "_" not in name]
        refuse(table.path, whole, "has names without a _ before the target: *: see --target-column")
        names, kinds = zip(*(name.rpartition("_")[::2] for name in names), strict=True)
    else:
        kinds = table.columns[column(table, targets, "--target-column")]
    wide, different = {}, [*dict.fromkeys(kinds)]
    for name, kind, value in zip(names, kinds, table.columns[values], strict=True):
        if wide.setdefault(name, {}).setdefault(kind, value) != value:
            raise UserError(f"{table.path} has two values of {kind} for {name}: keep one row of each")
    rows = {kind: [wide[name].get(kind, "") for name in wide] for kind in different}
    return Table(table.path, {images: [*wide]} | rows), different


def labels_from_paths(source, sample, flags):
    """Return the TrainingLabels in the images' paths: the class is the file's folder, or what --label-pattern finds."""
    keys, pattern = sorted(source.files), flags.label_pattern
    if pattern:
        try:
            matches = {key: match for key in keys if (match := re.search(pattern, key))}
        except re.error as error:
            raise UserError(f"--label-pattern {pattern!r} is no regular expression ({error})") from None
        refuse(source.path, not matches, f"has no image whose path fits --label-pattern {pattern!r}")
        cells = ["_".join(filter(None, match.groups())) or match[0] for match in matches.values()]
        keys, where = [*matches], f"{len(matches)} paths that fit the pattern"
    else:
        cells, where = [key.rpartition("/")[0].rpartition("/")[2] for key in keys], "the folders' names"
    problem = "images are in one folder, so no class can be read: name a table with --train-csv, or see --label-pattern"
    refuse(f"{source.path}:", not pattern and len({*cells}) < 2, problem)
    cells = tidied(source.path, keys, renamed(source.path, {"": cells}, flags)[""], sample, flags)
    how = ("given", "--label-pattern") if pattern else ("certain", "there is no training table")
    decision = Decision("labels", where, *how, "--train-csv, --label-pattern")
    return replace(class_labels(source.path, keys, cells, where), decisions=(decision,))


def labelled_rows(path, rows, sample, flags):
    """Return the rows, tuples (image, cell, …), of --drop-unlabelled: those that have a label."""
    known = {*sample.words, *class_values(flags).values()}
    columns = [*zip(*rows, strict=True)][1:]
    unsure = [[is_unsure(cell) and cell not in known for cell in cells] for cells in columns]
    blank = np.array([*map(blanks, columns)]) | np.array(unsure)
    labelled = [row for row, none in zip(rows, blank.all(axis=0), strict=True) if not none]
    refuse(path, not labelled, "has no labelled rows")
    return labelled


def read_labels(table, source, sample, flags):
    """Return the TrainingLabels. table: the training Table, or None where there is none; source: the training images;
    sample: the sample submission's cells. Raises UserError where they can't be read, or in two ways."""
    if table is None:
        return labels_from_paths(source, sample, flags)
    path = table.path
    if flags.target_column:
        images = column(table, flags.image_column or "image_name", "--image-column")
        table, chosen = pivot(table, images, flags.target_column, flags.label_column)
        decisions = [Decision("images", f"column {images!r}", "given", "a row per image and target", "--image-column")]
    else:
        besides = [*(flags.label_column or sample.names), *USUAL_LABELS]
        images, *decisions = pick_image_column(table, source, flags.image_column, sample.id_name, besides)
        chosen, decision = pick_label_columns(table, images, sample, flags.label_column)
        decisions.append(decision)
    rows = [*zip(*(table.columns[name] for name in (images, *chosen)), strict=True)]
    refuse(
        path,
        not all(name for name, *_ in rows),
        "has rows without an image name (of tables with other headers?): fill them in or remove them",
    )
    rows = labelled_rows(path, rows, sample, flags) if flags.drop_unlabelled else rows
    different = [*dict.fromkeys(rows)]
    if len(different) < len(rows):
        say(f"{path.name}: {len(rows) - len(different)} rows are repeated, and count once")
    names, *cells = map(list, zip(*different, strict=True))
    check_unique(path, names)
    columns = renamed(path, dict(zip(chosen, cells, strict=True)), flags)
    if flags.label_form == "auto":
        form, decision = pick_form(path, columns, sample, flags.metric)
    else:
        form = flags.label_form
        decision = task_decision(form, "given", f"--label-form {form}")
    if form == "class":
        columns = {name: tidied(path, names, cells, sample, flags) for name, cells in columns.items()}
    labels = LABEL_FORMS[form](path, names, columns, flags)
    return replace(labels, columns=(*columns,), decisions=(*decisions, decision), image_column=images)
