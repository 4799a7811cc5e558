"""The sample submission: its rows, the test images behind them, and the form of its cells."""

import re
import shlex
from dataclasses import replace
from typing import NamedTuple

from common import UserError, listing, say

import numpy as np
import pandas as pd

from kit.data import tables
from kit.data.decode import IMAGE_ENDINGS
from kit.data.image_source import ROW
from kit.data.labels import split_cell
from kit.data.reading import Decision, SampleCells, fit_of, in_words, pick_id_column, pick_image_column
from kit.data.tables import is_number, refuse
from kit.score.metrics import METRICS, TWO
from kit.score.tasks import Task
from kit.submit.submission import RANKED, SUBMISSIONS


class Sample(NamedTuple):
    """What a sample submission asks for. Its ids are numbered from 0."""

    form: (
        dict  # prepared.json's `submission`: value, columns, header, id_column, values, the Dialect, and more of labels
    )
    task: Task  # with the classes in their final order
    images: list[str]  # of the test set, each once
    submission_ids: np.ndarray  # int [images]: the id whose prediction an image counts for
    layout: pd.DataFrame  # a row for each row: submission_id, target (the class asked for; -1: all), cells c0, c1, …
    decisions: tuple[Decision, ...] = ()  # how it was read

    def part(self, count: int) -> "Sample":
        """Return the sample's first `count` ids."""
        kept = self.submission_ids < count
        images = [image for image, keep in zip(self.images, kept, strict=True) if keep]
        layout = self.layout[self.layout.submission_id < count]
        return self._replace(images=images, submission_ids=self.submission_ids[kept], layout=layout)


def read_sample_cells(path, source, tests, flags) -> SampleCells:
    """Return the cells of the sample submission at `path`; with --submit-columns and a header, of one made of the ids
    in that table. source: the test images; tests: the Table of test images, or None."""
    options = flags.encoding, lambda word: source.find(word) is not None, "," in flags.separator
    rows, dialect = tables.read_rows(path, tables.NO_SAMPLE, *options)
    column = find_id_column(rows, source, tests)
    names_images = any(source.find(cell) is not None or cell.lower().endswith(IMAGE_ENDINGS) for cell in rows[0])
    blank = [""] * len(flags.submit_columns or ())
    if blank and names_images and len(rows[0]) == 1:
        rows, column = [[*row, *blank] for row in rows], 0
    elif blank and not names_images:
        rows = [[rows[0][column or 0], *flags.submit_columns], *([row[column or 0], *blank] for row in rows[1:])]
        column = 0
    return SampleCells(path, rows, dialect, column)


def read_sample(sample, source, task, tests, flags, label_columns=(), form=None) -> Sample:
    """Return what the sample submission asks for. Raises UserError where it can't be filled, or in two ways.

    sample: its SampleCells; source: the test images; tests: the Table of test images, or None; flags: Flags;
    label_columns: of the training table. form: what an earlier sample asked for, as this one must; the task's classes
    then keep their order."""
    path, rows, dialect, id_column = sample.path, sample.rows, sample.dialect, sample.id_column
    headed = is_header(rows, source, task.names) if flags.submit_header == "auto" else flags.submit_header == "yes"
    header, rows = rows[0] if headed else None, rows[headed:]
    refuse(path, not rows, "names no test image: download it again, or see --submit-header")
    ids = None if id_column is None else [tables.clean(row[id_column]) for row in rows]
    id_name = sample.id_name if headed else None
    images, submission_ids, row_ids, targets, ids_are = find_test_images(path, ids, id_name, source, tests, flags, task)
    columns = [i for i in range(len(rows[0])) if i != id_column]
    # Without a header, a blank column is a comma at the lines' ends
    columns = [i for i in columns if header or any(row[i].strip() for row in rows)] or columns
    values, decisions = find_value_columns(task, header, columns, label_columns, form), []
    if form is None:
        names = [tables.clean(header[i]) for i in values] if header else flags.submit_columns
        cells = [[tables.clean(row[i]) for i in values] for row in rows]
        form, decisions = choose_form(path, task, names, cells, targets[0] is not None, flags, label_columns)
        task, form, decision = order_classes(path, task, names, form, flags)
        decisions = [Decision("ids", f"{len({*row_ids})} in {len(rows)} rows", *ids_are), *decisions, *decision]
        form = form | dict(dialect._asdict())
    form = form | dict(header=header, id_column=id_column, separator=dialect.separator, values=values)
    number_of = {None: -1} | {name: k for k, name in enumerate(task.names)}
    layout = pd.DataFrame(rows).add_prefix("c")
    layout.insert(0, "submission_id", row_ids)
    layout.insert(1, "target", [number_of[target] for target in targets])
    return Sample(form, task, images, submission_ids, layout, tuple(decisions))


