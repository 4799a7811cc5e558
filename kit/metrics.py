"""What is a good prediction? The metrics, their bootstrap intervals and comparisons.

A new metric is one function score(targets, probabilities, weights) and one entry in METRICS. scikit-learn computes the
scores. `draws`, which is optional, scores all bootstrap samples at once: it sorts once and weights many times.
Shapes: N images, K classes, D draws (bootstrap samples); targets int [N], probabilities float [N, K].
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from sklearn import metrics as sk

from common import listing

BLOCK = 16  # draws weighted at a time: 6 MB of weights at 100,000 images fit the cache; 64 take twice as long


class Metric(NamedTuple):
    name: str
    function: Callable  # gets finite probabilities and weights above 0, float [N]; other files call `score`
    larger_is_better: bool = True
    draws: Callable | None = None  # (targets, probabilities, weights uint8 [D, N]) → float [D]; None: `score` D times
    fits: Callable = lambda classes: None  # the reason (str) why classes of these names don't suit the metric, or None
    of_labels: bool = False  # whether it scores the most probable class alone, so that a submission holds labels

    def score(self, targets, probabilities, weights=None):
        """Returns a float, NaN where it is undefined or a probability isn't finite. weights: numbers [N], or None."""
        weights = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
        if not weights.any() or not np.isfinite(probabilities).all():
            return np.nan
        if not weights.all():  # a class whose images all have weight 0 is missing
            targets, probabilities, weights = (part[weights > 0] for part in (targets, probabilities, weights))
        return float(self.function(targets, probabilities, weights))


def roc_area(targets, probabilities, weights, missed=1):
    """AUC of the second of two classes; of more, the mean of one against the rest over those that aren't missing.
    missed=0.2 makes it ISIC 2024's partial AUC: only the area above a true positive rate of 80 %, 0 to 0.2."""
    count = probabilities.shape[1]
    curves = ((targets != c, -probabilities[:, c]) for c in range(count == 2, count))  # flipped: max_fpr limits x
    areas = [sk.roc_auc_score(*c, sample_weight=weights, max_fpr=missed) for c in curves if len(np.unique(c[0])) == 2]
    area, least = mean_of_defined(areas), 0.5 * missed**2
    return area if missed == 1 else least + (missed - least) * (area - 0.5) / 0.5  # scikit-learn scales it to 0.5 … 1


@np.errstate(invalid="ignore")  # 0 / 0 is NaN: undefined
def area_draws(targets, probabilities, weights, missed=1):
    """roc_area for weights uint8 [D, N] → float64 [D]. Of a curve, x counts the positives missed, y the negatives."""
    count = probabilities.shape[1]
    curves = [roc_steps(targets == c, probabilities[:, c]) for c in range(count == 2, count)]
    areas = np.empty((len(curves), len(weights)))
    for start in range(0, len(weights), BLOCK):
        block = np.ascontiguousarray(weights[start : start + BLOCK].T, np.float32)  # exact up to 16 million images
        for steps, row in zip(curves, areas, strict=True):
            positive, negative = np.split(steps @ block, 2)
            x, y = (np.cumsum(part, axis=0, dtype=np.float64) for part in (positive, negative))
            width = np.clip(missed * x[-1] - (x - positive), 0, positive)
            height = y - negative + negative * width / np.maximum(positive, 1) / 2
            row[start : start + BLOCK] = (width * height).sum(axis=0) / (x[-1] * y[-1])
    return mean_of_defined(areas)


def roc_steps(positive, scores):
    """The steps of a ROC curve, from the lowest score up: sparse 0/1 [2 S, N], S rows of positives, S of negatives. A
    step is a score that the rarer kind has, or all the scores between two of those, where the curve is straight."""
    edges = np.unique(scores[positive == (positive.mean() < 0.5)])
    steps = 2 * len(edges) + 1
    rows = np.searchsorted(edges, scores) + np.searchsorted(edges, scores, side="right") + steps * ~positive
    return csr_array((np.ones(len(rows), np.int8), (rows, np.arange(len(rows)))), shape=(2 * steps, len(rows)))


@np.errstate(invalid="ignore")
def mean_of_defined(values):
    """Mean over the first axis of the values that aren't NaN; NaN where there is none."""
    return np.nansum(values, axis=0) / np.sum(~np.isnan(values), axis=0)


def label_metric(name, scorer, **options):
    """Makes a Metric of scikit-learn's scorer(targets, predicted classes). A class that is missing isn't averaged."""

    def score(targets, predicted, weights):
        present = dict(labels=np.unique(targets)) if options.get("average") == "macro" else {}
        return scorer(targets, predicted, sample_weight=weights, **options, **present)

    def draws(targets, probabilities, weights):
        count = probabilities.shape[1]
        pairs, rows = np.unique(targets * count + probabilities.argmax(axis=1), return_inverse=True)
        totals = (np.bincount(rows, w) for w in weights)  # images that are alike in both classes are one row
        return [score(*np.divmod(pairs[total > 0], count), total[total > 0]) for total in totals]

    return Metric(name, lambda t, p, weights: score(t, p.argmax(axis=1), weights), draws=draws, of_labels=True)


def kappa(targets, predicted, sample_weight):
    """Cohen's kappa with quadratic weights; NaN where all targets and predictions are the same class."""
    both = np.stack([targets, predicted])
    options = dict(labels=range(both.max() + 1), weights="quadratic", sample_weight=sample_weight)
    return np.nan if np.ptp(both) == 0 else sk.cohen_kappa_score(*both, **options)


