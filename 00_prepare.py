"""Preparation: reads and checks the competition's files, decides the folds, caches the images.

    python 00_prepare.py                                   # input/ → output/prepared/
    python 00_prepare.py --size 384                        # adds a cache of another size; the folds stay
    python 00_prepare.py --limit 200 --output output/look  # a quick look at all steps
    python 00_prepare.py --train-images train_images --image-column image_id --sample-submit sample_submission.csv

Reads INPUT/train.csv, INPUT/sample_submit.csv, and the images in INPUT/train.zip and INPUT/test.zip, or in folders of
these names; flags name others, and docs/competitions.md has the flags of 83 competitions. Writes OUTPUT/prepared:
prepared.json, folds.csv, test.csv, sample.csv, train_448.npy, test_448.npy, samples.png; duplicates.csv and .png (they
stay in one fold); matched.png (whether held-out images are as far from the training images as test images are).
"""

import contextlib
import os
from collections import Counter
from dataclasses import fields, replace

import common
from common import UserError, conclude, listing, number, say, wrapped

import cv2
import numpy as np
import pandas as pd

from kit.competition import read_competition, summary_line
from kit.data.decode import shrink
from kit.data.image_cache import SEEN, array_in_file, common_depth, staged, write_cache
from kit.data.labels import LABEL_FORMS
from kit.data.prepared import Flags, read_prepared
from kit.data.reading import decision_lines
from kit.data.tables import refuse
from kit.folds import duplicates, matching, shift, split
from kit.locks import locked
from kit.report.pictures import draw_classes, draw_duplicates, draw_matched
from kit.score.metrics import METRICS
from kit.submit.submission import SUBMISSIONS, write_tests

MOST_GREY = 0.05  # share of a part's images that --unreadable grey accepts


def make_parser():
    parser = common.Parser(__doc__, wrapped("Metrics: ", ", ".join(METRICS)))
    add = parser.group("what to prepare")
    add("--size", type=number(int, 1), default=448, metavar="PX", help="side of the cached images")
    add("--limit", type=number(int, 1), help="a quick look: about N training and the first N test images")
    add("--overwrite", action="store_true", help="prepare again; if the folds change, models become unusable")
    parser.shared(add)

    add = parser.group("the competition's files, in --input")
    add("--train-csv", nargs="+", help="tables of images and labels (default: train.csv or another usual name)")
    add("--train-images", nargs="+", help="folders or archives (default: train.zip, else train, train_images, images)")
    add("--test-images", nargs="+", help="folders or archives (default: test.zip, else test, test_images, images)")
    add("--sample-submit", help="rows and format of the submission (default: sample_submit.csv or another usual name)")
    add("--test-csv", help="the table of test images, where the sample's ids aren't image names")
    add("--join", help="another table, joined on the columns that both have")

    add = parser.group("images and labels")
    add("--image-column", help="the images' names (default: the column that names files)")
    add("--label-column", nargs="+", help="the labels (default: as the sample names them, else label)")
    add("--label-form", choices=("auto", *LABEL_FORMS), default="auto", help="what the label columns hold: %(choices)s")
    add("--separator", default=" ", metavar="TEXT", help="between the labels of a list (default: a blank)")
    add("--label-pattern", metavar="REGEX", help="the class is what this finds in an image's path, such as (cat|dog)")
    add("--target-column", help="a row per image and target: the column of target names; END: they end image names")
    add("--drop-unlabelled", action="store_true", help="leave out rows without a label")
    add("--encoding", help="of tables that aren't UTF-8, such as cp932, cp1252 or mac_roman (default: by their words)")
    add("--train-header", choices=("auto", "yes", "no"), default="auto", help="auto, yes, or no: columns are 1, 2, …")
    add("--bands", type=number(int, 1), nargs=3, metavar=("R", "G", "B"), help="red, green, blue bands, counted from 1")
    add("--channels", nargs=3, metavar=("R", "G", "B"), help="ends of an image's three files: _red _green _blue")
    add("--unreadable", choices=("refuse", "grey"), default="refuse", help="refuse: name them and end; grey: go on")

    add = parser.group("what is scored and submitted")
    add("--metric", choices=("auto", *METRICS), default="auto", help="auto: by the task and the sample; listed below")
    add("--submit-columns", nargs="+", metavar="COL", help="value columns, where the sample has none or no header")
    add("--class-values", nargs="+", metavar="A=B", action="extend", help="labels A of the training data are called B")
    add("--positive", nargs="+", metavar="LABEL", help="submitted class (default: the larger number); several add up")
    add("--submit-header", choices=("auto", "yes", "no"), default="auto", help="if the sample has one: %(choices)s")
    add("--submit-value", choices=("auto", *SUBMISSIONS), default="auto", help="what value cells hold: %(choices)s")
    add("--per-id", choices=("mean", "max"), default="mean", help="mean or max over the images of an id")

    add = parser.group("folds, and the images that stay in one (thesis 3.1.2)")
    add("--folds", type=number(int, 2), default=5, help="number of stratified folds")
    add("--groups", default="auto", metavar="HOW", help="auto: match the test set; copies: duplicates together; none; "
        "a column or CSV")  # fmt: skip
    add("--group-pattern", metavar="REGEX", help="the group is what this finds in an image's name, such as ^[0-9]+")
    add("--embed", metavar="MODEL", help="compare the features of this timm model too, to find duplicates")
    add("--weights", metavar="FILE", help="weights of the --embed model: hub, none, or a file (default: hub)")
    add("--seed", type=number(int, 0), default=777, help="seed of the folds")
    return parser


