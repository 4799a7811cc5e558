"""The images of the report: worst mistakes, label errors, a browser by class, and where experiments differ."""

import numpy as np
import pandas as pd

from kit.report.figures import draw_pair
from kit.report.html import paragraphs, table, text, thumbs
from kit.score.blend import shared_folds
from kit.score.metrics import METRICS

MOST_MISTAKES, MOST_SUSPECTS = 24, 24  # images that are shown
MOST_BROWSED, MOST_BYTES = 320, 3_500_000  # images of the browser; bytes of all images in the page
MOST_OTHERS, MOST_IMAGES = 3, 12  # experiments that one is compared with; images on which each is better
SEED = 777  # of the sample


def answers(oof, i):
    """Return two lines on the image in row i of oof.folds: what is right, and what was predicted."""
    return oof.task.answers(oof.targets[i], oof.predictions[i], oof.folds.label[i])


def fold_and_group(oof, i):
    return f"fold {oof.folds.fold[i]}, group {oof.folds.group[i]}"


def worst_mistakes(oof):
    """Return rows int [≤ MOST_MISTAKES] of oof.folds, the worst first: those with the largest loss among the wrong
    ones, or among all where the task has no wrong ones."""
    rows = oof.task.wrong(oof.targets, oof.predictions)
    loss = oof.task.losses(oof.targets, oof.predictions)[rows]
    return rows[np.argsort(-loss, kind="stable")][:MOST_MISTAKES]


def mistakes(oof, pictures, heatmaps):
    """Return the worst mistakes as HTML. heatmaps: {row of oof.folds: (uint8 [S, S, 3] RGB, what the heat is for)}, or
    empty."""
    rows, figures = worst_mistakes(oof), []
    for i in rows:
        overlay, *caption = heatmaps.get(i, (None,))
        figures.append(pictures.figure(i, [*answers(oof, i), *caption, fold_and_group(oof, i)], overlay))
    lines = [f"The {len(rows)} images with the largest errors, hard ones or wrong labels:"]
    if oof.task.right_or_wrong:
        wrong = len(oof.task.wrong(oof.targets, oof.predictions))
        lines = [f"{wrong} of {len(oof.targets)} images are predicted wrongly."]
        lines += [f"The {len(rows)} most confident mistakes, hard images or wrong labels:"] * bool(len(rows))
    if heatmaps:
        lines.append("Beside each image, Grad-CAM: the regions that speak for what its heat is for, red the most.")
    return paragraphs(lines) + thumbs(figures)


def surest(oof, suspects, by_chance, pictures):
    """Return the surest label errors as HTML; suspects, by_chance: what label_errors.find returned."""
    what = "label" if oof.task.right_or_wrong else "label of an image"
    lines = [
        f"{len(suspects)} times, a {what} may be wrong, by confident learning (arXiv 1911.00068) on the out-of-fold "
        f"probabilities; about {by_chance:.0f} would be suspected if all were right and the probabilities honest."
    ]
    if len(suspects):
        lines.append(f"The {min(len(suspects), MOST_SUSPECTS)} surest of suspects.csv; look before you change one:")
    figures = []
    for row in suspects[:MOST_SUSPECTS].itertuples():
        label = f"label {row.label or 'none'}: {row.probability_label:.3f}"
        suggested = f"rather {row.suggested}: {row.probability_suggested:.3f}"
        figures.append(pictures.figure(row.row, [label, suggested, fold_and_group(oof, row.row)]))
    return paragraphs(lines) + thumbs(figures)


# ---------------------------------------------------------------- the browser of images


def choose(loss, members):
    """Return rows of the browser, the most wanted first: by turns the image with the largest loss, and one drawn from
    each of `members`, a list of rows int. loss float [N]."""
    rng, drawn = np.random.default_rng(SEED), []
    for rows in members:
        drawn += [(turn, row) for turn, row in enumerate(rng.permutation(rows)[:MOST_BROWSED])]
    drawn = [row for _, row in sorted(drawn, key=lambda pair: pair[0])][:MOST_BROWSED]
    hard = np.argsort(-loss, kind="stable")[:MOST_BROWSED].tolist()
    both = [row for pair in zip(hard, drawn, strict=False) for row in pair] + drawn[len(hard) :] + hard[len(drawn) :]
    return list(dict.fromkeys(int(row) for row in both))[:MOST_BROWSED]


