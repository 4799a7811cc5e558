"""What does the sample submission ask for? Its rows, the test images behind them, and the form of its cells."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from common import UserError, listing
from kit.images import IMAGE_ENDINGS
from kit.metrics import METRICS
from kit.submission import RANKED, SUBMISSIONS
from kit.tables import COUNTED, check_unique, image_column, is_blank, is_number, read_cells, refuse


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
    place = id_place(args, rows, source, tests, labels)
    ids = [row[place] for row in rows] if place is not None else None
    images, units, unit, target = images_of(args, path, ids, len(rows), source, tests, labels.classes)
    values = [i for i in range(len(rows[0])) if i != place]
    if header and len(values) > 1:  # further columns are copied
        named = [i for i in values if header[i].strip() in labels.classes]
        own = form.get("values") if form else [i for i in values if header[i].strip() in labels.columns]
        values = named if {header[i].strip() for i in named} == {*labels.classes} else own or values
    cells = pd.DataFrame([[cell for cell in row] for row in rows], columns=[f"c{i}" for i in range(len(rows[0]))])
    layout = pd.concat([pd.DataFrame(dict(unit=unit, target=target)), cells], axis=1)
    form = form or choose_form(args, path, labels, header, [[row[i] for i in values] for row in rows], max(target) >= 0)
    unusual = dict(place=place, separator=separator, values=values)
    usual = dict(place=0, separator=",", values=[*range(1, len(rows[0]))])
    form = {**form, "header": header} | {key: value for key, value in unusual.items() if value != usual[key]}
    return Sample(form, images, units, layout)


def is_header(rows, source, classes):
    """Whether the sample's first row is a header, and no row of a test image, not even of one that is missing."""
    first = [cell.strip() for cell in rows[0]]
    if any(source.find(cell) is not None or cell.lower().endswith(IMAGE_ENDINGS) for cell in rows[0]):
        return False
    cells = first[1:] or first
    if len(cells) == 1 and cells[0] in classes:  # a class names the column where the rows below hold other values
        return not all(row[-1].strip() in classes for row in rows[1:])
    return sorted(cells) == sorted(classes) or not all(c in classes or is_blank(c) or is_number(c) for c in cells)


def id_place(args, rows, source, tests, labels):
    """→ the number of the sample's column of ids, by which the test images are found; None where there is none."""
    some = rows[:COUNTED]
    columns = [[row[i] for row in some] for i in range(len(rows[0]))]
    different = [len({*cells}) == len(cells) for cells in columns]  # or class numbers would be images of a pixel table
    known = [different[i] * sum(source.find(cell) is not None for cell in cells) for i, cells in enumerate(columns)]
    if max(known):
        return known.index(max(known))
    for i in range(len(rows[0])):
        for cells in tests.columns.values() if tests else ():
            if len({*cells}) > 1 and {row[i] for row in some} <= {*cells}:
                return i
    if tests and len(rows) == len(tests) and (len(rows[0]) == 1 or is_number(*some[0])):
        return None
    return 0


def images_of(args, path, ids, count, source, tests, classes):
    """Which images does each row of the sample ask for? → (test images, int [images]: the unit of each; of each row its
    unit and its target, -1 where the row asks for all). A unit is what is predicted as one: an image or, where the
    table of test images says so, several."""
    given = args.image_column if tests and args.image_column in tests.columns else None
    column = image_column(tests, source, given) if tests else None
    if ids is None:
        images = tests.columns[column]
        return images, np.arange(len(images)), np.arange(count), np.full(count, -1)
    targets = np.full(count, -1)
    if not any(source.find(cell) is not None for cell in ids[:COUNTED]):
        key = next((name for name, cells in tests.columns.items() if {*ids} <= {*cells}), None) if tests else None
        if key and args.target_column in tests.columns:  # a row for each image and target
            rows = {cell: i for i, cell in enumerate(tests.columns[key])}
            picked = [rows[cell] for cell in ids]
            targets = [target_number(path, tests.columns[args.target_column][i], classes) for i in picked]
            ids = [tests.columns[column][i] for i in picked]
        elif key:  # several images for one id
            wanted, units = {}, []
            unit_of = {cell: number for number, cell in enumerate(dict.fromkeys(ids))}
            for cell, image in zip(tests.columns[key], tests.columns[column], strict=True):
                if cell in unit_of:
                    wanted.setdefault(image, unit_of[cell])
            units = np.array([*wanted.values()])
            check_unique(path, ids)
            return [*wanted], units, np.arange(count), targets
        elif split := split_targets(ids, source, classes):
            ids, targets = split
    if min(targets) < 0:
        check_unique(path, ids)
    unit_of = {cell: number for number, cell in enumerate(dict.fromkeys(ids))}
    return [*unit_of], np.arange(len(unit_of)), np.array([unit_of[cell] for cell in ids]), np.asarray(targets)


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


