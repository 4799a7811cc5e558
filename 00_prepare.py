"""Reads the competition's files, checks them, decides the folds and caches the images.

    python 00_prepare.py                                   # input/ → output/prepared/
    python 00_prepare.py --size 384                        # adds a cache of another size; the folds stay
    python 00_prepare.py --limit 200 --output output/look  # a quick look at the whole chain
    python 00_prepare.py --train-images train_images --image-column image_id --sample-submit sample_submission.csv

Reads INPUT/train.csv, INPUT/sample_submit.csv, and the images in INPUT/train.zip and INPUT/test.zip, or in folders of
these names; flags name others, and docs/competitions.md has the flags of 83 competitions. Writes OUTPUT/prepared:
folds.csv, test.csv, sample.csv, train_448.npy, test_448.npy, samples.png, prepared.json.
duplicates.csv and .png show the copies of one source: they stay in one fold, or the CV would flatter the model.
matched.png shows whether the folds ask what the test set asks.
"""

import common  # first: it makes the other imports faster

# isort: split
import contextlib
from collections import Counter

import cv2
import numpy as np
import pandas as pd

from common import UserError, conclude, listing, number, prepared_folder, say, wrapped
from kit.competition import SEARCHED, read_competition, understood
from kit.data import labels
from kit.data.image_cache import array_in_file, cache, staged
from kit.data.prepared import open_images, read_prepared
from kit.data.tables import refuse
from kit.folds import duplicates, matching, shift
from kit.folds.split import fold_table, make_folds
from kit.locks import locked
from kit.report import pictures
from kit.report.pictures import draw_classes
from kit.score import tasks
from kit.score.metrics import METRICS
from kit.submit.submission import SUBMISSIONS, write_tests

PICTURES = "samples.png", "duplicates.png", "matched.png"


def make_parser():
    parser = common.Parser(__doc__, wrapped("Metrics: ", ", ".join(METRICS)))
    add = parser.group("what to prepare")
    add("--size", type=number(int, 1), default=448, metavar="PX", help="side of the cached images")
    add("--limit", type=number(int, 1), help="a quick look: about N training and the first N test images")
    add("--overwrite", action="store_true", help="prepare everything anew; models of other folds become unusable")
    parser.shared(add)

    add = parser.group("the competition's files, in --input")
    add("--train-csv", nargs="+", help="tables of images and labels (default: train.csv or another usual name)")
    for part in ("train", "test"):
        usual = f"{part}.zip, else {part}, {part}_images, images"
        add(f"--{part}-images", nargs="+", help=f"folders or archives (default: {usual})")
    add("--sample-submit", help="rows and format of the submission (default: sample_submit.csv or another usual name)")
    add("--test-csv", help="the table of test images, where the sample's ids aren't image names")
    add("--join", help="another table, whose columns are added by those that both have")

    add = parser.group("images and labels in the tables")
    add("--image-column", help="the images' names (default: image_name, else the first that fits)")
    add("--label-column", nargs="+", help="the labels (default: label, else those that the sample's header names)")
    add("--label-form", choices=("auto", *labels.LABEL_FORMS), default="auto", help="what the label columns hold: "
        "%(choices)s")  # fmt: skip
    add("--separator", default=" ", metavar="TEXT", help="between the labels of a list (default: a blank)")
    add("--label-pattern", metavar="REGEX", help="the class is what this finds in an image's path, such as (cat|dog)")
    add("--target-column", help="of a row for each image and target: the targets' names; END: they end image names")
    add("--drop-unlabelled", action="store_true", help="leave out rows without a label")
    add("--train-header", choices=("auto", "yes", "no"), default="auto", help="whether the table has a header: yes or "
        "no; without, columns are 1, 2, …")  # fmt: skip

    add = parser.group("what is scored and submitted")
    add("--metric", choices=("auto", *METRICS), default="auto", help="what decides; auto: by the task and the "
        "sample; all are listed below")  # fmt: skip
    add("--positive", nargs="+", metavar="LABEL", help="the class whose probability is submitted (default: the larger "
        "number); several add up")  # fmt: skip
    add("--submit-header", choices=("auto", "yes", "no"), default="auto", help="whether there is one: %(choices)s")
    add("--submit-value", choices=("auto", *SUBMISSIONS), default="auto", help="what its cells hold: %(choices)s")
    add("--per-id", choices=("mean", "max"), default="mean", help="mean or max of an id's several images")

    add = parser.group("folds, and the images that stay in one (thesis 3.1.2)")
    add("--folds", type=number(int, 2), default=5, help="number of stratified folds")
    add("--groups", default="auto", metavar="HOW", help="auto: as hard as the test set; copies: those of a source; "
        "none; a column; a CSV")  # fmt: skip
    add("--group-pattern", metavar="REGEX", help="the group is what this finds in an image's name, such as ^[0-9]+")
    add("--embed", metavar="MODEL", help="--groups auto and copies compare the features of this timm model too")
    add("--weights", metavar="FILE", help="of --embed: hub, none, or a .safetensors or .pth file (default: hub)")
    add("--seed", type=number(int, 0), default=777, help="decides what is random in the folds")

    add = parser.group("unusual images")
    add("--bands", type=number(int, 1), nargs=3, metavar=("R", "G", "B"), help="of images with more than three bands: "
        "which these are, counted from 1")  # fmt: skip
    add("--channels", nargs=3, metavar=("R", "G", "B"), help="three files an image: the ends of their names, such as "
        "_red _green _blue")  # fmt: skip
    add("--unreadable", choices=("refuse", "grey"), default="refuse", help="refuse: name them and end; grey: what "
        "can't be read becomes grey")  # fmt: skip
    return parser


