"""What becomes of the CV when copies of one source lie on both sides of a fold, over several drawn competitions.

    python tests/bench/cv_honesty.py --folder /tmp/honesty       # 5 seeds, about 25 minutes on 2 cores
    python tests/bench/cv_honesty.py --folder /tmp/honesty       # stopped or finished: goes on, and prints again

For each seed: draws the demo, trains its five folds twice, on plain stratified folds (the thesis', `--groups none`) and
on folds that keep the groups together which 00_prepare.py finds (the default), and scores each submission against
the demo's solution. The test set shows other products than the training set. Prints both CVs with their intervals, the
test AUC of each, and over the seeds the mean and spread of CV minus test AUC.
"""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parent.parent.parent
RECIPE = (  # the Makefile's
    "--exp demo --model test_resnet --weights none --size 64 --epochs 11 --batch-size 32 --lr 5e-3 --min-lr 3e-4"
).split()
KINDS = dict(plain="--groups none", grouped="--groups auto")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the competitions and models go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        folder = args.folder.resolve() / f"seed{seed}"
        if not (folder / "input").exists():
            draw = [sys.executable, ROOT / "input" / "make_demo.py", "--folder", folder / "new", "--seed", str(seed)]
            subprocess.run(draw, check=True, stdout=subprocess.DEVNULL)
            os.replace(folder / "new", folder / "input")
        for kind, groups in KINDS.items():
            output = folder / kind
            subprocess.run(
                [
                    "bash",
                    ROOT / "run.sh",
                    "--input",
                    folder / "input",
                    "--output",
                    output,
                    "--seed",
                    str(seed),
                    *RECIPE,
                ],
                env=os.environ | dict(PREPARE=f"{groups} --seed {seed}", PYTHON=sys.executable),
                check=True,
                stdout=subprocess.DEVNULL,
            )
            rows.append(dict(seed=seed, folds=kind) | score(output, folder / "input" / "solution.csv"))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table["difference"] = table.cv - table.test
    table["in interval"] = (table.low <= table.test) & (table.test <= table.high)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    for kind, part in table.groupby("folds"):
        print(
            f"{kind}: CV {part.cv.mean():.3f}, test {part.test.mean():.3f}, CV - test {part.difference.mean():+.3f} "
            f"(standard deviation over {len(part)} seeds {part.difference.std():.3f}), "
            f"test within the CV's interval {part['in interval'].sum()} of {len(part)} times"
        )


def score(output, solution):
    """→ the CV with its 95 % interval, as the ledger has it, and the AUC of the submission on the whole test set."""
    with open(output / "experiments.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    (path,) = (output / "demo").glob("submission_*.csv")
    submitted = pd.read_csv(path, header=None, names=["image_name", "probability"])
    both = submitted.merge(pd.read_csv(solution), on="image_name", validate="one_to_one")
    found = {key: float(row[column]) for key, column in dict(cv="cv", low="cv_low", high="cv_high").items()}
    return found | dict(test=roc_auc_score(both.label, both.probability))


if __name__ == "__main__":
    main()
