"""From which probability on is a label read? Thresholds for the metrics of sets of labels, fitted on held-out images.

Metrics, blends and submissions all read a label above 0.5. So a threshold isn't handed around: predictions are moved,
each label's in the same order as before, until the threshold lies at 0.5.
Shapes: N images, K labels, T thresholds tried; targets float32 [N, K] of 0 and 1, predictions float64 [N, K], 0 to 1.
"""

import numpy as np

from kit.score.metrics import METRICS, mean_of_defined

GRID = np.concatenate([np.arange(1, 100) / 1000, np.arange(10, 100) / 100])  # rare labels have low probabilities
BLOCK = 1000  # images counted at a time: 28 MB of whole numbers at 3,500 labels


def fit(metric_key, targets, predictions, per_label=None):
    """→ the thresholds float64 [K], above 0 and below 1, that make the metric, one of sets, best on these images.

    per_label: None, True where the metric is a mean over labels. False: one of GRID for all labels, the middle one of
    those that are equally good. True: one for each label, with which its own F1 is best; 0.5 for a label that no image
    has. Without any label, or with a prediction that isn't finite, they are 0.5."""
    if not np.any(targets) or not np.isfinite(predictions).all():
        return np.full(predictions.shape[1], 0.5)
    if METRICS[metric_key].of_sets[0] == "labels" if per_label is None else per_label:
        return np.array([best_cut(t > 0, p) for t, p in zip(targets.T, predictions.T, strict=True)])
    scores = curve(metric_key, targets, predictions)
    best = np.flatnonzero(scores == scores.max())
    return np.full(predictions.shape[1], GRID[best[len(best) // 2]])


def curve(metric_key, targets, predictions):
    """→ the metric float64 [T] at each threshold of GRID. Each probability is looked up once, and then counted."""
    over, quality = METRICS[metric_key].of_sets
    (images, labels), steps = predictions.shape, len(GRID) + 1
    read = np.zeros((labels if over == "labels" else images, steps))
    hits = np.zeros_like(read)
    for start in range(0, images, BLOCK):
        rows = slice(start, start + BLOCK)
        part, true = predictions[rows], targets[rows] > 0
        below = np.searchsorted(GRID, part)  # how many thresholds read this label
        below[np.arange(len(part)), part.argmax(axis=1)] = len(GRID)  # the most probable one is always read
        counted = np.arange(labels) if over == "labels" else np.arange(len(part))[:, None]
        into, cells = slice(None) if over == "labels" else rows, counted * steps + below
        for table, some in ((read, cells.ravel()), (hits, cells[true])):
            table[into] += np.bincount(some, minlength=table[into].size).reshape(-1, steps)
    true = np.sum(targets > 0, axis=0 if over == "labels" else 1, dtype=np.float64)[:, None]
    counts = [*(np.cumsum(table[:, :0:-1], axis=1)[:, ::-1] for table in (hits, read)), true]
    counts = [count.sum(axis=0, keepdims=True) for count in counts] if over == "pairs" else counts
    with np.errstate(invalid="ignore"):
        values = quality(*counts)
    return mean_of_defined(values[(counts[2] > 0).ravel()] if over == "labels" else values)  # as in set_metric


def best_cut(true, scores):
    """→ the threshold (float) above which one label's F1 is best: true bool [N], scores float [N] from 0 to 1.

    The best set ends with an image that has the label: going on to one that hasn't only adds a mistake."""
    own = np.sort(scores[true & (scores > 0)])  # nothing lies between 0 and a threshold below
    if not len(own):
        return 0.5
    every = np.sort(scores)
    first = np.searchsorted(every, own)
    hits = np.arange(len(own), 0, -1)  # of equal probabilities the first has them all, and it is the best
    best = np.argmax(hits / (len(every) - first + true.sum()))
    lower = every[first[best] - 1] if first[best] else 0
    middle = min((own[best] + lower) / 2, np.nextafter(own[best], 0))  # between neighbouring floats there is none
    return max(middle, np.finfo(np.float64).tiny)


def apply(predictions, thresholds):
    """Moves predictions [N, K], each label's by a rising function, so that its threshold (of [K]) comes to lie at 0.5,
    and 0 and 1 stay. → float64 [N, K]; what isn't finite isn't in the result either."""
    above = 0.5 + (predictions - thresholds) / (2 * (1 - thresholds))
    above = np.maximum(above, np.nextafter(0.5, 1))  # a prediction hardly above its threshold stays above
    return np.where(predictions > thresholds, above, predictions / (2 * thresholds))


def best(metric_key, targets, predictions):
    """→ predictions moved by thresholds that were fitted on the same images, so that epochs can be compared."""
    return apply(predictions, fit(metric_key, targets, predictions))


def held_out(metric_key, targets, predictions, folds):
    """Moves each fold's predictions by thresholds fitted on the other folds (int [N]) → float64 [N, K]. Their score is
    honest, unless there is one fold only: then they are fitted on itself."""
    moved = np.empty(predictions.shape)
    for fold in np.unique(folds):
        rows = folds == fold
        others = ~rows if not rows.all() else rows
        moved[rows] = apply(predictions[rows], fit(metric_key, targets[others], predictions[others]))
    return moved
