"""Predicts the test set with the models of all folds and writes the submission.

    python 03_infer.py base
    python 03_infer.py base convnext --weights 0.6 0.4     # a blend of two experiments
    python 03_infer.py base convnext --weights output/blend_base+convnext.json     # 02 writes it
    torchrun --nproc-per-node 2 03_infer.py base           # shares the test images between two GPUs

Reads OUTPUT/EXP/foldK.pt and OUTPUT/prepared. Keeps each fold's test logits in foldK_test.npy, so that nothing is
predicted twice. Writes OUTPUT/EXP/submission_EXP_CV0.9596.csv, or OUTPUT/submission_A+B_CV0.9596.csv, like the
competition's sample. Where INPUT/solution.csv exists (image_name, label, usage), its scores are printed and noted.
"""

import contextlib
import csv
import functools
import itertools
from pathlib import Path

import numpy as np

import common
from common import RANK, Parser, UserError, file_hash, number, prepared_folder, read_table, replacing, say, softmax
from kit import distributed, forecast
from kit.blend import BLENDS, blend, read_weights
from kit.device import PRECISIONS, enough_memory, pick_amp, pick_device, pick_workers
from kit.experiment import cached_size, note_in_ledger, of_folds, read_oof, shared_folds
from kit.metrics import METRICS
from kit.model import PREDICT_BATCH, TTAS, load_fold, predict
from kit.probe import head_logits, test_features
from kit.tables import check_submission, submission_rows


def make_parser():
    parser = Parser(__doc__)
    parser.add_argument("exps", nargs="*", default=["base"], metavar="EXP", help="the experiment, or several to blend")
    add = parser.add_argument_group("prediction (thesis 3.8)").add_argument
    add("--tta", choices=TTAS, help="views that are averaged (default: those of the experiment)")
    add("--blend", choices=BLENDS, default="mean", help="of several experiments: the mean of probabilities or of ranks")
    add("--weights", nargs="+", type=weight, metavar="W", help="of several: a weight for each, or a file written by 02")
    add("--batch-size", type=number(int, 1), default=PREDICT_BATCH, help="images a batch (listing)")
    add("--workers", type=number(int, 0), help="image-loading processes (default: up to 4 beside a GPU, else none)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--amp", choices=PRECISIONS, default="auto", help="mixed precision; auto: fp16 on a GPU, none on the CPU")
    add("--deterministic", action="store_true", help="on a GPU: the same bits each time, at some cost in speed")
    add("--competition-id", type=int, help="for the submit command (SIGNATE's food package contest is 1106)")
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
    has predicted the same images with the same views, else new ones."""
    path = oof.folder / f"fold{fold}_test.npy"
    record = dict(model=file_hash(oof.folder / f"fold{fold}.csv"), test=test_hash, tta=args.tta or oof.config["tta"])
    name = f"{oof.exp} fold {fold}, {record['tta']} views"
    about = path.with_suffix(".json")
    if distributed.from_first(about.exists() and common.read_json(about, "run this again") == record)[0]:
        with contextlib.suppress(OSError, ValueError, EOFError):  # lost or damaged: predicted anew
            kept = np.load(path)
            say(f"{name}: {len(images)} images, predicted earlier")
            return kept
    saved, classifier = load_fold(path.with_name(f"fold{fold}.pt"), device)
    if saved["config"] != oof.records[fold]["config"] or saved["classes"] != oof.prepared["classes"]:
        raise UserError(f"{oof.folder}/fold{fold}.pt isn't the model of fold{fold}.json: train it with --overwrite")
    if (vectors := test_features(args, oof, fold, record["tta"], len(images))) is not None:
        logits = head_logits(classifier.head, vectors)[1]
    else:
        logits = predict(
            TTAS[record["tta"]](classifier), images, np.arange(len(images)), args.batch_size, device,
            pick_amp(args.amp, device), pick_workers(args.workers, device), name,
        )  # fmt: skip
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        raise UserError(f"{name}: the predictions of {bad.sum()} images are no numbers: train the fold anew")
    if RANK == 0:
        about.unlink(missing_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, logits)
        common.write_json(about, record)
    say(f"{name}: {len(images)} images predicted")
    return logits


def predict_test(args, oof, images, test_hash, device):
    """Probabilities float64 [N, K]: the softmax of each fold model's logits (their mean over the views), then the mean
    over the models (thesis 3.8). → (these, sentences on how sure the models are)."""
    parts = [softmax(fold_logits(args, oof, fold, images, test_hash, device)) for fold in oof.present]
    out_of_fold = softmax(oof.logits[kind_of(args, oof)]), oof.folds.target.to_numpy(), oof.folds.fold.to_numpy()
    return np.mean(parts, axis=0), [f"{oof.exp}: {line}" for line in forecast.confidence_lines(*out_of_fold, parts)]


def kind_of(args, oof):
    """→ which out-of-fold logits are nearest to what is submitted: those of the views, or of one."""
    return "views" if args.tta in (None, oof.config["tta"]) else oof.config["keep"]


def cross_validate(args, oofs, mix):
    """→ the blend's score out of fold, over the rows that all experiments have, with the views of the submission."""
    parts, (_, rows) = [], shared_folds(oofs)
    for oof, own in zip(oofs, rows, strict=True):
        kind = kind_of(args, oof)
        if kind != "views" and args.tta != "none":
            say(f"the CV of {oof.exp} is of one view: its folds weren't validated with --tta {args.tta}")
        parts.append(softmax(oof.logits[kind][own]))
    targets = oofs[0].folds.target.to_numpy()[rows[0]]
    return METRICS[oofs[0].prepared["metric"]].score(targets, mix(parts))


