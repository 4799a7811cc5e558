"""Decision thresholds and cut points, fitted on held-out images.

Metrics and submissions read labels above 0.5, and the nearest grade or whole number. So cuts aren't passed to them:
predictions are moved, in the same order as before, until the cuts are there.
Shapes: N images; K classes, labels or numbers; T places tried; J cuts. tasks.py says what targets and predictions are.
"""

from collections.abc import Callable
from typing import NamedTuple

from common import listing

import numpy as np
from scipy.special import expit, logit

from kit.score.intervals import bootstrap_weights
from kit.score.metrics import METRICS, Array, Metric, expectation, is_better, mean_of_defined, most_probable

GRID = np.concatenate([np.arange(1, 100) / 1000, np.arange(10, 100) / 100])  # rare labels have low probabilities
BLOCK = 1000  # images counted at a time: 28 MB of whole numbers at 3,500 labels
LEAST = 10  # images that aren't of the commonest class, for cuts on a line
DRAWS = 50  # bootstrap samples
MOST, MOST_CUTS = 20_000, 100  # places tried, for all cuts on a line together; cuts, beyond which none are fitted
ROUNDS = 9  # of Dinkelbach's algorithm, which settles after about five
TINY = 1e-12  # least probability, and least squared distance, that isn't taken for 0


def needs_cuts(metric_key: str, count: int) -> bool:
    """Return whether cuts are fitted for a metric of `count` classes, labels or numbers."""
    kind = METRICS[metric_key].cut
    return kind is not None and (kind != "second" or count == 2)


def fit(metric_key: str, targets: Array, predictions: Array) -> Array | None:
    """Return the cuts that make a metric best on these images: thresholds float64 [K] of labels, else cuts on a line
    float64 [2, J], as fit_line does. None: the metric has no cuts, or there is no sign of better ones."""
    metric = METRICS[metric_key]
    if not needs_cuts(metric_key, predictions.shape[1]):
        return None
    if metric.cut == "sets":
        return fit_sets(metric, targets, predictions)
    cuts = fit_line(metric, targets, predictions) if np.isfinite(predictions).all() else None
    moved = apply(metric_key, predictions, cuts)
    return cuts if is_better(metric_key, metric.score(targets, moved), metric.score(targets, predictions)) else None


def apply(metric_key: str, predictions: Array, cuts: Array | None) -> Array:
    """Return predictions [N, K], moved so that what `fit` returned is where the metric reads. NaN stays NaN."""
    if cuts is None:
        return predictions
    if METRICS[metric_key].cut == "sets":
        return move(predictions, cuts)
    line = LINES[METRICS[metric_key].cut]
    positions = line.positions(predictions)
    return line.predictions(positions + np.interp(positions, cuts[0], cuts[1] - cuts[0]), predictions.shape[1])


def describe(metric_key: str, cuts: Array | None, names: list[str]) -> str | None:
    """Return a sentence on the cuts, or None for a metric without. names: of the K classes, labels or numbers."""
    if not needs_cuts(metric_key, len(names)):
        return None
    if cuts is None:
        return "no cuts: too few images, too many numbers, or no sign of better ones"
    kind = METRICS[metric_key].cut
    if kind == "sets":
        each = [f"{cut:.3g} ({name})" for cut, name in zip(cuts, names, strict=True)]
        read = f"labels are read above {listing(each, 5) if len({*cuts}) > 1 else f'{cuts[0]:.3g}'}"
    elif kind == "second":
        read = f"{names[1]!r} is read above {expit(cuts[0, 0] - 0.5):.3g}"
    else:
        read = f"{kind} are read from {listing(f'{cut:.3g} in place of {plain:g}' for cut, plain in cuts.T)} on"
    return f"{read}, fitted out of fold on all images"


def in_sample(metric_key: str, targets: Array, predictions: Array) -> Array:
    """Return what `held_out` does, with cuts fitted on the same images, so that epochs can be compared."""
    return held_out(metric_key, targets, predictions, np.zeros(len(targets)))


def held_out(metric_key: str, targets: Array, predictions: Array, folds: Array) -> Array:
    """Return predictions [N, K], each fold's moved by cuts fitted on the other folds (int [N]); for other metrics as
    they are. Their score is honest, unless there is one fold only, on which they are then fitted."""
    if not needs_cuts(metric_key, predictions.shape[1]):
        return predictions
    moved = np.empty(predictions.shape)
    for fold in np.unique(folds):
        rows = folds == fold
        others = ~rows if not rows.all() else rows
        cuts = fit(metric_key, targets[others], predictions[others])
        moved[rows] = apply(metric_key, predictions[rows], cuts)
    return moved


def read_classes(metric_key: str, targets: Array, predictions: Array, folds: Array) -> Array:
    """Return the classes, int [N], that the metric reads at cuts of the other folds; by default the most probable."""
    return (METRICS[metric_key].read or most_probable)(held_out(metric_key, targets, predictions, folds))


# ---------------------------------------------------------------- labels


