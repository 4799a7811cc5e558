"""Predicts the test set with the models of all folds and writes the submission.

    python 03_infer.py base
    python 03_infer.py base convnext --batch-size 64       # the mean of two experiments
    python 03_infer.py demo --input input/demo --output output/demo
    torchrun --nproc-per-node 2 03_infer.py base            # shares the test images between two GPUs

Reads OUTPUT/EXP/foldK.pt and OUTPUT/prepared. Writes OUTPUT/EXP/submission_EXP_CV0.9596.csv (for several experiments
OUTPUT/submission_A+B_CV0.9596.csv) in the format and the order of the competition's sample_submit.csv. Where
INPUT/solution.csv exists (image_name, label, usage), the public and the private score are printed, and noted in
OUTPUT/experiments.csv.
"""

from common import RANK, Parser, UserError, experiment_folder, number, prepared_folder, replacing, run, say


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("exps", nargs="*", default=["base"], metavar="EXP", help="the experiment, or several to blend")
    add = parser.add_argument_group("prediction (thesis 3.8)").add_argument
    add("--tta", choices=("d4", "none"), default="d4", help="mean over the 8 orientations of the square, or one view")
    add("--batch-size", type=number(int, 1), default=32, help="images a batch (listing)")
    add("--workers", type=number(int, 0), help="image-loading processes; by itself up to 4 beside a GPU, else none")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--deterministic", action="store_true", help="on a GPU: the same bits each time, at some cost in speed")
    add("--competition-id", type=int, help="for the submit command (SIGNATE's food package contest is 1106)")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: a mistyped flag answers at once

import csv

import numpy as np

import distributed
import model as models
from data import auc, note_in_ledger, open_images, read_oof, read_table, softmax

# ---------------------------------------------------------------- prediction


def predict_test(folder, config, prepared, images, device):
    """Probabilities float64 [N, K]: the softmax of each fold model's logits (their mean over the views), then the mean
    over the models (thesis 3.8)."""
    workers = models.pick_workers(ARGS.workers, device)
    rows, probabilities = np.arange(len(images)), []
    for fold in range(prepared["folds"]):
        path = folder / f"fold{fold}.pt"
        saved, classifier = models.load_fold(path, device)
        if saved["folds_hash"] != prepared["folds_hash"] or saved["classes"] != prepared["classes"]:
            raise UserError(
                f"{path} was trained on other folds than the present ones: train it again, with --overwrite"
            )
        if saved["config"] != config:
            raise UserError(
                f"{path} was trained with other settings than config.json's: train it again, with --overwrite"
            )
        views = models.d4_views(classifier) if ARGS.tta == "d4" else classifier
        name = f"{folder.name} fold {fold}, {8 if ARGS.tta == 'd4' else 1} views"
        amp = models.pick_amp(config["amp"], device)
        logits = models.predict(views, images, rows, ARGS.batch_size, device, amp, workers, name)
        probabilities.append(softmax(logits))
        say(f"{name}: {len(images)} images predicted")
    return np.mean(probabilities, axis=0)


# ---------------------------------------------------------------- the submission


def submission_rows(names, probabilities, classes, submission):
    """The rows of the file, header included where the sample has one, in the format that 00_prepare.py found."""
    if submission["value"] == "label":
        values = [[classes[c]] for c in probabilities.argmax(axis=1)]
    elif submission["columns"]:
        order = [classes.index(label) for label in submission["columns"]]
        values = [[f"{p:.9g}" for p in row] for row in probabilities[:, order]]
    else:
        values = [[f"{p:.9g}"] for p in probabilities[:, 1]]
    rows = [[name, *value] for name, value in zip(names, values, strict=True)]
    return ([submission["header"]] if submission["header"] else []) + rows


