"""Puts the folds' out-of-fold predictions together and says how good they are, and how sure that is.

    python 02_oof.py base
    python 02_oof.py base nosampler                        # compares them, and blends them
    python 02_oof.py base --lb-public 0.888 --lb-private 0.905

Reads OUTPUT/EXP as 01_train_fold.py left it, all folds finished. Prints the thesis' table 4.2 for this run, the pooled
score (the CV) and the mean over the folds, at the best and at the last epoch, each with a 95 % interval from a
bootstrap over groups, accuracy and confusion matrix. Writes OUTPUT/EXP/oof.csv, report.html (open it in a browser),
confusion.png, roc.png and curves.png, and the experiment's row of OUTPUT/experiments.csv.
"""

from common import Parser, experiment_folder, listing, number, prepared_folder, run, say, write_csv


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument(
        "exps", nargs="*", default=["base"], metavar="EXP", help="one experiment, or several to compare"
    )
    parser.add_argument("--metric", choices=("auc", "accuracy", "logloss", "f1"), default="auc", help="the score")
    parser.add_argument("--draws", type=number(int, 100), default=1000, help="bootstrap samples")
    add = parser.add_argument_group("what the leaderboard said, for experiments.csv").add_argument
    for part in ("public", "private"):
        add(f"--lb-{part}", type=number(float, 0), help=f"the {part} score; of several experiments, that of their mean")
    args = parser.parse_args()
    repeated = {exp for exp in args.exps if args.exps.count(exp) > 1}
    if repeated:
        parser.error(f"{listing(repeated)} is named twice: name each experiment once")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: a mistyped flag answers at once

from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import confusion_matrix, f1_score, log_loss

import report
from data import accuracy, auc, note_in_ledger, open_images, read_oof, read_table, softmax

MOST_EPOCHS = 5  # shown in the table
SHOWN_OF_LEDGER = "experiment date settings metric cv cv_low cv_high last_epoch minutes public private".split()

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


# ---------------------------------------------------------------- one experiment


def score_one(exp):
    """Scores one experiment, prints that, and writes oof.csv. → all that the comparison, ledger and report need."""
    folder = experiment_folder(ARGS, exp)
    config, prepared, folds, logits = read_oof(ARGS, folder)
    classes, targets = prepared["classes"], folds.target.to_numpy()
    epochs = read_epochs(folder, prepared["folds"])
    probabilities = softmax(logits[config["keep"]])
    matrix = confusion_matrix(targets, probabilities.argmax(axis=1), labels=range(len(classes)))
    table = folds[["image_name", "label", "fold"]].copy()
    table[[f"probability_{label}" for label in classes]] = probabilities
    write_csv(folder / "oof.csv", table)

    say(f"experiment {exp}: AUC by epoch\n{epoch_table(epochs)}\n\n{confusion_text(matrix, classes)}\n")
    say(f"{NAMES[ARGS.metric]} and its 95 % interval, over {folds.group.nunique()} groups of {len(folds)} images")
    scores = score_epochs(config, folds, targets, logits)
    for kind, found in scores.items():
        pooled, mean = with_interval(*found.pooled), with_interval(*found.mean)
        say(f"  {kind} epoch   pooled {pooled}   mean of the folds {mean}   ({found.note})")
    say(f"accuracy {accuracy(targets, probabilities):.4f}   → {folder / 'oof.csv'}, report.html and pictures")
    if ARGS.metric == "auc":
        say(f"CV (pooled out-of-fold AUC) {auc(targets, probabilities):.4f}")
    return SimpleNamespace(
        exp=exp,
        folder=folder,
        config=config,
        prepared=prepared,
        folds=folds,
        targets=targets,
        epochs=epochs,
        probabilities=probabilities,
        scores=scores,
    )


def score_epochs(config, folds, targets, logits):
    """Pooled and mean over folds, best and last epoch, side by side, so that the optimism of choosing is visible.

    → {"best" and "last": pooled and mean, each (score, bootstrap values), and a note}.
    """
    metric, weights = METRICS[ARGS.metric], bootstrap_weights(folds.group, ARGS.draws)
    by_fold, found = mean_of_folds(metric, folds.fold.to_numpy()), {}
    kept = "chosen by the score: a little too good" if config["keep"] == "best" else "not kept"
    for kind, note in (("best", kept), ("last", "kept" if config["keep"] == "last" else "honest about the epoch")):
        probabilities = softmax(logits[kind])
        pooled, mean = (scored(m, targets, probabilities, weights) for m in (metric, by_fold))
        found[kind] = SimpleNamespace(pooled=pooled, mean=mean, note=note)
    return found


def fold_rows(one):
    """→ a row per fold for the report: images, epochs, scores of the kept predictions, minutes."""
    rows = []
    for fold, epochs in one.epochs.groupby("fold"):
        mine = (one.folds.fold == fold).to_numpy()
        scores = [metric(one.targets[mine], one.probabilities[mine]) for metric in METRICS.values()]
        best = epochs.epoch[epochs.valid_auc[::-1].idxmax()]
        rows.append([fold, mine.sum(), best, *(f"{s:.4f}" for s in scores), f"{epochs.seconds.sum() / 60:.1f}"])
    return rows


