"""Predict the test set with the models of all folds, and write the submission.

    python 03_infer.py base
    python 03_infer.py base convnext --weights 0.6 0.4     # a blend of two experiments
    python 03_infer.py base convnext --weights output/blend_base+convnext.json     # 02 writes it
    torchrun --nproc-per-node 2 03_infer.py base           # shares the test images between two GPUs

Reads OUTPUT/EXP/foldK.pt and OUTPUT/prepared. Keeps each fold's test logits in foldK_test.npy, as 01 --predict does, so
that nothing is predicted twice. Writes OUTPUT/EXP/submission_EXP_CV0.9596.csv, or OUTPUT/submission_A+B_CV0.9596.csv,
like the competition's sample. Where INPUT/solution.csv exists (image_name, label, usage), its scores are printed and
noted.
"""

import functools
import re
import shlex
from pathlib import Path

import common
from common import RANK, Parser, UserError, conclude, duration, listing, number, say

import numpy as np

from kit.experiment import note_in_ledger, read_oof
from kit.score import thresholds
from kit.score.blend import BLENDS, blend, check_blend, read_weights, shared_folds
from kit.score.metrics import METRICS
from kit.submit.hidden_test import HiddenTest
from kit.submit.submission import fit_cuts, per_id, write_submission
from kit.submit.test_set import Machine, earlier_logits, new_logits, read_test_set
from kit.train import distributed
from kit.train.device import add_machine_flags, enough_memory, keep_memory, pick_device
from kit.train.inference import PREDICT_BATCH, TTAS


def make_parser():
    parser = Parser(__doc__)
    add = parser.group("what to predict and submit (thesis 3.8)")
    add("exps", nargs="*", default=["base"], metavar="EXP", help="the experiment, or several to blend")
    add("--blend", choices=BLENDS, default="mean", metavar="HOW", help="blend predictions by their %(choices)s")
    add("--weights", nargs="+", type=weight, metavar="W", help="blend weights, one per experiment, or blend_*.json "
        "(default: equal ones)")  # fmt: skip
    add("--tta", choices=TTAS, metavar="VIEWS", help="views averaged: %(choices)s (default: those of the experiment)")
    add("--name", type=Path, help="the submission, such as submission.csv (default: in OUTPUT, named by the CV)")
    add("--competition", metavar="ID", help="for the submit command: SIGNATE's task key or Kaggle's name")
    parser.shared(add)

    add = parser.group("test images that 00_prepare.py hasn't seen")
    add("--test-images", nargs="+", help="folders or archives; only the folds' files are needed")
    add("--sample-submit", type=Path, metavar="FILE", help="their sample submission")
    add("--test-csv", type=Path, metavar="FILE", help="their table, where the sample's ids aren't image names")
    add("--within", type=duration, metavar="8h", help="leave out views, then folds, to end in this time")

    add = parser.group("memory and machine")
    add("--batch-size", type=number(int, 1), default=PREDICT_BATCH, help="images a batch")
    add_machine_flags(add, "that of training", "off")
    return parser


def weight(text):
    """An argparse type: a number from 0 up, or the path of a file."""
    try:
        float(text)
    except ValueError:
        return text
    return number(float, 0)(text)


def is_file(weights):
    """Return whether --weights is one file."""
    return [*map(type, weights or [])] == [str]


def check_weights(weights, exps, hidden):
    """Raise UserError unless there are no weights, a number for each experiment, or one file, which hidden test sets
    can't have."""
    right = not weights or ([*map(type, weights)] == [float] * len(exps) and sum(weights) > 0)
    if not right and (hidden or not is_file(weights)):
        otherwise = "and no file beside --test-images" if hidden else "or one file of 02_oof.py"
        raise UserError(f"--weights needs a number for each of {listing(exps)}, not all of them 0, {otherwise}")


def pick_blend(how, weights, oofs, tta):
    """Return (a function: predictions [N, K] of each experiment → their blend; the honest score of fitted weights, or
    None). Raises UserError where the blend doesn't suit the metric, the submission or the weights."""
    fitted_cv, prepared = None, oofs[0].prepared
    check_blend(how, prepared.metric, prepared.task, prepared.submission)
    if is_file(weights):
        if any(kind_of(oof, tta) != "views" for oof in oofs):
            raise UserError(f"--tta {tta}: {weights[0]} was fitted on other views: leave --tta out, or give numbers")
        weights, fitted_cv = read_weights(Path(weights[0]), oofs, how)
    return functools.partial(blend, how=how, weights=weights, task=prepared.task), fitted_cv


def kind_of(oof, tta):
    """Return which out-of-fold logits are nearest to the submission's: those of the views, or of one view."""
    return "views" if tta in (None, oof.config["tta"]) else oof.config["keep"]


def cross_validate(oofs, tta, mix, fitted_cv=None):
    """Return (the blend's out-of-fold score on the images that all experiments share, at cuts of the other folds, or
    `fitted_cv`, the score of fitted weights; the submission's cuts, fitted on all folds, or None)."""
    parts, (_, shared), prepared = [], shared_folds(oofs), oofs[0].prepared
    for oof, rows in zip(oofs, shared, strict=True):
        kind = kind_of(oof, tta)
        if kind != "views" and tta != "none":
            say(f"the CV of {oof.exp} is of one view: its folds weren't validated with --tta {tta}")
        parts.append(oof.task.predictions(oof.logits(kind)[rows]))
    targets, mixed = oofs[0].targets[shared[0]], mix(parts)
    cuts = fit_cuts(targets, mixed, prepared.task, prepared.metric, prepared.submission)
    mixed = thresholds.held_out(prepared.metric, targets, mixed, oofs[0].folds.fold.to_numpy()[shared[0]])
    return METRICS[prepared.metric].score(targets, mixed) if fitted_cv is None else fitted_cv, cuts


