"""Scores the folds' out-of-fold predictions, compares and blends experiments, and writes a report.

    python 02_oof.py base
    python 02_oof.py base nosampler                        # compares them, and blends them
    python 02_oof.py base --metric logloss                 # shows another metric beside that of 00_prepare.py
    python 02_oof.py base --overlays                       # where the network looked in its worst mistakes
    python 02_oof.py base --lb-public 0.888 --lb-private 0.905

Reads OUTPUT/EXP, as many folds as are finished. Prints the thesis' table 4.2 (for one experiment), and the score at the
best epoch, at the last one and of what is submitted, each with a 95 % interval from a bootstrap over groups. The last
line is the CV: the pooled score of what is submitted. Writes oof.csv, suspects.csv (labels that may be wrong),
report.html, three pictures, and a row of OUTPUT/experiments.csv. For several experiments it fits the weights of a
blend, and leaves OUTPUT/blend_A+B.json where they beat equal weights; the reports show the images on which they differ.
"""

from collections import Counter
from datetime import datetime
from shlex import quote

import common
from common import Parser, UserError, conclude, number, read_table, say, wrapped, write_csv

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from kit.experiment import MOST_COLUMNS, note_in_ledger, read_oof, train_again
from kit.report import page
from kit.score import intervals, thresholds
from kit.score.blend import BLENDS, blend, blend_misfit, fit_weights, held_out_blend, shared_folds, write_weights
from kit.score.metrics import METRICS, reason_against

FEW_GROUPS = 10  # of fewer, a bootstrap knows too little
MOST_EPOCHS = 5  # epochs in the table
BLOCK = 4096  # images whose classes are sorted at once
MOST_CLASSES, MOST_CONFUSIONS = 12, 10  # of more classes, the commonest confusions stand for the matrix
INTERVAL = "{cv:.4f} ({cv_low:.4f} to {cv_high:.4f})"
CV = "CV {cv:.4f} ({what}), 95 % {cv_low:.4f} to {cv_high:.4f}"


def make_parser():
    parser = Parser(__doc__, wrapped("Metrics: ", ", ".join(METRICS)))
    add = parser.group("what to score")
    add("exps", nargs="*", default=["base"], metavar="EXP", help="one experiment, or several to compare and blend")
    add("--metric", choices=METRICS, help="show another metric beside that of 00_prepare.py; all are listed below")
    add("--overlays", action="store_true", help="Grad-CAM of the worst mistakes, by the package grad-cam")
    add("--draws", type=number(int, 100), default=1000, help="bootstrap samples: more, smoother intervals")
    parser.shared(add)
    add = parser.group("what the leaderboard showed, for experiments.csv")
    for part in ("public", "private"):
        add(f"--lb-{part}", type=number(float), metavar="SCORE",
            help=f"the {part} score; for several experiments: of their mean blend")  # fmt: skip
    return parser


def cv_cells(score, values):
    """Return a score and its interval, from its values in the bootstrap samples, as the ledger has them."""
    return dict(zip(("cv", "cv_low", "cv_high"), (score, *intervals.interval(values)), strict=True))


# ---------------------------------------------------------------- one experiment


def read_epochs(oof):
    """Return foldK_epochs.csv of every finished fold, one below the other, with a column `fold`."""
    metric, tables = oof.prepared.metric, []
    for fold in oof.present:
        path, remedy = oof.folder / f"fold{fold}_epochs.csv", train_again(oof.folder, fold)
        table = read_table(path, remedy, dtype=None, keep_default_na=True)
        if f"valid_{metric}" not in table:
            raise UserError(f"{path} has no valid_{metric}, the metric of 00_prepare.py: {remedy}")
        tables.append(table.assign(fold=fold))
    return pd.concat(tables, ignore_index=True)