def target_number(path, name, classes):
    refuse(path, name not in classes, f"asks for {name!r}, which the training table hasn't")
    return classes.index(name)


def choose_form(args, path, labels, header, values, long):
    """→ what prepared.json says of the submission. values: the sample's value cells; long: a row asks for a target."""
    classes, task, width = labels.classes, labels.task, len(values[0])
    refuse(path, not width, "has 0 value columns: there must be one at least")
    value, first = args.submit_value, [cell.strip() for cell in values[0]]
    usual = dict(classes="probability", labels="probability", numbers="number")[task]
    if value == "auto":
        value = usual if long or width > 1 or task == "numbers" else single_form(args, labels, values)
        value = "top" if width > 1 and task != "numbers" and {*first} <= {*classes} else value
    refuse(
        path, task not in SUBMISSIONS[value].tasks, f"can't be filled with --submit-value {value}: the task is {task}"
    )
    if value == "top":
        ranks = int(args.metric[3:]) if args.metric in RANKED else 0
        return dict(value=value, columns=None, top=max(width, len(first[0].split()), ranks))
    if value in ("label", "scored", "set"):
        problem = f"has {width} value columns: --submit-value {value} fills one"
        refuse(path, width > 1 or long, problem)
        return dict(value=value, columns=None) | (dict(between=args.separator) if value == "set" else {})
    if long or (width == 1 and (value == "number" or task == "classes")):
        lacks = not long and task == "classes" and len(classes) > 2 and not args.positive
        refuse(path, lacks, f"has one column for {len(classes)} classes: --submit-value label fills it")
        refuse(
            path,
            not long and task == "numbers" and len(classes) > 1,
            f"has one value column for {len(classes)} numbers",
        )
        return dict(value=value, columns=classes if long and value == "probability" else None)
    names = [name.strip() for name in header[-width:]] if header and len(header) > width else classes
    columns = [name.strip() for name in header if name.strip() in classes] if header else classes
    if sorted(columns) != sorted(classes):
        by_order = task == "numbers" and width == len(classes)  # its columns may be named otherwise
        other = [] if by_order else classes
        problem = f"has {width} value columns ({listing(names)}), and the classes are *"
        refuse(path, other, f"{problem}: there must be one column, or one for each class")
        columns = classes
    return dict(value=value, columns=columns)


def single_form(args, labels, values):
    """→ the key of SUBMISSIONS that one value cell asks for."""
    classes, cells = labels.classes, [row[0].strip() for row in values]
    if labels.task == "labels":
        return "set"
    parts = cells[0].split()
    if args.metric in RANKED or (len(parts) > 1 and cells[0] not in classes and {*parts} <= {*classes}):
        return "top"
    if len(parts) > 1 and parts[-1] not in classes and is_number(parts[-1]) and cells[0].rpartition(" ")[0] in classes:
        return "scored"
    words = not is_number(*classes) and all(cell in classes for cell in cells)
    of_labels = args.metric != "auto" and METRICS[args.metric].of_labels
    return "label" if len(classes) > 2 or words or of_labels else "probability"


def positive_class(args, path, labels, form):
    """→ the class whose probability a single column wants (of more than two: a list of classes, whose sum it wants), or
    None: by --positive, the sample's header or, of two, the larger number."""
    classes, given = labels.classes, args.positive
    wants_one = form["value"] == "probability" and not form["columns"]
    if labels.task != "classes" or (len(classes) > 2 and not given):
        return None
    if given and len(classes) > 2 and wants_one and {*given} < {*classes}:
        return given
    if given and (len(classes) > 2 or len(given) > 1 or given[0] not in classes):
        raise UserError(f"--positive {' '.join(given)}: give one of two classes, and these are {listing(classes)}")
    if given:
        return given[0]
    named = form["header"][-1].strip() if wants_one and form["header"] else None
    if named in classes:
        return named
    unclear = classes if wants_one and not is_number(*classes) else []
    refuse(path, unclear, "wants the probability of one class (*): name it with --positive")
    return classes[1]
