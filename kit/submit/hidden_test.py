"""Test images that 00_prepare.py has never seen: a code competition's hidden ones, or a second test set.

The folds' files are all that is needed: no prepared data, no training images. Images are decoded as they are needed, so
memory doesn't grow with their number.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch

from common import STARTED, UserError, cpu_count, experiment_folder, listing, progress, read_table, say, warn
from kit.data import tables
from kit.data.decode import resize
from kit.data.image_cache import decode
from kit.data.image_source import ImageSource
from kit.experiment import KINDS, read_fold, read_record
from kit.score import tasks, thresholds
from kit.score.blend import blend
from kit.score.metrics import METRICS
from kit.submit.sample_submission import read_sample
from kit.submit.submission import per_unit
from kit.train.checkpoint import OF_TESTS, load_fold
from kit.train.device import pick_amp_of
from kit.train.inference import TTAS, predict

CHUNK, FIRST = 256, 32  # images that are decoded at a time; in the first chunk, which says how long the others take
SPARE = 0.9  # of the time that is left, what a plan may take


def read_experiment(args, exp, device):
    """→ a namespace: exp, models (of its folds, in eval mode), saved (what the first foldK.pt says beside the weights),
    folder, folds (their numbers), amp (the precision; where foldK.json is there, auto is that of training). Raises
    UserError where there is no fold, or folds differ."""
    folder = experiment_folder(args, exp)
    folds = sorted(int(path.stem[4:]) for path in folder.glob("fold*.pt") if path.stem[4:].isdecimal())
    if not folds:
        raise UserError(f"{folder} has no foldK.pt: copy the folds' files there, or train them")
    saved, models = zip(*(load_fold(folder / f"fold{k}.pt", device, args.compile) for k in folds), strict=True)
    for fold, one in zip(folds, saved, strict=True):
        if any(one[key] != saved[0][key] for key in ("config", "classes", "submission")):
            raise UserError(f"{folder}/fold{fold}.pt has other settings or classes than fold {folds[0]}: remove one")
    record = read_record(folder, folds[0]) if (folder / f"fold{folds[0]}.json").exists() else {}
    amp = pick_amp_of(record.get("run", {}), args.amp, device)
    return SimpleNamespace(exp=exp, models=models, saved=saved[0], folder=folder, folds=folds, amp=amp)


def sample_of(args, saved):
    """→ (the source of the test images, the Sample that they are asked for in). saved: as read_experiment gives it."""
    reading = dict(submit_header="auto", image_column=None, target_column=None, bands=None, channels=None)
    reading = SimpleNamespace(**(reading | saved.get("reading", {})))
    source = ImageSource(args.test_images, reading.bands, args.output / "unpacked", reading.channels)
    tests = tables.read_table(args.test_csv, "see --test-csv") if args.test_csv else None
    classes = SimpleNamespace(classes=saved["classes"], task=saved.get("task", "classes"))
    sample = read_sample(reading, args.sample_submit, source, classes, tests, saved["submission"])
    if sample.form != saved["submission"]:
        what = "has another header or other columns than the sample that 00_prepare.py read"
        raise UserError(f"{args.sample_submit} {what}: name another")
    return source, sample


def predict_unseen(args, experiments, device, workers, mix):
    """→ (predictions float64 [units, K], the layout of the sample). mix: a function (a list of predictions [M, K], one
    of each experiment) → [M, K]."""
    source, sample = sample_of(args, experiments[0].saved)
    lost = [name for name in sample.images if source.find(name) is None]
    if len(lost) == len(sample.images):
        raise UserError(f"{args.sample_submit} names no image of {source.path}: name the right folder, or a --test-csv")
    if lost:
        warn(f"{len(lost)} images of {args.sample_submit} are missing: {listing(lost)}; they are predicted as grey")
    plan, parts, done, damaged = Plan(args, experiments, len(sample.images)), [[] for _ in experiments], 0, []
    sizes = {exp.saved["config"]["size"] for exp in experiments}
    with progress(len(sample.images), "test images") as bar, ThreadPoolExecutor(cpu_count()) as pool:
        while done < len(sample.images):
            names = sample.images[done : done + (CHUNK if done else FIRST)]
            began = time.monotonic()
            decoded = [*pool.map(lambda name: read(source, name, sizes), names)]
            damaged += [f"{name} ({why})" for name, (_, why) in zip(names, decoded, strict=True) if why]
            plan.decoding += time.monotonic() - began
            for exp, found in zip(experiments, parts, strict=True):
                images = np.stack([resized[exp.saved["config"]["size"]] for resized, _ in decoded])
                tta, folds = plan.choose(exp, done)
                began, total = time.monotonic(), 0
                for classifier in exp.models[:folds]:
                    rows = np.arange(len(images))
                    logits = predict(TTAS[tta](classifier), images, rows, args.batch_size, device, exp.amp, workers)
                    total = total + tasks.predictions(exp.saved, logits)
                plan.passes += len(images) * folds * plan.views(exp, tta)
                plan.predicting += time.monotonic() - began
                found.append(total / folds)
            done += len(names)
            bar.update(len(names))
    if damaged:
        warn(f"{len(damaged)} images can't be read: {listing(damaged)}; what they lack is predicted as grey")
    mixed = mix([np.concatenate(found) for found in parts])
    if not np.isfinite(mixed).all():
        raise UserError("the predictions are no numbers: predict with --amp none, or train the folds anew")
    return per_unit(mixed, sample.units, experiments[0].saved.get("per_id", "mean")), sample.layout


def read(source, name, sizes):
    """→ ({size: the image, uint8 [size, size, 3]}, why it can't be read or None). Then what is left of it is used;
    where nothing is, or no image is there, it is grey. Resized here, so that whole images don't add up in memory."""
    image, reason = np.full((64, 64, 3), 128, np.uint8), None
    if source.find(name) is not None:
        image, reason = decode(source, name, 64)
    return {size: resize(image, size) for size in sizes}, reason


class Plan:
    """How many views and folds there is time for. Before each chunk it takes the most that fits: all views of all
    folds; one view; then fewer folds."""

    def __init__(self, args, experiments, count):
        self.args, self.experiments, self.count = args, experiments, count
        self.decoding = self.predicting = 0.0  # seconds
        self.passes, self.level = 0, 0  # images times folds times views, so far; how much is left out
        self.ends = None if args.within is None else STARTED + args.within

    def views(self, exp, tta):
        return len(getattr(TTAS[tta](exp.models[0]), "transforms", None) or [0])

    def at(self, exp, level):
        """→ (the views, the number of folds) of an experiment at a level: 0 all, 1 one view, then a fold less each."""
        tta = self.args.tta or exp.saved["config"]["tta"]
        return (tta if level == 0 else "none"), max(1, len(exp.models) - max(0, level - 1))

    def choose(self, exp, done):
        """→ (views, folds) for the next chunk."""
        if self.ends is not None and done:
            most = max(len(other.models) for other in self.experiments)
            before = self.level
            while self.level < most and self.seconds(self.level, done) > SPARE * (self.ends - time.monotonic()):
                self.level += 1
            if self.level > before:
                tta, folds = self.at(exp, self.level)
                left_out = (
                    f"--within is too short for all, so from here on {tta} views of {folds} fold{'s' * (folds > 1)}"
                )
                say(f"image {done + 1} of {self.count}: {left_out}")
        return self.at(exp, self.level)

    def seconds(self, level, done):
        """→ what the images that are left would take at a level, by the pace so far."""
        passes = sum(self.views(exp, tta) * folds for exp in self.experiments for tta, folds in [self.at(exp, level)])
        return (self.count - done) * (self.decoding / done + passes * self.predicting / max(1, self.passes))


def thresholds_of(experiments, mix):
    """→ where the metric reads sets of labels, the thresholds float [K] that suit the out-of-fold predictions in the
    folds' foldK.csv; else None."""
    saved = experiments[0].saved
    if not METRICS[saved["metric"]].of_sets:
        return None
    shared = sorted(set.intersection(*(set(exp.folds) for exp in experiments)))
    if not shared:
        raise UserError("no fold is there of all experiments, to fit thresholds on: copy one of each")
    parts, targets, names = [], [], {}
    for exp in experiments:
        found = []
        for fold in shared:
            table = read_table(exp.folder / f"fold{fold}.csv", "copy it there beside foldK.pt", dtype=str)
            if names.setdefault(fold, table.image_name.tolist()) != table.image_name.tolist():
                raise UserError(f"{exp.folder}/fold{fold}.csv holds other images than {experiments[0].exp}'s: name one")
            found.append(read_fold(exp.folder, fold, saved["classes"], table)[KINDS.index("views")])
            targets += [tasks.read_targets(saved, table.target)] if exp is experiments[0] else []
        parts.append(tasks.predictions(saved, np.concatenate(found)))
    return thresholds.fit(saved["metric"], np.concatenate(targets), mix(parts))


def submit_unseen(args, device, workers):
    """→ (predictions [units, K] as the submission wants them, the layout, what stands for prepared.json)."""
    experiments = [read_experiment(args, exp, device) for exp in args.exps]
    saved = experiments[0].saved
    for exp in experiments[1:]:
        if any(exp.saved.get(key) != saved.get(key) for key in ("classes", "metric", "submission", *OF_TESTS)):
            raise UserError(f"{exp.exp} was prepared otherwise than {experiments[0].exp}: they can't be blended")
    weights = args.weights
    if weights and not ([*map(type, weights)] == [float] * len(experiments) and sum(weights) > 0):
        what = f"a number for each of {listing(args.exps)}, not all of them 0"
        raise UserError(f"--weights {listing(weights)}: --test-images needs {what}, and no file: give its numbers")

    def mix(parts):
        return blend(parts, args.blend, weights, saved.get("task", "classes"))

    cut = thresholds_of(experiments, mix)  # its mistakes must not wait for the predictions

    def mix_and_cut(parts):
        return mix(parts) if cut is None else thresholds.apply(mix(parts), cut)

    with torch.inference_mode():
        predictions, layout = predict_unseen(args, experiments, device, workers, mix_and_cut)
    return predictions, layout, saved
