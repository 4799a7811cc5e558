"""The assembled competition: tables and images put together into labels, metric, groups and sample submission."""

import hashlib
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from common import UserError, listing, prepared_folder, say, warn

import numpy as np
import pandas as pd

from kit.data import image_source, labels, tables
from kit.data.image_source import ImageSource, PixelSource, check_images, find_images
from kit.data.prepared import FLAGS_FOR_TEST, Flags, Prepared
from kit.data.reading import Decision, fit_of
from kit.folds.split import given_groups, make_folds, rarest_labels
from kit.score.metrics import METRICS, reason_against
from kit.submit.sample_submission import Sample, read_sample, read_sample_cells
from kit.submit.submission import SUBMISSIONS


@dataclass
class Competition:
    """What read_competition found. N images: the training images, then the test images."""

    names: dict[str, list[str]]  # "train", "test" → names of the images
    labels: labels.TrainingLabels
    sample: Sample
    groups: np.ndarray  # int [N], before any image is looked at; a test image is a group of its own
    sources: dict[str, ImageSource | PixelSource]  # "train", "test" → where the images are
    prepared: Prepared  # decided so far; of the fields from `sizes` on only `evidence`


def read_competition(flags: Flags) -> Competition:
    """Read and check all tables, and find every image. Raises UserError for whatever doesn't fit."""
    sources = {part: find_images(part, flags) for part in ("train", "test")}
    sample_path = tables.find_table(flags.input, flags.sample_submit, tables.SAMPLE)
    tests = sources["test"].table or read_test_table(sources["test"], sample_path, flags)
    cells = read_sample_cells(sample_path, sources["test"], tests, flags)
    table = read_training_table(sources["train"], cells, flags)
    training = labels.read_labels(table, sources["train"], cells, flags)
    sample = read_sample(cells, sources["test"], training.task, tests, flags, training.columns)
    training = training.with_task(sample.task)
    metric, decision = pick_metric(flags.metric, sample)
    files = files_decision(flags, table, sample_path, sources)
    decisions = [files, *training.decisions, *sample.decisions, decision, groups_decision(flags)]
    groups = np.arange(len(training.names))
    if flags.gives_groups:
        groups = given_groups(flags, training.names, table, training.image_column)
    if flags.limit:
        rows = rows_of_each_class(training, flags.limit, flags.folds, flags.seed)
        training, groups, sample = training.part(rows), groups[rows], sample.part(flags.limit)
    check_images(sources["train"], training.names, table.path if table else sources["train"].path)
    check_images(sources["test"], sample.images, sample_path)
    warn_of_shared_images(sources, training.names, sample.images)
    make_folds(training, groups, flags.folds, flags.seed)  # raises now what would be raised after caching
    content = (training.names, training.cells, sample.images, groups.tolist())
    hashes = {f"{part}_images": source.fingerprint for part, source in sources.items()}
    for_test = {name: getattr(flags, name) for name in FLAGS_FOR_TEST}
    embedded = f" by {flags.embed} {flags.weights or 'hub'}" if flags.embed else ""
    prepared = Prepared(
        folder=prepared_folder(flags.output),
        made_from=dict(tables=hashlib.sha256(repr(content).encode()).hexdigest()) | hashes,
        task=training.task, metric=metric, folds=flags.folds, seed=flags.seed,
        groups=" and ".join(filter(None, (flags.group_pattern, flags.groups + embedded))),
        submission=sample.form, limit=flags.limit,
        per_id=flags.per_id if len(sample.images) != len({*sample.submission_ids}) else None,
        reading={name: value for name, value in for_test.items() if value not in (None, "auto", " ")},
        evidence=[decision._asdict() for decision in decisions],
    )  # fmt: skip
    groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(sample.images))])
    return Competition(dict(train=training.names, test=sample.images), training, sample, groups, sources, prepared)


def warn_of_shared_images(sources, names, tests):
    """Warn where a file is both a training and a test image, as when the parts share a folder."""
    if str(sources["train"].path) == str(sources["test"].path) and not sources["train"].table:
        shared = [*{*map(sources["train"].find, names)} & {*map(sources["test"].find, tests)}]
        if shared:
            warn(f"{len(shared)} files are training and test images both: {listing(shared)}")


def read_training_table(source, sample, flags):
    """Return the training Table, or None where the images' paths hold their labels. sample: its SampleCells. Raises
    UserError where another table of a usual name has the columns that the sample names."""
    if source.table:
        return source.table
    paths = [tables.find_table(flags.input, name, tables.TRAIN) for name in flags.train_csv or [None]]
    in_folders = len({key.rpartition("/")[0] for key in source.files}) > 1
    if flags.label_pattern or (in_folders and not flags.train_csv and not paths[0].exists()):
        found = [path.name for path in flags.input.iterdir() if re.match(r"train.*\.(csv|tsv|json)", path.name.lower())]
        unclear = f"may hold the labels, as the folders of {source.path} may: give --train-csv, or --label-pattern"
        tables.refuse(flags.input, not flags.label_pattern and found, f"has *, which {unclear} '([^/]+)/[^/]+$'")
        return None
    remedy = "put the competition's table there, or name it with --train-csv"
    if pattern := image_source.pattern_of_classes(source.files):
        remedy += f", or read the classes in the images' names by --label-pattern '{pattern}'"
    options = dict(is_name=lambda name: source.find(name) is not None, encoding=flags.encoding)
    options |= dict(words={*chain(*sample.rows)}, lists="," in flags.separator)
    usual = [flags.input / f"{name}{packed}" for name in tables.TRAIN for packed in tables.PACKED]
    present = [path for path in usual if path.exists()]
    if len(present) > 1 and not (flags.train_csv or flags.join):
        headers = {path: tables.read_rows(path, remedy, flags.encoding)[0][0] for path in present}
        having = [path.name for path, names in headers.items() if {*sample.names} & {*map(tables.clean, names)}]
        lacks = f"lacks what the sample names ({listing(sample.names, 3)}), and * has it: give --train-csv, or --join"
        tables.refuse(paths[0], having if paths[0].name not in having else [], lacks)
    table = tables.stack([tables.read_table(path, remedy, flags.train_header, **options) for path in paths])
    if not flags.join:
        return table
    return tables.join(table, tables.read_table(flags.input / flags.join, "see --join", **options))


