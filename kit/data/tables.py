"""Tables of a competition: CSV, TSV and COCO-like JSON, zipped or not."""

import contextlib
import csv
import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import UserError, listing

import numpy as np
import pandas as pd

from kit.data.decode import IMAGE_ENDINGS

TRAIN = "train.csv", "train.tsv", "train_labels.csv", "trainLabels.csv", "labels.csv", "train_master.tsv"
SAMPLE = "sample_submit.csv sample_submission.csv sampleSubmission.csv SampleSubmission.csv submission_format.csv"
SAMPLE = (*SAMPLE.split(), "sample_submit.tsv", "sample.csv")
NO_SAMPLE = "put the competition's sample there, or name it with --sample-submit"  # a remedy
CHECKED_ROWS = 200  # by which a column of image names or ids is recognised


class Table(NamedTuple):
    """A table's columns by name."""

    path: Path  # where it was read
    columns: dict[str, list[str]]  # the cells of each, stripped

    def __len__(self):
        return len(next(iter(self.columns.values())))


def find_table(folder, given, usual):
    """Return the path of a table: the one given by a flag, else the first of the `usual` names that exists, zipped or
    not, else the first name."""
    names = [given] if given else usual
    paths = [folder / f"{name}{packed}" for name in names for packed in ("", ".zip")]
    return next((path for path in paths if path.exists()), paths[0])


def read_text(path, remedy):
    """Return the text of a file, or of the only file in a zip: UTF-8 (with or without BOM), UTF-16 with BOM, or cp932.
    Raises UserError; `remedy` ends its message."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if not name.startswith("__MACOSX") and name[-1] != "/"]
                refuse(path, len(names) != 1 and names, "holds *: one table was expected")
                raw = archive.read(names[0])
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error})"
        raise UserError(f"{path} {problem}: {remedy}") from None
    # A spreadsheet's "Unicode text" is UTF-16, marked by its first two bytes.
    for encoding in ("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "cp932"):
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(encoding)
    raise UserError(f"{path} is neither UTF-8 nor cp932 text: save it as UTF-8")


def read_rows(path, remedy):
    """Return (the rows of a table as lists of strings, without blank lines; what separates its columns: a comma or,
    where the first line has none, a tab or a semicolon). Raises UserError; `remedy` ends its message."""
    text = read_text(path, remedy)
    first = next((line for line in text.splitlines() if line.strip()), "")
    try:
        comma = len(next(csv.reader([first]), [])) > 1 and ".tsv" not in path.suffixes
        separator = next((mark for mark in "\t;" if mark in first and not comma), ",")
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [row for row in cells if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path} is no table of values between commas ({error}): download it again") from None
    refuse(path, not rows, f"is empty: {remedy}")
    ragged = [i + 1 for i, row in enumerate(rows) if len(row) != len(rows[0])]
    refuse(path, ragged, f"has another number of cells than the first row ({len(rows[0])}) in row *: correct it")
    return rows, separator


def read_table(path, remedy, header="auto"):
    """Return the Table in a file. header: yes, no, or auto: no where the first row names an image file. Columns without
    a header are called 1, 2, …; those of a COCO-like JSON are the fields of its images, and category_id."""
    if path.name.removesuffix(".zip").endswith(".json"):
        return read_coco(path, remedy)
    rows = [[cell.strip() for cell in row] for row in read_rows(path, remedy)[0]]
    bare = header == "no" or (header == "auto" and any(cell.lower().endswith(IMAGE_ENDINGS) for cell in rows[0]))
    names, rows = ([*map(str, range(1, len(rows[0]) + 1))], rows) if bare else (rows[0], rows[1:])
    refuse(path, [f"{name!r}" for name in repeated(names)][:1], "has several columns *: rename them")
    refuse(path, not rows, "has a header and no rows: download it again")
    return Table(path, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def read_coco(path, remedy):
    """Return the Table of a JSON with `images` and, for training images, `annotations`: a row for each image, with its
    category_id (several are separated by blanks). Images without annotation are left out where others have one."""
    try:
        content = json.loads(read_text(path, remedy))
        keys = [key for key, value in content["images"][0].items() if not isinstance(value, (list, dict))]
        categories = {}
        for annotation in content.get("annotations", []):
            categories.setdefault(annotation["image_id"], {})[str(annotation["category_id"])] = None
        images = [image for image in content["images"] if not categories or image["id"] in categories]
        columns = {key: [str(image.get(key, "")) for image in images] for key in keys}
        if categories:
            columns["category_id"] = [" ".join(categories[image["id"]]) for image in images]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is no JSON of images and annotations ({error!r}): name a table") from None
    return Table(path, columns)


def stack(parts):
    """Return the Table of tables one below the other; a column that one of them lacks is blank there."""
    return Table(parts[0].path, pd.concat([pd.DataFrame(part.columns) for part in parts]).fillna("").to_dict("list"))


def join(table, other):
    """Return `table` with the columns of `other` that it lacks, joined by all columns that both have. Rows of `table`
    without a partner stay, with blank cells. Raises UserError where no column is shared, or no row has a partner."""
    left, right = pd.DataFrame(table.columns), pd.DataFrame(other.columns)
    shared = [name for name in left if name in right]
    refuse(other.path, not shared, f"has no column of {table.path}: they can't be joined")
    twice = [", ".join(key) for key in repeated(right[shared].itertuples(index=False, name=None))]
    refuse(other.path, twice, f"names the {listing(shared)} * more than once: keep one row of each")
    problem = f"shares the columns {listing(shared)} with {table.path}, and no row fits"
    refuse(other.path, left.merge(right, on=shared).empty, problem)
    return Table(table.path, left.merge(right, "left", on=shared).fillna("").to_dict("list"))


def image_column(table, source, given):
    """Return the name of the column of image names: the one given, else image_name, else the first of those with the
    most cells that `source` finds, if these are more than half: a row may name no image, or one that is missing."""
    if not given and "image_name" not in table.columns:
        varied = {name: cells[:CHECKED_ROWS] for name, cells in table.columns.items() if len(set(cells)) > 1}
        shares = {name: np.mean([source.find(cell) is not None for cell in cells]) for name, cells in varied.items()}
        if max(shares.values(), default=0) > 0.5:
            return max(shares, key=shares.get)
    return column(table, given or "image_name", "--image-column")


def column(table, name, flag):
    """Return `name`. Raises UserError unless it is a column of the table."""
    problem = f"has no such column as {name!r}: name one of * with {flag}"
    refuse(table.path, name not in table.columns and [*table.columns], problem)
    return name


def refuse(path, culprits, problem):
    """Raise UserError where there are culprits, a list or a condition. In `problem`, the last * stands for the list; an
    earlier one may be part of a label, a name or a pattern."""
    if culprits:
        before, mark, after = problem.rpartition("*")
        listed = listing(culprits) if mark and hasattr(culprits, "__iter__") else mark
        raise UserError(f"{path} {before}{listed}{after}")


def check_unique(path, names):
    """Raise UserError where a name comes twice."""
    refuse(path, repeated(names), "names * more than once: keep one row of each")


def repeated(cells):
    """Return the cells, a list, that come more than once."""
    return [cell for cell, count in Counter(cells).items() if count > 1]


def is_number(*cells):
    """Return whether all cells are finite numbers."""
    with contextlib.suppress(ValueError):
        return bool(np.isfinite([float(cell) for cell in cells]).all())
    return False


def is_blank(cell):
    """Return whether a cell is empty or says nan."""
    return cell.strip().lower() in ("", "nan")
