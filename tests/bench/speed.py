"""Speed of the kit on a CPU, beside the model alone on tensors in memory and beside the thesis' listing.

    python tests/bench/speed.py --folder /tmp/speed              # 40 minutes on 2 cores; draws its data first
    python tests/bench/speed.py --folder /tmp/speed --train 200 --test 200 --repeat 1
    python tests/bench/speed.py --folder /tmp/speed --job --train 1088 --test 1090  # the complete job: 15 minutes
    OMP_NUM_THREADS=1 python tests/bench/speed.py --folder /tmp/speed --cpu          # on a busy machine

Drawn 480 × 480 PNGs, `test_vit` at 160 px, batch 17, 2 epochs, five folds. Each part runs in a process of its own, in
turn with the others, `--repeat` times; the table has ratios of medians. 00, 01 and 03 are timed from the end of their
imports. The complete job is run.sh, from the files to the submission and the report, imports included, with plain folds
(`--groups none`) and with the default ones, for which 00 looks for duplicates. Memory is the peak of RssAnon: mapped
cache pages don't count.

- limit: the model alone; its complete job is five times one fold's training and the inference by five folds' models.
  "and views": plus the prediction of the held-out images in 8 views, of which the kit's CV is and the listing has none.
- tuned: the limit with the kit's setting of the memory allocator.
- listing: a plain loop, written for this bench, that does what the thesis' listing does. It decodes all images of a
  fold into RAM at full size, augments and normalizes them on the CPU by albumentations, takes Ranger21 from its package
  and computes the metric over all samples so far in each step. Its inference uses ttach and decodes the images once for
  each fold's model.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
SIZE, BATCH, EPOCHS, FOLDS, LR, MIN_LR = 160, 17, 2, 5, 6e-5, 3e-5
CPU = "--cpu" in sys.argv
MODEL = ["--model", "test_vit", "--weights", "none", "--model-kwargs", f"img_size={SIZE}"]

# ---------------------------------------------------------------- data


def draw(task):
    """Write a photo of the demo's products, `side` px wide and high, to `path`."""
    import cv2
    import numpy as np

    path, i, side = task
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "input" / "make_demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    image = cv2.resize(demo.photo(np.random.default_rng([5, i]), i % 2), (side, side), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), image[..., ::-1])


def make_data(folder, train, test, side=480):
    """Write a competition of two classes, unless it exists."""
    if (folder / "sample_submit.csv").exists():
        return
    tasks, at = [], 0
    for part, count in (("train", train), ("test", test)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        tasks += [(folder / part / f"{part}{i:05}.png", at + i, side) for i in range(count)]
        at += count
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, tasks, chunksize=20))
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image_name", "label"), *((f"train{i:05}.png", i % 2) for i in range(train))])
    with open(folder / "sample_submit.csv", "w", newline="") as file:
        csv.writer(file).writerows((f"test{i:05}.png", 0.5) for i in range(test))


# ---------------------------------------------------------------- measuring


def now():
    """Return a time in seconds: of the clock or, with --cpu, of the cores that this process and its children used."""
    return sum(os.times()[:4]) if CPU else time.perf_counter()


@contextlib.contextmanager
def peak_memory(result):
    """Set result["MiB"] to the peak of RssAnon of this process and its children, sampled every 20 ms."""
    stop, peak = threading.Event(), [0]

    def sample():
        while not stop.wait(0.02):
            total = 0
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for pid in ["self", *children]:
                with contextlib.suppress(OSError):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            peak[0] = max(peak[0], total / 1024)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()
    result["MiB"] = peak[0]


