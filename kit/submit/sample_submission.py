"""What does the sample submission ask for? Its rows, the test images behind them, and the form of its cells."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from common import UserError, listing, say
from kit.data.decode import IMAGE_ENDINGS
from kit.data.labels import split_cell
from kit.data.tables import COUNTED, check_unique, image_column, is_blank, is_number, read_cells, refuse
from kit.score.metrics import METRICS
from kit.submit.submission import RANKED, SUBMISSIONS


class Sample(NamedTuple):
    """A sample submission, understood. header: list or None; form: what prepared.json says of the submission; images:
    of the test set, each once; units int [images]: for which submitted id an image counts; layout: a table with a row
    for each row of the sample: unit, target (the class that the row asks for; -1: all), and the cells c0, c1, …"""

    form: dict
    images: list
    units: np.ndarray
    layout: pd.DataFrame

    def part(self, count):
        """→ the Sample of the first `count` units."""
        kept = self.units < count
        images = [image for image, keep in zip(self.images, kept, strict=True) if keep]
        return self._replace(images=images, units=self.units[kept], layout=self.layout[self.layout.unit < count])


def read_sample(args, path, source, labels, tests, form=None):
    """Reads the sample submission → a Sample. source: the test images; labels: of the training images; tests: the Table
    of test images, or None; form: what an earlier sample wanted, which this one must want too.

    Raises UserError where the sample can't be filled."""
    rows, separator = read_cells(path, "put the competition's sample there, or name it with --sample-submit")
    headed = is_header(rows, source, labels.classes) if args.submit_header == "auto" else args.submit_header == "yes"
    header, rows = rows[0] if headed else None, rows[headed:]
    refuse(path, not rows, "names no test image: download it again, or see --submit-header")
    place = id_place(rows, source, tests)
    ids = [row[place] for row in rows] if place is not None else None
    images, units, unit, target = images_of(args, path, ids, len(rows), source, tests, labels.classes)
    values = value_places(labels, header, [i for i in range(len(rows[0])) if i != place], form)
    cells = pd.DataFrame(rows, columns=[f"c{i}" for i in range(len(rows[0]))])
    layout = pd.concat([pd.DataFrame(dict(unit=unit, target=target)), cells], axis=1)
    if form is None:
        names = [header[i].strip() for i in values] if header else None
        filled = [[row[i].strip() for i in values] for row in rows]
        form = choose_form(args, path, labels, names, filled, max(target) >= 0)
    unusual = dict(place=place, separator=separator, values=values)
    usual = dict(place=0, separator=",", values=[*range(1, len(rows[0]))])
    form = {key: value for key, value in form.items() if key not in usual} | dict(header=header)
    form |= {key: value for key, value in unusual.items() if value != usual[key]}
    return Sample(form, images, units, layout)


def is_header(rows, source, classes):
    """Whether the sample's first row is a header, and no row of a test image, not even of one that is missing."""
    first = [cell.strip() for cell in rows[0]]
    cells = first[1:] or first
    if sorted(cells) == sorted(classes) and len(cells) > 1:  # also where classes and images are called 1, 2, …
        return source.find(rows[0][0]) is None
    if any(source.find(cell) is not None or cell.lower().endswith(IMAGE_ENDINGS) for cell in rows[0]):
        return False
    if {*cells} <= {*classes}:  # classes name columns where the rows below hold other values
        return not all(cell.strip() in classes for row in rows[1:] for cell in row[1:] or row)
    return not all(c in classes or is_blank(c) or is_number(c) for c in cells)


def value_places(labels, header, places, form):
    """→ the numbers of the columns that are to be filled, of all that are no ids: those that the header gives the names
    of classes or of the training table's label columns, else all. A line names the others, which stay as they are."""
    if not header or len(places) < 2:
        return places
    if form:
        return form.get("values", places)
    named = [i for i in places if header[i].strip() in labels.classes]
    all_there = {header[i].strip() for i in named} == {*labels.classes}
    two = labels.task == "classes" and len(labels.classes) == 2
    one_of_two = two and len(named) == 1 and not is_number(*labels.classes)
    own = [i for i in places if header[i].strip() in labels.columns]
    values = named if all_there or one_of_two else own or places
    if len(values) < len(places):
        say(f"of the sample, these stay as they are: {listing(header[i].strip() for i in places if i not in values)}")
    return values


def id_place(rows, source, tests):
    """→ the number of the sample's column of ids, by which the test images are found; None where there is none."""
    some = rows[:COUNTED]
    columns = [[row[i] for row in some] for i in range(len(rows[0]))]
    different = [len({*cells}) == len(cells) for cells in columns]  # or class numbers would be images of a pixel table
    known = [different[i] * sum(source.find(cell) is not None for cell in cells) for i, cells in enumerate(columns)]
    if max(known):
        return known.index(max(known))
    for i, cells in enumerate(columns):
        if id_column(tests, cells):
            return i
    if tests and len(rows) == len(tests) and (len(rows[0]) == 1 or is_number(*some[0])):
        return None
    return 0


