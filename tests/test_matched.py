"""Folds matched to the test set: how groups are dealt, the ladder of clusters, the chosen rung, what 00 makes of it."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import done, png, write_csv, write_zip
from PIL import Image
from scipy.stats import wasserstein_distance
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from kit.folds import matching, shift
from kit.folds.split import deal, scarce
from kit.report import figures, pictures
from kit.score import intervals

EACH = 20  # images of a subject


def subjects(count, seed=0, dimensions=32, spread=0.5):
    """Subjects as blobs on the unit sphere. → points float32 [N, D], the subject of each."""
    rng, subject = np.random.default_rng(seed), np.repeat(np.arange(count), EACH)
    centres, noise = rng.normal(size=(count, dimensions)), rng.normal(size=(len(subject), dimensions))
    points = matching.unit(centres)[subject] + spread * noise / np.sqrt(dimensions)
    return matching.unit(points).astype(np.float32), subject


def matched_to(case, seed=0):
    """A training set of 30 subjects, each of one of three classes, and a test set of `case`. → the chosen rung, all
    rungs, and the subject of each training image."""
    points, subject = subjects(40, seed)
    order = np.random.default_rng(seed).permutation(30 * EACH)
    new = np.flatnonzero((subject >= 30) & (subject < 38))
    seen, known = np.sort(order[: 30 * EACH - 160]), order[30 * EACH - 160 :]
    test = dict(known=known, new=new, both=np.concatenate([known, new]))[case]
    sources, targets = np.arange(len(seen)), subject[seen] % 3
    result = matching.match(points[np.concatenate([seen, test])], sources, targets, 5, 777, "accuracy")
    return SimpleNamespace(
        chosen=result[0], rungs=result[1], subject=subject[seen], targets=targets, points=points[seen]
    )


def split(folds, groups):
    """→ the share of the groups that lie in several folds."""
    return (pd.Series(folds).groupby(groups).nunique() > 1).mean()


def drawn_groups(seed, classes=3, pure=True):
    """→ groups int [N] of 1 to 12 images, targets int [N]: of each group one, or drawn for each image."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(90), rng.integers(1, 13, 90))
    of = rng.choice(classes, len(groups), p=[0.6, 0.3, 0.1])
    return groups, of[groups] if pure else of


# ---------------------------------------------------------------- groups are dealt to folds


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_group_is_split_and_no_fold_is_far_from_its_share(seed, pure):
    groups, targets = drawn_groups(seed, pure=pure)
    folds = deal(groups, targets, 5, seed)
    assert split(folds, groups) == 0
    counts = pd.crosstab(folds, targets).reindex(range(5), fill_value=0).assign(all=np.bincount(folds, minlength=5))
    assert ((counts - counts.sum() / 5).abs() <= np.bincount(groups).max()).all(axis=None)
    assert np.array_equal(folds, deal(groups, targets, 5, seed))
    assert not np.array_equal(folds, deal(groups, targets, 5, seed + 1)), "the seed decides"