def script(name, *arguments):
    """Run a script of the kit in this process, without its output."""
    sys.argv = [str(ROOT / name), *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(sys.argv[0], run_name="__main__")


def flags(folder):
    return ["--input", folder / "input", "--output", folder / "output"]


# ---------------------------------------------------------------- the kit


def remove(folder):
    shutil.rmtree(folder, ignore_errors=True)


def kit_job(folder, groups="none"):
    """Run run.sh, from the competition's files to the submission. groups: 00's --groups."""
    remove(folder / "job")
    command = ["bash", ROOT / "run.sh", "--input", folder / "input", "--output", folder / "job", *MODEL]
    environment = dict(PYTHON=sys.executable, PREPARE=f"--groups {groups}")
    subprocess.run(list(map(str, [*command, "--size", SIZE])), check=True, env=os.environ | environment, stdout=2)
    return {}


def kit_prepare(folder):
    """Run 00; its own seconds count from the end of the imports."""
    import common

    remove(folder / "output")
    run, began = common.run, []

    def timed_run(main, parser):  # called when the imports are done
        began.append(now())
        run(main, parser)

    common.run = timed_run
    script("00_prepare.py", *flags(folder), "--size", SIZE, "--groups", "none")
    return dict(inner=now() - began[0])


def kit_train(folder):
    """Run 01 on fold 0. → its epochs' seconds, and those from the imports to the end of the first training step."""
    import common

    from kit.train.ranger21 import Ranger21Fast

    run, step, times = common.run, Ranger21Fast.step, []

    def timed_run(main, parser):  # called when the imports are done
        times.append(now())
        run(main, parser)

    def timed_step(optimizer):
        step(optimizer)
        times.append(now())

    common.run, Ranger21Fast.step = timed_run, timed_step
    script("01_train_fold.py", *flags(folder), *MODEL, "--size", SIZE, "--fold", 0, "--overwrite")
    with open(folder / "output" / "base" / "fold0_epochs.csv") as file:
        return dict(inner=sum(float(row["seconds"]) for row in csv.DictReader(file)), first_step=times[1] - times[0])


def copy_fold(folder):
    """Copy fold 0's model to all five folds, with made-up predictions for the others."""
    import torch

    base = folder / "output" / "base"
    saved, record = torch.load(base / "fold0.pt"), json.loads((base / "fold0.json").read_text())
    with open(folder / "output" / "prepared" / "folds.csv") as file:
        rows = list(csv.DictReader(file))
    columns = [f"{kind}_{c}" for kind in ("best", "last", "views") for c in (0, 1)]
    for fold in range(FOLDS):
        torch.save(saved | dict(fold=fold), base / f"fold{fold}.pt")
        (base / f"fold{fold}.json").write_text(json.dumps(record | dict(fold=fold)))
        held_out = [(row["image_name"], row["target"]) for row in rows if row["fold"] == str(fold)]
        table = [("image_name", "target", *columns), *((*row, *(0, i % 9) * 3) for i, row in enumerate(held_out))]
        with open(base / f"fold{fold}.csv", "w", newline="") as file:
            csv.writer(file).writerows(table)
        (base / f"fold{fold}_test.json").unlink(missing_ok=True)  # else 03 would have nothing to predict


def kit_infer(folder):
    """Run 03 on five models; its own seconds are those inside `predict`."""
    from kit.train import inference

    copy_fold(folder)
    inner, spent = inference.predict, []

    def timed(*arguments, **options):
        began = now()
        result = inner(*arguments, **options)
        spent.append(now() - began)
        return result

    inference.predict = timed
    script("03_infer.py", *flags(folder))
    return dict(inner=sum(spent))


# ---------------------------------------------------------------- the limit


def limit_prepare(folder):
    """Decode and resize each image, in a thread for each core."""
    import cv2

    from kit.data.decode import resize

    cv2.setNumThreads(1)
    paths = sorted(path for part in ("train", "test") for path in (folder / "input" / part).iterdir())
    began = now()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda path: resize(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB), SIZE), paths):
            pass
    return dict(inner=now() - began)


def start(name):
    """Return a part that starts a script, imports and flags included."""

    def part(folder):
        subprocess.run([sys.executable, ROOT / name, "--help"], check=True, stdout=subprocess.DEVNULL)
        return {}

    return part


def cached(folder, part):
    """Return 00's cached images as a tensor in memory, uint8 [N, 3, H, W]."""
    import numpy as np
    import torch

    images = np.load(folder / "output" / "prepared" / f"{part}_{SIZE}.npy")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def classifier():
    import torch

    from kit.train.model import build_model

    torch.manual_seed(0)
    config = dict(model="test_vit", model_kwargs={}, size=SIZE, norm="thesis", head="linear")
    return build_model(config, 2, "none")


def fold_rows(folder):
    """Return the rows that fold 0 trains on, those that it holds out, and all targets."""
    import pandas as pd

    folds = pd.read_csv(folder / "output" / "prepared" / "folds.csv")
    return folds.index[folds.fold != 0].to_numpy(), folds.index[folds.fold == 0].to_numpy(), folds.target.to_numpy()