def read_solution(args, names, classes):
    """→ (targets [N] in the order of `names`, {"public": mask, "private": mask}) of INPUT/solution.csv, or None."""
    path = args.input / "solution.csv"
    if not path.exists():
        return None
    table = read_table(path, "it was there a moment ago")
    if not {"image_name", "label", "usage"} <= set(table.columns) or not set(names) <= set(table.image_name):
        raise UserError(f"{path} needs columns image_name, label, usage and a row per test image: mend or remove it")
    table = table.set_index("image_name").loc[names]
    if not set(table.label) <= set(classes):
        raise UserError(f"{path} has labels that the training set hasn't: mend or remove it")
    targets = table.label.map({label: i for i, label in enumerate(classes)}).to_numpy()
    return targets, {part: (table.usage.str.lower() == part).to_numpy() for part in ("public", "private")}


def write_submission(path, names, probabilities, prepared):
    """Writes the submission and reads it back, before it gets its name."""
    rows = submission_rows(names, probabilities, prepared["classes"], prepared["submission"])
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        check_submission(temporary, names, prepared["classes"], prepared["submission"])


def name_of(args):
    """→ the name of the submission and of its row in the ledger; what is unusual about a blend is part of it."""
    weights = ["weighted"] if from_file(args) else args.weights or []
    unusual = [args.tta, args.blend if args.blend != "mean" else None, *weights]
    return "_".join(["+".join(args.exps), *(str(part) for part in unusual if part is not None)])


def report(args, oofs, cv, path, probabilities, solution):
    """Prints the score by the solution, or how to submit the file; then the CV."""
    prepared, name, count = oofs[0].prepared, name_of(args), len(probabilities)
    metric = METRICS[prepared["metric"]]
    if solution:
        targets, parts = solution
        scores = {part: metric.score(targets[rows], probabilities[rows]) for part, rows in parts.items()}
        note_in_ledger(args, name, dict(metric=prepared["metric"], cv=cv) | scores)
        say(f"leaderboard by solution.csv: {metric.name}", ", ".join(f"{k} {score:.4f}" for k, score in scores.items()))
    if args.competition_id or not solution:
        competition = args.competition_id or "ID"
        say(f'signate submit --competition-id={competition} {path} --note "{name} CV {cv:.4f}"')
    for oof in oofs:
        if oof.missing:
            say(f"{oof.exp}: {of_folds(oof)}")
    if prepared["limit"]:
        say(f"a quick look at {count} test images (--limit {prepared['limit']}): not to be submitted")
    honest = ", of weights fitted on the other folds" if from_file(args) else ""
    say(f"CV {cv:.4f} ({metric.name}{honest}), {count} rows, checked → {path}")


def main(args):
    oofs = [read_oof(args, exp) for exp in args.exps]
    weights, cv = pick_weights(args, oofs)
    prepared, mix = oofs[0].prepared, functools.partial(blend, how=args.blend, weights=weights)
    cv, tests = cross_validate(args, oofs, mix) if cv is None else cv, prepared_folder(args) / "test.csv"
    names = read_table(tests, f"{common.PREPARE} --overwrite").image_name.tolist()
    images = [common.open_images(args, prepared, "test", cached_size(oof.config), len(names)) for oof in oofs]
    solution = read_solution(args, names, prepared["classes"])  # its mistakes must not wait for the predictions
    test_hash = f"{file_hash(tests)} {prepared['made_from']['test_images']}"
    device = pick_device(args.device, args.deterministic)
    with distributed.together(device), enough_memory("lower --batch-size"):
        pairs = [predict_test(args, *pair, test_hash, device) for pair in zip(oofs, images, strict=True)]
    if RANK == 0:
        folder = oofs[0].folder if len(oofs) == 1 else args.output
        predicted, lines = zip(*pairs, strict=True)
        path, probabilities = folder / f"submission_{name_of(args)}_CV{cv:.4f}.csv", mix(predicted)
        write_submission(path, names, probabilities, prepared)
        say("\n".join(itertools.chain(*lines)))
        report(args, oofs, cv, path, probabilities, solution)


if __name__ == "__main__":
    common.run(main, make_parser())
