"""Metrics of classes against scikit-learn; bootstrap values, intervals and paired comparisons."""

from common import softmax

import numpy as np
import pytest
from sklearn import metrics as sk

from kit.score import intervals, metrics
from kit.score.intervals import bootstrap_weights, interval, scored, verdict
from kit.score.metrics import METRICS, is_better
from kit.score.tasks import Classes

pytestmark = pytest.mark.filterwarnings("error")  # no warning of numpy or scikit-learn may reach the user
TWO_ONLY = ("pauc", "f1-positive", "f2-positive", "f0.5-positive")
OF_CLASSES = [key for key, metric in METRICS.items() if metric.task == "classes"]


def made_up(classes, count=300, seed=0, decimals=2):
    """Return targets and probabilities that know something of them. Few decimals make many equal scores."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), targets] += 1
    return targets, softmax(np.round(logits, decimals))


def nearest_grades(p):
    """Return for each image the grade nearest to the expected one, found by trying them all."""
    expectations = [sum(grade * chance for grade, chance in enumerate(row)) for row in p]
    grades = range(p.shape[1])
    return np.array([min(grades, key=lambda grade: (abs(grade - e), -grade)) for e in expectations])


def expected(key, targets, p):
    """Return scikit-learn's score, called in the plainest way; every class is there."""
    predicted, two, one_hot = p.argmax(axis=1), p.shape[1] == 2, np.eye(p.shape[1])[targets]
    if key == "auc":
        return sk.roc_auc_score(targets, p[:, 1]) if two else sk.roc_auc_score(targets, p, multi_class="ovr")
    if key == "pauc":  # the competition's code
        partial = sk.roc_auc_score(np.abs(targets - 1), -1.0 * p[:, 1], max_fpr=0.2)
        return 0.5 * 0.2**2 + (0.2 - 0.5 * 0.2**2) / (1.0 - 0.5) * (partial - 0.5)
    if key == "weighted-logloss":
        return np.mean(
            [sk.log_loss(targets[targets == c], p[targets == c], labels=range(p.shape[1])) for c in set(targets)]
        )
    if key in ("map3", "map5"):  # for one image with one true class, scikit-learn's average precision is 1 / rank
        single = [sk.label_ranking_average_precision_score(one_hot[[i]], p[[i]]) for i in range(len(p))]
        return np.mean([value if value > 1 / int(key[3]) - 0.01 else 0 for value in single])
    return {
        "accuracy": lambda: sk.accuracy_score(targets, predicted),
        "balanced-accuracy": lambda: sk.balanced_accuracy_score(targets, predicted),
        "logloss": lambda: sk.log_loss(targets, p),
        "f1": lambda: sk.f1_score(targets, predicted, average="macro"),
        "f1-positive": lambda: sk.f1_score(targets, predicted),
        "f2-positive": lambda: sk.fbeta_score(targets, predicted, beta=2),
        "f0.5-positive": lambda: sk.fbeta_score(targets, predicted, beta=0.5),
        "mcc": lambda: sk.matthews_corrcoef(targets, predicted),
        "f1-micro": lambda: sk.f1_score(targets, predicted, average="micro"),
        "qwk": lambda: sk.cohen_kappa_score(targets, nearest_grades(p), weights="quadratic"),
        "brier": lambda: np.mean((p[:, 1] - targets) ** 2) if two else np.mean(((p - one_hot) ** 2).sum(axis=1)),
    }[key]()


@pytest.mark.parametrize("key", OF_CLASSES)
@pytest.mark.parametrize("classes", [2, 4, 7])
def test_scores_equal_scikit_learns(key, classes):
    if key in TWO_ONLY and classes > 2:
        return
    for decimals in (1, 9):
        targets, probabilities = made_up(classes, decimals=decimals)
        score = METRICS[key].score(targets, probabilities)
        assert score == pytest.approx(expected(key, targets, probabilities), abs=1e-12)


