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

import contextlib
from collections import Counter

import cv2
import numpy as np
import pandas as pd

import common
from common import UserError, listing, number, prepared_folder, say
from kit import copies, forecast, labels, matched, tasks
from kit.cache import array_in_file, cache, staged
from kit.competition import SEARCHED, read_competition, understood
from kit.folds import fold_table, make_folds
from kit.images import draw_classes
from kit.locks import locked
from kit.metrics import METRICS
from kit.submission import SUBMISSIONS, write_tests
from kit.tables import refuse
from kit.tasks import TASKS


def make_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument_group("images").add_argument
    add("--size", type=number(int, 1), default=448, help="side in px of the cached images (thesis 3.1.1)")
    for part in ("train", "test"):
        add(f"--{part}-images", nargs="+", metavar="NAME", help=f"folders or archives in --input (default: {part}.zip, "
            f"else {part}, {part}_images, images)")  # fmt: skip
    add("--bands", type=number(int, 1), nargs=3, metavar="N", help="of images with more than three: which are red, "
        "green and blue, counted from 1")  # fmt: skip
    add("--channels", nargs=3, metavar="END", help="three files an image: what follows its name in that of red, green "
        "and blue, such as _red _green _blue")  # fmt: skip
    add("--unreadable", choices=("refuse", "grey"), default="refuse", help="grey: what can't be read becomes grey")
    add("--limit", type=number(int, 1), metavar="N", help="a quick look: about N training and the first N test images")

    add = parser.add_argument_group("tables").add_argument
    add("--train-csv", nargs="+", metavar="NAME", help="tables of images and labels: CSV, TSV or COCO-like JSON, in a "
        "zip or not (default: train.csv or another usual name; where there is none, folders are classes)")  # fmt: skip
    add("--train-header", choices=("auto", "yes", "no"), default="auto", help="whether it has a header; without, "
        "its columns are 1, 2, …")  # fmt: skip
    add("--join", metavar="NAME", help="another table, whose columns are added by those that both have")
    add("--image-column", metavar="NAME", help="the column of image names (default: image_name, else the first that "
        "names images)")  # fmt: skip
    add("--label-column", nargs="+", metavar="NAME", help="the column of labels, or several (default: label, else "
        "those that the sample submission's header names)")  # fmt: skip
    add("--label-form", choices=("auto", *labels.LABEL_FORMS), default="auto", help="class: one in a column; onehot: a "
        "column each, a 1 in one; binary: a column each, 1s in any; list: several in a cell; number")  # fmt: skip
    add("--separator", default=" ", metavar="TEXT", help="what stands between the labels of a list (default: a "
        "blank)")  # fmt: skip
    add("--label-pattern", metavar="REGEX", help="the class is what this finds in an image's path, such as (cat|dog)")
    add("--target-column", metavar="NAME", help="of a table with a row for each image and target: the targets' names; "
        "END: they follow the last _ of the image's name")  # fmt: skip
    add("--drop-unlabelled", action="store_true", help="leave out rows without a label")
    add("--metric", choices=("auto", *METRICS), default="auto", help="what is scored everywhere; auto: auc for two "
        "classes, accuracy for more and where labels are submitted, column-auc for labels, f1-samples where sets are "
        "submitted, rmse or mcrmse for numbers")  # fmt: skip
    add("--positive", nargs="+", metavar="LABEL", help="the class whose probability is wanted (default: the larger "
        "number); of more than two classes, several add up")  # fmt: skip
    add("--test-csv", metavar="NAME", help="the table of test images, where the sample's ids aren't image names")
    add("--per-id", choices=("mean", "max"), default="mean", help="of several images for one submitted id")
    add("--sample-submit", metavar="NAME", help="shows the submission's rows and format (default: "
        "sample_submit.csv or another usual name)")  # fmt: skip
    add("--submit-header", choices=("auto", "yes", "no"), default="auto", help="whether the sample has a header")
    add("--submit-value", choices=("auto", *SUBMISSIONS), default="auto", help="what the value cells hold; auto: "
        "by the task, the sample and the metric")  # fmt: skip

    add = parser.add_argument_group("folds (thesis 3.1.2)").add_argument
    add("--folds", type=number(int, 2), default=5, help="number of stratified folds")
    add("--seed", type=number(int, 0), default=777, help="seed of the random folds")
    add("--overwrite", action="store_true", help="prepare everything anew; models of other folds become unusable")

    add = parser.add_argument_group("groups: images that must stay in one fold").add_argument
    add("--groups", default="auto", help="auto: folds that are as hard as the test set looks, copies together "
        "(kit/matched.py); copies: those of one source together (kit/copies.py); none: as the thesis; a column of the "
        "training table; or a FILE.csv with image_name,group")  # fmt: skip
    add("--group-pattern", metavar="REGEX", help="in place of --groups: what this finds in an image's name, such as "
        "^[0-9]+")  # fmt: skip
    add("--embed", metavar="MODEL", help="auto and copies compare the features of this timm model too")
    add("--weights", help="of the --embed model: hub (the default), none, or a .safetensors or .pth file")
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
    prepared, folds = common.read_prepared(args)
    keys = dict.fromkeys([*data.settings, *(key for key in ("reading", "per_id", "ranges") if key in prepared)])
    changed = [key for key in keys if prepared.get(key) != data.settings.get(key)]
    remedy = "use another --output, or --overwrite to prepare anew (models of other folds become unusable)"
    refuse(folder, changed, f"was prepared with other *: {remedy}")
    try:
        for part, names in data.names.items():
            common.open_images(args, prepared, part, args.size, len(names))
    except UserError:
        prepared["sizes"] = [size for size in prepared["sizes"] if size != args.size]
    return prepared, folds


