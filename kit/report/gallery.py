"""Which images should a person look at?"""

import numpy as np
import pandas as pd

from kit.report import figures
from kit.report.html import paragraphs, table, text, thumbs
from kit.score import tasks
from kit.score.blend import shared_folds
from kit.score.metrics import METRICS

MOST_MISTAKES, MOST_SUSPECTS = 24, 24  # images that are shown
MOST_BROWSED, MOST_BYTES = 320, 3_500_000  # images of the browser; bytes of all images in the page
SEED = 777  # of the sample


def losses(prepared, targets, predictions):
    """→ how wrong the prediction of each image is, float [N]: log loss of its class, mean log loss of the labels, mean
    distance of the numbers from 0 to 1 (0 where all are missing)."""
    if tasks.task_of(prepared) == "classes":
        return -np.log(np.clip(predictions[np.arange(len(targets)), targets], 1e-15, 1))
    if tasks.task_of(prepared) == "labels":
        return -np.log(np.clip(np.where(targets > 0.5, predictions, 1 - predictions), 1e-15, 1)).mean(axis=1)
    distance = np.abs(tasks.to_unit(prepared, targets) - tasks.to_unit(prepared, predictions))
    return np.nansum(distance, axis=1) / np.maximum(1, np.isfinite(distance).sum(axis=1))


def answers(oof, i):
    """→ two lines: what is right for the image in row i of oof.folds, and what was predicted."""
    classes, p, label = oof.prepared["classes"], oof.probabilities[i], oof.folds.label[i]
    task = tasks.task_of(oof.prepared)
    if task == "numbers":
        target, predicted = (" ".join(f"{value:.4g}" for value in part[:5]) for part in (oof.targets[i], p))
        return f"target {target}", f"predicted {predicted}"
    if task == "labels":
        likely = [f"{classes[c]} {p[c]:.2f}" for c in np.argsort(-p)[:3]]
        return f"labels {label or 'none'}", f"predicted {', '.join(likely)}"
    predicted = p.argmax()
    return f"label {label}: {p[oof.targets[i]]:.3f}", f"predicted {classes[predicted]}: {p[predicted]:.3f}"


def place(oof, i):
    return f"fold {oof.folds.fold[i]}, group {oof.folds.group[i]}"


def worst(oof):
    """→ rows int [≤ MOST_MISTAKES] of oof.folds, the worst first: of classes, of the images predicted wrongly, those
    whose own label was given the least probability; of labels and numbers, those with the largest loss."""
    loss = losses(oof.prepared, oof.targets, oof.probabilities)
    rows = np.arange(len(loss))
    if tasks.task_of(oof.prepared) == "classes":
        rows = np.flatnonzero(oof.probabilities.argmax(axis=1) != oof.targets)
    return rows[np.argsort(-loss[rows], kind="stable")][:MOST_MISTAKES]


def mistakes(oof, pictures, overlays):
    """The worst images. overlays: {row of oof.folds: (uint8 [S, S, 3] RGB, what the heat speaks for)}, or empty."""
    rows, figures = worst(oof), []
    for i in rows:
        heat, of = overlays.get(i, (None, None))
        figures.append(pictures.figure(i, [*answers(oof, i), *([of] if of else []), place(oof, i)], heat))
    lines = [f"The {len(rows)} images with the largest errors, hard ones or wrong labels:"]
    if tasks.task_of(oof.prepared) == "classes":
        wrong = (oof.probabilities.argmax(axis=1) != oof.targets).sum()
        lines = [f"{wrong} of {len(oof.targets)} images are predicted wrongly."]
        lines += [f"The {len(rows)} most confident mistakes, hard images or wrong labels:"] * bool(len(rows))
    if overlays:
        lines.append("Beside each image, Grad-CAM: the regions that speak for what its heat is for, red the most.")
    return paragraphs(lines) + thumbs(figures)


