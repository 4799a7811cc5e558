"""The leaderboard forecast of kit/score/intervals.py: an interval over candidate folds and bootstrap samples."""

import numpy as np
import pytest

from kit.score import intervals

CANDIDATES = [
    dict(name="each image alone", clusters=0, score=0.95, nearly_best=False, chosen=False, near_enough=True),
    dict(name="20 clusters", clusters=20, score=0.8, nearly_best=True, chosen=True, near_enough=True),
    dict(name="14 clusters", clusters=14, score=0.7, nearly_best=True, chosen=False, near_enough=True),
]
DRAWS = np.array([*np.linspace(0.85, 0.95, 101), np.nan, np.inf])


def scored(*scores):
    """Return the candidates with other scores of the simple model."""
    return [candidate | dict(score=score) for candidate, score in zip(CANDIDATES, scores, strict=False)]


def score_of(odds, perfect=1.0):
    return perfect / (1 + odds)


def test_the_interval_spans_the_candidates_that_are_nearly_best_and_the_draws():
    """The odds of an error are 1 : 9 in the CV; the simple model's are 1 : 4, for the other candidate 3 : 7, in plain
    folds 1 : 19."""
    harder, easier = (0.14 / 0.86) / (1 / 9), (0.06 / 0.94) / (1 / 9)  # draws at 10 % and 90 %, to the CV
    forecast = intervals.leaderboard(0.9, DRAWS, 1.0, CANDIDATES, 300, 100)  # twice as wide in log odds: sqrt(1 + 3)
    low, high = score_of(1 / 9 * (3 / 7) / (1 / 4) * harder**2), score_of(1 / 9 * easier**2)
    assert forecast == pytest.approx(dict(low=low, high=high, plain=171 / 175))
    wider = intervals.leaderboard(0.9, DRAWS, 1.0, CANDIDATES, 800, 100)
    low, high = score_of(1 / 9 * (3 / 7) / (1 / 4) * harder**3), score_of(1 / 9 * easier**3)
    assert (wider["low"], wider["high"]) == pytest.approx((low, high))
    (alone,) = [candidate | dict(nearly_best=False) for candidate in CANDIDATES if candidate["chosen"]]
    forecast = intervals.leaderboard(0.9, DRAWS, 1.0, [alone], 300, 100)
    low, high = score_of(1 / 9 * harder**2), score_of(1 / 9 * easier**2)
    assert forecast == pytest.approx(dict(low=low, high=high, plain=0.9)), "the chosen candidate always counts"
    a_fifth = [alone | dict(score=alone["score"] / 5)]  # as the partial AUC is
    forecast = intervals.leaderboard(0.18, DRAWS / 5, 0.2, a_fifth, 300, 100)
    assert forecast == pytest.approx(dict(low=low / 5, high=high / 5, plain=0.9 / 5))


def test_a_hard_candidate_makes_no_score_below_0():
    forecast = intervals.leaderboard(0.6, np.full(100, 0.6), 1.0, scored(0.95, 0.9, 0.3), 300, 100)
    assert forecast["low"] == pytest.approx(1 / (1 + (0.4 / 0.6) * (0.7 / 0.3) / (0.1 / 0.9)))


def test_where_smaller_is_better_no_loss_is_below_0():
    """The simple model's loss is 0.8 for the chosen candidate, 1 for the other, 0.2 in plain folds."""
    forecast = intervals.leaderboard(0.4, np.linspace(0.3, 0.5, 101), 0.0, scored(0.2, 0.8, 1.0), 300, 100)
    low, high = 0.4 * (0.32 / 0.4) ** 2, 0.4 * 1.25 * (0.48 / 0.4) ** 2
    assert forecast == pytest.approx(dict(low=low, high=high, plain=0.1))


def test_a_simple_model_without_errors_leaves_the_odds_as_they_are():
    forecast = intervals.leaderboard(0.9, DRAWS, 1.0, scored(1.0, 1.0, 1.0), 300, 100)
    harder, easier = (0.14 / 0.86) / (1 / 9), (0.06 / 0.94) / (1 / 9)
    low, high = score_of(1 / 9 * harder**2), score_of(1 / 9 * easier**2)
    assert forecast == pytest.approx(dict(low=low, high=high, plain=0.9))


def test_the_forecasts_lines_name_the_folds_and_the_evidence():
    forecast = dict(low=0.84, high=0.9701, plain=0.999)
    first, second = intervals.leaderboard_lines(forecast, CANDIDATES)
    interval = "8 in 10: the whole test set scores 0.840 to 0.970"
    assert first == f"{interval} (matched folds, 20 clusters; plain folds would say 0.999)"
    assert "what no image shows" in second
    unmatched = [candidate | dict(near_enough=False) for candidate in CANDIDATES]
    lines = intervals.leaderboard_lines(forecast, unmatched)
    assert lines == ["no forecast: no folds match the test set (matched.png)"]
    first, second = intervals.leaderboard_lines(forecast, [CANDIDATES[0] | dict(chosen=True)])
    assert first == f"{interval} (plain folds)"
    assert "no sign in the images that the CV is too high" in second
    together = CANDIDATES[0] | dict(name="duplicates together", chosen=True)
    first, second = intervals.leaderboard_lines(forecast, [CANDIDATES[0], together])
    assert first == f"{interval} (duplicates together)"
    assert "no sign in the images that the CV is too high" in second
