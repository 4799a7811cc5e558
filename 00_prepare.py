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
    add("--weights", default="hub", help="of --embed: hub, none, or a .safetensors or .pth file")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: a mistyped flag answers at once

import contextlib
import csv
import hashlib
import io
import os
import shutil
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

import groups as grouping
import shift
from data import Augmentation, read_table
from images import ImageSource, decode, resize

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


# ---------------------------------------------------------------- tables


def read_rows(path, remedy):
    """→ the rows of a CSV file, as lists of strings, without blank lines. UTF-8 (with or without BOM) or cp932."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = raw.decode("cp932")
        except UnicodeDecodeError:
            raise UserError(f"{path} is neither UTF-8 nor cp932 text: save it as UTF-8") from None
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    if not rows:
        raise UserError(f"{path} is empty: {remedy}")
    ragged = [str(i + 1) for i, row in enumerate(rows) if len(row) != len(rows[0])]
    if ragged:
        raise UserError(f"{path}: row {listing(ragged)} hasn't as many cells as the first ({len(rows[0])}): mend it")
    return rows


def read_labels(args):
    """Reads the training table. → (image names, labels as given, the classes in order)."""
    path = args.input / args.train_csv
    header, *rows = read_rows(path, "put the competition's table there, or name it with --train-csv")
    header = [cell.strip() for cell in header]
    for flag, column in (("--image-column", args.image_column), ("--label-column", args.label_column)):
        if header.count(column) != 1:
            raise UserError(f"{path} has no single column {column!r} but {listing(header)}: name it with {flag}")
    if not rows:
        raise UserError(f"{path} has a header and no rows: download it again")
    names = [row[header.index(args.image_column)] for row in rows]
    labels = [row[header.index(args.label_column)].strip() for row in rows]
    check_unique(path, names)
    unlabelled = [name for name, label in zip(names, labels, strict=True) if label.lower() in ("", "nan")]
    if unlabelled:
        raise UserError(f"{path} has no label for {listing(unlabelled)}: label or remove them")
    counts = Counter(labels)
    if len(counts) < 2:
        raise UserError(f"{path} has one class only ({labels[0]}): a classifier needs two")
    small = [f"{label} ({count})" for label, count in counts.items() if count < args.folds]
    if small:
        raise UserError(f"{path} has fewer than {args.folds} images of {listing(small)}: add some, or lower --folds")
    return names, labels, class_order(counts)


def class_order(labels):
    """Sorted as whole numbers where all are, else as strings. Of two classes, the second is the positive one."""
    numeric = all(label.lstrip("-").isdecimal() for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if numeric else None)


def check_unique(path, names):
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{path} names {listing(repeated)} more than once: keep one row of each")


def read_sample_submit(args, source, classes):
    """Reads the sample submission. → (test image names in its order, the submission's format for prepared.json)."""
    path = args.input / args.sample_submit
    rows = read_rows(path, "put the competition's sample there, or name it with --sample-submit")
    headed = {"yes": True, "no": False, "auto": source.find(rows[0][0]) is None}[args.submit_header]
    header, rows = (rows[0], rows[1:]) if headed else (None, rows)
    names = [row[0] for row in rows]
    if not names:
        raise UserError(f"{path} names no test image: download it again, or see --submit-header")
    check_unique(path, names)
    width = len(rows[0]) - 1
    if width == 1:
        value, columns = args.submit_value, None
        if value == "auto":
            shown = {row[1].strip() for row in rows}
            value = "label" if len(classes) > 2 or (shown <= set(classes) and not is_number(classes)) else "probability"
        if value == "probability" and len(classes) > 2:
            raise UserError(f"{path} has one column for {len(classes)} classes: --submit-value label fills it")
    else:
        value, columns = "probability", [cell.strip() for cell in header[1:]] if header else classes
        if sorted(columns) != sorted(classes) or width != len(classes):
            raise UserError(
                f"{path} has {width} value columns ({listing(columns)}), and the classes are {listing(classes)}: "
                "there must be one column, or one for each class"
            )
    return names, dict(header=header, value=value, columns=columns)


def is_number(texts):
    return all(text.replace(".", "", 1).lstrip("-").isdecimal() for text in texts)


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
            image = decode(source.read(key))
        except (ValueError, zipfile.BadZipFile, RuntimeError, NotImplementedError, zipfile.zlib.error) as error:
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
def record_file(folder, count):
    """An array [count] of groups.RECORD that lies in a temporary file, so that memory doesn't grow with the data."""
    path = folder / f".tmp{os.getpid()}.records"
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, count * grouping.RECORD.itemsize)  # a full disk is an error here
        yield np.memmap(path, grouping.RECORD, "r+", shape=(count,))
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


def given_groups(args, names):
    """The groups that the user names: a column of train.csv or a table image_name,group. → int [N]."""
    if args.groups.endswith(".csv"):
        path = Path(args.groups)
        header, *rows = read_rows(path, "name a table with the columns image_name,group with --groups")
        if header != ["image_name", "group"]:
            raise UserError(f"{path} has the columns {listing(header)}: it needs image_name,group")
        check_unique(path, [row[0] for row in rows])
        found = dict(rows)
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"{path} has no group for {listing(missing)}: add them")
        values = [found[name] for name in names]
    else:
        path = args.input / args.train_csv
        header, *rows = read_rows(path, "put the competition's table there")
        header = [cell.strip() for cell in header]
        if header.count(args.groups) != 1:
            raise UserError(f"--groups {args.groups}: {path} has no such column but {listing(header)}")
        values = [row[header.index(args.groups)].strip() for row in rows]
    return pd.factorize(pd.Series(values))[0]


