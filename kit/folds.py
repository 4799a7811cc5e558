"""Which images are held out together: groups that the user names, folds, and the table that shows them."""

import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from common import warn
from kit.tables import check_unique, is_blank, read_columns, read_rows, refuse


def given_groups(args, names):
    """Reads the groups that --groups names: a column of the training table, or a FILE.csv with image_name,group.
    → (group of each image int [N], number of blank cells). An image whose cell is blank is a group of its own."""
    if args.groups.endswith(".csv"):
        path = Path(args.groups)
        header, *rows = read_rows(path, "name a table with the columns image_name,group with --groups")
        refuse(path, header != ["image_name", "group"] and header, "has the columns *: it needs image_name,group")
        check_unique(path, [row[0] for row in rows])
        group_of = dict(rows)
        refuse(path, [name for name in names if name not in group_of], "has no group for *: add them")
        cells = [group_of[name] for name in names]
    else:
        (cells,) = read_columns(args, groups=args.groups)
    keys = [i if is_blank(cell) else cell.strip() for i, cell in enumerate(cells)]
    return pd.factorize(pd.Series(keys, dtype=object))[0], sum(map(is_blank, cells))


def make_folds(names, labels, classes, groups, count, seed):
    """Stratified folds, shuffled (thesis 3.1.2), in which no group (int [N]) is split. → the table folds.csv. Without
    groups of two or more these are the thesis' folds. Raises UserError where the groups can't fill the folds."""
    targets = pd.Categorical(labels, classes).codes
    table = pd.DataFrame(dict(image_name=names, label=labels, target=targets, group=groups, fold=-1))
    single, units = table.group.is_unique, table.group.nunique()
    refuse(f"--folds {count}:", units < count, f"{units} groups of relatives can't fill them: lower it or see --groups")
    if not single and [int(part) for part in sklearn.__version__.replace("rc", ".").split(".")[:2]] < [1, 8]:
        warn(f"scikit-learn {sklearn.__version__} doesn't stratify grouped folds: install 1.8 or newer")
    splitter = (StratifiedKFold if single else StratifiedGroupKFold)(count, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(table, table.target, None if single else table.group)):
        table.loc[held_out, "fold"] = fold
    counts = pd.crosstab(table.label, table.fold).reindex(columns=range(count), fill_value=0)
    lacking = counts.index[(counts == 0).any(axis=1)].tolist()
    refuse(f"--folds {count}:", lacking, "too few groups of relatives in the classes *: lower it or see --groups")
    return table


def fold_table(folds, classes):
    """Images of each class in each fold, with sums, as text no wider than 120 columns: of more than 20 classes the
    8 largest and the 8 smallest, of more than 10 folds the smallest and the largest."""
    counts = pd.crosstab(folds.label, folds.fold).reindex(classes)
    counts = np.vstack([counts, counts.sum()])  # [classes and all, folds]
    header, cells = [f"fold {k}" for k in range(counts.shape[1])], counts
    if len(header) > 10:
        header, cells = ["smallest fold", "largest fold"], np.stack([counts.min(axis=1), counts.max(axis=1)], axis=1)
    cells = np.column_stack([cells, counts.sum(axis=1)]).tolist()
    rows = [[name, *numbers] for name, numbers in zip([*classes, "all"], cells, strict=True)]
    if len(classes) > 20:
        largest = sorted(rows[:-1], key=lambda row: -row[-1])
        rows = [*largest[:8], [f"… {len(classes) - 16} more"], *largest[-8:], rows[-1]]
    rows.insert(0, ["class", *header, "all"])
    first = min(24, max(columns_of(row[0]) for row in rows))
    other = 2 + max(len(str(number)) for row in rows for number in row[1:])
    return "\n".join(fit(row[0], first) + "".join(f"{number:>{other}}" for number in row[1:]) for row in rows)


def columns_of(text):
    """How many columns of a terminal a text takes: two for a kana or kanji."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def fit(text, columns):
    """Cuts a text, or fills it with spaces, to the number of columns."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    while columns_of(text) > columns:
        text = text.removesuffix("…")[:-1] + "…"
    return text + " " * (columns - columns_of(text))
