"""The images of the report: worst mistakes, label errors, a browser by class, and where experiments differ."""

from itertools import zip_longest

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
    target, prediction = oof.targets[i], oof.predictions[i]
    right = oof.task.right_answer(target, oof.folds.label[i])
    right += f": {prediction[target]:.3f}" if oof.task.right_or_wrong else ""
    return right, f"predicted {oof.task.predicted(prediction)}"


def worst_mistakes(oof):
    """Return the rows of oof.folds with the largest losses, int, the worst first; for classes, only wrong ones."""
    rows = oof.task.wrong(oof.targets, oof.predictions)
    loss = oof.task.losses(oof.targets, oof.predictions)[rows]
    return rows[np.argsort(-loss, kind="stable")][:MOST_MISTAKES]


def mistakes(oof, pictures, heatmaps):
    """Return the worst mistakes as HTML. heatmaps: what gradcam.overlay_worst returned, or empty."""
    rows, figures = worst_mistakes(oof), []
    lines = [f"The {len(rows)} images with the largest errors, hard ones or wrong labels:"]
    if oof.task.right_or_wrong:
        wrong = len(oof.task.wrong(oof.targets, oof.predictions))
        lines = [f"{wrong} of {len(oof.targets)} images are predicted wrongly."]
        lines += [f"The {len(rows)} most confident mistakes, hard images or wrong labels:"] * bool(len(rows))
    if heatmaps:
        lines.append("Beside each image, Grad-CAM: the regions that speak for the output named below it, red the most.")
    for i in rows:
        overlay, *caption = heatmaps.get(i, [None])
        figures.append(pictures.figure(i, [*answers(oof, i), *caption], overlay))
    return paragraphs(lines) + thumbs(figures)


def surest(oof, suspects, by_chance, pictures):
    """Return the surest label errors as HTML; suspects, by_chance: what write_suspects returned."""
    what = "label" if oof.task.right_or_wrong else "label of an image"
    lines = [
        f"{len(suspects)} times, a {what} may be wrong, by confident learning (arXiv 1911.00068) on the out-of-fold "
        f"probabilities; about {by_chance:.0f} would be suspected if all were right and the probabilities calibrated."
    ]
    if len(suspects):
        lines.append(f"The {min(len(suspects), MOST_SUSPECTS)} surest of suspects.csv; look before you change one:")
    figures = []
    for row in suspects[:MOST_SUSPECTS].itertuples():
        label = f"label {row.label or 'none'}: {row.probability_label:.3f}"
        figures.append(pictures.figure(row.Index, [label, f"rather {row.suggested}: {row.probability_suggested:.3f}"]))
    return paragraphs(lines) + thumbs(figures)


def choose(loss, members):
    """Return rows of the browser, the most wanted first: by turns the image with the largest loss, and one drawn from
    each of `members`, a list of rows int. loss float [N]."""
    rng = np.random.default_rng(SEED)
    drawn = by_turns(*(rng.permutation(rows)[:MOST_BROWSED] for rows in members))
    worst = np.argsort(-loss, kind="stable")[:MOST_BROWSED].tolist()
    return [*dict.fromkeys(by_turns(worst, drawn))][:MOST_BROWSED]


def by_turns(*parts):
    """Return the first item of each part, then the second ones, and so on."""
    return [int(row) for turn in zip_longest(*parts) for row in turn if row is not None]


