"""Writes report.html, one self-contained page about one experiment, and the pictures beside it. Used by 02_oof.py.

The page needs no network and forbids itself any (its Content-Security-Policy). Names and labels come from strangers'
files: each goes through html.escape, json or matplotlib's own escaping. matplotlib draws the figures; as inline SVG
they take the page's colours, light or dark.
"""

import base64
import hashlib
import html
import io
import json

import cv2
import matplotlib
import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_curve

from common import replacing
from data import auc

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOST_CURVES = 10  # classes drawn in one picture; more would be a tangle
MOST_CLASSES = 30  # above it, no figures in the confusion matrix, and its cells are left to the picture
MOST_MISTAKES = 24
MOST_GROUPS = 12
MOST_IN_GROUP = 8
THUMB = 112  # px
TEXT = "#000001"  # black in a PNG; replaced by the page's own text colour in SVG

# ---------------------------------------------------------------- figures


def save_figure(figure, path):
    """Writes a PNG, unless `path` is None. → the same figure as SVG text that takes the page's text colour."""
    if path is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=100, format="png", facecolor="white")
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "foldkit"}):  # the same bytes each time
        figure.savefig(svg, format="svg", transparent=True, metadata=dict(Date=None))
    plt.close(figure)
    return svg.getvalue()[svg.getvalue().index("<svg") :].replace(TEXT, "currentColor")


def new_figure(width, height, columns=1):
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({key: TEXT for key in colours} | {"legend.framealpha": 0}):
        return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def plain_text(label):
    """A label as matplotlib should show it: no formula between dollar signs, and not endlessly long."""
    label = label if len(label) <= 20 else label[:19] + "…"
    return label.replace("$", r"\$")