def read_test_table(source, sample_path, flags):
    """Return the Table of test images: --test-csv, or INPUT's test.csv if it names images of `source`, or None."""
    path = tables.find_table(flags.input, flags.test_csv, image_source.TABLES["test"])
    if not flags.test_csv and (not path.exists() or path == sample_path):
        return None
    options = dict(is_name=lambda name: source.find(name) is not None, encoding=flags.encoding)
    table = tables.read_table(path, "see --test-csv", **options)
    return table if flags.test_csv or any(fit_of(cells, source) for cells in table.columns.values()) else None


def pick_metric(given, sample):
    """Return (the key of the metric: the given one or, for "auto", that of the task and of what the submission holds;
    the Decision). Prints what the submission holds where the CV is of something else."""
    task, form = sample.task, sample.form
    if "summed" in form:
        summed = listing(form["summed"])
        say(f"the submission adds up the probabilities of {summed}; the CV scores the classes one by one")
    if given == "auto":
        metric = dict(label="accuracy", set="f1-samples").get(form["value"]) or task.default_metric()
        if task.right_or_wrong and len(task) > 2 and form["value"] == "probability" and form["columns"]:
            metric = "logloss"
        evidence = f"the task is {task.key}, and the submission holds {SUBMISSIONS[form['value']].noun}"
        return metric, Decision("metric", METRICS[metric].name, "likely", evidence, "--metric")
    if reason := reason_against(given, task.key, task.names):
        raise UserError(f"--metric {given} doesn't suit the {task.key} {listing(task.names)}: {reason}")
    metric = METRICS[given]
    if form["value"] in ("label", "set", "top", "scored") and not (metric.scores_class or metric.of_sets):
        say(f"the submission holds labels, and {metric.name} scores probabilities: the CV is of those")
    return given, Decision("metric", metric.name, "given", "--metric", "--metric")


def files_decision(flags, table, sample_path, sources):
    """Return the Decision about the files that are read, and unread ones of usual names."""
    paths = [table.path if table else None, sample_path, *(source.path for source in sources.values())]
    used = [path.name for path in dict.fromkeys(paths) if isinstance(path, Path)]
    images = [
        f"{name.format(part=part)}{ending}"
        for part in sources
        for name in image_source.USUAL
        for ending in image_source.ENDINGS
    ]
    usual = [*(f"{name}{packed}" for name in (*tables.TRAIN, *tables.SAMPLE) for packed in tables.PACKED), *images]
    others = [name for name in dict.fromkeys(usual) if (flags.input / name).exists() and name not in used]
    evidence = f"not read: {listing(others, 5)}" if others else "no others of usual names"
    how = "likely" if others else "certain"
    return Decision("files", ", ".join(used), how, evidence, "--train-csv, --train-images …")


def groups_decision(flags):
    """Return the Decision about the images that stay in one fold."""
    words = dict(auto="match the test set, duplicates together", copies="duplicates together", none="each image alone")
    given = [f"what {flags.group_pattern!r} finds in the names"] * bool(flags.group_pattern)
    given += [words.get(flags.groups, f"by {flags.groups}")] * (not given or flags.groups not in words)
    how = ("likely", "by default") if flags.groups == Flags.groups and not flags.group_pattern else ("given", "by flag")
    return Decision("groups", " and ".join(given), *how, "--groups, --group-pattern")


def rows_of_each_class(training, count, least, seed):
    """Return the rows of about `count` training images: each class has its share, and at least `least`."""
    strata = rarest_labels(training.task.strata(training.targets))
    shuffled = pd.Series(strata).sample(frac=1, random_state=seed)
    by_class = shuffled.groupby(shuffled)
    share = (by_class.transform("size") * count / len(shuffled)).round().clip(lower=least)
    return np.sort(shuffled.index[by_class.cumcount() < share])


def summary_line(competition: Competition) -> str:
    """Return a sentence on what the tables say and what the competition asks for."""
    form, task = competition.sample.form, competition.sample.task
    header, value = ",".join(form["header"] or []), form["value"]
    header = f"`{header if len(header) <= 60 else header[:60] + '…'}`" if header else "no header"
    if value == "probability":
        value += f" of {'each ' + task.noun if form['columns'] else repr(form.get('summed') or task.names[1])}"
    metric = METRICS[competition.prepared.metric].name
    return f"{competition.labels.summary}; submission: {header}, {value}; metric {metric}"