def changed_flags(flags):
    """Return the flags that aren't the defaults, for prepared.json."""
    defaults, folders = vars(make_parser().parse_args([])), ("input", "output", "overwrite")
    return {key: value for key, value in flags.items() if key not in folders and value != defaults[key]}


def earlier_run(competition, size, flags):
    """Return (Prepared, folds.csv) of an earlier run, or None. `sizes` lacks this size if its cache is damaged. A new
    metric and submission, which change no fold, are written into it, with the `flags`, those of 00 that aren't the
    defaults. Raises UserError where files or other settings differ: scores on other folds can't be compared."""
    folder, names = competition.prepared.folder, competition.names
    if not all((folder / name).exists() for name in ("prepared.json", "folds.csv")):
        return None
    earlier, folds = read_prepared(folder.parent)
    before, now = earlier.decisions(), competition.prepared.decisions()
    words = {f"{part}_images": f"files in {source.path}" for part, source in competition.sources.items()}
    files = [words.get(key, key) for key, value in now.pop("made_from").items() if before["made_from"][key] != value]
    changed = [key for key in now if before.get(key) != now[key]]
    asked = [key for key in changed if key in ("metric", "submission")]
    others = [key for key in changed if key not in asked] or files  # flags may change the files that are read
    remedy = "restore the earlier flags (see prepared.json) and files, or give another --output"
    again = "--overwrite prepares again; if the folds change, models become unusable"
    refuse(folder, others, f"was prepared with other *: {remedy}; {again}")
    if asked:
        earlier.metric, earlier.submission = now["metric"], now["submission"]
        earlier.evidence = competition.prepared.evidence
        earlier.flags = flags | dict(size=earlier.flags.get("size", 448))
        for candidate in (earlier.candidates or []) if "metric" in asked else []:
            candidate["score"] = None  # was by the other metric
        earlier.write()
        say(f"the {' and the '.join(asked)} changed; folds that are trained keep the earlier for other test images")
    if asked or not all((folder / name).exists() for name in ("test.csv", "sample.csv")):
        write_tests(folder, competition.sample)
    try:
        for part in names:
            earlier.open_images(part, size, len(names[part]))
    except UserError:
        earlier.sizes = [other for other in earlier.sizes if other != size]
    return earlier, folds


def cache_images(competition, prepared, folder, size, records, may_be_grey):
    """Cache the images of both parts in `folder`, fill `records` (RECORD [N + T] or None), and note in `prepared` the
    size and unreadable images. → ({"train", "test": uint8 [n, size, size, 3], memory-mapped}; float32 [N + T,
    STATISTICS] of kit/folds/shift.py). Raises UserError naming the unreadable images, unless they may be grey."""
    cv2.setNumThreads(1)  # the threads of `write_cache` share the cores already
    arrays, statistics = {}, np.zeros((len(competition.groups), shift.STATISTICS), np.float32)
    caches, depths = {}, {}
    for part, names in competition.names.items():
        first = len(competition.names["train"]) if part == "test" else 0

        def visit(i, picture, first=first):
            small = shrink(picture.pixels, 2 * SEEN)
            statistics[first + i] = shift.statistics(small, picture.size)
            if records is not None:
                records[first + i] = duplicates.image_record(small)

        path, source = folder / f"{part}_{size}.npy", competition.sources[part]
        if source.left_out:
            say(wrapped(f"{part:<12}", f"{len(source.left_out)} files left out: {listing(source.left_out, 5)}"))
        source.depth, caches[part] = prepared.depth, (source, names, size, path, visit)
        seen = write_cache(*caches[part])
        depths[part] = [depth for *_, depth in seen]
        arrays[part] = np.load(path, mmap_mode="r")
        unreadable = [f"{part}/{name} ({why})" for name, (_, why, _) in zip(names, seen, strict=True) if why]
        prepared.unreadable = [*dict.fromkeys(prepared.unreadable + unreadable)]
        shapes = Counter(f"{width} × {height}" for (width, height), *_ in seen).most_common()
        shapes = listing((f"{shape} ({count})" for shape, count in shapes), 3)
        more = f"; {len(source.files) - len(names)} more not used" * (len(source.files) > len(names))
        say(f"{part:<12}{len(names)} images, {shapes}{more}")
    refuse_unreadable(competition.names, prepared.unreadable, may_be_grey)
    if not prepared.sizes and (depth := common_depth([*depths["train"], *depths["test"]])):
        prepared.depth = depth
        for part, cache in caches.items():
            competition.sources[part].depth = depth
            write_cache(*cache, chosen=[i for i, own in enumerate(depths[part]) if own not in (None, depth)])
    prepared.sizes = sorted({*prepared.sizes, size})
    return arrays, statistics