def check_submission(path, names, classes, submission):
    """Reads the written file back and checks rows, names, order and values, before it gets its name.

    A failure here is a fault of the kit or of a model, so it is an AssertionError with its traceback, except for
    predictions that are no numbers.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if submission["header"]:
        assert rows.pop(0) == submission["header"], "the header differs from the sample's"
    assert [row[0] for row in rows] == names, "rows, names or their order differ from the sample's"
    cells = [cell for row in rows for cell in row[1:]]
    width = len(submission["columns"] or [0])
    assert len(cells) == width * len(names), "a row has another number of columns than the sample's"
    if submission["value"] == "label":
        assert set(cells) <= set(classes), "a predicted label is none of the training labels"
    else:
        values = np.array(cells, np.float64)
        assert np.isfinite(values).all(), "a probability is no number"
        assert 0 <= values.min() <= values.max() <= 1, "a probability isn't in [0, 1]"


# ---------------------------------------------------------------- scores of a competition that has ended


def read_solution(path, names, classes):
    """→ (targets [N] in the order of `names`, {"public": mask, "private": mask})."""
    table = read_table(path, "it was there a moment ago")
    if not {"image_name", "label", "usage"} <= set(table.columns) or not set(names) <= set(table.image_name):
        raise UserError(f"{path} needs columns image_name, label, usage and a row per test image: mend or remove it")
    table = table.set_index("image_name").loc[names]
    if not set(table.label) <= set(classes):
        raise UserError(f"{path} has labels that the training set hasn't: mend or remove it")
    targets = table.label.map({label: i for i, label in enumerate(classes)}).to_numpy()
    return targets, {part: (table.usage.str.lower() == part).to_numpy() for part in ("public", "private")}


# ---------------------------------------------------------------- main


def main():
    args = ARGS
    experiments = [(experiment_folder(args, exp), *read_oof(args, experiment_folder(args, exp))) for exp in args.exps]
    _, _, prepared, folds, _ = experiments[0]
    oof = np.mean([softmax(logits[config["keep"]]) for _, config, _, _, logits in experiments], axis=0)
    cv, name = auc(folds.target.to_numpy(), oof), "+".join(args.exps)
    classes, submission = prepared["classes"], prepared["submission"]
    names = read_table(prepared_folder(args) / "test.csv", "run python 00_prepare.py --overwrite").image_name.tolist()
    images = [open_images(args, prepared, "test", config["size"], len(names)) for _, config, *_ in experiments]
    solution = args.input / "solution.csv"
    truth = read_solution(solution, names, classes) if solution.exists() else None

    predictions, device = [], models.pick_device(args.device, args.deterministic)
    with distributed.together(device):
        for (folder, config, *_), cached in zip(experiments, images, strict=True):
            predictions.append(predict_test(folder, config, prepared, cached, device))
    if RANK > 0:
        return
    for (folder, *_), predicted in zip(experiments, predictions, strict=True):
        bad = ~np.isfinite(predicted).all(axis=1)
        if bad.any():
            raise UserError(
                f"{folder}: a model's predictions are no numbers for {int(bad.sum())} images: train it anew"
            )
    probabilities = np.mean(predictions, axis=0)
    folder = experiments[0][0] if len(experiments) == 1 else args.output
    path = folder / f"submission_{name}_CV{cv:.4f}.csv"
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(submission_rows(names, probabilities, classes, submission))
        check_submission(temporary, names, classes, submission)

    if truth:
        targets, parts = truth
        scores = {part: auc(targets[mask], probabilities[mask]) for part, mask in parts.items()}
        say(f"leaderboard by {solution}: AUC {', '.join(f'{part} {score:.4f}' for part, score in scores.items())}")
        note_in_ledger(args, name, scores)
    if args.competition_id or not truth:
        competition = args.competition_id or "ID"
        say(f'signate submit --competition-id={competition} {path} --note "{name} CV {cv:.4f}"')
    say(f"CV {cv:.4f}, {len(names)} rows, checked → {path}")


if __name__ == "__main__":
    run(main)
