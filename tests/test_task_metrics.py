"""Metrics of sets of labels and of numbers against scikit-learn; decision thresholds against all others."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk

from kit.score import intervals, metrics, thresholds
from kit.score.intervals import scored
from kit.score.metrics import METRICS, reason_against

pytestmark = pytest.mark.filterwarnings("error")
OF_LABELS, OF_NUMBERS = ([k for k, m in METRICS.items() if m.task == task] for task in ("labels", "numbers"))
OF_SETS = [key for key in OF_LABELS if METRICS[key].of_sets]
SHARED = [key for key in OF_SETS if METRICS[key].of_sets[0] != "each label"]  # with one threshold for all labels
COUNT = 200


def labels(seed=0, count=COUNT, shift=-1.5):
    """Return targets of five labels, common, rare ones and one that no image has, and probabilities with ties. Some
    images have no label."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, 5)) < [0.6, 0.2, 0.1, 0.05, 0]).astype(np.float32)
    return targets, special.expit(np.round(rng.normal(size=(count, 5)) + 2 * targets + shift, 1))


def numbers(columns, seed=0, count=COUNT):
    """Return whole targets from 1 to 5, some of them missing, and predictions that reach beyond."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(1, 6, (count, columns)).astype(np.float32)
    predictions = targets + rng.normal(size=targets.shape)
    targets[rng.random(targets.shape) < 0.2] = np.nan
    return targets, predictions


def data_of(key, seed=0):
    return labels(seed) if key in OF_LABELS else numbers(1 if key == "qwk-numbers" else 3, seed)


def sets_of(predictions):
    """Return the labels read for each image, in the plainest way."""
    sets = np.zeros(predictions.shape, int)
    for row, p in zip(sets, predictions, strict=True):
        row[[c for c in range(len(p)) if p[c] > 0.5] or [p.argmax()]] = 1
    return sets


def expected(key, t, p):
    """Return scikit-learn's score, image by image or column by column where that is plainer."""
    if key in OF_LABELS:
        there, read, truth = np.flatnonzero(t.any(axis=0)), sets_of(p), t.astype(int)
        return {
            "column-auc": lambda: np.mean([sk.roc_auc_score(t[:, c], p[:, c]) for c in there]),
            "f1-samples": lambda: sk.f1_score(truth, read, average="samples"),
            "f2": lambda: sk.fbeta_score(truth, read, beta=2, average="samples"),
            "f1-labels": lambda: np.mean([sk.f1_score(truth[:, c], read[:, c]) for c in there]),
            "f1-sets": lambda: sk.f1_score(truth, read, average="micro"),
            "binary-logloss": lambda: np.mean([sk.log_loss(t[:, c], p[:, c], labels=[0, 1]) for c in range(5)]),
        }[key]()
    columns = [(a[~np.isnan(a)], b[~np.isnan(a)]) for a, b in zip(t.T, p.T, strict=True)]
    a, b = (np.concatenate(part) for part in zip(*columns, strict=True))
    return {
        "rmse": lambda: np.sqrt(sk.mean_squared_error(a, b)),
        "mae": lambda: sk.mean_absolute_error(a, b),
        "mcrmse": lambda: np.mean([np.sqrt(sk.mean_squared_error(*column)) for column in columns]),
        "r2": lambda: np.mean([sk.r2_score(*column) for column in columns]),
        "qwk-numbers": lambda: sk.cohen_kappa_score(
            a,
            [min(range(int(a.min()), int(a.max()) + 1), key=lambda k: (abs(k - v), -k)) for v in b],
            weights="quadratic",
        ),
    }[key]()


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("key", OF_LABELS + OF_NUMBERS)
def test_scores_equal_scikit_learns(key):
    for seed in range(3):
        targets, predictions = data_of(key, seed)
        score = METRICS[key].score(targets, predictions)
        assert isinstance(score, float)
        assert score == pytest.approx(expected(key, targets, predictions), abs=1e-12)
    assert score == METRICS[key].score(targets, predictions, np.ones(COUNT))