def refuse_unreadable(names, unreadable, may_be_grey):
    """Raise UserError naming the unreadable images, unless they may be grey and are few of each part. names: {"train",
    "test": names of all images}; unreadable: PART/NAME (why)."""
    counts = {part: sum(text.startswith(f"{part}/") for text in unreadable) for part in names}
    many = [part for part, count in counts.items() if count > max(1, MOST_GREY * len(names[part]))]
    shares = [f", {100 * counts[part] / len(names[part]):.0f} % of {part}" for part in many]
    grey = f" (--unreadable grey accepts {100 * MOST_GREY:.0f} %)" if many else ", or give --unreadable grey"
    problem = f"has {len(unreadable)} unreadable images{''.join(shares)}: *: replace them{grey}"
    refuse("--input", (many or not may_be_grey) and unreadable, problem)


def check_embedding(name):
    """Raise UserError unless timm knows the model, before hours of reading images."""
    from kit.train.model import check_name  # torch and timm take seconds to import

    check_name(name, "--embed")


def find_duplicates(competition, folder, arrays, records, flags):
    """Find the images that show one source, and write duplicates.csv and .png. → (the source of each, int [N + T]; what
    stays in one fold, int [N + T]: sources joined with the given groups; the points by which --groups auto compares
    folds, or None)."""
    names, labels, given, points = competition.names, competition.labels, competition.groups, None
    features = []
    if flags.embed:
        from kit.train.inference import embed  # torch and timm take seconds to import

        size, weights = arrays["train"].shape[1], flags.weights or "hub"
        features = [embed(flags.embed, size, weights, flags.seed, [*arrays.values()])]
    with array_in_file(folder, np.float32, len(records), duplicates.VECTOR) as vectors:
        duplicates.words_and_colours(records, vectors)
        if flags.groups == "auto" and not flags.gives_groups:
            points = matching.feature_points(records, vectors, *(features or [None]), flags.seed)
        pairs = duplicates.candidate_pairs(records, vectors, *features)
    pairs, evidence = duplicates.verified_pairs(records, pairs)
    sources = split.components(pairs, len(records))
    disagree = duplicates.labels_disagree(sources[: len(names["train"])], labels)
    table = duplicates.table(pairs, evidence, sources, names["train"], labels.cells, disagree, names["test"])
    common.write_csv(folder / "duplicates.csv", table)
    draw_duplicates(folder / "duplicates.png", records, pairs, evidence, table)
    counts = competition.prepared.duplicates = duplicates.summary(sources, names["train"], disagree)
    counts["blank"] = int((records["digest"] == 0).sum())
    groups = split.components(np.concatenate([pairs, split.links(given)]), len(records))
    count = len({*groups[: len(names["train"])]})
    if count < flags.folds:
        alike = f"all images look like copies of {duplicates.sources_in_words(count)}"
        refuse("--groups copies:", flags.groups == "copies", f"{alike} (same part, same camera?): give --groups none")
        counts["few"] = count
        return sources, given, None
    if flags.gives_groups:
        counts["joined"] = duplicates.joined(pairs, evidence, given, len(names["train"]))
    return sources, groups, points


def choose_folds(competition, folder, arrays, statistics, sources, points):
    """Choose the folds in which no source is split; where `points` are given, those that match the test set, in which
    sources are split if it shares them. Writes folds.csv, test.csv, sample.csv, matched.png. → folds.csv as a table."""
    prepared, labels, groups = competition.prepared, competition.labels, sources[: len(competition.labels.names)]
    if points is not None:
        options = labels.targets, prepared.task, prepared.folds, prepared.seed, prepared.metric
        shared = duplicates.shares_sources(prepared.duplicates)
        chosen, candidates = matching.choose_folds(points, groups, *options, shared)
        if chosen:
            draw_matched(folder / "matched.png", chosen, candidates, points, arrays, competition.names, prepared.seed)
            prepared.candidates = matching.summary(chosen, candidates)
            groups = pd.factorize(chosen.groups)[0]
        elif shared:
            groups = np.arange(len(groups))
    is_test = np.arange(len(sources)) >= len(labels.names)
    prepared.shift = shift.adversarial_validation(statistics, is_test, sources, prepared.seed)
    folds = split.make_folds(labels, groups, prepared.folds, prepared.seed)
    common.write_csv(folder / "folds.csv", folds)
    write_tests(folder, competition.sample)
    prepared.folds_hash = common.file_hash(folder / "folds.csv")
    return folds


