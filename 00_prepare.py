"""Reads the competition's files, checks them, decides the folds and caches the images.

    python 00_prepare.py                                   # input/ → output/prepared/
    python 00_prepare.py --size 384                        # adds a cache of another size; the folds stay
    python 00_prepare.py --train-images train_images --image-column image_id --sample-submit sample_submission.csv

Reads INPUT/train.csv, INPUT/sample_submit.csv, and the images straight out of INPUT/train.zip and INPUT/test.zip, or
out of the folders INPUT/train and INPUT/test. Writes OUTPUT/prepared: folds.csv, test.csv, train_448.npy,
test_448.npy, samples.png, prepared.json, duplicates.csv and duplicates.png: the images that show one source. Those stay
in one fold (--groups), or the CV would be measured on images that the model has seen.
"""

from common import (
    Parser,
    UserError,
    cpu_count,
    file_hash,
    listing,
    locked,
    number,
    prepared_folder,
    progress,
    read_json,
    replacing,
    run,
    say,
    write_csv,
    write_json,
)


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument_group("images").add_argument
    add("--size", type=number(int, 1), default=448, help="side in px of the cached images (thesis 3.1.1)")
    add("--train-images", metavar="NAME", help="zip or folder in --input; by itself train.zip, else train")
    add("--test-images", metavar="NAME", help="zip or folder in --input; by itself test.zip, else test")

    add = parser.add_argument_group("tables").add_argument
    add("--train-csv", default="train.csv", help="the table of images and labels")
    add("--image-column", default="image_name", help="its column of image names")
    add("--label-column", default="label", help="its column of labels")
    add("--sample-submit", default="sample_submit.csv", help="the sample submission: the test images and the format")
    add("--submit-header", choices=("auto", "yes", "no"), default="auto", help="whether the sample has a header line")
    add("--submit-value", choices=("auto", "probability", "label"), default="auto",
        help="what its one value column wants; auto: the label where there are several classes or the sample shows "
        "class names, else the probability of the second class")  # fmt: skip

    add = parser.add_argument_group("folds (thesis 3.1.2)").add_argument
    add("--folds", type=number(int, 2), default=5, help="number of stratified folds")
    add("--seed", type=number(int, 0), default=777, help="decides the folds (listing)")
    add("--overwrite", action="store_true", help="make everything anew; models of the earlier folds are then refused")

    add = parser.add_argument_group("groups: images that must stay in one fold").add_argument
    add("--groups", default="auto", help="auto: copies of one source, found by groups.py; none (the thesis); a column "
        "of the training table; or a FILE.csv with image_name,group")  # fmt: skip
    add("--embed", metavar="MODEL", help="find auto's candidates by the features of a timm model, not by SIFT words")
    add("--weights", help="of --embed: hub (by itself), none, or a .safetensors or .pth file")
    args = parser.parse_args()
    if args.embed and args.groups != "auto":
        parser.error("--embed helps --groups auto to find groups: leave it out, or leave out --groups")
    if args.weights and not args.embed:
        parser.error("--weights belongs to --embed: give that too")
    args.weights = args.weights or "hub"
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: a mistyped flag answers at once

import contextlib
import hashlib
import io
import math
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

import groups as grouping
import shift
from data import PREPARE, Augmentation, read_table
from images import ImageSource, contact_sheet, resize
from tables import check_unique, given_groups, read_labels, read_sample_submit

# ---------------------------------------------------------------- where the images are


def image_source(args, part, given):
    """The zip or folder of `part`: the one given by flag, else INPUT/part.zip, else INPUT/part."""
    names = [given] if given else [f"{part}.zip", part]
    for name in names:
        path = args.input / name
        if path.exists():
            return ImageSource(path)
    raise UserError(
        f"{args.input / names[0]} is missing: put the competition's images there, or name them with --{part}-images"
    )


# ---------------------------------------------------------------- caches


