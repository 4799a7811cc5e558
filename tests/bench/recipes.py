"""Which recipe wins? Test scores of recipes on competitions made of real photos, and what each ingredient is worth.

    python tests/bench/recipes.py --photos DIR --weights FILE --folder /tmp/recipes        # stopped: goes on

DIR and FILE are those of real.py. The competitions: `drink` with the product seeds 0 to 3, in matched folds, and
`cloth`; of the training images at most 500 and of the test images at most 300, so that all of it ends within hours on 2
cores. Each recipe trains fold 0 with three seeds and predicts the test set; what differs from the thesis' recipe on the
same competition with the same seed is one paired difference. Their interval is a bootstrap over competitions, and over
seeds within each. Seconds are those of the CPU, of 01 and 03 together, without starting Python.

--set ablations changes one thing at a time in `half`, --set peers lets other tools train for as many CPU seconds as
`half` took (peers.py). What lies in --folder is used again: after a change of the kit name another one.
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

import numpy as np
import pandas as pd
from real import NETWORK, ROOT, make_competition, photos, run, split

from common import softmax
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
    """Makes a competition and prepares it once, at two sizes. → its folder."""
    folder = args.folder / f"{kind}_{seed}"
    if not (folder / "output").exists():
        table = split(photos(args.photos, kind), kind, seed, 0)
        make_competition(folder / "input", pd.concat([table[~table.test].head(TRAIN), table[table.test].head(TEST)]))
        run("00_prepare.py", folder / "input", folder / "new", "--size", SIZE)
        run("00_prepare.py", folder / "input", folder / "new", "--size", LARGER)
        (folder / "new").rename(folder / "output")
    return folder


def script(name, *words):
    """Runs a script of the kit in this process. Its output is shown where it fails."""
    out, sys.argv = io.StringIO(), [str(ROOT / name), *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)}\n{out.getvalue()}") from None


def score(folder, probabilities):
    """→ the score of the test set's probabilities [M, K]."""
    prepared = folder / "output" / "prepared"
    about = json.loads((prepared / "prepared.json").read_text())
    names = pd.read_csv(prepared / "test.csv", dtype=str).image_name
    solution = pd.read_csv(folder / "input" / "solution.csv", dtype=str, index_col="image_name")
    targets = solution.label[names].map(about["classes"].index).to_numpy()
    return METRICS[about["metric"]].score(targets, probabilities)


def predicted(folder, name, seed):
    """→ the probabilities of a trained recipe [M, K]."""
    return softmax(np.load(folder / "output" / f"{name.strip('-')}_{seed}" / "fold0_test.npy"))


def train(folder, name, flags, seed, weights):
    """Trains fold 0 and predicts the test set, once. → dict(recipe, competition, seed, score, seconds of the CPU)."""
    path = folder / f"{name}_{seed}.json"
    if not path.exists():
        os.chdir(ROOT)  # recipes name each other from there
        at, exp = ("--input", folder / "input", "--output", folder / "output"), f"{name.strip('-')}_{seed}"
        began, flags = time.process_time(), [*flags.split(), "--weights", weights, "--seed", seed]
        script("01_train_fold.py", *at, *flags, "--exp", exp, "--fold", 0)
        script("03_infer.py", *at, exp)
        row = dict(recipe=name, competition=folder.name, seed=seed, seconds=time.process_time() - began)
        path.write_text(json.dumps(row | dict(score=score(folder, predicted(folder, name, seed)))))
    return json.loads(path.read_text())


def train_peer(folder, name, flags, seed, weights):
    """The same for one of PEERS: fold 0's training images, and the CPU seconds that `half` took."""
    path = folder / f"{name}_{seed}.json"
    if not path.exists():
        from peers import PEERS  # here: fastai takes seconds to import

        seconds = json.loads((folder / f"half_{seed}.json").read_text())["seconds"]
        prepared = folder / "output" / "prepared"
        images, tests = (np.load(prepared / f"{part}_{SIZE}.npy") for part in ("train", "test"))
        folds = pd.read_csv(prepared / "folds.csv")
        seen, targets = (folds.fold > 0).to_numpy(), folds.target.to_numpy()
        data = images[seen], targets[seen], tests, targets.max() + 1
        guesses, used = PEERS[name](*data, weights, seconds, seed)
        row = dict(recipe=name, competition=folder.name, seed=seed, seconds=used, score=score(folder, guesses))
        path.write_text(json.dumps(row))
    return json.loads(path.read_text())


def blends(folders, names, seeds):
    """→ rows of the mean of several recipes, where all of them have been trained."""
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
    """deltas: {competition: differences, one a seed}. → (mean, low, high), the mean over competitions of their means;
    95 %, from a bootstrap over competitions and over seeds within each."""
    keys, values = list(deltas), []
    for _ in range(draws):
        drawn = [deltas[keys[i]] for i in rng.integers(0, len(keys), len(keys))]
        values.append(np.mean([np.mean(rng.choice(d, len(d))) for d in drawn]))
    return np.mean([np.mean(d) for d in deltas.values()]), *np.quantile(values, [0.025, 0.975])


def summary(table, base):
    """Prints the mean score of each recipe on each competition, and its difference to `base`."""
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
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--folder", type=Path, required=True, help="where competitions and models go")
    parser.add_argument("--set", choices=("recipes", "ablations", "peers"), default="recipes", help="what is compared")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="of it, only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--competitions", nargs="*", metavar="drink_0")
    args = parser.parse_args()
    args.folder, args.weights, args.photos = (p.resolve() for p in (args.folder, args.weights, args.photos))
    sets = dict(recipes=RECIPES, ablations=ABLATIONS, peers=dict.fromkeys(("fastai", "timm", "autogluon")))
    wanted = {name: flags for name, flags in sets[args.set].items() if not args.only or name in args.only}
    chosen = [c for c in COMPETITIONS if not args.competitions or f"{c[0]}_{c[1]}" in args.competitions]
    folders, rows = [prepare(args, *which) for which in chosen], []
    jobs = [(folder, name, wanted[name], seed) for seed in args.seeds for name in wanted for folder in folders]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(train_peer if args.set == "peers" else train, *job, args.weights) for job in jobs]
        for done in as_completed(started):
            rows.append(done.result())
            print(rows[-1], flush=True)
    if args.set == "recipes":
        rows += [row for names in BLENDED for row in blends(folders, names, args.seeds)]
    summary(pd.DataFrame(rows), next(iter(wanted)))


if __name__ == "__main__":
    main()