def class_in(name, classes):
    """Return the class that a column's name is, begins or ends with (unstable_prob for unstable), or None."""
    if name in classes:
        return name
    bare = name.rstrip(" )]}")
    if is_number(*classes):
        return next((c for c in classes if re.fullmatch(rf".*[^0-9.]{re.escape(c)}", bare)), None)
    fits = [c for c in classes if re.fullmatch(rf"{re.escape(c)}[\W_].*|.*[\W_]{re.escape(c)}", bare, re.IGNORECASE)]
    longest = max(fits, key=len, default="")
    others = re.split(r"[\W_]+", bare.lower().replace(longest.lower(), ""))
    is_opposite = {"no", "not", "non", "without", "free"} & {*others}
    return None if is_opposite or any(c not in longest for c in fits) else longest or None


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
    class_of = {i: class_in(tables.clean(header[i]), task.names) for i in columns}
    named = [i for i, name in class_of.items() if name is not None]
    all_there = sorted(class_of[i] for i in named) == sorted(task.names)
    one_of_two = task.is_binary and len(named) == 1 and not is_number(*task.names)
    as_labels = [i for i in columns if tables.clean(header[i]) in label_columns]
    values = named if all_there or one_of_two else as_labels or columns
    if len(values) < len(columns):
        others = [tables.clean(header[i]) for i in columns if i not in values]
        say(f"these columns of the sample stay as they are: {listing(others)}")
    return values


def find_id_column(rows, source, tests):
    """Return the number of the sample's column of ids, by which the test images are found; None where there is none."""
    direct = pick_id_column(rows, source)
    if direct is not None:
        return direct
    for i, cells in enumerate(zip(*rows[: tables.CHECKED_ROWS], strict=True)):
        if key_columns(tests, [*map(tables.clean, cells)]):
            return i
    alone = tests and len(rows) in (len(tests), len(tests) + 1)
    return None if alone and (len(rows[0]) == 1 or is_number(*rows[0])) else 0


def key_columns(tests, ids, besides=None):
    """Return the columns of the Table of test images that hold at least half of the ids: those that hold most of them
    first, of equal ones those that hold the fewest others."""
    columns = {name: {*cells} for name, cells in tests.columns.items() if name != besides} if tests else {}
    hits = {name: len({*ids} & cells) for name, cells in columns.items() if len(cells) > 1}
    fits = [name for name, hit in hits.items() if 2 * hit >= len({*ids})]
    return sorted(fits, key=lambda name: (-hits[name], len(columns[name])))


def find_test_images(path, ids, id_name, source, tests, flags, task):
    """Find the images that the sample's rows ask for. → (test images, int [images]: the number of each image's id,
    int [rows]: the same for each row, [rows]: the class that a row asks for, None where it asks for all; (how sure,
    evidence, flag) of a Decision).

    ids: of the rows; None: the rows are those of `tests`, the Table of test images; id_name: what the header calls
    them. An id stands for an image or, where that table says so, for several; an id of several rows is predicted
    once."""
    column = key = None
    if tests:
        given = flags.image_column if flags.image_column in tests.columns else None
        named = id_name if not is_number(*tests.columns.get(id_name, ["0"])) else None  # numbers may be patients'
        column = ROW if source.table else pick_image_column(tests, source, given, named)[0]
    if ids is None:
        ids, why = tests.columns[column], ("likely", f"the rows are those of {tests.path}", "--test-csv")
    else:
        key, why = pick_key(path, ids, id_name, source, tests, column, flags)
    targets = [None] * len(ids)
    if key and flags.target_column in tests.columns:
        row_of = {cell: i for i, cell in enumerate(tests.columns[key])}
        lost = [cell for cell in ids if cell not in row_of]
        refuse(path, lost, f"names * and {tests.path} doesn't: name the right --test-csv")
        names = column, flags.target_column
        ids, targets = ([tests.columns[name][row_of[cell]] for cell in ids] for name in names)
        refuse(path, sorted({*targets} - {*task.names}), "asks for *, which the training table lacks")
    elif not (key or is_image(ids, source)) and (split := split_targets(ids, source, task.names)):
        (ids, targets), why = split, ("certain", "each row asks for one class of an image", "--target-column")
    number_of = id_of_image = {cell: number for number, cell in enumerate(dict.fromkeys(ids))}
    if key and targets[0] is None:
        rows = zip(tests.columns[column], tests.columns[key], strict=True)
        pairs = dict.fromkeys((image, cell) for image, cell in rows if cell in number_of)
        shared = tables.repeated([image for image, _ in pairs])[:1]
        refuse(path, shared, "asks for two ids that share the image *: one prediction can't serve both")
        lacking = number_of.keys() - {*tests.columns[key]}  # they may be names of images
        pairs = [*pairs, *((cell, cell) for cell in number_of if cell in lacking)]
        id_of_image = {image: number_of[cell] for image, cell in pairs}
    if len(number_of) < len(ids) and targets[0] is None:
        why = (why[0], f"{why[1]}; rows that repeat an id: {len(ids) - len(number_of)}, predicted once", why[2])
    return [*id_of_image], np.array([*id_of_image.values()]), np.array([number_of[cell] for cell in ids]), targets, why