def browser(oof, pictures):
    """Return what fills `browsed`, `kinds` and `images` in page.html: the images that the page's script searches, sorts
    and pages through. They fill what the page's other sections have left of MOST_BYTES, so this comes last."""
    members, loss = oof.task.members(oof.targets), oof.task.losses(oof.targets, oof.predictions)
    kinds, figures = {}, {}
    for kind, rows in enumerate(members.values()):
        for row in rows:
            kinds.setdefault(int(row), []).append(str(kind))
    for i in choose(loss, [*members.values()]):
        if pictures.bytes > MOST_BYTES and i not in pictures.shown:  # those already in the page cost nothing
            continue
        data = dict(loss=f"{loss[i]:.6f}", kinds=" ".join(kinds.get(i, [])), name=pictures.names[i])
        lines = [*answers(oof, i), f"loss {loss[i]:.3f}", fold_and_group(oof, i)]
        figures[i] = pictures.figure(i, lines, **data)
    line = f"{len(figures)} of {len(loss)} out-of-fold images are in this page"
    line += ": the worst ones, and some of everything in the menu." if len(figures) < len(loss) else "."
    order = sorted(figures, key=lambda i: -loss[i])
    return dict(browsed=text(line), kinds=menu(members, figures), images=thumbs(figures[i] for i in order))


def menu(members, figures):
    """Return the options of the browser's menu, each with how many of its images are in `figures`."""
    options = ""
    for kind, (name, rows) in enumerate(members.items()):
        if count := sum(int(row) in figures for row in rows):
            options += f"<option value={kind}>{text(name)} ({count} of {len(rows)})</option>"
    return options


# ---------------------------------------------------------------- experiments compared


def comparison(evaluation, evaluations, pictures):
    """Return the comparison of an experiment with the others that 02 was given as HTML, empty where there are none."""
    others = [other.oof for other in evaluations if other is not evaluation]
    if not others:
        return ""
    shared = sorted(shared_folds([other.oof for other in evaluations])[0])
    parts = side_by_side(evaluations)
    if len(others) > MOST_OTHERS:
        parts += paragraphs([f"Below, {MOST_OTHERS} of the {len(others)} others."])
    return parts + "".join(compare_images(evaluation.oof, other, shared, pictures) for other in others[:MOST_OTHERS])


def side_by_side(evaluations):
    """Return a table with a row for each experiment: its CV with the interval, and the score of each fold."""
    prepared = evaluations[0].oof.prepared
    name, rows = METRICS[prepared.metric].name, {}
    for evaluation in evaluations:
        cv = evaluation.cv
        interval = "{cv:.4f} ({cv_low:.4f} to {cv_high:.4f})".format(**cv)
        row = {f"{name}, 95 %": interval, "mean of folds": cv["mean_of_folds"], "last epoch": cv["last_epoch"]}
        for fold in range(prepared.folds):
            score = evaluation.fold_table[name].get(fold)
            row[f"fold {fold}"] = "" if score is None else float(score)
        rows[evaluation.oof.exp] = row
    return table(pd.DataFrame.from_dict(rows, orient="index", dtype=object).rename_axis("experiment"))


def compare_images(oof, other, shared, pictures):
    """Return, for the folds that both experiments have: how often each is right, a scatter, and the images that differ
    most, as HTML."""
    pair = oof, other
    rows = [np.flatnonzero(part.folds.fold.isin(shared)) for part in pair]
    good = [part.task.goodness(part.targets[k], part.predictions[k]) for part, k in zip(pair, rows, strict=True)]
    counts = paragraphs([count_right(pair, rows)]) if oof.task.right_or_wrong else ""
    drawing = draw_pair(*good, oof.exp, other.exp, oof.task.goodness_name)
    parts = f'<h3>{text(oof.exp)} against {text(other.exp)}</h3>{counts}<div class="small">{drawing}</div>'
    for (winner, loser), gain in (pair, good[0] - good[1]), (pair[::-1], good[1] - good[0]):
        best = [k for k in np.argsort(-gain, kind="stable")[:MOST_IMAGES] if gain[k] > 0]
        shown = [figure_of_both(oof, other, rows[0][k], rows[1][k], pictures) for k in best]
        title = text(f"where {winner.exp} predicts better than {loser.exp}, the largest differences first")
        parts += f"<h3>{title}</h3>{thumbs(shown) if shown else paragraphs(['nowhere'])}"
    return parts


def count_right(pair, rows):
    """Return a sentence on how many images each of two experiments is right about; rows: those that both have, of
    each."""
    (name, right), (other_name, other_right) = (
        (oof.exp, ~np.isin(shared, oof.task.wrong(oof.targets, oof.predictions)))
        for oof, shared in zip(pair, rows, strict=True)
    )
    counts = {
        "both": right & other_right, f"only {name}": right & ~other_right,
        f"only {other_name}": other_right & ~right, "neither": ~right & ~other_right,
    }  # fmt: skip
    return f"right about an image, of {len(right)}: " + ", ".join(f"{who} {hit.sum()}" for who, hit in counts.items())


def figure_of_both(oof, other, i, j, pictures):
    """Return the figure of row i of oof.folds, which is row j of other.folds, with both predictions."""
    right = oof.task.right_answer(oof.targets[i], oof.folds.label[i])
    lines = [f"{part.exp} → {answers(part, k)[1].removeprefix('predicted ')}" for part, k in ((oof, i), (other, j))]
    return pictures.figure(i, [right, *lines, fold_and_group(oof, i)])