@pytest.mark.parametrize("key", OF_CLASSES)
@pytest.mark.parametrize("classes", [2, 4])
def test_weights_equal_repetitions_and_draws_equal_scores(key, classes):
    if key in TWO_ONLY and classes > 2:
        return
    for decimals in (0, 9):  # with ties and without
        targets, probabilities = made_up(classes, decimals=decimals)
        targets[0], probabilities[0] = 1, np.eye(classes)[0]  # quite sure, and wrong
        weights = np.random.default_rng(1).integers(0, 4, (15, 300)).astype(np.uint8)
        weights[3] *= targets != 1  # without the positive class of two
        score, values = scored(key, targets, probabilities, weights)
        assert score == METRICS[key].score(targets, probabilities)
        for k, (drawn, value) in enumerate(zip(weights, values, strict=True)):
            rows = np.repeat(np.arange(300), drawn)
            repeated = METRICS[key].score(targets[rows], probabilities[rows])
            assert value == pytest.approx(repeated, abs=1e-9, nan_ok=True)
            assert METRICS[key].score(targets, probabilities, drawn) == pytest.approx(repeated, abs=1e-9, nan_ok=True)
            if len(set(targets[rows])) == classes and k < 5:  # the plain version of MAP takes seconds for all
                assert value == pytest.approx(expected(key, targets[rows], probabilities[rows]), abs=1e-9)
        assert np.isfinite(np.delete(values, 3)).all()


def test_f_beta_and_matthews_take_weights_and_are_0_where_all_images_are_read_as_one_class():
    weights = np.random.default_rng(3).random(300)
    for classes in (2, 5):
        targets, p = made_up(classes)
        value = sk.matthews_corrcoef(targets, p.argmax(axis=1), sample_weight=weights)
        assert METRICS["mcc"].score(targets, p, weights) == pytest.approx(value, abs=1e-12)
        assert METRICS["mcc"].score(targets, np.eye(classes)[0 * targets], weights) == 0
        assert METRICS["mcc"].score(0 * targets, p, weights) == 0
    targets, p = made_up(2)
    for key, beta in {"f0.5-positive": 0.5, "f1-positive": 1, "f2-positive": 2}.items():
        value = sk.fbeta_score(targets, p.argmax(axis=1), beta=beta, sample_weight=weights)
        assert METRICS[key].score(targets, p, weights) == pytest.approx(value, abs=1e-12)
        assert METRICS[key].score(targets, np.eye(2)[0 * targets], weights) == 0


@pytest.mark.parametrize("rarity", [0.02, 0.5, 0.98])
def test_vectorised_areas_equal_scikit_learns_for_rare_and_common_positives(rarity):
    rng = np.random.default_rng(2)
    targets = (rng.random(500) < rarity).astype(int)
    score = np.round(rng.normal(size=500) + targets, 1)
    probabilities = softmax(np.stack([np.zeros(500), score], axis=1))
    weights = bootstrap_weights(np.arange(500), 30)
    rows = [np.repeat(np.arange(500), drawn) for drawn in weights]
    for key in ("auc", "pauc"):
        single = [expected(key, targets[r], probabilities[r]) for r in rows]
        assert scored(key, targets, probabilities, weights)[1] == pytest.approx(single, abs=1e-12)


def test_a_missing_class_is_left_out_of_the_mean():
    targets, probabilities = made_up(4)
    kept = targets != 2
    part, rest = targets[kept], probabilities[kept]
    predicted = rest.argmax(axis=1)
    assert (predicted == 2).any()
    areas = [sk.roc_auc_score(part == c, rest[:, c]) for c in (0, 1, 3)]
    f1s = sk.f1_score(part, predicted, average=None, labels=[0, 1, 3])
    recalls = [np.mean(predicted[part == c] == c) for c in (0, 1, 3)]
    for key, value in {"auc": np.mean(areas), "f1": np.mean(f1s), "balanced-accuracy": np.mean(recalls)}.items():
        assert METRICS[key].score(part, rest) == pytest.approx(value)
        values = scored(key, targets, probabilities, kept[None].astype(np.uint8))[1]
        assert values == pytest.approx([value]), "missing from a draw"
    rest = 1e-3 * rest + 0.999 * np.eye(4)[np.where(predicted == 2, 3, predicted)]  # nearly sure, never of grade 2
    assert set(nearest_grades(rest)) == {0, 1, 3}
    value = sk.cohen_kappa_score(part, nearest_grades(rest), labels=[0, 1, 2, 3], weights="quadratic")
    assert METRICS["qwk"].score(part, rest) == pytest.approx(value), "grade 3 stays two grades from grade 1"