def embed(args, folder):
    """Features of a timm model, of the training images and then the test images: float32 [N, D]."""
    import torch  # with timm it takes seconds to import; only --embed needs it

    import model as models

    device = models.pick_device("auto")
    config = dict(model=args.embed, model_kwargs={}, weights=args.weights, head="fresh", size=args.size, norm="model")
    torch.manual_seed(args.seed)
    network = models.build_model(config, 0).to(device)
    parts = [np.load(folder / f"{part}_{args.size}.npy", mmap_mode="r") for part in ("train", "test")]
    return np.concatenate(
        [models.predict(network, images, np.arange(len(images)), 32, device, bar="features") for images in parts]
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rng, augment = np.random.default_rng(seed), Augmentation("d4")
    shown = classes[:10]
    figure, axes = plt.subplots(
        2 * len(shown), columns, figsize=(2 * columns + 1, 4.2 * len(shown)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, label in enumerate(shown):
        rows = np.flatnonzero(folds.label == label)
        for column, i in enumerate(rng.choice(rows, min(columns, len(rows)), replace=False)):
            before, after = axes[2 * row, column], axes[2 * row + 1, column]
            before.imshow(images[i])
            before.set_title(folds.image_name[i].replace("$", r"\$"), fontsize=8)
            after.imshow(augment(images[i], seed=int(i)))
        axes[2 * row, 0].set_ylabel(f"label {label}".replace("$", r"\$"))
        axes[2 * row + 1, 0].set_ylabel("augmented")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    plt.close(figure)


# ---------------------------------------------------------------- main


def main():
    args = ARGS
    cv2.setNumThreads(1)  # the threads of `cache` share the cores already
    folder = prepared_folder(args)
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
    groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(test_names))])  # each test image by itself
    earlier = earlier_prepared(folder, settings, args)
    sizes = earlier["sizes"] if earlier else []
    if args.size in sizes:
        say(f"{folder} is up to date: {args.folds} folds, seed {args.seed}, sizes {listing(sizes)} px. Nothing to do.")
        return

    folder.mkdir(parents=True, exist_ok=True)
    find = args.groups == "auto" and not earlier
    check_disk(folder, (len(names) + len(test_names)) * (args.size**2 * 3 + find * grouping.RECORD.itemsize))
    if not earlier:
        remove_stale(folder)
    statistics = np.zeros((len(names) + len(test_names), shift.STATISTICS), np.float32)
    with record_file(folder, len(statistics)) if find else contextlib.nullcontext() as records:

        def look_from(first):
            def look(i, image):
                statistics[first + i] = shift.statistics(image)
                if find:
                    records[first + i] = grouping.describe(image)

            return look

        train_sizes = cache(train, train_keys, args.size, folder / f"train_{args.size}.npy", look_from(0))
        test_sizes = cache(test, test_keys, args.size, folder / f"test_{args.size}.npy", look_from(len(names)))
        relatives = None
        if find:
            groups, relatives = find_relatives(args, folder, records, names, labels, test_names)
    if earlier:
        findings = {key: earlier[key] for key in ("relatives", "shift")}
    else:
        is_test = np.arange(len(statistics)) >= len(names)
        found = shift.adversarial_validation(statistics, is_test, groups, args.seed)
        findings = dict(relatives=relatives, shift=found)
        table = make_folds(names, labels, classes, groups[: len(names)], args.folds, args.seed)
        write_csv(folder / "folds.csv", table)
        write_csv(folder / "test.csv", pd.DataFrame(dict(image_name=test_names)))
    folds = read_table(folder / "folds.csv", "run it again")
    draw_samples(
        folder / "samples.png", np.load(folder / f"train_{args.size}.npy", mmap_mode="r"), folds, classes, args.seed
    )
    write_json(
        folder / "prepared.json",
        settings | findings | dict(sizes=sorted([*sizes, args.size]), folds_hash=file_hash(folder / "folds.csv")),
    )
    for part, source, used, seen in (("train", train, names, train_sizes), ("test", test, test_names, test_sizes)):
        say(f"{part:5}  {len(used)} images, {size_line(seen)}; {len(source.files) - len(used)} more that no row names")
    say(f"submission  {'with' if submission['header'] else 'no'} header, {submission['value']}")
    for line in [*grouping.report_lines(findings["relatives"]), *shift.report_lines(findings["shift"])]:
        say(line)
    say(f"\n{fold_table(folds, classes)}\n\nprepared {args.size} px → {folder} (look at samples.png)")


def find_relatives(args, folder, records, names, labels, test_names):
    """Finds the images that show one source; writes duplicates.csv and duplicates.png.

    → (group of each image int [N], the training images first, summary for prepared.json).
    """
    embedding = embed(args, folder) if args.embed else None
    pairs, evidence = grouping.relatives(records, grouping.candidates(records, embedding))
    groups = grouping.components(pairs, len(records))
    write_csv(folder / "duplicates.csv", grouping.table(pairs, evidence, groups, names, labels, test_names))
    with replacing(folder / "duplicates.png") as temporary:
        grouping.draw(temporary, records, pairs, evidence, groups, names, labels, test_names)
    return groups, grouping.summary(groups, names, labels, test_names)


def remove_stale(folder):
    """Clears what an earlier or a broken run left, prepared.json first: without it nothing counts as prepared."""
    for path in [folder / "prepared.json", *folder.glob("*_*.npy"), *folder.glob("duplicates.*")]:
        path.unlink(missing_ok=True)


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