def find_all(source, names, table):
    """→ the source's key for each name. Raises UserError naming what the source lacks."""
    keys = [source.find(name) for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        raise UserError(f"{source.path} lacks {len(missing)} of the images in {table}: {listing(missing)}")
    check_unique(table, keys)  # two spellings of one file
    return keys


def check_disk(folder, needed):
    """Raises UserError where `needed` bytes don't fit."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free and the caches need {needed / 2**30:.1f} GiB: "
            "free some space, choose another --output, or a smaller --size"
        )


def cache(source, keys, size, path, look):
    """Decodes every image once and writes uint8 [N, size, size, 3] to `path`. → the Counter of (width, height) seen.

    Each thread writes its images to their place in the file, so memory doesn't grow with the data, and a disk that
    fills up is an error and no bus error. All unreadable images are reported together. `look(i, image)` sees
    every whole image as well.
    """
    header = io.BytesIO()
    shape = (len(keys), size, size, 3)
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=shape))
    image_bytes, sizes, unreadable = size * size * 3, Counter(), []

    def convert(task):
        i, key = task
        try:
            image = source.decoded(key)
        except ValueError as error:
            return f"{key} ({error})", None
        os.pwrite(file.fileno(), resize(image, size).data, header.tell() + i * image_bytes)
        look(i, image)
        return None, image.shape[1::-1]

    with replacing(path) as temporary:
        with open(temporary, "wb") as file, ThreadPoolExecutor(cpu_count()) as pool:
            file.write(header.getvalue())
            file.flush()
            with progress(len(keys), path.name) as bar:
                for error, shape in pool.map(convert, enumerate(keys)):
                    if error:
                        unreadable.append(error)
                    else:
                        sizes[shape] += 1
                    bar.update()
        if unreadable:
            count = len(unreadable)
            raise UserError(f"{source.path} has {count} unreadable images: {listing(unreadable)}: replace them")
    return sizes


@contextlib.contextmanager
def array_in_file(folder, name, dtype, *shape):
    """An array that lies in a temporary file, so that memory doesn't grow with the data."""
    path, dtype = folder / f".tmp{os.getpid()}.{name}", np.dtype(dtype)
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)  # a full disk is an error here
        yield np.memmap(path, dtype, "r+", shape=shape)
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}): free some space, or use another --output"
        ) from error
    finally:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- folds


def make_folds(names, labels, classes, groups, count, seed):
    """Stratified folds, shuffled (thesis 3.1.2), in which no group (int [N]) is split. → the table folds.csv.

    Without groups of two or more these are the thesis' folds. Raises UserError where a class has too few groups to be
    in every fold.
    """
    table = pd.DataFrame(dict(image_name=names, label=labels))
    table["target"] = table.label.map({label: i for i, label in enumerate(classes)})
    table["group"] = groups
    if table.group.nunique() < count:
        raise UserError(
            f"{table.group.nunique()} groups of relatives can't fill {count} folds: lower --folds, or see --groups"
        )
    table["fold"] = -1
    single = table.group.is_unique
    splitter = (StratifiedKFold if single else StratifiedGroupKFold)(count, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(table, table.target, None if single else table.group)):
        table.loc[held_out, "fold"] = fold
    counts = pd.crosstab(table.label, table.fold).reindex(columns=range(count), fill_value=0)
    lacking = counts.index[(counts == 0).any(axis=1)]
    if len(lacking):
        raise UserError(
            f"classes {listing(lacking)} have too few groups of relatives for {count} folds: lower --folds, or see "
            "--groups"
        )
    return table


def embed(args, folder):
    """Features of a timm model, of the training images and then the test images: float32 [N, D]."""
    import torch  # with timm it takes seconds to import; only --embed needs it

    import model as models

    device = models.pick_device("auto")
    config = dict(model=args.embed, model_kwargs={}, weights=args.weights, head="fresh", size=args.size, norm="model")
    torch.manual_seed(args.seed)
    network = models.build_model(config, 0).to(device)
    parts = [np.load(folder / f"{part}_{args.size}.npy", mmap_mode="r") for part in ("train", "test")]
    return grouping.unit(
        np.concatenate(
            [models.predict(network, images, np.arange(len(images)), 32, device, bar="features") for images in parts]
        )
    )


# ---------------------------------------------------------------- what is shown


def fold_table(folds, classes):
    """Images of each class in each fold, with sums, as text."""
    counts = pd.crosstab(folds.fold, folds.label)[classes]
    counts.loc["all"] = counts.sum()
    counts["all"] = counts.sum(axis=1)
    counts.columns.name = None
    return counts.rename_axis("fold").to_string()


def size_line(sizes):
    """'96 × 96 (12), 80 × 60 (3) and 4 more sizes, 40 to 900 px'"""
    most = ", ".join(f"{w} × {h} ({n})" for (w, h), n in sizes.most_common(3))
    sides = [side for size in sizes for side in size]
    more = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
    return f"{most}{more}; sides {min(sides)} to {max(sides)} px"