def test_qwk_reads_the_grade_nearest_to_the_expected_one():
    p = np.array([[0.4, 0.25, 0.35], [0.5, 0.5, 0], [0.5, 0.25, 0.25], [0, 0.5, 0.5], [0.51, 0.49, 0], [0, 0, 1]])
    assert METRICS["qwk"].read(p).tolist() == [1, 1, 1, 2, 0, 2], "a half is rounded up"
    assert METRICS["qwk"].read(p).dtype == np.int64
    assert METRICS["f1"].read(p).tolist() == p.argmax(axis=1).tolist() == [0, 0, 0, 1, 0, 2]
    assert METRICS["qwk"].score(np.array([1, 1, 1, 2, 0, 2]), p) == 1
    assert {key for key in OF_CLASSES if METRICS[key].read} == {key for key in OF_CLASSES if METRICS[key].scores_class}
    probabilities = made_up(5)[1]
    assert METRICS["qwk"].read(probabilities).tolist() == nearest_grades(probabilities).tolist()


def test_balanced_log_loss_weighs_each_class_the_same():
    targets, p = np.array([0, 0, 0, 1]), np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.9, 0.1]])
    assert METRICS["weighted-logloss"].score(targets, p) == pytest.approx((np.log(2) + np.log(10)) / 2)
    assert METRICS["weighted-logloss"].score(targets, p, [1, 1, 2, 7]) == pytest.approx((np.log(2) + np.log(10)) / 2)
    assert METRICS["weighted-logloss"].score(targets, p, [1, 1, 2, 0]) == pytest.approx(np.log(2)), "a class is missing"


@pytest.mark.parametrize("key", OF_CLASSES)
def test_undefined_scores_are_nan(key):
    targets, probabilities = made_up(2)
    weights = bootstrap_weights(np.arange(300), 5)
    alone = np.zeros(300, int)
    undefined = key in ("auc", "pauc")
    assert np.isnan(METRICS[key].score(alone, probabilities)) == undefined
    assert np.isnan(scored(key, alone, probabilities, weights)[1]).all() == undefined
    assert np.isnan(METRICS["qwk"].score(alone, np.tile([0.9, 0.1], (300, 1)))), "every prediction is right"
    assert np.isnan(METRICS[key].score(targets, probabilities, np.zeros(300)))
    weights[0] = 0  # a fold without a drawn image
    assert np.isnan(scored(key, targets, probabilities, weights)[1]).tolist() == [True] + [False] * 4
    assert np.isnan(scored(key, targets, probabilities, 0 * weights)[1]).all()
    for bad in (np.nan, np.inf):
        damaged = probabilities.copy()
        damaged[7, 1] = bad
        score, values = scored(key, targets, damaged, weights)
        assert np.isnan(score)
        assert np.isnan(values).all()


def test_a_metric_without_draws_is_scored_draw_by_draw(monkeypatch):
    def share_of_targets(targets, probabilities, weights):
        assert (weights > 0).all()
        return np.average(targets, weights=weights)

    monkeypatch.setitem(METRICS, "share", metrics.Metric("share of targets", share_of_targets))
    targets, probabilities = made_up(2)
    weights = bootstrap_weights(np.arange(300), 20)
    score, values = scored("share", targets, probabilities, weights)
    assert score == targets.mean()
    assert values == pytest.approx(weights @ targets / 300)


def test_fits_gives_the_reason_why_classes_do_not_suit():
    assert METRICS["pauc"].fits(["a", "b"]) is None
    assert METRICS["pauc"].fits(["a", "b", "c"]) == "it needs two classes, and there are 3"
    for classes in (["0", "1", "2"], ["-1", "0", "1"], ["10", "20", "30"], ["1", "0"]):
        assert METRICS["qwk"].fits(classes) is None
    for classes in (["0", "1", "10", "2"], ["0", "1", "3"], ["0", "1", "bad"], ["0.5", "1.5"], ["1", "²"]):
        assert METRICS["qwk"].fits(classes).endswith(f"not {', '.join(classes)}")
    assert all(METRICS[key].fits(["0", "1"]) is None for key in OF_CLASSES)
    assert [Classes(names).default_metric() for names in (["a", "b"], ["a", "b", "c"])] == ["auc", "accuracy"]


def test_is_better_knows_the_metrics_direction_and_nan():
    nan = float("nan")
    for key in METRICS:
        smaller = METRICS[key].name in "RMSE MAE MCRMSE".split() or key == "brier" or key.endswith("logloss")
        assert is_better(key, 0.6, 0.5) != smaller
        assert is_better(key, 0.5, 0.6) == smaller
        assert is_better(key, 0.5, 0.5), "the last of equal epochs is kept"
        assert not is_better(key, nan, 0.5)
        assert is_better(key, 0.5, nan)
        assert is_better(key, nan, nan)


