"""Test scores of the recipes on competitions made of real photos, and an ablation of `half`.

    python tests/bench/recipes.py --photos DIR --weights FILE --folder /tmp/recipes        # resumes where it stopped
    python tests/bench/recipes.py --photos DIR --weights FILE --folder /tmp/recipes --set ablations

DIR and FILE are those of cv_gap.py. The competitions are `drink` with the product seeds 0 to 3, in matched folds, and
`cloth`, with at most 500 training and 300 test images each, so that the bench ends within hours on 2 cores. Each recipe
trains fold 0 with three seeds and predicts the test set. A paired difference is taken to the thesis' recipe on the same
competition with the same seed; the 95 % interval of their mean is a bootstrap over competitions, and over seeds within
each. Seconds are CPU seconds of 01 and 03 together, without Python's start.

--set ablations changes one flag of `half` at a time. Results in --folder are used again: after a change of the kit,
name another folder.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process for each core is faster than two threads
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from common import softmax

import numpy as np
import pandas as pd
from cv_gap import NETWORK, ROOT, make_competition, photos, run, split

from kit.score.metrics import METRICS

COMPETITIONS = [("drink", seed) for seed in range(4)] + [("cloth", 0)]
SEEDS = 777, 778, 779
TRAIN, TEST, SIZE, LARGER = 500, 300, 160, 224
SMALL = f"--model {NETWORK} --size {SIZE}"  # in place of what the recipes are written for
CPU = "@recipes/cpu.args"  # half.args for this network
RECIPES = {
    "thesis": f"@recipes/thesis.args {SMALL} --lr 1e-3 --min-lr 3e-4",
    "probe": f"@recipes/probe.args {SMALL}",
    "probe at 224 px": f"@recipes/probe.args --model {NETWORK} --size {LARGER}",
    "gentle": f"@recipes/gentle.args {SMALL} --lr 1e-3 --layer-decay 0.9",
    "half": CPU,
}
BLENDED = ("probe", "half"), ("gentle", "half"), ("probe", "gentle", "half")
ABLATIONS = {
    "half": CPU,
    "--init weights": f"{CPU} --init weights",
    "--freeze 0": f"{CPU} --freeze 0",
    "--ema 0": f"{CPU} --ema 0",
    "--clip-grad off": f"{CPU} --clip-grad 1e9",
    "--warmup 0": f"{CPU} --warmup 0",
    "--schedule ranger21": f"{CPU} --schedule ranger21",
    "--optimizer ranger21": f"{CPU} --optimizer ranger21",
    "--augment none": f"{CPU} --augment none",
    "--augment light": f"{CPU} --augment light",
}


def prepare(args, kind, seed):
    """Write a competition and prepare it at two sizes, once. → its folder."""
    folder = args.folder / f"{kind}_{seed}"
    if not (folder / "output").exists():
        table = split(photos(args.photos, kind), kind, seed, 0)
        make_competition(folder / "input", pd.concat([table[~table.test].head(TRAIN), table[table.test].head(TEST)]))
        run("00_prepare.py", folder / "input", folder / "new", "--size", SIZE)
        run("00_prepare.py", folder / "input", folder / "new", "--size", LARGER)
        (folder / "new").rename(folder / "output")
    return folder


def script(name, *words):
    """Run a script of the kit in this process.

    Raises RuntimeError with the script's output if it fails."""
    out, sys.argv = io.StringIO(), [str(ROOT / name), *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)}\n{out.getvalue()}") from None


def score(folder, probabilities):
    """Return the score of the test set's probabilities [M, K]."""
    prepared = folder / "output" / "prepared"
    about = json.loads((prepared / "prepared.json").read_text())
    names = pd.read_csv(prepared / "test.csv", dtype=str).image_name
    solution = pd.read_csv(folder / "input" / "solution.csv", dtype=str, index_col="image_name")
    targets = solution.label[names].map(about["classes"].index).to_numpy()
    return METRICS[about["metric"]].score(targets, probabilities)


def predicted(folder, name, seed):
    """Return the test set's probabilities by a trained recipe [M, K]."""
    return softmax(np.load(folder / "output" / f"{name.strip('-')}_{seed}" / "fold0_test.npy"))