def read_solution(path, names, task):
    """Return (targets [N] or [N, K] in the order of `names`, {"public": bool [N], "private": bool [N]}), or None
    without a file. Raises UserError for a file that doesn't suit the test images or the labels."""
    if not path.exists():
        return None
    table = common.read_table(path, "run it again")
    if not {"image_name", "label", "usage"} <= set(table.columns) or not set(names) <= set(table.image_name):
        raise UserError(f"{path} needs columns image_name, label, usage and a row per test image: fix or remove it")
    table = table.set_index("image_name").loc[names]
    try:
        targets = task.parse(table.label)
    except (KeyError, ValueError):
        raise UserError(f"{path} has labels that the training set hasn't: fix or remove it") from None
    return targets, {part: (table.usage.str.lower() == part).to_numpy() for part in ("public", "private")}


def predict_test(oof, test, tta, machine):
    """Return predictions float64 [N, K]: the mean over the fold models (thesis 3.8) of their mean over the views."""
    tta, parts = tta or oof.config["tta"], []
    for fold in oof.present:
        logits = earlier_logits(oof.folder, fold, test, tta, machine)
        if logits is None:
            logits = new_logits(oof.prepared, oof.folder, fold, test, tta, machine)
        parts.append(oof.task.predictions(logits))
    return np.mean(parts, axis=0)


def submission_name(exps, tta, how, weights):
    """Return the name of the submission and of its row in the ledger; it says what is unusual about a blend."""
    weights = ["weighted"] if is_file(weights) else weights or []
    unusual = [tta, how if how != "mean" else None, *weights]
    return "_".join(["+".join(exps), *(str(part) for part in unusual if part is not None)])


def submit_line(competition, path, note, header):
    """Return the platform's command: SIGNATE's for a task's key, or for a sample without a header."""
    if re.fullmatch("[0-9a-f]{32}", competition) if competition else header is None:
        return f'signate submit --task_key={competition or "KEY"} --path={shlex.quote(str(path))} --memo "{note}"'
    return f'kaggle competitions submit -c {competition or "NAME"} -f {shlex.quote(str(path))} -m "{note}"'


def submit(path, oofs, test, solution, predictions, name, cv, competition, fitted):
    """Write the submission; print its scores by solution.csv and how to submit it, and the CV. solution: as
    read_solution returns it; name: in the ledger; fitted: whether the blend's weights are."""
    prepared, count = oofs[0].prepared, len(test.layout)
    metric, form = METRICS[prepared.metric], prepared.submission
    by_id = per_id(predictions, test.submission_ids, prepared.per_id or "mean")
    write_submission(path, test.layout, by_id, prepared.task, prepared.metric, form)
    if solution:
        targets, parts = solution
        scores = {part: metric.score(targets[rows], predictions[rows]) for part, rows in parts.items()}
        note_in_ledger(prepared.folder.parent, name, dict(metric=prepared.metric, cv=cv) | scores)
        say(f"leaderboard by solution.csv: {metric.name}", ", ".join(f"{k} {score:.4f}" for k, score in scores.items()))
    if competition or not solution:
        say(submit_line(competition, path, f"{name} CV {cv:.4f}", form["header"]))
    for oof in oofs:
        if oof.missing:
            say(f"{oof.exp}: {oof.folds_text}")
    if prepared.limit:
        say(f"a quick look at {count} test images (--limit {prepared.limit}): not to be submitted")
    if prepared.per_id:
        say(f"the submission takes the {prepared.per_id} of an id's images; the CV is of single images")
    honest = ", of weights fitted on the other folds" if fitted else ""
    conclude(f"CV {cv:.4f} ({metric.name}{honest}), {count} rows, checked → {path}")


def main(args):
    hidden = HiddenTest(args.test_images, args.sample_submit, args.test_csv, args.within)
    check_weights(args.weights, args.exps, hidden.is_given())
    name = submission_name(args.exps, args.tta, args.blend, args.weights)
    device = pick_device(args.device, args.deterministic)
    machine = Machine(device, args.amp, args.compile == "on", args.workers, args.batch_size)
    keep_memory()
    if hidden.is_given():
        path = args.name or args.output / f"submission_{name}.csv"
        return hidden.submit(path, args.output, args.exps, args.tta, args.blend, args.weights, machine)
    oofs = [read_oof(args.output, exp) for exp in args.exps]
    mix, fitted_cv = pick_blend(args.blend, args.weights, oofs, args.tta)
    cv, cuts = cross_validate(oofs, args.tta, mix, fitted_cv)
    prepared, sizes = oofs[0].prepared, {oof.config["size"] for oof in oofs}
    test = read_test_set(prepared, sizes)  # here and below: mistakes that must not wait for the predictions
    solution = read_solution(args.input / "solution.csv", test.names, prepared.task)
    with distributed.process_group(device), enough_memory("lower --batch-size"):
        parts = [predict_test(oof, test, args.tta, machine) for oof in oofs]
    if RANK == 0:
        predictions = thresholds.apply(prepared.metric, mix(parts), cuts)
        folder = oofs[0].folder if len(oofs) == 1 else args.output
        path = args.name or folder / f"submission_{name}_CV{cv:.4f}.csv"
        submit(path, oofs, test, solution, predictions, name, cv, args.competition, is_file(args.weights))


if __name__ == "__main__":
    common.run(main, make_parser())
