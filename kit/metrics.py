"""What is a good prediction? The metrics, their bootstrap intervals, comparisons and blends.

A new metric is one function score(targets, probabilities, weights) and one entry in METRICS. A function `draws` instead
scores all bootstrap samples at once: it sorts or counts once and weights many times. The tests compare every metric
with scikit-learn's. Shapes: N images, K classes, D draws (bootstrap samples); targets int [N], probabilities float
[N, K].
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import rankdata
from sklearn import metrics as sk

from common import listing

BLOCK = 16  # draws weighted at a time: 6 MB of weights at 100,000 images fit the cache; 64 take twice as long


class Metric(NamedTuple):
    name: str
    function: Callable | None = None  # gets finite probabilities and weights above 0, float [N]; others call `score`
    larger_is_better: bool = True
    draws: Callable | None = None  # (targets, probabilities, weights [D, N]) → float [D]; replaces `function`
    fits: Callable = lambda classes: None  # the reason (str) why classes of these names don't suit the metric, or None

    def score(self, targets, probabilities, weights=None):
        """Returns a float, NaN where it is undefined or a probability isn't finite. weights: numbers [N], or None."""
        weights = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
        return float(self.scores(targets, probabilities, weights[None])[0])

    def scores(self, targets, probabilities, weights):
        """`score` for each row of weights [D, N] → float64 [D]."""
        values, drawn = np.full(len(weights), np.nan), weights.any(axis=1)
        if not drawn.any() or not np.isfinite(probabilities).all():
            return values
        if self.draws:
            values[drawn] = self.draws(targets, probabilities, weights[drawn])
            return values
        for i in np.flatnonzero(drawn):
            kept = weights[i] > 0  # a class whose images all have weight 0 is missing
            values[i] = self.function(targets[kept], probabilities[kept], weights[i, kept].astype(np.float64))
        return values


@np.errstate(invalid="ignore")  # 0 / 0 is NaN: undefined
def roc_areas(targets, probabilities, weights, missed=1):
    """AUC for weights [D, N] → float64 [D]: of the second of two classes; of more, the mean of one against the rest
    over those that aren't missing. missed=0.2 makes it ISIC 2024's partial AUC: only the area above a true positive
    rate of 80 %, 0 to 0.2. On a curve, x counts the positives missed, and y the negatives."""
    count = probabilities.shape[1]
    curves = [roc_steps(targets == c, probabilities[:, c]) for c in ([1] if count == 2 else range(count))]
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


def of_labels(scorer, macro=False):
    """Makes `draws` of scikit-learn's scorer(targets, predicted classes, sample_weight). macro: its mean over the
    classes that the targets have."""

    def draws(targets, probabilities, weights):
        count, scores = probabilities.shape[1], []
        pairs, rows = np.unique(targets * count + probabilities.argmax(axis=1), return_inverse=True)
        for drawn in weights:
            totals = np.bincount(rows, drawn)  # images that are alike in both classes become one row of their weight
            true, predicted = np.divmod(pairs[totals > 0], count)
            options = dict(average="macro", labels=np.unique(true)) if macro else {}
            scores.append(scorer(true, predicted, sample_weight=totals[totals > 0], **options))
        return scores

    return draws


def kappa(targets, predicted, sample_weight):
    """Cohen's kappa with quadratic weights; NaN where all targets and predictions are the same class."""
    both = np.stack([targets, predicted])
    options = dict(labels=range(both.max() + 1), weights="quadratic", sample_weight=sample_weight)
    return np.nan if np.ptp(both) == 0 else sk.cohen_kappa_score(*both, **options)


def of_means(values):
    """Makes `draws` of a mean over images: values(probabilities [N, K], those of the targets [N]) → float [N]."""

    def draws(targets, probabilities, weights):
        row = values(probabilities, probabilities[np.arange(len(targets)), targets])
        return [np.average(row, weights=drawn) for drawn in weights]

    return draws


def _log_losses(probabilities, true):
    return -np.log(np.maximum(true, np.finfo(true.dtype).eps))  # scikit-learn's bound


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
    "auc": Metric("AUC", draws=roc_areas),
    "pauc": Metric("pAUC (TPR > 0.8)", draws=partial(roc_areas, missed=0.2), fits=_two),
    "accuracy": Metric("accuracy", draws=of_labels(sk.accuracy_score)),
    "balanced-accuracy": Metric("balanced accuracy", draws=of_labels(sk.recall_score, macro=True)),
    "logloss": Metric("log loss", draws=of_means(_log_losses), larger_is_better=False),
    "f1": Metric("macro F1", draws=of_labels(sk.f1_score, macro=True)),
    "f1-micro": Metric("micro F1", draws=of_labels(sk.accuracy_score)),  # the same, since an image has one label
    "qwk": Metric("QWK", draws=of_labels(kappa), fits=_grades),
    "map5": Metric("MAP@5", draws=of_means(_precisions_at_5)),
    "brier": Metric("Brier score", draws=of_means(_squared_errors), larger_is_better=False),
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
    metric = METRICS[metric_key]
    return metric.score(targets, probabilities), metric.scores(targets, probabilities, weights)


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


BLENDS = {"mean": lambda p: p, "rank": lambda p: rankdata(p, axis=0)}


def blend(probabilities, how, weights=None):
    """Blends several models' probabilities [N, K] by BLENDS[how], each with its weight → [N, K], rows sum to 1."""
    weights = np.ones(len(probabilities)) if weights is None else weights
    mixed = sum(w * BLENDS[how](p) for w, p in zip(weights, probabilities, strict=True))
    return mixed / mixed.sum(axis=1, keepdims=True)
