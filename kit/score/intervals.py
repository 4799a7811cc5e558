"""Bootstrap intervals, paired comparisons, and the leaderboard forecast.

Shapes: N images, D draws (bootstrap samples); targets and predictions as the metric has them.
"""

import numpy as np

from kit.score.metrics import METRICS, Array, mean_of_defined

Scored = tuple[float, Array]  # a score, and its values in the bootstrap samples, float64 [D]


def bootstrap_weights(groups: Array, draws: int, seed: int = 777) -> Array:
    """Return how often each image is in each bootstrap sample, the same for every experiment: groups [N] → uint8
    [draws, N]. Groups are drawn whole: duplicates are one piece of evidence; drawing images would narrow intervals."""
    names, groups = np.unique(groups, return_inverse=True)
    rng, count = np.random.default_rng(seed), len(names)
    counts = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(draws))
    return np.stack([drawn.astype(np.uint8)[groups] for drawn in counts])


def scored(metric_key: str, targets: Array, predictions: Array, weights: Array) -> Scored:
    """Return the score and its values over the draws; weights uint8 [D, N]."""
    metric, values, drawn = METRICS[metric_key], np.full(len(weights), np.nan), weights.any(axis=1)
    if drawn.any() and np.isfinite(predictions).all():
        draws = metric.draws or (lambda t, p, weights: [metric.score(t, p, w) for w in weights])
        values[drawn] = draws(targets, predictions, weights[drawn])
    return metric.score(targets, predictions), values


def mean_of_folds(metric_key: str, targets: Array, predictions: Array, folds: Array, weights: Array) -> Scored:
    """Return what `scored` does, as a mean over the folds (int [N]) where it is defined."""
    rows = [folds == k for k in np.unique(folds)]
    scores, values = zip(*(scored(metric_key, targets[r], predictions[r], weights[:, r]) for r in rows), strict=True)
    return float(mean_of_defined(scores)), mean_of_defined(values)


def interval(values: Array) -> tuple[float, float]:
    """Return the middle 95 % of the finite ones of values [D]; (nan, nan) where fewer than half are finite."""
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [0.025, 0.975]) if 2 * len(finite) >= max(len(values), 1) else (np.nan, np.nan)
    return float(low), float(high)


def verdict(name: str, score: Scored, other: str, other_score: Scored, larger_is_better: bool) -> str:
    """Return a sentence on the paired difference `other` - `name`, and which scores better."""
    delta, deltas = (end - start for start, end in zip(score, other_score, strict=True))
    (low, high), finite = interval(deltas), deltas[np.isfinite(deltas)]
    if np.isnan(delta + low):
        undefined = f"undefined in {len(deltas) - len(finite)} of {len(deltas)} bootstrap samples"
        return f"{other} against {name}: can't be compared: the score is {undefined}"
    evidence = "no evidence either way"
    if not low <= 0 <= high:
        better = other if (low > 0) == larger_is_better else name
        direction = "higher" if larger_is_better else "lower, so better,"
        evidence = f"{better} scores {direction} on these images (one seed each)"
    share = np.mean(finite > 0 if larger_is_better else finite < 0)
    figures = f"Δ = {delta:+.4f}, 95 % {low:+.4f} … {high:+.4f}, better in {100 * share:.0f} % of samples"
    return f"{other} against {name}: {evidence}: {figures}"


def leaderboard(score: float, draws: Array, perfect: float, candidates: list[dict], images: int, tests: int) -> dict:
    """Return what the leaderboard may show: dict(low, high, plain: had plain folds been chosen), floats.

    score: the CV; draws: its values in bootstrap samples of the groups, float [D]; perfect: the score of perfect
    predictions; candidates: those of prepared.json; images, tests: how many are scored out of fold and in the test set.
    The odds of an error change from the chosen candidate to another by the same factor as the ridge regression's (for a
    score without an upper bound, as log loss, the error itself). The interval spans the candidates that are nearly the
    best, each with the middle 80 % of the draws, widened because the test set is a sample too, the more the smaller it
    is."""
    (chosen,), larger_is_better = [item for item in candidates if item["chosen"]], score <= perfect
    scores = [score, *(candidate["score"] for candidate in candidates if candidate["score"] is not None)]
    worst = -perfect if min(scores) < 0 else 0  # QWK goes below 0, down to -1
    least = max(perfect, 1e-3) / (2 * images)  # an error smaller than half an image isn't known

    def log_odds(value):  # of an error
        error = np.maximum(np.abs(perfect - value), least)
        return np.log(error / np.maximum(value - worst, least) if larger_is_better else error)

    def forecast(candidate, shift=0):
        odds = np.exp(log_odds(score) + log_odds(candidate["score"]) - log_odds(chosen["score"]) + shift)
        return float((perfect + worst * odds) / (1 + odds) if larger_is_better else perfect + odds)

    finite = draws[np.isfinite(draws)]
    spread = np.quantile(log_odds(finite), [0.1, 0.9]) - log_odds(score) if len(finite) else np.full(2, np.nan)
    spanned = [candidate for candidate in candidates if candidate["nearly_best"] or candidate is chosen]
    ends = [forecast(candidate, end) for candidate in spanned for end in np.sqrt(1 + images / tests) * spread]
    return dict(low=min(ends), high=max(ends), plain=forecast(candidates[0]))


def leaderboard_lines(forecast: dict[str, float], candidates: list[dict]) -> list[str]:
    """Return sentences on what `leaderboard` returned, for the terminal and the report."""
    (chosen,) = [candidate for candidate in candidates if candidate["chosen"]]
    if not chosen["near_enough"]:
        return ["no forecast: no folds match the test set (matched.png)"]
    folds = "plain folds" if chosen is candidates[0] else chosen["name"]
    basis = "test images look as much like training images as held-out ones do: "
    basis += "no sign in the images that the CV is too high"
    if chosen["clusters"]:
        folds = f"matched folds, {folds}; plain folds would say {forecast['plain']:.3f}"
        basis = "it rests on how near test images look to training images: it misses what no image shows, and luck"
    return ["8 in 10: the whole test set scores {low:.3f} to {high:.3f} ".format(**forecast) + f"({folds})", basis]