def id_column(tests, ids, besides=()):
    """→ the column of the Table of test images that knows most of the ids, and at least half of them; else None."""
    best, found = None, len({*ids}) / 2
    for name, cells in tests.columns.items() if tests else ():
        known = len({*ids} & {*cells})
        if name not in besides and len({*cells}) > 1 and known >= found and (best is None or known > found):
            best, found = name, known
    return best


def images_of(args, path, ids, count, source, tests, classes):
    """Which images does each row of the sample ask for? → (test images, int [images]: the unit of each; of each row its
    unit and its target, -1 where the row asks for all). A unit is what is predicted as one: an image or, where the
    table of test images says so, several."""
    given = args.image_column if tests and args.image_column in tests.columns else None
    column = image_column(tests, source, given) if tests else None
    if ids is None:
        images = tests.columns[column]
        return images, np.arange(len(images)), np.arange(count), np.full(count, -1)
    pixels = hasattr(source, "table") and id_column(tests, ids, besides=[column])  # whose own ids go before row numbers
    direct = not pixels and any(source.find(cell) is not None for cell in ids[:COUNTED])
    key = pixels or (None if direct else id_column(tests, ids))
    if key and args.target_column in tests.columns:
        return row_a_target(path, ids, tests, key, column, args.target_column, classes)
    if key:
        check_unique(path, ids)
        return several_images(path, ids, tests.columns[key], tests.columns[column])
    targets = np.full(count, -1)
    if not direct and (split := split_targets(ids, source, classes)):
        ids, targets = split[0], np.array(split[1])
    else:
        check_unique(path, ids)
    unit_of = {cell: number for number, cell in enumerate(dict.fromkeys(ids))}
    return [*unit_of], np.arange(len(unit_of)), np.array([unit_of[cell] for cell in ids]), targets


def row_a_target(path, ids, tests, key, column, target_column, classes):
    """images_of, where the table of test images says which image and which target an id asks for."""
    rows = {cell: i for i, cell in enumerate(tests.columns[key])}
    lost = [cell for cell in ids if cell not in rows]
    refuse(path, lost, f"names * and {tests.path} doesn't: name the right --test-csv")
    asked = [tests.columns[target_column][rows[cell]] for cell in ids]
    refuse(path, [*({*asked} - {*classes})], "asks for *, which the training table hasn't")
    images = [tests.columns[column][rows[cell]] for cell in ids]
    unit_of = {image: number for number, image in enumerate(dict.fromkeys(images))}
    targets = np.array([classes.index(name) for name in asked])
    return [*unit_of], np.arange(len(unit_of)), np.array([unit_of[image] for image in images]), targets


def several_images(path, ids, keys, images):
    """images_of, where the table of test images (its columns keys and images) has an image or more for each id. An id
    that it hasn't is taken for the name of an image."""
    unit_of, wanted = {cell: number for number, cell in enumerate(ids)}, {}
    for key, image in zip(keys, images, strict=True):
        if key in unit_of and wanted.setdefault(image, unit_of[key]) != unit_of[key]:
            raise UserError(f"{path} asks for two ids that share the image {image}: one prediction can't serve both")
    for cell in unit_of.keys() - {*keys}:
        wanted[cell] = unit_of[cell]
    return [*wanted], np.array([*wanted.values()]), np.arange(len(ids)), np.full(len(ids), -1)


def split_targets(ids, source, classes):
    """Ids that are made of an image's and a target's name → (the images' names, the targets' numbers) or None."""
    images, targets = [], []
    for cell in ids:
        fitting = [c for c, name in enumerate(classes) if cell.endswith(name) and len(cell) > len(name) + 1]
        number = max(fitting, key=lambda c: len(classes[c]), default=None)
        if number is None:
            return None
        images.append(cell[: -len(classes[number])].rstrip("_-"))
        targets.append(number)
    return (images, targets) if all(source.find(image) is not None for image in images[:COUNTED]) else None


def choose_form(args, path, labels, names, values, long):
    """→ what prepared.json says of the submission. names: of the value columns, or None; values: the sample's value
    cells; long: a row asks for one target."""
    classes, task, width = labels.classes, labels.task, len(values[0])
    refuse(path, not width, "has 0 value columns: there must be one at least")
    value = pick_value(args, labels, names, values, long) if args.submit_value == "auto" else args.submit_value
    unfit = f"can't be filled with --submit-value {value}: the task is {task}"
    refuse(path, task not in SUBMISSIONS[value].tasks, unfit)
    if value == "top":
        ranks = int(args.metric[3:]) if args.metric in RANKED and width == 1 else 0
        mark, brackets = marks_of(values[0][0], classes, " ")
        top = max(width, len(split_cell(values[0][0], mark)), ranks)
        refuse(path, width > len(classes), f"has {width} value columns for {len(classes)} classes: see --label-column")
        return dict(value=value, columns=None, top=top) | between(mark, brackets, " ")
    if value in ("label", "scored", "set"):
        refuse(path, width > 1 or long, f"has {width} value columns: --submit-value {value} fills one")
        mark, brackets = marks_of(values[0][0], classes, args.separator)
        return dict(value=value, columns=None) | (between(mark, brackets, None) if value == "set" else {})
    if long:
        return dict(value=value, columns=classes if value == "probability" else None)
    if width == 1 and (value == "number" or task == "classes"):
        lacks = task == "classes" and len(classes) > 2 and not args.positive
        refuse(path, lacks, f"has one column for {len(classes)} classes: --submit-value label fills it")
        few = f"has one value column for {len(classes)} numbers, {listing(classes)}: see --label-column"
        refuse(path, task == "numbers" and len(classes) > 1, few)
        return dict(value=value, columns=None)
    return dict(value=value, columns=columns_of(path, labels, names, width))


