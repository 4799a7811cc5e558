"""Which images are held out together: groups that the user names, folds, and the table that shows them."""

import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from common import say
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
    table = pd.DataFrame(dict(image_name=names, label=labels, target=targets, group=groups))
    units = table.group.nunique()
    refuse(f"--folds {count}:", units < count, f"{units} groups can't fill them: lower it or see --groups")
    table["fold"] = deal(groups, targets, count, seed)
    lacking = [classes[c] for c in scarce(table.fold, targets)]
    refuse(f"--folds {count}:", lacking, "too few groups in the classes *: lower it or see --groups")
    return table


def scarce(folds, targets):
    """→ the classes that some fold's model can't learn, as all their images are in that fold; of two classes, those
    that some fold lacks, since it has no AUC. folds, targets int [N]."""
    counts = pd.crosstab(np.asarray(targets), np.asarray(folds)) > 0
    return counts.index[counts.sum(axis=1) < (counts.shape[1] if len(counts) == 2 else 2)].tolist()


def deal(groups, targets, count, seed):
    """Deals groups (int [N]) to `count` folds, each with its share of the images and of every class (targets int [N]).
    → the fold of each image, int [N]. Groups of one image each make scikit-learn's stratified folds, the thesis'.

    The largest group comes first, and each goes where its classes, and then all images, are rarest so far.
    scikit-learn's own grouped folds are as even, take fifteen times as long, and older ones don't stratify."""
    groups = pd.factorize(np.asarray(groups))[0]  # by first image: other names for the groups make no other folds
    if groups.max() == len(groups) - 1 and np.unique(targets, return_counts=True)[1].min() >= count:
        splitter = StratifiedKFold(count, shuffle=True, random_state=seed)
        folds = np.empty(len(groups), np.int64)
        for fold, (_, held_out) in enumerate(splitter.split(groups, targets)):
            folds[held_out] = fold
        return folds
    sizes = np.bincount(groups)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    (units, classes), cells = np.unique(np.stack([groups, targets]), axis=1, return_counts=True)
    first = np.searchsorted(units, range(len(sizes) + 1))  # of group g: cells first[g] to first[g + 1]
    share = 1 / np.maximum(1, np.bincount(targets))  # of its class that an image is
    dealt, filled = np.zeros((count, len(share))), np.zeros(count)  # shares of each class and of all images
    fold_of = np.empty(len(sizes), np.int64)
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        own = classes[first[group] : first[group + 1]]
        shares = cells[first[group] : first[group + 1]] * share[own]
        fold = fold_of[group] = (dealt[:, own] @ shares + filled * sizes[group] / len(groups)).argmin()
        dealt[fold, own] += shares
        filled[fold] += sizes[group] / len(groups)
    return fold_of[groups]


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
