"""What the competition's tables say, what is wrong with them, and what the competition wants back."""

import contextlib
import csv
import io
from collections import Counter

import numpy as np

from common import UserError, listing
from kit.images import IMAGE_ENDINGS
from kit.metrics import METRICS


def read_rows(path, remedy):
    """→ the rows of a CSV file, as lists of strings, without blank lines. UTF-8 (with or without BOM) or cp932."""
    try:
        raw, text = path.read_bytes(), None
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
        raise UserError(f"{path} {problem}: {remedy}") from None
    # a spreadsheet's "Unicode text" says so in its first two bytes
    for encoding in ("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "cp932"):
        with contextlib.suppress(UnicodeDecodeError):
            text = text or raw.decode(encoding)
    refuse(path, text is None, "is neither UTF-8 nor cp932 text: save it as UTF-8")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path} is no table of values between commas ({error}): download it again") from None
    refuse(path, not rows, f"is empty: {remedy}")
    separators = len(rows[0]) == 1 and {*";\t"} & {*rows[0][0]}
    refuse(path, separators, "separates its columns by semicolons or tabs: save it with commas")
    ragged = [i + 1 for i, row in enumerate(rows) if len(row) != len(rows[0])]
    refuse(path, ragged, f"has another number of cells than the first row ({len(rows[0])}) in row *: mend it")
    return rows


def refuse(path, culprits, problem):
    """Raises UserError where there are culprits, a list or a condition. In `problem`, * stands for the list."""
    if culprits:
        raise UserError(f"{path} {problem.replace('*', listing(culprits) if '*' in problem else '')}")


def read_columns(args, **flags):
    """→ those columns of the training table that `flags` names (flag=column), as lists of stripped strings."""
    path = args.input / args.train_csv
    header, *rows = read_rows(path, "put the competition's table there, or name it with --train-csv")
    header = [cell.strip() for cell in header]
    for flag, column in flags.items():
        problem = f"has {'several columns' if column in header else 'no such column as'} {column!r}"
        refuse(path, header.count(column) != 1 and header, f"{problem}: name one of * with --{flag.replace('_', '-')}")
    refuse(path, not rows, "has a header and no rows: download it again")
    return [[row[header.index(column)].strip() for row in rows] for column in flags.values()]


def read_labels(args):
    """→ (image names, labels, the classes in order: by value where all are numbers) of the training table."""
    path = args.input / args.train_csv
    names, labels = read_columns(args, image_column=args.image_column, label_column=args.label_column)
    refuse(path, not all(names), "has rows without an image name: fill them in or remove them")
    check_unique(path, names)
    unlabelled = [name for name, label in zip(names, labels, strict=True) if is_blank(label)]
    refuse(path, unlabelled, "has no label for *: label or remove them")
    counts, spellings = Counter(labels), {}
    for label in filter(is_number, counts):  # 1 and 1.0 would be two classes
        first = spellings.setdefault(float(label), label)
        refuse(path, first != label, f"has the labels {first} and {label}, which are one number: spell them alike")
    refuse(path, len(counts) < 2, f"has one class only ({labels[0]}): a classifier needs two")
    small = [f"{label} ({count})" for label, count in counts.items() if count < args.folds]
    refuse(path, small, f"has fewer than {args.folds} images of *: add some, or lower --folds")
    return names, labels, sorted(counts, key=float if is_number(*counts) else None)


def check_unique(path, names):
    repeated = [name for name, count in Counter(names).items() if count > 1]
    refuse(path, repeated, "names * more than once: keep one row of each")


def is_number(*cells):
    """Whether the cells are finite numbers, all of them."""
    with contextlib.suppress(ValueError):
        return bool(np.isfinite([float(cell) for cell in cells]).all())
    return False


def is_blank(cell):
    return cell.strip().lower() in ("", "nan")


# form → (function(probabilities [K], indices of the classes that have a column, classes) → the cells of a row,
#         function(cell, classes) → whether a written cell is right)
SUBMISSIONS = {
    "probability": (lambda row, columns, classes: [f"{row[c]:.9g}" for c in columns],
                    lambda cell, classes: 0 <= float(cell) <= 1),
    "label": (lambda row, columns, classes: [classes[row.argmax()]], lambda cell, classes: cell in classes),
}  # fmt: skip


