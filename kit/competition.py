"""What is the competition? Its tables and images put together: the task, the labels, the metric, what it wants back."""

import hashlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd

from common import UserError, listing, say
from kit.data import labels, tables
from kit.data.image_source import PixelSource, check_images, find_images
from kit.data.tables import refuse
from kit.folds.split import given_groups, pattern_groups
from kit.score import tasks
from kit.score.metrics import METRICS, reason_against
from kit.score.tasks import TASKS
from kit.submit.sample_submission import positive_class, read_sample

SEARCHED = "auto", "copies"  # kinds of --groups that look at the images
READING = "bands", "channels", "image_column", "target_column", "submit_header"  # flags that another test set needs too


def read_competition(args):
    """Reads and checks all tables, and finds every image. → what is in them, and the settings that decide the folds."""
    sources = {part: find_images(args, part) for part in ("train", "test")}
    path, table, truth, sample, sample_path = read_tables(args, sources)
    positive = positive_class(args, sample_path, truth, sample.form)
    if truth.task == "classes" and len(truth.classes) == 2:
        few = [f"{label} ({count})" for label, count in Counter(truth.cells).items() if count < args.folds]
        refuse(path, few, f"has fewer than {args.folds} images of *: add some, or lower --folds")
    truth = truth.with_second(positive)  # it comes second, as METRICS expect
    metric = pick_metric(args, truth, sample.form["value"])
    if isinstance(positive, list):
        say(f"the submission adds up the probabilities of {listing(positive)}; the CV scores the classes one by one")
    groups = groups_of(args, truth.names, table, sources["train"])
    if args.limit:
        rows = some_of_each(truth, args.limit, args.folds, args.seed)
        truth, groups, sample = truth.part(rows), groups[rows], sample.part(args.limit)
    content = (truth.names, truth.cells, sample.images, groups.tolist())
    content = hashlib.sha256(repr(content).encode()).hexdigest()
    settings = dict(
        made_from=dict(tables=content) | {f"{part}_images": source.fingerprint for part, source in sources.items()},
        task=truth.task, classes=truth.classes, positive=positive, metric=metric, folds=args.folds, seed=args.seed,
        groups=args.group_pattern or args.groups + (f" by {args.embed} {args.weights or 'hub'}" if args.embed else ""),
        submission=sample.form, limit=args.limit)  # fmt: skip
    reading = {key: value for key in READING if (value := getattr(args, key)) not in (None, "auto")}
    settings |= truth.ranges() | (dict(reading=reading) if reading else {})
    settings |= dict(per_id=args.per_id) if len(sample.images) != len({*sample.units}) else {}
    groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(sample.images))])  # a test image is a group
    check_images(sources["train"], truth.names, path)
    check_images(sources["test"], sample.images, sample_path)
    names = dict(train=truth.names, test=sample.images)
    return SimpleNamespace(names=names, labels=truth, sample=sample, groups=groups, sources=sources, settings=settings)


def pick_metric(args, truth, value):
    """→ the key of the metric: --metric or, by default, that of the task and of what the submission holds. A line says
    where the submission holds labels, and the metric scores probabilities."""
    if args.metric == "auto":
        usual = dict(label="accuracy", set="f1-samples").get(value)
        return usual or TASKS[truth.task].metric(len(truth.classes))
    if reason := reason_against(args.metric, truth.task, truth.classes):
        raise UserError(f"--metric {args.metric} doesn't suit the {truth.task} {listing(truth.classes)}: {reason}")
    metric = METRICS[args.metric]
    if value in ("label", "set") and not (metric.of_labels or metric.of_sets):
        say(f"the submission holds labels, and {metric.name} scores probabilities: the CV is of those")
    return args.metric


def read_tables(args, sources):
    """→ (what errors name as the training table's path, the training Table or None, Labels, Sample, its path)."""
    remedy = "put the competition's table there, or name it with --train-csv"
    paths, table = tables.find_tables(args.input, args.train_csv, tables.TRAIN), None
    if isinstance(sources["train"], PixelSource):
        table = sources["train"].table
    elif not args.label_pattern and (paths[0].exists() or args.train_csv or not labels.in_folders(sources["train"])):
        table = tables.stack([tables.read_table(path, remedy, args.train_header) for path in paths])
        if args.join:
            table = tables.join(table, tables.read_table(args.input / args.join, "see --join"))
    sample_path = tables.find_table(args.input, args.sample_submit, tables.SAMPLE)
    header = tables.read_rows(sample_path, "put the competition's sample there, or name it with --sample-submit")[0]
    truth = labels.read_labels(args, table, sources["train"], header)
    tests = tables.read_table(args.input / args.test_csv, "see --test-csv") if args.test_csv else None
    if isinstance(sources["test"], PixelSource):
        tests = sources["test"].table
    sample = read_sample(args, sample_path, sources["test"], truth, tests)
    return paths[0] if table else sources["train"].path, table, truth, sample, sample_path


def groups_of(args, names, table, source):
    """→ the group of each training image, int [N], before any image is looked at."""
    if args.group_pattern:
        return pattern_groups(args.group_pattern, names)
    if args.groups in (*SEARCHED, "none"):
        return np.arange(len(names))
    return given_groups(args, names, table, table and tables.image_column(table, source, args.image_column))


def some_of_each(truth, count, least, seed):
    """→ the rows of about `count` training images: of each class its share, and at least `least`."""
    strata = tasks.strata(truth.task, truth.targets)
    if strata.ndim == 2:  # an image of several labels counts for the rarest
        strata = np.where(strata, strata.sum(axis=0), len(strata) + 1).argmin(axis=1)
    labels = pd.Series(strata).sample(frac=1, random_state=seed)
    of_class = labels.groupby(labels)
    share = (of_class.transform("size") * count / len(labels)).round().clip(lower=least)
    return np.sort(labels.index[of_class.cumcount() < share])


def understood(data):
    """→ a sentence on what the tables say, and ask for."""
    settings = data.settings
    form, positive = settings["submission"], settings["positive"]
    header, value, metric = ",".join(form["header"] or []), form["value"], METRICS[settings["metric"]].name
    header = f"`{header if len(header) <= 60 else header[:60] + '…'}`" if header else "no header"
    if value == "probability":
        value += f" of {'each ' + TASKS[settings['task']].noun if form['columns'] else repr(positive)}"
    return f"{data.labels.said}; submission: {header}, {value}; metric {metric}"
