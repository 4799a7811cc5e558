"""Decision thresholds for multi-label metrics, fitted on held-out images.

Metrics, blends and submissions predict a label above 0.5. So a threshold isn't handed around: predictions are moved,
each label's in the same order as before, until the threshold is at 0.5.
Shapes: N images, K labels, T thresholds tried; targets float32 [N, K] of 0 and 1, predictions float64 [N, K], 0 to 1.
"""

import numpy as np

from kit.score.metrics import METRICS, Array, mean_of_defined

GRID = np.concatenate([np.arange(1, 100) / 1000, np.arange(10, 100) / 100])  # rare labels have low probabilities
BLOCK = 1000  # images counted at a time: 28 MB of whole numbers at 3,500 labels


def fit(metric_key: str, targets: Array, predictions: Array) -> Array:
    """Return the thresholds float64 [K], above 0 and below 1, that make a metric of sets best on these images.

    Where the metric is a mean over labels, each label has the threshold with which its own F1 is best; otherwise all
    share one of GRID, the middle one of those that are equally good. They are 0.5 for a label that no image has, and
    for all where no image has any or a prediction isn't finite."""
    if not np.any(targets) or not np.isfinite(predictions).all():
        return np.full(predictions.shape[1], 0.5)
    if METRICS[metric_key].of_sets[0] == "each label":
        return np.array([best_threshold(t > 0, p) for t, p in zip(targets.T, predictions.T, strict=True)])
    scores = curve(metric_key, targets, predictions)
    equals = np.flatnonzero(scores == scores.max())
    return np.full(predictions.shape[1], GRID[equals[len(equals) // 2]])


def curve(metric_key: str, targets: Array, predictions: Array) -> Array:
    """Return the metric (no mean over labels) at each threshold of GRID, float64 [T]."""
    over, quality = METRICS[metric_key].of_sets
    images, steps = len(predictions), len(GRID) + 1
    read, hits = np.zeros((images, steps)), np.zeros((images, steps))
    for start in range(0, images, BLOCK):
        rows = slice(start, start + BLOCK)
        block, true = predictions[rows], targets[rows] > 0
        below = np.searchsorted(GRID, block)  # how many thresholds read this label
        below[np.arange(len(block)), block.argmax(axis=1)] = len(GRID)  # the most probable one is always read
        cells = np.arange(len(block))[:, None] * steps + below
        for table, counted in ((read, cells.ravel()), (hits, cells[true])):
            table[rows] = np.bincount(counted, minlength=table[rows].size).reshape(-1, steps)
    true = np.sum(targets > 0, axis=1, dtype=np.float64)[:, None]
    counts = [*(np.cumsum(table[:, :0:-1], axis=1)[:, ::-1] for table in (hits, read)), true]
    counts = [count.sum(axis=0, keepdims=True) for count in counts] if over == "all" else counts
    with np.errstate(invalid="ignore"):
        return mean_of_defined(quality(*counts))


def best_threshold(true: Array, scores: Array) -> float:
    """Return the threshold above which one label's F1 is best: true bool [N], scores float [N] from 0 to 1. The best
    set ends with an image that has the label: going on to one that hasn't only adds a mistake."""
    positives = np.sort(scores[true & (scores > 0)])  # a score of 0 is above no threshold
    if not len(positives):
        return 0.5
    every = np.sort(scores)
    first = np.searchsorted(every, positives)
    hits = np.arange(len(positives), 0, -1)  # among equal probabilities the first has them all, and it is the best
    best = np.argmax(hits / (len(every) - first + true.sum()))
    lower = every[first[best] - 1] if first[best] else 0
    middle = min((positives[best] + lower) / 2, np.nextafter(positives[best], 0))  # neighbouring floats have none
    return max(middle, np.finfo(np.float64).tiny)


def apply(predictions: Array, thresholds: Array) -> Array:
    """Return predictions float64 [N, K], each label's moved by a rising function so that its threshold (of [K]) is at
    0.5, and 0 and 1 stay. What isn't finite isn't in the result either."""
    above = 0.5 + (predictions - thresholds) / (2 * (1 - thresholds))
    above = np.maximum(above, np.nextafter(0.5, 1))  # a prediction hardly above its threshold stays above
    return np.where(predictions > thresholds, above, predictions / (2 * thresholds))


def in_sample(metric_key: str, targets: Array, predictions: Array) -> Array:
    """Return what `held_out` does, with thresholds fitted on the same images, so that epochs can be compared."""
    return held_out(metric_key, targets, predictions, np.zeros(len(targets)))


def held_out(metric_key: str, targets: Array, predictions: Array, folds: Array) -> Array:
    """Return predictions float64 [N, K], each fold's moved by thresholds fitted on the other folds (int [N]); for other
    metrics as they are. Their score is honest, unless there is one fold only, on which they are then fitted."""
    if not METRICS[metric_key].of_sets:
        return predictions
    moved = np.empty(predictions.shape)
    for fold in np.unique(folds):
        rows = folds == fold
        others = ~rows if not rows.all() else rows
        moved[rows] = apply(predictions[rows], fit(metric_key, targets[others], predictions[others]))
    return moved
