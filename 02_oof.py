"""Puts the folds' out-of-fold predictions together and says how good they are, and how sure that is.

    python 02_oof.py base
    python 02_oof.py base nosampler                        # compares them, and blends them
    python 02_oof.py base --metric logloss                 # shows another metric beside that of 00_prepare.py
    python 02_oof.py base --overlays                       # where the network looked in its worst mistakes
    python 02_oof.py base --lb-public 0.888 --lb-private 0.905

Reads OUTPUT/EXP, as many folds as are finished. Prints the thesis' table 4.2 (of one experiment), and the score at the
best epoch, at the last one and of what is submitted, each with a 95 % interval from a bootstrap over groups. The last
line is the CV: the pooled score of what is submitted. Writes oof.csv, suspects.csv (labels that may be wrong),
report.html, three pictures, and a row of OUTPUT/experiments.csv. Of several experiments it fits the weights of a blend,
and leaves OUTPUT/blend_A+B.json where they beat equal weights; their reports show the images about which they disagree.
"""

import common  # first: it makes the other imports faster

# isort: split
from collections import Counter
from datetime import datetime
from shlex import quote

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from common import Parser, UserError, conclude, number, prepared_folder, read_table, say, wrapped, write_csv
from kit.experiment import MOST_COLUMNS, note_in_ledger, of_folds, read_oof, train_again
from kit.report import page
from kit.score import intervals, tasks, thresholds
from kit.score.blend import BLENDS, blend, climb, held_out_blend, shared_folds, write_weights
from kit.score.metrics import METRICS, reason_against

FEW_GROUPS = 10  # of fewer, a bootstrap knows too little
MOST_EPOCHS = 5  # epochs in the table
BLOCK = 4096  # images whose classes are sorted at once
MOST_CLASSES, MOST_CONFUSIONS = 12, 10  # of more classes, the commonest confusions stand for the matrix


def make_parser():
    parser = Parser(__doc__, wrapped("Metrics: ", ", ".join(METRICS)))
    add = parser.group("what to score")
    add("exps", nargs="*", default=["base"], metavar="EXP", help="one experiment, or several to compare and blend")
    add("--metric", choices=METRICS, help="show another metric beside that of 00_prepare.py; all are listed below")
    add("--overlays", action="store_true", help="Grad-CAM of the worst mistakes, by the package grad-cam")
    add("--draws", type=number(int, 100), default=1000, help="bootstrap samples: more, smoother intervals")
    parser.shared(add)
    add = parser.group("what the leaderboard said, for experiments.csv")
    for part in ("public", "private"):
        add(f"--lb-{part}", type=number(float), metavar="SCORE", help=f"the {part} score; of several: of their mean "
            "blend")  # fmt: skip
    return parser


def cv_cells(score, values):
    """→ a score and its interval, from its values in the bootstrap samples, as the ledger has them."""
    return dict(zip(("cv", "cv_low", "cv_high"), (score, *intervals.interval(values)), strict=True))


def with_interval(score, values):
    return "{cv:.4f} ({cv_low:.4f} to {cv_high:.4f})".format(**cv_cells(score, values))


def read_epochs(oof):
    """→ foldK_epochs.csv of every finished fold, one below the other, with a column `fold`."""
    metric, tables = oof.prepared["metric"], []
    for fold in oof.present:
        path = oof.folder / f"fold{fold}_epochs.csv"
        remedy = train_again(oof.folder, fold)
        table = read_table(path, remedy, dtype=None, keep_default_na=True)
        if f"valid_{metric}" not in table:
            raise UserError(f"{path} has no valid_{metric}, the metric of 00_prepare.py: {remedy}")
        tables.append(table.assign(fold=fold))
    return pd.concat(tables, ignore_index=True)


def epoch_table(epochs, metric):
    """The thesis' table 4.2 as text: the metric in training and validation per fold and epoch. Of many epochs, some."""
    some = epochs.epoch.isin(np.linspace(1, epochs.epoch.max(), MOST_EPOCHS).round())
    columns = [f"train_{metric}", f"valid_{metric}"]
    table = epochs[some].pivot(index="fold", columns="epoch", values=columns).astype(float)
    table.loc["mean"] = table.mean()
    table.columns = [f"{column[:5]} {epoch}" for column, epoch in table.columns]
    table = table.rename_axis(None).rename_axis("fold", axis=1)
    return table.to_string(float_format="{:.4f}".format, na_rep="nan")