def browser(oof, pictures):
    """Return what fills `browsed`, `kinds` and `images` in page.html: the images that the page's script searches, sorts
    and pages through. They fill what the page's other sections have left of MOST_BYTES, so this comes last."""
    members, loss = oof.task.members(oof.targets), oof.task.losses(oof.targets, oof.predictions)
    figures = {}
    for i in choose(loss, [*members.values()]):
        if pictures.bytes > MOST_BYTES and i not in pictures.shown:  # those already in the page cost nothing
            continue
        kinds = " ".join(str(kind) for kind, rows in enumerate(members.values()) if i in rows)
        data = dict(loss=f"{loss[i]:.6f}", kinds=kinds, name=oof.folds.image_name[i])
        figures[i] = pictures.figure(i, [*answers(oof, i), f"loss {loss[i]:.3f}"], **data)
    line = f"{len(figures)} of {len(loss)} out-of-fold images are in this page"
    line += ": the worst ones, and some of everything in the menu." if len(figures) < len(loss) else "."
    menu, order = "", sorted(figures, key=lambda i: -loss[i])
    for kind, (name, rows) in enumerate(members.items()):
        if count := np.isin(rows, order).sum():
            menu += f"<option value={kind}>{text(name)} ({count} of {len(rows)})</option>"
    return dict(browsed=text(line), kinds=menu, images=thumbs(figures[i] for i in order))


def comparison(evaluation, evaluations, pictures):
    """Return a table of all experiments and the images on which this one and the others differ, as HTML, or ""."""
    others = [other.oof for other in evaluations if other is not evaluation]
    if not others:
        return ""
    prepared, rows = evaluation.oof.prepared, {}
    name, shared = METRICS[prepared.metric].name, sorted(shared_folds([evaluation.oof, *others])[0])
    for each in evaluations:
        cv, scores = each.cv, each.fold_table[name]
        row = {f"{name}, 95 %": "{cv:.4f} ({cv_low:.4f} to {cv_high:.4f})".format(**cv)}
        row |= {"mean of folds": cv["mean_of_folds"], "last epoch": cv["last_epoch"]}
        rows[each.oof.exp] = row | {f"fold {k}": scores.get(k, "") for k in range(prepared.folds)}
    parts = table(pd.DataFrame.from_dict(rows, orient="index", dtype=object).rename_axis("experiment"))
    if len(others) > MOST_OTHERS:
        parts += paragraphs([f"Below, {MOST_OTHERS} of the {len(others)} others."])
    return parts + "".join(compare_images(evaluation.oof, other, shared, pictures) for other in others[:MOST_OTHERS])


def compare_images(oof, other, shared, pictures):
    """Return as HTML how often each of two is right in the `shared` folds, a scatter, the images that differ most."""
    pair = [(part, np.flatnonzero(part.folds.fold.isin(shared))) for part in (oof, other)]
    (good, what), (other_good, _) = (part.task.goodness(part.targets[r], part.predictions[r]) for part, r in pair)
    parts = f"<h3>{text(oof.exp)} against {text(other.exp)}</h3>"
    if oof.task.right_or_wrong:
        right, other_right = (~np.isin(rows, part.task.wrong(part.targets, part.predictions)) for part, rows in pair)
        counts = {
            "both": right & other_right, f"only {oof.exp}": right & ~other_right,
            f"only {other.exp}": other_right & ~right, "neither": ~right & ~other_right,
        }  # fmt: skip
        counts = ", ".join(f"{who} {hits.sum()}" for who, hits in counts.items())
        parts += paragraphs([f"right about an image, of {len(right)}: {counts}"])
    parts += f'<div class="small">{draw_pair(good, other_good, oof.exp, other.exp, what)}</div>'
    for winner, loser, gain in (oof, other, good - other_good), (other, oof, other_good - good):
        figures = []
        for k in [k for k in np.argsort(-gain, kind="stable")[:MOST_IMAGES] if gain[k] > 0]:
            i = pair[0][1][k]
            lines = [f"{part.exp} → {part.task.predicted(part.predictions[rows[k]])}" for part, rows in pair]
            figures.append(pictures.figure(i, [oof.task.right_answer(oof.targets[i], oof.folds.label[i]), *lines]))
        title = text(f"where {winner.exp} predicts better than {loser.exp}, the largest differences first")
        parts += f"<h3>{title}</h3>{thumbs(figures) if figures else paragraphs(['nowhere'])}"
    return parts