def is_image(ids, source):
    """Return whether any of the first ids is an image's name."""
    return any(source.find(cell) is not None for cell in ids[: tables.CHECKED_ROWS])


def pick_key(path, ids, id_name, source, tests, column, flags):
    """Return (the column of the Table of test images that holds the sample's ids, or None where they are names of
    images; (how sure, evidence, flag) of a Decision). Raises UserError where both fit and mean other images.

    column: of that table, which names the images; id_name: what the sample's header calls the ids, or None."""
    checked = ids[: tables.CHECKED_ROWS]
    found = sum(source.find(cell) is not None for cell in checked)
    direct = "certain", in_words(fit_of(ids, source), source), "--test-csv"
    fits = key_columns(tests, ids, besides=column if source.table else None)
    same_name = [name for name in fits if id_name is not None and name.lower() == id_name.lower()]
    key = next(iter([*same_name, *fits]), column)
    if key == column:
        return None, direct
    image_of = dict(zip(tests.columns[key], tests.columns[column], strict=True))
    same = all(source.find(cell) == source.find(image_of.get(cell, cell)) for cell in checked)
    unclear = column in fits if flags.test_csv else found
    both = f"has ids that may be images, or those in column {key!r} of {tests.path}, which has other images for them"
    remedy = f"give --test-csv {tests.path.name} and a sample whose header names that column, or move that table away"
    refuse(path, unclear and not same and not same_name and not source.table, f"{both}: {remedy}")
    known = {*tests.columns[key]}
    rivals = [name for name in fits if {*tests.columns[name]} == known and tests.columns[name] != tests.columns[key]]
    both = f"has ids that may be those in column {key!r} of {tests.path}, or in * as well"
    refuse(path, [] if same_name else rivals, f"{both}: give a sample whose header names the column")
    return key, ("given" if flags.test_csv else "likely", f"column {key!r} of {tests.path}", "--test-csv")


def split_targets(ids, source, classes):
    """Split ids made of an image's and a class' name. → (the images' names, the classes'), or None for other ids."""
    pattern = re.compile(rf"(..+?)({'|'.join(map(re.escape, classes))})", re.DOTALL)
    matches = [pattern.fullmatch(cell) for cell in ids]
    images = [match[1].rstrip("_-") for match in matches if match]
    if None in matches or any(source.find(image) is None for image in images[: tables.CHECKED_ROWS]):
        return None
    return images, [match[2] for match in matches]


