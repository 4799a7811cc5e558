"""The assembled competition: tables and images put together into labels, metric, groups and sample submission."""

import hashlib
from dataclasses import dataclass

from common import UserError, listing, prepared_folder, say

import numpy as np
import pandas as pd

from kit.data import labels, tables
from kit.data.image_source import ImageSource, PixelSource, check_images, find_images
from kit.data.prepared import FLAGS_FOR_TEST, Flags, Prepared
from kit.folds.split import given_groups, make_folds
from kit.score.metrics import METRICS, reason_against
from kit.submit.sample_submission import Sample, read_sample


@dataclass
class Competition:
    """What read_competition found. N images: the training images, then the test images."""

    names: dict[str, list[str]]  # "train", "test" → names of the images
    labels: labels.TrainingLabels
    sample: Sample
    groups: np.ndarray  # int [N], before any image is looked at; a test image is a group of its own
    sources: dict[str, ImageSource | PixelSource]  # "train", "test" → where the images are
    prepared: Prepared  # decided so far; its fields from `sizes` on, which follow from the images, are empty


def read_competition(flags: Flags) -> Competition:
    """Read and check all tables, and find every image. Raises UserError for whatever doesn't fit."""
    sources = {part: find_images(part, flags) for part in ("train", "test")}
    table = read_training_table(sources["train"], flags)
    sample_path = tables.find_table(flags.input, flags.sample_submit, tables.SAMPLE)
    training = labels.read_labels(table, sources["train"], tables.read_rows(sample_path, tables.NO_SAMPLE)[0][0], flags)
    tests = tables.read_table(flags.input / flags.test_csv, "see --test-csv") if flags.test_csv else None
    tests = sources["test"].table or tests
    sample = read_sample(sample_path, sources["test"], training.task, tests, flags, training.columns)
    training = training.with_task(sample.task)
    metric = pick_metric(flags.metric, sample)
    groups = read_groups(training.names, table, sources["train"], flags)
    if flags.limit:
        rows = rows_of_each_class(training, flags.limit, flags.folds, flags.seed)
        training, groups, sample = training.part(rows), groups[rows], sample.part(flags.limit)
    make_folds(training, groups, flags.folds, flags.seed)  # raises now what would be raised after caching
    check_images(sources["train"], training.names, table.path if table else sources["train"].path)
    check_images(sources["test"], sample.images, sample_path)
    content = (training.names, training.cells, sample.images, groups.tolist())
    hashes = {f"{part}_images": source.fingerprint for part, source in sources.items()}
    for_test = {name: getattr(flags, name) for name in FLAGS_FOR_TEST}
    embedded = f" by {flags.embed} {flags.weights or 'hub'}" if flags.embed else ""
    prepared = Prepared(
        folder=prepared_folder(flags.output),
        made_from=dict(tables=hashlib.sha256(repr(content).encode()).hexdigest()) | hashes,
        task=training.task, metric=metric, folds=flags.folds, seed=flags.seed,
        groups=flags.group_pattern or flags.groups + embedded, submission=sample.form, limit=flags.limit,
        per_id=flags.per_id if len(sample.images) != len({*sample.submission_ids}) else None,
        reading={name: value for name, value in for_test.items() if value not in (None, "auto")},
    )  # fmt: skip
    groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(sample.images))])
    return Competition(dict(train=training.names, test=sample.images), training, sample, groups, sources, prepared)


def read_training_table(source, flags):
    """Return the training Table, or None where the images' paths hold their labels."""
    if source.table:
        return source.table
    paths = [tables.find_table(flags.input, name, tables.TRAIN) for name in flags.train_csv or [None]]
    in_folders = len({key.rpartition("/")[0] for key in source.files}) > 1
    if flags.label_pattern or (in_folders and not flags.train_csv and not paths[0].exists()):
        return None
    remedy = "put the competition's table there, or name it with --train-csv"
    table = tables.stack([tables.read_table(path, remedy, flags.train_header) for path in paths])
    return tables.join(table, tables.read_table(flags.input / flags.join, "see --join")) if flags.join else table


def pick_metric(given, sample):
    """Return the key of the metric: the given one or, for "auto", that of the task and of what the submission holds.
    Prints what the submission holds where the CV is of something else."""
    task, form = sample.task, sample.form
    if "summed" in form:
        summed = listing(form["summed"])
        say(f"the submission adds up the probabilities of {summed}; the CV scores the classes one by one")
    if given == "auto":
        return dict(label="accuracy", set="f1-samples").get(form["value"]) or task.default_metric()
    if reason := reason_against(given, task.key, task.names):
        raise UserError(f"--metric {given} doesn't suit the {task.key} {listing(task.names)}: {reason}")
    metric = METRICS[given]
    if form["value"] in ("label", "set") and not (metric.of_labels or metric.of_sets):
        say(f"the submission holds labels, and {metric.name} scores probabilities: the CV is of those")
    return given


def read_groups(names, table, source, flags):
    """Return the group of each training image, int [N], before any image is looked at."""
    if not flags.group_pattern and (flags.searched or flags.groups == "none"):
        return np.arange(len(names))
    images = table and tables.image_column(table, source, flags.image_column)
    return given_groups(flags, names, table, images)


def rows_of_each_class(training, count, least, seed):
    """Return the rows of about `count` training images: of each class its share, and at least `least`."""
    strata = training.task.strata(training.targets)
    if strata.ndim == 2:  # an image of several labels counts for the rarest
        strata = np.where(strata, strata.sum(axis=0), len(strata) + 1).argmin(axis=1)
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