def given(args):
    """→ the flags that aren't the defaults, for whoever remakes the folds."""
    usual = vars(make_parser().parse_args([]))
    folders = ("input", "output", "overwrite")
    return {key: value for key, value in vars(args).items() if key not in folders and value != usual[key]}


def earlier_prepared(args, data):
    """→ (prepared.json, folds.csv) of an earlier run, or None. `sizes` lacks this size if its cache is damaged.
    Raises UserError where files or settings differ: scores on other folds can't be compared with those so far."""
    folder = prepared_folder(args)
    if args.overwrite or not all((folder / name).exists() for name in ("prepared.json", "folds.csv", "test.csv")):
        return None
    prepared, folds = read_prepared(args)
    keys = dict.fromkeys([*data.settings, *(key for key in ("reading", "per_id", "ranges") if key in prepared)])
    changed = [key for key in keys if prepared.get(key) != data.settings.get(key)]
    remedy = "give the flags of that time again (prepared.json has them), or another --output"
    anew = "--overwrite prepares anew, and models of other folds become unusable"
    refuse(folder, changed, f"was prepared with other *: {remedy}; {anew}")
    try:
        for part, names in data.names.items():
            open_images(args, prepared, part, args.size, len(names))
    except UserError:
        prepared["sizes"] = [size for size in prepared["sizes"] if size != args.size]
    return prepared, folds


def prepare(args, data, new, earlier):
    """Makes all files in the folder `new`; after an `earlier` run, only the caches and samples.png. → (prepared.json,
    folds.csv as a table, {part: Counter of the images' (width, height)})."""
    search = args.groups in SEARCHED and not args.group_pattern and not earlier
    statistics = np.zeros((len(data.groups), shift.STATISTICS), np.float32)
    with array_in_file(new, duplicates.RECORD, len(data.groups)) if search else contextlib.nullcontext() as records:
        sizes, unreadable = cache_all(args, data, new, statistics, records)
        found = find_groups(args, data, new, records) if search else dict(held_together=data.groups)
    prepared, folds = earlier or decide_folds(args, data, new, statistics, **found)
    prepared["sizes"] = sorted({*prepared["sizes"], args.size})
    prepared["unreadable"] = list(dict.fromkeys([*prepared["unreadable"], *unreadable]))
    images = np.load(new / f"train_{args.size}.npy", mmap_mode="r")
    draw_classes(new / "samples.png", images, folds, tasks.examples(prepared, folds), args.seed)
    common.write_json(new / "prepared.json", prepared)
    return prepared, folds, sizes