def draw_samples(path, images, folds, classes, seed, columns=4):
    """Images of each class before augmentation, and below each the same image after it (thesis figures 3.1 to 3.3)."""
    rng, augment = np.random.default_rng(seed), Augmentation("d4")
    sheet = []
    for label in classes[:10]:
        rows = np.flatnonzero(folds.label == label)
        chosen = rng.choice(rows, min(columns, len(rows)), replace=False)
        sheet.append((f"label {label}", [(images[i], folds.image_name[i][-30:]) for i in chosen]))
        sheet.append(("augmented", [(augment(images[i], seed=int(i)), "") for i in chosen]))
    with replacing(path) as temporary:
        contact_sheet(temporary, sheet, columns)


# ---------------------------------------------------------------- main


def main():
    args = ARGS
    cv2.setNumThreads(1)  # the threads of `cache` share the cores already
    folder = prepared_folder(args)
    data = read_competition(args)
    if up_to_date(folder, data, args):
        return
    with locked(args.output / ".prepare.lock", folder), staging_folder(folder) as new:
        if up_to_date(folder, data, args):  # by the process that held the lock until now
            return
        earlier = earlier_prepared(folder, data.settings, args)
        findings, folds, seen = prepare(args, data, new, folder, earlier)
        publish(new, folder, anew=not earlier)
    for part, source, used, sizes in (
        ("train", data.train, data.names, seen[0]),
        ("test", data.test, data.test_names, seen[1]),
    ):
        say(f"{part:5}  {len(used)} images, {size_line(sizes)}; {len(source.files) - len(used)} more that no row names")
    submission = data.settings["submission"]
    say(f"submission  {'with' if submission['header'] else 'no'} header, {submission['value']}")
    for line in [*grouping.report_lines(findings["relatives"]), *shift.report_lines(findings["shift"])]:
        say(line)
    say(f"\n{fold_table(folds, data.settings['classes'])}\n\nprepared {args.size} px → {folder} (look at samples.png)")


def read_competition(args):
    """Reads and checks all tables, and finds every image. → what is in them, and the settings that decide the folds."""
    names, labels, classes = read_labels(args)
    train, test = image_source(args, "train", args.train_images), image_source(args, "test", args.test_images)
    test_names, submission = read_sample_submit(args, test, classes)
    train_keys = find_all(train, names, args.input / args.train_csv)
    test_keys = find_all(test, test_names, args.input / args.sample_submit)
    groups = given_groups(args, names) if args.groups not in ("auto", "none") else np.arange(len(names))
    tables = hashlib.sha256(repr((names, labels, test_names, groups.tolist())).encode()).hexdigest()
    settings = dict(
        made_from=dict(tables=tables, train_images=train.fingerprint, test_images=test.fingerprint),
        classes=classes,
        folds=args.folds,
        seed=args.seed,
        groups=args.groups + (f" by {args.embed} {args.weights}" if args.embed else ""),
        submission=submission,
    )
    return SimpleNamespace(
        names=names,
        labels=labels,
        test_names=test_names,
        train=train,
        test=test,
        train_keys=train_keys,
        test_keys=test_keys,
        groups=np.concatenate([groups, groups.max() + 1 + np.arange(len(test_names))]),  # each test image by itself
        settings=settings,
    )


def up_to_date(folder, data, args):
    earlier = earlier_prepared(folder, data.settings, args)
    if not earlier or args.size not in earlier["sizes"]:
        return False
    say(
        f"{folder} is up to date: {args.folds} folds, seed {args.seed}, sizes {listing(earlier['sizes'])} px. "
        "Nothing to do."
    )
    return True


