"""Puts the folds' out-of-fold predictions together and scores them: the CV.

    python 02_oof.py base
    python 02_oof.py convnext --output /content/drive/MyDrive/output
    python 02_oof.py demo --input input/demo --output output/demo

Reads OUTPUT/EXP as 01_train_fold.py left it, all folds finished. Prints the thesis' table 4.2 for this run, the mean
over the folds and the pooled AUC (the CV), accuracy and confusion matrix. Writes OUTPUT/EXP/oof.csv, confusion.png,
roc.png and curves.png.
"""

from common import Parser, experiment_folder, replacing, run, say, write_csv


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("exp", nargs="?", default="base", help="the experiment")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: a mistyped flag answers at once

import matplotlib
import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix, roc_curve

from data import accuracy, auc, read_oof, read_table, softmax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOST_EPOCHS = 5  # shown in the table
MOST_CURVES = 10  # classes drawn in roc.png; more would be a tangle

# ---------------------------------------------------------------- tables


def read_epochs(folder, folds):
    """→ foldK_epochs.csv of every fold, one below the other, with a column `fold`."""
    tables = []
    for fold in range(folds):
        path = folder / f"fold{fold}_epochs.csv"
        remedy = f"run python 01_train_fold.py --exp {folder.name} --fold {fold} --overwrite"
        tables.append(read_table(path, remedy).assign(fold=fold))
    return pd.concat(tables, ignore_index=True)


def epoch_table(epochs):
    """The thesis' table 4.2 as text: train and valid AUC per fold and epoch. Of many epochs, some."""
    last = epochs.epoch.max()
    shown = sorted({round(x) for x in np.linspace(1, last, min(last, MOST_EPOCHS))})
    table = epochs[epochs.epoch.isin(shown)].pivot(index="fold", columns="epoch", values=["train_auc", "valid_auc"])
    table.loc["mean"] = table.mean()
    table.columns = [f"{kind.replace('_auc', '')} {epoch}" for kind, epoch in table.columns]
    return table.rename_axis("fold").to_string(float_format="{:.4f}".format)


def confusion_text(matrix, classes):
    """Rows are the labels, columns the predictions (thesis figure 4.1)."""
    table = pd.DataFrame(matrix, index=classes, columns=classes)
    return table.rename_axis("label \\ prediction").to_string()


# ---------------------------------------------------------------- pictures


def save_figure(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def plain_text(label):
    """A label as matplotlib should show it: no formula between dollar signs, and not endlessly long."""
    label = label if len(label) <= 20 else label[:19] + "…"
    return label.replace("$", r"\$")


def draw_confusion(path, matrix, classes):
    side = max(4.5, 0.45 * len(classes) + 2)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    names = [plain_text(label) for label in classes]
    axis.imshow(matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    axis.set(title="out of fold: images", xlabel="prediction", ylabel="label")
    axis.set_xticks(range(len(classes)), names, rotation=90 if len(classes) > 5 else 0)
    axis.set_yticks(range(len(classes)), names)
    if len(classes) <= 30:
        for (row, column), count in np.ndenumerate(matrix):
            dark = count > matrix[row].sum() / 2
            axis.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    save_figure(figure, path)


def draw_roc(path, targets, probabilities, folds, classes):
    """Two classes: each fold's curve and the pooled one (thesis figure 2.1). More: each class against the rest."""
    figure, axis = plt.subplots(figsize=(5.5, 5.5), layout="constrained")
    if len(classes) == 2:
        for fold in sorted(folds.unique()):
            mine = (folds == fold).to_numpy()
            label = f"fold {fold}: {auc(targets[mine], probabilities[mine]):.4f}"
            axis.plot(*roc_curve(targets[mine], probabilities[mine, 1])[:2], linewidth=0.8, alpha=0.7, label=label)
        label = f"pooled: {auc(targets, probabilities):.4f}"
        axis.plot(*roc_curve(targets, probabilities[:, 1])[:2], color="black", label=label)
    else:
        for c, name in list(enumerate(classes))[:MOST_CURVES]:
            one = np.stack([1 - probabilities[:, c], probabilities[:, c]], axis=1)
            label = f"{plain_text(name)}: {auc(targets == c, one):.4f}"
            axis.plot(*roc_curve(targets == c, probabilities[:, c])[:2], linewidth=1, label=label)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axis.set(title="out of fold: ROC", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axis.legend(title="AUC" if len(classes) <= MOST_CURVES else f"AUC, first {MOST_CURVES} classes", loc="lower right")
    save_figure(figure, path)


def draw_curves(path, epochs):
    """Loss and AUC by epoch; each thin line a fold, the thick one their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, score in zip(axes, ("loss", "auc"), strict=True):
        for kind, colour in (("train", "tab:blue"), ("valid", "tab:orange")):
            table = epochs.pivot(index="epoch", columns="fold", values=f"{kind}_{score}")
            axis.plot(table, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(table.mean(axis=1), color=colour, linewidth=2, marker="o", markersize=4, label=kind)
        axis.set(title={"loss": "loss", "auc": "AUC"}[score], xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    save_figure(figure, path)


# ---------------------------------------------------------------- main


def main():
    folder = experiment_folder(ARGS, ARGS.exp)
    config, prepared, folds, logits = read_oof(ARGS, folder)
    classes, targets = prepared["classes"], folds.target.to_numpy()
    epochs = read_epochs(folder, prepared["folds"])
    probabilities = softmax(logits[config["keep"]])
    matrix = confusion_matrix(targets, probabilities.argmax(axis=1), labels=range(len(classes)))
    by_fold = [auc(targets[mine], probabilities[mine]) for mine in (folds.fold == k for k in range(prepared["folds"]))]

    table = folds[["image_name", "label", "fold"]].copy()
    table[[f"probability_{label}" for label in classes]] = probabilities
    write_csv(folder / "oof.csv", table)
    draw_confusion(folder / "confusion.png", matrix, classes)
    draw_roc(folder / "roc.png", targets, probabilities, folds.fold, classes)
    draw_curves(folder / "curves.png", epochs)

    say(f"AUC by epoch\n{epoch_table(epochs)}\n\n{confusion_text(matrix, classes)}\n")
    say(f"kept epoch: {config['keep']}, AUC of the folds {', '.join(f'{score:.4f}' for score in by_fold)}")
    say(f"mean of the folds' AUC {np.mean(by_fold):.4f}   accuracy {accuracy(targets, probabilities):.4f}")
    say(f"CV (pooled out-of-fold AUC) {auc(targets, probabilities):.4f}   → {folder / 'oof.csv'} and pictures")


if __name__ == "__main__":
    run(main)
