"""How sure is a score? Bootstrap intervals, and paired comparisons.

Shapes: N images, D draws (bootstrap samples); targets and predictions as the metric has them.
"""

import numpy as np

from kit.score.metrics import METRICS, mean_of_defined


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


def leaderboard(score, draws, perfect, ladder, images, tests):
    """What the leaderboard may say, by a CV on the chosen folds. score: the CV; draws: its values in bootstrap samples
    of the groups, float [D]; perfect: the score of perfect predictions; ladder: that of prepared.json; images, tests:
    how many are scored out of fold and in the test set. → dict(low, high, plain: what plain folds would say).

    From the chosen rung to another the odds of an error change as much as those of the simple model do (of a score
    without an upper bound, log loss, the error itself). The interval spans all rungs that match about as well, each as
    wide as the middle 80 % of the draws; and wider, as the test set is a draw too, and a smaller one varies more."""
    chosen, larger_is_better = next(rung for rung in ladder if rung["chosen"]), score <= perfect
    scores = [score, *(rung["score"] for rung in ladder if rung["score"] is not None)]
    worst = -perfect if min(scores) < 0 else 0  # below 0 goes QWK, down to -1
    least = max(perfect, 1e-3) / (2 * images)  # an error smaller than half an image isn't known

    def log_odds(value):  # of an error
        error = np.maximum(np.abs(perfect - value), least)
        return np.log(error / np.maximum(value - worst, least) if larger_is_better else error)

    def on(rung, more=0):
        place = log_odds(score) + log_odds(rung["score"]) - log_odds(chosen["score"]) + more
        return float(
            (perfect + worst * np.exp(place)) / (1 + np.exp(place)) if larger_is_better else perfect + np.exp(place)
        )

    finite = draws[np.isfinite(draws)]
    spread = np.quantile(log_odds(finite), [0.1, 0.9]) - log_odds(score) if len(finite) else [np.nan, np.nan]
    wider = np.sqrt(1 + images / tests)
    ends = [on(rung, wider * end) for rung in ladder if rung["alike"] or rung is chosen for end in spread]
    return dict(low=min(ends), high=max(ends), plain=on(ladder[0]))


def leaderboard_lines(said, ladder):
    """→ sentences on what `leaderboard` returned, for the terminal and the report."""
    chosen, interval = next(rung for rung in ladder if rung["chosen"]), "{low:.3f} to {high:.3f}".format(**said)
    if not chosen["matches"]:
        return ["no forecast: no folds match the test set (matched.png)"]
    if chosen["clusters"]:
        folds = f"matched folds, {chosen['name']}; plain folds would say {said['plain']:.3f}"
        basis = "it rests on how near test images look to training images: it misses what no image shows, and luck"
    else:
        folds = "plain folds" if chosen is ladder[0] else chosen["name"]
        basis = "test images look as much like training images as held-out ones do: by that, the CV can be believed"
    return [f"leaderboard, as far as can be told: {interval} ({folds})", basis]