@pytest.mark.parametrize("key", OF_LABELS + OF_NUMBERS)
def test_weights_equal_repetitions_draws_equal_scores_and_folds_are_averaged(key):
    targets, predictions = data_of(key)
    weights = np.random.default_rng(1).integers(0, 4, (12, COUNT)).astype(np.uint8)
    weights[2] = np.arange(COUNT) < 30
    weights[3] = 200  # uint8 must not run over
    weights[4] *= ~(targets[:, 0] > 2 if key in OF_NUMBERS else targets[:, 2] > 0)  # a narrower range; a label missing
    score, values = scored(key, targets, predictions, weights)
    assert score == METRICS[key].score(targets, predictions)
    for drawn, value in zip(weights, values, strict=True):
        rows = np.repeat(np.arange(COUNT), drawn)
        repeated = METRICS[key].score(targets[rows], predictions[rows])
        assert value == pytest.approx(repeated, abs=1e-9)
        assert value == pytest.approx(expected(key, targets[rows], predictions[rows]), abs=1e-9)
        assert METRICS[key].score(targets, predictions, drawn) == pytest.approx(repeated, abs=1e-9)
    assert np.isfinite(values).all()
    assert len(set(np.round(values, 9))) > 9
    folds = np.arange(COUNT) % 3
    score, values = intervals.mean_of_folds(key, targets, predictions, folds, weights)
    each = [METRICS[key].score(targets[folds == k], predictions[folds == k]) for k in range(3)]
    assert score == pytest.approx(np.mean(each))
    drawn = [METRICS[key].score(targets[folds == k], predictions[folds == k], weights[5, folds == k]) for k in range(3)]
    assert values[5] == pytest.approx(np.mean(drawn))


@pytest.mark.parametrize("key", OF_LABELS + OF_NUMBERS)
def test_predictions_not_finite_or_not_drawn_have_no_score(key):
    targets, predictions = data_of(key)
    weights = np.ones((3, COUNT), np.uint8)
    weights[0] = 0
    assert np.isnan(METRICS[key].score(targets, predictions, weights[0]))
    assert np.isnan(scored(key, targets, predictions, weights)[1]).tolist() == [True, False, False]
    for bad in (np.nan, np.inf):
        damaged = predictions.copy()
        damaged[7, 0] = bad
        score, values = scored(key, targets, damaged, weights)
        assert np.isnan([score, *values]).all()


def test_perfect_predictions_score_best():
    for key in OF_LABELS + OF_NUMBERS:
        targets, predictions = data_of(key)
        known = ~np.isnan(targets).any(axis=1) & (targets.any(axis=1))  # an image without labels is read as having one
        targets, predictions = targets[known], predictions[known]
        perfect, real = (METRICS[key].score(targets, p) for p in (targets.astype(float), predictions))
        assert perfect == pytest.approx(1 if METRICS[key].larger_is_better else 0, abs=1e-12)
        assert metrics.is_better(key, perfect, real)
        assert not metrics.is_better(key, real, perfect)


def test_metrics_of_sets_counted_by_hand():
    targets = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    p = np.array([[0.9, 0.5, 0.6, 0], [0.3, 0.4, 0.1, 0], [0.1, 0.2, 0.1, 0]])  # read: 0 and 2; 1; 1
    assert METRICS["f1-samples"].score(targets, p) == pytest.approx((2 / 4 + 0 + 0) / 3)
    assert METRICS["f2"].score(targets, p, [1, 1, 2]) == pytest.approx(5 / (4 * 2 + 2) / 4)
    assert METRICS["f1-labels"].score(targets, p) == pytest.approx((2 / 3 + 0) / 2), "labels 2 and 3 aren't there"
    assert METRICS["f1-sets"].score(targets, p) == pytest.approx(2 / (4 + 3))
    loss = -np.log([0.9, 0.5, 0.4, 1, 0.3, 0.6, 0.9, 1, 0.9, 0.8, 0.9, 1])
    assert METRICS["binary-logloss"].score(targets, p) == pytest.approx(loss.mean())


def test_metrics_of_numbers_counted_by_hand():
    nan = np.nan
    targets, p = np.array([[1, nan], [3, 7], [nan, 7]], np.float32), np.array([[2.0, 0], [3, 9], [0, 7]])
    assert METRICS["rmse"].score(targets, p) == pytest.approx(np.sqrt((1 + 0 + 4 + 0) / 4))
    assert METRICS["mae"].score(targets, p) == pytest.approx(3 / 4)
    assert METRICS["mcrmse"].score(targets, p) == pytest.approx((np.sqrt(1 / 2) + np.sqrt(4 / 2)) / 2)
    assert METRICS["mcrmse"].score(targets, p, [1, 3, 1]) == pytest.approx((np.sqrt(1 / 4) + np.sqrt(12 / 4)) / 2)
    assert METRICS["r2"].score(targets, p) == pytest.approx(1 - 1 / 2), "the second column's targets are all the same"
    grades, guesses = np.array([[-1], [0], [1], [nan]], np.float32), np.array([[-9], [0.5], [1.4], [4]])
    assert METRICS["qwk-numbers"].score(grades, guesses) == pytest.approx(
        sk.cohen_kappa_score([-1, 0, 1], [-1, 1, 1], weights="quadratic")
    )


