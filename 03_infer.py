"""Predicts the test set with the models of all folds and writes the submission.

    python 03_infer.py base
    python 03_infer.py base convnext --weights 0.6 0.4     # a blend of two experiments
    python 03_infer.py base convnext --weights output/blend_base+convnext.json     # 02 writes it
    torchrun --nproc-per-node 2 03_infer.py base           # shares the test images between two GPUs

Reads OUTPUT/EXP/foldK.pt and OUTPUT/prepared. Keeps each fold's test logits in foldK_test.npy, so that nothing is
predicted twice. Writes OUTPUT/EXP/submission_EXP_CV0.9596.csv, or OUTPUT/submission_A+B_CV0.9596.csv, like the
competition's sample. Where INPUT/solution.csv exists (image_name, label, usage), its scores are printed and noted.
"""

import common  # first: it makes the other imports faster

# isort: split
import contextlib
import csv
import functools
import itertools
import re
import shlex
from pathlib import Path

import numpy as np

from common import (
    RANK,
    WORLD,
    Parser,
    UserError,
    conclude,
    duration,
    file_hash,
    number,
    prepared_folder,
    read_table,
    replacing,
    say,
)
from kit.data.prepared import open_images
from kit.experiment import note_in_ledger, of_folds, read_oof
from kit.folds import shift
from kit.score import tasks, thresholds
from kit.score.blend import BLENDS, blend, read_weights, shared_folds
from kit.score.metrics import METRICS
from kit.submit.hidden_test import submit_unseen
from kit.submit.submission import check_submission, per_unit, read_tests, submission_rows
from kit.train import distributed
from kit.train.checkpoint import load_fold
from kit.train.device import PRECISIONS, enough_memory, keep_memory, pick_amp_of, pick_device, pick_workers
from kit.train.inference import PREDICT_BATCH, TTAS, predict
from kit.train.linear_probe import head_logits, test_features


def make_parser():
    parser = Parser(__doc__)
    add = parser.group("what to predict and submit (thesis 3.8)")
    add("exps", nargs="*", default=["base"], metavar="EXP", help="the experiment, or several to blend")
    add("--blend", choices=BLENDS, default="mean", metavar="HOW", help="of several: %(choices)s of the "
        "probabilities")  # fmt: skip
    add("--weights", nargs="+", type=weight, metavar="W", help="of several: a weight for each, or the file that 02 "
        "wrote (default: equal ones)")  # fmt: skip
    add("--tta", choices=TTAS, metavar="VIEWS", help="views averaged: %(choices)s (default: those of the experiment)")
    add("--name", type=Path, help="the submission, such as submission.csv (default: in OUTPUT, named by the CV)")
    add("--competition", metavar="ID", help="for the submit command: SIGNATE's task key or Kaggle's name")
    parser.shared(add)

    add = parser.group("test images that 00_prepare.py hasn't seen")
    add("--test-images", nargs="+", help="folders or archives; the folds' files are enough then")
    add("--sample-submit", type=Path, metavar="FILE", help="their sample submission")
    add("--test-csv", type=Path, metavar="FILE", help="their table, where the sample's ids aren't image names")
    add("--within", type=duration, metavar="8h", help="leave out views, then folds, to end in this time")

    add = parser.group("memory and machine")
    add("--batch-size", type=number(int, 1), default=PREDICT_BATCH, help="images a batch")
    add("--amp", choices=PRECISIONS, default="auto", help="precision: %(choices)s; auto: that of training")
    add("--compile", action="store_true", help="torch.compile: about a minute at the start, then faster on a GPU")
    add("--workers", type=number(int, 0), help="processes that load images (default: up to 4 beside a GPU, else 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--deterministic", action="store_true", help="on a GPU: the same bits each time, at some cost in speed")
    return parser


def weight(text):
    """An argparse type: a number from 0 up, or the path of a file."""
    try:
        float(text)
    except ValueError:
        return text
    return number(float, 0)(text)


def from_file(args):
    """→ whether --weights is one file."""
    return [*map(type, args.weights or [])] == [str]


def pick_weights(args, oofs):
    """→ (a weight for each experiment, None for equal ones; the honest score of fitted ones, None for others)."""
    weights, exps = args.weights, ", ".join(args.exps)
    if not from_file(args):
        if weights and not ([*map(type, weights)] == [float] * len(oofs) and sum(weights) > 0):
            raise UserError(f"--weights needs a number for each of {exps}, not all of them 0, or one file of 02_oof.py")
        return weights, None
    if any(kind_of(args, oof) != "views" for oof in oofs):
        raise UserError(f"--tta {args.tta}: {weights[0]} was fitted on other views: leave --tta out, or give numbers")
    return read_weights(Path(weights[0]), oofs, args.blend)