def choose_form(path, task, names, values, long, flags, label_columns):
    """Return (what prepared.json says of the value columns, [Decision, …]). names: of these columns, or None; values:
    the sample's value cells; long: whether a row asks for one class; label_columns: of the training table."""
    classes, width = task.names, len(values[0])
    refuse(path, not width, "has 0 value columns: there must be one at least, or see --submit-columns")
    value, how, why = flags.submit_value, "given", "--submit-value"
    if value == "auto":
        value, how, why = pick_value(path, task, names, values, long, flags)
    decisions = [Decision("submission", SUBMISSIONS[value].noun, how, why, "--submit-value")]
    unfit = f"can't be filled with --submit-value {value}: the task is {task.key}"
    refuse(path, task.key not in SUBMISSIONS[value].tasks, unfit)
    form = dict(value=value, columns=None)
    if value == "top":
        refuse(path, width > len(classes), f"has {width} value columns for {len(classes)} classes: see --label-column")
        style = list_style(values[0][0], classes, " ")
        ranks = int(flags.metric[3:]) if flags.metric in RANKED and width == 1 else 0
        return form | style | dict(top=max(width, len(split_cell(values[0][0], style["between"])), ranks)), decisions
    if value in ("label", "scored", "set"):
        refuse(path, width > 1 or long, f"has {width} value columns: --submit-value {value} fills one")
        return form | (list_style(values[0][0], classes, flags.separator) if value == "set" else {}), decisions
    if long:
        return form | dict(columns=classes if value == "probability" else None), decisions
    if width > 1 or not (value == "number" or task.rows_sum_to_1):
        columns, *evidence = columns_of(path, classes, names, width, value, label_columns)
        decisions.append(Decision("columns", listing(columns, 5), *evidence, "--submit-columns"))
        return form | dict(columns=columns), decisions
    few = f"has one value column for {len(classes)} numbers, {listing(classes)}: see --label-column"
    refuse(path, value == "number" and len(classes) > 1, few)
    lacks = value != "number" and not task.is_binary and not flags.positive
    asks = f"asks for one probability of {len(classes)} classes (*): name those that it is of with --positive"
    refuse(path, lacks and classes, f"{asks}, or give --submit-value label, or --metric rmse if they are numbers")
    return form, decisions


def columns_of(path, classes, names, width, value, label_columns):
    """Return (the class, label or number of each value column, how sure, evidence): by its name, or what that begins or
    ends with. Without names they are in the order of the training table's columns, or of numbers; other numbers in the
    training table's order, and then a line says so."""
    problem = f"has {width} value columns ({listing(names or [])}), and the classes are *"
    problem += ": there must be one column, or one for each class"
    refuse(path, width != len(classes) and classes, problem)
    if names is None:
        by_table = sorted(label_columns) == sorted(classes)
        unclear = not by_table and not is_number(*classes)
        problem = "has no header to say which column is which of *: give them in order with --submit-columns"
        refuse(path, unclear and classes, problem)
        why = "in the training table's order" if by_table else "by value"
        return [*(label_columns if by_table else classes)], "likely", f"no header; {why}"
    columns = [class_in(name, classes) for name in names]
    if {*columns} == {*classes}:
        return columns, "certain", "the header names them"
    refuse(path, value != "number" and classes, problem)
    fitting = [[c for c in classes if c.startswith(name) or name.startswith(c)] for name in names]
    single = [found[0] for found in fitting if len(found) == 1]
    columns = single if len({*single}) == len(classes) else classes
    pairs = [f"{name} ← {c}" for name, c in zip(names, columns, strict=True)]
    how = "" if columns is single else ", so they are taken in order"
    say(f"the sample's columns have other names{how}: {listing(pairs)}")
    return columns, "likely", "the header begins like them" if columns is single else "in order"


def pick_value(path, task, names, values, long, flags):
    """Return (the key of SUBMISSIONS that the sample's value cells ask for, how sure, evidence). Raises UserError where
    the cells are numbers and the classes words."""
    classes, metric = task.names, flags.metric
    first = max(values[: tables.CHECKED_ROWS], key=lambda row: len(row[0].split()))  # a list, if there is one
    if long or len(first) > 1:
        ranked = task.can_rank and (metric in RANKED or not is_number(*first))
        named = names is not None and {*names} <= {*classes}
        is_top = ranked and not long and {*first} <= {*classes} and not named
        why = "classes in each row" if is_top else "a row for each class" if long else "several columns"
        return "top" if is_top else task.column_value, "certain", why
    if task.single_value:
        return task.single_value, "certain", f"the task is {task.key}"
    parts = split_cell(first[0], list_style(first[0], classes, " ")["between"])
    if metric in RANKED or (len(parts) > 1 and first[0] not in classes and {*parts} <= {*classes}):
        return "top", "certain", f"--metric {metric}" if metric in RANKED else f"cells such as {first[0]!r}"
    if is_number(first[0].rpartition(" ")[2]) and first[0].rpartition(" ")[0] in classes:
        return "scored", "certain", f"cells such as {first[0]!r}"
    return pick_single_value(path, task, [row[0] for row in values if not tables.is_blank(row[0])], flags)


