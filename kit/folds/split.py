"""Which images are held out together: groups that the user names, folds, and the table that shows them."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from common import UserError, listing, say
from kit.data.tables import check_unique, column, is_blank, read_rows, refuse
from kit.score import tasks


def given_groups(args, names, table, images):
    """Reads the groups that --groups names: a column of the training table, or a FILE.csv with image_name,group.
    → the group of each image, int [N]. An image whose cell is blank is a group of its own, and a line says how many.

    table: the training Table or None; images: the name of its column of images."""
    if args.groups.endswith(".csv"):
        path = Path(args.groups) if Path(args.groups).exists() else args.input / args.groups
        header, *rows = read_rows(path, "name a table with the columns image_name,group with --groups")
        refuse(path, header != ["image_name", "group"] and header, "has the columns *: it needs image_name,group")
        check_unique(path, [row[0] for row in rows])
        group_of = dict(rows)
    else:
        refuse("--groups", table is None, f"{args.groups} is a column of a table, and there is none: give a FILE.csv")
        path = table.path
        group_of = dict(zip(table.columns[images], table.columns[column(table, args.groups, "--groups")], strict=True))
    refuse(path, [name for name in names if name not in group_of], "has no group for *: add them")
    cells = [group_of[name] for name in names]
    if blank := sum(map(is_blank, cells)):
        say(f"{blank} images have a blank cell for their group: each is its own group")
    keys = [i if is_blank(cell) else cell.strip() for i, cell in enumerate(cells)]
    return pd.factorize(pd.Series(keys, dtype=object))[0]


def pattern_groups(pattern, names):
    """→ the group of each image, int [N]: those are together in whose names the regular expression finds the same."""
    try:
        found = [re.search(pattern, name) for name in names]
    except re.error as error:
        raise UserError(f"--group-pattern {pattern!r} is no regular expression ({error})") from None
    lost = [name for name, match in zip(names, found, strict=True) if not match]
    refuse("--group-pattern", lost, f"{pattern!r} finds nothing in *")
    return pd.factorize(pd.Series([match[match.re.groups and 1] for match in found], dtype=object))[0]


def make_folds(labels, groups, count, seed):
    """Stratified folds, shuffled (thesis 3.1.2), in which no group (int [N]) is split. → the table folds.csv. Without
    groups of two or more these are the thesis' folds. Raises UserError where the groups can't fill the folds.

    labels: the Labels of the training images. A class with fewer images than folds is in as many as it can."""
    cells = tasks.written(labels.task, labels.targets)
    table = pd.DataFrame(dict(image_name=labels.names, label=labels.cells, target=cells, group=groups))
    units = table.group.nunique()
    refuse(f"--folds {count}:", units < count, f"{units} groups can't fill them: lower it or see --groups")
    strata = tasks.strata(labels.task, labels.targets)
    table["fold"] = deal(groups, strata, count, seed)
    lacking = unlearnt(table, labels)
    refuse(
        f"--folds {count}:",
        len(labels.classes) == 2 and lacking,
        "too few groups in the classes *: lower it or see --groups",
    )
    if lacking:
        say(f"all their images lie in one fold, whose model never learns them: {listing(lacking)}")
    return table


def unlearnt(folds, labels):
    """→ the names of the classes or labels that `scarce` finds; of numbers there are none."""
    if labels.task == "numbers":
        return []
    targets = tasks.strata(labels.task, labels.targets)
    return [labels.classes[c] for c in scarce(folds.fold.to_numpy(), targets)]


def scarce(folds, targets):
    """→ the classes that some fold's model can't learn, as all their images are in that fold; of two classes, those
    that some fold lacks, since it has no AUC. folds int [N]; targets int [N], or labels bool [N, K]."""
    if targets.ndim == 2:
        counts = np.stack([targets[folds == k].any(axis=0) for k in np.unique(folds)], axis=1)
        return np.flatnonzero(counts.sum(axis=1) == 1).tolist()
    counts = pd.crosstab(np.asarray(targets), np.asarray(folds)) > 0
    return counts.index[counts.sum(axis=1) < (counts.shape[1] if len(counts) == 2 else 2)].tolist()


def deal(groups, targets, count, seed):
    """Deals groups (int [N]) to `count` folds, each with its share of the images and of every class (targets int [N])
    or label (bool [N, K]; after Sechidis et al. 2011, iterative stratification, whose libraries know no groups).
    → the fold of each image, int [N]. Groups of one image each make scikit-learn's stratified folds, the thesis'.

    The largest group comes first, and each goes where its classes, and then all images, are rarest so far.
    scikit-learn's own grouped folds are as even, take fifteen times as long, and older ones don't stratify."""
    groups = pd.factorize(np.asarray(groups))[0]  # by first image: other names for the groups make no other folds
    if (
        targets.ndim == 1
        and groups.max() == len(groups) - 1
        and np.unique(targets, return_counts=True)[1].min() >= count
    ):
        from sklearn.model_selection import StratifiedKFold

        splitter = StratifiedKFold(count, shuffle=True, random_state=seed)
        folds = np.empty(len(groups), np.int64)
        for fold, (_, held_out) in enumerate(splitter.split(groups, targets)):
            folds[held_out] = fold
        return folds
    sizes = np.bincount(groups)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    owners, of_class = np.nonzero(targets) if targets.ndim == 2 else (slice(None), targets)
    (units, classes), cells = np.unique(np.stack([groups[owners], of_class]), axis=1, return_counts=True)
    first = np.searchsorted(units, range(len(sizes) + 1))  # of group g: cells first[g] to first[g + 1]
    share = 1 / np.maximum(1, np.bincount(of_class, minlength=1))  # of its class that an image is
    dealt, filled = np.zeros((count, len(share))), np.zeros(count)  # shares of each class and of all images
    fold_of, first_come = np.empty(len(sizes), np.int64), sizes.astype(float)
    if targets.ndim == 2:  # the rarest labels come first, while there is a choice
        first_come = np.zeros(len(sizes))
        np.maximum.at(first_come, units, share[classes])
    for group in shuffled[np.argsort(-first_come[shuffled], kind="stable")]:
        own = classes[first[group] : first[group + 1]]
        shares = cells[first[group] : first[group + 1]] * share[own]
        fold = fold_of[group] = (dealt[:, own] @ shares + filled * sizes[group] / len(groups)).argmin()
        dealt[fold, own] += shares
        filled[fold] += sizes[group] / len(groups)
    return fold_of[groups]


def fold_table(folds, prepared):
    """Images of each class or label in each fold, with sums, or means of numbers, as text no wider than 120 columns: of
    more than 20 classes the 8 largest and the 8 smallest, of more than 10 folds the smallest and the largest."""
    task, classes = tasks.task_of(prepared), prepared["classes"]
    if task == "classes":
        counts = pd.crosstab(folds.label, folds.fold).reindex(classes)
    else:
        targets, reduce = tasks.read_targets(prepared, folds.target), np.nanmean if task == "numbers" else np.nansum
        parts = {k: reduce(targets[folds.fold == k], axis=0) for k in sorted(folds.fold.unique())}
        counts = pd.DataFrame(parts, index=classes).rename_axis(columns="fold")
    counts, images = counts.add_prefix("fold "), folds.fold.value_counts().sort_index().add_prefix("fold ")
    if task == "numbers":
        table = counts.assign(all=np.nanmean(targets, axis=0)).map("{:.4g}".format)
        table.loc["images"] = [str(count) for count in [*images, images.sum()]]
        return table.rename(index=shortened).rename_axis(columns="mean of").to_string()
    counts = pd.concat([counts, images.to_frame("all").T]).astype(int).rename(index=shortened)
    extremes = pd.DataFrame({"smallest fold": counts.min(axis=1), "largest fold": counts.max(axis=1)})
    table = (extremes if counts.shape[1] > 10 else counts).assign(all=counts.sum(axis=1))
    if len(classes) > 20:
        largest = table[:-1].sort_values("all", ascending=False, kind="stable")
        gap = pd.DataFrame("", [f"… {len(classes) - 16} more"], table.columns)
        table = pd.concat([largest[:8], gap, largest[-8:], table[-1:]])
    with pd.option_context("display.unicode.east_asian_width", True):
        return table.rename_axis(columns=tasks.TASKS[task].noun).to_string()


def shortened(name, columns=24):
    """A class' name, cut to what fits the columns of a terminal (a kana or kanji takes two), without control codes."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    while sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in name) > columns:
        name = name.removesuffix("…")[:-1] + "…"
    return name
