"""Memory and time of the scripts on many images of many classes, and their growth with the number of images.

    python tests/bench/large.py --folder /tmp/large                          # 100,000 images, 1,000 classes
    python tests/bench/large.py --folder /tmp/large --train 9000 --test 1000 --classes 100
    python tests/bench/large.py --folder /tmp/growth --growth 2000 20000     # 2,000 and 20,000 images, two classes

Many classes: drawn JPEGs of 48 px in two zips, classes of very different sizes, cached at 32 px with the search for
duplicates; two folds of `test_resnet`, its head trained for two epochs; --probe adds `recipes/probe.args` on its random
features. Growth: drawn PNGs of 96 px, four fifths of them for training, cached at 48 px with the search for duplicates;
`test_resnet`, one fold, one epoch; inference with 8 views by five copies of that fold's model.

Memory is the peak of RssAnon, including child processes but no mapped cache pages. Each script runs in a process of its
own; seconds include its start, and CPU seconds, which other work on the machine hardly changes, count all cores. The
result of a step is kept in FOLDER/STEP.json (growth: FOLDER/COUNT/STEP.json): delete it to measure the step again.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import speed

SIDE, SIZE = 48, 32  # px: drawn, cached
GROWTH_SIDE, GROWTH_SIZE = 96, 48
NETWORK = ["--model", "test_resnet", "--weights", "none"]
MODEL = [*NETWORK, "--size", SIZE, "--fold", "all"]
HEAD = ["--tune", "head", "--epochs", 2, "--batch-size", 64, "--lr", 1e-2, "--min-lr", 1e-3]
PROBE = [f"@{speed.ROOT / 'recipes' / 'probe.args'}"]
STEPS = {
    "00": ["00_prepare.py", "--size", SIZE, "--folds", 2],
    "01 head": ["01_train_fold.py", "--exp", "head", *MODEL, *HEAD],
    "02 head": ["02_oof.py", "head"],
    "03 head": ["03_infer.py", "head"],
    "01 probe": ["01_train_fold.py", *PROBE, "--exp", "probe", *MODEL],
    "02 probe": ["02_oof.py", "probe"],
    "03 probe": ["03_infer.py", "probe"],
}
GROWTH_STEPS = {
    "00 growth": ["00_prepare.py", "--size", GROWTH_SIZE],
    "01 growth": ["01_train_fold.py", *NETWORK, "--size", GROWTH_SIZE, "--fold", 0, "--epochs", 1, "--batch-size", 32],
    "03 growth": ["03_infer.py"],
}


def draw(task):
    """Return a JPEG of the class: its blots of colour, moved, turned and relit by the image's number."""
    number, label = task
    of_class, rng = np.random.default_rng([1, label]), np.random.default_rng([2, number])
    image = np.full((SIDE, SIDE, 3), of_class.integers(40, 220, 3), np.uint8)
    for _ in range(6):
        (x, y), radius = of_class.integers(6, SIDE - 6, 2), int(of_class.integers(3, 12))
        colour = [int(c) for c in of_class.integers(0, 256, 3)]
        at = int(x + rng.integers(-3, 4)), int(y + rng.integers(-3, 4))
        cv2.ellipse(image, at, (radius, 2 + radius // 2), int(rng.integers(360)), 0, 360, colour, -1, cv2.LINE_AA)
    relit = image * rng.uniform(0.7, 1.1) + rng.normal(0, 12, image.shape)
    return cv2.imencode(".jpg", np.clip(relit, 0, 255).astype(np.uint8))[1].tobytes()


def make_data(folder, train, test, classes):
    """Write train.zip, train.csv, test.zip and sample_submit.csv, unless they exist."""
    if (folder / "sample_submit.csv").exists():
        return
    folder.mkdir(parents=True)
    rng, share = np.random.default_rng(0), 1 / (np.arange(classes) + classes / 50) ** 0.7
    labels = np.concatenate([np.tile(np.arange(classes), 4), rng.choice(classes, train + test, p=share / share.sum())])
    labels, first = labels[: train + test], 0
    labels[:train] = rng.permutation(labels[:train])  # the first ones hold each class
    for part, count in (("train", train), ("test", test)):
        names = [f"{part}{i:06}.jpg" for i in range(count)]
        tasks = [(first + i, int(labels[first + i])) for i in range(count)]
        with ProcessPoolExecutor() as pool, zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for name, data in zip(names, pool.map(draw, tasks, chunksize=500), strict=True):
                archive.writestr(name, data)
        rows = [(name, f"class{label}") for name, (_, label) in zip(names, tasks, strict=True)]
        header = [("image_name", "label")] if part == "train" else []
        with open(folder / ("train.csv" if header else "sample_submit.csv"), "w", newline="") as file:
            csv.writer(file).writerows([*header, *(rows if header else [(name, "class0") for name in names])])
        first += count


def make_weights(folder):
    """Write random weights to a file: the kit refuses to probe what --weights none gives. → its path."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def computed():
    """Return the CPU seconds of all child processes that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_step(step, folder, groups):
    """Run a step in this process. → dict(MiB)."""
    (name, *flags), result = (STEPS | GROWTH_STEPS)[step], {}
    flags += ["--groups", groups] if name == "00_prepare.py" else []
    flags += ["--weights", make_weights(folder)] if step == "01 probe" else []
    with speed.peak_memory(result):
        if step == "03 growth":
            speed.copy_fold(folder)
        speed.script(name, *flags, *speed.flags(folder))
    return result


def measure(step, folder, groups):
    """Run a step in a process of its own, unless it was measured. → dict(MiB, seconds, computed)."""
    result, began, before = folder / f"{step.replace(' ', '_')}.json", time.perf_counter(), computed()
    if not result.exists():
        command = [sys.executable, __file__, "--folder", str(folder), "--step", step, "--groups", groups]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured = dict(seconds=time.perf_counter() - began, computed=computed() - before)
        result.write_text(json.dumps(json.loads(output.splitlines()[-1]) | measured))
    return json.loads(result.read_text())


def many_classes(folder, train, test, classes, groups, probe):
    """Print memory and time of each step."""
    make_data(folder / "input", train, test, classes)
    print(f"| {train + test} images, {classes} classes | MiB | s | CPU s |\n|---|---|---|---|", flush=True)
    rows = []
    for step in (step for step in STEPS if probe or "probe" not in step):
        rows.append(measure(step, folder, groups))
        print("| {} | {MiB:.0f} | {seconds:.0f} | {computed:.0f} |".format(step, **rows[-1]), flush=True)
    print("| all | {:.0f} | {:.0f} | {:.0f} |".format(max(row["MiB"] for row in rows),
        *(sum(row[key] for row in rows) for key in ("seconds", "computed"))))  # fmt: skip


def growth(folder, few, many, groups):
    """Print memory and time of each step at two numbers of images: memory should stay, time grow in proportion."""
    print(f"| | MiB, {few} images | MiB, {many} | ratio of RAM | ratio of time for {many / few:.0f} times the images |")
    print("|---|---|---|---|---|", flush=True)
    folders = [folder / str(count) for count in (few, many)]
    for at, count in zip(folders, (few, many), strict=True):
        speed.make_data(at / "input", count - count // 5, count // 5, GROWTH_SIDE)
    for step in GROWTH_STEPS:
        low, high = (measure(step, at, groups) for at in folders)
        ratios = "{:.2f} | {:.1f}".format(*(high[key] / low[key] for key in ("MiB", "seconds")))
        print(f"| {step[:2]} | {low['MiB']:.0f} | {high['MiB']:.0f} | {ratios} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder for data, models and results")
    parser.add_argument("--train", type=int, default=90_000, help="training images")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--classes", type=int, default=1000, help="classes of the images")
    parser.add_argument("--growth", type=int, nargs=2, metavar=("FEW", "MANY"),
        help="compare 00, 01 and 03 at these two numbers of images, of two classes")  # fmt: skip
    parser.add_argument("--groups", default="auto", help="00's flag of that name")
    parser.add_argument("--probe", action="store_true", help="measure recipes/probe.args too")
    parser.add_argument("--step", choices=[*STEPS, *GROWTH_STEPS], help="internal: run this step in this process")
    args = parser.parse_args()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    if args.step:
        print(json.dumps(run_step(args.step, args.folder, args.groups)))
    elif args.growth:
        growth(args.folder, *args.growth, args.groups)
    else:
        many_classes(args.folder, args.train, args.test, args.classes, args.groups, args.probe)


if __name__ == "__main__":
    main()
