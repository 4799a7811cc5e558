"""Dataclasses Experiment (what its folds share) and FoldRun (one fold's training), and how they are set up."""

import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import RANK, WORLD, UserError, experiment_folder, say

import numpy as np
import pandas as pd
import torch
from timm.utils import ModelEmaV3
from torch.nn.modules.batchnorm import _BatchNorm

from kit.data.prepared import Prepared, read_prepared
from kit.experiment import check_config, is_finished, lock_config, lock_fold, read_record, warn_of_mixed_provenance
from kit.train import distributed
from kit.train.checkpoint import ResumeFile, earlier_weights, provenance
from kit.train.dataset import log_prior
from kit.train.device import compile_backbone, pick_workers
from kit.train.losses import LOSSES
from kit.train.model import Classifier, build_model, check_size, checkpoint_activations
from kit.train.optim import OPTIMIZERS, choose_trained
from kit.train.ranger21 import Ranger21Fast
from kit.train.settings import changed, fold_numbers, for_task, init_provenance, sampler_of
from kit.train.trackers import Track

LEAST_FOR_BATCH_NORM = 8  # images at once: on 1 at a time test_resnet ended with an AUC of 0.50, on 8 and 16 with 0.92


@dataclass
class Experiment:
    """What the folds of an experiment share. N images; K classes, labels or numbers."""

    folder: Path  # OUTPUT/EXP
    config: dict  # its settings, as config.json holds them
    provenance: dict  # hashes of the code and the weights
    chosen: list[int]  # the folds to train
    replaced: set[int]  # those of them that are trained again although they are finished
    prepared: Prepared
    folds: pd.DataFrame  # folds.csv
    images: np.ndarray  # uint8 [N, S, S, 3], memory-mapped
    targets: np.ndarray  # [N] or [N, K], as the loss takes them

    # the machine, which is no setting
    weights: str  # --weights: hub, none or a file
    device: torch.device
    amp: str  # "fp16", "bf16" or "none"
    compile: str  # torch.compile: "on", "off" or, where the pace of the first steps decides, "auto"
    workers: int  # of a DataLoader
    track: str | None  # a key of TRACKERS
    micro_batch: int | None  # images of a batch that are computed at once; None: all
    grad_checkpointing: bool  # activations are computed twice
    save_minutes: float  # between two resume files within an epoch; 0: none is written
    stop_after: float | None  # seconds after the start of the process

    @property
    def parts(self):
        """Parts in which a process computes its share of a batch; as many in all, since SyncBatchNorm waits for all."""
        share = math.ceil(self.config["batch_size"] / WORLD)
        return math.ceil(share / (self.micro_batch or share))

    @property
    def images_at_once(self):
        """The least number of images in a forward pass of training."""
        at_once = max(1, self.config["batch_size"] // WORLD // self.parts)
        return at_once * (WORLD if self.device.type == "cuda" else 1)  # SyncBatchNorm sees those of all processes


@dataclass
class FoldRun:
    """The training of a fold."""

    experiment: Experiment
    fold: int
    train_rows: np.ndarray  # int [n], of the experiment's images
    valid_rows: np.ndarray  # int [N - n]
    classifier: Classifier
    model: torch.nn.Module  # the classifier, under torchrun in DistributedDataParallel
    criterion: Callable  # one of LOSSES
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None  # None where the optimiser has its own
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler
    resume: ResumeFile
    track: Track
    timed: bool = False  # whether EpochMonitor has printed its duration

    @property
    def batch_norm(self):
        """Of how many images batch norm takes statistics, or None without it. 0: it keeps those that it has, to whose
        features the head was fitted, or since there are too few images to estimate others."""
        experiment = self.experiment
        if not any(isinstance(module, _BatchNorm) for module in self.classifier.modules()):
            return None
        # from scratch there are none to keep: for 4 images at once an AUC of 0.89, without a batch's statistics 0.79
        from_scratch = experiment.config["weights"] == "none" and not experiment.micro_batch
        few = experiment.images_at_once < (2 if from_scratch else LEAST_FOR_BATCH_NORM)
        return 0 if few or experiment.config["init"] == "probe" else experiment.images_at_once

    @property
    def kept_model(self):
        """The classifier that is validated and kept: with --ema the average of its weights."""
        return self.classifier if self.ema is None else self.ema.module

    def compile(self):
        """Compile the networks that are trained and validated, and Ranger21's arithmetic."""
        for classifier in {self.classifier, self.kept_model}:
            compile_backbone(classifier.backbone)
        if isinstance(self.optimizer, Ranger21Fast):
            self.optimizer.compile()

    def epoch_name(self, epoch):
        """Return 'fold 2 epoch 1/3'."""
        last = str(self.experiment.config["epochs"])
        return f"fold {self.fold} epoch {epoch:{len(last)}}/{last}"


def open_experiment(folder, config, defaults, fold, overwrite, device, workers, **machine):
    """Return the Experiment in `folder`. Raises UserError where its finished folds have other settings. config: its
    settings; defaults: those of a run without flags; the others are the flags and the Experiment's fields."""
    prepared, folds = read_prepared(folder.parent)
    config = for_task(config, prepared.task, prepared.metric)
    config["changed"] = changed(config, defaults | dict(sampler=sampler_of(prepared.metric)))
    config |= dict(folds_hash=prepared.folds_hash, metric=prepared.metric)  # decided by 00, the same for all folds
    chosen = fold_numbers(fold, prepared.folds)
    if config["batch_size"] > (count := len(folds) - folds.fold.value_counts().max()):
        raise UserError(f"--batch-size {config['batch_size']} is more than the {count} training images: lower it")
    replaced = set(chosen) if overwrite else set()
    check_config(folder, config, replaced)
    return Experiment(
        folder=folder, config=config, chosen=chosen, replaced=replaced, prepared=prepared, folds=folds,
        provenance=provenance(machine["weights"], init_provenance(config["init"], folder, chosen)),
        images=prepared.open_images("train", config["size"], len(folds)),
        targets=prepared.task.to_01(prepared.task.read_targets(folds.target)), device=device,
        workers=pick_workers(workers, device), **machine,
    )  # fmt: skip


def seed_for(*numbers):
    """Return a seed, int, for the numbers: an experiment's seed, a fold, a rank."""
    return np.random.SeedSequence(numbers).generate_state(1).item()


def set_up(experiment, fold):
    """Return the FoldRun of a fold at its start: model, loss, optimiser, resume file, tracker. Seeds all generators."""
    config, folds, device = experiment.config, experiment.folds, experiment.device
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(seed_for(config["seed"], fold))
    weights, head = experiment.weights, None
    if config["init"] not in ("weights", "probe"):
        weights, head = earlier_weights(experiment_folder(experiment.folder.parent, config["init"]), fold, config)
    classifier = build_model(config, len(experiment.prepared.task), weights).to(device)
    check_size(classifier, config)
    if experiment.grad_checkpointing:
        checkpoint_activations(classifier.backbone, config["model"])
    if head is not None:
        classifier.head.load_state_dict(head)
    if RANK > 0:  # or dropout would drop the same units in each process's share of a batch
        torch.manual_seed(seed_for(config["seed"], fold, RANK))
    choose_trained(classifier, config["tune"], config["freeze"])
    train_rows, valid_rows = (np.flatnonzero(mask) for mask in (folds.fold != fold, folds.fold == fold))
    classifier.log_prior.copy_(log_prior(config, experiment.targets[train_rows], len(classifier.log_prior)))
    updates = -(-(len(train_rows) // config["batch_size"]) // config["accumulate"])
    optimizer, scheduler = OPTIMIZERS[config["optimizer"]](classifier, config, updates * config["epochs"])
    ema = ModelEmaV3(classifier, decay=config["ema"], use_warmup=True) if config["ema"] else None
    run = FoldRun(
        experiment=experiment, fold=fold, train_rows=train_rows, valid_rows=valid_rows, classifier=classifier,
        model=distributed.wrap(classifier, device), criterion=LOSSES[config["loss"]], optimizer=optimizer,
        scheduler=scheduler, ema=ema, scaler=torch.amp.GradScaler(device.type, enabled=experiment.amp == "fp16"),
        resume=ResumeFile(experiment, fold), track=Track(experiment.track, experiment.folder, fold, config),
    )  # fmt: skip
    if experiment.compile == "on":
        run.compile()
    return run


@contextlib.contextmanager
def start_fold(experiment, fold):
    """Lock a fold and set it up. Yields its FoldRun, or None where it is finished and isn't to be replaced."""
    folder, replaced = experiment.folder, experiment.replaced
    with contextlib.ExitStack() as held:
        if RANK == 0:
            held.enter_context(lock_fold(folder, fold))
        # No process begins before the first one has locked the fold; by then, another job may have finished it.
        if distributed.broadcast(is_finished(folder, fold) and fold not in replaced):
            stopped = (folder / f"fold{fold}.resume.pt").exists()
            effect = "resumes its retraining" if stopped else "trains it again"
            say(f"fold {fold} of {folder.name} is finished (--overwrite {effect})")
            yield None
            return
        run = set_up(experiment, fold)
        held.enter_context(run.track)
        if RANK == 0:
            held.enter_context(lock_config(folder, experiment.config, {fold, *replaced}))
            records = {k: read_record(folder, k) for k in range(experiment.prepared.folds) if is_finished(folder, k)}
            this = experiment.provenance | dict(run=dict(amp=experiment.amp, batch_norm=run.batch_norm))
            warn_of_mixed_provenance(folder.name, records | {fold: this})
        yield run
