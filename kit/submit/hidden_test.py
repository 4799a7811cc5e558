"""Hidden test sets: predict images that 00_prepare.py hasn't seen, as in a code competition.

The folds' files are enough: no prepared data, no training images. While a chunk of images is predicted, the next one is
decoded, so memory holds two. With --within, the pace of the first chunk decides for how many views and folds there is
time; that of the second may only give some back. All images are predicted in the same views by the same folds.
"""

import contextlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import common
from common import STARTED, WORLD, UserError, conclude, cpu_count, experiment_folder, listing, progress, say, warn

import numpy as np
import torch
from torch import nn

from kit.data import tables
from kit.data.decode import resize
from kit.data.image_cache import GREY, decode_or_grey
from kit.data.image_source import ImageSource
from kit.data.prepared import Flags
from kit.experiment import KINDS, read_fold, read_record
from kit.score import thresholds
from kit.score.blend import blend, check_blend
from kit.score.tasks import Task, task_from_json
from kit.submit.sample_submission import read_sample, read_sample_cells
from kit.submit.submission import fit_cuts, has_cuts, per_id, write_submission
from kit.train.checkpoint import load_fold
from kit.train.device import enough_memory, pick_amp_of
from kit.train.inference import TTAS

TIMED, CHUNK = 32, 512  # images of the first chunk, by which --within decides, at least; of the others
USABLE = 0.9  # share of the time left that a plan may take


@dataclass
class Ensemble:
    """The fold models of an experiment, and what foldK.pt keeps beside the weights."""

    exp: str
    folder: Path  # OUTPUT/EXP
    folds: list[int]  # the folds that are there
    models: list[nn.Module]  # one a fold, in eval mode, on the CPU
    amp: str  # fp16, bf16 or none; by --amp auto that of training, where foldK.json is there
    config: dict  # settings of the training
    task: Task
    metric: str
    form: dict  # what the sample submission asks for
    per_id: str | None
    reading: dict  # flags of 00 that other test images need too
    depth: int | None = None  # bits by which 16-bit images are scaled

    def prepared(self):
        """Return what blended experiments must have in common."""
        return self.task, self.metric, self.form, self.per_id, self.reading, self.depth

    def plan(self, tta, level):
        """Return (views, number of folds). level: 0 leaves nothing out, 1 all views but one, each next one a fold."""
        return (tta or self.config["tta"]) if level == 0 else "none", max(1, len(self.models) - max(0, level - 1))

    def passes(self, tta, level):
        """Return how many forward passes each image takes."""
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
        """Predict the images and write the submission. how: a key of BLENDS; machine: a Machine. Raises UserError for
        flags, folds or a sample that don't fit together, and for predictions that aren't finite."""
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
            check_blend(how, first.metric, first.task, first.form)
            mix = partial(blend, how=how, weights=weights, task=first.task)
            cuts = fit_thresholds(ensembles, mix)  # its mistakes must not wait for the predictions
            source, sample = read_test_images(first, self.images, self.sample, self.table, output / "unpacked")
            predictions = mix(predict_images(ensembles, source, sample.images, tta, self.within, machine))
        if not np.isfinite(predictions).all():
            raise UserError("the predictions are NaN or infinite: predict with --amp none, or train the folds again")
        predictions = thresholds.apply(first.metric, predictions, cuts)
        predictions = per_id(predictions, sample.submission_ids, first.per_id or "mean")
        write_submission(path, sample.layout, predictions, first.task, first.metric, first.form)
        conclude(f"{len(sample.layout)} rows, checked → {path}")


def read_ensembles(output, exps, machine):
    """Return an Ensemble for each experiment. Raises UserError where folds or experiments differ, or there are none."""
    ensembles = [read_ensemble(experiment_folder(output, exp), machine) for exp in exps]
    for ensemble in ensembles[1:]:
        if ensemble.prepared() != ensembles[0].prepared():
            raise UserError(f"{ensemble.exp} was prepared otherwise than {exps[0]}: they can't be blended")
    return ensembles


def read_ensemble(folder, machine):
    """Return the Ensemble of the foldK.pt in a folder. Raises UserError where there is none, or they differ."""
    folds = sorted(int(path.stem[4:]) for path in folder.glob("fold*.pt") if path.stem[4:].isdecimal())
    if not folds:
        raise UserError(f"{folder} has no foldK.pt: copy the folds' files there, or train them")
    files = (load_fold(folder / f"fold{k}.pt", torch.device("cpu"), machine.compiled) for k in folds)
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
    """Return the cuts of the submission, as fit_cuts does, from the blend of the out-of-fold predictions in foldK.csv.
    mix: a function (predictions of each experiment) → their blend. Raises UserError where these don't fit together."""
    first = ensembles[0]
    if not has_cuts(first.task, first.metric, first.form):
        return None
    shared = sorted(set.intersection(*(set(ensemble.folds) for ensemble in ensembles)))
    if not shared:
        raise UserError("no fold is present in all experiments, to fit thresholds on: copy one of each")
    predictions, tables = [], {}
    for ensemble in ensembles:
        logits = []
        for fold in shared:
            path = ensemble.folder / f"fold{fold}.csv"
            table = common.read_table(path, "copy it there beside foldK.pt", dtype=str)
            if not tables.setdefault(fold, table).image_name.equals(table.image_name):
                raise UserError(f"{path} holds other images than {first.exp}'s: leave one experiment out")
            logits.append(read_fold(ensemble.folder, fold, len(first.task), table)[KINDS.index("views")])
        predictions.append(first.task.predictions(np.concatenate(logits)))
    targets = np.concatenate([first.task.read_targets(table.target) for table in tables.values()])
    return fit_cuts(targets, mix(predictions), first.task, first.metric, first.form)


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


