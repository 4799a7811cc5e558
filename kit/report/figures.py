"""Charts of the report, as SVG text; given a path, as a PNG as well.

The SVG takes the text colour of the page around it. Labels come from strangers' files: matplotlib escapes them.
"""

import io
import warnings

from common import replacing

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from kit.score import thresholds
from kit.score.metrics import METRICS

matplotlib.use("Agg")
MOST_SQUARE, MOST_SCATTERS = 300, 6  # classes of a confusion matrix; numbers in one picture
MOST_POINTS, MOST_CURVES = 2000, 10  # dots of a scatter as SVG, more are pixels in it; classes in one picture
MOST_COUNTS, MOST_NAMES = 30, 100  # classes: of more, the confusion matrix has colours without counts, without names
SIZE = (4.8, 5.4)  # inches: a square and its legend
CHANCE = dict(color="grey", linewidth=0.8, linestyle=":")
TEXT = "#000001"  # black in a PNG; save_figure replaces it in the SVG by the page's text colour
COLOURS = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color".split()

matplotlib.rcParams.update(dict.fromkeys(COLOURS, TEXT))
matplotlib.rcParams.update({"figure.constrained_layout.use": True, "legend.framealpha": 0})
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "foldkit"})  # text stays text; the same bytes twice
warnings.filterwarnings("ignore", "Glyph")  # kana are boxes in a PNG; in the report they are text


def draw_all(oof, epochs):
    """Return the charts of a report, {placeholder: SVG text}. Write PNGs too. epochs: as in page.Evaluation."""
    names = [name[:20].replace("$", r"\$") for name in oof.task.names]  # short, and no formula between dollars
    charts = CHARTS[oof.task.key](oof, names)
    return charts | dict(curves=draw_curves(epochs, oof.prepared.metric, oof.folder / "curves.png"))


def charts_of_classes(oof, names):
    targets, probabilities = oof.targets, oof.predictions
    if len(names) == 2:  # each fold and all pooled (thesis figure 2.1)
        parts = {f"fold {k}": oof.folds.fold.to_numpy() == k for k in oof.present} | {"pooled": slice(None)}
        curves = [(name, targets[rows] == 1, probabilities[rows, 1]) for name, rows in parts.items()]
    else:  # the first ones, each against the rest
        curves = [(name, targets == k, probabilities[:, k]) for k, name in enumerate(names[:MOST_CURVES])]
    calibrated = draw_calibration(targets, probabilities, names)
    charts = dict(roc=draw_roc(curves, oof.folder / "roc.png"), calibration=calibrated)
    if len(names) <= MOST_SQUARE:
        read = thresholds.read_classes(oof.prepared.metric, targets, probabilities, oof.folds.fold.to_numpy())
        charts["confusion"] = draw_confusion(targets, read, names, oof.folder / "confusion.png")
    return charts


def charts_of_labels(oof, names):
    commonest = np.argsort(-oof.targets.sum(axis=0), kind="stable")[:MOST_CURVES]
    curves = [(names[k], oof.targets[:, k] > 0, oof.predictions[:, k]) for k in commonest]
    targets, p = oof.targets.ravel().astype(int), oof.predictions.ravel()
    calibrated = draw_calibration(targets, np.stack([1 - p, p], axis=1), ["", "a label"])
    return dict(roc=draw_roc(curves, oof.folder / "roc.png"), calibration=calibrated)


def charts_of_numbers(oof, names):
    columns = [*zip(names, oof.targets.T, oof.predictions.T, strict=True)][:MOST_SCATTERS]
    ends = np.nanmin(oof.targets[:, :MOST_SCATTERS]), np.nanmax(oof.targets[:, :MOST_SCATTERS])
    figure, axis = draw_scatter(columns, ends, "out of fold", "target", "prediction", s=6, alpha=0.4)
    scatter = save_figure(figure, oof.folder / "scatter.png", legend_of=axis)
    figure, axis = plt.subplots(figsize=SIZE)
    for name, target, predicted in columns:
        gaps = predicted - target
        axis.hist(gaps[np.isfinite(gaps)], 40, histtype="step", label=name)
    axis.set(title="residuals", xlabel="prediction - target", ylabel="images")
    return dict(roc=scatter, calibration=save_figure(figure, legend_of=axis))


CHARTS = {"classes": charts_of_classes, "labels": charts_of_labels, "numbers": charts_of_numbers}