def test_columns_without_a_score_are_left_out_and_no_column_is_nan():
    for key in OF_NUMBERS:
        targets, p = data_of(key)
        assert np.isnan(METRICS[key].score(np.full_like(targets, np.nan), p))
        assert np.isnan(scored(key, np.full_like(targets, np.nan), p, np.ones((2, COUNT), np.uint8))[1]).all()
        if key != "qwk-numbers":
            beside = np.hstack([targets, np.full((COUNT, 1), np.nan, np.float32)]), np.hstack([p, p[:, :1]])
            assert METRICS[key].score(*beside) == pytest.approx(METRICS[key].score(targets, p))
    assert np.isnan(METRICS["r2"].score(np.full((9, 1), 2, np.float32), np.random.default_rng(0).random((9, 1))))
    assert np.isnan(METRICS["qwk-numbers"].score(np.full((9, 1), 2, np.float32), np.full((9, 1), 2.2)))
    targets, p = labels()
    none, every = np.zeros_like(targets), np.ones_like(targets)
    assert np.isnan([METRICS["column-auc"].score(t, p) for t in (none, every)]).all()
    assert np.isnan([METRICS[key].score(none, p) for key in ("f1-labels", "f1-sets")]).all()
    assert [METRICS[key].score(none, p) for key in ("f1-samples", "f2")] == [0, 0]


def test_reason_against_a_metric_that_does_not_suit():
    assert reason_against("auc", "classes", ["a", "b"]) is None
    assert reason_against("pauc", "classes", list("abc")) == METRICS["pauc"].fits(list("abc"))
    assert reason_against("f2", "classes", ["a", "b"]) == "it scores sets of labels, and the task is classes"
    assert reason_against("rmse", "labels", ["a", "b"]) == "it scores numbers, and the task is labels"
    assert reason_against("auc", "numbers", ["a", "b"]) == "it scores one class for each image, and the task is numbers"
    assert reason_against("qwk-numbers", "numbers", ["a"]) is None
    assert reason_against("qwk-numbers", "numbers", ["a", "b"]) == "it needs one number, and there are 2"
    assert OF_SETS == ["f1-samples", "f2", "f1-labels", "f1-sets"]
    assert not any(METRICS[key].scores_class for key in OF_LABELS + OF_NUMBERS)


# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize("key", SHARED)
def test_the_shared_threshold_is_the_best_of_the_grid(key):
    for seed, shift in ((0, -1.5), (1, -4), (2, 1)):
        targets, p = labels(seed, 2300, shift)  # three blocks
        scores = np.array([METRICS[key].score(targets, thresholds.move(p, np.full(5, t))) for t in thresholds.GRID])
        assert thresholds.curve(METRICS[key], targets, p) == pytest.approx(scores, abs=1e-12)
        (threshold,) = set(thresholds.fit(key, targets, p))
        assert scores[thresholds.GRID.tolist().index(threshold)] == pytest.approx(scores.max(), abs=1e-12)
        gain = METRICS[key].score(targets, thresholds.in_sample(key, targets, p)) - METRICS[key].score(targets, p)
        assert gain > (0.005 if shift == -4 else -1e-12)
    assert np.diff(thresholds.GRID).max() < 0.0101
    assert (thresholds.GRID[0], thresholds.GRID[-1]) == (0.001, 0.99)


def test_the_middle_one_of_equally_good_thresholds_is_taken():
    targets, p = np.array([[1, 1], [1, 0]], np.float32), np.array([[0.9, 0.405], [0.9, 0.205]])
    for key in SHARED:
        assert thresholds.fit(key, targets, p).tolist() == pytest.approx([0.31, 0.31], abs=0.011)