def predict_images(ensembles, source, names, tta, within, machine):
    """Return the predictions of each experiment, float64 [N, K]. within: seconds from the script's start to its end, or
    None. Images that were predicted before the views and folds changed are predicted again."""
    timed = machine.batch_size * -(-TIMED // machine.batch_size)  # images: whole batches
    todo, ahead, done, damaged = deque(pairwise([0, *range(timed, len(names), CHUNK), len(names)])), [], {}, {}
    level, looks, sizes = 0, 0, {ensemble.config["size"] for ensemble in ensembles}
    with progress(len(names), "test images") as bar, contextlib.ExitStack() as held:
        pool = ThreadPoolExecutor(cpu_count())
        held.callback(pool.shutdown, cancel_futures=True)
        begin = lambda rows: (rows, *decode_chunk(source, names[slice(*rows)], sizes, pool))  # noqa: E731
        while todo or ahead:
            began = time.monotonic()
            (start, end), images, reasons = ahead.pop() if ahead else begin(todo.popleft())
            damaged |= {name: why for name, why in zip(names[start:end], reasons, strict=True) if why}  # waits for them
            if within and todo and looks == 0:
                pace = [(time.monotonic() - began) / (end - start), 0]
                some = {size: array[: machine.batch_size] for size, array in images.items()}
                predict_chunk(ensembles, some, tta, level, machine)  # not timed: a GPU's start and compilation
            elif todo:
                ahead = [begin(todo.popleft())]
            began = time.monotonic()
            done[start, end] = predict_chunk(ensembles, images, tta, level, machine)
            bar.update(end - start)
            if within and (todo or ahead) and looks <= min(level, 1):
                pace[1] = (time.monotonic() - began) / (end - start) / sum(e.passes(tta, level) for e in ensembles)
                most = level if looks else max(len(e.models) for e in ensembles)
                counts = len(names), sum(end - start for start, end in done)
                chosen = choose_level(ensembles, tta, level, most, counts, pace, STARTED + within - time.monotonic())
                looks += 1
                if chosen != level:
                    todo.extend(done)
                    level, done = chosen, {}
                    bar.reset()
    if within and (late := time.monotonic() - STARTED - within) > 0:
        warn(f"--within was too short: the predictions ended {late:.0f} s late")
    if damaged:
        reasons = [f"{name} ({why})" for name, why in damaged.items()]
        warn(f"{len(damaged)} images can't be read: {listing(reasons)}; what they lack is predicted as grey")
    return [np.concatenate(parts) for parts in zip(*(done[rows] for rows in sorted(done)), strict=True)]


def decode_chunk(source, names, sizes, pool):
    """Begin to decode images in the pool's threads. → ({px: uint8 [n, px, px, 3]}; an iterator of the reasons why each
    can't be read, or None, at whose end the images are complete)."""
    images = {size: np.empty((len(names), size, size, 3), np.uint8) for size in sizes}

    def fill(row, name):
        resized, reason = read_image(source, name, sizes)
        for size, pixels in resized.items():
            images[size][row] = pixels
        return reason

    return images, pool.map(fill, range(len(names)), names)


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


def predict_chunk(ensembles, images, tta, level, machine):
    """Return each experiment's mean of its models' predictions, float64 [n, K]. images: {px: uint8 [n, px, px, 3]}."""
    means = []
    for ensemble in ensembles:
        (views, folds), total = ensemble.plan(tta, level), 0
        for classifier in ensemble.models[:folds]:
            with on_device(classifier, machine.device):
                logits = machine.predict(TTAS[views](classifier), images[ensemble.config["size"]], ensemble.amp)
            total = total + ensemble.task.predictions(logits)
        means.append(total / folds)
    return means


@contextlib.contextmanager
def on_device(model, device):
    """Move a model to the device for the block: a GPU may not hold them all. Its weights stay in memory too, so nothing
    is copied back."""
    kept = [weights.data for weights in model.parameters()]
    model.to(device)
    yield
    for weights, data in zip(model.parameters(), kept, strict=True):
        weights.data = data


def choose_level(ensembles, tta, level, most, counts, pace, left):
    """Return the lowest level (see Ensemble.plan) at which all images are predicted in the `left` seconds, or `most`;
    print what changes. level: the present one; counts: of all images, and of those predicted at this level; pace:
    seconds to decode an image, and to predict it in a pass."""

    def needed(other):
        images = counts[0] - (counts[1] if other == level else 0)
        return images * (pace[0] + pace[1] * sum(e.passes(tta, other) for e in ensembles))

    chosen = next((other for other in range(most) if needed(other) <= USABLE * left), most)
    if chosen != level:
        folds, every = (max(e.plan(tta, other)[1] for e in ensembles) for other in (chosen, 0))
        kept = "one fold" if folds == 1 else "all folds" if folds == every else f"{folds} folds"
        effect = "leaves time for" if chosen < level else "is too short for all:"
        say(f"--within {effect} {'one view' if chosen else 'all views'} and {kept}")
    return chosen