@pytest.mark.parametrize(("classes", "of_each"), [(20, 7), (3, 4), (2, 4)])
def test_leftover_groups_of_several_classes_go_to_different_folds(classes, of_each):
    """Of each class there are more groups, or fewer, than folds: the ties must not all go to the first folds."""
    groups = np.arange(classes * of_each * 10) // 10
    counts = np.bincount(deal(groups, groups // of_each, 5, 777), minlength=5)
    assert np.abs(counts - counts.mean()).max() <= 10, counts


def test_groups_of_one_image_give_scikit_learns_stratified_folds():
    targets = np.random.default_rng(0).choice(3, 200, p=[0.5, 0.3, 0.2])
    names = np.random.default_rng(1).permutation(200)
    splits = StratifiedKFold(4, shuffle=True, random_state=5).split(targets, targets)
    for fold, (_, held_out) in enumerate(splits):
        assert np.flatnonzero(deal(names, targets, 4, 5) == fold).tolist() == held_out.tolist()


def test_balance_is_much_that_of_scikit_learns_grouped_folds():
    def unevenness(folds, targets):
        counts = pd.crosstab(folds, targets)
        return ((counts - counts.mean()).abs() / counts.mean()).mean(axis=None)

    ours, theirs = [], []
    for seed in range(6):
        groups, targets = drawn_groups(seed, pure=False)
        folds, splitter = np.empty(len(groups), int), StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fold, (_, held_out) in enumerate(splitter.split(groups, targets, groups)):
            folds[held_out] = fold
        ours.append(unevenness(deal(groups, targets, 5, seed), targets))
        theirs.append(unevenness(folds, targets))
    assert np.mean(ours) < 1.3 * np.mean(theirs) < 0.2


@pytest.mark.parametrize("seed", range(10))
def test_a_class_in_two_groups_is_never_held_out_whole(seed):
    groups = np.arange(240) // 4
    targets = groups % 2
    targets[[0, 1, 130]] = 2
    assert scarce(deal(groups, targets, 5, seed), targets) == []


def test_a_class_needs_two_folds_and_each_of_two_classes_needs_all():
    folds = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0])
    assert scarce(folds, np.array([0, 0, 0, 1, 1, 1, 0, 0, 0])) == []
    assert scarce(folds, np.array([0, 0, 0, 1, 1, 0, 0, 0, 0])) == [1], "fold 2 has no AUC"
    assert scarce(folds, np.array([0, 0, 0, 1, 1, 0, 2, 2, 0])) == []
    assert scarce(folds, np.array([0, 0, 0, 1, 1, 0, 2, 0, 2])) == [2], "both images are in fold 0"


# ---------------------------------------------------------------- clusters


def test_clusters_are_as_many_as_asked():
    points, subject = subjects(30)
    for count, labels in zip([100, 30, 9], matching.clusterings(points, [100, 30, 9], 777), strict=True):
        assert len(np.unique(labels)) == count
        if count <= 30:
            assert split(labels, subject) == 0