def decide_folds(args, data, new, statistics, held_together, sources=None, relatives=None, ladder=None):
    """Writes folds.csv and test.csv; the other arguments are what find_groups gives. → (what prepared.json says before
    any image is cached, folds.csv as a table)."""
    is_test = np.arange(len(data.groups)) >= len(data.names["train"])
    sources = held_together if sources is None else sources
    validation = shift.adversarial_validation(statistics, is_test, sources, args.seed)
    folds = make_folds(data.labels, held_together[~is_test], args.folds, args.seed)
    common.write_csv(new / "folds.csv", folds)
    write_tests(new, data.sample)
    made = dict(
        sizes=[], folds_hash=common.file_hash(new / "folds.csv"), relatives=relatives, ladder=ladder, shift=validation,
        flags=given(args),
    )  # fmt: skip
    return data.settings | made | dict(unreadable=[]), folds


def cache_all(args, data, folder, statistics, records):
    """Caches the images of both parts, and looks at each once on the way: fills `statistics` and `records`, if any.
    → ({part: Counter of the images' (width, height)}, names of the unreadable ones with the reasons). Raises UserError
    naming those, unless they may be grey."""
    sizes, unreadable, first = {}, [], 0
    for part, names in data.names.items():

        def look(i, image, first=first):
            statistics[first + i] = shift.statistics(image)
            if records is not None:
                records[first + i] = duplicates.describe(image)

        seen = cache(data.sources[part], names, args.size, folder / f"{part}_{args.size}.npy", look)
        sizes[part] = Counter(size for size, _ in seen)
        unreadable += [f"{part}/{name} ({why})" for name, (_, why) in zip(names, seen, strict=True) if why]
        first += len(names)
    problem = f"has {len(unreadable)} unreadable images: *: replace them, or go on with --unreadable grey"
    refuse(args.input, args.unreadable == "refuse" and unreadable, problem)
    return sizes, unreadable


def find_groups(args, data, folder, records):
    """Finds the images that show one source, and with --groups auto the folds that match the test set. Writes
    duplicates.csv, duplicates.png, matched.png. → dict(held_together, sources: groups int [N], the training images
    first; relatives, ladder: for prepared.json)."""
    images = data.names["train"], data.labels.cells, data.names["test"]
    with array_in_file(folder, np.float32, len(records), duplicates.VECTOR) as vectors:
        duplicates.words_and_colours(records, vectors)
        features = embed(args, folder) if args.embed else None
        candidates = duplicates.candidates(records, vectors if features is None else features)
        points = matching.describe(records, vectors, features, args.seed) if args.groups == "auto" else None
    pairs, evidence = duplicates.relatives(records, candidates)
    sources = duplicates.components(pairs, len(records))
    common.write_csv(folder / "duplicates.csv", duplicates.table(pairs, evidence, sources, *images))
    pictures.draw(folder / "duplicates.png", records, pairs, evidence, sources, *images)
    held_together, ladder = (
        match_folds(args, data, folder, points, sources) if args.groups == "auto" else (sources, None)
    )
    return dict(
        held_together=held_together, sources=sources, relatives=duplicates.summary(sources, *images), ladder=ladder
    )