def fold_logits(args, oof, fold, images, test_hash, device):
    """→ logits float32 [N, K] of the test images by one fold's model: those kept in foldK_test.npy, if the same model
    has predicted the same images with the same views and precision, else new ones."""
    path, amp = oof.folder / f"fold{fold}_test.npy", pick_amp_of(oof.records[fold].get("run", {}), args.amp, device)
    tta = args.tta or oof.config["tta"]
    record = dict(model=file_hash(oof.folder / f"fold{fold}.csv"), test=test_hash, tta=tta, amp=amp)
    name = f"{oof.exp} fold {fold}, {record['tta']} views"
    about = path.with_suffix(".json")
    if distributed.from_first(about.exists() and common.read_json(about, "run this again") == record)[0]:
        with contextlib.suppress(OSError, ValueError, EOFError):  # lost or damaged: predicted anew
            kept = np.load(path)
            say(f"{name}: {len(images)} images, predicted earlier")
            return kept
    saved, classifier = load_fold(path.with_name(f"fold{fold}.pt"), device, args.compile)
    if saved["config"] != oof.records[fold]["config"] or saved["classes"] != oof.prepared["classes"]:
        raise UserError(f"{oof.folder}/fold{fold}.pt isn't the model of fold{fold}.json: train it with --overwrite")
    if (vectors := test_features(args, oof, fold, record["tta"], len(images))) is not None:
        logits = head_logits(classifier.head, vectors)[1]
    else:
        logits = predict(
            TTAS[record["tta"]](classifier), images, np.arange(len(images)), args.batch_size, device,
            amp, pick_workers(args.workers, device), name,
        )  # fmt: skip
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        remedy = "train the fold anew" if amp == "none" else "predict with --amp none, or train the fold anew"
        raise UserError(f"{name}: the predictions of {bad.sum()} images are no numbers: {remedy}")
    if RANK == 0:
        about.unlink(missing_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, logits)
        common.write_json(about, record)
    say(f"{name}: {len(images)} images predicted")
    return logits


def predict_test(args, oof, images, test_hash, device):
    """Predictions float64 [N, K]: the softmax of each fold model's logits (their mean over the views), or what the task
    makes of them, then the mean over the models (thesis 3.8). → (these, sentences on how sure the models are)."""
    logits = (fold_logits(args, oof, fold, images, test_hash, device) for fold in oof.present)
    parts, lines = [tasks.predictions(oof.prepared, part) for part in logits], []
    if tasks.task_of(oof.prepared) == "classes":
        found = tasks.predictions(oof.prepared, oof.logits[kind_of(args, oof)])
        lines = shift.confidence_lines(found, oof.targets, oof.folds.fold.to_numpy(), parts)
    return np.mean(parts, axis=0), [f"{oof.exp}: {line}" for line in lines]


def kind_of(args, oof):
    """→ which out-of-fold logits are nearest to what is submitted: those of the views, or of one."""
    return "views" if args.tta in (None, oof.config["tta"]) else oof.config["keep"]


def cross_validate(args, oofs, mix):
    """→ (the blend's score out of fold, over the rows that all experiments have, with the views of the submission;
    where the metric reads sets of labels, thresholds float [K], for the score fitted on the other folds)."""
    parts, (_, rows), prepared = [], shared_folds(oofs), oofs[0].prepared
    for oof, own in zip(oofs, rows, strict=True):
        kind = kind_of(args, oof)
        if kind != "views" and args.tta != "none":
            say(f"the CV of {oof.exp} is of one view: its folds weren't validated with --tta {args.tta}")
        parts.append(tasks.predictions(prepared, oof.logits[kind][own]))
    targets, metric, mixed = oofs[0].targets[rows[0]], prepared["metric"], mix(parts)
    if not METRICS[metric].of_sets:
        return METRICS[metric].score(targets, mixed), None
    honest = thresholds.held_out(metric, targets, mixed, oofs[0].folds.fold.to_numpy()[rows[0]])
    return METRICS[metric].score(targets, honest), thresholds.fit(metric, targets, mixed)


def read_solution(args, names, prepared):
    """→ (targets [N] in the order of `names`, {"public": mask, "private": mask}) of INPUT/solution.csv, or None."""
    path = args.input / "solution.csv"
    if not path.exists():
        return None
    table = read_table(path, "it was there a moment ago")
    if not {"image_name", "label", "usage"} <= set(table.columns) or not set(names) <= set(table.image_name):
        raise UserError(f"{path} needs columns image_name, label, usage and a row per test image: mend or remove it")
    table = table.set_index("image_name").loc[names]
    try:
        targets = tasks.parse(prepared, table.label)
    except (KeyError, ValueError):
        raise UserError(f"{path} has labels that the training set hasn't: mend or remove it") from None
    return targets, {part: (table.usage.str.lower() == part).to_numpy() for part in ("public", "private")}


def write_submission(path, layout, predictions, prepared):
    """Writes the submission and reads it back, before it gets its name."""
    rows = submission_rows(layout, predictions, prepared)
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            separator = prepared["submission"].get("separator", ",")
            csv.writer(file, lineterminator="\n", delimiter=separator).writerows(rows)
        check_submission(temporary, layout, prepared)