def epoch_table(epochs, metric):
    """Return the thesis' table 4.2, the metric by fold and epoch in training and validation, as text."""
    shown = epochs.epoch.isin(np.linspace(1, epochs.epoch.max(), MOST_EPOCHS).round())
    columns = [f"train_{metric}", f"valid_{metric}"]
    table = epochs[shown].pivot(index="fold", columns="epoch", values=columns).astype(float)
    table.loc["mean"] = table.mean()
    table.columns = pd.Index([f"{column[:5]} {epoch}" for column, epoch in table.columns], name="fold")
    return table.rename_axis(None).to_string(float_format="{:.4f}".format, na_rep="nan")


def by_class(oof):
    """Return the confusion matrix (thesis figure 4.1) or a row for each label or number, as text."""
    table = oof.task.table_of_each(oof.targets, oof.predictions)
    if table is not None:
        return table.to_string(float_format="{:.4f}".format)
    targets, count, folds = oof.targets, len(oof.task), oof.folds.fold.to_numpy()
    predicted = thresholds.read_classes(oof.prepared.metric, targets, oof.predictions, folds)
    if count <= MOST_CLASSES:
        names = [name[: common.WIDTH // (1 + count) - 2] for name in oof.task.names]
        table = pd.DataFrame(confusion_matrix(targets, predicted, labels=range(count)), index=names, columns=names)
        return f"images: a row for each label, a column for each prediction\n{table.to_string()}"
    pairs = sorted((a, b) for a, b in zip(targets, predicted, strict=True) if a != b)
    names = [name[: common.WIDTH // 3] for name in oof.task.names]
    rows = [f"{names[a]} → {names[b]}  {images}" for (a, b), images in Counter(pairs).most_common(MOST_CONFUSIONS)]
    return "\n".join(["the commonest confusions: label → prediction  images", *rows])


def write_predictions(oof):
    """Write oof.csv; for many classes, with the five most probable ones of each image."""
    task, p, table = oof.task, oof.predictions, oof.folds[["image_name", "label", "fold"]]
    if len(task) <= MOST_COLUMNS or not task.can_rank:
        values = pd.DataFrame(p, columns=[f"{task.value}_{name}" for name in task.names])
    else:
        blocks = np.array_split(p, len(p) // BLOCK + 1)
        top = np.concatenate([np.argsort(-block, axis=1, kind="stable")[:, :5] for block in blocks]).T
        values = {f"label_{k}": [task.names[c] for c in column] for k, column in enumerate(top, 1)}
        values |= {f"probability_{k}": p[range(len(p)), column] for k, column in enumerate(top, 1)}
    write_csv(oof.folder / "oof.csv", pd.concat([table, pd.DataFrame(values)], axis=1))


def score_predictions(oof, submitted, other_metric, draws):
    """Score the best epoch, the last one and what is submitted, so that the optimism of choosing is visible; the third
    by `other_metric` too. → ({row: (pooled, mean of the folds)}, each (score, bootstrap values); a table of them)."""
    metric, scores, table = oof.prepared.metric, {}, pd.DataFrame(columns=["pooled", "mean of the folds"])
    note = " (optimistic: chosen by this score)" if oof.config["keep"] == "best" else ""
    rows = {"best epoch": (metric, "best", note), "last epoch": (metric, "last", "")}
    rows.setdefault(submitted, (metric, "views", " (submitted)"))
    if other_metric not in (None, metric):
        rows[METRICS[other_metric].name] = (other_metric, "views", f" ({submitted})")
    weights, folds = intervals.bootstrap_weights(oof.folds.group, draws), oof.folds.fold.to_numpy()
    for row, (key, kind, note) in rows.items():
        predictions = oof.task.predictions(oof.logits(kind))
        data = key, oof.targets, thresholds.held_out(key, oof.targets, predictions, folds)
        scores[row] = intervals.scored(*data, weights), intervals.mean_of_folds(*data, folds, weights)
        table.loc[row + note] = [INTERVAL.format(**cv_cells(*score)) for score in scores[row]]
    return scores, table


def score_folds(oof, epochs, other_metric):
    """Return a row for each fold: images, kept epoch, scores of what is submitted, minutes."""
    rows, folds = {}, oof.folds.fold.to_numpy()
    metrics = filter(None, (oof.prepared.metric, *oof.task.extra_metrics, other_metric))
    predictions = {key: thresholds.held_out(key, oof.targets, oof.predictions, folds) for key in metrics}
    for fold, seconds in epochs.groupby("fold").seconds.sum().items():
        part = folds == fold
        scores = {METRICS[key].name: METRICS[key].score(oof.targets[part], p[part]) for key, p in predictions.items()}
        rows[fold] = {"images": part.sum(), "kept epoch": oof.records[fold]["epoch"], **scores}
        rows[fold]["minutes"] = f"{seconds / 60:.1f}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("fold")


def forecast_lines(oof, score, values):
    """Return sentences on the leaderboard, where 00_prepare.py compared folds with the test set; else none."""
    candidates, metric = oof.prepared.candidates, METRICS[oof.prepared.metric]
    if not candidates or np.isnan(score):
        return []
    if candidates[0]["score"] is None:
        again = "00_prepare.py --overwrite compares again, and the folds stay"
        return [f"no forecast: the metric changed since folds were compared with the test set; {again}"]
    perfect = metric.score(*oof.task.perfect(oof.targets))
    tests = len(read_table(oof.prepared.folder / "test.csv", f"{common.PREPARE} again, with the same flags"))
    forecast = intervals.leaderboard(score, values, perfect, candidates, len(oof.folds), tests)
    return intervals.leaderboard_lines(forecast, candidates)


def evaluate(oof, other_metric, draws):
    """Score one experiment and write its oof.csv. → Evaluation."""
    epochs = read_epochs(oof)
    write_predictions(oof)
    submitted = f"{oof.config['keep']} epoch" if oof.config["tta"] == "none" else f"{oof.config['tta']} views"
    scores, score_table = score_predictions(oof, submitted, other_metric, draws)
    pooled, (mean, _) = scores[submitted]
    cv = cv_cells(*pooled) | dict(mean_of_folds=mean, last_epoch=scores["last epoch"][0][0])
    basis = f"by a bootstrap over {oof.folds.group.nunique()} groups ({len(oof.folds)} images)"
    fold_table, forecast = score_folds(oof, epochs, other_metric), forecast_lines(oof, *pooled)
    return page.Evaluation(oof, epochs, submitted, score_table, fold_table, cv, basis, forecast)


def print_scores(evaluation, oofs):
    """Print the evaluation of one of `oofs`; the CV last, in bold where it is the only one."""
    oof, name, alone = evaluation.oof, METRICS[evaluation.oof.prepared.metric].name, len(oofs) == 1
    finished = f", {oof.folds_text}" if oof.folds_text else ""
    if oof is not oofs[0]:
        say()
    if alone:  # the reports of several have these
        epochs = epoch_table(evaluation.epochs, oof.prepared.metric)
        say(f"{oof.exp}: {name} by epoch{finished}\n{epochs}\n\n{by_class(oof)}\n")
    say(f"{oof.exp}: {name} and its 95 % interval, {evaluation.basis}\n{evaluation.score_table.to_string()}")
    cuts = thresholds.fit(oof.prepared.metric, oof.targets, oof.predictions)
    if line := thresholds.describe(oof.prepared.metric, cuts, oof.task.names):
        basis = "those of the other folds" if len(oof.present) > 1 else "its own: optimistic"
        say(f"{line}; each fold is scored by {basis}")
    say(f"→ {oof.folder / 'oof.csv'}, report.html and pictures")
    few = ["the images form few groups: the intervals say little"] * (oof.folds.group.nunique() < FEW_GROUPS)
    for line in few + evaluation.forecast:
        say(line)
    (conclude if alone else say)(CV.format(what=f"{name}, pooled, {evaluation.submitted}{finished}", **evaluation.cv))


# ---------------------------------------------------------------- several experiments


def blends_of(oofs, rows, folds):
    """Return {name: predictions [n, K]} of the experiments, each on its `rows`, and of their blends; folds int [n]."""
    oof, models = oofs[0], [oof.predictions[shared] for oof, shared in zip(oofs, rows, strict=True)]
    task, parts = oof.task, dict(zip((oof.exp for oof in oofs), models, strict=True))
    for how in BLENDS:
        parts[f"{how} blend"] = blend(models, how, None, task)
    if len(np.unique(folds)) > 1:
        parts["greedy blend"] = held_out_blend(oof.prepared.metric, oof.targets[rows[0]], models, folds, task)
    return parts


def compare(oofs, other_metric, draws, input_folder):
    """Print several experiments and their blends side by side, on the folds that all of them have. Write blend weights
    where they beat equal ones. → (one-sentence verdicts, the ledger's cells of the mean blend)."""
    shared, rows = shared_folds(oofs)
    oof, first, metric = oofs[0], rows[0], oofs[0].prepared.metric
    targets, folds = oof.targets[first], oof.folds.fold[first].to_numpy()
    weights = intervals.bootstrap_weights(oof.folds.group[first], draws)
    parts, verdicts, count = blends_of(oofs, rows, folds), [], f"{len(shared)} of {oof.prepared.folds}"
    for key in dict.fromkeys([other_metric or metric, metric]):  # the metric of 00_prepare.py last
        name, better = METRICS[key].name, METRICS[key].larger_is_better
        unfit = {f"{how} blend" for how in BLENDS if blend_misfit(how, key, oof.task, oof.prepared.submission)}
        read = {part: thresholds.held_out(key, targets, p, folds) for part, p in parts.items() if part not in unfit}
        scores = {part: intervals.scored(key, targets, predictions, weights) for part, predictions in read.items()}
        (base, score), *others = scores.items()
        table = pd.Series({part: INTERVAL.format(**cv_cells(*score)) for part, score in scores.items()}).to_string()
        say(f"\n{name}, pooled, and its 95 % interval, on {len(targets)} images of {count} folds\n{table}")
        verdicts += [f"{name}: {intervals.verdict(base, score, part, other, better)}" for part, other in others]
    models = [parts[oof.exp] for oof in oofs]
    verdicts += weigh(oofs, targets, models, scores, input_folder)
    say("\n".join(verdicts).replace(": Δ = ", "\n    Δ = "))  # within a screen
    cells, finished = cv_cells(*scores["mean blend"]), f", {count} folds" * (len(shared) < oof.prepared.folds)
    conclude(CV.format(what=f"{name}, pooled, mean blend{finished}", **cells))
    return verdicts, dict(settings="mean blend", folds=count, metric=metric, **cells)


def weigh(oofs, targets, models, scores, input_folder):
    """Write weights fitted on all images, where such weights beat equal ones on images that they weren't fitted on.
    models: predictions [N, K] of each experiment; scores: those of `compare`. → sentences."""
    exps, output, metric = [oof.exp for oof in oofs], oofs[0].folder.parent, oofs[0].prepared.metric
    path = output / f"blend_{'+'.join(sorted(exps))}.json"
    path.unlink(missing_ok=True)  # an earlier one would contradict what is printed now
    if "greedy blend" not in scores:
        return ["greedy weights can't be judged on one fold: they need another one to be fitted on"]
    greedy, mean = scores["greedy blend"], scores["mean blend"]
    sign = 1 if METRICS[metric].larger_is_better else -1
    gain, (low, high) = sign * (greedy[0] - mean[0]), intervals.interval(sign * (greedy[1] - mean[1]))
    if np.isnan(gain + low):
        return ["greedy weights can't be judged: the score is undefined in too many bootstrap samples"]
    gains = f"{METRICS[metric].name}: greedy weights gain {gain:+.4f} ({low:+.4f} to {high:+.4f}) over equal ones"
    if low <= 0:
        return [f"{gains}: {'within the noise' if high >= 0 else 'a loss'}: take equal weights"]
    weights = dict(zip(exps, fit_weights(metric, targets, models).tolist(), strict=True))
    write_weights(path, oofs, weights, cv_cells(*greedy))
    folders = f"--input {quote(str(input_folder))} --output {quote(str(output))}"
    shares = ", ".join(f"{exp} {weight:.2f}" for exp, weight in weights.items())
    command = f"python 03_infer.py {' '.join(map(quote, exps))} --weights {quote(str(path))} {folders}"
    return [f"{gains}: {shares} → {path}", f"to submit that blend: {command}"]


def ledger_cells(evaluation, leaderboard):
    """Return the row of experiments.csv. fold0_train_auc and fold0_valid_auc hold a figure per epoch: the thesis' table
    4.2 can be read from them; cv, public and private are its tables 4.3, 4.4 and 4.6."""
    oof, epochs = evaluation.oof, evaluation.epochs
    metric, count = oof.prepared.metric, oof.prepared.folds
    trained = max((oof.folder / f"fold{fold}.pt").stat().st_mtime for fold in oof.present)
    accuracy = METRICS["accuracy"].score(oof.targets, oof.predictions) if oof.task.right_or_wrong else ""
    cells = dict(
        date=f"{datetime.fromtimestamp(trained):%Y-%m-%d %H:%M}",
        settings=" ".join(f"{key}={value}" for key, value in oof.config["changed"].items()),
        folds=f"{len(oof.present)} of {count}", metric=metric, **evaluation.cv, accuracy=accuracy,
        minutes=f"{epochs.seconds.sum() / 60:.1f}", **leaderboard,
    )  # fmt: skip
    for fold in range(count):  # a fold that is missing empties its cells
        cells[f"fold{fold}"] = evaluation.fold_table[METRICS[metric].name].get(fold, "")
        for kind in (f"train_{metric}", f"valid_{metric}"):
            cells[f"fold{fold}_{kind}"] = " ".join(f"{value:.4f}" for value in epochs.loc[epochs.fold == fold, kind])
    return cells


def write_ledger(output, evaluations, blend_cells, leaderboard):
    """Write a row of OUTPUT/experiments.csv for each experiment, and return the table. The leaderboard's scores for
    several experiments are in a row of their mean blend, with `blend_cells`."""
    if blend_cells and {*leaderboard.values()} != {None}:
        note_in_ledger(output, "+".join(evaluation.oof.exp for evaluation in evaluations), blend_cells | leaderboard)
        leaderboard = dict.fromkeys(leaderboard)
    for evaluation in evaluations:
        ledger = note_in_ledger(output, evaluation.oof.exp, ledger_cells(evaluation, leaderboard))
    return ledger


def main(args):
    oofs = [read_oof(args.output, exp) for exp in args.exps]
    shared_folds(oofs)  # before the scores: it refuses experiments without one
    if args.metric and (reason := reason_against(args.metric, oofs[0].task.key, oofs[0].task.names)):
        raise UserError(f"--metric {args.metric}: {reason}")
    if args.overlays:
        from kit.report import gradcam  # loads torch, without which this script starts in a second
    evaluations = []
    for oof in oofs:
        evaluations.append(evaluate(oof, args.metric, args.draws))
        print_scores(evaluations[-1], oofs)
    verdicts, blend_cells = compare(oofs, args.metric, args.draws, args.input) if len(oofs) > 1 else ([], None)
    leaderboard = dict(public=args.lb_public, private=args.lb_private)
    ledger = write_ledger(args.output, evaluations, blend_cells, leaderboard)
    for evaluation in evaluations:
        evaluation.heatmaps = gradcam.overlay_worst(evaluation.oof) if args.overlays else {}
        page.write(evaluation, ledger, verdicts, evaluations)


if __name__ == "__main__":
    common.run(main, make_parser())
