"""Reads the competition's files, checks them, decides the folds and caches the images.

    python 00_prepare.py                                   # input/ → output/prepared/
    python 00_prepare.py --size 384                        # adds a cache of another size; the folds stay
    python 00_prepare.py --limit 200 --output output/look  # a quick look at the whole chain
    python 00_prepare.py --train-images train_images --image-column image_id --sample-submit sample_submission.csv

Reads INPUT/train.csv, INPUT/sample_submit.csv, and the images straight out of INPUT/train.zip and INPUT/test.zip, or
out of the folders INPUT/train and INPUT/test. Writes OUTPUT/prepared: folds.csv, test.csv, train_448.npy,
test_448.npy, samples.png, prepared.json, duplicates.csv and duplicates.png: the images that show one source. Those stay
in one fold (--groups), or the CV would be measured on images that the model has seen.
"""

import contextlib
import hashlib
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd

import common
from common import UserError, listing, number, prepared_folder, say
from kit import copies, forecast
from kit.cache import array_in_file, cache, staged
from kit.folds import fold_table, given_groups, make_folds
from kit.images import ImageSource, contact_sheet
from kit.locks import locked
from kit.metrics import METRICS, default_metric
from kit.tables import SUBMISSIONS, check_unique, positive_class, read_labels, read_sample_submit


def make_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument_group("images").add_argument
    add("--size", type=number(int, 1), default=448, help="side in px of the cached images (thesis 3.1.1)")
    add("--train-images", metavar="NAME", help="zip or folder in --input; by default train.zip, else train")
    add("--test-images", metavar="NAME", help="zip or folder in --input; by default test.zip, else test")
    add("--unreadable", choices=("refuse", "grey"), default="refuse", help="grey: take what is left, else grey pixels")
    add("--limit", type=number(int, 1), metavar="N", help="a quick look: about N training and the first N test images")

    add = parser.add_argument_group("tables").add_argument
    add("--train-csv", default="train.csv", help="the table of images and labels")
    add("--image-column", default="image_name", help="its column of image names")
    add("--label-column", default="label", help="its column of labels")
    add("--metric", choices=("auto", *METRICS), default="auto", help="decides; auto: auc of two classes, else accuracy")
    add("--positive", metavar="LABEL", help="the class of two whose probability is wanted; of numbers the larger")
    add("--sample-submit", default="sample_submit.csv", help="the sample submission: the test images and the format")
    add("--submit-header", choices=("auto", "yes", "no"), default="auto", help="whether the sample has a header line")
    add("--submit-value", choices=("auto", *SUBMISSIONS), default="auto", help="what its one value column wants; auto: "
        "the label of several classes or where the sample shows words, else the probability")  # fmt: skip

    add = parser.add_argument_group("folds (thesis 3.1.2)").add_argument
    add("--folds", type=number(int, 2), default=5, help="number of stratified folds")
    add("--seed", type=number(int, 0), default=777, help="decides the folds (listing)")
    add("--overwrite", action="store_true", help="make everything anew; models of other folds are then refused")

    add = parser.add_argument_group("groups: images that must stay in one fold").add_argument
    add("--groups", default="auto", help="auto: copies of one source, found by kit/copies.py; none (the thesis); a "
        "column of the training table; or a FILE.csv with image_name,group")  # fmt: skip
    add("--embed", metavar="MODEL", help="find auto's candidates by the features of a timm model, not by SIFT words")
    add("--weights", help="of --embed: hub (the default), none, or a .safetensors or .pth file")
    return parser


# ---------------------------------------------------------------- what the competition gives


def read_competition(args):
    """Reads and checks all tables, and finds every image. → what is in them, and the settings that decide the folds."""
    names, labels, classes = read_labels(args)
    sources = {part: image_source(args, part) for part in ("train", "test")}
    test_names, submission = read_sample_submit(args, sources["test"], classes)
    positive = positive_class(args, classes, submission)
    classes = sorted(classes, key=lambda label: label == positive) if positive else classes
    metric = default_metric(classes) if args.metric == "auto" else args.metric
    if reason := METRICS[metric].fits(classes):
        raise UserError(f"--metric {metric} doesn't suit the classes {listing(classes)}: {reason}")
    groups, alone = (np.arange(len(names)), 0) if args.groups in ("auto", "none") else given_groups(args, names)
    if args.limit:
        rows, test_names = some_of_each(labels, args.limit, args.folds, args.seed), test_names[: args.limit]
        names, labels, groups = [names[i] for i in rows], [labels[i] for i in rows], groups[rows]
    names = dict(train=names, test=test_names)
    tables = dict(train=args.input / args.train_csv, test=args.input / args.sample_submit)
    content = hashlib.sha256(repr((names["train"], labels, test_names, groups.tolist())).encode()).hexdigest()
    settings = dict(
        made_from=dict(tables=content) | {f"{part}_images": source.fingerprint for part, source in sources.items()},
        task="classes", classes=classes, positive=positive, metric=metric, folds=args.folds, seed=args.seed,
        groups=args.groups + (f" by {args.embed} {args.weights or 'hub'}" if args.embed else ""),
        submission=submission, limit=args.limit,
    )  # fmt: skip
    groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(test_names))])  # a test image is a group
    keys = {part: find_all(sources[part], names[part], tables[part]) for part in sources}
    return SimpleNamespace(names=names, labels=labels, groups=groups, alone=alone, sources=sources, keys=keys,
        settings=settings)  # fmt: skip


