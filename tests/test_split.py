"""Stratified grouped folds: their balance, classes that can't be learnt, and the printed table."""

from common import UserError

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from kit.data.labels import class_labels
from kit.folds.split import (
    assign_folds,
    classes_missing_from_training,
    fold_table,
    make_folds,
    rarest_labels,
    unlearnt_images,
)
from kit.score.tasks import Classes


def drawn_groups(seed, classes=3, pure=True):
    """Return groups int [N] of 1 to 12 images, and targets int [N]: one for each group, or one for each image."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(90), rng.integers(1, 13, 90))
    targets = rng.choice(classes, len(groups), p=[0.6, 0.3, 0.1])
    return groups, targets[groups] if pure else targets


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_group_is_split_and_no_fold_is_far_from_its_share(seed, pure):
    groups, targets = drawn_groups(seed, pure=pure)
    folds = assign_folds(groups, targets, 5, seed)
    assert (pd.Series(folds).groupby(groups).nunique() == 1).all()
    counts = pd.crosstab(folds, targets).reindex(range(5), fill_value=0).assign(all=np.bincount(folds, minlength=5))
    assert ((counts - counts.sum() / 5).abs() <= np.bincount(groups).max()).all(axis=None)
    assert np.array_equal(folds, assign_folds(groups, targets, 5, seed))
    assert not np.array_equal(folds, assign_folds(groups, targets, 5, seed + 1)), "the seed decides"


@pytest.mark.parametrize(("classes", "groups_each"), [(20, 7), (3, 4), (2, 4)])
def test_leftover_groups_of_several_classes_go_to_different_folds(classes, groups_each):
    """Each class has more groups than folds, or fewer: the ties must not all go to the first folds."""
    groups = np.arange(classes * groups_each * 10) // 10
    counts = np.bincount(assign_folds(groups, groups // groups_each, 5, 777), minlength=5)
    assert np.abs(counts - counts.mean()).max() <= 10, counts


def test_groups_of_one_image_give_scikit_learns_stratified_folds():
    targets = np.random.default_rng(0).choice(3, 200, p=[0.5, 0.3, 0.2])
    names = np.random.default_rng(1).permutation(200)
    splits = StratifiedKFold(4, shuffle=True, random_state=5).split(targets, targets)
    for fold, (_, held_out) in enumerate(splits):
        assert np.flatnonzero(assign_folds(names, targets, 4, 5) == fold).tolist() == held_out.tolist()


def test_folds_are_about_as_balanced_as_scikit_learns_grouped_folds():
    def unevenness(folds, targets):
        counts = pd.crosstab(folds, targets)
        return ((counts - counts.mean()).abs() / counts.mean()).mean(axis=None)

    ours, theirs = [], []
    for seed in range(6):
        groups, targets = drawn_groups(seed, pure=False)
        folds, splitter = np.empty(len(groups), int), StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fold, (_, held_out) in enumerate(splitter.split(groups, targets, groups)):
            folds[held_out] = fold
        ours.append(unevenness(assign_folds(groups, targets, 5, seed), targets))
        theirs.append(unevenness(folds, targets))
    assert np.mean(ours) < 1.3 * np.mean(theirs) < 0.2


@pytest.mark.parametrize("seed", range(10))
def test_a_class_in_two_groups_is_in_the_training_images_groups_each_fold(seed):
    groups = np.arange(240) // 4
    targets = groups % 2
    targets[[0, 1, 130]] = 2
    assert classes_missing_from_training(assign_folds(groups, targets, 5, seed), targets) == []


@pytest.mark.parametrize(
    ("strata", "missing"),
    [
        ([0, 0, 0, 1, 1, 1, 0, 0, 0], []),
        ([0, 0, 0, 1, 1, 0, 0, 0, 0], [1]),  # fold 2 has no AUC
        ([0, 0, 0, 1, 1, 0, 2, 2, 0], []),
        ([0, 0, 0, 1, 1, 0, 2, 0, 2], [2]),  # both images are in fold 0
    ],
)
def test_a_class_must_be_in_two_folds_and_each_of_two_classes_in_all(strata, missing):
    folds = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0])
    assert classes_missing_from_training(folds, np.array(strata)) == missing


def test_labels_that_some_fold_keeps_from_training_and_their_images():
    """Label 0 is in two folds, label 1 in one, nobody has label 2."""
    strata = np.zeros((6, 3), bool)
    strata[[0, 1, 2], 0] = strata[[3, 4], 1] = True
    folds = np.array([0, 1, 2, 2, 2, 0])
    assert classes_missing_from_training(folds, strata) == [1]
    assert unlearnt_images(folds, strata) == 2
    assert unlearnt_images(folds, np.array([0, 0, 0, 1, 1, 2])) == 3, "two of class 1, one of class 2"


def test_the_rarest_label_of_each_image_is_the_first_of_equally_rare_ones():
    strata = np.random.default_rng(0).random((50, 8)) < [0.5, 0.3, 0.3, 0.1, 0.1, 0.05, 0.02, 0]
    expected = np.where(strata, strata.sum(axis=0), len(strata) + 1).argmin(axis=1)
    assert rarest_labels(strata).tolist() == expected.tolist()
    assert rarest_labels(np.array([2, 0, 1])).tolist() == [2, 0, 1]


def test_fewer_groups_than_folds_and_a_fold_without_one_of_two_classes_are_refused():
    labels = class_labels("train.csv", [*range(12)], ["a", "b"] * 6, "")
    with pytest.raises(UserError, match=r"fewer groups of images than folds \(3\)"):
        make_folds(labels, np.arange(12) // 4, 4, 0)
    with pytest.raises(UserError, match=r"a fold lacks b \(images: 6, groups: 1\)"):
        make_folds(labels, np.array([i if i % 2 == 0 else 1 for i in range(12)]), 3, 0)


# ---------------------------------------------------------------- the printed table


def test_fold_table_of_81_classes_fits_the_screen():
    names = [f"class {c:02} with a name that is too long to be shown" for c in range(81)]
    targets = np.repeat(np.arange(81), 10 + np.arange(81))
    folds = pd.DataFrame(dict(target=targets, fold=np.arange(len(targets)) % 5))
    lines = fold_table(folds, Classes(names)).splitlines()
    assert len(lines) == 1 + 8 + 1 + 8 + 1
    assert lines[0].split() == "class fold 0 fold 1 fold 2 fold 3 fold 4 all".split()
    assert lines[1].startswith("class 80 ")
    assert lines[1].split()[-1] == "90"
    assert lines[9].strip() == "… 65 more"
    assert lines[-2].startswith("class 00 ")
    assert lines[-2].split()[-1] == "10"
    assert lines[-1].split() == ["all", "810", "810", "810", "810", "810", "4050"]
    assert len({len(line) for line in lines[:9]}) == 1, "the columns are aligned"


@pytest.mark.parametrize(("classes", "folds"), [(2, 3), (2, 40), (300, 10)])
def test_fold_table_is_never_wider_than_120_columns(classes, folds):
    names = ["食品" * 30, *(f"{c}\n\x1b[31m" for c in range(1, classes))]
    targets = np.arange(999 * classes)
    table = pd.DataFrame(dict(target=targets % classes, fold=targets // 7 % folds))
    text = fold_table(table, Classes(names))
    widths = [sum(2 if c in "食品" else 1 for c in line) for line in text.splitlines() if "more" not in line]
    assert max(widths) <= 120
    assert len(set(widths)) == 1, "aligned on the screen, where a kanji takes two columns"
    assert "\x1b" not in text
    assert len(text.splitlines()) == (4 if classes == 2 else 19)
    assert str(999 * classes) in text.splitlines()[-1]
