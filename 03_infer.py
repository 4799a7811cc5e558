"""Predict the test set with the models of all folds, and write the submission.

    python 03_infer.py base
    python 03_infer.py base convnext --weights 0.6 0.4     # a blend of two experiments
    python 03_infer.py base convnext --weights output/blend_base+convnext.json     # 02 writes it
    torchrun --nproc-per-node 2 03_infer.py base           # shares the test images between two GPUs

Reads OUTPUT/EXP/foldK.pt and OUTPUT/prepared. Keeps each fold's test logits in foldK_test.npy, so that nothing is
predicted twice. Writes OUTPUT/EXP/submission_EXP_CV0.9596.csv, or OUTPUT/submission_A+B_CV0.9596.csv, like the
competition's sample. Where INPUT/solution.csv exists (image_name, label, usage), its scores are printed and noted.
"""

import contextlib
import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import common
from common import RANK, Parser, UserError, conclude, duration, file_hash, listing, number, replacing, say

import numpy as np
import pandas as pd
import torch

from kit.experiment import note_in_ledger, read_oof
from kit.score import thresholds
from kit.score.blend import BLENDS, blend, read_weights, shared_folds
from kit.score.metrics import METRICS
from kit.submit.hidden_test import HiddenTest
from kit.submit.submission import per_id, read_tests, write_submission
from kit.train import distributed
from kit.train.checkpoint import load_fold
from kit.train.device import add_machine_flags, enough_memory, keep_memory, pick_amp_of, pick_device, pick_workers
from kit.train.inference import PREDICT_BATCH, TTAS, predict
from kit.train.linear_probe import head_logits, test_features


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
    add_machine_flags(add, "that of training")
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


@dataclass
class TestSet:
    """The prepared test images, and what the competition asks for."""

    names: list[str]  # of the N images
    submission_ids: np.ndarray  # int [N]: the sample's id for which an image counts
    layout: pd.DataFrame  # the sample's rows
    images: dict[int, np.ndarray]  # px → uint8 [N, px, px, 3], memory-mapped
    content_hash: str  # predictions of other images, or in another order, aren't read again
    solution: tuple | None  # (targets [N], {"public": bool [N], "private": bool [N]}) of INPUT/solution.csv


@dataclass
class Machine:
    """Where and how the models compute."""

    device: torch.device
    amp: str  # one of PRECISIONS
    compiled: bool
    workers: int | None  # processes that load images; None: as pick_workers does
    batch_size: int

    def predict(self, model, images, amp, bar=None):
        """Return a model's logits of images uint8 [N, S, S, 3], float32 [N, K]. amp: fp16, bf16 or none."""
        rows, workers = np.arange(len(images)), pick_workers(self.workers, self.device)
        return predict(model, images, rows, self.batch_size, self.device, amp, workers, bar)


def check_weights(weights, exps, hidden):
    """Raise UserError unless there are no weights, a number for each experiment, or one file, which hidden test sets
    can't have."""
    right = not weights or ([*map(type, weights)] == [float] * len(exps) and sum(weights) > 0)
    if not right and (hidden or not is_file(weights)):
        otherwise = "and no file beside --test-images" if hidden else "or one file of 02_oof.py"
        raise UserError(f"--weights needs a number for each of {listing(exps)}, not all of them 0, {otherwise}")


def pick_blend(how, weights, oofs, tta):
    """Return (a function: predictions [N, K] of each experiment → their blend; the honest score of fitted weights, or
    None)."""
    fitted_cv = None
    if is_file(weights):
        if any(kind_of(oof, tta) != "views" for oof in oofs):
            raise UserError(f"--tta {tta}: {weights[0]} was fitted on other views: leave --tta out, or give numbers")
        weights, fitted_cv = read_weights(Path(weights[0]), oofs, how)
    return functools.partial(blend, how=how, weights=weights, task=oofs[0].task), fitted_cv


def kind_of(oof, tta):
    """Return which out-of-fold logits are nearest to the submission's: those of the views, or of one view."""
    return "views" if tta in (None, oof.config["tta"]) else oof.config["keep"]


def cross_validate(oofs, tta, mix, fitted_cv=None):
    """Return (the blend's out-of-fold score over the images that all experiments share; thresholds float [K] for a
    metric of sets of labels, else None). Thresholds are fitted on the other folds; `fitted_cv`, the score of
    fitted weights, replaces the score."""
    parts, (_, shared), metric = [], shared_folds(oofs), oofs[0].prepared.metric
    for oof, rows in zip(oofs, shared, strict=True):
        kind = kind_of(oof, tta)
        if kind != "views" and tta != "none":
            say(f"the CV of {oof.exp} is of one view: its folds weren't validated with --tta {tta}")
        parts.append(oof.task.predictions(oof.logits(kind)[rows]))
    targets, mixed = oofs[0].targets[shared[0]], mix(parts)
    cut = thresholds.fit(metric, targets, mixed) if METRICS[metric].of_sets else None
    if cut is not None:
        mixed = thresholds.held_out(metric, targets, mixed, oofs[0].folds.fold.to_numpy()[shared[0]])
    return METRICS[metric].score(targets, mixed) if fitted_cv is None else fitted_cv, cut