def report(competition, prepared, folds, size):
    """Print what was found: a topic a line, and how the classes are distributed over the folds."""
    task, unreadable = prepared.task, prepared.unreadable
    strata = task.strata(task.read_targets(folds.target))
    missing = split.classes_missing_from_training(folds.fold.to_numpy(), strata) if task.strata_are_classes else []
    missing, tests = listing(task.names[k] for k in missing), len(competition.names["test"])
    compared = prepared.groups.startswith("auto") and prepared.duplicates and not prepared.duplicates.get("few")
    plain = compared and "too few images to match the test set"
    topics = {
        "limit": prepared.limit and [f"a quick look at the first {tests} test images"],
        "unreadable": unreadable and [f"{len(unreadable)} images, partly or wholly grey: {listing(unreadable)}"],
        "groups": duplicates.duplicate_lines(prepared.duplicates),
        "folds": matching.matching_lines(prepared.candidates) or (plain and [plain]),
        "classes": missing and [f"all their images are in one fold, whose model never learns them: {missing}"],
        "shift": shift.shift_lines(prepared.shift),
    }
    for topic, lines in topics.items():
        for k, line in enumerate(lines or []):
            say(wrapped(f"{'' if k else topic:<12}", line))
    say(f"\n{split.fold_table(folds, task)}\n")
    pictures = listing(path.name for path in sorted(prepared.folder.glob("*.png"), reverse=True))
    conclude(f"prepared {size} px → {prepared.folder}: look at {pictures}")


def prepare(competition, earlier, folder, size, flags, may_be_grey):
    """Make all files in `folder`; after an `earlier` run only the images' cache and samples.png. → (Prepared, folds.csv
    as a table)."""
    prepared, folds = earlier or (competition.prepared, None)
    searched, count = flags.searched and not earlier, len(competition.groups)
    with array_in_file(folder, duplicates.RECORD, count) if searched else contextlib.nullcontext() as records:
        arrays, statistics = cache_images(competition, prepared, folder, size, records, may_be_grey)
        if not earlier:
            groups, points, picture = competition.groups, None, folder / "duplicates.png"
            try:
                if searched:
                    sources, groups, points = find_duplicates(competition, folder, arrays, records, flags)
                folds = choose_folds(competition, folder, arrays, statistics, groups, points)
            except UserError as error:
                if not picture.exists():
                    raise
                os.replace(picture, prepared.folder / picture.name)  # the rest of `folder` is removed
                raise UserError(f"{error}; see {prepared.folder / picture.name}") from None
            if searched:
                in_folds = folds.fold.groupby(sources[: len(folds)]).nunique()
                prepared.duplicates["split"] = int((in_folds > 1).sum())
    draw_classes(folder / "samples.png", arrays["train"], folds, prepared.task, prepared.seed)
    return prepared, folds


def main(args):
    flags = Flags(**{field.name: getattr(args, field.name) for field in fields(Flags)})
    refuse("--embed", flags.embed and not flags.searched, "finds copies, and --groups none wants none: leave out one")
    refuse("--weights", flags.weights and not flags.embed, "belongs to --embed: give that too")
    if flags.embed:
        check_embedding(flags.embed)
    competition, size = read_competition(flags), args.size
    folder, count = competition.prepared.folder, len(competition.groups)
    say(summary_line(competition))
    say("\n".join(decision_lines(competition.prepared.evidence)))
    with locked(args.output / ".prepare.lock", folder):
        given = changed_flags(vars(args))
        earlier = None if args.overwrite else earlier_run(competition, size, given)
        if earlier and size in earlier[0].sizes:
            return conclude(f"{folder} is up to date: sizes {listing(earlier[0].sizes)} px. Nothing to do.")
        needed = count * (size**2 * 3 + duplicates.RECORD.itemsize + 4 * duplicates.VECTOR)  # bytes
        with staged(folder, needed, clear=not earlier) as new:
            prepared, folds = prepare(competition, earlier, new, size, flags, args.unreadable == "grey")
            if not earlier:
                prepared.flags = given
            replace(prepared, folder=new).write()
    report(competition, prepared, folds, size)


if __name__ == "__main__":
    common.run(main, make_parser())
