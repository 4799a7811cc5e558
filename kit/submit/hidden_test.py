"""Hidden test sets: predict images that 00_prepare.py hasn't seen, as in a code competition.

The folds' files are enough: no prepared data, no training images. Images are decoded a chunk at a time, so memory
doesn't grow with their number. --within decides once, after the first chunk, how many views and folds there is time
for, and all images are predicted with these.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
from common import STARTED, WORLD, UserError, conclude, cpu_count, experiment_folder, listing, progress, say, warn

import numpy as np
from torch import nn

from kit.data import tables
from kit.data.decode import resize
from kit.data.image_cache import GREY, decode_or_grey
from kit.data.image_source import ImageSource
from kit.data.prepared import Flags
from kit.experiment import KINDS, read_fold, read_record
from kit.score import thresholds
from kit.score.blend import blend
from kit.score.metrics import METRICS
from kit.score.tasks import Task, task_from_json
from kit.submit.sample_submission import read_sample, read_sample_cells
from kit.submit.submission import per_id, write_submission
from kit.train.checkpoint import load_fold
from kit.train.device import enough_memory, pick_amp_of
from kit.train.inference import TTAS

FIRST, CHUNK = 32, 256  # images decoded at a time; the first chunk is timed
USABLE = 0.9  # share of the time left that a plan may take


@dataclass
class Ensemble:
    """The fold models of an experiment, and what foldK.pt keeps beside the weights."""

    exp: str
    folder: Path  # OUTPUT/EXP
    folds: list[int]  # the folds that are there
    models: list[nn.Module]  # one a fold, in eval mode
    amp: str  # precision; --amp auto: that of training where foldK.json is there
    config: dict  # settings of the training
    task: Task
    metric: str
    form: dict  # what the sample submission asks for
    per_id: str | None
    reading: dict  # flags of 00 that other test images need too
    depth: int | None = None  # bits by which 16-bit images are scaled

    def prepared(self) -> tuple:
        """Return what experiments that are blended must have in common."""
        return self.task, self.metric, self.form, self.per_id, self.reading, self.depth

    def plan(self, tta, level):
        """Return (views, number of folds) at a level: 0 leaves nothing out, 1 all views but one, each next one a fold
        more."""
        return (tta or self.config["tta"]) if level == 0 else "none", max(1, len(self.models) - max(0, level - 1))

    def passes(self, tta, level):
        """Return how often a model sees each image."""
        views, folds = self.plan(tta, level)
        return folds * len(getattr(TTAS[views](self.models[0]), "transforms", None) or [0])


@dataclass
class HiddenTest:
    """The flags of a hidden test set."""

    images: list[str] | None  # folders or archives
    sample: Path | None  # the sample submission that lists them
    table: Path | None  # the table of test images
    within: float | None  # seconds from the script's start to its end

    def is_given(self):
        return any((self.images, self.sample, self.table, self.within))

    def submit(self, path, output, exps, tta, how, weights, machine):
        """Predict the images and write the submission. how: a key of BLENDS; machine: 03_infer.py's Machine. Raises
        UserError where a flag is missing."""
        for flag, value in dict(sample_submit=self.sample, test_csv=self.table, within=self.within).items():
            if value and not self.images:
                raise UserError(f"--{flag.replace('_', '-')} belongs to --test-images: give that too")
        if not self.sample:
            raise UserError("--test-images needs the --sample-submit that lists them")
        if WORLD > 1:
            raise UserError("--test-images runs in one process: leave torchrun out")
        with enough_memory("lower --batch-size"):
            ensembles = read_ensembles(output, exps, machine)
            first = ensembles[0]
            mix = partial(blend, how=how, weights=weights, task=first.task)
            cut = fit_thresholds(ensembles, mix)  # its mistakes must not wait for the predictions
            source, sample = read_test_images(first, self.images, self.sample, self.table, output / "unpacked")
            predictions = mix(predict_images(ensembles, source, sample.images, tta, self.within, machine.predict))
        if not np.isfinite(predictions).all():
            raise UserError("the predictions are NaN or infinite: predict with --amp none, or train the folds again")
        predictions = predictions if cut is None else thresholds.apply(predictions, cut)
        predictions = per_id(predictions, sample.submission_ids, first.per_id or "mean")
        write_submission(path, sample.layout, predictions, first.task, first.metric, first.form)
        conclude(f"{len(sample.layout)} rows, checked → {path}")


def read_ensembles(output, exps, machine):
    """Return an Ensemble for each experiment. Raises UserError where there is no fold, or folds or experiments
    differ."""
    ensembles = [read_ensemble(experiment_folder(output, exp), machine) for exp in exps]
    for ensemble in ensembles[1:]:
        if ensemble.prepared() != ensembles[0].prepared():
            raise UserError(f"{ensemble.exp} was prepared otherwise than {exps[0]}: they can't be blended")
    return ensembles


def read_ensemble(folder, machine):
    """Return the Ensemble of the foldK.pt in a folder."""
    folds = sorted(int(path.stem[4:]) for path in folder.glob("fold*.pt") if path.stem[4:].isdecimal())
    if not folds:
        raise UserError(f"{folder} has no foldK.pt: copy the folds' files there, or train them")
    files = (load_fold(folder / f"fold{k}.pt", machine.device, machine.compiled) for k in folds)
    contents, models = zip(*files, strict=True)
    saved = contents[0]
    for fold, content in zip(folds, contents, strict=True):
        if any(content[key] != saved[key] for key in ("config", "classes", "submission")):
            raise UserError(f"{folder}/fold{fold}.pt has other settings or classes than fold {folds[0]}: remove one")
    run = read_record(folder, folds[0])["run"] if (folder / f"fold{folds[0]}.json").exists() else {}
    return Ensemble(
        exp=folder.name, folder=folder, folds=folds, models=models, amp=pick_amp_of(run, machine.amp, machine.device),
        config=saved["config"], task=task_from_json(saved), metric=saved["metric"], form=saved["submission"],
        per_id=saved["per_id"], reading=saved["reading"], depth=saved.get("depth"),
    )  # fmt: skip


def fit_thresholds(ensembles, mix):
    """Return the thresholds, float [K], that suit the blend of the out-of-fold predictions in the folds' foldK.csv.
    None unless the metric is one of sets of labels. mix: a function (predictions of each experiment) → their blend."""
    first = ensembles[0]
    if not METRICS[first.metric].of_sets:
        return None
    shared = sorted(set.intersection(*(set(ensemble.folds) for ensemble in ensembles)))
    if not shared:
        raise UserError("no fold is present in all experiments, to fit thresholds on: copy one of each")
    predictions, targets, names = [], [], {}
    for ensemble in ensembles:
        logits = []
        for fold in shared:
            path = ensemble.folder / f"fold{fold}.csv"
            table = common.read_table(path, "copy it there beside foldK.pt", dtype=str)
            if names.setdefault(fold, table.image_name.tolist()) != table.image_name.tolist():
                raise UserError(f"{path} holds other images than {first.exp}'s: leave one experiment out")
            logits.append(read_fold(ensemble.folder, fold, len(first.task), table)[KINDS.index("views")])
            targets += [first.task.read_targets(table.target)] if ensemble is first else []
        predictions.append(first.task.predictions(np.concatenate(logits)))
    return thresholds.fit(first.metric, np.concatenate(targets), mix(predictions))


def read_test_images(ensemble, paths, sample_path, table_path, unpacked):
    """Return (the source of the test images, the Sample that asks for them). paths: folders or archives; table_path: of
    the table of test images, or None; unpacked: the folder for what can't be read in place. Raises UserError unless the
    sample asks for what the folds were trained for."""
    flags = Flags(**ensemble.reading)
    source = ImageSource(paths, flags.bands, unpacked, flags.channels)
    source.depth = ensemble.depth
    options = dict(is_name=lambda name: source.find(name) is not None, encoding=flags.encoding)
    tests = tables.read_table(table_path, "see --test-csv", **options) if table_path else None
    cells = read_sample_cells(sample_path, source, tests, flags)
    sample = read_sample(cells, source, ensemble.task, tests, flags, form=ensemble.form)
    if sample.form != ensemble.form:
        what = "has another header or other columns than the sample that 00_prepare.py read"
        raise UserError(f"{sample_path} {what}: name another")
    missing = [name for name in sample.images if source.find(name) is None]
    if len(missing) == len(sample.images):
        raise UserError(f"{sample_path} names no image of {source.path}: name the right folder, or a --test-csv")
    if missing:
        warn(f"{len(missing)} images of {sample_path} are missing: {listing(missing)}; they are predicted as grey")
    return source, sample


def predict_images(ensembles, source, names, tta, within, predict):
    """Return the predictions of each experiment, float64 [N, K].

    within: seconds from the script's start to its end, or None; predict: a function (model, images, amp) → logits."""
    parts, damaged, level, done = [[] for _ in ensembles], [], 0, 0
    with progress(len(names), "test images") as bar, ThreadPoolExecutor(cpu_count()) as pool:
        while done < len(names):
            chunk = names[done : done + (CHUNK if done else FIRST)]
            began = time.monotonic()
            images, reasons = decode_chunk(source, chunk, {e.config["size"] for e in ensembles}, pool)
            damaged += [f"{name} ({why})" for name, why in zip(chunk, reasons, strict=True) if why]
            decoded = time.monotonic()
            predictions = [predict_chunk(e, images, tta, level, predict) for e in ensembles]
            if not done and within:
                seconds = decoded - began, time.monotonic() - decoded
                level = choose_level(ensembles, tta, len(names), len(chunk), seconds, STARTED + within)
                if level:
                    predictions = [predict_chunk(e, images, tta, level, predict) for e in ensembles]
            for part, chunk_predictions in zip(parts, predictions, strict=True):
                part.append(chunk_predictions)
            done += len(chunk)
            bar.update(len(chunk))
    if damaged:
        warn(f"{len(damaged)} images can't be read: {listing(damaged)}; what they lack is predicted as grey")
    return [np.concatenate(part) for part in parts]


