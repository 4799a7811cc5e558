"""Metrics, vectorised over bootstrap samples.

A new metric is one function score(targets, predictions, weights) and one entry in METRICS; or, faster, one function
that scores all bootstrap samples at once: it sorts once and weights many times. The tests compare the scores with
scikit-learn's.
Shapes: N images; K classes, labels or numbers; D draws (bootstrap samples). tasks.py says what targets (int [N], or
float32 [N, K]) and predictions (float [N, K]) each task has; those of classes and labels are probabilities.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from common import listing

import numpy as np
from scipy.sparse import csr_array

Array = np.ndarray
SCORED = dict(classes="one class for each image", labels="sets of labels", numbers="numbers")  # by a task's metrics
most_probable = partial(np.argmax, axis=1)  # the class [N] of probabilities [N, K]
BLOCK = 16  # draws weighted at a time: 6 MB of weights at 100,000 images fit the cache; 64 take twice as long


class Metric(NamedTuple):
    name: str
    function: Callable[..., float] | None = None  # gets weights float [N]; None where there is `draws`
    larger_is_better: bool = True
    draws: Callable | None = None  # (targets, predictions, weights uint8 [D, N]) → float [D]; None: `function` D times
    fits: Callable[[list[str]], str | None] = lambda names: None  # why these K names don't suit the metric, or None
    scores_class: bool = False  # a submission holds the classes' names: it scores one class for each image alone
    task: str = "classes"  # the key of a task in kit/score/tasks.py
    read: Callable | None = None  # predictions → the classes int [N] or whole numbers that it scores; None: as they are
    balanced: bool = False  # each class counts the same, however rare: the imbalance sampler suits it
    ranks: bool = False  # it depends only on the order of the images in each column
    cut: str | None = None  # kind of fitted cuts (kit/score/thresholds.py): "sets" or a key of LINES; None: it has none
    of_sets: tuple = ()  # for a metric of sets of labels, `over` and `quality` of set_metric; empty for others
    counts: Callable | None = None  # (hits, read, true), as set_metric's `quality` gets them, each [K, D] → scores [D]

    def score(self, targets: Array, predictions: Array, weights: Array | None = None) -> float:
        """Return the score, NaN where it is undefined or a prediction isn't finite. weights: numbers [N]."""
        weights = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
        if not weights.any() or not np.isfinite(predictions).all():
            return np.nan
        if not weights.all():  # a class whose images all have weight 0 is missing
            targets, predictions, weights = (part[weights > 0] for part in (targets, predictions, weights))
        score = self.function or (lambda t, p, w: self.draws(t, p, w[None])[0])
        return float(score(targets, predictions, weights))


@np.errstate(invalid="ignore")  # 0 / 0 is NaN: undefined
def areas(targets: Array, probabilities: Array, weights: Array, missed: float = 1) -> Array:
    """Compute for each draw, float64 [D], the AUC of the second of two classes; for more classes, the mean of each
    against the rest; for labels, the mean over them; without those that no image or every image has.

    missed=0.2 makes it ISIC 2024's partial AUC: only the area above a true positive rate of 80 %, 0 to 0.2. A curve's x
    counts missed positives, its y negatives."""
    first = int(targets.ndim == 1 and probabilities.shape[1] == 2)
    positives = targets.T > 0 if targets.ndim == 2 else (targets == k for k in range(first, probabilities.shape[1]))
    curves = [roc_steps(*column) for column in zip(positives, probabilities.T[first:], strict=True)]
    each = np.empty((len(curves), len(weights)))
    for start in range(0, len(weights), BLOCK):
        block = np.ascontiguousarray(weights[start : start + BLOCK].T, np.float32)  # exact up to 16 million images
        for steps, row in zip(curves, each, strict=True):
            positive, negative = np.split(steps @ block, 2)
            x, y = (np.cumsum(part, axis=0, dtype=np.float64) for part in (positive, negative))
            width = np.clip(missed * x[-1] - (x - positive), 0, positive)
            height = y - negative + negative * width / np.maximum(positive, 1) / 2
            row[start : start + BLOCK] = (width * height).sum(axis=0) / (x[-1] * y[-1])
    return mean_of_defined(each)


