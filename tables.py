"""Reads the competition's tables, whoever wrote them, and says what is wrong with them. Used by 00_prepare.py."""

import csv
import io
from collections import Counter
from pathlib import Path

import pandas as pd

from common import UserError, listing


def read_rows(path, remedy):
    """→ the rows of a CSV file, as lists of strings, without blank lines. UTF-8 (with or without BOM) or cp932."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): {remedy}") from None
    try:
        # a spreadsheet's "Unicode text" says so in its first two bytes
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = raw.decode("cp932")
        except UnicodeDecodeError:
            raise UserError(f"{path} is neither UTF-8 nor cp932 text: save it as UTF-8") from None
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path} is no table of values between commas ({error}): download it again") from None
    if not rows:
        raise UserError(f"{path} is empty: {remedy}")
    if len(rows[0]) == 1 and any(separator in rows[0][0] for separator in ";\t"):
        raise UserError(f"{path} separates its columns by semicolons or tabs: save it with commas")
    ragged = [str(i + 1) for i, row in enumerate(rows) if len(row) != len(rows[0])]
    if ragged:
        raise UserError(f"{path}: row {listing(ragged)} hasn't as many cells as the first ({len(rows[0])}): mend it")
    return rows


def read_labels(args):
    """Reads the training table. → (image names, labels as given, the classes in order)."""
    path = args.input / args.train_csv
    header, *rows = read_rows(path, "put the competition's table there, or name it with --train-csv")
    header = [cell.strip() for cell in header]
    for flag, column in (("--image-column", args.image_column), ("--label-column", args.label_column)):
        if header.count(column) != 1:
            raise UserError(f"{path} has no single column {column!r} but {listing(header)}: name it with {flag}")
    if not rows:
        raise UserError(f"{path} has a header and no rows: download it again")
    names = [row[header.index(args.image_column)] for row in rows]
    if not all(name.strip() for name in names):
        raise UserError(f"{path} has rows without an image name: fill them in or remove them")
    labels = [row[header.index(args.label_column)].strip() for row in rows]
    check_unique(path, names)
    unlabelled = [name for name, label in zip(names, labels, strict=True) if label.lower() in ("", "nan")]
    if unlabelled:
        raise UserError(f"{path} has no label for {listing(unlabelled)}: label or remove them")
    counts = Counter(labels)
    check_spellings(path, counts)
    if len(counts) < 2:
        raise UserError(f"{path} has one class only ({labels[0]}): a classifier needs two")
    small = [f"{label} ({count})" for label, count in counts.items() if count < args.folds]
    if small:
        raise UserError(f"{path} has fewer than {args.folds} images of {listing(small)}: add some, or lower --folds")
    return names, labels, class_order(counts)


def check_spellings(path, labels):
    """Raises UserError for labels that are one number in two spellings (1 and 1.0), which would be two classes."""
    by_number = {}
    for label in labels:
        try:
            other = by_number.setdefault(float(label), label)
        except ValueError:
            continue
        if other != label:
            raise UserError(f"{path} has the labels {other} and {label}, which are one number: spell them alike")


def class_order(labels):
    """Sorted as whole numbers where all are, else as strings. Of two classes, the second is the positive one."""
    numeric = all(label.lstrip("-").isdecimal() for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if numeric else None)


def check_unique(path, names):
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{path} names {listing(repeated)} more than once: keep one row of each")


def read_sample_submit(args, source, classes):
    """Reads the sample submission. → (test image names in its order, the submission's format for prepared.json)."""
    path = args.input / args.sample_submit
    rows = read_rows(path, "put the competition's sample there, or name it with --sample-submit")
    headed = {"yes": True, "no": False, "auto": source.find(rows[0][0]) is None}[args.submit_header]
    header, rows = (rows[0], rows[1:]) if headed else (None, rows)
    names = [row[0] for row in rows]
    if not names:
        raise UserError(f"{path} names no test image: download it again, or see --submit-header")
    check_unique(path, names)
    width = len(rows[0]) - 1
    if width == 1:
        value, columns = args.submit_value, None
        if value == "auto":
            shown = {row[1].strip() for row in rows}
            value = "label" if len(classes) > 2 or (shown <= set(classes) and not is_number(classes)) else "probability"
        if value == "probability" and len(classes) > 2:
            raise UserError(f"{path} has one column for {len(classes)} classes: --submit-value label fills it")
    else:
        value, columns = "probability", [cell.strip() for cell in header[1:]] if header else classes
        if sorted(columns) != sorted(classes) or width != len(classes):
            raise UserError(
                f"{path} has {width} value columns ({listing(columns)}), and the classes are {listing(classes)}: "
                "there must be one column, or one for each class"
            )
    return names, dict(header=header, value=value, columns=columns)


def is_number(texts):
    return all(text.replace(".", "", 1).lstrip("-").isdecimal() for text in texts)


def given_groups(args, names):
    """The groups that the user names: a column of train.csv or a table image_name,group. → int [N]."""
    if args.groups.endswith(".csv"):
        path = Path(args.groups)
        header, *rows = read_rows(path, "name a table with the columns image_name,group with --groups")
        if header != ["image_name", "group"]:
            raise UserError(f"{path} has the columns {listing(header)}: it needs image_name,group")
        check_unique(path, [row[0] for row in rows])
        found = dict(rows)
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"{path} has no group for {listing(missing)}: add them")
        values = [found[name] for name in names]
    else:
        path = args.input / args.train_csv
        header, *rows = read_rows(path, "put the competition's table there")
        header = [cell.strip() for cell in header]
        if header.count(args.groups) != 1:
            raise UserError(f"--groups {args.groups}: {path} has no such column but {listing(header)}")
        values = [row[header.index(args.groups)].strip() for row in rows]
    return pd.factorize(pd.Series(values))[0]