def name_of(args):
    """→ the name of the submission and of its row in the ledger; what is unusual about a blend is part of it."""
    weights = ["weighted"] if from_file(args) else args.weights or []
    unusual = [args.tta, args.blend if args.blend != "mean" else None, *weights]
    return "_".join(["+".join(args.exps), *(str(part) for part in unusual if part is not None)])


def report(args, oofs, cv, path, probabilities, solution, count):
    """Prints the score by the solution, or how to submit the file; then the CV. count: rows of the submission."""
    prepared, name = oofs[0].prepared, name_of(args)
    metric = METRICS[prepared["metric"]]
    if solution:
        targets, parts = solution
        scores = {part: metric.score(targets[rows], probabilities[rows]) for part, rows in parts.items()}
        note_in_ledger(args, name, dict(metric=prepared["metric"], cv=cv) | scores)
        say(f"leaderboard by solution.csv: {metric.name}", ", ".join(f"{k} {score:.4f}" for k, score in scores.items()))
    if args.competition or not solution:
        say(submit_line(args.competition, path, f"{name} CV {cv:.4f}", prepared["submission"]["header"]))
    for oof in oofs:
        if oof.missing:
            say(f"{oof.exp}: {of_folds(oof)}")
    if prepared["limit"]:
        say(f"a quick look at {count} test images (--limit {prepared['limit']}): not to be submitted")
    if "per_id" in prepared:
        say(f"the submission takes the {prepared['per_id']} of an id's images; the CV is of single images")
    honest = ", of weights fitted on the other folds" if from_file(args) else ""
    conclude(f"CV {cv:.4f} ({metric.name}{honest}), {count} rows, checked → {path}")


def submit_line(competition, path, note, header):
    """→ the platform's command: SIGNATE's where the competition is a task's key, or where the sample has no header."""
    if re.fullmatch("[0-9a-f]{32}", competition) if competition else header is None:
        return f'signate submit --task_key={competition or "KEY"} --path={shlex.quote(str(path))} --memo "{note}"'
    return f'kaggle competitions submit -c {competition or "NAME"} -f {shlex.quote(str(path))} -m "{note}"'


def predict_unseen(args):
    """Predicts --test-images from the folds' files alone, and writes the submission."""
    if not args.sample_submit:
        raise UserError("--test-images needs the --sample-submit that lists them")
    if WORLD > 1:
        raise UserError("--test-images runs in one process: leave torchrun out")
    device = pick_device(args.device, args.deterministic)
    keep_memory()
    with enough_memory("lower --batch-size"):
        predictions, layout, prepared = submit_unseen(args, device, pick_workers(args.workers, device))
    path = args.name or args.output / f"submission_{name_of(args)}.csv"
    write_submission(path, layout, predictions, prepared)
    conclude(f"{len(layout)} rows, checked → {path}")


def main(args):
    if args.test_images:
        return predict_unseen(args)
    given = [flag for flag in ("sample_submit", "test_csv", "within") if getattr(args, flag)]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} belongs to --test-images: give that too")
    oofs = [read_oof(args, exp) for exp in args.exps]
    weights, cv = pick_weights(args, oofs)
    prepared, tests = oofs[0].prepared, prepared_folder(args) / "test.csv"
    mix = functools.partial(blend, how=args.blend, weights=weights, task=tasks.task_of(prepared))
    pooled, cut = cross_validate(args, oofs, mix)
    cv = pooled if cv is None else cv
    table, layout = read_tests(prepared_folder(args), f"{common.PREPARE} --overwrite")
    names = table.image_name.tolist()
    images = [open_images(args, prepared, "test", oof.config["size"], len(names)) for oof in oofs]
    solution = read_solution(args, names, prepared)  # its mistakes must not wait for the predictions
    test_hash = f"{file_hash(tests)} {prepared['made_from']['test_images']}"
    device = pick_device(args.device, args.deterministic)
    keep_memory()
    with distributed.together(device), enough_memory("lower --batch-size"):
        pairs = [predict_test(args, *pair, test_hash, device) for pair in zip(oofs, images, strict=True)]
    if RANK == 0:
        folder = oofs[0].folder if len(oofs) == 1 else args.output
        predicted, lines = zip(*pairs, strict=True)
        path, found = args.name or folder / f"submission_{name_of(args)}_CV{cv:.4f}.csv", mix(predicted)
        found = found if cut is None else thresholds.apply(found, cut)
        wanted = per_unit(found, table.unit, prepared.get("per_id", "mean"))
        write_submission(path, layout, wanted, prepared)
        say("\n".join(itertools.chain(*lines)))
        report(args, oofs, cv, path, found, solution, len(layout))


if __name__ == "__main__":
    common.run(main, make_parser())