def match_folds(args, data, folder, points, sources):
    """→ (groups int [N], the ladder for prepared.json) of the folds that ask what the test set asks."""
    from kit.report import pictures

    targets = data.labels.targets
    how = args.folds, args.seed, data.settings["metric"], data.settings["task"]
    chosen, rungs = matching.match(points, sources[: len(targets)], targets, *how)
    if chosen is None:
        return sources, None
    images = {part: np.load(folder / f"{part}_{args.size}.npy", mmap_mode="r") for part in data.names}
    pictures.draw_matched(folder / "matched.png", chosen, rungs, points, images, data.names, args.seed)
    groups = pd.factorize(chosen.groups)[0]
    tests = groups.max() + 1 + np.arange(len(sources) - len(groups))
    return np.concatenate([groups, tests]), matching.summary(chosen, rungs)


def embed(args, folder):
    """Features of a timm model, of the training images and then the test images: float32 [N, D], of unit length."""
    import torch  # with timm it takes seconds to import; only --embed needs them

    from kit.train import device, inference, model

    torch.manual_seed(args.seed)  # decides --weights none
    place = device.pick_device("auto")
    network = model.build_features(args.embed, args.size, args.weights or "hub").to(place)
    parts = [np.load(folder / f"{part}_{args.size}.npy", mmap_mode="r") for part in ("train", "test")]
    features = [inference.predict(network, part, np.arange(len(part)), 32, place, bar="features") for part in parts]
    return matching.unit(np.concatenate(features))


def report(args, data, prepared, folds, sizes):
    """Prints what was found: a topic a line, and how the classes lie in the folds."""
    submission, positive, unreadable = (prepared[key] for key in ("submission", "positive", "unreadable"))
    topics, folder = [], prepared_folder(args)
    for (part, names), source in zip(data.names.items(), data.sources.values(), strict=True):
        shown = listing([f"{width} × {height} ({count})" for (width, height), count in sizes[part].most_common()], 3)
        more = len(source.files) - len(names)
        topics.append((part, [f"{len(names)} images, {shown}" + f"; {more} more not used" * (more > 0)]))
    kept = args.groups == "auto" and "not compared with the test set: too few images, or prepared by an older version"
    topics += [
        ("limit", args.limit and [f"a quick look: the submission ends with test image {len(data.names['test'])}"]),
        ("unreadable", unreadable and [f"{len(unreadable)} images, grey where nothing is left: {listing(unreadable)}"]),
        ("positive", positive and (submission["columns"] or submission["value"] != "probability") and [repr(positive)]),
        ("groups", duplicates.report_lines(prepared["relatives"])),
        ("folds", matching.report_lines(prepared.get("ladder")) or (kept and [kept])),
        ("shift", shift.report_lines(prepared["shift"])),
    ]
    for topic, lines in topics:
        for k, line in enumerate(lines or []):
            say(wrapped(f"{'' if k else topic:<12}", line))
    say(f"\n{fold_table(folds, prepared)}\n")
    pictures = [name for name in PICTURES if (folder / name).exists()]
    conclude(f"prepared {args.size} px → {folder}: look at {listing(pictures)}")


def main(args):
    refuse(
        "--embed",
        args.embed and args.groups not in SEARCHED,
        "helps --groups auto and copies: leave out one of them",
    )
    refuse("--weights", args.weights and not args.embed, "belongs to --embed: give that too")
    cv2.setNumThreads(1)  # the threads of `cache` share the cores already
    data, folder = read_competition(args), prepared_folder(args)
    say(understood(data))
    with locked(args.output / ".prepare.lock", folder):
        earlier = earlier_prepared(args, data)
        if earlier and args.size in earlier[0]["sizes"]:
            return conclude(f"{folder} is up to date: sizes {listing(earlier[0]['sizes'])} px. Nothing to do.")
        an_image = args.size**2 * 3 + duplicates.RECORD.itemsize + 4 * duplicates.VECTOR  # bytes
        with staged(folder, len(data.groups) * an_image, anew=not earlier) as new:
            result = prepare(args, data, new, earlier)
    report(args, data, *result)


if __name__ == "__main__":
    common.run(main, make_parser())