@pytest.mark.parametrize("ties", [1, 9])
def test_each_label_has_the_threshold_with_the_best_f1_of_all(ties):
    rng = np.random.default_rng(3)
    for share in (0.02, 0.3, 0.97):
        true = rng.random(300) < share
        p = special.expit(np.round(rng.normal(size=300) + true - 2, ties))
        cuts = np.concatenate([[0], np.unique(p)])
        best = max(sk.f1_score(true, p > cut, zero_division=0) for cut in cuts)
        threshold = thresholds.best_threshold(true, p)
        assert sk.f1_score(true, p > threshold) == pytest.approx(best)
        nearest = np.abs(p - threshold).min()
        assert nearest > 0, "between two probabilities"
    targets, p = labels()
    fitted = thresholds.fit("f1-labels", targets, p)
    assert fitted.tolist() == [*(thresholds.best_threshold(targets[:, c] > 0, p[:, c]) for c in range(4)), 0.5]
    assert len(set(fitted)) > 2
    assert len(set(thresholds.fit("f2", targets, p))) == 1


def test_thresholds_are_in_the_middle_and_between_neighbouring_floats():
    true = np.array([True, False, True, False])
    assert thresholds.best_threshold(true, np.array([0.9, 0.1, 0.5, 0.2])) == pytest.approx(0.35)
    assert thresholds.best_threshold(~true, np.array([0.9, 0.1, 0.5, 0.2])) == pytest.approx(0.05), "all are read"
    true, p = np.array([1, 0, 0, 0, 1, 1, 1]) > 0, np.array([0.9, 0.7, 0.6, 0.5, 0.3, 0, 0])
    assert thresholds.best_threshold(true, p) == pytest.approx(0.15), "those at 0 count as missed"
    true, low = np.array([True, False, True, False]), 1e-3
    for high in (np.nextafter(low, 1), np.nextafter(np.nextafter(low, 1), 1)):
        p = np.array([[high, low, high, low]]).T
        moved = thresholds.move(p, np.array([thresholds.best_threshold(true, p[:, 0])]))
        assert (moved[:, 0] > 0.5).tolist() == true.tolist()
    assert thresholds.best_threshold(true, np.zeros(4)) == 0.5
    assert thresholds.best_threshold(np.zeros(4, bool), np.ones(4)) == 0.5
    assert 0 < thresholds.best_threshold(true, np.array([1.0, 0, 1, 0])) < 1
    assert 0 < thresholds.best_threshold(np.ones(2, bool), np.array([5e-324, 1])) < 1
    certain = np.array([1.0, np.nextafter(1, 0)])
    moved = thresholds.move(certain[:, None], np.array([thresholds.best_threshold(np.array([True, False]), certain)]))
    assert (moved[:, 0] > 0.5).tolist() == [True, False]


def test_move_keeps_the_order_of_predictions_and_puts_the_threshold_at_one_half():
    cuts = np.array([0.2, 0.001, 0.99, 0.5])
    p = np.linspace(0, 1, 2001)[:, None].repeat(4, axis=1)
    moved = thresholds.move(p, cuts)
    assert (np.diff(moved, axis=0) > 0).all()
    assert (moved[0] == 0).all()
    assert (moved[-1] == 1).all()
    assert ((moved > 0.5) == (p > cuts)).all()
    assert thresholds.move(cuts[None], cuts).tolist() == [[0.5] * 4]
    assert moved[:, 3] == pytest.approx(p[:, 3])
    assert thresholds.move(np.array([[0.1, 0.6]]), np.array([0.2, 0.2])) == pytest.approx(np.array([[0.25, 0.75]]))
    assert np.isnan(thresholds.move(np.array([[np.nan]]), np.array([0.3]))).all()


@pytest.mark.parametrize("key", OF_SETS)
def test_held_out_images_do_not_affect_their_thresholds(key):
    targets, p = labels()
    folds = np.arange(COUNT) % 3
    moved = thresholds.held_out(key, targets, p, folds)
    for k in range(3):
        fitted = thresholds.fit(key, targets[folds != k], p[folds != k])
        assert np.array_equal(moved[folds == k], thresholds.apply(key, p[folds == k], fitted))
    other = targets.copy()
    other[folds == 1] = 1 - other[folds == 1]
    assert np.array_equal(thresholds.held_out(key, other, p, folds)[folds == 1], moved[folds == 1])
    alone = thresholds.held_out(key, targets, p, 0 * folds + 4)
    assert np.array_equal(alone, thresholds.in_sample(key, targets, p))


