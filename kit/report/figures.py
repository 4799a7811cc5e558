"""What do the predictions look like? The figures of the report, as SVG text; given a path, as a PNG as well.

The SVG takes the text colour of the page around it. Labels come from strangers' files: matplotlib escapes them.
"""

import io
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from common import replacing
from kit.score import tasks
from kit.score.metrics import METRICS

matplotlib.use("Agg")


MOST_SQUARE, MOST_SCATTERS = 300, 6  # classes of a confusion matrix; numbers in one picture
MOST_POINTS = 2000  # of a scatter as SVG; more are pixels in it
MOST_CURVES = 10  # classes drawn in one picture; more would be a tangle
MOST_COUNTS, MOST_NAMES = 30, 100  # classes: of more, the confusion matrix has colours without counts, without names
COLUMNS = 8  # of the contact sheet in matched.png
SIZE = (4.8, 5.4)  # inches: a square and its legend
BELOW = dict(loc="outside lower center", ncols=2)  # a legend that hides no curve
CHANCE = dict(color="grey", linewidth=0.8, linestyle=":")
TEXT = "#000001"  # black in a PNG; save_figure replaces it in the SVG by the page's text colour
COLOURS = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color".split()


matplotlib.rcParams.update({key: TEXT for key in COLOURS})


warnings.filterwarnings("ignore", "Glyph")  # kana are boxes in a PNG; in the report they are text


matplotlib.rcParams.update({"figure.constrained_layout.use": True, "legend.framealpha": 0})


matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "foldkit"})  # text stays text; the same bytes twice


def draw_all(folder, prepared, folds, targets, probabilities, epochs):
    """→ the figures of a report, by their places in report.html. Writes PNGs into the experiment's folder."""
    classes = [name[:20].replace("$", r"\$") for name in prepared["classes"]]  # short, and no formula between dollars
    curves = draw_curves(epochs, prepared["metric"], folder / "curves.png")
    task = tasks.task_of(prepared)
    if task == "numbers":
        scatter = draw_scatter(targets, probabilities, classes, folder / "scatter.png")
        return dict(roc=scatter, calibration=draw_residuals(targets, probabilities, classes), curves=curves)
    roc = draw_roc(curves_of(targets, probabilities, classes, folds.fold.to_numpy()), folder / "roc.png")
    if task == "labels":
        each = targets.ravel().astype(int), np.stack([1 - probabilities.ravel(), probabilities.ravel()], axis=1)
        return dict(roc=roc, calibration=draw_calibration(*each, ["", "a label"]), curves=curves)
    few = 2 < len(classes) <= MOST_SQUARE  # of two classes, the table that the reader moves says it all
    confusion = (
        draw_confusion(targets, probabilities, classes, folder / "confusion.png") if len(classes) <= MOST_SQUARE else ""
    )
    return dict(
        roc=roc, calibration=draw_calibration(targets, probabilities, classes), curves=curves,
        confusion=confusion if few else "",
    )  # fmt: skip


def save_figure(figure, path=None):
    """Closes a figure. → its SVG text. Writes it as a PNG too where a path is given."""
    if path is not None:
        save_png(figure, path)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata=dict(Date=None))
    plt.close(figure)
    return svg.getvalue()[svg.getvalue().index("<svg") :].replace(TEXT, "currentColor")


