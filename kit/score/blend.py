"""How are experiments mixed? Blends, and weights that are fitted on the out-of-fold predictions.

A new blend is one function of a model's probabilities [N, K] and one entry in BLENDS. Fitted weights look good on the
images that they were fitted on, so 02_oof.py scores them on folds that they weren't fitted on, and writes them into a
file only where that beats equal weights.
Shapes: N images, K classes, M models; targets int [N], probabilities float [N, K] of each model.
"""

import json

import numpy as np

from common import UserError, file_hash, listing, write_json
from kit.score.metrics import METRICS

ROUNDS = 50  # of the climb, so weights come in steps of 2 % or more: finer ones would be noise


def ranks(probabilities):
    """float [N, K] → the rank of each image among all N, float [N, K]; equal ones share the mean of theirs."""
    from scipy.stats import rankdata  # takes half a second

    return rankdata(probabilities, axis=0)


BLENDS = {"mean": lambda p: p, "rank": ranks}


def blend(probabilities, how, weights=None, task="classes"):
    """Blends several models' predictions [N, K] by BLENDS[how], each with its weight → [N, K]; of classes, rows sum to
    1. Raises UserError for the ranks of numbers, which would lose their unit."""
    if task == "numbers" and how == "rank":
        raise UserError("--blend rank: ranks of numbers are no numbers: leave it out")
    weights = np.ones(len(probabilities)) if weights is None else weights
    mixed = sum(float(w) * BLENDS[how](p) for w, p in zip(weights, probabilities, strict=True))  # float32 stays so
    if task == "classes":
        mixed /= mixed.sum(axis=1, keepdims=True)
        return mixed
    return mixed / (sum(weights) * (1 if how == "mean" else len(mixed)))


def climb(metric_key, targets, probabilities):
    """Fits the weights of a mean blend: greedy forward selection with replacement (Caruana et al. 2004).

    Each round adds the model that leaves the mean best, the best one first, and the best mean of all rounds is taken. A
    round may be worse than the one before: nine to one can only be reached by way of one to one.
    → float [M], sum 1; equal weights where every score is undefined."""
    if METRICS[metric_key].of_sets:  # which need thresholds that fit the blend
        metric_key = "binary-logloss"
    sign = 1 if METRICS[metric_key].larger_is_better else -1
    count, total = np.zeros(len(probabilities)), 0
    best, weights = -np.inf, np.full(len(probabilities), 1 / len(probabilities))
    for size in range(1, ROUNDS + 1):
        scores = [sign * METRICS[metric_key].score(targets, (total + p) / size) for p in probabilities]
        winner = np.where(np.isnan(scores), -np.inf, scores).argmax()  # of equals, the first
        count[winner], total = count[winner] + 1, total + probabilities[winner]
        if scores[winner] > best:
            best, weights = scores[winner], count / size
    return weights


def held_out_blend(metric_key, targets, probabilities, folds, task="classes"):
    """Blends each fold's images with weights fitted on the other folds (int [N]) → [N, K]. Its score is honest: groups
    lie whole within folds, so an image's copies have no say in its weights."""
    probabilities = np.asarray(probabilities)
    mixed = np.empty_like(probabilities[0])
    for fold in np.unique(folds):
        rows = folds == fold
        weights = climb(metric_key, targets[~rows], probabilities[:, ~rows])
        mixed[rows] = blend(probabilities[:, rows], "mean", weights, task)
    return mixed


def fitted_on(oofs):
    """→ what fitted weights rest on, as JSON has it: the metric, and the hashes of each experiment's foldK.csv."""
    shared = sorted(shared_folds(oofs)[0])
    hashes = {oof.exp: {f"fold{k}": file_hash(oof.folder / f"fold{k}.csv") for k in shared} for oof in oofs}
    return dict(metric=oofs[0].prepared["metric"], experiments=hashes)


def write_weights(path, oofs, weights, scores):
    """Writes {experiment: weight} for 03_infer.py. scores: the honest score `cv`, and its interval."""
    write_json(path, dict(weights=weights, blend="mean", **scores, fitted_on=fitted_on(oofs)))


def read_weights(path, oofs, how):
    """→ (the weights in the order of `oofs`, their honest score) of a file of 02_oof.py. Raises UserError where they
    are of other experiments, of other predictions than the present ones, or of another blend than `how`."""
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


def shared_folds(oofs):
    """→ the folds that all experiments have finished, and each one's rows of them (bool [N]). Raises UserError where
    there is none, or where an experiment is named twice."""
    if len({oof.exp for oof in oofs}) < len(oofs):
        raise UserError(f"an experiment is named twice ({listing(oof.exp for oof in oofs)}): name each once")
    shared = set.intersection(*(set(oof.present) for oof in oofs))
    if not shared:
        finished = "; ".join(f"{oof.exp}: {listing(oof.present)}" for oof in oofs)
        raise UserError(f"no fold is finished in all experiments ({finished}): train one with 01_train_fold.py")
    return shared, [oof.folds.fold.isin(shared).to_numpy() for oof in oofs]
