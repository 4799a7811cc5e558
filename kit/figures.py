"""What do the predictions look like? The figures of the report. Used by kit/report.py.

Each function returns its figure as SVG text, and writes a PNG as well where it is given a path. The SVG takes the text
colour of the page around it, light or dark. Labels come from strangers' files: matplotlib escapes them.
"""

import io

import matplotlib
import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score, roc_curve

from common import replacing
from kit.metrics import METRICS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOST_CURVES = 10  # classes drawn in one picture; more would be a tangle
MOST_COUNTS, MOST_NAMES = 30, 100  # classes: of more, the confusion matrix has colours without counts, without names
BELOW = dict(loc="outside lower center", ncols=2)  # a legend that hides no curve
EDGES = (-0.02, 1.02)  # of an axis from 0 to 1: points at its ends are whole
TEXT = "#000001"  # black in a PNG; save_figure replaces it in the SVG by the page's text colour
COLOURS = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color".split()
matplotlib.rcParams.update({key: TEXT for key in COLOURS} | {"legend.framealpha": 0})


def draw_all(folder, prepared, folds, probabilities, epochs):
    """→ the figures of a report, by their places in report.html. Writes three PNGs into the experiment's folder."""
    classes, targets = prepared["classes"], folds.target.to_numpy()
    matrix = confusion_matrix(targets, probabilities.argmax(axis=1), labels=range(len(classes)))
    confusion = draw_confusion(matrix, classes, folder / "confusion.png")
    data = (targets, probabilities, classes)
    return dict(
        roc=draw_roc(*data, folds.fold.to_numpy(), folder / "roc.png"),
        precision_recall=draw_precision_recall(*data), calibration=draw_calibration(*data),
        confusion=confusion if len(classes) > 2 else "",  # of two classes, the table that the reader moves says it all
        curves=draw_curves(epochs, prepared["metric"], folder / "curves.png"),
    )  # fmt: skip


def save_figure(figure, path=None):
    """Closes a figure. → its SVG text. Writes it as a PNG too where a path is given."""
    if path is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=100, format="png", facecolor="white")
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "foldkit"}):  # the same bytes each time
        figure.savefig(svg, format="svg", transparent=True, metadata=dict(Date=None))
    plt.close(figure)
    return svg.getvalue()[svg.getvalue().index("<svg") :].replace(TEXT, "currentColor")


def new_figure(width, height, columns=1):
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def plain_text(label):
    """A label as matplotlib should show it: at most 20 characters, and no formula between dollar signs."""
    label = label if len(label) <= 20 else label[:19] + "…"
    return label.replace("$", r"\$")


def draw_confusion(matrix, classes, path):
    """Counts of images: rows are the labels, columns the predictions (thesis figure 4.1). Colours: share of the row."""
    figure, axis = new_figure(*[min(14, max(4.5, 0.45 * len(classes) + 2))] * 2)
    names = [plain_text(label) for label in classes]
    axis.imshow(matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    axis.set(title="out of fold: images", xlabel="prediction", ylabel="label")
    if len(classes) <= MOST_NAMES:
        axis.set_xticks(range(len(classes)), names, rotation=90 if len(classes) > 5 else 0)
        axis.set_yticks(range(len(classes)), names)
    if len(classes) <= MOST_COUNTS:
        for (row, column), count in np.ndenumerate(matrix):
            dark = count > matrix[row].sum() / 2
            axis.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    return save_figure(figure, path)


def one_against_rest(targets, probabilities, classes):
    """→ (label, bool [N], score [N]) of the second class of two, or of each of the first ten of more. A class that no
    image has is left out: it has no curve."""
    chosen = [1] if len(classes) == 2 else range(len(classes))[:MOST_CURVES]
    curves = [(plain_text(classes[c]), targets == c, probabilities[:, c]) for c in chosen]
    return [curve for curve in curves if 0 < curve[1].sum() < len(targets)]


def draw_roc(targets, probabilities, classes, folds, path):
    """Two classes: each fold's curve and the pooled one (thesis figure 2.1). More: each class against the rest."""
    figure, axis = new_figure(4.8, 5.4)
    parts = {f"fold {k}": folds == k for k in np.unique(folds)} if len(classes) == 2 else {}
    for part, rows in (parts | {"pooled": folds >= 0}).items():
        for name, positive, score in one_against_rest(targets[rows], probabilities[rows], classes):
            label = f"{part if len(classes) == 2 else name}: {roc_auc_score(positive, score):.4f}"
            style = dict(color=TEXT) if len(classes) == 2 and part == "pooled" else dict(linewidth=0.9, alpha=0.8)
            axis.plot(*roc_curve(positive, score)[:2], label=label, **style)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axis.set(title="ROC, out of fold", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    few = f", first {MOST_CURVES} classes" if len(classes) > MOST_CURVES else ""
    figure.legend(*axis.get_legend_handles_labels(), title=f"AUC{few}", **BELOW)
    return save_figure(figure, path)


def draw_precision_recall(targets, probabilities, classes):
    figure, axis = new_figure(4.8, 5.4)
    for name, positive, score in one_against_rest(targets, probabilities, classes):
        precision, recall, _ = precision_recall_curve(positive, score, drop_intermediate=True)
        label = f"{name}: {average_precision_score(positive, score):.4f}"
        (line,) = axis.plot(recall, precision, linewidth=1.2, label=label)
        axis.axhline(positive.mean(), color=line.get_color(), linewidth=0.7, linestyle=":")
    axis.set(title="precision and recall, out of fold", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    figure.legend(*axis.get_legend_handles_labels(), title="average precision (dotted: chance)", **BELOW)
    return save_figure(figure)


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
    axis.set(
        title=f"calibration: expected error {error:.3f} (figures: images)",
        xlabel=of,
        ylabel="how often it was right",
        aspect="equal",
        xlim=EDGES,
        ylim=EDGES,
    )
    return save_figure(figure)


def draw_curves(epochs, metric, path):
    """Loss and metric by epoch: each thin line is a fold, the thick one their mean."""
    figure, axes = new_figure(10, 4.2, columns=2)
    for axis, column, title in zip(axes, ("loss", metric), ("loss", METRICS[metric].name), strict=True):
        for kind, colour in (("train", "tab:blue"), ("valid", "tab:orange")):
            table = epochs.pivot(index="epoch", columns="fold", values=f"{kind}_{column}")
            axis.plot(table, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(table.mean(axis=1), color=colour, linewidth=2, marker="o", markersize=4, label=kind)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    return save_figure(figure, path)