def save_png(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", facecolor="white")


def draw_confusion(targets, probabilities, classes, path):
    """Counts of images: rows are the labels, columns the predictions (thesis figure 4.1). Colours: share of the row."""
    matrix = confusion_matrix(targets, probabilities.argmax(axis=1), labels=range(len(classes)))
    side = np.clip(0.45 * len(classes) + 2, 4.5, 14)
    figure, axis = plt.subplots(figsize=(side, side))
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set(title="out of fold: images", xlabel="prediction", ylabel="label")
    if len(classes) <= MOST_NAMES:
        axis.set_xticks(range(len(classes)), classes, rotation=90 if len(classes) > 5 else 0)
        axis.set_yticks(range(len(classes)), classes)
    if len(classes) <= MOST_COUNTS:
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            axis.text(column, row, matrix[row, column], ha="center", va="center", color=colour)
    return save_figure(figure, path)


def curves_of(targets, probabilities, classes, folds):
    """→ [(name, bool [N], score [N]), …]: of two classes, each fold and all pooled (thesis figure 2.1); of more, each
    of the first ten against the rest; of labels, the ten commonest. A curve that lacks positives or negatives is left
    out."""
    if targets.ndim == 2:
        commonest = np.argsort(-targets.sum(axis=0), kind="stable")[:MOST_CURVES]
        curves = [(classes[c], targets[:, c] > 0, probabilities[:, c]) for c in commonest]
    elif len(classes) == 2:
        parts = {f"fold {k}": folds == k for k in np.unique(folds)} | {"pooled": folds >= 0}
        curves = [(name, targets[rows] == 1, probabilities[rows, 1]) for name, rows in parts.items()]
    else:
        curves = [(name, targets == c, probabilities[:, c]) for c, name in enumerate(classes[:MOST_CURVES])]
    return [curve for curve in curves if 0 < curve[1].sum() < len(curve[1])]


def draw_roc(curves, path):
    """A line for each curve, and a dotted one for chance."""
    figure, axis = plt.subplots(figsize=SIZE)
    for name, positive, score in curves:
        false_rate, true_rate, _ = roc_curve(positive, score)
        label = f"{name if len(name) <= 14 else name[:13] + '…'}: {roc_auc_score(positive, score):.4f}"
        axis.plot(false_rate, true_rate, label=label, color=TEXT if name == "pooled" else None, linewidth=1)
    axis.plot([0, 1], [0, 1], **CHANCE)
    axis.set(title="ROC, out of fold", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    figure.legend(*axis.get_legend_handles_labels(), title="AUC", **BELOW)
    return save_figure(figure, path)


def draw_scatter(targets, predictions, classes, path):
    """Predictions by targets, of the first numbers, out of fold."""
    figure, axis = plt.subplots(figsize=SIZE)
    for c, name in enumerate(classes[:MOST_SCATTERS]):
        many = len(targets) > MOST_POINTS
        axis.scatter(targets[:, c], predictions[:, c], s=6, alpha=0.4, label=name, rasterized=many)
    ends = np.nanmin(targets[:, :MOST_SCATTERS]), np.nanmax(targets[:, :MOST_SCATTERS])
    axis.plot(ends, ends, **CHANCE)
    axis.set(title="out of fold", xlabel="target", ylabel="prediction")
    figure.legend(*axis.get_legend_handles_labels(), **BELOW)
    return save_figure(figure, path)


def draw_residuals(targets, predictions, classes):
    """How far predictions lie above their targets."""
    figure, axis = plt.subplots(figsize=SIZE)
    for c, name in enumerate(classes[:MOST_SCATTERS]):
        known = np.isfinite(targets[:, c])
        axis.hist(predictions[known, c] - targets[known, c], 40, histtype="step", label=name)
    axis.set(title="residuals", xlabel="prediction - target", ylabel="images")
    figure.legend(*axis.get_legend_handles_labels(), **BELOW)
    return save_figure(figure)


def draw_duel(here, there, names, what):
    """How good two experiments' predictions are, float [M] each, an image a point. names: the experiments'; what: the
    values'."""
    figure, axis = plt.subplots(figsize=SIZE)
    axis.scatter(there, here, s=12, alpha=0.6, color="tab:blue", linewidths=0, rasterized=len(here) > MOST_POINTS)
    ends = min(here.min(), there.min()), max(here.max(), there.max())
    axis.plot(ends, ends, **CHANCE)
    here, there = (name[:30].replace("$", r"\$") for name in names)
    axis.set(title=f"out of fold: {what}", xlabel=there, ylabel=here, aspect="equal")
    return save_figure(figure)


def calibration(targets, probabilities, bins=10):
    """→ (mean probability, observed frequency, images) of each bin that isn't empty, and the expected calibration error
    (Naeini et al. 2015): of the second class of two, or of the most probable class of more."""
    score, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    if probabilities.shape[1] == 2:
        score, hit = probabilities[:, 1], targets == 1
    by_bin = pd.DataFrame(dict(score=score, hit=hit)).groupby(np.minimum((score * bins).astype(int), bins - 1))
    (mean, observed), count = by_bin.mean().to_numpy().T, by_bin.size().to_numpy()
    return mean, observed, count, np.average(np.abs(mean - observed), weights=count)


def draw_calibration(targets, probabilities, classes):
    mean, observed, count, error = calibration(targets, probabilities)
    figure, axis = plt.subplots(figsize=SIZE)
    axis.plot([0, 1], [0, 1], **CHANCE)
    axis.plot(mean, observed, color="tab:blue", linewidth=1)
    axis.scatter(mean, observed, s=10 + 250 * count / count.sum(), color="tab:blue", alpha=0.7)
    for x, y, images in zip(mean, observed, count, strict=True):
        axis.annotate(str(images), (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8)
    of = classes[1] if len(classes) == 2 else "the prediction"
    axis.set(title=f"calibration: expected error {error:.3f} (figures: images)", aspect="equal")
    axis.set(xlabel=f"probability of {of}", ylabel="how often it was right")
    return save_figure(figure)


def draw_curves(epochs, metric, path):
    """Loss and metric by epoch: each thin line is a fold, the thick one their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis, column, title in zip(axes, ("loss", metric), ("loss", METRICS[metric].name), strict=True):
        for kind, colour in (("train", "tab:blue"), ("valid", "tab:orange")):
            table = epochs.pivot(index="epoch", columns="fold", values=f"{kind}_{column}")
            axis.plot(table, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(table.mean(axis=1), color=colour, linewidth=2, marker="o", markersize=4, label=kind)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    return save_figure(figure, path)