def test_clusters_of_many_images_are_much_the_same(monkeypatch):
    """1,000 images where 200 are learnt from at once: neither the parts nor the levels show."""
    monkeypatch.setattr(matching, "MOST", 200)
    monkeypatch.setattr(
        matching, "linkage", lambda points, *way, plain=matching.linkage: small(points) or plain(points, *way)
    )

    def small(points):
        assert len(points) <= 200

    points, subject = subjects(50, spread=0.2)
    counts = [500, 250, 110, 90, 50, 25, 10]
    several = matching.clusterings(points, counts, 777)
    for count, labels in zip(counts, several, strict=True):
        assert len(np.unique(labels)) == pytest.approx(count, abs=3)
        assert sorted(np.unique(labels)) == [*range(labels.max() + 1)]
        if count <= 50:
            assert split(labels, subject) == 0, f"of {count}"
        else:
            assert split(subject, labels) == 0, f"of {count}"
    for labels, again in zip(several, matching.clusterings(points, counts, 777), strict=True):
        assert np.array_equal(labels, again)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_of_the_images_is_released_in_whole_clusters(share):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), rng.integers(1, 25, 40))
    source = np.arange(len(labels)) // 2
    labels[1::2] = labels[: len(labels) // 2 * 2 : 2]  # copies lie in one cluster
    groups = matching.release(labels, source, share, 777)
    assert split(groups, source) == 0, "copies stay together"
    assert split(labels, groups) == 0, "a group is a cluster or a part of it"
    released = np.bincount(groups)[groups] < np.bincount(labels)[labels]
    assert released.mean() == pytest.approx(share, abs=np.bincount(labels).max() / len(labels))
    assert (np.bincount(groups)[groups][released] == 2).all()
    assert (pd.Series(released).groupby(labels).nunique() == 1).all(), "clusters are released whole"
    assert not np.array_equal(groups, matching.release(labels, source, share, 778))


def test_nothing_is_released_of_a_share_of_none():
    labels = np.repeat(np.arange(4), 5)
    assert np.array_equal(matching.release(labels, np.arange(20), 0, 777), labels)


def test_no_cluster_holds_more_than_half_of_a_class():
    rng = np.random.default_rng(0)
    source, targets = np.arange(120) // 2, np.repeat(rng.choice(4, 60, p=[0.7, 0.2, 0.05, 0.05]), 2)
    labels = np.where(targets > 1, 0, source % 3)  # both rare classes lie in one cluster
    apart = matching.keep_classes_apart(labels, source, source, targets)
    held = pd.crosstab(apart, targets)
    assert (held.max() <= held.sum() / 2).all()
    assert split(apart, source) == 0
    common = targets == 0
    assert split(apart[common], labels[common]) == 0, "who holds less stays together"
    assert len(np.unique(apart)) > 3


def test_a_class_of_one_source_stays_whole():
    source, targets = np.array([0, 0, 1, 2, 3, 4]), np.array([1, 1, 0, 0, 0, 0])
    apart = matching.keep_classes_apart(np.zeros(6, int), source, source, targets)
    assert apart[0] == apart[1]


def test_copies_with_different_labels_stay_together_where_classes_are_kept_apart():
    """Image 1 is a copy of image 0 under another label; the cluster holds most of class 0 but not of class 1."""
    labels, source = np.array([0, 0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 2, 3, 4, 5])
    apart = matching.keep_classes_apart(labels, source, source, np.array([0, 1, 0, 0, 1, 1, 0]))
    assert apart[0] == apart[1]


# ---------------------------------------------------------------- the chosen rung


@pytest.mark.parametrize("seed", range(2))
def test_known_subjects_ask_for_plain_folds(seed):
    found = matched_to("known", seed)
    assert found.chosen is found.rungs[0]
    assert found.chosen.name == "each image alone"
    assert split(found.chosen.folds, found.subject) == 1


@pytest.mark.parametrize("seed", range(2))
def test_new_subjects_ask_for_folds_that_hold_out_whole_subjects(seed):
    found = matched_to("new", seed)
    assert found.chosen.clusters
    assert split(found.chosen.folds, found.subject) < 0.1
    assert found.chosen.distance < 0.3 * found.rungs[0].distance
    assert np.median(found.chosen.held_out) == pytest.approx(np.median(found.chosen.test), abs=0.1)
    near = matching.alike(found.rungs)
    assert found.chosen in near
    assert found.chosen.held_out.mean() == min(rung.held_out.mean() for rung in near), "the hardest of those that match"
    scores = {rung: matching.head_score(found.points, found.targets, rung.folds, "accuracy") for rung in near}
    for rung in found.rungs:
        assert rung.score == scores.get(rung, rung.score if not rung.clusters else None)
    assert found.rungs[0].score > 0.85 > 0.45 > found.chosen.score, "the class goes with the subject"


@pytest.mark.parametrize("seed", range(2))
def test_known_and_new_subjects_ask_for_some_of_both(seed):
    found = matched_to("both", seed)
    assert 0 < found.chosen.released < 1
    assert 0.2 < split(found.chosen.folds, found.subject) < 0.8
    assert found.chosen.distance < 0.3 * found.rungs[0].distance
    assert found.chosen.distance < min(rung.distance for rung in found.rungs if not rung.released)


def test_the_larger_share_of_new_subjects_asks_the_harder_folds():
    chosen = [matched_to(case).chosen for case in ("known", "both", "new")]
    means = [rung.held_out.mean() for rung in chosen]
    assert means == sorted(means, reverse=True)
    assert chosen[0].score > chosen[1].score > chosen[2].score


def test_copies_stay_in_one_fold_on_every_rung_but_the_first():
    points, subject = subjects(12)
    alone = np.arange(0, len(points), 2)
    train, source = points[np.repeat(alone, 2)], np.repeat(np.arange(len(alone)), 2)
    chosen, rungs = matching.match(
        np.concatenate([train, points[alone + 1]]), source, subject[np.repeat(alone, 2)] % 2, 5, 777, "auc"
    )
    assert [rung.name for rung in rungs[:2]] == ["each image alone", "copies of one source together"]
    assert split(rungs[0].folds, source) > 0.5
    assert [split(rung.folds, source) for rung in rungs[1:]] == [0] * (len(rungs) - 1)
    assert len(rungs) > 10
    assert chosen is rungs[1], "the test images are of known subjects, and no copies"
    assert np.median(rungs[0].held_out) == pytest.approx(1, abs=1e-5), "a held-out image's copy was seen"


def test_a_rung_that_would_hold_out_a_whole_class_is_left_out():
    """Class 2 has two images: the rungs that are left have them in two folds. A class of one image, which no folds can
    help, decides nothing."""
    found = matched_to("new")
    targets = np.where(np.arange(len(found.targets)) < 2, 2, found.targets % 2)
    rungs = matching.ladder(found.points, np.arange(len(targets)), targets, 5, 777)
    assert [scarce(rung.folds, targets) for rung in rungs] == [[]] * len(rungs)
    one = np.where(np.arange(len(found.targets)) < 1, 2, found.targets % 2)
    rungs = matching.ladder(found.points, np.arange(len(one)), one, 5, 777)
    assert len(rungs) > 10
    assert [scarce(rung.folds, one) for rung in rungs] == [[2]] * len(rungs)


@pytest.mark.parametrize(("sources", "tests", "enough"), [(39, 60, False), (60, 39, False), (40, 40, True)])
def test_of_too_few_images_nothing_is_said(sources, tests, enough):
    points = subjects(8)[0]
    source = np.arange(100) % sources
    result = matching.match(points[: 100 + tests] if tests else points, source, np.arange(100) % 2, 5, 777, "auc")
    assert bool(result[1]) == enough
    assert (result[0] is None) == (not enough)


@pytest.mark.parametrize("count", [10, 20])
def test_more_folds_than_the_last_rung_has_clusters(count):
    """The last rungs have 8 to 11 clusters: such a rung can't fill 20 folds."""
    found = matched_to("new")
    train, test = found.points[:200], found.points[200:260]
    targets = np.arange(200) % 3
    rungs = matching.match(np.concatenate([train, test]), np.arange(200), targets, count, 777, "accuracy")[1]
    assert rungs
    assert all(np.bincount(rung.folds, minlength=count).min() > 0 for rung in rungs)


def test_similarities_and_distance_counted_by_hand():
    rng = np.random.default_rng(0)
    train, test = (matching.unit(rng.normal(size=(n, 6))).astype(np.float32) for n in (30, 11))
    rungs = [matching.Rung("", 0, 0, np.arange(30), folds) for folds in (np.arange(30) % 3, np.arange(30) // 10)]
    matching.compare(rungs, train, test, 3, 777, block=7)
    for rung in rungs:
        others = [[train[i] @ train[j] for j in range(30) if rung.folds[j] != rung.folds[i]] for i in range(30)]
        held_out = np.max(others, axis=1)
        left = [[max(image @ train[j] for j in range(30) if rung.folds[j] != k) for k in range(3)] for image in test]
        assert np.sort(rung.held_out) == pytest.approx(np.sort(held_out), abs=1e-5)
        assert np.sort(rung.test.ravel()) == pytest.approx(np.sort(np.ravel(left)), abs=1e-5)
        assert rung.distance == pytest.approx(wasserstein_distance(held_out, np.ravel(left)), abs=1e-5)


def test_some_images_stand_for_many(monkeypatch):
    found = matched_to("new")
    monkeypatch.setattr(matching, "ASKED", 50)
    rung = matching.Rung("", 0, 0, None, np.arange(300) % 5)
    matching.compare([rung], found.points[:300], found.points[300:], 5, 777)
    assert len(rung.held_out) == 50
    assert rung.test.size == 250
    exact = matching.Rung("", 0, 0, None, rung.folds)
    monkeypatch.setattr(matching, "ASKED", 10_000)
    matching.compare([exact], found.points[:300], found.points[300:], 5, 777)
    assert rung.held_out.mean() == pytest.approx(exact.held_out.mean(), abs=0.05)
    assert np.isin(rung.held_out.round(4), exact.held_out.round(4)).all()


def test_what_is_said_of_the_ladder():
    plain = dict(name="each image alone", clusters=0, similarity=0.9, test_similarity=0.51, score=0.99)
    plain |= dict(chosen=True, matches=True)
    assert matching.report_lines(None) == matching.report_lines([]) == []
    first, figures = matching.report_lines([plain])
    assert first == "each image alone: these match the test set (matched.png)"
    assert figures.endswith("0.90 held out, 0.51 test")
    first, _ = matching.report_lines([plain | dict(matches=False)])
    assert first == "no folds match the test set; each image alone come nearest (matched.png)"
    chosen = plain | dict(name="20 clusters", clusters=20, similarity=0.5, test_similarity=0.52, score=0.8)
    first, figures, scores = matching.report_lines([plain | dict(chosen=False), chosen])
    assert first == "matched folds, 20 clusters (matched.png)"
    assert figures.endswith("0.50 held out, 0.52 test, 0.90 in plain folds")
    assert scores == "a ridge regression scores 0.990 in plain folds, 0.800 in these"


def test_a_test_set_unlike_all_folds_matches_none():
    """It shows the training images themselves, or something else altogether: the rung that comes nearest is chosen."""
    found = matched_to("known")
    train = found.points
    elsewhere = np.hstack([np.zeros_like(train), np.ones_like(train[:, :1])])[:60]
    train = np.hstack([train, np.zeros_like(train[:, :1])])
    for tests, where in ((train, "nearest"), (elsewhere, "farthest")):
        given = np.concatenate([train, tests]), np.arange(len(train)), found.targets, 5, 777, "accuracy"
        chosen, rungs = matching.match(*given)
        assert not matching.matches(chosen)
        assert chosen.distance == min(rung.distance for rung in rungs)
        held_out = [rung.held_out.mean() for rung in rungs]
        assert chosen.held_out.mean() == pytest.approx(dict(nearest=max, farthest=min)[where](held_out), abs=0.02)


def test_copies_stay_together_where_plain_folds_match():
    found = matched_to("known")
    train, tests, targets = found.points[::2], found.points[1::2], found.targets[::2]
    points = np.concatenate([train, train[:3], tests])
    sources, targets = np.append(np.arange(len(train)), range(3)), np.append(targets, targets[:3])
    chosen, rungs = matching.match(points, sources, targets, 5, 777, "accuracy")
    assert chosen is rungs[1]
    assert chosen.folds[:3].tolist() == chosen.folds[-3:].tolist()


# ---------------------------------------------------------------- the description and the picture


def test_words_and_colours_are_whitened_by_themselves_and_weigh_alike():
    rng = np.random.default_rng(0)
    loud, faint = rng.normal(size=(400, 3)) * [100, 1, 1], rng.normal(size=(400, 2))
    white = matching.whitened(np.hstack([loud, faint]), 4, 777, block=64)
    assert white.shape == (400, 4)
    assert np.linalg.norm(white, axis=1) == pytest.approx(1, abs=1e-5)
    assert (white**2).mean(axis=0) == pytest.approx(0.25, abs=0.03), "the loud one doesn't drown the others"


def test_each_image_is_shown_beside_the_nearest_that_its_model_has_seen():
    points, _ = subjects(3)
    train, test, folds = points[:40], points[40:], np.arange(40) % 4
    images = dict(train=np.arange(40), test=np.arange(100, 120))
    names = dict(train=[f"r{i}" for i in range(40)], test=[f"t{i}" for i in range(20)])
    for asked, of in ((test, None), (train, folds)):
        (title, first), (_, second) = pictures.look("title", asked, train, of, images, names, 777)
        assert ("of the other folds" in title) == (of is not None)
        cells = first + second
        assert len(first) == len(second) == figures.COLUMNS
        for (image, caption), (nearest, beside) in zip(cells[::2], cells[1::2], strict=True):
            i = image - 100 if of is None else image
            allowed = np.arange(40) if of is None else np.flatnonzero(folds != folds[i])
            similar = train[allowed] @ asked[i]
            assert nearest == allowed[similar.argmax()]
            assert caption == (f"test t{i}" if of is None else f"train r{i}")
            assert beside == f"{similar.max():.2f}: train r{nearest}"


# ---------------------------------------------------------------- what the leaderboard may say

LADDER = [
    dict(name="each image alone", clusters=0, score=0.95, alike=False, chosen=False, matches=True),
    dict(name="20 clusters", clusters=20, score=0.8, alike=True, chosen=True, matches=True),
    dict(name="14 clusters", clusters=14, score=0.7, alike=True, chosen=False, matches=True),
    dict(name="10 clusters", clusters=10, score=None, alike=False, chosen=False, matches=True),
]
DRAWS = np.array([*np.linspace(0.85, 0.95, 101), np.nan, np.inf])


def score_of(odds, perfect=1.0):
    return perfect / (1 + odds)


def test_the_interval_spans_the_rungs_that_match_and_the_draws():
    """The CV's odds of an error are 1 : 9, the simple model's 1 : 4, on the other rung 3 : 7, on plain folds 1 : 19."""
    harder, easier = (0.14 / 0.86) / (1 / 9), (0.06 / 0.94) / (1 / 9)  # draws at 10 % and 90 %, to the CV
    said = intervals.leaderboard(0.9, DRAWS, 1.0, LADDER, 300, 100)  # twice as wide in log odds: sqrt(1 + 3)
    low, high = score_of(1 / 9 * (3 / 7) / (1 / 4) * harder**2), score_of(1 / 9 * easier**2)
    assert said == pytest.approx(dict(low=low, high=high, plain=171 / 175))
    wider = intervals.leaderboard(0.9, DRAWS, 1.0, LADDER, 800, 100)
    low, high = score_of(1 / 9 * (3 / 7) / (1 / 4) * harder**3), score_of(1 / 9 * easier**3)
    assert (wider["low"], wider["high"]) == pytest.approx((low, high))
    (alone,) = [dict(rung, alike=False) for rung in LADDER if rung["chosen"]]
    said = intervals.leaderboard(0.9, DRAWS, 1.0, [alone], 300, 100)
    low, high = score_of(1 / 9 * harder**2), score_of(1 / 9 * easier**2)
    assert said == pytest.approx(dict(low=low, high=high, plain=0.9)), "the chosen rung always counts"
    of_a_fifth = [rung | dict(score=rung["score"] and rung["score"] / 5) for rung in [alone]]  # as the partial AUC is
    said = intervals.leaderboard(0.18, DRAWS / 5, 0.2, of_a_fifth, 300, 100)
    assert said == pytest.approx(dict(low=low / 5, high=high / 5, plain=0.9 / 5))


def test_a_hard_rung_makes_no_score_below_none():
    ladder = [rung | dict(score=score) for rung, score in zip(LADDER, (0.95, 0.9, 0.3, None), strict=True)]
    said = intervals.leaderboard(0.6, np.full(100, 0.6), 1.0, ladder, 300, 100)
    assert said["low"] == pytest.approx(1 / (1 + (0.4 / 0.6) * (0.7 / 0.3) / (0.1 / 0.9)))


def test_where_smaller_is_better_no_loss_is_below_none():
    """The simple model's loss is 0.8 on the chosen rung, 1 on the other that matches, 0.2 on plain folds."""
    ladder = [rung | dict(score=score) for rung, score in zip(LADDER, (0.2, 0.8, 1.0, None), strict=True)]
    said = intervals.leaderboard(0.4, np.linspace(0.3, 0.5, 101), 0.0, ladder, 300, 100)
    low, high = 0.4 * (0.32 / 0.4) ** 2, 0.4 * 1.25 * (0.48 / 0.4) ** 2
    assert said == pytest.approx(dict(low=low, high=high, plain=0.1))


def test_a_simple_model_without_errors_scales_none():
    ladder = [rung | dict(score=1.0) for rung in LADDER[:3]]
    said = intervals.leaderboard(0.9, DRAWS, 1.0, ladder, 300, 100)
    harder, easier = (0.14 / 0.86) / (1 / 9), (0.06 / 0.94) / (1 / 9)
    assert said == pytest.approx(dict(low=score_of(1 / 9 * harder**2), high=score_of(1 / 9 * easier**2), plain=0.9))


def test_the_forecast_says_on_what_it_rests():
    said = dict(low=0.84, high=0.9701, plain=0.999)
    first, second = intervals.leaderboard_lines(said, LADDER)
    assert first == (
        "leaderboard, as far as can be told: 0.840 to 0.970 (matched folds, 20 clusters; plain folds would say 0.999)"
    )
    assert "what no image shows" in second
    unmatched = [rung | dict(matches=False) for rung in LADDER]
    assert intervals.leaderboard_lines(said, unmatched) == ["no forecast: no folds match the test set (matched.png)"]
    first, second = intervals.leaderboard_lines(said, [LADDER[0] | dict(chosen=True)])
    assert first == "leaderboard, as far as can be told: 0.840 to 0.970 (plain folds)"
    assert "the CV can be believed" in second
    copies = LADDER[0] | dict(name="copies of one source together", chosen=True)
    first, second = intervals.leaderboard_lines(said, [LADDER[0], copies])
    assert first.endswith("0.840 to 0.970 (copies of one source together)")
    assert "the CV can be believed" in second


# Out of fold: fold 0 is sure to 0.9, fold 1 to 0.7, and one of the four images is wrong.
OUT_OF_FOLD = np.array([[0.9, 0.1], [0.1, 0.9], [0.7, 0.3], [0.7, 0.3]]), np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])


@pytest.mark.parametrize(("sure", "said"), [(0.58, "much less: "), (0.62, "about the same, which proves nothing")])
def test_test_images_of_which_models_are_far_less_sure_are_a_warning(sure, said):
    """The folds' confidences are 0.7, 0.75 and 0.8, so 0.6 is three deviations below their mean."""
    held_out = np.array([[0.7, 0.3], [0.25, 0.75], [0.8, 0.2]]), np.array([0, 1, 1]), np.array([0, 1, 2])
    tests = [np.array([[sure - 0.05, 1.05 - sure]] * 5)] * 2 + [np.array([[sure + 0.1, 0.9 - sure]] * 5)]
    confidence, disagreement = shift.confidence_lines(*held_out, tests)
    assert confidence.startswith(f"mean confidence {sure:.3f} on the test images, 0.750 out of fold: {said}")
    assert disagreement == "two fold models disagree on 0.0% of the test images; out of fold 33.3% are wrong"
    two = held_out[2] > 0
    confidence, _ = shift.confidence_lines(*(part[two] for part in held_out), tests[:2])
    assert "much less:" not in confidence, "two folds don't say how much confidence varies"


def test_disagreement_is_counted_over_all_pairs_of_models():
    """Three models and ten images: pairs differ on 1, 3 and 4 images, some 26.7 % of 30."""
    named = np.zeros((3, 10), int)
    named[1, 0] = named[2, 1:4] = 1
    tests = [np.where(np.eye(2, dtype=bool)[row], 0.8, 0.2) for row in named]
    assert "disagree on 26.7% of the test images" in shift.confidence_lines(*OUT_OF_FOLD, tests)[1]
    assert len(shift.confidence_lines(*OUT_OF_FOLD, tests[:1])) == 1, "one model has none to disagree with"


# ---------------------------------------------------------------- by commands

SUBJECTS, NEW, OF_ONE, COPIES = 9, 5, 8, 4  # subjects in train and only in test, pictures of one, copies in train


def draw_subjects():
    """Pictures of 64 px, of each subject in its own colours, whatever is on them. → images, the subject of each."""
    rng, images = np.random.default_rng(5), []
    for _ in range(SUBJECTS + NEW):
        colours = rng.integers(0, 256, (3, 3))
        for _ in range(OF_ONE):
            image = np.empty((64, 64, 3), np.uint8)
            image[:] = colours[0]
            for _ in range(6):
                (y, x), (h, w) = rng.integers(0, 56, 2), rng.integers(8, 24, 2)
                image[y : y + h, x : x + w] = colours[rng.integers(3)]
            images.append(image)
    return images, np.repeat(np.arange(SUBJECTS + NEW), OF_ONE)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A competition whose test set shows new subjects, prepared with --groups auto. Both classes are in each subject.
    Of the first pictures there are turned copies, one of them under the other label."""
    folder = tmp_path_factory.mktemp("matched")
    images, subject = draw_subjects()
    count = SUBJECTS * OF_ONE
    images = (
        images[:count] + [np.ascontiguousarray(np.rot90(images[k * OF_ONE])) for k in range(COPIES)] + images[count:]
    )
    shown = np.concatenate([subject[:count], np.arange(COPIES)])
    labels = [*(i % 2 for i in range(count)), *(k * OF_ONE % 2 for k in range(COPIES))]
    labels[count] = 1 - labels[count]
    names, tests = [f"{i:04}.png" for i in range(len(labels))], [f"t{i:04}.png" for i in range(NEW * OF_ONE)]
    (folder / "input").mkdir()
    write_zip(folder / "input" / "train.zip", {n: png(image) for n, image in zip(names, images, strict=False)})
    write_zip(
        folder / "input" / "test.zip", {n: png(image) for n, image in zip(tests, images[len(names) :], strict=True)}
    )
    write_csv(folder / "input" / "train.csv", [("image_name", "label"), *zip(names, labels, strict=True)])
    write_csv(folder / "input" / "sample_submit.csv", [(name, 0) for name in tests])
    flags, kept = ["--input", folder / "input", "--size", 32, "--folds", 3], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "match", lambda *given, plain=matching.match: kept.append(plain(*given)) or kept[-1])
        out = done("00_prepare.py", *flags, "--output", folder / "output")
    (chosen, rungs), path = *kept, folder / "output" / "prepared"
    copy = {count + k: k * OF_ONE for k in range(COPIES)}
    return SimpleNamespace(flags=flags, out=out, path=path, chosen=chosen, rungs=rungs, subject=shown, copy=copy)


def copies_apart(folds, copy):
    return sum(folds.fold[a] != folds.fold[b] for a, b in copy.items())


def test_00_holds_out_whole_subjects_where_the_test_set_shows_new_ones(prepared):
    folds = pd.read_csv(prepared.path / "folds.csv")
    assert prepared.chosen.clusters
    assert split(folds.fold, prepared.subject) < 0.3
    assert copies_apart(folds, prepared.copy) == 0
    assert split(folds.fold, folds.group) == 0
    assert split(prepared.rungs[0].folds, prepared.subject) == 1
    assert "matched folds, " + prepared.chosen.name in prepared.out


def test_the_folds_that_are_written_are_those_that_were_judged(prepared):
    assert pd.read_csv(prepared.path / "folds.csv").fold.tolist() == prepared.chosen.folds.tolist()


def test_prepared_json_keeps_the_ladder(prepared):
    content = json.loads((prepared.path / "prepared.json").read_text())
    ladder = content["ladder"]
    assert len(ladder) == len(prepared.rungs) > 10
    (chosen,) = [rung for rung in ladder if rung["chosen"]]
    assert chosen["name"] == prepared.chosen.name
    assert chosen["alike"]
    for row, rung in zip(ladder, prepared.rungs, strict=True):
        assert (row["name"], row["clusters"], row["released"]) == (rung.name, rung.clusters, rung.released)
        assert row["similarity"] == pytest.approx(np.median(rung.held_out))
        assert row["test_similarity"] == pytest.approx(np.median(rung.test))
        assert row["distance"] == pytest.approx(wasserstein_distance(rung.held_out, rung.test.ravel()))
        assert (row["score"] is not None) == (row["alike"] or not row["clusters"])
    assert all(line in prepared.out for line in matching.report_lines(ladder))
    assert content["relatives"]["groups"] == COPIES, "clusters aren't copies"
    assert [len(names) for names in content["relatives"]["conflicts"]] == [2]


def test_matched_png_opens(prepared):
    width, height = Image.open(prepared.path / "matched.png").size
    assert width > 500
    assert height > 900, "curves, and two rows for each of three kinds"


def test_00_gives_the_same_bytes_twice(prepared, tmp_path):
    done("00_prepare.py", *prepared.flags, "--output", tmp_path)
    for name in ("folds.csv", "prepared.json", "matched.png", "duplicates.csv"):
        assert (tmp_path / "prepared" / name).read_bytes() == (prepared.path / name).read_bytes(), name


def test_groups_copies_keep_copies_together_and_no_more(prepared, tmp_path):
    out = done("00_prepare.py", *prepared.flags, "--output", tmp_path, "--groups", "copies")
    folds = pd.read_csv(tmp_path / "prepared" / "folds.csv")
    content = json.loads((tmp_path / "prepared" / "prepared.json").read_text())
    assert content["ladder"] is None
    assert content["relatives"]["groups"] == COPIES
    assert not (tmp_path / "prepared" / "matched.png").exists()
    assert "held out" not in out
    assert folds.group.value_counts().tolist() == [2] * COPIES + [1] * (len(folds) - 2 * COPIES)
    assert copies_apart(folds, prepared.copy) == 0
    assert split(folds.fold, prepared.subject) == 1


def test_a_toy_has_no_ladder_and_keeps_the_stratified_folds(toy):
    flags = toy(train=40, test=10)
    done("00_prepare.py", *flags, "--size", 32)
    path = flags[-1] / "prepared"
    assert json.loads((path / "prepared.json").read_text())["ladder"] is None
    assert not (path / "matched.png").exists()
    folds = pd.read_csv(path / "folds.csv")
    assert folds.fold.tolist() == deal(folds.group, folds.target, 5, 777).tolist()
    assert folds.fold.nunique() == 5