def train(folder, name, flags, seed, weights):
    """Train fold 0 and predict the test set, once. → dict(recipe, competition, seed, score, CPU seconds)."""
    path = folder / f"{name}_{seed}.json"
    if not path.exists():
        os.chdir(ROOT)  # recipes name each other by paths from there
        at, exp = ("--input", folder / "input", "--output", folder / "output"), f"{name.strip('-')}_{seed}"
        began, flags = time.process_time(), [*flags.split(), "--weights", weights, "--seed", seed]
        script("01_train_fold.py", *at, *flags, "--exp", exp, "--fold", 0)
        script("03_infer.py", *at, exp)
        row = dict(recipe=name, competition=folder.name, seed=seed, seconds=time.process_time() - began)
        path.write_text(json.dumps(row | dict(score=score(folder, predicted(folder, name, seed)))))
    return json.loads(path.read_text())


def blends(folders, names, seeds):
    """Return rows for the mean of several recipes, where each of them has been trained."""
    wanted = [(folder, seed) for folder in folders for seed in seeds]
    rows = []
    for folder, seed in wanted:
        try:
            row = [json.loads((folder / f"{name}_{seed}.json").read_text()) for name in names]
            mean = np.mean([predicted(folder, name, seed) for name in names], axis=0)
        except FileNotFoundError:
            continue
        seconds = sum(part["seconds"] for part in row)
        row = dict(recipe=" + ".join(names), competition=folder.name, seed=seed, seconds=seconds)
        rows.append(row | dict(score=score(folder, mean)))
    return rows


def interval(deltas, rng, draws=2000):
    """Return the mean over competitions of their mean difference and its 95 % interval: (mean, low, high).

    deltas: {competition: differences, one per seed}. The bootstrap draws competitions, and seeds within each."""
    keys, values = list(deltas), []
    for _ in range(draws):
        drawn = [deltas[keys[i]] for i in rng.integers(0, len(keys), len(keys))]
        values.append(np.mean([np.mean(rng.choice(d, len(d))) for d in drawn]))
    return np.mean([np.mean(d) for d in deltas.values()]), *np.quantile(values, [0.025, 0.975])


def summary(table, base):
    """Print the mean score of each recipe on each competition, and its difference to `base`."""
    rng, rows = np.random.default_rng(777), {}
    paired = table.pivot(index=["competition", "seed"], columns="recipe", values="score")
    for name, part in table.groupby("recipe", sort=False):
        difference = (paired[name] - paired[base]).dropna()
        deltas = {c: d.to_numpy() for c, d in difference.groupby("competition")}
        row = part.groupby("competition").score.mean().to_dict()
        if deltas and name != base:
            delta, low, high = interval(deltas, rng)
            row |= {f"Δ {base}": f"{delta:+.4f} ({low:+.4f} to {high:+.4f})"}
            row |= {"better on": f"{sum(np.mean(d) > 0 for d in deltas.values())} of {len(deltas)}"}
        rows[name] = row | dict(seconds=part.seconds.mean(), runs=len(part))
    print(pd.DataFrame(rows).T.to_string(float_format="{:.3f}".format, na_rep=""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="clones of both data sets")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help=f"weights of {NETWORK}")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder for competitions and models")
    parser.add_argument("--set", choices=("recipes", "ablations"), default="recipes", help="the table to compute")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="train these recipes of the set only")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of the trainings")
    parser.add_argument("--competitions", nargs="*", metavar="drink_0", help="train on these only")
    args = parser.parse_args()
    args.folder, args.weights, args.photos = (p.resolve() for p in (args.folder, args.weights, args.photos))
    sets = dict(recipes=RECIPES, ablations=ABLATIONS)
    wanted = {name: flags for name, flags in sets[args.set].items() if not args.only or name in args.only}
    chosen = [c for c in COMPETITIONS if not args.competitions or f"{c[0]}_{c[1]}" in args.competitions]
    folders, rows = [prepare(args, *which) for which in chosen], []
    jobs = [(folder, name, wanted[name], seed) for seed in args.seeds for name in wanted for folder in folders]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(train, *job, args.weights) for job in jobs]
        for done in as_completed(started):
            rows.append(done.result())
            print(rows[-1], flush=True)
    if args.set == "recipes":
        rows += [row for names in BLENDED for row in blends(folders, names, args.seeds)]
    summary(pd.DataFrame(rows), next(iter(wanted)))


if __name__ == "__main__":
    main()
