"""What is a good prediction?

A new metric is one function score(targets, predictions, weights) and one entry in METRICS. scikit-learn computes the
scores, or the tests compare with it. `draws`, which is optional, scores all bootstrap samples at once: it sorts once
and weights many times.
Shapes: N images; K classes, labels or numbers; D draws (bootstrap samples). tasks.py says what targets (int [N], or
float32 [N, K]) and predictions (float [N, K]) each task has; of classes and labels the latter are probabilities.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from common import listing

KINDS = dict(classes="one class for each image", labels="sets of labels", numbers="numbers")  # what a task predicts
BLOCK = 16  # draws weighted at a time: 6 MB of weights at 100,000 images fit the cache; 64 take twice as long


class Metric(NamedTuple):
    name: str
    function: Callable  # gets finite predictions and weights above 0, float [N]; other files call `score`
    larger_is_better: bool = True
    draws: Callable | None = None  # (targets, predictions, weights uint8 [D, N]) → float [D]; None: `score` D times
    fits: Callable = lambda classes: None  # the reason (str) why classes of these names don't suit the metric, or None
    of_labels: bool = False  # whether it scores one class for each image alone, so that a submission holds labels
    task: str = "classes"  # which one of kit/score/tasks.py
    read: Callable | None = None  # probabilities [N, K] → the class [N] that it scores; None: the most probable one
    of_sets: tuple = ()  # of a metric of sets of labels, `over` and `quality` of set_metric; empty: of no sets

    def score(self, targets, probabilities, weights=None):
        """Returns a float, NaN where it is undefined or a prediction isn't finite. weights: numbers [N], or None."""
        weights = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
        if not weights.any() or not np.isfinite(probabilities).all():
            return np.nan
        if not weights.all():  # a class whose images all have weight 0 is missing
            targets, probabilities, weights = (part[weights > 0] for part in (targets, probabilities, weights))
        return float(self.function(targets, probabilities, weights))


def sk(name):
    """→ a function that calls sklearn.metrics.NAME, and imports it first: flags and predictions needn't wait for it."""

    def score(*arguments, **options):
        from sklearn import metrics

        return getattr(metrics, name)(*arguments, **options)

    return score


def roc_area(targets, probabilities, weights, missed=1):
    """AUC of the second of two classes; of more, the mean of one against the rest over those that aren't missing; of
    labels, the mean over those that some images have and others don't.
    missed=0.2 makes it ISIC 2024's partial AUC: only the area above a true positive rate of 80 %, 0 to 0.2."""
    curves = ((~positive, -scores) for positive, scores in one_by_one(targets, probabilities))  # max_fpr limits x
    curves = [curve for curve in curves if len(np.unique(curve[0])) == 2]
    areas = [sk("roc_auc_score")(*curve, sample_weight=weights, max_fpr=missed) for curve in curves]
    area, least = mean_of_defined(areas), 0.5 * missed**2
    return area if missed == 1 else least + (missed - least) * (area - 0.5) / 0.5  # scikit-learn scales it to 0.5 … 1


@np.errstate(invalid="ignore")  # 0 / 0 is NaN: undefined
def area_draws(targets, probabilities, weights, missed=1):
    """roc_area for weights uint8 [D, N] → float64 [D]. Of a curve, x counts the positives missed, y the negatives."""
    curves = [roc_steps(*column) for column in one_by_one(targets, probabilities)]
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


def one_by_one(targets, probabilities):
    """→ for each class (of two, for the second) or label: the images that have it, bool [N]; its probabilities [N]."""
    first = int(targets.ndim == 1 and probabilities.shape[1] == 2)
    own = targets.T > 0 if targets.ndim == 2 else (targets == c for c in range(first, probabilities.shape[1]))
    return zip(own, probabilities.T[first:], strict=True)


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


def most_probable(probabilities):
    return probabilities.argmax(axis=1)


def expected_grade(probabilities):
    """Of ordered classes the one nearest to the mean of their numbers 0 … K - 1; of two as near, the higher one."""
    return np.floor((probabilities * np.arange(probabilities.shape[1])).sum(axis=1) + 0.5).astype(np.int64)


