"""Folds matched to the test set: clusters, the chosen candidate, matched.png, and what 00 writes."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import done, png, write_csv, write_zip
from PIL import Image
from scipy.stats import wasserstein_distance
from sklearn.preprocessing import normalize

from kit.folds import matching
from kit.folds.split import assign_folds, unlearnt_images
from kit.report import pictures
from kit.score.tasks import Classes, Labels

EACH = 20  # images of a subject
TWO, THREE = Classes([*"ab"]), Classes([*"abc"])


def subjects(count, seed=0, dimensions=32, spread=0.5):
    """Return subjects as blobs on the unit sphere: points float32 [N, D], the subject of each."""
    rng, subject = np.random.default_rng(seed), np.repeat(np.arange(count), EACH)
    centres, noise = rng.normal(size=(count, dimensions)), rng.normal(size=(len(subject), dimensions))
    points = normalize(centres)[subject] + spread * noise / np.sqrt(dimensions)
    return normalize(points).astype(np.float32), subject


def matched_to(case, seed=0):
    """Choose folds for a training set of 30 subjects, each of one of three classes, and a test set of `case`: known
    subjects, new ones, or both. → the chosen candidate, all candidates, and the training set."""
    points, subject = subjects(40, seed)
    order = np.random.default_rng(seed).permutation(30 * EACH)
    new = np.flatnonzero((subject >= 30) & (subject < 38))
    train, known = np.sort(order[: 30 * EACH - 160]), order[30 * EACH - 160 :]
    test = dict(known=known, new=new, both=np.concatenate([known, new]))[case]
    sources, targets = np.arange(len(train)), subject[train] % 3
    options = sources, targets, THREE, 5, 777, "accuracy"
    chosen, candidates = matching.choose_folds(points[np.concatenate([train, test])], *options)
    named = dict(chosen=chosen, candidates=candidates, subject=subject[train], targets=targets, points=points[train])
    return SimpleNamespace(**named)


def share_split(folds, groups):
    """Return the share of the groups that are in several folds."""
    return (pd.Series(folds).groupby(groups).nunique() > 1).mean()


# ---------------------------------------------------------------- clusters


def test_there_are_as_many_clusters_as_wanted():
    points, subject = subjects(30)
    for count, labels in zip([100, 30, 9], matching.clusterings(points, [100, 30, 9], 777), strict=True):
        assert len(np.unique(labels)) == count
        if count <= 30:
            assert share_split(labels, subject) == 0


def test_clusters_by_parts_keep_subjects_together(monkeypatch):
    """1,000 images, of which 200 are clustered at once."""
    monkeypatch.setattr(matching, "MOST", 200)
    linkage = matching.linkage

    def of_few(points, method):
        assert len(points) <= 200
        return linkage(points, method)

    monkeypatch.setattr(matching, "linkage", of_few)
    points, subject = subjects(50, spread=0.2)
    counts = [500, 250, 110, 90, 50, 25, 10]
    several = matching.clusterings(points, counts, 777)
    for count, labels in zip(counts, several, strict=True):
        assert len(np.unique(labels)) == pytest.approx(count, abs=3)
        assert sorted(np.unique(labels)) == [*range(labels.max() + 1)]
        if count <= 50:
            assert share_split(labels, subject) == 0, f"of {count}"
        else:
            assert share_split(subject, labels) == 0, f"of {count}"
    for labels, again in zip(several, matching.clusterings(points, counts, 777), strict=True):
        assert np.array_equal(labels, again)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_whole_clusters_with_a_share_of_the_images_are_split_up(share):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), rng.integers(1, 25, 40))
    source = np.arange(len(labels)) // 2
    labels[1::2] = labels[: len(labels) // 2 * 2 : 2]  # copies are in one cluster
    groups = matching.split_up_clusters(labels, source, share, 777)
    assert share_split(groups, source) == 0, "copies stay together"
    assert share_split(labels, groups) == 0, "a group is a cluster or a part of it"
    is_split_up = np.bincount(groups)[groups] < np.bincount(labels)[labels]
    assert is_split_up.mean() == pytest.approx(share, abs=np.bincount(labels).max() / len(labels))
    assert (np.bincount(groups)[groups][is_split_up] == 2).all()
    assert (pd.Series(is_split_up).groupby(labels).nunique() == 1).all(), "no cluster is split up in part"
    assert not np.array_equal(groups, matching.split_up_clusters(labels, source, share, 778))


def test_a_share_of_0_splits_up_nothing():
    labels = np.repeat(np.arange(4), 5)
    assert np.array_equal(matching.split_up_clusters(labels, np.arange(20), 0, 777), labels)


def test_no_cluster_holds_more_than_half_of_a_class():
    rng = np.random.default_rng(0)
    source, targets = np.arange(120) // 2, np.repeat(rng.choice(4, 60, p=[0.7, 0.2, 0.05, 0.05]), 2)
    labels = np.where(targets > 1, 0, source % 3)  # both rare classes are in one cluster
    apart = matching.split_dominant_clusters(labels, source, source, targets)
    held = pd.crosstab(apart, targets)
    assert (held.max() <= held.sum() / 2).all()
    assert share_split(apart, source) == 0
    common = targets == 0
    assert share_split(apart[common], labels[common]) == 0, "clusters with less stay together"
    assert len(np.unique(apart)) > 3


def test_a_class_of_one_source_stays_together():
    source, targets = np.array([0, 0, 1, 2, 3, 4]), np.array([1, 1, 0, 0, 0, 0])
    apart = matching.split_dominant_clusters(np.zeros(6, int), source, source, targets)
    assert apart[0] == apart[1]


def test_duplicates_with_different_labels_stay_together_where_a_dominant_cluster_is_split():
    """Image 1 is a copy of image 0 under another label; the cluster holds most of class 0 but not of class 1."""
    labels, source = np.array([0, 0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 2, 3, 4, 5])
    apart = matching.split_dominant_clusters(labels, source, source, np.array([0, 1, 0, 0, 1, 1, 0]))
    assert apart[0] == apart[1]


# ---------------------------------------------------------------- the chosen candidate


@pytest.mark.parametrize("seed", range(2))
def test_a_test_set_of_known_subjects_gets_plain_folds(seed):
    matched = matched_to("known", seed)
    assert matched.chosen is matched.candidates[0]
    assert matched.chosen.name == "each image alone"
    assert share_split(matched.chosen.folds, matched.subject) == 1


@pytest.mark.parametrize("seed", range(2))
def test_a_test_set_of_new_subjects_gets_folds_that_hold_out_whole_subjects(seed):
    matched = matched_to("new", seed)
    assert matched.chosen.clusters
    assert share_split(matched.chosen.folds, matched.subject) < 0.1
    assert matched.chosen.distance < 0.3 * matched.candidates[0].distance
    assert np.median(matched.chosen.held_out) == pytest.approx(np.median(matched.chosen.test), abs=0.1)
    best = [candidate for candidate in matched.candidates if candidate.nearly_best]
    assert matched.chosen in best
    assert matched.chosen.held_out.mean() == min(candidate.held_out.mean() for candidate in best), (
        "the hardest of these"
    )
    for candidate in matched.candidates:
        options = matched.points, matched.targets, candidate.folds, "accuracy", THREE
        scored = candidate in best or not candidate.clusters
        assert candidate.score == (matching.ridge_score(*options) if scored else None)
    assert matched.candidates[0].score > 0.85 > 0.45 > matched.chosen.score, "the class goes with the subject"


@pytest.mark.parametrize("seed", range(2))
def test_a_test_set_of_known_and_new_subjects_gets_clusters_partly_split_up(seed):
    matched = matched_to("both", seed)
    assert 0 < matched.chosen.split_up < 1
    assert 0.2 < share_split(matched.chosen.folds, matched.subject) < 0.8
    assert matched.chosen.distance < 0.3 * matched.candidates[0].distance
    assert matched.chosen.distance < min(
        candidate.distance for candidate in matched.candidates if not candidate.split_up
    )


def test_the_more_new_subjects_the_harder_the_folds():
    chosen = [matched_to(case).chosen for case in ("known", "both", "new")]
    means = [candidate.held_out.mean() for candidate in chosen]
    assert means == sorted(means, reverse=True)
    assert chosen[0].score > chosen[1].score > chosen[2].score


def test_duplicates_stay_in_one_fold_in_each_candidate_but_the_first():
    points, subject = subjects(12)
    alone = np.arange(0, len(points), 2)
    train, source = points[np.repeat(alone, 2)], np.repeat(np.arange(len(alone)), 2)
    options = source, subject[np.repeat(alone, 2)] % 2, TWO, 5, 777, "auc"
    chosen, candidates = matching.choose_folds(np.concatenate([train, points[alone + 1]]), *options)
    plain, together, *clustered = candidates
    assert (plain.name, together.name) == ("each image alone", "duplicates together")
    assert share_split(plain.folds, source) > 0.5
    assert {share_split(candidate.folds, source) for candidate in candidates[1:]} == {0}
    assert len(clustered) > 8
    assert chosen is together, "the test images are of known subjects, and no copies"
    assert np.median(plain.held_out) == pytest.approx(1, abs=1e-5), "a held-out image's copy was seen"


@pytest.mark.parametrize(("images", "most"), [(2, 2), (1, 1), (20, 4)])
def test_clusters_whose_folds_keep_images_from_being_learnt_are_left_out(images, most):
    """A hundredth of 440 images may be of classes that a fold can't learn. A class of one image decides nothing: it is
    held out whole in any folds."""
    matched = matched_to("new")
    targets = np.where(np.arange(len(matched.targets)) < images, 2, matched.targets % 2)
    candidates = matching.make_candidates(matched.points, np.arange(len(targets)), targets, 5, 777)
    assert len(candidates) > 10
    assert max(unlearnt_images(candidate.folds, targets) for candidate in candidates) <= most


@pytest.mark.parametrize("rare", [[2], [2, 2, 3], [3] * 60])
def test_duplicates_together_is_a_candidate_whatever_the_classes(rare):
    """Classes of one source with two or three images: a fold holds out each."""
    points, subject = subjects(12)
    targets = np.concatenate([np.repeat(subject[::2] % 2, 2), np.repeat(2 + np.arange(len(rare)), rare)])
    source = np.concatenate([np.repeat(np.arange(len(subject) // 2), 2), 1000 + np.repeat(np.arange(len(rare)), rare)])
    images = np.random.default_rng(0).normal(size=(len(targets), 32))
    images[: len(subject)] = np.repeat(points[::2], 2, axis=0)
    candidates = matching.make_candidates(normalize(images).astype(np.float32), source, targets, 5, 777)
    assert [candidate.name for candidate in candidates[:2]] == ["each image alone", "duplicates together"]
    assert len(candidates) > 10
    assert {share_split(candidate.folds, source) for candidate in candidates[1:]} == {0}


@pytest.mark.parametrize(("sources", "tests", "enough"), [(39, 60, False), (60, 39, False), (40, 40, True)])
def test_too_few_sources_or_test_images_give_no_candidates(sources, tests, enough):
    points = subjects(8)[0]
    source = np.arange(100) % sources
    options = source, np.arange(100) % 2, TWO, 5, 777, "auc"
    chosen, candidates = matching.choose_folds(points[: 100 + tests], *options)
    assert bool(candidates) == enough
    assert (chosen is None) == (not enough)


@pytest.mark.parametrize("count", [10, 20])
def test_candidates_with_fewer_groups_than_folds_are_left_out(count):
    """The last candidates would have 8 to 11 clusters."""
    matched = matched_to("new")
    train, test = matched.points[:200], matched.points[200:260]
    targets = np.arange(200) % 3
    options = np.arange(200), targets, THREE, count, 777, "accuracy"
    candidates = matching.choose_folds(np.concatenate([train, test]), *options)[1]
    assert candidates
    assert all(np.bincount(candidate.folds, minlength=count).min() > 0 for candidate in candidates)


def test_similarities_and_distances_equal_those_computed_pair_by_pair():
    rng = np.random.default_rng(0)
    train, test = (normalize(rng.normal(size=(n, 6))).astype(np.float32) for n in (30, 11))
    ways = np.arange(30) % 3, np.arange(30) // 10
    candidates = [matching.Candidate("", 0, 0, np.arange(30), folds) for folds in ways]
    matching.measure_distances(candidates, train, test, 3, 777, block=7)
    for candidate, folds in zip(candidates, ways, strict=True):
        held_out = [max(train[i] @ train[j] for j in range(30) if folds[j] != folds[i]) for i in range(30)]
        left = [[max(image @ train[j] for j in range(30) if folds[j] != k) for k in range(3)] for image in test]
        assert np.sort(candidate.held_out) == pytest.approx(np.sort(held_out), abs=1e-5)
        assert np.sort(candidate.test.ravel()) == pytest.approx(np.sort(np.ravel(left)), abs=1e-5)
        assert candidate.distance == pytest.approx(wasserstein_distance(held_out, np.ravel(left)), abs=1e-5)


def test_a_sample_of_queries_gives_about_the_same_similarities(monkeypatch):
    matched = matched_to("new")
    monkeypatch.setattr(matching, "QUERIES", 50)
    candidate = matching.Candidate("", 0, 0, None, np.arange(300) % 5)
    matching.measure_distances([candidate], matched.points[:300], matched.points[300:], 5, 777)
    assert len(candidate.held_out) == 50
    assert candidate.test.size == 250
    exact = matching.Candidate("", 0, 0, None, candidate.folds)
    monkeypatch.setattr(matching, "QUERIES", 10_000)
    matching.measure_distances([exact], matched.points[:300], matched.points[300:], 5, 777)
    assert candidate.held_out.mean() == pytest.approx(exact.held_out.mean(), abs=0.05)
    assert np.isin(candidate.held_out.round(4), exact.held_out.round(4)).all()


def test_lines_about_the_chosen_candidate():
    plain = dict(name="each image alone", clusters=0, similarity=0.9, test_similarity=0.51, score=0.99)
    plain |= dict(chosen=True, near_enough=True)
    assert matching.matching_lines(None) == matching.matching_lines([]) == []
    first, figures = matching.matching_lines([plain])
    assert first == "each image alone: these match the test set (matched.png)"
    assert figures.endswith("0.90 held out, 0.51 test")
    first, _ = matching.matching_lines([plain | dict(near_enough=False)])
    assert first == "no folds match the test set; the nearest: each image alone (matched.png)"
    chosen = plain | dict(name="20 look-alike groups", clusters=20, similarity=0.5, test_similarity=0.52, score=0.8)
    first, figures, scores = matching.matching_lines([plain | dict(chosen=False), chosen])
    assert first == "matched folds, 20 look-alike groups (matched.png)"
    assert figures.endswith("0.50 held out, 0.52 test, 0.90 held out in plain folds")
    assert scores == "a ridge regression scores 0.990 in plain folds, 0.800 in these"


def test_the_nearest_candidate_is_chosen_where_none_is_near_enough():
    """It shows the training images themselves, or something else altogether: the nearest candidate is chosen."""
    matched = matched_to("known")
    train = matched.points
    elsewhere = np.hstack([np.zeros_like(train), np.ones_like(train[:, :1])])[:60]
    train = np.hstack([train, np.zeros_like(train[:, :1])])
    for tests, where in ((train, "nearest"), (elsewhere, "farthest")):
        options = np.arange(len(train)), matched.targets, THREE, 5, 777, "accuracy"
        chosen, candidates = matching.choose_folds(np.concatenate([train, tests]), *options)
        assert not chosen.near_enough
        assert chosen.distance == min(candidate.distance for candidate in candidates)
        held_out = [candidate.held_out.mean() for candidate in candidates]
        assert chosen.held_out.mean() == pytest.approx(dict(nearest=max, farthest=min)[where](held_out), abs=0.02)


def test_duplicates_stay_together_where_plain_folds_match():
    matched = matched_to("known")
    train, tests, targets = matched.points[::2], matched.points[1::2], matched.targets[::2]
    points = np.concatenate([train, train[:3], tests])
    sources, targets = np.append(np.arange(len(train)), range(3)), np.append(targets, targets[:3])
    chosen, candidates = matching.choose_folds(points, sources, targets, THREE, 5, 777, "accuracy")
    assert chosen is candidates[1]
    assert chosen.folds[:3].tolist() == chosen.folds[-3:].tolist()


def of_sources(tests, seed=0):
    """Return points of 100 sources, four images each for training, and the sources of `tests` test images."""
    rng = np.random.default_rng(seed)
    source = np.append(np.repeat(np.arange(100), 4), tests)
    points = rng.normal(size=(max(source) + 1, 64))[source] + 0.15 * rng.normal(size=(len(source), 64))
    return normalize(points).astype(np.float32), source[:400]


def test_a_test_set_of_the_training_sets_sources_gets_folds_that_split_them():
    points, source = of_sources(np.arange(100))
    for shared in (True, False):  # also where the search has missed it
        options = source, source % 3, THREE, 5, 777, "accuracy", shared
        chosen, candidates = matching.choose_folds(points, *options)
        assert chosen is candidates[0]
        assert chosen.near_enough
        assert chosen.distance < 0.05 < 0.5 < candidates[1].distance
        assert matching.matching_lines(matching.summary(chosen, candidates))[0].startswith(
            "each image alone: these match"
        )


@pytest.mark.parametrize(
    ("distances", "shared", "chosen"),
    [((0.01, 0.02), False, 1), ((0.01, 0.02), True, 0), ((0.01, 0.012), True, 1), ((0.01, 0.2), False, 0),
     ((0.2, 0.3), False, 0), ((0.3, 0.2), True, 1)],
)  # fmt: skip
def test_duplicates_stay_together_where_that_matches_unless_the_test_set_shares_them(
    monkeypatch, distances, shared, chosen
):
    """Distances below 0.05 match; within half of the least they are nearly the best."""

    def measured(candidates, *_):
        for candidate in candidates:
            distance = candidate.distance = distances[candidate.name != "each image alone"] + (candidate.clusters > 0)
            candidate.near_enough, candidate.nearly_best = distance < 0.05, distance <= 1.5 * min(distances)

    monkeypatch.setattr(matching, "measure_distances", measured)
    points, source = of_sources(np.arange(100))
    picked, candidates = matching.choose_folds(points, source, source % 3, THREE, 5, 777, "accuracy", shared)
    assert picked is candidates[chosen]


# ---------------------------------------------------------------- points and matched.png


def test_grey_pictures_are_whitened_only_as_far_as_they_vary():
    """Their colours fill 4 of 256 cells: the rest is rounding."""
    rng = np.random.default_rng(0)
    grey = np.zeros((300, 256), np.float32)
    grey[:, [36, 100, 164, 228]] = normalize(rng.uniform(size=(300, 4)))
    assert matching.whitened(grey, 32, 777).shape[1] <= 4
    assert matching.whitened(grey + rng.normal(0, 0.01, grey.shape), 32, 777).shape[1] == 32


@pytest.mark.parametrize("first", [3, 5, 30])
def test_the_nearest_of_each_fold_is_found_also_among_images_that_are_far(monkeypatch, first):
    rng = np.random.default_rng(0)
    train, test = (normalize(rng.normal(size=(n, 6))).astype(np.float32) for n in (30, 11))
    candidate = matching.Candidate("", 0, 0, None, np.repeat([0, 1, 2], [26, 2, 2]))
    monkeypatch.setattr(matching, "FIRST", first)
    matching.measure_distances([candidate], train, test, 3, 777, block=7)
    left = [[max(image @ train[j] for j in range(30) if candidate.folds[j] != k) for k in range(3)] for image in test]
    assert np.sort(candidate.test.ravel()) == pytest.approx(np.sort(np.ravel(left)), abs=1e-5)


def test_a_ridge_regression_on_many_outputs_is_fitted_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    points, targets = rng.normal(size=(60, 5)).astype(np.float32), (rng.random((60, 7)) < 0.4).astype(np.float32)
    options = points, targets, np.arange(60) % 3, "column-auc", Labels([*"abcdefg"])
    whole = matching.ridge_score(*options)
    monkeypatch.setattr(matching, "OUTPUTS", 3)
    assert matching.ridge_score(*options) == pytest.approx(whole, abs=1e-6)


def test_whitened_dimensions_weigh_alike():
    rng = np.random.default_rng(0)
    loud, faint = rng.normal(size=(400, 3)) * [100, 1, 1], rng.normal(size=(400, 2))
    white = matching.whitened(np.hstack([loud, faint]), 4, 777, block=64)
    assert white.shape == (400, 4)
    assert np.linalg.norm(white, axis=1) == pytest.approx(1, abs=1e-5)
    assert (white**2).mean(axis=0) == pytest.approx(0.25, abs=0.03), "the loud one doesn't hide the others"


def test_matched_png_shows_each_image_beside_the_nearest_that_its_model_has_seen():
    points, _ = subjects(3)
    train, test, folds = points[:40], points[40:], np.arange(40) % 4
    images = dict(train=np.arange(40), test=np.arange(100, 120))
    names = dict(train=[f"r{i}" for i in range(40)], test=[f"t{i}" for i in range(20)])
    for queries, of in ((test, None), (train, folds)):
        (title, first), (_, second) = pictures.draw_neighbours("title", queries, train, of, images, names, 777)
        assert ("of the other folds" in title) == (of is not None)
        cells = first + second
        assert len(first) == len(second) == pictures.COLUMNS
        for (image, caption), (nearest, beside) in zip(cells[::2], cells[1::2], strict=True):
            i = image - 100 if of is None else image
            allowed = np.arange(40) if of is None else np.flatnonzero(folds != folds[i])
            similar = train[allowed] @ queries[i]
            assert nearest == allowed[similar.argmax()]
            assert caption == (f"test t{i}" if of is None else f"train r{i}")
            assert beside == f"{similar.max():.2f}: train r{nearest}"


# ---------------------------------------------------------------- 00_prepare.py

SUBJECTS, NEW, OF_ONE, COPIES = 9, 5, 8, 4  # subjects in train and only in test, pictures of one, copies in train


def draw_subjects():
    """Return pictures of 64 px, each subject in its own colours, and the subject of each."""
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
    """Prepare a competition whose test set shows new subjects, with --groups auto. Each subject has both classes. The
    first pictures have turned copies, one of them with the other label."""
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
    flags, results = ["--input", folder / "input", "--size", 32, "--folds", 3], []
    with pytest.MonkeyPatch.context() as patch:
        original = matching.choose_folds
        patch.setattr(matching, "choose_folds", lambda *args: results.append(original(*args)) or results[-1])
        out = done("00_prepare.py", *flags, "--output", folder / "output")
    ((chosen, candidates),), path = results, folder / "output" / "prepared"
    copy = {count + k: k * OF_ONE for k in range(COPIES)}
    named = dict(flags=flags, out=out, path=path, chosen=chosen, candidates=candidates, subject=shown, copy=copy)
    return SimpleNamespace(**named)


def copies_apart(folds, copy):
    """Return how many copies are in another fold than their source."""
    return sum(folds.fold[a] != folds.fold[b] for a, b in copy.items())


def test_00_holds_out_whole_subjects_where_the_test_set_shows_new_ones(prepared):
    folds = pd.read_csv(prepared.path / "folds.csv")
    assert prepared.chosen.clusters
    assert share_split(folds.fold, prepared.subject) < 0.3
    assert copies_apart(folds, prepared.copy) == 0
    assert share_split(folds.fold, folds.group) == 0
    assert share_split(prepared.candidates[0].folds, prepared.subject) == 1
    assert "matched folds, " + prepared.chosen.name in prepared.out


def test_the_chosen_folds_are_written(prepared):
    assert pd.read_csv(prepared.path / "folds.csv").fold.tolist() == prepared.chosen.folds.tolist()


def test_prepared_json_keeps_the_plain_candidates_and_those_nearly_best(prepared):
    content = json.loads((prepared.path / "prepared.json").read_text())
    best = [candidate for candidate in prepared.candidates if candidate.nearly_best]
    kept = [candidate for candidate in prepared.candidates if candidate in best or not candidate.clusters]
    assert len(kept) < len(prepared.candidates)
    assert kept[0].name == "each image alone"
    for row, candidate in zip(content["candidates"], kept, strict=True):
        names = "name clusters split_up".split()
        assert [row[name] for name in names] == [getattr(candidate, name) for name in names]
        assert row["similarity"] == pytest.approx(np.median(candidate.held_out))
        assert row["test_similarity"] == pytest.approx(np.median(candidate.test))
        assert row["distance"] == pytest.approx(wasserstein_distance(candidate.held_out, candidate.test.ravel()))
        assert row["score"] == pytest.approx(candidate.score)
        assert row["nearly_best"] == (candidate in best)
        assert row["chosen"] == (candidate is prepared.chosen)
    assert prepared.chosen in kept
    assert all(line in prepared.out for line in matching.matching_lines(content["candidates"]))
    assert content["duplicates"]["groups"] == COPIES, "look-alike groups aren't duplicates"
    assert [len(names) for names in content["duplicates"]["conflicts"]] == [2]


def test_matched_png_has_curves_and_images(prepared):
    width, height = Image.open(prepared.path / "matched.png").size
    assert width > 500
    assert height > 900, "curves, and two rows for each of three kinds"


def test_two_runs_of_00_write_the_same_bytes(prepared, tmp_path):
    done("00_prepare.py", *prepared.flags, "--output", tmp_path)
    for name in ("folds.csv", "prepared.json", "matched.png", "duplicates.csv"):
        assert (tmp_path / "prepared" / name).read_bytes() == (prepared.path / name).read_bytes(), name


def test_groups_copies_keeps_duplicates_together_and_no_more(prepared, tmp_path):
    out = done("00_prepare.py", *prepared.flags, "--output", tmp_path, "--groups", "copies")
    folds = pd.read_csv(tmp_path / "prepared" / "folds.csv")
    content = json.loads((tmp_path / "prepared" / "prepared.json").read_text())
    assert content["candidates"] is None
    assert content["duplicates"]["groups"] == COPIES
    assert not (tmp_path / "prepared" / "matched.png").exists()
    assert "held out" not in out
    assert folds.group.value_counts().tolist() == [2] * COPIES + [1] * (len(folds) - 2 * COPIES)
    assert copies_apart(folds, prepared.copy) == 0
    assert share_split(folds.fold, prepared.subject) == 1


def test_a_few_images_have_no_candidates_and_keep_the_stratified_folds(toy):
    flags = toy(train=40, test=10)
    done("00_prepare.py", *flags, "--size", 32)
    path = flags[-1] / "prepared"
    assert json.loads((path / "prepared.json").read_text())["candidates"] is None
    assert not (path / "matched.png").exists()
    folds = pd.read_csv(path / "folds.csv")
    assert folds.fold.tolist() == assign_folds(folds.group, folds.target, 5, 777).tolist()
    assert folds.fold.nunique() == 5
