"""Test set: the prepared test images, and a fold model's logits of them in foldK_test.npy.

01 --predict or 03 writes foldK_test.npy, float32 [N, K], and foldK_test.json, which has what decides it: the model, the
images, the views, the precision. Where these are the same, nothing is predicted again.
"""

import contextlib
import gc
import json
from dataclasses import dataclass

import common
from common import RANK, UserError, file_hash, replacing, say

import numpy as np
import pandas as pd
import torch

from kit.experiment import read_record
from kit.submit.submission import read_tests
from kit.train import distributed
from kit.train.checkpoint import load_fold
from kit.train.device import pick_amp_of, pick_workers
from kit.train.inference import TTAS, predict
from kit.train.linear_probe import head_logits, test_features


@dataclass
class TestSet:
    """The prepared test images, and what the competition asks for."""

    __test__ = False  # pytest would collect it by its name

    names: list[str]  # of the N images
    submission_ids: np.ndarray  # int [N]: the sample's id for which an image counts
    layout: pd.DataFrame  # the sample's rows
    images: dict[int, np.ndarray]  # px → uint8 [N, px, px, 3], memory-mapped
    content_hash: str  # of the images and their order


@dataclass
class Machine:
    """Where and how the models compute."""

    device: torch.device
    amp: str  # one of PRECISIONS
    compiled: bool  # models read from foldK.pt run through torch.compile
    workers: int | None  # processes that load images; None: as pick_workers does
    batch_size: int  # images

    def predict(self, model, images, amp, bar=None):
        """Return a model's logits of images uint8 [N, S, S, 3], float32 [N, K]. amp: fp16, bf16 or none."""
        rows, workers = np.arange(len(images)), pick_workers(self.workers, self.device)
        return predict(model, images, rows, self.batch_size, self.device, amp, workers, bar)


def read_test_set(prepared, sizes):
    """Return the TestSet. sizes: px of the images that are needed. Raises UserError where they can't be read."""
    table, layout = read_tests(prepared.folder, f"{common.PREPARE} again, with the same flags")
    names = table.image_name.tolist()
    images = {size: prepared.open_images("test", size, len(names)) for size in sizes}
    content_hash = f"{file_hash(prepared.folder / 'test.csv')} {prepared.made_from['test_images']}"
    return TestSet(names, table.submission_id.to_numpy(), layout, images, content_hash)


def about_fold(folder, fold, test, tta, machine):
    """Return (the path of a finished fold's foldK_test.npy, its name in messages, the content of foldK_test.json)."""
    path, views = folder / f"fold{fold}_test.npy", "one view" if tta == "none" else f"{tta} views"
    amp = pick_amp_of(read_record(folder, fold)["run"], machine.amp, machine.device)
    made_with = dict(model=file_hash(folder / f"fold{fold}.csv"), test=test.content_hash, tta=tta, amp=amp)
    return path, f"{folder.name} fold {fold}, {views}", made_with


def earlier_logits(folder, fold, test, tta, machine):
    """Return the logits in foldK_test.npy, float32 [N, K], if the same model has predicted the same images in the same
    views and precision, else None."""
    path, name, made_with = about_fold(folder, fold, test, tta, machine)
    logits = None
    with contextlib.suppress(OSError, ValueError, EOFError):  # lost or damaged: predicted again
        if json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == made_with:
            logits = np.load(path)
    if distributed.broadcast(logits is None):
        return None
    say(f"{name}: {len(logits)} images, predicted earlier")
    return logits


def new_logits(prepared, folder, fold, test, tta, machine, classifier=None):
    """Predict the test images with a finished fold's model, and keep and return its logits, float32 [N, K]. classifier:
    that model, or None: it is read from foldK.pt. Under torchrun all processes take part. Raises UserError where
    foldK.pt is another training's, or logits aren't finite."""
    path, name, made_with = about_fold(folder, fold, test, tta, machine)
    record = read_record(folder, fold)
    config, amp = record["config"], made_with["amp"]
    if classifier is None:
        if machine.compiled:
            gc.collect()  # a compiled model refers to itself: that of the last fold would stay on the GPU
        saved, classifier = load_fold(folder / f"fold{fold}.pt", machine.device, machine.compiled)
        if saved["config"] != config or saved["classes"] != prepared.task.names:
            raise UserError(f"{folder}/fold{fold}.pt isn't the model of fold{fold}.json: train it with --overwrite")
    features = test_features(prepared, record, tta, len(test.names), amp)
    if features is not None:
        logits = head_logits(classifier, features)[1]
    else:
        logits = machine.predict(TTAS[tta](classifier), test.images[config["size"]], amp, name)
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        remedy = "train the fold again" if amp == "none" else "predict with --amp none, or train the fold again"
        raise UserError(f"{name}: the predictions of {bad.sum()} images are NaN or infinite: {remedy}")
    if RANK == 0:
        path.with_suffix(".json").unlink(missing_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, logits)
        common.write_json(path.with_suffix(".json"), made_with)
    say(f"{name}: {len(logits)} images predicted")
    return logits
