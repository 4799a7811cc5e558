"""On which images do experiments disagree?"""

import numpy as np
import pandas as pd

from kit import figures, tasks
from kit.experiment import shared_folds
from kit.gallery import answers, losses, place
from kit.metrics import METRICS
from kit.page import paragraphs, table, text, thumbs

MOST_OTHERS, MOST_IMAGES = 3, 12  # experiments that this one is compared with; images of each kind


def section(oof, oofs, pictures):
    """The comparison of an experiment with the others that 02 was given: HTML, empty where it is alone."""
    if len(oofs) < 2:
        return ""
    shared = sorted(shared_folds(oofs)[0])
    others = [other for other in oofs if other is not oof]
    parts = side_by_side(oofs)
    if len(others) > MOST_OTHERS:
        parts += paragraphs([f"Below, {MOST_OTHERS} of the {len(others)} others."])
    return parts + "".join(duel(oof, other, shared, pictures) for other in others[:MOST_OTHERS])


def side_by_side(oofs):
    """A row for each experiment: its CV with the interval, and the score of each fold."""
    name, rows = METRICS[oofs[0].prepared["metric"]].name, {}
    for oof in oofs:
        cv = "{cv:.4f} ({cv_low:.4f} to {cv_high:.4f})".format(**oof.cv)
        row = {f"{name}, 95 %": cv, "mean of folds": oof.cv["mean_of_folds"], "last epoch": oof.cv["last_epoch"]}
        for fold in range(oof.prepared["folds"]):
            score = oof.fold_table[name].get(fold)
            row[f"fold {fold}"] = "" if score is None else float(score)
        rows[oof.exp] = row
    return table(pd.DataFrame.from_dict(rows, orient="index", dtype=object).rename_axis("experiment"))


def goodness(oof):
    """→ how good each prediction is, float [N], larger is better: of classes, the probability of the image's label."""
    loss = losses(oof.prepared, oof.targets, oof.probabilities)
    return np.exp(-loss) if tasks.task_of(oof.prepared) == "classes" else -loss


def duel(oof, other, shared, pictures):
    """Two experiments on the folds that all have: who is right how often, a scatter, the images that differ most."""
    pair = oof, other
    rows = [np.flatnonzero(part.folds.fold.isin(shared)) for part in pair]
    good = [goodness(part)[own] for part, own in zip(pair, rows, strict=True)]
    said, what = "", "minus the loss of an image"
    if tasks.task_of(oof.prepared) == "classes":
        said, what = paragraphs([counts(pair, rows)]), "probability of the image's label"
    drawing = figures.draw_duel(*good, (oof.exp, other.exp), what)
    parts = f'<h3>{text(oof.exp)} against {text(other.exp)}</h3>{said}<div class="duel">{drawing}</div>'
    for (winner, loser), gain in (pair, good[0] - good[1]), (pair[::-1], good[1] - good[0]):
        best = [k for k in np.argsort(-gain, kind="stable")[:MOST_IMAGES] if gain[k] > 0]
        shown = [both(oof, other, rows[0][k], rows[1][k], pictures) for k in best]
        title = text(f"where {winner.exp} is better than {loser.exp}, by most first")
        parts += f"<h3>{title}</h3>{thumbs(shown) if shown else paragraphs(['nowhere'])}"
    return parts


def counts(pair, rows):
    """→ a sentence: how many images each of two experiments is right about; rows: those of each that both have."""
    here, there = (
        part.probabilities[own].argmax(axis=1) == part.targets[own] for part, own in zip(pair, rows, strict=True)
    )
    hits = {
        "both": here & there, f"only {pair[0].exp}": here & ~there,
        f"only {pair[1].exp}": there & ~here, "neither": ~here & ~there,
    }  # fmt: skip
    said = ", ".join(f"{name} {hit.sum()}" for name, hit in hits.items())
    return f"right about an image, of {len(here)}: {said}"


def both(oof, other, i, j, pictures):
    """The figure of row i of oof.folds, which is row j of other.folds, with both predictions."""
    lines = [f"{part.exp} → {answers(part, k)[1].removeprefix('predicted ')}" for part, k in ((oof, i), (other, j))]
    right = f"label {oof.folds.label[i]}" if tasks.task_of(oof.prepared) == "classes" else answers(oof, i)[0]
    return pictures.figure(i, [right, *lines, place(oof, i)])
