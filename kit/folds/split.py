"""Stratified grouped folds: groups that the user names, their assignment to folds, the table of classes and folds."""

import re
import unicodedata
from pathlib import Path

from common import UserError, say

import numpy as np
import pandas as pd

from kit.data.image_source import fold, normalize
from kit.data.prepared import NO_GROUPS
from kit.data.tables import MISSING, check_unique, column, read_table, refuse


def given_groups(flags, names, table, image_column):
    """Return the group of each image, int [N]: images share one by what --group-pattern finds in their names, by
    --groups, a column of the training `table` (or None) or a FILE.csv, or by both. flags: the Flags."""
    given = [groups_by_pattern(flags.group_pattern, names)] if flags.group_pattern else []
    if flags.groups not in NO_GROUPS:
        given.append(groups_by_table(flags, names, table, image_column))
    return components(np.concatenate([links(groups) for groups in given]), len(names))


def groups_by_pattern(pattern, names):
    """Return the group of each image, int [N], by what the regular expression finds in its name."""
    try:
        matches = [re.search(pattern, name) for name in names]
    except re.error as error:
        raise UserError(f"--group-pattern {pattern!r} is no regular expression ({error})") from None
    keys = pd.Series([match and match[match.re.groups and 1] for match in matches], names, dtype=object)
    refuse("--group-pattern", [*keys.index[keys.isna()]], f"{pattern!r} finds nothing in *")
    return pd.factorize(keys)[0]


def groups_by_table(flags, names, table, image_column):
    """Return the group of each image, int [N], by --groups, a column of the training `table` (or None) or a FILE.csv,
    where blank cells, nan, NA and the like are groups of their own. Names in a file may have other folders and endings,
    or none. Raises UserError where an image has several groups, or none."""
    groups, alike = flags.groups, [str]
    if groups.endswith(".csv"):
        path = Path(groups) if Path(groups).exists() else flags.input / groups
        table = read_table(path, "name a table with the columns image_name,group with --groups", "yes")
        columns = [*table.columns]
        refuse(path, columns != ["image_name", "group"] and columns, "has the columns *: it needs image_name,group")
        image_column, groups = columns
        check_unique(path, table.columns[image_column])
        alike += [without_ending, lambda name: without_ending(name).rpartition("/")[2]]
    refuse("--groups", table is None, f"{groups} is a column of a table, and there is none: give a FILE.csv")
    cells = table.columns[column(table, groups, "--groups")]
    cells = ["" if cell.strip().lower() in MISSING else cell.strip() for cell in cells]
    group_of = dict(zip(table.columns[image_column], cells, strict=True))
    several = [name for name, cell in zip(table.columns[image_column], cells, strict=True) if cell != group_of[name]]
    refuse(table.path, dict.fromkeys(several), f"has several cells in column {groups!r} for *: keep one group of each")
    lacking = [name for name in names if name not in group_of]
    for form in alike:
        listed = {form(name): cell for name, cell in group_of.items()}
        found = [listed.get(form(name)) for name in names]
        if len(listed) == len(group_of) and len({*map(form, names)}) == len({*names}) and None not in found:
            break
    else:
        refuse(table.path, lacking, "has no group for *: add them")
    keys = [cell or i for i, cell in enumerate(found)]
    if blank := sum(isinstance(key, int) for key in keys):
        say(f"{blank} images have a blank cell for their group: each is a group of its own")
    return pd.factorize(pd.Series(keys, dtype=object))[0]


def without_ending(name):
    """Return an image's name without its ending, with folders in lower case."""
    return fold(normalize(name))[0]


def links(groups):
    """Return pairs, int [N, 2], that connect the images of each group (int [N]): each image and its group's first."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return np.stack([first[group], np.arange(len(groups))], axis=1)


def components(pairs, count):
    """Return the group of each image, int [count], numbered by first image: those that `pairs` connect share one."""
    from scipy.sparse import coo_matrix, csgraph  # here, since 01 reads this file and needn't wait for it

    graph = coo_matrix((np.ones(len(pairs)), pairs.T), (count, count))
    return pd.factorize(csgraph.connected_components(graph, directed=False)[1])[0]


def make_folds(labels, groups, count, seed):
    """Return the table folds.csv: shuffled stratified folds (thesis 3.1.2) of TrainingLabels, no group (int [N]) split.
    Raises UserError where the groups are fewer than the folds, or one of two classes isn't in all folds."""
    task, number, flag = labels.task, len(np.unique(groups)), f"--folds {count}:"
    refuse(flag, number < count, f"fewer groups of images than folds ({number}): lower it, or see --groups")
    strata = task.strata(labels.targets)
    folds = assign_folds(groups, strata, count, seed)
    missing = classes_missing_from_training(folds, strata) if task.is_binary else []
    few = [f"{task.names[k]} (images: {sum(strata == k)}, groups: {len({*groups[strata == k]})})" for k in missing]
    refuse(flag, few, "a fold lacks *: lower it, add images, or see --groups")
    columns = dict(image_name=labels.names, label=labels.cells, target=task.write_targets(labels.targets))
    return pd.DataFrame(columns | dict(group=groups, fold=folds))