def roc_steps(positive: Array, scores: Array) -> csr_array:
    """Return the steps of a ROC curve, lowest score first: sparse 0/1 [2 S, N], S rows of positives, S of negatives. A
    step is a score that the rarer kind has, or all scores between two of those, where the curve is straight."""
    edges = np.unique(scores[positive == (positive.mean() < 0.5)])
    steps = 2 * len(edges) + 1
    rows = np.searchsorted(edges, scores) + np.searchsorted(edges, scores, side="right") + steps * ~positive
    return csr_array((np.ones(len(rows), np.int8), (rows, np.arange(len(rows)))), shape=(2 * steps, len(rows)))


@np.errstate(invalid="ignore")
def mean_of_defined(values: Array) -> Array:
    """Return the mean over the first axis of the values that aren't NaN; NaN where there is none."""
    return np.nansum(values, axis=0) / np.sum(~np.isnan(values), axis=0)


def expectation(probabilities: Array) -> Array:
    """Return the mean [N] of the numbers 0 … K - 1 with these probabilities [N, K]."""
    return (probabilities * np.arange(probabilities.shape[1])).sum(axis=1)


def expected_grade(probabilities: Array) -> Array:
    """Return the ordered class nearest to the expectation; the higher one of two as near."""
    return nearest_whole(expectation(probabilities)).astype(np.int64)


def nearest_whole(numbers: Array) -> Array:
    """Return numbers rounded to whole ones, a half upwards."""
    return np.floor(numbers + 0.5)


@np.errstate(invalid="ignore")
def kappas(true: Array, read: Array, weights: Array) -> list:
    """Compute Cohen's kappa with quadratic weights for each draw; NaN where all labels and predictions are the same."""
    values = []
    for w in weights:
        mean = partial(np.average, weights=w)
        by_chance = mean((true - mean(true)) ** 2 + (read - mean(read)) ** 2) + (mean(true) - mean(read)) ** 2
        values.append(1 - mean((true - read) ** 2) / by_chance)
    return values


def mean_metric(name: str, values: Callable, weigh: Callable = lambda targets, weights: weights, **fields) -> Metric:
    """Make a Metric of a mean over images: values(probabilities [N, K], those of the targets [N]) → float [N]; for
    labels, of a mean over images and labels, those of the targets [N, K] being p of a label that is there, else 1 - p.
    weigh: (targets, weights) → the weights of the mean."""

    def draws(targets, probabilities, weights):
        if targets.ndim == 2:
            row = values(probabilities, np.where(targets > 0, probabilities, 1 - probabilities)).mean(axis=1)
        else:
            row = values(probabilities, probabilities[np.arange(len(targets)), targets])
        return [np.average(row, weights=weigh(targets, w)) for w in weights]

    return Metric(name, draws=draws, **fields)


def _balanced(targets, weights):
    """Return weights with which each class that is there weighs the same."""
    totals = np.bincount(targets, weights)
    return weights / np.where(totals > 0, totals, 1)[targets]


def _log_losses(probabilities, true):
    true, tiny = true.astype(np.float64), np.finfo(np.float64).eps  # scikit-learn's bound
    return -np.log(np.clip(true, tiny, 1 - tiny))


def _squared_errors(probabilities, true):
    return ((probabilities**2).sum(axis=1) + 1 - 2 * true) / (2 if probabilities.shape[1] == 2 else 1)


def _precisions(probabilities, true, most):
    rank = (probabilities >= true[:, None]).sum(axis=1)  # among equal probabilities, the target's comes last
    return np.where(rank <= most, 1 / rank, 0)