def suspected(oof, table, by_chance, pictures):
    """The surest suspects of `table`, as `find` gives it; by_chance: how many clean labels would give."""
    what = "label" if tasks.task_of(oof.prepared) == "classes" else "label of an image"
    lines = [
        f"{len(table)} times, a {what} may be wrong, by confident learning (arXiv 1911.00068) on the out-of-fold "
        f"probabilities; about {by_chance:.0f} would be suspected if all were right and the probabilities honest."
    ]
    if len(table):
        lines.append(f"The {min(len(table), MOST_SUSPECTS)} surest of suspects.csv; look before you change one:")
    figures = []
    for row in table[:MOST_SUSPECTS].itertuples():
        label = f"label {row.label or 'none'}: {row.probability_label:.3f}"
        rather = f"rather {row.suggested}: {row.probability_suggested:.3f}"
        figures.append(pictures.figure(row.row, [label, rather, place(oof, row.row)]))
    return paragraphs(lines) + thumbs(figures)


def kinds(oof):
    """→ (names, members): the classes or labels, or ranges of the first number, and each one's rows of oof.folds."""
    classes, task = oof.prepared["classes"], tasks.task_of(oof.prepared)
    if task == "numbers":
        ranges = tasks.examples(oof.prepared, oof.folds)
        return list(ranges), list(ranges.values())
    if task == "labels":
        none = np.flatnonzero(oof.targets.sum(axis=1) == 0)
        return [*classes, "none of them"], [*map(np.flatnonzero, oof.targets.T), none]
    order = np.argsort(oof.targets, kind="stable")
    return classes, np.split(order, np.cumsum(np.bincount(oof.targets, minlength=len(classes)))[:-1])


def choose(loss, members):
    """→ rows of the browser, the most wanted first: by turns the image with the largest loss, and one drawn from each
    kind. loss float [N]; members: a list of rows int."""
    rng, drawn = np.random.default_rng(SEED), []
    for rows in members:
        drawn += [(turn, row) for turn, row in enumerate(rng.permutation(rows)[:MOST_BROWSED])]
    drawn = [row for _, row in sorted(drawn, key=lambda pair: pair[0])][:MOST_BROWSED]
    hard = np.argsort(-loss, kind="stable")[:MOST_BROWSED].tolist()
    both = [row for pair in zip(hard, drawn, strict=False) for row in pair] + drawn[len(hard) :] + hard[len(drawn) :]
    return list(dict.fromkeys(int(row) for row in both))[:MOST_BROWSED]


def browser(oof, pictures):
    """→ the places of the images by class, which the page's script searches, sorts and turns over: `browsed`, `kinds`,
    `images`. They fill what the page's other sections have left of MOST_BYTES, so this comes last."""
    names, members = kinds(oof)
    loss, kinds_of, figures = losses(oof.prepared, oof.targets, oof.probabilities), {}, {}
    for kind, rows in enumerate(members):
        for row in rows:
            kinds_of.setdefault(int(row), []).append(str(kind))
    for i in choose(loss, members):
        if pictures.bytes > MOST_BYTES and i not in pictures.shown:  # those that are there already cost nothing
            continue
        data = dict(loss=f"{loss[i]:.6f}", kinds=" ".join(kinds_of.get(i, [])), name=pictures.names[i])
        figures[i] = pictures.figure(i, [*answers(oof, i), f"loss {loss[i]:.3f}", place(oof, i)], **data)
    line = f"{len(figures)} of {len(loss)} out-of-fold images are in this page"
    line += ": the worst ones, and some of everything in the menu." if len(figures) < len(loss) else "."
    order = sorted(figures, key=lambda i: -loss[i])
    return dict(browsed=text(line), kinds=menu(names, members, figures), images=thumbs(figures[i] for i in order))


def menu(names, members, figures):
    """The options of the browser's menu; how many of how many images are in `figures`."""
    options = ""
    for kind, (name, rows) in enumerate(zip(names, members, strict=True)):
        if some := sum(int(row) in figures for row in rows):
            options += f"<option value={kind}>{text(name)} ({some} of {len(rows)})</option>"
    return options


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
