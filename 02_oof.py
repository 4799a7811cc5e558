"""Puts the folds' out-of-fold predictions together and says how good they are, and how sure that is.

    python 02_oof.py base
    python 02_oof.py base nosampler                        # compares them, and blends them
    python 02_oof.py demo --input input/demo --output output/demo --metric accuracy

Reads OUTPUT/EXP as 01_train_fold.py left it, all folds finished. Prints the thesis' table 4.2 for this run, the pooled
score (the CV) and the mean over the folds, at the best and at the last epoch, each with a 95 % interval from a
bootstrap over groups, accuracy and confusion matrix. Writes OUTPUT/EXP/oof.csv, confusion.png, roc.png and curves.png.
"""

from common import Parser, experiment_folder, listing, number, replacing, run, say, write_csv


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument(
        "exps", nargs="*", default=["base"], metavar="EXP", help="one experiment, or several to compare"
    )
    parser.add_argument("--metric", choices=("auc", "accuracy", "logloss", "f1"), default="auc", help="the score")
    parser.add_argument("--draws", type=number(int, 100), default=1000, help="bootstrap samples")
    args = parser.parse_args()
    repeated = {exp for exp in args.exps if args.exps.count(exp) > 1}
    if repeated:
        parser.error(f"{listing(repeated)} is named twice: name each experiment once")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: a mistyped flag answers at once

import matplotlib
import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import confusion_matrix, f1_score, log_loss, roc_curve

from data import accuracy, auc, read_oof, read_table, softmax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOST_EPOCHS = 5  # shown in the table
MOST_CURVES = 10  # classes drawn in roc.png; more would be a tangle

# ---------------------------------------------------------------- scores and their intervals


def f1(targets, probabilities, weights=None):
    """F1 of the second class of two, or its mean over more classes."""
    average = "binary" if probabilities.shape[1] == 2 else "macro"
    predicted = probabilities.argmax(axis=1)
    return float(f1_score(targets, predicted, sample_weight=weights, average=average, zero_division=0))


def logloss(targets, probabilities, weights=None):
    return float(log_loss(targets, probabilities, sample_weight=weights, labels=range(probabilities.shape[1])))


METRICS = dict(auc=auc, accuracy=accuracy, logloss=logloss, f1=f1)
NAMES = dict(auc="AUC", accuracy="accuracy", logloss="log loss", f1="F1")


def mean_of_folds(metric, folds):
    """A metric that is taken in each fold and averaged over the folds; folds int [N]."""

    def score(targets, probabilities, weights=None):
        weights = np.ones(len(targets)) if weights is None else weights
        parts = [(targets[mine], probabilities[mine], weights[mine]) for mine in (folds == k for k in np.unique(folds))]
        return float(np.mean([metric(*part) for part in parts]))

    return score


def bootstrap_weights(groups, draws, seed=777):
    """→ int [draws, N]: how often each image is in each bootstrap sample.

    Groups, not images, are drawn with replacement: copies of one source are one piece of evidence, and an interval from
    drawn images would be too narrow. The same samples serve every experiment, so that differences are paired.
    """
    _, groups = np.unique(groups, return_inverse=True)
    count = groups.max() + 1
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(0, count, count), minlength=count)[groups] for _ in range(draws)])


def interval(values):
    """The middle 95 % of bootstrap values; samples that lack a class don't count."""
    return tuple(float(x) for x in np.nanquantile(values, [0.025, 0.975]))


def scored(metric, targets, probabilities, weights):
    """→ (score, its values over the bootstrap samples)."""
    return metric(targets, probabilities), np.array([metric(targets, probabilities, w) for w in weights])


def with_interval(score, values):
    low, high = interval(values)
    return f"{score:.4f} ({low:.4f} to {high:.4f})"


# ---------------------------------------------------------------- several experiments


