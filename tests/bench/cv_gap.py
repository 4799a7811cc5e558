"""Does the CV say what the test set will? On competitions made of real photos, whose test labels are known.

    python tests/bench/real.py --photos DIR --weights FILE --folder /tmp/real       # stopped: goes on

DIR/grocery: a clone of github.com/marcusklasson/GroceryStoreDataset (MIT), of which only the Packages are read:
DIR/grocery/dataset/{train,val,test}/Packages/TYPE/PRODUCT/*.jpg. DIR/clothing: a clone of
github.com/alexeygrigorev/clothing-dataset-small (CC0): DIR/clothing/{train,validation,test}/CLASS/*.jpg. FILE: ImageNet
weights of timm's tf_efficientnet_lite0.

`drink` asks whether a carton holds a drink or food. Half of the products are in the test set alone, drawn by the seed;
`mix` is the share of the other products' photos that are test images too. `cloth` has the data set's own test set and
hides nothing: there the plain CV is right, and must stay. 00_prepare.py runs once on each, in matched folds. Scores are
those of a ridge regression on the network's features, which takes seconds: plain folds, folds that keep copies
together, matched ones, and, as a yardstick that no competitor has, folds by the true product, where the test set shows
new ones only; each pooled out of fold; then the forecast, and the test score of a fit to all training images. The kit's
choices were made on seeds 0 to 3, so the figures of the other seeds are those to report.
--train N fine-tunes the network too, on plain and on matched folds of the first N of three competitions.

What lies in --folder is used again: after a change of the kit or the photos, name another one.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from common import replacing, softmax  # noqa: E402
from kit.data.decode import decode, resize  # noqa: E402
from kit.folds.split import deal  # noqa: E402
from kit.score.intervals import bootstrap_weights, leaderboard, scored  # noqa: E402
from kit.score.metrics import METRICS  # noqa: E402
from kit.train.device import pick_device  # noqa: E402
from kit.train.inference import predict  # noqa: E402
from kit.train.model import build_features  # noqa: E402

FOOD = "Oatghurt", "Sour-Cream", "Sour-Milk", "Soyghurt", "Yoghurt"
NETWORK, SIZE = "tf_efficientnet_lite0", 160
MIXES, TUNED = (0, 0.2, 0.5), (0, 1, 2, 3)  # TUNED: the seeds on which the kit's choices were made
TRAINED = ("drink", 5, 0.5), ("drink", 6, 0.5), ("drink", 7, 0.5)
RECIPE = f"--exp real --model {NETWORK} --size {SIZE} --epochs 2 --lr 1e-3 --min-lr 3e-4 --tta none".split()
ALPHA, STEEPNESS, DRAWS = 300, 5, 1000  # STEEPNESS of the softmax: no ranking and no largest guess depends on it
SAID = "leaderboard, as far as can be told: "


def photos(folder, kind):
    """→ a table of all photos of a data set: file, label, product, and whether its own split says test."""
    if kind == "drink":
        files = sorted(folder.glob("grocery/dataset/*/Packages/*/*/*.jpg"))
        files = [file for file in files if file.parts[-5] in ("train", "val", "test")]  # the clone has icons as well
        rows = [(file, str(int(file.parts[-3] in FOOD)), file.parts[-2], False) for file in files]
    else:
        files = sorted(folder.glob("clothing/*/*/*.jpg"))
        rows = [(file, file.parts[-2], "", file.parts[-3] == "test") for file in files]
    if not rows:
        sys.exit(f"{folder} holds no photos for {kind}: see the docstring")
    return pd.DataFrame(rows, columns=["file", "label", "product", "test"])


def named(folder, kind, seed, mix):
    """→ the folder of a competition and of what the kit writes about it."""
    return folder / f"{kind}_{seed}_{mix:g}"


def split(table, kind, seed, mix):
    """→ the table with the competition's names, in its order."""
    rng, table = np.random.default_rng(seed), table.copy()
    if kind == "drink":
        hidden = set()
        for _, of_label in table.groupby("label"):
            products = sorted(of_label["product"].unique())
            hidden |= set(rng.permutation(products)[: len(products) // 2])
        table["test"] = table["product"].isin(hidden) | (rng.random(len(table)) < mix)
    table["row"] = np.arange(len(table))  # of the features
    table["part"] = np.where(table.test, "test", "train")
    table = table.sample(frac=1, random_state=seed)
    table["image_name"] = table.part.str[:2] + table.groupby("part").cumcount().map("{:04}.jpg".format)
    return table


def make_competition(folder, table):
    """Writes what a competition consists of, and solution.csv; whole or not at all."""
    if folder.exists():
        return
    new = folder.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    for part, of_part in table.groupby("part"):
        (new / part).mkdir(parents=True)
        for file, name in zip(of_part.file, of_part.image_name, strict=True):
            shutil.copy(file, new / part / name)
    train, test = table[~table.test], table[table.test]
    train[["image_name", "label"]].to_csv(new / "train.csv", index=False)
    usage = np.where(np.arange(len(test)) % 2, "Public", "Private")
    test[["image_name", "label"]].assign(usage=usage).to_csv(new / "solution.csv", index=False)
    classes = sorted(train.label.unique())
    sample = pd.DataFrame(dict(image_name=test.image_name))
    sample[["value"] if len(classes) == 2 else classes] = 1 / len(classes)
    sample.to_csv(new / "sample_submit.csv", index=False, header=len(classes) > 2)
    new.rename(folder)


def run(script, competition, output, *flags):
    """Runs one of the kit's scripts. → what it printed."""
    command = [sys.executable, ROOT / script, *flags, "--input", competition, "--output", output]
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(folder, kind, *flags):
    """Runs 00_prepare.py once. → (folds.csv, prepared.json, the seconds that it took)."""
    output = folder / kind
    record = output / "seconds.txt"
    if not record.exists():
        began = time.perf_counter()
        run("00_prepare.py", folder / "input", output, "--size", SIZE, "--overwrite", *flags)  # none was finished
        record.write_text(f"{time.perf_counter() - began:.1f}")
    prepared = json.loads((output / "prepared" / "prepared.json").read_text())
    folds = pd.read_csv(output / "prepared" / "folds.csv", dtype=dict(image_name=str, label=str))
    return folds, prepared, float(record.read_text())


def features(path, files, weights):
    """→ float32 [N, D], the network's features of the photos; kept in `path`."""
    if not path.exists():
        images = np.stack([resize(decode(file.read_bytes()), SIZE) for file in files])
        network, device = build_features(NETWORK, SIZE, weights), pick_device("auto")
        found = predict(network.to(device), images, np.arange(len(images)), 32, device, bar=path.stem)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, found)
    return np.load(path)


def head(vectors, truth, asked):
    """→ probabilities [A, K] of the `asked` vectors, by a ridge regression fit to the others; truth: one-hot [N, K]."""
    return softmax(STEEPNESS * make_pipeline(StandardScaler(), Ridge(ALPHA)).fit(vectors, truth).predict(asked))


def out_of_fold(vectors, truth, folds):
    probabilities = np.empty_like(truth)
    for fold in np.unique(folds):
        seen = folds != fold
        probabilities[~seen] = head(vectors[seen], truth[seen], vectors[~seen])
    return probabilities


def copies_groups(path, names):
    """→ int [N]: the groups that duplicates.csv gives the training images, each other image being its own."""
    table = pd.read_csv(path, dtype=str)
    group_of = table[table.part == "train"].set_index("image_name").group
    return pd.factorize(pd.Series([group_of.get(name, name) for name in names]))[0]


def score(folder, table, vectors):
    """→ the row of one competition: its three CVs, the forecast, the test score."""
    folds, prepared, seconds = prepare(folder, "matched")
    metric, count, seed = METRICS[prepared["metric"]], prepared["folds"], prepared["seed"]
    targets, solution = folds.target.to_numpy(), table[table.test]
    truth = np.eye(len(prepared["classes"]))[targets]
    train = vectors[table.set_index("image_name").row[folds.image_name]]
    copies = copies_groups(folder / "matched" / "prepared" / "duplicates.csv", folds.image_name)
    plain, copies = (deal(groups, targets, count, seed) for groups in (np.arange(len(folds)), copies))
    dealt = dict(plain=plain, copies=copies, matched=folds.fold.to_numpy())
    if not set(solution["product"]) & set(table["product"][~table.test]):
        product = pd.factorize(table.set_index("image_name")["product"][folds.image_name])[0]
        dealt = dict(products=deal(product, targets, count, seed)) | dealt
    row = dict(products=np.nan)
    for kind, own in dealt.items():
        guesses = out_of_fold(train, truth, own)
        row[kind] = metric.score(targets, guesses)
    row |= forecasted(prepared, folds, guesses, metric.score(targets, truth), len(solution))  # of the matched folds
    answers = solution.label.map(prepared["classes"].index).to_numpy()
    row["test"] = metric.score(answers, head(train, truth, vectors[solution.row]))
    return row | dict(inside="yes" if row["low"] <= row["test"] <= row["high"] else "no", seconds=seconds)


def forecasted(prepared, folds, guesses, perfect, tests):
    """→ dict(rung, low, high), as 02_oof.py computes them."""
    if not (ladder := prepared["ladder"]):
        return dict(rung="none", low=np.nan, high=np.nan)
    cv, draws = scored(prepared["metric"], folds.target.to_numpy(), guesses, bootstrap_weights(folds.group, DRAWS))
    said = leaderboard(cv, draws, perfect, ladder, len(folds), tests)
    return dict(rung=next(rung["name"] for rung in ladder if rung["chosen"]), low=said["low"], high=said["high"])


def train(folder, weights):
    """Fine-tunes five folds, plain and matched. → the CVs, what 02 says of the leaderboard, the test scores."""
    row = dict(competition=folder.name)
    for kind, flags in dict(plain=["--groups", "none"], matched=[]).items():
        _, prepared, _ = prepare(folder, kind, *flags)
        at = folder / "input", folder / kind
        run("01_train_fold.py", *at, "--fold", "all", "--weights", weights, *RECIPE)
        printed = run("02_oof.py", *at, "real").splitlines()
        run("03_infer.py", *at, "real")
        row[f"{kind} CV"] = float(pd.read_csv(folder / kind / "experiments.csv").cv.iloc[0])
        row[f"{kind} test"] = submission_score(folder, kind, prepared)
        row["forecast"] = next((line.removeprefix(SAID) for line in printed if line.startswith(SAID)), "none")
    return row


def submission_score(folder, kind, prepared):
    """→ the score of the written submission by solution.csv."""
    (path,) = (folder / kind / "real").glob("submission_*.csv")
    solution = pd.read_csv(folder / "input" / "solution.csv", dtype=str, index_col="image_name")
    header, classes = 0 if prepared["submission"]["header"] else None, prepared["classes"]
    submitted = pd.read_csv(path, header=header, index_col=0).loc[solution.index]
    values = submitted[classes].to_numpy() if header == 0 else np.hstack([1 - submitted, submitted])
    return METRICS[prepared["metric"]].score(solution.label.map(classes.index).to_numpy(), values)


def summary(table):
    """Prints how far each CV is from the test score, on the seeds that the kit was made with and on the others."""
    drink, tuned, rows = table.kind == "drink", table.seed.isin(TUNED), {}
    parts = {"drink, seeds 0 to 3: tuned on": drink & tuned, "drink, other seeds: to report": drink & ~tuned}
    for name, part in (parts | {"all": drink | True}).items():
        some = table[part]
        row = {kind: (some[kind] - some.test).abs().mean() for kind in ("plain", "copies", "products", "matched")}
        row |= {"matched/plain": row["matched"] / row["plain"]}
        row |= {"test inside": f"{(some.inside == 'yes').sum()} of {len(some)}", "width": (some.high - some.low).mean()}
        row |= {"seconds of 00": some.seconds.mean()}
        rows |= {name: row} if len(some) else {}
    print("\nmean |CV - test|; how often the test score is inside the forecast, and how wide that is")
    print(pd.DataFrame(rows).T.to_string(float_format="{:.3f}".format))
    cloth = table[~drink].iloc[0]
    print(f"cloth: |matched - plain| = {abs(cloth.matched - cloth.plain):.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--folder", type=Path, required=True, help="where competitions, features and models go")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), help="of drink; cloth has one split")
    parser.add_argument("--train", type=int, default=3, metavar="N", help="how many of the chosen ones are fine-tuned")
    args = parser.parse_args()
    folder, rows = args.folder.resolve(), []
    chosen = [("drink", seed, mix) for seed in args.seeds for mix in MIXES] + [("cloth", 0, 0)]
    for kind, seed, mix in chosen:
        everything, place = photos(args.photos, kind), named(folder, kind, seed, mix)
        table = split(everything, kind, seed, mix)
        make_competition(place / "input", table)
        vectors = features(folder / f"{kind}_features.npy", everything.file, args.weights.resolve())
        rows.append(dict(kind=kind, seed=seed, mix=mix) | score(place, table, vectors))
        print(rows[-1], flush=True)
    columns = "kind seed mix plain copies products matched rung low high test inside seconds".split()
    print("\n" + pd.DataFrame(rows)[columns].to_string(index=False, float_format="{:.3f}".format))
    summary(pd.DataFrame(rows))
    wanted = [named(folder, *which) for which in TRAINED[: args.train] if which in chosen]
    fine_tuned = [train(place, args.weights.resolve()) for place in wanted]
    if fine_tuned:
        print("\nfine-tuned\n" + pd.DataFrame(fine_tuned).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