def prepare(args, data, new, folder, earlier):
    """Makes all files in the folder `new`; after an `earlier` run only those of another size.

    → (what was found of relatives and shift, the table folds.csv, the image sizes seen in each part).
    """
    train_count, count = len(data.names), len(data.names) + len(data.test_names)
    find, groups, relatives = args.groups == "auto" and not earlier, data.groups, None
    check_disk(new, count * (args.size**2 * 3 + find * (grouping.RECORD.itemsize + 4 * grouping.VECTOR)))
    statistics = np.zeros((count, shift.STATISTICS), np.float32)
    with array_in_file(new, "records", grouping.RECORD, count) if find else contextlib.nullcontext() as records:
        seen = cache_all(args, data, new, statistics, records)
        if find:
            groups, relatives = find_relatives(args, new, records, data.names, data.labels, data.test_names)
    if earlier:
        findings = {key: earlier[key] for key in ("relatives", "shift")}
        folds, folds_hash, sizes = read_table(folder / "folds.csv", PREPARE), earlier["folds_hash"], earlier["sizes"]
    else:
        found = shift.adversarial_validation(statistics, np.arange(count) >= train_count, groups, args.seed)
        findings, sizes, classes = dict(relatives=relatives, shift=found), [], data.settings["classes"]
        folds = make_folds(data.names, data.labels, classes, groups[:train_count], args.folds, args.seed)
        write_csv(new / "folds.csv", folds)
        write_csv(new / "test.csv", pd.DataFrame(dict(image_name=data.test_names)))
        folds_hash = file_hash(new / "folds.csv")
    images = np.load(new / f"train_{args.size}.npy", mmap_mode="r")
    draw_samples(new / "samples.png", images, folds, data.settings["classes"], args.seed)
    whole = data.settings | findings | dict(sizes=sorted([*sizes, args.size]), folds_hash=folds_hash)
    write_json(new / "prepared.json", whole)
    return findings, folds, seen


def cache_all(args, data, folder, statistics, records):
    """Caches the images of both parts, and looks at each image once on the way: fills `statistics` and, if there are
    any, `records`. → the sizes seen in each part."""

    def look_from(first):
        def look(i, image):
            statistics[first + i] = shift.statistics(image)
            if records is not None:
                records[first + i] = grouping.describe(image)

        return look

    return [
        cache(data.train, data.train_keys, args.size, folder / f"train_{args.size}.npy", look_from(0)),
        cache(data.test, data.test_keys, args.size, folder / f"test_{args.size}.npy", look_from(len(data.names))),
    ]


def find_relatives(args, folder, records, names, labels, test_names):
    """Finds the images that show one source; writes duplicates.csv and duplicates.png.

    → (group of each image int [N], the training images first, summary for prepared.json).
    """
    embedding = embed(args, folder) if args.embed else None
    room = array_in_file(folder, "vectors", np.float32, len(records), grouping.VECTOR)
    with contextlib.nullcontext() if args.embed else room as vectors:
        candidates = grouping.candidates(records, vectors, embedding)
    pairs, evidence = grouping.relatives(records, candidates)
    groups = grouping.components(pairs, len(records))
    write_csv(folder / "duplicates.csv", grouping.table(pairs, evidence, groups, names, labels, test_names))
    with replacing(folder / "duplicates.png") as temporary:
        grouping.draw(temporary, records, pairs, evidence, groups, names, labels, test_names)
    return groups, grouping.summary(groups, names, labels, test_names)


@contextlib.contextmanager
def staging_folder(folder):
    """An empty folder beside the final files, in which all new ones are made, so that a run that fails or is killed
    leaves the earlier ones as they were."""
    staging = folder / ".new"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a killed run
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise UserError(
            f"{staging} can't be written ({error.strerror or error}): mend that, or use another --output"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging, folder, anew):
    """Gives the new files their names. prepared.json goes first and comes last: without it nothing is prepared."""
    (folder / "prepared.json").unlink(missing_ok=True)
    if anew:
        for path in [*folder.glob("*_*.npy"), *folder.glob("duplicates.*")]:
            path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "prepared.json"):
        os.replace(path, folder / path.name)


def earlier_prepared(folder, settings, args):
    """→ what an earlier run prepared from the same files with the same settings, or None where there is nothing yet.

    Other folds under the same name would make every model trained so far look better or worse than it is: refused.
    """
    if args.overwrite or not (folder / "prepared.json").exists():
        return None
    earlier = read_json(folder / "prepared.json", "run python 00_prepare.py")
    changed = [key for key, value in settings.items() if earlier.get(key) != value]
    if changed:
        raise UserError(
            f"{folder} was prepared with other {listing(changed)}: use another --output, or --overwrite to "
            "prepare anew (models trained on the present folds are then refused)"
        )
    if file_hash(folder / "folds.csv") != earlier["folds_hash"]:
        raise UserError(f"{folder / 'folds.csv'} was changed since: restore it, or --overwrite to make new folds")
    return earlier


if __name__ == "__main__":
    run(main)
