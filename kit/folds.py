"""Which images are held out together: groups that the user names, folds, and the table that shows them."""

import unicodedata
from pathlib import Path

import pandas as pd
import sklearn
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from common import say, warn
from kit.tables import check_unique, is_blank, read_columns, read_rows, refuse


def given_groups(args, names):
    """Reads the groups that --groups names: a column of the training table, or a FILE.csv with image_name,group.
    → the group of each image, int [N]. An image whose cell is blank is a group of its own, and a line says how many."""
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
    if blank := sum(map(is_blank, cells)):
        say(f"{blank} images have a blank cell for their group: each is its own group")
    keys = [i if is_blank(cell) else cell.strip() for i, cell in enumerate(cells)]
    return pd.factorize(pd.Series(keys, dtype=object))[0]


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
    lacking = [label for label, rows in table.groupby("label") if rows.fold.nunique() < count]
    refuse(f"--folds {count}:", lacking, "too few groups of relatives in the classes *: lower it or see --groups")
    return table


def fold_table(folds, classes):
    """Images of each class in each fold, with sums, as text no wider than 120 columns: of more than 20 classes the
    8 largest and the 8 smallest, of more than 10 folds the smallest and the largest."""
    counts = pd.crosstab(folds.label, folds.fold).reindex(classes).add_prefix("fold ")
    counts = pd.concat([counts, counts.sum().to_frame("all").T]).rename(index=shortened)
    extremes = pd.DataFrame({"smallest fold": counts.min(axis=1), "largest fold": counts.max(axis=1)})
    table = (extremes if counts.shape[1] > 10 else counts).assign(all=counts.sum(axis=1))
    if len(classes) > 20:
        largest = table[:-1].sort_values("all", ascending=False, kind="stable")
        gap = pd.DataFrame("", [f"… {len(classes) - 16} more"], table.columns)
        table = pd.concat([largest[:8], gap, largest[-8:], table[-1:]])
    with pd.option_context("display.unicode.east_asian_width", True):
        return table.rename_axis(columns="class").to_string()


def shortened(name, columns=24):
    """A class' name, cut to what fits the columns of a terminal (a kana or kanji takes two), without control codes."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    while sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in name) > columns:
        name = name.removesuffix("…")[:-1] + "…"
    return name