def columns_of(path, labels, names, width):
    """→ the class, label or number of each value column: by its name; numbers also by the beginning of the name, or in
    the training table's order, and then a line says so."""
    classes = labels.classes
    if names is None and width == len(classes):
        return classes
    if names and sorted(names) == sorted(classes):
        return names
    other = classes if labels.task != "numbers" or width != len(classes) else []
    problem = f"has {width} value columns ({listing(names or [])}), and the classes are *"
    refuse(path, other, f"{problem}: there must be one column, or one for each class")
    found = [[c for c in classes if c.startswith(name) or name.startswith(c)] for name in names]
    alike = [one[0] for one in found if len(one) == 1]
    columns = alike if len({*alike}) == len(classes) else classes
    pairs = [f"{name} ← {c}" for name, c in zip(names, columns, strict=True)]
    how = "" if columns is alike else ", so they are taken in order"
    say(f"the sample's columns have other names{how}: {listing(pairs)}")
    return columns


def pick_value(args, labels, names, values, long):
    """→ the key of SUBMISSIONS that the sample's value cells ask for."""
    classes, first = labels.classes, values[0]
    if labels.task == "numbers":
        return "number"
    if long or len(first) > 1:
        ranked = args.metric in RANKED or not is_number(*first)
        of_classes = names is not None and {*names} <= {*classes}
        return "top" if ranked and not long and {*first} <= {*classes} and not of_classes else "probability"
    if labels.task == "labels":
        return "set"
    mark, _ = marks_of(first[0], classes, " ")
    parts = split_cell(first[0], mark)
    if args.metric in RANKED or (len(parts) > 1 and first[0] not in classes and {*parts} <= {*classes}):
        return "top"
    if is_number(first[0].rpartition(" ")[2]) and first[0].rpartition(" ")[0] in classes:
        return "scored"
    words = not is_number(*classes) and all(row[0] in classes for row in values)
    of_labels = args.metric != "auto" and METRICS[args.metric].of_labels
    return "label" if len(classes) > 2 or words or of_labels else "probability"


def marks_of(cell, classes, usual):
    """→ (what stands between the labels in a cell, whether brackets stand around them): what makes classes of all its
    parts, else the usual mark."""
    brackets = cell.startswith("[") and cell.endswith("]")
    for mark in (usual, " ", ", ", ",", "; ", ";", "|"):
        parts = (cell[1:-1] if brackets else cell).split(mark)
        if len(parts) > 1 and {part.strip(" '\"") for part in parts} <= {*classes}:
            return mark, brackets
    return ", " if brackets else usual, brackets


def between(mark, brackets, usual):
    """→ what prepared.json says of the mark between labels and the brackets around them, as far as it is unusual."""
    return (dict(between=mark) if mark != usual else {}) | (dict(brackets=True) if brackets else {})


def positive_class(args, path, labels, form):
    """→ the class whose probability a single column wants (of more than two: a list of classes, whose sum it wants), or
    None: by --positive, the sample's header or, of two, the larger number."""
    classes, given = labels.classes, args.positive
    wants_one = form["value"] == "probability" and not form["columns"]
    task = labels.task
    refuse("--positive", given and task != "classes", f"names a class, and the task is {task}: leave it out")
    if labels.task != "classes" or (len(classes) > 2 and not given):
        return None
    if given and len(classes) > 2 and wants_one and {*given} < {*classes}:
        return given
    if given and (len(classes) > 2 or len(given) > 1 or given[0] not in classes):
        several = ", or some of more beside --submit-value probability" * (len(classes) > 2)
        raise UserError(f"--positive {' '.join(given)}: give one of two classes{several}; these are {listing(classes)}")
    if given:
        return given[0]
    place = form.get("values", [-1])[0]
    named = form["header"][place].strip() if wants_one and form["header"] else None
    if named in classes:
        return named
    of_metric = args.metric == "f1-positive"
    unclear = classes if (wants_one or of_metric) and not is_number(*classes) else []
    wants = "--metric f1-positive scores" if of_metric else f"{path} wants the probability of"
    refuse(wants, unclear, "one class (*): name it with --positive")
    return classes[1]