def draw_confusion(path, matrix, classes):
    """Rows are the labels, columns the predictions (thesis figure 4.1); colours by share of the row."""
    side = min(14, max(4.5, 0.45 * len(classes) + 2))
    figure, axis = new_figure(side, side)
    names = [plain_text(label) for label in classes]
    axis.imshow(matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    axis.set(title="out of fold: images", xlabel="prediction", ylabel="label")
    axis.set_xticks(range(len(classes)), names, rotation=90 if len(classes) > 5 else 0)
    axis.set_yticks(range(len(classes)), names)
    if len(classes) <= MOST_CLASSES:
        for (row, column), count in np.ndenumerate(matrix):
            dark = count > matrix[row].sum() / 2
            axis.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    return save_figure(figure, path)


def one_against_rest(targets, probabilities, classes):
    """→ (label, bool [N], score [N]) of the second class of two, or of each of the first classes of more."""
    chosen = [1] if len(classes) == 2 else range(len(classes))[:MOST_CURVES]
    return [(classes[c], targets == c, probabilities[:, c]) for c in chosen]


def draw_roc(path, targets, probabilities, folds, classes):
    """Two classes: each fold's curve and the pooled one (thesis figure 2.1). More: each class against the rest."""
    figure, axis = new_figure(4.8, 4.8)
    if len(classes) == 2:
        for fold in np.unique(folds):
            mine = folds == fold
            label = f"fold {fold}: {auc(targets[mine], probabilities[mine]):.4f}"
            axis.plot(*roc_curve(targets[mine], probabilities[mine, 1])[:2], linewidth=0.8, alpha=0.7, label=label)
        label = f"pooled: {auc(targets, probabilities):.4f}"
        axis.plot(*roc_curve(targets, probabilities[:, 1])[:2], color=TEXT, label=label)
    else:
        for name, positive, score in one_against_rest(targets, probabilities, classes):
            label = f"{plain_text(name)}: {auc(positive, np.stack([1 - score, score], axis=1)):.4f}"
            axis.plot(*roc_curve(positive, score)[:2], linewidth=1, label=label)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axis.set(title="ROC, out of fold", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axis.legend(title="AUC" if len(classes) <= MOST_CURVES else f"AUC, first {MOST_CURVES} classes", loc="lower right")
    return save_figure(figure, path)


def draw_precision_recall(targets, probabilities, classes):
    figure, axis = new_figure(4.8, 4.8)
    for name, positive, score in one_against_rest(targets, probabilities, classes):
        precision, recall, _ = precision_recall_curve(positive, score)
        label = f"{plain_text(name)}: {average_precision_score(positive, score):.4f}"
        (line,) = axis.plot(recall, precision, linewidth=1.2, label=label)
        axis.axhline(positive.mean(), color=line.get_color(), linewidth=0.7, linestyle=":")
    axis.set(title="precision and recall, out of fold", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    axis.legend(title="average precision (dotted: chance)", loc="lower left")
    return save_figure(figure, None)


def calibration(targets, probabilities, bins=10):
    """→ (mean probability, observed frequency, images) of each bin that isn't empty, and the expected calibration error
    (Naeini et al. 2015): of the second class of two, or of the most probable class of more."""
    if probabilities.shape[1] == 2:
        score, hit = probabilities[:, 1], targets == 1
    else:
        score, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    bin_of = np.minimum((score * bins).astype(int), bins - 1)
    rows = [(score[bin_of == b].mean(), hit[bin_of == b].mean(), (bin_of == b).sum()) for b in np.unique(bin_of)]
    mean, observed, count = (np.array(column) for column in zip(*rows, strict=True))
    return mean, observed, count, float((np.abs(mean - observed) * count).sum() / count.sum())


def draw_calibration(targets, probabilities, classes):
    mean, observed, count, error = calibration(targets, probabilities)
    of = f"probability of {plain_text(classes[1])}" if len(classes) == 2 else "probability of the prediction"
    figure, axis = new_figure(4.8, 4.8)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axis.plot(mean, observed, color="tab:blue", linewidth=1)
    axis.scatter(mean, observed, s=10 + 250 * count / count.sum(), color="tab:blue", alpha=0.7)
    for x, y, n in zip(mean, observed, count, strict=True):
        axis.annotate(str(n), (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8)
    title = f"calibration, expected error {error:.3f} (figures: images)"
    axis.set(title=title, xlabel=of, ylabel="how often it was right", aspect="equal", xlim=(0, 1), ylim=(0, 1))
    return save_figure(figure, None)


def draw_curves(path, epochs):
    """Loss and AUC by epoch; each thin line a fold, the thick one their mean."""
    figure, axes = new_figure(10, 4.2, columns=2)
    for axis, score in zip(axes, ("loss", "auc"), strict=True):
        for kind, colour in (("train", "tab:blue"), ("valid", "tab:orange")):
            table = epochs.pivot(index="epoch", columns="fold", values=f"{kind}_{score}")
            axis.plot(table, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(table.mean(axis=1), color=colour, linewidth=2, marker="o", markersize=4, label=kind)
        axis.set(title={"loss": "loss", "auc": "AUC"}[score], xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    return save_figure(figure, path)


# ---------------------------------------------------------------- pieces of HTML

text = html.escape  # every name, label and message goes through it


def table(header, rows, marked=()):
    """An HTML table; cells are strings or numbers, escaped here. The rows in `marked` stand out."""
    head = "".join(f"<th>{text(str(cell))}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=marked' if i in marked else ''}>"
        + "".join(f"<td>{text(str(cell))}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title, *content):
    return f"<section><h2>{text(title)}</h2>{''.join(content)}</section>"


def paragraph(words):
    return f"<p>{text(words)}</p>"


def thumbnail(image, *lines):
    """A small JPEG of uint8 [S, S, 3] RGB inside the page, with its caption; None for an image that isn't at hand."""
    picture = '<div class="none"></div>'
    if image is not None:
        small = cv2.resize(np.ascontiguousarray(image), (THUMB, THUMB), interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        picture = f'<img alt="{text(lines[0])}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
    caption = "".join(f"<span>{text(line)}</span>" for line in lines)
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def thumbnails(figures):
    return f'<div class="thumbs">{"".join(figures)}</div>'


# ---------------------------------------------------------------- the threshold


def counts_above(targets, probabilities, classes):
    """How many images of a class, and of the others, have a probability of it above each threshold 0, 1/steps … 1.

    → dict(classes, steps, totals [C][2], above [C][2][steps + 1]): C = 1 for two classes (the second), else all.
    """
    steps = 1000 if len(classes) <= 10 else 100
    thresholds = np.arange(steps + 1) / steps
    chosen = [1] if len(classes) == 2 else range(len(classes))
    totals, above = [], []
    for c in chosen:
        parts = [np.sort(probabilities[targets == c, c]), np.sort(probabilities[targets != c, c])]
        totals.append([len(part) for part in parts])
        above.append([(len(part) - np.searchsorted(part, thresholds, "right")).tolist() for part in parts])
    return dict(classes=[classes[c] for c in chosen], steps=steps, totals=totals, above=above)


def threshold_panel(targets, probabilities, classes):
    """The confusion matrix that the reader can move; without JavaScript it stays at one half."""
    counts = counts_above(targets, probabilities, classes)
    half = counts["steps"] // 2
    (positives, negatives), (hits, alarms) = counts["totals"][0], [part[half] for part in counts["above"][0]]
    data = json.dumps(counts).replace("<", "\\u003c")
    options = "".join(f"<option value={i}>{text(label)}</option>" for i, label in enumerate(counts["classes"]))
    rest = text(classes[0]) if len(classes) == 2 else "another class"
    return f"""
<script type="application/json" id="counts">{data}</script>
<p class="controls"><label{" hidden" if len(classes) == 2 else ""}>class <select id="class">{options}</select></label>
<label>predicted <b class="positive">{text(counts["classes"][0])}</b> where its probability is above
<output id="shown">0.5</output>
<input id="threshold" type="range" min="0" max="{counts["steps"]}" value="{half}" aria-label="threshold"></label></p>
<div class="wide"><table class="matrix">
<thead><tr><th>label</th><th>predicted <span class="positive">{text(counts["classes"][0])}</span></th>
<th>predicted {rest}</th></tr></thead>
<tbody><tr><th class="positive">{text(counts["classes"][0])}</th><td id="tp">{hits}</td>
<td id="fn">{positives - hits}</td></tr>
<tr><th>{rest}</th><td id="fp">{alarms}</td><td id="tn">{negatives - alarms}</td></tr></tbody></table></div>
<p id="rates"></p>"""


# ---------------------------------------------------------------- the page


def mistakes(folds, targets, probabilities, classes, images):
    """The images whose own label was given the least probability, among those wrongly predicted."""
    own, predicted = probabilities[np.arange(len(targets)), targets], probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != targets)
    worst = wrong[np.argsort(own[wrong], kind="stable")][:MOST_MISTAKES]
    figures = [
        thumbnail(
            None if images is None else images[i],
            folds.image_name[i],
            f"label {folds.label[i]}: {own[i]:.3f}",
            f"predicted {classes[predicted[i]]}: {probabilities[i, predicted[i]]:.3f}",
            f"fold {folds.fold[i]}, group {folds.group[i]}",
        )
        for i in worst
    ]
    return section(
        "Worst mistakes",
        paragraph(
            f"{len(wrong)} of {len(targets)} images are predicted wrongly. These {len(worst)} are the most confident "
            "mistakes: hard images, or wrong labels."
            if len(wrong)
            else "No image is predicted wrongly."
        ),
        thumbnails(figures),
    )


def group_figures(folds, groups, images, probabilities, targets):
    """The thumbnails of each group, under its heading."""
    rows = []
    for group in groups:
        members = np.flatnonzero(folds.group == group)
        shown = [
            thumbnail(
                None if images is None else images[i],
                folds.image_name[i],
                f"label {folds.label[i]}: {probabilities[i, targets[i]]:.3f}",
            )
            for i in members[:MOST_IN_GROUP]
        ]
        rest = f", {MOST_IN_GROUP} shown" if len(members) > MOST_IN_GROUP else ""
        title = f"group {group}, fold {folds.fold[members[0]]}: {len(members)} training images{rest}"
        rows.append(f"<div><h3>{text(title)}</h3>{thumbnails(shown)}</div>")
    return f'<div class="groups">{"".join(rows)}</div>'


def relatives(prepared, folds, images, probabilities, targets):
    """Groups whose labels disagree, and the largest groups of copies."""
    labels_of = folds.groupby("group").label.nunique()
    conflicts, sizes = labels_of.index[labels_of > 1], folds.group.value_counts(sort=False)
    largest = sizes[sizes > 1].sort_values(ascending=False, kind="stable").index[:MOST_GROUPS]
    found = prepared["relatives"]
    shown = (
        f"Groups by --groups {prepared['groups']}: {sizes.gt(1).sum()} groups of two or more training images."
        if found is None
        else f"{found['train_with_relative']:.1%} of the training images and {found['test_with_relative']:.1%} of the "
        f"test images have a relative in the training set. {found['groups']} groups of two or more, the largest of "
        f"{found['largest']}; the largest of the training set are shown here, all are in prepared/duplicates.csv."
    )
    figures = (images, probabilities, targets)
    return section(
        "Label conflicts",
        paragraph(
            f"{len(conflicts)} groups of copies carry different labels: mislabelled or ambiguous."
            + (f" The first {MOST_GROUPS}:" if len(conflicts) > MOST_GROUPS else "")
            if len(conflicts)
            else "No group of copies carries different labels."
        ),
        group_figures(folds, conflicts[:MOST_GROUPS], *figures),
    ) + section("Duplicates", paragraph(shown), group_figures(folds, largest, *figures))


def shift_words(found):
    if found is None:
        return "Too few images to compare the test set with the training set."
    verdict = "can't be told" if found["auc"] <= found["high"] else "can be told"
    return (
        f"By size, light, sharpness and colours, test images {verdict} from training images: adversarial validation "
        f"AUC {found['auc']:.3f}, by chance {found['low']:.3f} to {found['high']:.3f}."
    )


def write(folder, name, config, prepared, folds, targets, probabilities, epochs, images, shown):
    """Writes confusion.png, roc.png, curves.png and report.html into `folder`.

    targets int [N]; probabilities float [N, K]; images uint8 [N, S, S, 3] or None where no cache is at hand. shown: a
    dict of what 02_oof.py has computed: headline, interval, notes (strings), scores, folds, ledger (header and rows of
    each) and comparisons (strings).
    """
    classes = prepared["classes"]
    matrix = confusion_matrix(targets, probabilities.argmax(axis=1), labels=range(len(classes)))
    confusion = draw_confusion(folder / "confusion.png", matrix, classes)
    figures = [
        draw_roc(folder / "roc.png", targets, probabilities, folds.fold.to_numpy(), classes),
        draw_precision_recall(targets, probabilities, classes),
        draw_calibration(targets, probabilities, classes),
    ]
    curves = draw_curves(folder / "curves.png", epochs)
    ledger = shown["ledger"]
    mine = [i for i, row in enumerate(ledger[1]) if row[0] == name]
    settings = [(key, json.dumps(value, ensure_ascii=False)) for key, value in config.items()]
    missing = "" if images is not None else paragraph("No cache of the training images was at hand, so none is shown.")
    content = "".join(
        [
            f"<header><h1>{text(name)}</h1><p class=headline>{text(shown['headline'])}</p>",
            f"<p class=interval>{text(shown['interval'])}</p>{''.join(paragraph(note) for note in shown['notes'])}",
            "</header>",
            section("Scores", table(*shown["scores"])),
            section("Folds", table(*shown["folds"])),
            section("Curves", f'<div class="figures">{"".join(figures)}</div>'),
            section(
                "Confusion matrix",
                threshold_panel(targets, probabilities, classes),
                f'<div class="figures">{confusion}</div>' if len(classes) > 2 else "",
            ),
            section("Loss and AUC by epoch", f'<div class="figure">{curves}</div>'),
            missing,
            mistakes(folds, targets, probabilities, classes, images),
            relatives(prepared, folds, images, probabilities, targets),
            section("Is the test set like the training set?", paragraph(shift_words(prepared["shift"]))),
            section(
                "Other experiments",
                "".join(paragraph(line) for line in shown["comparisons"]),
                table(*ledger, marked=mine),
            ),
            f"<details><summary>all settings</summary>{table(('setting', 'value'), settings)}</details>",
        ]
    )
    page = PAGE.format(
        title=text(f"{name}: {shown['headline']}"),
        hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        style=STYLE,
        content=content,
        script=SCRIPT,
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


# The policy lets the page load nothing, and run this one script: markup that slipped through could do nothing either.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hash}'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{content}
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2024; --faint: #60666d; --line: #d8dce0; --mark: #eaf2fb }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181b; --text: #e6e8ea; --faint: #a0a7ae; --line: #3a4046; --mark: #1e3248 }
}
* { box-sizing: border-box }
[hidden] { display: none !important }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.2rem; color: var(--faint); overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); font-size: 1.2rem }
h3 { margin: 1rem 0 .3rem; font-size: .95rem; font-weight: 600 }
p { margin: .4rem 0; overflow-wrap: anywhere }
.headline { font-size: 2.4rem; font-weight: 700; line-height: 1.2 }
.interval { font-size: 1.1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
thead th { color: var(--faint); font-weight: 600 }
.marked { background: var(--mark) }
.matrix td { min-width: 7rem; font-size: 1.4rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
svg { display: block; width: 100%; height: auto; max-width: 46rem }
svg text { font-family: system-ui, sans-serif !important }
.controls label { display: block; margin: .3rem 0 }
input[type=range] { display: block; width: 100%; max-width: 40rem; margin: .4rem 0 }
.thumbs, .groups { display: flex; flex-wrap: wrap; gap: .8rem }
.groups { column-gap: 2.5rem }
figure { margin: 0; width: 9rem; break-inside: avoid }
figure img, .none { width: 112px; height: 112px; background: var(--line) }
figcaption span { display: block; font-size: .75rem; line-height: 1.35; overflow-wrap: anywhere }
details { margin: 2.5rem 0 }
@media print {
  :root { --back: #fff; --text: #000; --faint: #444; --line: #bbb; --mark: #eee }
  body { max-width: none; font-size: 11px }
  input, select { display: none !important }
  section > h2, h3 { break-after: avoid }
  .wide { overflow: visible }
}
"""

SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('counts').textContent);
const element = id => document.getElementById(id);
function show() {
  const c = Number(element('class').value), t = Number(element('threshold').value);
  const [positives, negatives] = data.totals[c];
  const tp = data.above[c][0][t], fp = data.above[c][1][t], fn = positives - tp, tn = negatives - fp;
  for (const [id, value] of Object.entries({tp, fp, fn, tn})) element(id).textContent = value;
  for (const name of document.querySelectorAll('.positive')) name.textContent = data.classes[c];
  element('shown').textContent = t / data.steps;
  const share = (part, whole) => whole ? (part / whole).toFixed(4) : 'none';
  element('rates').textContent = `accuracy ${share(tp + tn, positives + negatives)}, ` +
    `precision ${share(tp, tp + fp)}, recall ${share(tp, positives)}, ` +
    `specificity ${share(tn, negatives)}, F1 ${share(2 * tp, 2 * tp + fp + fn)}`;
}
element('threshold').addEventListener('input', show);
element('class').addEventListener('change', show);
show();
"""