def decode_chunk(source, names, sizes, pool):
    """Return ({px: uint8 [n, px, px, 3]}, why each image can't be read, or None)."""
    decoded = [*pool.map(lambda name: read_image(source, name, sizes), names)]
    return {size: np.stack([resized[size] for resized, _ in decoded]) for size in sizes}, [why for _, why in decoded]


def read_image(source, name, sizes):
    """Return ({px: the image, uint8 [px, px, 3]}, why it can't be read, or None). The readable part of a damaged image
    is used; a missing one is grey. It is resized here, so that full-size images don't add up in memory, and decoded for
    each size, whose pixels are then those of 00's cache."""
    if source.find(name) is None:
        return {size: np.full((size, size, 3), GREY, np.uint8) for size in sizes}, None
    images, reason = {}, None
    for size in sizes:
        picture, reason = decode_or_grey(source, name, size)
        images[size] = resize(picture.pixels, size)
    return images, reason


def predict_chunk(ensemble, images, tta, level, predict):
    """Return the mean of the models' predictions, float64 [n, K]. images: {px: uint8 [n, px, px, 3]}."""
    (views, folds), total, images = ensemble.plan(tta, level), 0, images[ensemble.config["size"]]
    for classifier in ensemble.models[:folds]:
        logits = predict(TTAS[views](classifier), images, ensemble.amp)
        total = total + ensemble.task.predictions(logits)
    return total / folds


def choose_level(ensembles, tta, count, timed, seconds, end):
    """Return the least level (see Ensemble.plan) at which all `count` images are predicted by `end`, and print what it
    leaves out.

    timed: images of the first chunk; seconds: what their decoding took, and their predictions at level 0."""
    most, left, level = max(len(e.models) for e in ensembles), end - time.monotonic(), 0
    pace = seconds[0] / timed, seconds[1] / timed / sum(e.passes(tta, 0) for e in ensembles)
    needed = (count - timed) * sum(seconds) / timed
    while needed > USABLE * left and level < most:
        level += 1  # the first chunk is then predicted again
        needed = (count - timed) * pace[0] + count * pace[1] * sum(e.passes(tta, level) for e in ensembles)
    if level:
        folds = max(e.plan(tta, level)[1] for e in ensembles)
        kept = "one fold" if folds == 1 else "all folds" if folds == most else f"{folds} folds"
        say(f"--within is too short for all: one view and {kept}")
    return level