def read_sample_submit(args, source, classes):
    """Reads the sample submission. → (test image names in its order, the submission's format for prepared.json)."""
    path = args.input / args.sample_submit
    rows = read_rows(path, "put the competition's sample there, or name it with --sample-submit")
    headed = is_header(rows, source, classes) if args.submit_header == "auto" else args.submit_header == "yes"
    header, rows, width = rows[0] if headed else None, rows[headed:], len(rows[0]) - 1
    refuse(path, not rows, "names no test image: download it again, or see --submit-header")
    names, value, columns = [row[0] for row in rows], args.submit_value, None
    if width == 1:
        if value == "auto":
            words = not is_number(*classes) and all(row[1].strip() in classes for row in rows)
            of_labels = args.metric != "auto" and METRICS[args.metric].of_labels
            value = "label" if len(classes) > 2 or words or of_labels else "probability"
        lacks = value == "probability" and len(classes) > 2
        refuse(path, lacks, f"has one column for {len(classes)} classes: --submit-value label fills it")
    else:
        value, columns = "probability", [cell.strip() for cell in header[1:]] if headed else classes
        other = classes if sorted(columns) != sorted(classes) or width != len(classes) else []
        problem = f"has {width} value columns ({listing(columns)}), and the classes are *"
        refuse(path, other, f"{problem}: there must be one column, or one for each class")
    return names, dict(header=header, value=value, columns=columns)


def is_header(rows, source, classes):
    """Whether the sample's first row is a header, and no row of a test image, not even of one that is missing."""
    name, *cells = (cell.strip() for cell in rows[0])
    if source.find(rows[0][0]) is not None or name.lower().endswith(IMAGE_ENDINGS):
        return False
    if len(cells) == 1 and cells[0] in classes:  # a class names the column where the rows below hold other values
        return not all(row[1].strip() in classes for row in rows[1:])
    return sorted(cells) == sorted(classes) or not all(c in classes or is_blank(c) or is_number(c) for c in cells)


def positive_class(args, classes, submission):
    """→ the positive one of two classes: by --positive, the sample's header or the larger number. None of more."""
    if args.positive is not None and (len(classes) > 2 or args.positive not in classes):
        raise UserError(f"--positive {args.positive}: give one of two classes, and these are {listing(classes)}")
    if args.positive is not None or len(classes) > 2:
        return args.positive
    wants_one = submission["value"] == "probability" and not submission["columns"]
    named = submission["header"][-1].strip() if wants_one and submission["header"] else None
    if named in classes:
        return named
    unclear = classes if wants_one and not is_number(*classes) else []
    refuse(args.input / args.sample_submit, unclear, "wants the probability of one class (*): name it with --positive")
    return classes[1]


def submission_rows(names, probabilities, classes, submission):
    """The submission's rows, header included where the sample has one, from probabilities [N, K]. `submission` is what
    prepared.json says of the format: without value columns, one holds the positive class."""
    cells, _ = SUBMISSIONS[submission["value"]]
    columns = [classes.index(label) for label in submission["columns"] or classes[1:]]
    rows = [[name, *cells(row, columns, classes)] for name, row in zip(names, probabilities, strict=True)]
    return [submission["header"], *rows] if submission["header"] else rows


def check_submission(path, names, classes, submission):
    """Reads the written file back and checks rows, names, order and values. An AssertionError is a fault of the kit."""
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert not submission["header"] or rows.pop(0) == submission["header"], "the header differs from the sample's"
    assert [row[0] for row in rows] == names, "rows, names or their order differ from the sample's"
    width, allowed = len(submission["columns"] or [0]), SUBMISSIONS[submission["value"]][1]
    assert all(len(row) == 1 + width for row in rows), "a row has another number of columns than the sample's"
    assert all(allowed(cell, classes) for row in rows for cell in row[1:]), f"a value is no {submission['value']}"