def label_metric(name, scorer, quality=None, read=most_probable, **options):
    """Makes a Metric of scikit-learn's scorer(targets, classes that `read` returns). A class that is missing isn't
    averaged. quality(images of a class read as it, in all, read as it rightly or wrongly), float [K, D] each → [D], is
    the same for many draws at once."""

    def score(targets, predicted, weights):
        present = dict(labels=np.unique(targets)) if options.get("average") == "macro" else {}
        return scorer(targets, predicted, sample_weight=weights, **options, **present)

    def draws(targets, probabilities, weights):
        count, predicted = probabilities.shape[1], read(probabilities)
        if quality:
            images, found = np.arange(len(targets)), []
            marks = (targets == predicted), np.ones(len(targets)), np.ones(len(targets))
            places = zip(marks, (targets, targets, predicted), strict=True)
            kinds = [csr_array((mark * 1.0, (row, images)), shape=(count, len(images))) for mark, row in places]
            for start in range(0, len(weights), BLOCK):
                block = np.asarray(weights[start : start + BLOCK], np.float64).T
                found.append(quality(*(kind @ block for kind in kinds)))
            return np.concatenate(found)
        pairs, rows = np.unique(targets * count + predicted, return_inverse=True)
        totals = (np.bincount(rows, w) for w in weights)  # images that are alike in both classes are one row
        return [score(*np.divmod(pairs[total > 0], count), total[total > 0]) for total in totals]

    return Metric(name, lambda t, p, weights: score(t, read(p), weights), draws=draws, of_labels=True, read=read)


def share_of_hits(hits, true, read):
    return hits.sum(axis=0) / true.sum(axis=0)


@np.errstate(invalid="ignore")  # 0 / 0 is NaN: a class that is missing
def mean_recall(hits, true, read):
    return mean_of_defined(hits / true)


@np.errstate(invalid="ignore")
def mean_f1(hits, true, read):
    return mean_of_defined(np.where(true > 0, f_beta(hits, read, true), np.nan))


def kappa(targets, predicted, sample_weight):
    """Cohen's kappa with quadratic weights; NaN where all targets and predictions are the same class."""
    both = np.stack([targets, predicted])
    options = dict(labels=range(both.max() + 1), weights="quadratic", sample_weight=sample_weight)
    return np.nan if np.ptp(both) == 0 else sk("cohen_kappa_score")(*both, **options)


def mean_metric(name, values, scorer=None, larger_is_better=True, weigh=lambda targets, weights: weights, **fields):
    """Makes a Metric of a mean over images: values(probabilities [N, K], those of the targets [N]) → float [N]. Of
    labels, those of the targets are the probabilities [N, K] of being there or not, as each is, and the mean is over
    images and labels. scorer: the function of scikit-learn that computes the same. weigh: what becomes of weights."""

    def draws(targets, probabilities, weights):
        if targets.ndim == 2:
            row = values(probabilities, np.where(targets > 0, probabilities, 1 - probabilities)).mean(axis=1)
        else:
            row = values(probabilities, probabilities[np.arange(len(targets)), targets])
        return [np.average(row, weights=weigh(targets, w)) for w in weights]

    def score(t, p, w):
        return scorer(t, p, sample_weight=weigh(t, w), labels=range(p.shape[1])) if scorer else draws(t, p, [w])[0]

    return Metric(name, score, larger_is_better, draws, **fields)


def _balanced(targets, weights):
    """Weights with which each class that is there weighs the same."""
    totals = np.bincount(targets, weights)
    return weights / np.where(totals > 0, totals, 1)[targets]


def _log_losses(probabilities, true):
    true, tiny = true.astype(np.float64), np.finfo(np.float64).eps  # scikit-learn's bound
    return -np.log(np.clip(true, tiny, 1 - tiny))


def _squared_errors(probabilities, true):
    return ((probabilities**2).sum(axis=1) + 1 - 2 * true) / (2 if probabilities.shape[1] == 2 else 1)


def _precisions(probabilities, true, most):
    rank = (probabilities >= true[:, None]).sum(axis=1)  # of equal probabilities, the target's comes last
    return np.where(rank <= most, 1 / rank, 0)


def set_metric(name, over, quality):
    """Makes a Metric of the sets of labels above 0.5, or of the most probable label where none is.

    quality(labels both read and true, read, true) gets three counts (arrays), and is taken of each image and averaged
    (over="images"), of each label and averaged over those that an image has ("labels"), or of all at once ("pairs")."""

    @np.errstate(invalid="ignore")
    def draws(targets, predictions, weights):
        read, true = predictions > 0.5, targets > 0
        read[np.arange(len(read)), predictions.argmax(axis=1)] = True  # where any is above 0.5, this one is
        sets = [read & true, read, true]
        if over == "labels":
            counts = [csr_array(each.T, dtype=np.float64) for each in sets]
        else:
            counts = [each.sum(axis=1, dtype=np.float64)[None] for each in sets]
        if over == "images":
            row = quality(*counts)[0]
            return [np.average(row, weights=w) for w in weights]
        totals = ([count @ w for count in counts] for w in weights)
        return [mean_of_defined(np.where(total[2] > 0, quality(*total), np.nan)) for total in totals]

    return Metric(name, lambda t, p, w: draws(t, p, [w])[0], draws=draws, task="labels", of_sets=(over, quality))


def f_beta(hits, read, true, beta=1):
    return (1 + beta**2) * hits / (beta**2 * true + read)