@pytest.mark.parametrize("key", OF_SETS)
def test_without_labels_or_finite_predictions_the_threshold_is_one_half(key):
    targets, p = labels()
    assert thresholds.fit(key, 0 * targets, p).tolist() == [0.5] * 5
    p[3, 1] = np.nan
    assert thresholds.fit(key, targets, p).tolist() == [0.5] * 5
    assert np.isnan(METRICS[key].score(targets, thresholds.in_sample(key, targets, p)))


# ---------------------------------------------------------------- two classes, grades, whole numbers


def drawn(key, count, seed=0, share=0.05):
    """Return targets and predictions that are right about their odds: a rare second class, or grades from 0 to 4."""
    rng = np.random.default_rng(seed)
    if METRICS[key].cut == "second":
        targets = (rng.random(count) < share).astype(int)
        p = special.expit(1.8 * (1.8 * targets + rng.normal(size=count) - 0.9) + np.log(share / (1 - share)))
        return targets, np.stack([1 - p, p], axis=1)
    shares = np.array([0.5, 0.1, 0.25, 0.05, 0.1])
    targets = rng.choice(5, count, p=shares)
    seen = targets[:, None] + 1.2 * rng.normal(size=(count, 1))
    p = special.softmax(np.log(shares) - (seen - np.arange(5)) ** 2 / 2.88, axis=1)
    return (targets, p) if key == "qwk" else (targets[:, None].astype(np.float32), metrics.expectation(p)[:, None])


ON_A_LINE = [key for key, metric in METRICS.items() if metric.cut in thresholds.LINES]
GAINS = {"f1-positive": 0.07, "f2-positive": 0.2, "f0.5-positive": -0.003, "f1": 0.03, "mcc": 0.02} | dict.fromkeys(
    ("qwk", "qwk-numbers"), 0.01
)


@pytest.mark.parametrize("key", ON_A_LINE)
def test_cuts_gain_on_other_images_and_never_lose_on_their_own(key):
    score, gains, others = METRICS[key].score, [], drawn(key, 20000, 99)
    for seed in range(5):
        targets, p = drawn(key, 1000, seed)
        cuts = thresholds.fit(key, targets, p)
        assert score(targets, thresholds.apply(key, p, cuts)) >= score(targets, p)
        assert np.array_equal(cuts, thresholds.fit(key, targets, p)), "nothing is drawn by chance"
        gains.append(score(others[0], thresholds.apply(key, others[1], cuts)) - score(*others))
    assert np.mean(gains) > GAINS[key]


@pytest.mark.parametrize("key", ON_A_LINE)
def test_cuts_of_few_images_or_beside_the_best_ones_lose_little(key):
    """At one half and by rounding, these are read best: equal classes, grades that are nearly sure."""
    score, gains = METRICS[key].score, []
    scale = 1 if METRICS[key].cut == "second" else 0.1
    draws = [drawn(key, 200, seed, share=0.5) for seed in range(21)]
    draws = [(t, np.clip(t.reshape(p.shape) * 0.95, 0, 4) + 0.05 * p if key == "qwk-numbers" else
        (scale * p + (1 - scale) * np.eye(p.shape[1])[t.astype(int)])) for t, p in draws]  # fmt: skip
    others = [np.concatenate(part) for part in zip(*draws, strict=True)]
    for targets, p in draws:
        cuts = thresholds.fit(key, targets, p)
        gains.append(score(others[0], thresholds.apply(key, others[1], cuts)) - score(*others))
    assert np.mean(gains) > -0.003
    targets, p = drawn(key, 300)
    commonest = targets.ravel() == 0
    few = np.concatenate([np.flatnonzero(commonest), np.flatnonzero(~commonest)[: thresholds.LEAST - 1]])
    assert thresholds.fit(key, targets[few], p[few]) is None
    assert thresholds.in_sample(key, targets[few], p[few]).tolist() == p[few].tolist()