def classes_missing_from_training(folds, strata):
    """Return the classes or labels, a list of int, that some fold's model can't learn, as all their images are in that
    fold; for two classes, those that a fold lacks, since its AUC is undefined. folds int [N]; strata as the task's."""
    several = strata.ndim == 2
    if several:
        counts = np.sum([strata[folds == fold].any(axis=0) for fold in np.unique(folds)], axis=0)
    else:
        counts = np.bincount(np.unique(np.stack([strata, folds]), axis=1)[0])
    # of folds that have the class
    least = len(np.unique(folds)) if np.count_nonzero(counts) == 2 and not several else 2
    return np.flatnonzero((counts > 0) & (counts < least)).tolist()


def unlearnt_images(folds, strata):
    """Return how many images have a class or label that some fold's model can't learn; arguments as above."""
    missing = classes_missing_from_training(folds, strata)
    return int((strata[:, missing].any(axis=1) if strata.ndim == 2 else np.isin(strata, missing)).sum())


def rarest_labels(strata):
    """Return the rarest label of each image, int [N], 0 where it has none, from labels bool [N, K]; classes int [N] as
    they are."""
    if strata.ndim == 1:
        return strata
    images, labels = np.nonzero(strata)
    order = np.lexsort([-labels, -strata.sum(axis=0)[labels]])
    rarest = np.zeros(len(strata), np.int64)
    rarest[images[order]] = labels[order]  # the last one stays
    return rarest


def assign_folds(groups, strata, count, seed):
    """Return the fold of each image, int [N]. No group (int [N]) is split, and each of `count` folds gets its share of
    the images and of each class (strata int [N]) or label (strata bool [N, K]). Groups of one image each give
    scikit-learn's stratified folds, the thesis'. Otherwise the largest group comes first, for labels the group with the
    rarest label (iterative stratification, Sechidis et al. 2011), and each goes to the fold in which its classes, and
    then images, are rarest so far: as even as scikit-learn's grouped folds, and 15 times as fast."""
    groups = pd.factorize(np.asarray(groups))[0]  # by first image: other names for the groups make no other folds
    sizes, several = np.bincount(groups), strata.ndim == 2
    if not several and len(sizes) == len(groups) and np.unique(strata, return_counts=True)[1].min() >= count:
        from sklearn.model_selection import StratifiedKFold  # here, since 01 reads this file and needn't wait for it

        folds, splitter = np.empty(len(strata), np.int64), StratifiedKFold(count, shuffle=True, random_state=seed)
        for fold, (_, held_out) in enumerate(splitter.split(strata, strata)):
            folds[held_out] = fold
        return folds
    owners, classes = np.nonzero(strata) if several else (slice(None), strata)
    share = 1 / np.maximum(1, np.bincount(classes, minlength=1))  # one image as a part of its class
    (cell_group, cell_class), counts = np.unique(np.stack([groups[owners], classes]), axis=1, return_counts=True)
    first = np.searchsorted(cell_group, range(len(sizes) + 1))  # group g has the cells first[g] to first[g + 1]
    priority = np.zeros(len(sizes)) if several else sizes.astype(float)
    np.maximum.at(priority, cell_group, share[cell_class])
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    fold_of, image_shares, class_shares = np.empty(len(sizes), np.int64), np.zeros(count), np.zeros((count, len(share)))
    for group in shuffled[np.argsort(-priority[shuffled], kind="stable")]:
        members, number = (cells[first[group] : first[group + 1]] for cells in (cell_class, counts))
        shares = number * share[members]
        fold = fold_of[group] = (class_shares[:, members] @ shares + image_shares * sizes[group] / len(groups)).argmin()
        class_shares[fold, members] += shares
        image_shares[fold] += sizes[group] / len(groups)
    return fold_of[groups]


def fold_table(folds, task):
    """Return folds.csv as text of at most 120 columns: the images of each class or label in each fold, or the means of
    numbers. Of more than 20 classes the 8 largest and the 8 smallest, of more than 10 folds the extremes are shown."""
    targets = task.read_targets(folds.target)
    counts = task.by_fold(targets, folds.fold.to_numpy()).add_prefix("fold ")
    images = folds.fold.value_counts().sort_index().add_prefix("fold ")
    if not task.counted:
        table = counts.assign(all=np.nanmean(targets, axis=0)).map("{:.4g}".format)
        table.loc["images"] = [str(count) for count in [*images, images.sum()]]
        return table.rename(index=shortened).rename_axis(columns="mean of").to_string()
    counts = pd.concat([counts, images.to_frame("all").T]).astype(int).rename(index=shortened)
    extremes = pd.DataFrame({"smallest fold": counts.min(axis=1), "largest fold": counts.max(axis=1)})
    table = (extremes if counts.shape[1] > 10 else counts).assign(all=counts.sum(axis=1))
    if len(task) > 20:
        largest = table[:-1].sort_values("all", ascending=False, kind="stable")
        gap = pd.DataFrame("", [f"… {len(task) - 16} more"], table.columns)
        table = pd.concat([largest[:8], gap, largest[-8:], table[-1:]])
    with pd.option_context("display.unicode.east_asian_width", True):
        return table.rename_axis(columns=task.noun).to_string()


def shortened(name, columns=24):
    """Return a class' name without control codes, cut to `columns` of a terminal; a kana or kanji takes two."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    while sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in name) > columns:
        name = name.removesuffix("…")[:-1] + "…"
    return name