def test_bootstrap_draws_groups_and_the_interval_contains_the_score():
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 2
    score = np.clip(targets * 0.3 + rng.uniform(0, 0.7, 60), 0, 1)
    probabilities = np.stack([1 - score, score], axis=1)
    ten_copies = np.repeat(np.arange(60), 10)
    alone, grouped, single = (bootstrap_weights(groups, 500) for groups in (np.arange(60), ten_copies, np.arange(600)))
    assert grouped.shape == (500, 600)
    assert grouped.dtype == np.uint8
    assert (grouped.reshape(500, 60, 10) == grouped.reshape(500, 60, 10)[..., :1]).all(), "a group is drawn whole"
    assert (alone.sum(axis=1) == 60).all()
    assert (alone == bootstrap_weights([f"source {k:02}" for k in range(60)], 500)).all(), "names don't matter"

    def width(weights, rows):
        return np.ptp(interval(scored("auc", targets[rows], probabilities[rows], weights)[1]))

    assert width(grouped, ten_copies) == pytest.approx(width(alone, np.arange(60)), rel=0.15)
    assert width(single, ten_copies) < 0.5 * width(grouped, ten_copies), "drawn images would be sure of too much"
    area, values = scored("auc", targets, probabilities, alone)
    low, high = interval(values)
    assert low < area < high
    assert [np.mean(values < low), np.mean(values > high)] == pytest.approx([0.025, 0.025], abs=0.005)


def test_an_interval_of_few_finite_values_is_undefined():
    assert interval(np.array([0.5] * 5 + [np.nan] * 5)) == (0.5, 0.5)
    for values in ([0.5] * 4 + [np.nan] * 5, [np.inf] * 3, []):
        assert np.isnan(interval(np.array(values))).all()


def test_mean_of_folds_leaves_out_a_fold_without_a_score():
    targets, probabilities = made_up(2)
    folds = np.arange(300) % 3
    targets[folds == 2] = 0
    weights = np.ones((2, 300), np.uint8)
    weights[1, (folds == 1) & (targets == 1)] = 0
    each = [sk.roc_auc_score(targets[folds == k], probabilities[folds == k, 1]) for k in (0, 1)]
    score, values = intervals.mean_of_folds("auc", targets, probabilities, folds, weights)
    assert score == pytest.approx(np.mean(each))
    assert values == pytest.approx([np.mean(each), each[0]])
    score, values = intervals.mean_of_folds("auc", 0 * targets, probabilities, folds, weights)
    assert np.isnan([score, *values]).all()


def test_verdicts_name_the_better_experiment_and_leave_nan_out():
    steady, noise = np.full(100, 0.5), np.linspace(-0.01, 0.02, 100)
    figures = "Δ = +0.0123, 95 % +0.0101 … +0.0199"
    better = steady + np.repeat([0.0101, 0.0150, 0.0199], [5, 90, 5])
    higher = "B against A: B scores higher on these images (one seed each)"
    lower = "B against A: A scores lower, so better, on these images (one seed each)"
    assert (
        verdict("A", (0.5, steady), "B", (0.5123, better), True) == f"{higher}: {figures}, better in 100 % of samples"
    )
    assert verdict("A", (0.5, steady), "B", (0.5123, better), False) == f"{lower}: {figures}, better in 0 % of samples"
    line = verdict("A", (0.5, steady), "B", (0.49, steady - 0.01), False)
    assert line.startswith("B against A: B scores lower, so better, on these images (one seed each): Δ = -0.0100, ")
    assert line.endswith("95 % -0.0100 … -0.0100, better in 100 % of samples")
    same = "B against A: no evidence either way: Δ = +0.0000, 95 % +0.0000 … +0.0000, better in 0 % of samples"
    assert verdict("A", (0.5, steady), "B", (0.5, steady), True) == same
    gaps = np.where(np.arange(100) % 3 == 0, np.nan, 0.5 + noise)
    share = np.mean(noise[np.arange(100) % 3 > 0] > 0)
    for larger_is_better, part in ((True, share), (False, 1 - share)):
        line = verdict("A", (0.5, steady), "B", (0.5, gaps), larger_is_better)
        assert line.startswith("B against A: no evidence either way")
        assert line.endswith(f"better in {100 * part:.0f} % of samples")
    few = np.where(np.arange(100) < 60, np.nan, 0.9)
    undefined = "can't be compared: the score is undefined in {} of 100 bootstrap samples"
    assert verdict("A", (0.5, steady), "B", (0.9, few), True) == f"B against A: {undefined.format(60)}"
    assert verdict("A", (0.5, few), "B", (np.nan, steady * np.nan), True) == f"B against A: {undefined.format(100)}"