def read_test_set(oofs, folder):
    """Return the TestSet. folder: INPUT, with or without a solution.csv."""
    prepared = oofs[0].prepared
    table, layout = read_tests(prepared.folder, f"{common.PREPARE} again, with the same flags")
    names = table.image_name.tolist()
    images = {size: prepared.open_images("test", size, len(names)) for size in {oof.config["size"] for oof in oofs}}
    content_hash = f"{file_hash(prepared.folder / 'test.csv')} {prepared.made_from['test_images']}"
    solution = read_solution(folder / "solution.csv", names, prepared.task)
    return TestSet(names, table.submission_id.to_numpy(), layout, images, content_hash, solution)


def read_solution(path, names, task):
    """Return (targets [N] in the order of `names`, {"public": bool [N], "private": bool [N]}), or None without a
    file."""
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


def fold_logits(oof, fold, test, tta, machine):
    """Return one fold model's logits of the test images, float32 [N, K]: those in foldK_test.npy where the same model
    has predicted the same images with the same views and precision, else new ones."""
    path, amp = oof.folder / f"fold{fold}_test.npy", pick_amp_of(oof.records[fold]["run"], machine.amp, machine.device)
    made_with = dict(model=file_hash(oof.folder / f"fold{fold}.csv"), test=test.content_hash, tta=tta, amp=amp)
    name = f"{oof.exp} fold {fold}, {'one view' if tta == 'none' else f'{tta} views'}"
    about = path.with_suffix(".json")
    if distributed.broadcast(about.exists() and common.read_json(about, "run this again") == made_with):
        with contextlib.suppress(OSError, ValueError, EOFError):  # lost or damaged: predicted again
            logits = np.load(path)
            say(f"{name}: {len(logits)} images, predicted earlier")
            return logits
    saved, classifier = load_fold(path.with_name(f"fold{fold}.pt"), machine.device, machine.compiled)
    if saved["config"] != oof.records[fold]["config"] or saved["classes"] != oof.task.names:
        raise UserError(f"{oof.folder}/fold{fold}.pt isn't the model of fold{fold}.json: train it with --overwrite")
    images, features = test.images[oof.config["size"]], test_features(oof, fold, tta, len(test.names))
    if features is not None:
        logits = head_logits(classifier.head, features)[1]
    else:
        logits = machine.predict(TTAS[tta](classifier), images, amp, name)
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        remedy = "train the fold again" if amp == "none" else "predict with --amp none, or train the fold again"
        raise UserError(f"{name}: the predictions of {bad.sum()} images are NaN or infinite: {remedy}")
    if RANK == 0:
        about.unlink(missing_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, logits)
        common.write_json(about, made_with)
    say(f"{name}: {len(images)} images predicted")
    return logits


def predict_test(oof, test, tta, machine):
    """Return predictions float64 [N, K]: the mean over the fold models (thesis 3.8), each after its mean over the
    views."""
    tta = tta or oof.config["tta"]
    parts = [oof.task.predictions(fold_logits(oof, fold, test, tta, machine)) for fold in oof.present]
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


def submit(path, oofs, test, predictions, name, cv, competition, fitted):
    """Write the submission; print its scores by solution.csv and how to submit it, and the CV. name: in the ledger;
    fitted: whether the blend's weights are."""
    prepared, count = oofs[0].prepared, len(test.layout)
    metric, form = METRICS[prepared.metric], prepared.submission
    by_id = per_id(predictions, test.submission_ids, prepared.per_id or "mean")
    write_submission(path, test.layout, by_id, prepared.task, prepared.metric, form)
    if test.solution:
        targets, parts = test.solution
        scores = {part: metric.score(targets[rows], predictions[rows]) for part, rows in parts.items()}
        note_in_ledger(prepared.folder.parent, name, dict(metric=prepared.metric, cv=cv) | scores)
        say(f"leaderboard by solution.csv: {metric.name}", ", ".join(f"{k} {score:.4f}" for k, score in scores.items()))
    if competition or not test.solution:
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
    machine = Machine(device, args.amp, args.compile, args.workers, args.batch_size)
    keep_memory()
    if hidden.is_given():
        path = args.name or args.output / f"submission_{name}.csv"
        return hidden.submit(path, args.output, args.exps, args.tta, args.blend, args.weights, machine)
    oofs = [read_oof(args.output, exp) for exp in args.exps]
    mix, fitted_cv = pick_blend(args.blend, args.weights, oofs, args.tta)
    cv, cut = cross_validate(oofs, args.tta, mix, fitted_cv)
    test = read_test_set(oofs, args.input)  # its mistakes must not wait for the predictions
    with distributed.process_group(device), enough_memory("lower --batch-size"):
        parts = [predict_test(oof, test, args.tta, machine) for oof in oofs]
    if RANK == 0:
        predictions = mix(parts) if cut is None else thresholds.apply(mix(parts), cut)
        folder = oofs[0].folder if len(oofs) == 1 else args.output
        path = args.name or folder / f"submission_{name}_CV{cv:.4f}.csv"
        submit(path, oofs, test, predictions, name, cv, args.competition, is_file(args.weights))


if __name__ == "__main__":
    common.run(main, make_parser())
