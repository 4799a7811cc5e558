"""Blends of experiments, and weights fitted on the out-of-fold predictions.

A new blend is one function of a model's predictions [N, K] and one entry in BLENDS. Fitted weights look good on the
images that they were fitted on, so 02_oof.py scores them on folds that they weren't fitted on, and writes them into a
file only where that beats equal weights.
Shapes: N images; K classes, labels or numbers; M models; predictions float [N, K] for each model; targets and task as
kit/score/tasks.py has them. oofs: one Oof of kit/experiment.py for each experiment.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from common import UserError, file_hash, listing, say, write_json

import numpy as np
import pandas as pd

from kit.score.metrics import METRICS, Array
from kit.score.tasks import Task
from kit.score.thresholds import needs_cuts

ROUNDS = 50  # of the greedy selection, so weights come in steps of 2 % or more: finer ones would be noise
# Kind of cuts → the metric by which weights are fitted instead, since cuts fit one blend only
STEADY = dict(sets="binary-logloss", second="logloss", grades="logloss", numbers="rmse")
BLENDS: dict[str, Callable[[Array], Array]] = {
    "mean": lambda predictions: predictions,
    "rank": lambda predictions: pd.DataFrame(predictions).rank().to_numpy(),  # equal ones share the mean of their ranks
}


def blend(predictions: Sequence[Array], how: str, weights: Sequence[float] | None, task: Task) -> Array:
    """Return the weighted mean [N, K] of several models' predictions after BLENDS[how]. weights: one each, or None.
    Ranks end between 0 and 1; those of two classes sum to 1, those of more don't: it would change the images' order."""
    weights = np.ones(len(predictions)) if weights is None else weights
    mixed = sum(float(w) * BLENDS[how](p) for w, p in zip(weights, predictions, strict=True))  # float32 stays so
    return mixed / (sum(weights) * (1 if how == "mean" else len(mixed) + task.rows_sum_to_1))


def blend_misfit(how: str, metric_key: str, task: Task, form: dict) -> str | None:
    """Return the reason why a blend doesn't suit the metric or the submission, or None. form: what prepared.json says
    of the submission."""
    if how != "rank":
        return None
    if not task.can_rank:
        return "ranks of numbers are no numbers"
    if not METRICS[metric_key].ranks:
        return f"{METRICS[metric_key].name} scores more than the order of the images"
    if form.get("value", "probability") != "probability" or "summed" in form:
        return "the submission compares classes, and ranks of two classes can't be compared"
    return None


def check_blend(how: str, metric_key: str, task: Task, form: dict) -> None:
    """Raise UserError for a blend that doesn't suit; print what a platform may refuse."""
    if reason := blend_misfit(how, metric_key, task, form):
        raise UserError(f"--blend {how}: {reason}: leave it out")
    if how == "rank" and task.rows_sum_to_1 and len(task) > 2:
        say(f"the ranks of an image's {len(task)} classes don't sum to 1: leave --blend rank out if they must")


def fit_weights(metric_key: str, targets: Array, predictions: Sequence[Array]) -> Array:
    """Return the weights of a mean blend, float [M] with sum 1, by greedy forward selection with replacement (Caruana
    et al. 2004); equal weights where every score is undefined. Each round adds the model that leaves the mean best; the
    best of all rounds counts: from 1 : 0 to 9 : 1 the weights pass through 1 : 1, which may be worse than either."""
    if needs_cuts(metric_key, predictions[0].shape[1]):
        metric_key = STEADY[METRICS[metric_key].cut]
    sign = 1 if METRICS[metric_key].larger_is_better else -1
    count, total = np.zeros(len(predictions)), 0
    best, weights = -np.inf, np.full(len(predictions), 1 / len(predictions))
    for size in range(1, ROUNDS + 1):
        scores = [sign * METRICS[metric_key].score(targets, (total + p) / size) for p in predictions]
        winner = np.where(np.isnan(scores), -np.inf, scores).argmax()  # among equals, the first
        count[winner], total = count[winner] + 1, total + predictions[winner]
        if scores[winner] > best:
            best, weights = scores[winner], count / size
    return weights


def held_out_blend(metric_key: str, targets: Array, predictions: Sequence[Array], folds: Array, task: Task) -> Array:
    """Return a blend [N, K] of each fold's images with weights fitted on the other folds (int [N]). Its score is
    honest: no group is in two folds, so an image's duplicates have no say in its weights."""
    predictions = np.asarray(predictions)
    mixed = np.empty_like(predictions[0])
    for fold in np.unique(folds):
        rows = folds == fold
        weights = fit_weights(metric_key, targets[~rows], predictions[:, ~rows])
        mixed[rows] = blend(predictions[:, rows], "mean", weights, task)
    return mixed


def fitted_on(oofs: Sequence) -> dict:
    """Return what fitted weights rest on, as JSON has it: the metric, and the hashes of each experiment's foldK.csv."""
    shared = sorted(shared_folds(oofs)[0])
    hashes = {oof.exp: {f"fold{k}": file_hash(oof.folder / f"fold{k}.csv") for k in shared} for oof in oofs}
    return dict(metric=oofs[0].prepared.metric, experiments=hashes)


def write_weights(path: Path, oofs: Sequence, weights: dict[str, float], scores: dict[str, float]) -> None:
    """Write {experiment: weight} for 03_infer.py. scores: the honest score `cv`, and its interval."""
    write_json(path, dict(weights=weights, blend="mean", **scores, fitted_on=fitted_on(oofs)))


def read_weights(path: Path, oofs: Sequence, how: str) -> tuple[list[float], float]:
    """Return (the weights in the order of `oofs`, their honest score) from a file of 02_oof.py. Raises UserError where
    they belong to other experiments, to other predictions than the present ones, or to another blend than `how`."""
    exps = [oof.exp for oof in oofs]
    remedy = f"run python 02_oof.py {' '.join(exps)}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        weights, cv = {exp: float(weight) for exp, weight in content["weights"].items()}, float(content["cv"])
        fitted, kind = content["fitted_on"], content["blend"]
        if not (min(weights.values()) >= 0 and 0 < sum(weights.values()) < np.inf):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--weights {path} is missing or isn't a file of weights: {remedy}") from None
    if set(weights) != set(exps):
        raise UserError(f"--weights {path} is for {' '.join(weights)}, not for {' '.join(exps)}: {remedy}")
    if kind != how:
        raise UserError(f"--blend {how}: the weights of {path} are fitted for --blend {kind}: give that, or numbers")
    if fitted != fitted_on(oofs):
        raise UserError(f"--weights {path} was fitted on earlier predictions or for another metric: {remedy}")
    return [weights[exp] for exp in exps], cv


def shared_folds(oofs: Sequence) -> tuple[set[int], list[Array]]:
    """Return the folds that all experiments have finished, and each experiment's rows in them (bool [N]). Raises
    UserError where there is no such fold, or where an experiment is named twice."""
    if len({oof.exp for oof in oofs}) < len(oofs):
        raise UserError(f"an experiment is named twice ({listing(oof.exp for oof in oofs)}): name each once")
    shared = set.intersection(*(set(oof.present) for oof in oofs))
    if not shared:
        finished = "; ".join(f"{oof.exp}: {listing(oof.present)}" for oof in oofs)
        raise UserError(f"no fold is finished in all experiments ({finished}): train one with 01_train_fold.py")
    return shared, [oof.folds.fold.isin(shared).to_numpy() for oof in oofs]