def limit_train(folder):
    """Train fold 0 and predict its held-out images, on tensors in memory. → seconds of these (inner), and those of
    predicting the held-out images in 8 views (views)."""
    import torch
    import torch.nn.functional as F

    from kit.train.ranger21 import Ranger21Fast

    images, network = cached(folder, "train"), classifier()
    rows, valid, targets = fold_rows(folder)
    targets, steps = torch.from_numpy(targets), len(rows) // BATCH
    optimizer = Ranger21Fast(network.parameters(), LR, steps * EPOCHS, MIN_LR)
    began = now()
    for _ in range(EPOCHS):
        network.train()
        order = torch.from_numpy(rows)[torch.randperm(len(rows))]
        for batch in order[: steps * BATCH].split(BATCH):
            F.cross_entropy(network(images[batch]), targets[batch]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        network.eval()
        with torch.inference_mode():
            for batch in torch.from_numpy(valid).split(BATCH):
                network(images[batch])
    inner, began = now() - began, now()
    predict_views(network, images[torch.from_numpy(valid)])
    return dict(inner=inner, views=now() - began)


def predict_views(network, images):
    """Predict images uint8 [N, 3, S, S] in 8 views."""
    import torch

    with torch.inference_mode():
        for batch in images.split(32):
            for view in range(8):
                turned = batch.flip(3) if view & 1 else batch
                turned = turned.flip(2) if view & 2 else turned
                network(turned.transpose(2, 3) if view & 4 else turned)


def limit_infer(folder):
    """Predict the test images by five models in 8 views, on tensors in memory."""
    images, network = cached(folder, "test"), classifier().eval()
    began = now()
    for _ in range(FOLDS):
        predict_views(network, images)
    return dict(inner=now() - began)


def tuned(limit):
    """Return the limit with the kit's setting of the allocator (kit/train/device.py: keep_memory), which is faster."""

    def part(folder):
        from kit.train.device import keep_memory

        keep_memory()
        return limit(folder)

    return part


# ---------------------------------------------------------------- the listing


class Decoded:
    """The thesis' dataset: images decoded into a list at full size, transformed to floats on the CPU."""

    def __init__(self, folder, part, names, targets, random_views):
        import albumentations as A
        import cv2
        from albumentations.pytorch import ToTensorV2

        turns = [A.HorizontalFlip(p=0.5), A.RandomRotate90(p=0.5), A.VerticalFlip(p=0.5)] if random_views else []
        self.transform = A.Compose([A.Resize(SIZE, SIZE), *turns, A.Normalize((0.5,) * 3, (0.5,) * 3), ToTensorV2()])
        self.targets = targets
        self.images = [cv2.imread(str(folder / "input" / part / name), cv2.IMREAD_COLOR_RGB) for name in names]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(image=self.images[i])["image"], self.targets[i]


def names_of(folder, part):
    """Return the image names of train.csv or sample_submit.csv."""
    path, skip = (folder / "input" / "train.csv", 1) if part == "train" else (folder / "input" / "sample_submit.csv", 0)
    with open(path) as file:
        return [row[0] for row in list(csv.reader(file))[skip:]]


def plain_network():
    network = classifier()
    return network.backbone, network.head


def listing_train(folder):
    """Train fold 0 and predict its held-out images as the thesis' listing does."""
    import torch
    import torch.nn.functional as F
    from ranger21 import Ranger21
    from sklearn.metrics import roc_auc_score
    from torch.utils.data import DataLoader
    from torchsampler import ImbalancedDatasetSampler

    names, (rows, valid, targets) = names_of(folder, "train"), fold_rows(folder)
    began = now()
    parts = [Decoded(folder, "train", [names[i] for i in part], targets[part], part is rows) for part in (rows, valid)]
    loaded = now() - began
    sampler = ImbalancedDatasetSampler(parts[0], labels=targets[rows].tolist())
    loaders = [DataLoader(parts[0], BATCH, sampler=sampler, drop_last=True), DataLoader(parts[1], BATCH)]
    network = torch.nn.Sequential(*plain_network())
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = Ranger21(network.parameters(), LR, num_batches_per_epoch=len(loaders[0]), num_epochs=EPOCHS,
            warmdown_min_lr=MIN_LR)  # fmt: skip
    for _ in range(EPOCHS):
        for training, loader in ((True, loaders[0]), (False, loaders[1])):
            network.train(training)
            seen, labels = [], []
            with torch.set_grad_enabled(training):
                for images, target in loader:
                    logits = network(images)
                    loss = F.cross_entropy(logits, target)
                    if training:
                        loss.backward()
                        with contextlib.redirect_stdout(io.StringIO()):
                            optimizer.step()
                        optimizer.zero_grad()
                    seen += logits[:, 1].detach().tolist()
                    labels += target.tolist()
                    if len(set(labels)) == 2:
                        roc_auc_score(labels, seen)
    return dict(inner=now() - began, load=loaded)


def listing_infer(folder):
    """Predict the test images as the thesis' listing does."""
    import torch
    import ttach
    from torch.utils.data import DataLoader

    names = names_of(folder, "test")
    views = ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip(), ttach.Rotate90([0, 90])])
    began = now()
    for _ in range(FOLDS):
        loader = DataLoader(Decoded(folder, "test", names, [0] * len(names), True), 32)
        network = ttach.ClassificationTTAWrapper(torch.nn.Sequential(*plain_network()).eval(), views)
        with torch.no_grad():
            for images, _ in loader:
                network(images)
    return dict(inner=now() - began)