def pick_single_value(path, task, cells, flags):
    """Return (the key of SUBMISSIONS, how sure, evidence) for a single value column, by its cells that aren't blank."""
    classes, of_class = task.names, flags.metric != "auto" and METRICS[flags.metric].scores_class
    pairs = cells and all(re.fullmatch(r"\d+,\d+", cell) for cell in cells)
    refuse(path, pairs and cells[:1], "has cells such as *, with a decimal comma between commas: write points")
    decimals = [cell for cell in cells if is_number(cell) and float(cell) % 1]
    if decimals:
        return "probability", "certain", f"cells such as {decimals[0]}"
    if cells and not is_number(*cells):
        known = [cell for cell in cells if cell in classes]
        says = f"cells such as {known[0]!r}" if known else f"none of its cells is a class ({cells[0]!r})"
        return "label", "certain" if known else "likely", says
    are_words = not is_number(*classes) and not {*cells} <= {*classes}
    if cells and are_words and not flags.positive and not (task.is_binary and flags.metric != "auto"):
        different = sorted({*cells}, key=float)
        codes = different if len(different) == len(classes) else range(len(classes))
        pairs = " ".join(shlex.quote(f"{name}={code}") for name, code in zip(classes[:10], codes, strict=False))
        asks = f"has numbers ({listing(different, 5)}) where the classes are {listing(classes)}: give --class-values"
        binary = ", or --positive for a probability" * task.is_binary
        raise UserError(f"{path} {asks}, such as {pairs}{binary}")
    beyond = [cell for cell in cells if is_number(cell) and float(cell) not in (0, 1)]
    if task.is_binary and beyond and {*cells} <= {*classes}:
        return "label", "certain", f"cells such as {beyond[0]!r}, a class"
    if task.is_binary and not of_class:
        shown = f"cells such as {cells[0]}, which may be labels too" if cells else "its cells are blank"
        return "probability", "likely", f"{shown}: --submit-value label writes these"
    return "label", "given" if of_class else "certain", f"--metric {flags.metric}" if of_class else "whole numbers"


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
    several whose sum it wants; [Decision, …]). names: of the value columns, or None."""
    classes, given = task.names, flags.positive
    wants_one = form["value"] == "probability" and not form["columns"]
    order = "by value" if is_number(*classes) else "in alphabetical order"
    decision = Decision("classes", f"{len(classes)}: {listing(classes, 5)}", "certain", order, "--class-values")
    refuse("--positive", given and not task.rows_sum_to_1, f"names a class, and the task is {task.key}: leave it out")
    if given and len(classes) > 2 and wants_one and {*given} < {*classes}:
        return task, form | dict(summed=given), [decision]
    if given and (len(classes) > 2 or len(given) > 1 or given[0] not in classes):
        several = ", or several of more, with --submit-value probability" * (len(classes) > 2)
        raise UserError(f"--positive {' '.join(given)}: give one of two classes{several}; these are {listing(classes)}")
    if not task.is_binary:
        return task, form, [decision] * task.right_or_wrong
    named = [class_in(name, classes) for name in names or [] if wants_one and class_in(name, classes) is not None]
    truth = [name for name in classes if name.lower() == "true" and {c.lower() for c in classes} == {"true", "false"}]
    if given or named:
        positive, how, why = (given or named)[0], *(("given", "--positive") if given else ("certain", "the header"))
    elif truth:
        positive, how, why = truth[0], "likely", "the other is false"
    else:
        positive, how, why = None, "likely", "the larger number" if is_number(*classes) else "the last one"
    of_second = flags.metric != "auto" and METRICS[flags.metric].fits is TWO  # it scores the second of two classes
    if not positive and (wants_one or of_second) and not is_number(*classes):
        wants = f"--metric {flags.metric} scores" if of_second else f"{path} wants the probability of"
        refuse(wants, classes, "one class (*): name it with --positive")
    task = replace(task, names=classes if positive != classes[0] else classes[::-1])
    asked = form["value"] == "probability" or of_second
    return task, form, [Decision("positive", repr(task.names[1]), how, why, "--positive") if asked else decision]