def error_metric(name, power, by_column=False):
    """Makes a Metric of the root of the mean power of the errors of the numbers that are there, of all at once or of
    each column and averaged."""

    @np.errstate(invalid="ignore")  # a column without a number is 0 / 0
    def draws(targets, predictions, weights):
        there = ~np.isnan(targets)
        sums = np.where(there, np.abs(targets - predictions) ** power, 0), there.astype(np.float64)
        sums = sums if by_column else [part.sum(axis=1, keepdims=True) for part in sums]
        return mean_of_defined(np.array([(w @ sums[0]) / (w @ sums[1]) for w in weights]).T ** (1 / power))

    return Metric(name, lambda t, p, w: draws(t, p, [w])[0], larger_is_better=False, draws=draws, task="numbers")


def determination(targets, predictions, weights):
    """R², the mean over the columns whose numbers aren't all the same."""
    columns = ((~np.isnan(t), t, p) for t, p in zip(targets.T, predictions.T, strict=True))
    columns = [(t[there], p[there], weights[there]) for there, t, p in columns if len(np.unique(t[there])) > 1]
    return mean_of_defined([sk("r2_score")(t, p, sample_weight=w) for t, p, w in columns])


def kappa_of_numbers(targets, predictions, weights):
    """Quadratic kappa of one number, rounded (a half upwards) and brought into the range of the targets."""
    there = ~np.isnan(targets[:, 0])
    if not there.any():
        return np.nan
    true, guess = (np.floor(part[there, 0] + 0.5).astype(np.int64) for part in (targets, predictions))
    return kappa(true - true.min(), np.clip(guess, true.min(), true.max()) - true.min(), weights[there])


def _two(classes):
    return None if len(classes) == 2 else f"it needs two classes, and there are {len(classes)}"


def _one(classes):
    return None if len(classes) == 1 else f"it needs one number, and there are {len(classes)}"


def _grades(classes):
    numbers = [int(c) for c in classes if c.lstrip("+-").isdecimal()]
    fit = len(numbers) == len(classes) and len(set(np.diff(numbers))) == 1
    return None if fit else f"it needs whole numbers in order, at equal distances, and not {listing(classes)}"


METRICS = {
    "auc": Metric("AUC", roc_area, draws=area_draws),
    "pauc": Metric("pAUC (TPR > 0.8)", partial(roc_area, missed=0.2), draws=partial(area_draws, missed=0.2), fits=_two),
    "accuracy": label_metric("accuracy", sk("accuracy_score"), share_of_hits),
    "balanced-accuracy": label_metric("balanced accuracy", sk("recall_score"), mean_recall, average="macro"),
    "logloss": mean_metric("log loss", _log_losses, larger_is_better=False),
    "f1": label_metric("macro F1", sk("f1_score"), mean_f1, average="macro"),
    "f1-positive": label_metric("F1", partial(sk("f1_score"), zero_division=0))._replace(fits=_two),
    "f1-micro": label_metric("micro F1", sk("f1_score"), share_of_hits, average="micro"),
    "qwk": label_metric("QWK", kappa, read=expected_grade)._replace(fits=_grades),
    "map3": mean_metric("MAP@3", partial(_precisions, most=3)),
    "map5": mean_metric("MAP@5", partial(_precisions, most=5)),
    "brier": mean_metric("Brier score", _squared_errors, sk("brier_score_loss"), larger_is_better=False),
    "weighted-logloss": mean_metric("balanced log loss", _log_losses, None, False, weigh=_balanced),
    "column-auc": Metric("mean column AUC", roc_area, draws=area_draws, task="labels"),
    "f1-samples": set_metric("F1 of images", "images", f_beta),
    "f2": set_metric("F2 of images", "images", partial(f_beta, beta=2)),
    "f1-labels": set_metric("macro F1 of labels", "labels", f_beta),
    "f1-sets": set_metric("micro F1 of labels", "pairs", f_beta),
    "binary-logloss": mean_metric("mean column log loss", _log_losses, larger_is_better=False, task="labels"),
    "rmse": error_metric("RMSE", 2),
    "mae": error_metric("MAE", 1),
    "mcrmse": error_metric("MCRMSE", 2, by_column=True),
    "r2": Metric("R²", determination, task="numbers"),
    "qwk-numbers": Metric("QWK of rounded numbers", kappa_of_numbers, fits=_one, task="numbers"),
}


def reason_against(metric_key, task, classes):
    """→ the reason (str) why the metric can't score this task, or classes (labels, numbers) of these names; or None."""
    metric = METRICS[metric_key]
    return metric.fits(classes) if metric.task == task else f"it scores {KINDS[metric.task]}, and the task is {task}"


def is_better(metric_key, new, old):
    """Whether the score `new` is at least as good as `old`; NaN is worse than any number."""
    return bool(np.isnan(old) or (new >= old if METRICS[metric_key].larger_is_better else new <= old))