def fit_sets(metric: Metric, targets: Array, predictions: Array) -> Array:
    """Return the thresholds float64 [K], above 0 and below 1, that make a metric of sets best on these images.

    Where the metric is a mean over labels, each label has the threshold with which its own F1 is best; otherwise all
    share one of GRID, the middle one of those that are equally good. They are 0.5 for a label that no image has, and
    for all where no image has any or a prediction isn't finite."""
    if not np.any(targets) or not np.isfinite(predictions).all():
        return np.full(predictions.shape[1], 0.5)
    if metric.of_sets[0] == "each label":
        return np.array([best_threshold(t > 0, p) for t, p in zip(targets.T, predictions.T, strict=True)])
    scores = curve(metric, targets, predictions)
    equals = np.flatnonzero(scores == scores.max())
    return np.full(predictions.shape[1], GRID[equals[len(equals) // 2]])


def curve(metric: Metric, targets: Array, predictions: Array) -> Array:
    """Return the metric (no mean over labels) at each threshold of GRID, float64 [T]."""
    over, quality = metric.of_sets
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


def move(predictions: Array, thresholds: Array) -> Array:
    """Return predictions float64 [N, K], each label's moved by a rising function so that its threshold (of [K]) is at
    0.5, and 0 and 1 stay."""
    above = 0.5 + (predictions - thresholds) / (2 * (1 - thresholds))
    above = np.maximum(above, np.nextafter(0.5, 1))  # a prediction hardly above its threshold stays above
    return np.where(predictions > thresholds, above, predictions / (2 * thresholds))


# ---------------------------------------------------------------- two classes, grades, whole numbers


def fit_line(metric: Metric, targets: Array, predictions: Array) -> Array | None:
    """Return float64 [2, J]: the fitted cuts, rising, and the plain ones, to which they are moved; None without any.

    The best cuts of DRAWS bootstrap samples are averaged, and shrunk towards the plain ones by how much they vary
    (James and Stein 1961, positive part): few images move them little, and fewer than LEAST that aren't of the
    commonest class not at all."""
    line, values = LINES[metric.cut], targets.reshape(len(targets), -1)[:, 0]
    known = np.isfinite(values)
    positions, values = line.positions(predictions[known]), np.floor(values[known] + 0.5)
    if len(values) - np.unique(values, return_counts=True)[1].max(initial=0) < LEAST:
        return None
    plain = line.plain(values, predictions.shape[1])
    if len(plain) > MOST_CUTS:
        return None
    places = places_between(np.unique(positions), MOST // len(plain))
    below = np.searchsorted(places, positions)
    order = np.lexsort((values, positions))  # the same draws, however the images come
    below, values = below[order], values[order] - (plain[0] - 0.5)  # what is read is then the number of cuts below
    best = []
    for drawn in bootstrap_weights(np.arange(len(values)), DRAWS):
        counts = [np.bincount(below, drawn * values**power, len(places) + 1) for power in range(3)]
        above = [count.sum() - np.cumsum(count)[:-1] for count in counts]
        best.append(places[line.best(metric, *above[:2], *(count.sum() for count in counts), len(plain))])
    away, variance = np.mean(best, axis=0) - plain, np.var(best, axis=0).sum()
    kept = 1 - variance / max((away**2).sum(), TINY)
    return np.stack([plain + kept * away, plain]) if kept > 0 else None


def places_between(positions: Array, most: int) -> Array:
    """Return the places below, between and above rising positions, or `most` of them, evenly chosen: float64 [T]."""
    places = np.concatenate([[positions[0] - 1], (positions[1:] + positions[:-1]) / 2, [positions[-1] + 1]])
    return places[np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(int))]


def best_of_counts(metric: Metric, read: Array, hits: Array, images, positives, _, cuts: int) -> Array:
    """Return the number of the best place, int [1], by a metric of counts. read, hits: images and positives above each
    place, [T]; images, positives: all of them."""
    counts = [images - positives - read + hits, hits], [images - read, read], [[images - positives], [positives]]
    return metric.counts(*map(np.array, counts)).argmax(keepdims=True)


def best_of_kappa(metric: Metric, read: Array, hits: Array, images, total, squares, cuts: int) -> Array:
    """Return the numbers of the places, int [J], with the best quadratic kappa. read, hits: images above each place and
    the sum of their values, [T]; total, squares: the sums of all values and of their squares. Kappa is a ratio of sums
    over the cuts, so each cut is found separately (Dinkelbach 1967)."""
    mean = total / images
    gain, kappa = 2 * (hits - mean * read), 0
    cost = (2 * np.arange(cuts)[:, None] + 1 - 2 * mean) * read
    for _ in range(ROUNDS):
        best = (gain - kappa * cost).argmax(axis=1)
        kappa = gain[best].sum() / (squares + cost[np.arange(cuts), best].sum())
    return best


class Line(NamedTuple):
    """Positions of images on a line, whose cuts divide what a metric reads."""

    positions: Callable[[Array], Array]  # predictions [N, K] → float64 [N]
    predictions: Callable[[Array, int], Array]  # the inverse: (positions [N], K) → [N, K]
    plain: Callable[[Array, int], Array]  # (values [N], K) → where the metric reads, rising by 1, float64 [J]
    best: Callable[..., Array]  # see best_of_counts


LINES = {
    "second": Line(  # of two classes: its logit plus 0.5, which is the plain cut then
        lambda p: logit(np.clip(p[:, 1].astype(np.float64), TINY, 1 - TINY)) + 0.5,
        lambda x, count: np.stack([expit(0.5 - x), expit(x - 0.5)], axis=1),
        lambda values, count: np.array([0.5]),
        best_of_counts,
    ),
    "grades": Line(  # the expected grade; back, the probabilities of the two nearest
        expectation,
        lambda x, count: np.maximum(0, 1 - np.abs(np.clip(x, 0, count - 1)[:, None] - np.arange(count))),
        lambda values, count: np.arange(count - 1) + 0.5,
        best_of_kappa,
    ),
    "numbers": Line(
        lambda p: p[:, 0].astype(np.float64),
        lambda x, count: x[:, None],
        lambda values, count: np.arange(values.min(), values.max()) + 0.5,
        best_of_kappa,
    ),
}