# ---------------------------------------------------------------- the table

PARTS = dict(
    kit_prepare=kit_prepare, limit_prepare=limit_prepare,
    kit_train=kit_train, limit_train=limit_train, listing_train=listing_train,
    kit_infer=kit_infer, limit_infer=limit_infer, listing_infer=listing_infer,
    kit_job=kit_job, default_job=lambda folder: kit_job(folder, "auto"),
    tuned_train=tuned(limit_train), tuned_infer=tuned(limit_infer),
) | {name: start(name) for name in ("00_prepare.py", "01_train_fold.py", "02_oof.py", "03_infer.py")}  # fmt: skip
WAYS = "limit", "tuned", "listing"
JOB = "kit_prepare kit_job default_job tuned_train tuned_infer listing_train listing_infer".split()  # parts of --job


def measure(part, folder):
    """Run a part in a process of its own. → its own seconds (inner), the process' seconds (total), peak of RssAnon."""
    began = now()
    command = [sys.executable, __file__, "--folder", folder, "--part", part, *["--cpu"] * CPU]
    output = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1]) | dict(total=now() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder for data and models")
    parser.add_argument("--train", type=int, default=2176, help="training images")
    parser.add_argument("--test", type=int, default=2180, help="test images")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each part")
    parser.add_argument("--job", action="store_true", help="time the complete job alone, and what it is compared with")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds; with OMP_NUM_THREADS=1, as idle threads spin")
    parser.add_argument("--part", choices=PARTS, help="internal: run this part in this process")
    args = parser.parse_args()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    folder = args.folder.resolve()
    if args.part:
        result = {}
        with peak_memory(result):
            result |= PARTS[args.part](folder)
        print(json.dumps(result))
        return
    make_data(folder / "input", args.train, args.test)
    runs = {part: [] for part in (JOB if args.job else PARTS)}
    for _ in range(args.repeat):
        for part, rows in runs.items():
            rows.append(measure(part, folder))
            print(part, {key: round(value, 1) for key, value in rows[-1].items()}, flush=True)
    median = {
        part: {key: statistics.median(run[key] for run in rows) for key in rows[0]} for part, rows in runs.items()
    }
    print_table(median)


def print_table(median):
    """Print the ratios of the parts that were measured. median: {part: what `measure` returned}."""

    def ratio(one, other, key="inner"):
        return f"{median[one][key] / median[other][key]:.2f}" if {one, other} <= median.keys() else ""

    def job(part, views=False):
        cells = []
        for way in WAYS:
            train, infer = (median.get(f"{way}_{what}", {}) for what in ("train", "infer"))
            if infer and (not views or "views" in train):
                seconds = FOLDS * (train["inner"] + (train["views"] if views else 0)) + infer["inner"]
                cells.append(f"{median[part]['total'] / seconds:.2f}")
            else:
                cells.append("")
        return " | ".join(cells)

    print(f"""
| kit / … | limit | tuned limit | listing |
|---|---|---|---|
| 00, with plain folds, after its imports; limit: decoding and resizing | {ratio("kit_prepare", "limit_prepare")} | | |
| training and validation of a fold | {" | ".join(ratio("kit_train", f"{way}_train") for way in WAYS)} |
| inference, {FOLDS} models, 8 views | {" | ".join(ratio("kit_infer", f"{way}_infer") for way in WAYS)} |
| complete job, plain folds | {job("kit_job")} |
| complete job, plain folds; and views | {job("kit_job", views=True)} |
| complete job, default folds | {job("default_job")} |
| peak RAM of training | | | {ratio("kit_train", "listing_train", "MiB")} |
""")
    starts = [f"{name} {run['total']:.1f} s" for name, run in median.items() if name.endswith(".py")]
    if starts:
        first_step = median["kit_train"]["first_step"]
        print(f"starts: {', '.join(starts)}; first training step {first_step:.1f} s after the imports")


if __name__ == "__main__":
    main()
