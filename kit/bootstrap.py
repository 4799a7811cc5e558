"""How sure is a score? Bootstrap intervals, and paired comparisons.

Shapes: N images, D draws (bootstrap samples); targets and predictions as the metric has them.
"""

import numpy as np

from kit.metrics import METRICS, mean_of_defined


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