def save_figure(figure, path=None, legend_of=None, title=None):
    """Close a figure and return its SVG text. Write it as a PNG too where a path is given. legend_of: the axis whose
    legend, with a title, gets a place below, where it hides no curve."""
    if legend_of is not None:
        handles = legend_of.get_legend_handles_labels()
        figure.legend(*handles, title=title, loc="outside lower center", ncols=2)
    if path is not None:
        save_png(figure, path)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata=dict(Date=None))
    plt.close(figure)
    return svg.getvalue()[svg.getvalue().index("<svg") :].replace(TEXT, "currentColor")


def save_png(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", facecolor="white")


def draw_confusion(targets, read, names, path):
    """Draw counts of images: rows are labels, columns predictions (thesis figure 4.1); colours, shares of the row."""
    matrix = confusion_matrix(targets, read, labels=range(len(names)))
    side = np.clip(0.45 * len(names) + 2, 4.5, 14)
    figure, axis = plt.subplots(figsize=(side, side))
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set(title="out of fold: images", xlabel="prediction", ylabel="label")
    if len(names) <= MOST_NAMES:
        axis.set_xticks(range(len(names)), names, rotation=90 if len(names) > 5 else 0)
        axis.set_yticks(range(len(names)), names)
    if len(names) <= MOST_COUNTS:
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            axis.text(column, row, matrix[row, column], ha="center", va="center", color=colour)
    return save_figure(figure, path)


def draw_roc(curves, path):
    """Draw ROC curves and a dotted line for chance. curves: [(name, positive bool [n], score [n]), …]; one that lacks
    positives or negatives is left out."""
    figure, axis = plt.subplots(figsize=SIZE)
    for name, positive, score in curves:
        if 0 < positive.sum() < len(positive):
            false_rate, true_rate, _ = roc_curve(positive, score)
            label = f"{name if len(name) <= 14 else name[:13] + '…'}: {roc_auc_score(positive, score):.4f}"
            axis.plot(false_rate, true_rate, label=label, color=TEXT if name == "pooled" else None, linewidth=1)
    axis.plot([0, 1], [0, 1], **CHANCE)
    axis.set(title="ROC, out of fold", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    return save_figure(figure, path, legend_of=axis, title="AUC")


def draw_scatter(columns, ends, title, xlabel, ylabel, **dots):
    """Draw dots and a dotted diagonal between two `ends`. columns: [(label, x [N], y [N]), …]. → (figure, axis)"""
    figure, axis = plt.subplots(figsize=SIZE)
    for label, x, y in columns:
        axis.scatter(x, y, label=label, rasterized=len(x) > MOST_POINTS, **dots)
    axis.plot(ends, ends, **CHANCE)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axis


def draw_pair(values, other_values, exp, other_exp, what):
    """Draw two experiments' values of each image, float [M] both, as a scatter. what: the values' name."""
    both, names = (other_values, values), [name[:30].replace("$", r"\$") for name in (other_exp, exp)]
    dots = dict(s=12, alpha=0.6, color="tab:blue", linewidths=0)
    figure, axis = draw_scatter([("", *both)], (np.min(both), np.max(both)), f"out of fold: {what}", *names, **dots)
    axis.set(aspect="equal")
    return save_figure(figure)


def calibration(targets, probabilities, bins=10):
    """Return (mean probability, observed frequency, images of each bin; the expected calibration error, Naeini et al.
    2015) of the second class of two, or of the most probable one of more."""
    score, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    if probabilities.shape[1] == 2:
        score, hit = probabilities[:, 1], targets == 1
    by_bin = pd.DataFrame(dict(score=score, hit=hit)).groupby(np.minimum((score * bins).astype(int), bins - 1))
    (mean, observed), count = by_bin.mean().to_numpy().T, by_bin.size().to_numpy()
    return mean, observed, count, np.average(np.abs(mean - observed), weights=count)


def draw_calibration(targets, probabilities, names):
    """Draw the calibration curve; a point's area and figure: the images in its bin."""
    mean, observed, count, error = calibration(targets, probabilities)
    figure, axis = plt.subplots(figsize=SIZE)
    axis.plot([0, 1], [0, 1], **CHANCE)
    axis.plot(mean, observed, color="tab:blue", linewidth=1)
    axis.scatter(mean, observed, s=10 + 250 * count / count.sum(), color="tab:blue", alpha=0.7)
    for x, y, images in zip(mean, observed, count, strict=True):
        axis.annotate(str(images), (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8)
    what = names[1] if len(names) == 2 else "the prediction"
    axis.set(title=f"calibration: expected error {error:.3f} (figures: images)", aspect="equal")
    axis.set(xlabel=f"probability of {what}", ylabel="how often it was right")
    return save_figure(figure)


def draw_curves(epochs, metric, path):
    """Draw loss and metric by epoch: each thin line is a fold, the thick one their mean."""
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