@pytest.mark.parametrize("key", ON_A_LINE)
def test_what_is_read_changes_at_the_cuts_in_the_order_of_the_predictions(key):
    targets, p = drawn(key, 2000)
    if METRICS[key].cut == "second":  # as if both classes were equally common
        p = p * [1, 19] / (p * [1, 19]).sum(axis=1, keepdims=True)
    line, cuts = thresholds.LINES[METRICS[key].cut], thresholds.fit(key, targets, p)
    moved = thresholds.apply(key, p, cuts)
    expected = (line.positions(p)[:, None] > cuts[0]).sum(axis=1)
    assert np.clip(METRICS[key].read(moved), 0, 4).ravel().tolist() == expected.tolist()
    assert (expected != METRICS[key].read(p).ravel()).any()
    order = np.argsort(line.positions(p), kind="stable")
    assert (np.diff(line.positions(moved)[order]) >= -1e-9).all()
    if METRICS[key].task == "classes":
        assert moved.sum(axis=1) == pytest.approx(1)
        assert moved.min() >= 0
        assert METRICS[key].score(targets, moved) == METRICS[key].score(targets, np.eye(p.shape[1])[expected])
    said = thresholds.describe(key, cuts, ["ok", "bad"] if p.shape[1] == 2 else list("01234")[: p.shape[1]])
    figure = special.expit(cuts[0, 0] - 0.5) if METRICS[key].cut == "second" else cuts[0, 0]
    assert f"{figure:.3g}" in said


@pytest.mark.parametrize("key", ON_A_LINE)
def test_images_of_a_fold_do_not_affect_their_cuts_and_nan_stays(key):
    targets, p = drawn(key, 600)
    folds = np.arange(600) % 3
    moved, other = thresholds.held_out(key, targets, p, folds), targets.copy()
    turned = thresholds.held_out(key, targets[::-1], p[::-1], folds[::-1])
    assert np.array_equal(turned[::-1], moved), "whatever the order of the images"
    other[folds == 1] = 1 - np.minimum(other[folds == 1], 1)
    again = thresholds.held_out(key, other, p, folds)
    assert np.array_equal(again[folds == 1], moved[folds == 1])
    assert not np.array_equal(again[folds == 0], moved[folds == 0])
    p[3] = np.nan
    assert thresholds.fit(key, targets, p) is None
    assert np.isnan(METRICS[key].score(targets, thresholds.held_out(key, targets, p, folds)))


def test_kappas_cuts_are_the_best_of_all_places():
    def kappa(a, b):
        read = (x > a).astype(int) + (x > b)
        return sk.cohen_kappa_score(targets, read, weights="quadratic", sample_weight=w, labels=[0, 1, 2])

    rng = np.random.default_rng(0)
    for seed in range(3):
        targets, p = drawn("qwk", 40, seed)
        targets, x = np.minimum(targets, 2), np.round(metrics.expectation(p) / 2, 1)
        places = thresholds.places_between(np.unique(x), 999)
        w = rng.integers(1, 4, 40)
        above = [[w[x > c] @ targets[x > c] ** power for c in places] for power in (0, 1)]
        totals = [w @ targets**power for power in range(3)]
        best = thresholds.best_of_kappa(METRICS["qwk"], *map(np.array, above), *totals, 2)
        every = max(kappa(a, b) for i, a in enumerate(places) for b in places[i:])
        assert kappa(*places[best]) == pytest.approx(every, abs=1e-9)


def test_more_classes_and_other_metrics_have_no_cuts():
    p = special.softmax(np.random.default_rng(0).normal(size=(300, 3)), axis=1)
    targets = np.arange(300) % 3
    for key, metric in METRICS.items():
        if metric.task == "classes" and metric.cut != "grades":
            assert thresholds.fit(key, targets, p) is None
            assert thresholds.held_out(key, targets, p, targets) is p
            assert thresholds.describe(key, None, list("abc")) is None
    assert {key for key, metric in METRICS.items() if metric.cut == "second"} == {
        "f1", "f1-positive", "f2-positive", "f0.5-positive", "mcc",
    }  # fmt: skip


def test_cuts_of_whole_numbers_leave_missing_and_many_ones_out():
    targets, p = drawn("qwk-numbers", 500)
    expected = thresholds.fit("qwk-numbers", targets, p)
    missing = np.concatenate([targets, np.full((9, 1), np.nan, np.float32)]), np.concatenate([p, np.full((9, 1), 2.0)])
    assert np.array_equal(thresholds.fit("qwk-numbers", *missing), expected)
    assert np.array_equal(thresholds.fit("qwk-numbers", targets - 3, p - 3)[1], expected[1] - 3)
    assert thresholds.fit("qwk-numbers", targets * 30, p * 30) is None, "more than 100 whole numbers"