def ledger_cells(one, noted):
    """→ the experiment's row of experiments.csv, with the leaderboard's scores in `noted`.

    fold0_train_auc and fold0_valid_auc hold a figure per epoch: the thesis' table 4.2 can be read from them; cv, public
    and private are its tables 4.3, 4.4 and 4.6.
    """
    kept = one.scores[one.config["keep"]].pooled
    low, high = interval(kept[1])
    trained = max((one.folder / f"fold{fold}.pt").stat().st_mtime for fold in range(one.prepared["folds"]))
    cells = dict(
        date=f"{datetime.fromtimestamp(trained):%Y-%m-%d %H:%M}",
        settings=" ".join(f"{key}={value}" for key, value in one.config["changed"].items()),
        metric=ARGS.metric,
        cv=kept[0],
        cv_low=low,
        cv_high=high,
        mean_of_folds=one.scores[one.config["keep"]].mean[0],
        last_epoch=one.scores["last"].pooled[0],
        accuracy=accuracy(one.targets, one.probabilities),
        minutes=f"{one.epochs.seconds.sum() / 60:.1f}",
        **noted,
    )
    for fold, epochs in one.epochs.groupby("fold"):
        mine = (one.folds.fold == fold).to_numpy()
        cells[f"fold{fold}"] = METRICS[ARGS.metric](one.targets[mine], one.probabilities[mine])
        for kind in ("train", "valid"):
            cells[f"fold{fold}_{kind}_auc"] = " ".join(f"{value:.4f}" for value in epochs[f"{kind}_auc"])
    return cells


def write_report(one, ledger, comparisons):
    """Writes the experiment's report.html and pictures."""
    kept = one.scores[one.config["keep"]].pooled
    low, high = interval(kept[1])
    row = ledger[ledger.experiment == one.exp].iloc[0]
    known = [f"{part} {row[part].rstrip('0')}" for part in ("public", "private") if row[part]]
    grouped = f"{one.folds.group.nunique()} groups of {len(one.folds)} images"
    header = ["epoch", "pooled", "95 %", "mean of the folds", "95 %", ""]
    scores = []
    for kind, found in one.scores.items():
        parts = [(f"{s:.4f}", "{:.4f} to {:.4f}".format(*interval(v))) for s, v in (found.pooled, found.mean)]
        scores.append([kind, *parts[0], *parts[1], found.note])
    shown = dict(
        headline=f"{NAMES[ARGS.metric]} {kept[0]:.4f}",
        interval=f"95 % {low:.4f} to {high:.4f}, by a bootstrap over {grouped}",
        notes=[
            f"{one.config['model']}, {row['date']}, settings: {row['settings'] or 'the default ones'}",
            *([f"leaderboard: {', '.join(known)}"] if known else []),
        ],
        scores=(header, scores),
        folds=(["fold", "images", "best epoch", *NAMES.values(), "minutes"], fold_rows(one)),
        ledger=(SHOWN_OF_LEDGER, ledger[SHOWN_OF_LEDGER].values.tolist()),
        comparisons=comparisons,
    )
    report.write(
        one.folder,
        one.exp,
        one.config,
        one.prepared,
        one.folds,
        one.targets,
        one.probabilities,
        one.epochs,
        thumbnails(one),
        shown,
    )


def thumbnails(one):
    """The training images at the smallest size that lies in the cache, or None: a report can do without."""
    for size in one.prepared["sizes"]:
        if (prepared_folder(ARGS) / f"train_{size}.npy").exists():
            return open_images(ARGS, one.prepared, "train", size, len(one.folds))
    return None


# ---------------------------------------------------------------- main


def compare(results):
    """Prints several experiments side by side, and their blends. → (lines of comparison, score of the first blend)."""
    metric, weights = METRICS[ARGS.metric], bootstrap_weights(results[0].folds.group, ARGS.draws)
    targets, every = results[0].targets, {one.exp: one.probabilities for one in results}
    mixed = blends([*every.values()])
    found = {name: scored(metric, targets, p, weights) for name, p in (every | mixed).items()}
    say(f"\n{NAMES[ARGS.metric]}, pooled, and its 95 % interval")
    for name, score in found.items():
        say(f"  {name:24} {with_interval(*score)}")
    first, *others = found
    lines = [comparison_line(first, name, *found[first], *found[name], ARGS.metric != "logloss") for name in others]
    for line in lines:
        say(line)
    return lines, found[next(iter(mixed))]


def main():
    results = [score_one(exp) for exp in ARGS.exps]
    noted = dict(public=ARGS.lb_public, private=ARGS.lb_private)
    comparisons = []
    if len(results) > 1:
        comparisons, (cv, values) = compare(results)
        if noted != dict(public=None, private=None):
            low, high = interval(values)
            cells = dict(settings="mean of probabilities", metric=ARGS.metric, cv=cv, cv_low=low, cv_high=high)
            note_in_ledger(ARGS, "+".join(ARGS.exps), cells | noted)
        noted = dict(public=None, private=None)
    for one in results:
        ledger = note_in_ledger(ARGS, one.exp, ledger_cells(one, noted))
    for one in results:
        write_report(one, ledger, comparisons)


if __name__ == "__main__":
    run(main)