def prepare(args, data, new, earlier):
    """Makes all files in the folder `new`; after an `earlier` run, only the caches and samples.png. → (prepared.json,
    folds.csv as a table, {part: Counter of the images' (width, height)})."""
    search = args.groups in SEARCHED and not args.group_pattern and not earlier
    statistics = np.zeros((len(data.groups), forecast.STATISTICS), np.float32)
    with array_in_file(new, copies.RECORD, len(data.groups)) if search else contextlib.nullcontext() as records:
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
    shift = forecast.adversarial_validation(statistics, is_test, sources, args.seed)
    folds = make_folds(data.labels, held_together[~is_test], args.folds, args.seed)
    common.write_csv(new / "folds.csv", folds)
    write_tests(new, data.sample)
    made = dict(
        sizes=[], folds_hash=common.file_hash(new / "folds.csv"), relatives=relatives, ladder=ladder, shift=shift,
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
            statistics[first + i] = forecast.statistics(image)
            if records is not None:
                records[first + i] = copies.describe(image)

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
    with array_in_file(folder, np.float32, len(records), copies.VECTOR) as vectors:
        copies.words_and_colours(records, vectors)
        features = embed(args, folder) if args.embed else None
        candidates = copies.candidates(records, vectors if features is None else features)
        points = matched.describe(records, vectors, features, args.seed) if args.groups == "auto" else None
    pairs, evidence = copies.relatives(records, candidates)
    sources = copies.components(pairs, len(records))
    common.write_csv(folder / "duplicates.csv", copies.table(pairs, evidence, sources, *images))
    copies.draw(folder / "duplicates.png", records, pairs, evidence, sources, *images)
    held_together, ladder = (
        match_folds(args, data, folder, points, sources) if args.groups == "auto" else (sources, None)
    )
    return dict(held_together=held_together, sources=sources, relatives=copies.summary(sources, *images), ladder=ladder)


def match_folds(args, data, folder, points, sources):
    """→ (groups int [N], the ladder for prepared.json) of the folds that ask what the test set asks."""
    from kit import figures  # with matplotlib it takes a second; only this needs it

    targets = data.labels.targets
    how = args.folds, args.seed, data.settings["metric"], data.settings["task"]
    chosen, rungs = matched.match(points, sources[: len(targets)], targets, *how)
    if chosen is None:
        return sources, None
    images = {part: np.load(folder / f"{part}_{args.size}.npy", mmap_mode="r") for part in data.names}
    figures.draw_matched(folder / "matched.png", chosen, rungs, points, images, data.names, args.seed)
    groups = pd.factorize(chosen.groups)[0]
    tests = groups.max() + 1 + np.arange(len(sources) - len(groups))
    return np.concatenate([groups, tests]), matched.summary(chosen, rungs)


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


def report(args, data, prepared, folds, sizes):
    """Prints what was found: a topic a line, and how the classes lie in the folds."""
    submission, positive, unreadable = (prepared[key] for key in ("submission", "positive", "unreadable"))
    columns = f"each {TASKS[prepared['task']].noun}" if submission["columns"] else repr(positive)
    topics = []
    for (part, names), source in zip(data.names.items(), data.sources.values(), strict=True):
        shown = listing([f"{width} × {height} ({count})" for (width, height), count in sizes[part].most_common()], 3)
        topics.append((part, f"{len(names)} images, {shown}; {len(source.files) - len(names)} more not used"))
    topics += [
        ("limit", args.limit and f"a quick look: the submission ends with test image {len(data.names['test'])}"),
        ("unreadable", unreadable and f"{len(unreadable)} images, grey where nothing is left: {listing(unreadable)}"),
        ("metric", METRICS[prepared["metric"]].name + (f", positive class {positive!r}" if positive else "")),
        ("submission", f"{'with' if submission['header'] else 'no'} header, {submission['value']}"
            + f" of {columns}" * (submission["value"] == "probability")),
        ("groups", f"\n{'':12}".join(copies.report_lines(prepared["relatives"]))),
        ("folds", f"\n{'':12}".join(matched.report_lines(prepared.get("ladder"))) or (args.groups == "auto"
            and "not compared with the test set: too few images, or prepared by an older version of the kit")),
        ("shift", f"\n{'':12}".join(forecast.report_lines(prepared["shift"]))),
    ]  # fmt: skip
    say("\n".join(f"{topic:<12}{line}" for topic, line in topics if line))
    say(f"\n{fold_table(folds, prepared)}\n")
    say(f"prepared {args.size} px → {prepared_folder(args)} (look at samples.png)")


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
            return say(f"{folder} is up to date: sizes {listing(earlier[0]['sizes'])} px. Nothing to do.")
        an_image = args.size**2 * 3 + copies.RECORD.itemsize + 4 * copies.VECTOR  # bytes
        with staged(folder, len(data.groups) * an_image, anew=not earlier) as new:
            result = prepare(args, data, new, earlier)
    report(args, data, *result)


if __name__ == "__main__":
    common.run(main, make_parser())