def mean_metric(name, values, scorer=None, larger_is_better=True):
    """Makes a Metric of a mean over images: values(probabilities [N, K], those of the targets [N]) → float [N].
    scorer: the function of scikit-learn that computes the same."""

    def draws(targets, probabilities, weights):
        row = values(probabilities, probabilities[np.arange(len(targets)), targets])
        return [np.average(row, weights=w) for w in weights]

    def score(t, p, w):
        return scorer(t, p, sample_weight=w, labels=range(p.shape[1])) if scorer else draws(t, p, [w])[0]

    return Metric(name, score, larger_is_better, draws)


def _log_losses(probabilities, true):
    tiny = np.finfo(true.dtype).eps  # scikit-learn's bound
    return -np.log(np.clip(true, tiny, 1 - tiny))


def _squared_errors(probabilities, true):
    return ((probabilities**2).sum(axis=1) + 1 - 2 * true) / (2 if probabilities.shape[1] == 2 else 1)


def _precisions_at_5(probabilities, true):
    rank = (probabilities >= true[:, None]).sum(axis=1)  # of equal probabilities, the target's comes last
    return np.where(rank <= 5, 1 / rank, 0)


def _two(classes):
    return None if len(classes) == 2 else f"it needs two classes, and there are {len(classes)}"


def _grades(classes):
    numbers = [int(c) for c in classes if c.lstrip("+-").isdecimal()]
    fit = len(numbers) == len(classes) and len(set(np.diff(numbers))) == 1
    return None if fit else f"it needs whole numbers in order, at equal distances, and not {listing(classes)}"


METRICS = {
    "auc": Metric("AUC", roc_area, draws=area_draws),
    "pauc": Metric("pAUC (TPR > 0.8)", partial(roc_area, missed=0.2), draws=partial(area_draws, missed=0.2), fits=_two),
    "accuracy": label_metric("accuracy", sk.accuracy_score),
    "balanced-accuracy": label_metric("balanced accuracy", sk.recall_score, average="macro"),
    "logloss": mean_metric("log loss", _log_losses, sk.log_loss, larger_is_better=False),
    "f1": label_metric("macro F1", sk.f1_score, average="macro"),
    "f1-micro": label_metric("micro F1", sk.f1_score, average="micro"),
    "qwk": label_metric("QWK", kappa)._replace(fits=_grades),
    "map5": mean_metric("MAP@5", _precisions_at_5),
    "brier": mean_metric("Brier score", _squared_errors, sk.brier_score_loss, larger_is_better=False),
}


def default_metric(classes):
    """AUC for two classes, accuracy for more."""
    return "auc" if len(classes) == 2 else "accuracy"


def is_better(metric_key, new, old):
    """Whether the score `new` is at least as good as `old`; NaN is worse than any number."""
    return bool(np.isnan(old) or (new >= old if METRICS[metric_key].larger_is_better else new <= old))


def bootstrap_weights(groups, draws, seed=777):
    """How often each image is in each bootstrap sample, the same for every experiment: groups [N] → uint8 [draws, N].
    Groups are drawn whole: copies of one source are one piece of evidence, drawn images would be sure of too much."""
    names, groups = np.unique(groups, return_inverse=True)
    rng, count = np.random.default_rng(seed), len(names)
    counts = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(draws))
    return np.stack([drawn.astype(np.uint8)[groups] for drawn in counts])


def scored(metric_key, targets, probabilities, weights):
    """Returns the score and its values over the draws: weights uint8 [D, N] → (float, float64 [D])."""
    metric, values, drawn = METRICS[metric_key], np.full(len(weights), np.nan), weights.any(axis=1)
    if drawn.any() and np.isfinite(probabilities).all():
        draws = metric.draws or (lambda t, p, weights: [metric.score(t, p, w) for w in weights])
        values[drawn] = draws(targets, probabilities, weights[drawn])
    return metric.score(targets, probabilities), values


def mean_of_folds(metric_key, targets, probabilities, folds, weights):
    """As `scored`, but taken in each fold and averaged over the folds where it is defined; folds int [N]."""
    rows = [folds == k for k in np.unique(folds)]
    scores, values = zip(*(scored(metric_key, targets[r], probabilities[r], weights[:, r]) for r in rows), strict=True)
    return float(mean_of_defined(scores)), mean_of_defined(values)


def interval(values):
    """The middle 95 % of the finite ones of values [D]; (nan, nan) where fewer than half are finite."""
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [0.025, 0.975]) if 2 * len(finite) >= max(len(values), 1) else (np.nan, np.nan)
    return float(low), float(high)


def compare(name, other, score, values, other_score, other_values, larger_is_better):
    """Says in one sentence what the paired difference `other` - `name` is, and which is better; values float [D]."""
    delta, deltas = other_score - score, other_values - values
    (low, high), finite = interval(deltas), deltas[np.isfinite(deltas)]
    if np.isnan(delta + low):
        undefined = f"undefined in {len(deltas) - len(finite)} of {len(deltas)} bootstrap samples"
        return f"{other} against {name}: can't be compared: the score is {undefined}"
    better = other if (low > 0) == larger_is_better else name
    verdict = "no evidence either way" if low <= 0 <= high else f"{better} is better"
    figures = f"Δ = {delta:+.4f}, 95 % {low:+.4f} … {high:+.4f}, P(Δ > 0) = {np.mean(finite > 0):.2f}"
    return f"{other} against {name}: {verdict}: {figures}"