def comparison_line(name, other, score, values, other_score, other_values, larger_is_better):
    """The paired difference `other` - `name`, its interval and what it says, in one plain sentence."""
    delta, deltas = other_score - score, other_values - values
    low, high = interval(deltas)
    figures = f"Δ = {delta:+.4f}, 95 % {low:+.4f} … {high:+.4f}, P(Δ > 0) = {np.nanmean(deltas > 0):.2f}"
    if low <= 0 <= high:
        return f"{other} against {name}: no evidence either way: {figures}"
    better = other if (delta > 0) == larger_is_better else name
    return f"{other} against {name}: {better} is better: {figures}"


def blends(probabilities):
    """Mean of several experiments' probabilities, and of their ranks: {name: [N, K]}. Ranks are scaled to sum to 1."""
    ranks = np.mean([rankdata(p, axis=0) for p in probabilities], axis=0)
    return {
        "mean of probabilities": np.mean(probabilities, axis=0),
        "mean of ranks": ranks / ranks.sum(axis=1, keepdims=True),
    }


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


def report_one(exp):
    """Scores, tables and pictures of one experiment. → (folds, targets, probabilities of the kept epoch)."""
    folder = experiment_folder(ARGS, exp)
    config, prepared, folds, logits = read_oof(ARGS, folder)
    classes, targets = prepared["classes"], folds.target.to_numpy()
    epochs = read_epochs(folder, prepared["folds"])
    probabilities = softmax(logits[config["keep"]])
    matrix = confusion_matrix(targets, probabilities.argmax(axis=1), labels=range(len(classes)))

    table = folds[["image_name", "label", "fold"]].copy()
    table[[f"probability_{label}" for label in classes]] = probabilities
    write_csv(folder / "oof.csv", table)
    draw_confusion(folder / "confusion.png", matrix, classes)
    draw_roc(folder / "roc.png", targets, probabilities, folds.fold, classes)
    draw_curves(folder / "curves.png", epochs)

    say(f"experiment {exp}: AUC by epoch\n{epoch_table(epochs)}\n\n{confusion_text(matrix, classes)}\n")
    say_scores(config, folds, targets, logits)
    say(f"accuracy {accuracy(targets, probabilities):.4f}   → {folder / 'oof.csv'} and pictures")
    if ARGS.metric == "auc":
        say(f"CV (pooled out-of-fold AUC) {auc(targets, probabilities):.4f}")
    return folds, targets, probabilities


def say_scores(config, folds, targets, logits):
    """Pooled and mean over folds, best and last epoch, side by side, so that the optimism of choosing is visible."""
    metric, weights = METRICS[ARGS.metric], bootstrap_weights(folds.group, ARGS.draws)
    fold_numbers = folds.fold.to_numpy()
    kept = "chosen by the validation AUC, so a little too good" if config["keep"] == "best" else "not kept"
    say(f"{NAMES[ARGS.metric]} and its 95 % interval, over {folds.group.nunique()} groups of {len(folds)} images")
    for kind, note in (("best", kept), ("last", "kept" if config["keep"] == "last" else "honest about the epoch")):
        probabilities = softmax(logits[kind])
        pooled = with_interval(*scored(metric, targets, probabilities, weights))
        mean = with_interval(*scored(mean_of_folds(metric, fold_numbers), targets, probabilities, weights))
        say(f"  {kind} epoch   pooled {pooled}   mean of the folds {mean}   ({note})")


def main():
    results = {exp: report_one(exp) for exp in ARGS.exps}
    if len(results) == 1:
        return
    folds, targets, _ = next(iter(results.values()))
    metric, weights = METRICS[ARGS.metric], bootstrap_weights(folds.group, ARGS.draws)
    every = {exp: probabilities for exp, (_, _, probabilities) in results.items()}
    found = {name: scored(metric, targets, p, weights) for name, p in (every | blends(list(every.values()))).items()}
    say(f"\n{NAMES[ARGS.metric]}, pooled, and its 95 % interval")
    for name, score in found.items():
        say(f"  {name:24} {with_interval(*score)}")
    first = ARGS.exps[0]
    for name in list(found)[1:]:
        say(comparison_line(first, name, *found[first], *found[name], ARGS.metric != "logloss"))


if __name__ == "__main__":
    run(main)