def set_metric(name: str, over: str, quality: Callable, **fields) -> Metric:
    """Make a Metric of the set of labels above 0.5, or of the most probable one where none is (of classes, always).
    quality(hits, read, true) gets counts (arrays) of labels that are both read and true, read, and true. over="each
    image": it is computed for each image and averaged; "each label": for each label and averaged over those that an
    image has; "all": on the sums; "table": on the counts [K, D] of all classes together."""

    @np.errstate(invalid="ignore")  # 0 / 0 is NaN: a label that is missing
    def of_counts(hits, read, true):
        scores = quality(hits, read, true)
        return scores if over == "table" else mean_of_defined(np.where(true > 0, scores, np.nan))

    @np.errstate(invalid="ignore")
    def draws(targets, predictions, weights):
        read, true = sets_of(targets, predictions)
        counts, scores = [read * true, read, true], []
        if over in ("each image", "all"):
            counts = [count.sum(axis=0)[None] for count in counts]
        if over == "each image":
            row = quality(*counts)[0]
            return [np.average(row, weights=w) for w in weights]
        for start in range(0, len(weights), BLOCK):
            block = weights[start : start + BLOCK].T.astype(np.float64)
            scores.append(of_counts(*(count @ block for count in counts)))
        return np.concatenate(scores)

    fields = dict(task="labels", cut="sets", of_sets=(over, quality), counts=of_counts) | fields
    return Metric(name, draws=draws, **fields)


def sets_of(targets: Array, predictions: Array) -> list[csr_array]:
    """Return the labels that are read for each image, and those that it has: sparse 0/1 [K, N] both."""
    images, first = np.arange(len(targets)), most_probable(predictions)
    if targets.ndim == 1:
        ones, shape = np.ones(len(targets)), predictions.shape[::-1]
        return [csr_array((ones, (labels, images)), shape=shape) for labels in (first, targets)]
    read = predictions > 0.5
    read[images, first] = True  # where any is above 0.5, this one is
    return [csr_array(labels.T, dtype=np.float64) for labels in (read, targets > 0)]


def recall(hits: Array, read: Array, true: Array) -> Array:
    return hits / true


def f_beta(hits: Array, read: Array, true: Array, beta: float = 1) -> Array:
    return (1 + beta**2) * hits / (beta**2 * true + read)


def f_beta_of_second(hits: Array, read: Array, true: Array, beta: float = 1) -> Array:
    """Compute the F-beta of the second of two classes, [D] from [2, D]; 0 where no image has it, nor is read so."""
    return np.nan_to_num(f_beta(hits[1], read[1], true[1], beta))


def matthews(hits: Array, read: Array, true: Array) -> Array:
    """Compute the Matthews correlation of the classes, [D] from [K, D] (Gorodkin 2004); 0 where all images have one
    class, or are read as one."""
    spreads = [count.sum(axis=0) ** 2 - (count**2).sum(axis=0) for count in (read, true)]
    covariance = hits.sum(axis=0) * true.sum(axis=0) - (read * true).sum(axis=0)
    return covariance / np.sqrt(np.where(np.minimum(*spreads) > 0, spreads[0] * spreads[1], np.inf))


def error_metric(name: str, power: int, by_column: bool = False) -> Metric:
    """Make a Metric of the root of the errors' mean power: over all numbers, or for each column and averaged."""

    @np.errstate(invalid="ignore")  # a column without a number is 0 / 0
    def draws(targets, predictions, weights):
        there = ~np.isnan(targets)
        sums = np.where(there, np.abs(targets - predictions) ** power, 0), there.astype(np.float64)
        sums = sums if by_column else [part.sum(axis=1, keepdims=True) for part in sums]
        return mean_of_defined(np.array([(w @ sums[0]) / (w @ sums[1]) for w in weights]).T ** (1 / power))

    return Metric(name, larger_is_better=False, draws=draws, task="numbers")


def determination(targets: Array, predictions: Array, weights: Array) -> float:
    """Return R², the mean over the columns whose numbers aren't all the same."""
    columns = ((~np.isnan(t), t, p) for t, p in zip(targets.T.astype(np.float64), predictions.T, strict=True))
    columns = [(t[there], p[there], weights[there]) for there, t, p in columns if len(np.unique(t[there])) > 1]
    errors = [np.average((t - p) ** 2, weights=w) for t, p, w in columns]
    variances = [np.average((t - np.average(t, weights=w)) ** 2, weights=w) for t, _, w in columns]
    return mean_of_defined(1 - np.divide(errors, variances))


def kappa_of_numbers(targets: Array, predictions: Array, weights: Array) -> float:
    """Return the quadratic kappa of one number, rounded (a half upwards) and clipped to the range of the targets."""
    there = ~np.isnan(targets[:, 0])
    if not there.any():
        return np.nan
    true, read = (nearest_whole(part[there, 0].astype(np.float64)) for part in (targets, predictions))
    return kappas(true, np.clip(read, true.min(), true.max()), weights[None, there])[0]