def image_source(args, part):
    """The zip or folder of `part`: the one given by flag, else INPUT/part.zip, else INPUT/part."""
    given = getattr(args, f"{part}_images")
    paths = [args.input / name for name in ([given] if given else [f"{part}.zip", part])]
    for path in paths:
        if path.exists():
            return ImageSource(path)
    raise UserError(f"{paths[0]} is missing: put the competition's images there, or name them with --{part}-images")


def some_of_each(labels, count, least, seed):
    """→ the rows of about `count` labels: of each class its share, and at least `least`."""
    labels = pd.Series(labels).sample(frac=1, random_state=seed)
    of_class = labels.groupby(labels)
    share = (of_class.transform("size") * count / len(labels)).round().clip(lower=least)
    return np.sort(labels.index[of_class.cumcount() < share])


def find_all(source, names, table):
    """→ the source's key for each name. Raises UserError naming what the source lacks."""
    keys = [source.find(name) for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        raise UserError(f"{source.path} lacks {len(missing)} of the images in {table}: {listing(missing)}")
    check_unique(table, keys)  # two spellings of one file
    return keys


# ---------------------------------------------------------------- what is made of it


def earlier_prepared(args, data):
    """→ (prepared.json, folds.csv, its whole caches of this size) of an earlier run, or None. Raises UserError where
    files or settings differ: other folds would make every model trained so far look better or worse than it is."""
    folder = prepared_folder(args)
    if args.overwrite or not all((folder / name).exists() for name in ("prepared.json", "folds.csv")):
        return None
    prepared, folds = common.read_prepared(args)
    changed = [key for key, value in data.settings.items() if prepared.get(key) != value]
    if changed:
        remedy = "use another --output, or --overwrite to prepare anew (models of other folds are then refused)"
        raise UserError(f"{folder} was prepared with other {listing(changed)}: {remedy}")
    caches = []
    with contextlib.suppress(UserError):  # of another size, or lost or damaged: made again
        caches = [common.open_images(args, prepared, part, args.size, len(names)) for part, names in data.names.items()]
    return prepared, folds, caches


def prepare(args, data, new, earlier):
    """Makes all files in the folder `new`; after an `earlier` run, only the caches. → (prepared.json, folds.csv as a
    table, {part: Counter of the images' sizes})."""
    names, count, find = data.names["train"], len(data.groups), args.groups == "auto" and not earlier
    statistics = np.zeros((count, forecast.STATISTICS), np.float32)
    with array_in_file(new, copies.RECORD, count) if find else contextlib.nullcontext() as records:
        seen, unreadable = cache_all(args, data, new, statistics, records)
        groups, relatives = find_relatives(args, data, new, records) if find else (data.groups, None)
    if not earlier:
        shift = forecast.adversarial_validation(statistics, np.arange(count) >= len(names), groups, args.seed)
        folds = make_folds(names, data.labels, data.settings["classes"], groups[: len(names)], args.folds, args.seed)
        common.write_csv(new / "folds.csv", folds)
        common.write_csv(new / "test.csv", pd.DataFrame(dict(image_name=data.names["test"])))
        hashed = common.file_hash(new / "folds.csv")
        earlier = dict(sizes=[], folds_hash=hashed, relatives=relatives, shift=shift, unreadable=[]), folds, []
    prepared, folds, _ = earlier
    sizes, unreadable = {*prepared["sizes"], args.size}, dict.fromkeys([*prepared["unreadable"], *unreadable])
    prepared = data.settings | prepared | dict(sizes=sorted(sizes), unreadable=list(unreadable))
    draw_samples(args, new, folds, data.settings["classes"])
    common.write_json(new / "prepared.json", prepared)
    return prepared, folds, seen


def cache_all(args, data, folder, statistics, records):
    """Caches the images of both parts, and looks at each once on the way: fills `statistics` and `records`, if any.
    → ({part: Counter of the images' sizes}, unreadable images). Raises UserError naming those, unless they may be grey.
    """
    seen, unreadable, first = {}, [], 0
    for part, names in data.names.items():

        def look(i, image, first=first):
            statistics[first + i] = forecast.statistics(image)
            if records is not None:
                records[first + i] = copies.describe(image)

        path = folder / f"{part}_{args.size}.npy"
        seen[part], reasons = cache(data.sources[part], data.keys[part], args.size, path, look)
        unreadable += [f"{part}/{names[i]} ({reason})" for i, reason in reasons.items()]
        first += len(names)
    if unreadable and args.unreadable == "refuse":
        shown = f"{len(unreadable)} unreadable images: {listing(unreadable)}"
        raise UserError(f"{args.input} has {shown}: replace them, or go on with --unreadable grey")
    return seen, unreadable


def find_relatives(args, data, folder, records):
    """Finds the images that show one source; writes duplicates.csv and duplicates.png. → (group of each image int [N],
    the training images first, summary for prepared.json)."""
    images = data.names["train"], data.labels, data.names["test"]
    with array_in_file(folder, np.float32, len(records), copies.VECTOR) as vectors:
        candidates = copies.candidates(records, vectors, embed(args, folder) if args.embed else None)
    pairs, evidence = copies.relatives(records, candidates)
    groups = copies.components(pairs, len(records))
    common.write_csv(folder / "duplicates.csv", copies.table(pairs, evidence, groups, *images))
    copies.draw(folder / "duplicates.png", records, pairs, evidence, groups, *images)
    return groups, copies.summary(groups, *images)


def embed(args, folder):
    """Features of a timm model, of the training images and then the test images: float32 [N, D], of unit length."""
    import torch  # with timm it takes seconds to import; only --embed needs them

    from kit import device, model

    torch.manual_seed(args.seed)  # decides --weights none
    place = device.pick_device("auto")
    network = model.build_features(args.embed, args.size, args.weights or "hub").to(place)
    parts = [np.load(folder / f"{part}_{args.size}.npy", mmap_mode="r") for part in ("train", "test")]
    features = [model.predict(network, part, np.arange(len(part)), 32, place, bar="features") for part in parts]
    return copies.unit(np.concatenate(features))


# ---------------------------------------------------------------- what is shown


def draw_samples(args, folder, folds, classes, columns=6):
    """Draws samples.png: images of each class, as the cache holds them."""
    rng, sheet = np.random.default_rng(args.seed), []
    images = np.load(folder / f"train_{args.size}.npy", mmap_mode="r")
    for label in classes[:10]:
        rows = np.flatnonzero(folds.label == label)
        chosen = rng.choice(rows, min(columns, len(rows)), replace=False)
        sheet.append((f"label {label} · {len(rows)} images", [(images[i], folds.image_name[i]) for i in chosen]))
    contact_sheet(folder / "samples.png", sheet, columns)


def report(args, data, prepared, folds, seen):
    """Prints what was found: a topic a line, and how the classes lie in the folds."""
    submission, positive, unreadable = (prepared[key] for key in ("submission", "positive", "unreadable"))
    wanted = submission["value"]
    if wanted == "probability":
        wanted += " of each class" if submission["columns"] else f" of {positive!r}"
    topics = [(part, images_line(seen[part], len(data.sources[part].files))) for part in data.names]
    topics += [
        ("limit", args.limit and f"a quick look: the submission ends with test image {len(data.names['test'])}"),
        ("unreadable", unreadable and f"{len(unreadable)} images, grey where nothing is left: {listing(unreadable)}"),
        ("metric", METRICS[prepared["metric"]].name + (f", positive class {positive!r}" if positive else "")),
        ("submission", f"{'with' if submission['header'] else 'no'} header, {wanted}"),
        ("groups", data.alone and f"{data.alone} images have a blank cell for their group: each is its own group"),
        *zip(["groups", *[""] * 9], copies.report_lines(prepared["relatives"]), strict=False),
        *zip(["shift", *[""] * 9], forecast.report_lines(prepared["shift"]), strict=False),
    ]
    for topic, line in topics:
        if line:
            say(f"{topic:<12}{line}")
    say(f"\n{fold_table(folds, prepared['classes'])}\n")
    say(f"prepared {args.size} px → {prepared_folder(args)} (look at samples.png)")


def images_line(sizes, files):
    """'15 images, 96 × 96 (9), 80 × 60 (3), 64 × 64 (1) and 2 more sizes, 40 to 900 px; 2 more not used'"""
    sides, others = [side for size in sizes for side in size], len(sizes) - 3
    most = ", ".join(f"{w} × {h} ({n})" for (w, h), n in sizes.most_common(3))
    more = f" and {others} more sizes, {min(sides)} to {max(sides)} px" if others > 0 else ""
    return f"{sizes.total()} images, {most}{more}; {files - sizes.total()} more not used"


def main(args):
    if args.embed and args.groups != "auto":
        raise UserError("--embed helps --groups auto to find groups: leave it out, or leave out --groups")
    if args.weights and not args.embed:
        raise UserError("--weights belongs to --embed: give that too")
    cv2.setNumThreads(1)  # the threads of `cache` share the cores already
    data, folder = read_competition(args), prepared_folder(args)
    with locked(args.output / ".prepare.lock", folder):
        earlier = earlier_prepared(args, data)
        if earlier and earlier[2]:
            return say(f"{folder} is up to date: sizes {listing(earlier[0]['sizes'])} px. Nothing to do.")
        search = (copies.RECORD.itemsize + 4 * copies.VECTOR) * (args.groups == "auto" and not earlier)
        with staged(folder, len(data.groups) * (args.size**2 * 3 + search), anew=not earlier) as new:
            result = prepare(args, data, new, earlier)
    report(args, data, *result)


if __name__ == "__main__":
    common.run(main, make_parser())