def confusion_text(targets, predicted, classes):
    """The confusion matrix (thesis figure 4.1). Of many classes, the commonest confusions."""
    if len(classes) <= MOST_CLASSES:
        matrix = confusion_matrix(targets, predicted, labels=range(len(classes)))
        names = [name[: common.WIDTH // (1 + len(classes)) - 2] for name in classes]
        table = pd.DataFrame(matrix, index=names, columns=names).to_string()
        return f"images: a row for each label, a column for each prediction\n{table}"
    pairs = sorted(zip(targets[targets != predicted], predicted[targets != predicted], strict=True))
    names = [name[: common.WIDTH // 3] for name in classes]
    commonest = Counter(pairs).most_common(MOST_CONFUSIONS)
    rows = [f"{names[label]} → {names[guess]}  {count}" for (label, guess), count in commonest]
    return "\n".join(["the commonest confusions: label → prediction  images", *rows])


def by_class(oof):
    """→ what is confused with what; of labels or numbers, how well each is predicted, as text."""
    classes = oof.prepared["classes"]
    if tasks.task_of(oof.prepared) == "classes":
        return confusion_text(oof.targets, oof.probabilities.argmax(axis=1), classes)
    return tasks.table_of_each(oof.prepared, oof.targets, oof.probabilities).to_string(float_format="{:.4f}".format)


def write_predictions(oof):
    """Writes oof.csv. Of many classes it has the five most probable ones of each image."""
    classes, table = oof.prepared["classes"], oof.folds[["image_name", "label", "fold"]]
    if len(classes) <= MOST_COLUMNS or tasks.task_of(oof.prepared) == "numbers":
        word = "prediction" if tasks.task_of(oof.prepared) == "numbers" else "probability"
        values = pd.DataFrame(oof.probabilities, columns=[f"{word}_{label}" for label in classes])
    else:
        parts = np.array_split(oof.probabilities, -(-len(table) // BLOCK))
        top = np.concatenate([np.argsort(-part, axis=1, kind="stable")[:, :5] for part in parts])
        values = pd.DataFrame({f"label_{k + 1}": [classes[c] for c in top[:, k]] for k in range(5)})
        values = values.assign(
            **{f"probability_{k + 1}": oof.probabilities[range(len(top)), top[:, k]] for k in range(5)}
        )
    write_csv(oof.folder / "oof.csv", pd.concat([table, values], axis=1))


def judged(oof, metric, predictions, rows=slice(None)):
    """→ predictions as the metric reads them: of sets of labels, with thresholds that were fitted on other folds."""
    if not METRICS[metric].of_sets:
        return predictions
    return thresholds.held_out(metric, oof.targets[rows], predictions, oof.folds.fold.to_numpy()[rows])


def score_one(args, oof):
    """Scores one experiment, prints that, and writes oof.csv. `oof` gets what comparison, ledger and report need."""
    metric, few = oof.prepared["metric"], of_folds(oof) and f", {of_folds(oof)}"
    oof.probabilities = tasks.predictions(oof.prepared, oof.logits["views"])
    oof.epochs = read_epochs(oof)
    oof.submitted = f"{oof.config['keep']} epoch" if oof.config["tta"] == "none" else f"{oof.config['tta']} views"
    write_predictions(oof)

    name, groups = METRICS[metric].name, f"{oof.folds.group.nunique()} groups ({len(oof.folds)} images)"
    alone = len(args.exps) == 1
    if alone:  # the reports of several have these
        say(f"{oof.exp}: {name} by epoch{few}\n{epoch_table(oof.epochs, metric)}\n\n{by_class(oof)}\n")
    scores, oof.score_table = score_predictions(args, oof)
    oof.fold_table = fold_table(args, oof)
    say(f"{oof.exp}: {name} and its 95 % interval, by a bootstrap over {groups}\n{oof.score_table.to_string()}")
    say(f"→ {oof.folder / 'oof.csv'}, report.html and pictures")
    pooled, (mean, _) = scores[oof.submitted]
    oof.cv = cv_cells(*pooled) | dict(mean_of_folds=mean, last_epoch=scores["last epoch"][0][0])
    interval = "95 % {cv_low:.4f} to {cv_high:.4f}".format(**oof.cv)
    oof.forecast = forecast_lines(args, oof, *pooled)
    if oof.folds.group.nunique() < FEW_GROUPS:
        say("the images form few groups: the intervals say little")
    for line in oof.forecast:
        say(line)
    oof.headline, oof.interval = f"{name} {oof.cv['cv']:.4f}", f"{interval}, by a bootstrap over {groups}"
    (conclude if alone else say)(f"CV {oof.cv['cv']:.4f} ({name}, pooled, {oof.submitted}{few}), {interval}")


def forecast_lines(args, oof, score, draws):
    """→ sentences on what the leaderboard may say, where 00_prepare.py compared folds and test set; else none."""
    ladder = oof.prepared.get("ladder")  # older prepared data lack it
    if not ladder or np.isnan(score):
        return []
    of_classes = tasks.task_of(oof.prepared) == "classes"
    some = np.unique(oof.targets) if of_classes else oof.targets  # one of each class, since N × K would fill the memory
    perfect = METRICS[oof.prepared["metric"]].score(some, tasks.perfect(oof.prepared, some))
    tests = len(read_table(prepared_folder(args) / "test.csv", f"{common.PREPARE} --overwrite"))
    said = intervals.leaderboard(score, draws, perfect, ladder, len(oof.folds), tests)
    return intervals.leaderboard_lines(said, ladder)


def score_predictions(args, oof):
    """Scores the best epoch, the last one and the views side by side, so that the optimism of choosing is visible.

    → ({row: (pooled, mean of the folds)}, each (score, bootstrap values); the same as a table). --metric adds a row."""
    metric, scores, table = oof.prepared["metric"], {}, pd.DataFrame(columns=["pooled", "mean of the folds"])
    note = " (optimistic: chosen by this score)" if oof.config["keep"] == "best" else ""
    rows = {"best epoch": (metric, "best", note), "last epoch": (metric, "last", "")}
    rows.setdefault(oof.submitted, (metric, "views", " (submitted)"))
    if args.metric not in (None, metric):
        rows[METRICS[args.metric].name] = (args.metric, "views", f" ({oof.submitted})")
    weights, folds = intervals.bootstrap_weights(oof.folds.group, args.draws), oof.folds.fold.to_numpy()
    for row, (key, kind, note) in rows.items():
        data = (key, oof.targets, judged(oof, key, tasks.predictions(oof.prepared, oof.logits[kind])))
        scores[row] = intervals.scored(*data, weights), intervals.mean_of_folds(*data, folds, weights)
        table.loc[row + note] = [with_interval(*score) for score in scores[row]]
    return scores, table


def fold_table(args, oof):
    """→ a row for each fold: images, kept epoch, scores of what is submitted, minutes."""
    rows = {}
    for fold, epochs in oof.epochs.groupby("fold"):
        held_out = (oof.folds.fold == fold).to_numpy()
        row = rows[fold] = {"images": held_out.sum(), "kept epoch": oof.records[fold]["epoch"]}
        usual = ["accuracy"] * (tasks.task_of(oof.prepared) == "classes")
        for metric in filter(None, (oof.prepared["metric"], *usual, args.metric)):
            found = judged(oof, metric, oof.probabilities)[held_out]
            row[METRICS[metric].name] = METRICS[metric].score(oof.targets[held_out], found)
        row["minutes"] = f"{epochs.seconds.sum() / 60:.1f}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("fold")


def ledger_cells(oof, leaderboard):
    """→ the row of experiments.csv. fold0_train_auc and fold0_valid_auc hold a figure per epoch: the thesis' table 4.2
    can be read from them; cv, public and private are its tables 4.3, 4.4 and 4.6."""
    metric, count, epochs = oof.prepared["metric"], oof.prepared["folds"], oof.epochs
    trained = max((oof.folder / f"fold{fold}.pt").stat().st_mtime for fold in oof.present)
    cells = dict(
        date=f"{datetime.fromtimestamp(trained):%Y-%m-%d %H:%M}",
        settings=" ".join(f"{key}={value}" for key, value in oof.config["changed"].items()),
        folds=f"{len(oof.present)} of {count}", metric=metric, **oof.cv,
        accuracy=METRICS["accuracy"].score(oof.targets, oof.probabilities)
        if tasks.task_of(oof.prepared) == "classes" else "",
        minutes=f"{epochs.seconds.sum() / 60:.1f}", **leaderboard,
    )  # fmt: skip
    for fold in range(count):  # a fold that is missing empties its cells
        cells[f"fold{fold}"] = oof.fold_table[METRICS[metric].name].get(fold, "")
        for kind in (f"train_{metric}", f"valid_{metric}"):
            cells[f"fold{fold}_{kind}"] = " ".join(f"{value:.4f}" for value in epochs.loc[epochs.fold == fold, kind])
    return cells


def compare(args, oofs, shared, rows):
    """Prints several experiments and their blends side by side, on the folds `shared`, of which each has `rows`.
    → (one-sentence verdicts, the ledger's cells of the mean blend)."""
    parts, verdicts = {oof.exp: oof.probabilities[own] for oof, own in zip(oofs, rows, strict=True)}, []
    models, oof, own = [*parts.values()], oofs[0], rows[0]
    task = tasks.task_of(oof.prepared)
    parts |= {f"{how} blend": blend(models, how, task=task) for how in BLENDS if (task, how) != ("numbers", "rank")}
    targets, weights = oof.targets[own], intervals.bootstrap_weights(oof.folds.group[own], args.draws)
    metric, folds = oof.prepared["metric"], f"{len(shared)} of {oof.prepared['folds']}"
    if len(shared) > 1:
        parts["greedy blend"] = held_out_blend(metric, targets, models, oof.folds.fold[own].to_numpy(), task)
    for key in dict.fromkeys([args.metric or metric, metric]):  # the metric of 00_prepare.py last
        name, better = METRICS[key].name, METRICS[key].larger_is_better
        scores = {
            p: intervals.scored(key, targets, judged(oof, key, found, own), weights) for p, found in parts.items()
        }
        (base, score), *others = scores.items()
        table = pd.Series({part: with_interval(*score) for part, score in scores.items()}).to_string()
        say(f"\n{name}, pooled, and its 95 % interval, on {len(targets)} images of {folds} folds\n{table}")
        verdicts += [f"{name}: {intervals.compare(base, part, *score, *other, better)}" for part, other in others]
    verdicts += weigh(args, oofs, targets, models, scores)
    parted = [verdict.rpartition("Δ = ") for verdict in verdicts]
    widest = max(len(said) for said, *_ in parted)
    say("\n".join(f"{said:<{widest if delta else 0}}{delta}{figures}" for said, delta, figures in parted))
    cells, few = cv_cells(*scores["mean blend"]), f", {folds} folds" * (len(shared) < oof.prepared["folds"])
    figures = "CV {cv:.4f} ({name}, pooled, mean blend{few}), 95 % {cv_low:.4f} to {cv_high:.4f}"
    conclude(figures.format(name=name, few=few, **cells))
    return verdicts, dict(settings="mean blend", folds=folds, metric=metric, **cells)


def weigh(args, oofs, targets, models, scores):
    """Writes weights fitted on all images, where such weights beat equal ones on images that they weren't fitted on.
    models: probabilities [N, K] of each experiment; scores: those of `compare`. → sentences."""
    path = args.output / f"blend_{'+'.join(sorted(args.exps))}.json"
    path.unlink(missing_ok=True)  # an earlier one would contradict what is said now
    if "greedy blend" not in scores:
        return ["greedy weights can't be judged on one fold: they need another one to be fitted on"]
    metric, greedy, mean = oofs[0].prepared["metric"], scores["greedy blend"], scores["mean blend"]
    sign = 1 if METRICS[metric].larger_is_better else -1
    gain, (low, high) = sign * (greedy[0] - mean[0]), intervals.interval(sign * (greedy[1] - mean[1]))
    if np.isnan(gain + low):
        return ["greedy weights can't be judged: the score is undefined in too many bootstrap samples"]
    said = f"{METRICS[metric].name}: greedy weights gain {gain:+.4f} ({low:+.4f} to {high:+.4f}) on equal ones"
    if low <= 0:
        return [f"{said}: {'within the noise' if high >= 0 else 'a loss'}: take equal weights"]
    weights = dict(zip(args.exps, climb(metric, targets, models).tolist(), strict=True))
    write_weights(path, oofs, weights, cv_cells(*greedy))
    folders = f"--input {quote(str(args.input))} --output {quote(str(args.output))}"
    shares = ", ".join(f"{exp} {weight:.2f}" for exp, weight in weights.items())
    command = f"python 03_infer.py {' '.join(map(quote, args.exps))} --weights {quote(str(path))} {folders}"
    return [f"{said}: {shares} → {path}", f"to submit that blend: {command}"]


def overlays():
    """→ kit/report/gradcam.py. It loads torch, without which this script starts in a second."""
    from kit.report import gradcam

    return gradcam


def main(args):
    oofs = [read_oof(args, exp) for exp in args.exps]
    shared, rows = shared_folds(oofs)
    prepared = oofs[0].prepared
    if args.metric and (reason := reason_against(args.metric, tasks.task_of(prepared), prepared["classes"])):
        raise UserError(f"--metric {args.metric}: {reason}")
    if args.overlays:
        overlays().library()  # its error before the scores
    for k, oof in enumerate(oofs):
        if k:
            say()
        score_one(args, oof)
    verdicts, leaderboard = [], dict(public=args.lb_public, private=args.lb_private)
    if len(oofs) > 1:
        verdicts, cells = compare(args, oofs, shared, rows)
        if {*leaderboard.values()} != {None}:
            note_in_ledger(args, "+".join(args.exps), cells | leaderboard)
        leaderboard = dict.fromkeys(leaderboard)
    for oof in oofs:
        ledger = note_in_ledger(args, oof.exp, ledger_cells(oof, leaderboard))
    for oof in oofs:
        oof.overlays = overlays().overlay_worst(args, oof) if args.overlays else {}
        page.write(args, oof, ledger, verdicts, oofs)


if __name__ == "__main__":
    common.run(main, make_parser())