def _needs(count, what):
    return lambda names: None if len(names) == count else f"it needs {what}, and there are {len(names)}"


TWO, ONE = _needs(2, "two classes"), _needs(1, "one number")


def _grades(names):
    numbers = [float(name) for name in names if re.fullmatch(r"[+-]?[0-9]+(\.0*)?", name)]
    fit = len(numbers) == len(names) and len(set(np.diff(numbers))) == 1
    return None if fit else f"it needs whole numbers in order, at equal distances, and not {listing(names)}"


CLASS = dict(task="classes", scores_class=True, read=most_probable, cut=None, of_sets=())  # the most probable class
SECOND = CLASS | dict(cut="second")  # of two classes, the second is read from a fitted probability on
GRADES = dict(scores_class=True, read=expected_grade, cut="grades", fits=_grades)
METRICS: dict[str, Metric] = {
    "auc": Metric("AUC", draws=areas, ranks=True, balanced=True),
    "pauc": Metric("pAUC (TPR > 0.8)", draws=partial(areas, missed=0.2), fits=TWO, ranks=True, balanced=True),
    "accuracy": set_metric("accuracy", "all", recall, **CLASS),
    "balanced-accuracy": set_metric("balanced accuracy", "each label", recall, balanced=True, **CLASS),
    "logloss": mean_metric("log loss", _log_losses, larger_is_better=False),
    "f1": set_metric("macro F1", "each label", f_beta, **SECOND),
    "f1-positive": set_metric("F1", "table", f_beta_of_second, fits=TWO, **SECOND),
    "f2-positive": set_metric("F2", "table", partial(f_beta_of_second, beta=2), fits=TWO, **SECOND),
    "f0.5-positive": set_metric("F0.5", "table", partial(f_beta_of_second, beta=0.5), fits=TWO, **SECOND),
    "f1-micro": set_metric("micro F1", "all", f_beta, **CLASS),
    "mcc": set_metric("MCC", "table", matthews, **SECOND),
    "qwk": Metric("QWK", draws=lambda t, p, w: kappas(t, expected_grade(p), w), **GRADES),
    "map3": mean_metric("MAP@3", partial(_precisions, most=3)),
    "map5": mean_metric("MAP@5", partial(_precisions, most=5)),
    "brier": mean_metric("Brier score", _squared_errors, larger_is_better=False),
    "weighted-logloss": mean_metric("balanced log loss", _log_losses, _balanced, larger_is_better=False, balanced=True),
    "column-auc": Metric("mean column AUC", draws=areas, ranks=True, task="labels"),
    "f1-samples": set_metric("F1 of images", "each image", f_beta),
    "f2": set_metric("F2 of images", "each image", partial(f_beta, beta=2)),
    "f1-labels": set_metric("macro F1 of labels", "each label", f_beta),
    "f1-sets": set_metric("micro F1 of labels", "all", f_beta),
    "binary-logloss": mean_metric("mean column log loss", _log_losses, larger_is_better=False, task="labels"),
    "rmse": error_metric("RMSE", 2),
    "mae": error_metric("MAE", 1),
    "mcrmse": error_metric("MCRMSE", 2, by_column=True),
    "r2": Metric("R²", determination, task="numbers"),
    "qwk-numbers": Metric(
        "QWK of rounded numbers", kappa_of_numbers, fits=ONE, task="numbers", read=nearest_whole, cut="numbers"
    ),
}


def reason_against(metric_key: str, task_key: str, names: list[str]) -> str | None:
    """Return the reason why the metric can't score this task, or classes (labels, numbers) of these names; or None."""
    metric = METRICS[metric_key]
    if metric.task != task_key:
        return f"it scores {SCORED[metric.task]}, and the task is {task_key}"
    return metric.fits(names)


def is_better(metric_key: str, new: float, old: float) -> bool:
    """Return whether the score `new` is at least as good as `old`; NaN is worse than any number."""
    return bool(np.isnan(old) or (new >= old if METRICS[metric_key].larger_is_better else new <= old))
