"""Checkpoints: the files of a finished fold, its provenance, and the resume file of an unfinished one."""

import contextlib
import hashlib
import os
import random
import sys
import time
from pathlib import Path

import common
from common import RANK, WORLD, UserError, conclude, file_hash, listing, replacing, say, warn, write_csv, write_json

import numpy as np
import pandas as pd
import timm
import torch

from kit.experiment import differences, read_record, write_logits
from kit.score.metrics import METRICS
from kit.train import distributed
from kit.train.device import compile_backbone
from kit.train.model import WEIGHT_ERRORS, build_model

CODE = "augment dataset linear_probe losses model optim ranger21 run".split()  # what, with 01, decides the training
DIGEST = 32  # bytes of a SHA-256
OUTPUTS = ("logits", "targets")  # of the epoch's batches so far: lists of tensors in a fold's state


def provenance(weights, init=None):
    """Return the hashes of the code and of --weights. init: the hash of the experiment of --init, if any."""
    paths = [common.ROOT / name for name in ("01_train_fold.py", *(f"kit/train/{part}.py" for part in CODE))]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    weights = weights if weights in ("hub", "none") else file_hash(Path(weights))
    return dict(code=code, weights=weights) | (dict(init=init) if init else {})


def save_fold(run, kept, logits, epochs):
    """Write foldK.csv, foldK.json, foldK_epochs.csv and, last, foldK.pt, which marks the fold as finished. kept,
    logits, epochs: what 01's train_fold returned."""
    experiment, fold, folder, folds = run.experiment, run.fold, run.experiment.folder, run.experiment.folds
    prepared, metric = experiment.prepared, experiment.prepared.metric
    path, chosen = folder / f"fold{fold}.pt", kept[experiment.config["keep"]]
    table = folds.loc[folds.fold == fold, ["image_name", "target"]].reset_index(drop=True)
    kinds = dict(best=kept["best"]["logits"], last=kept["last"]["logits"], views=logits)
    # the code's strings as keys: pickle writes a repeated string object as a reference, and a resume file's differ
    valid = {key: chosen["scores"][key] for key in ("loss", "accuracy", metric) if key in chosen["scores"]}
    record = dict(fold=fold, epoch=chosen["epoch"], config=experiment.config, scores=valid) | prepared.for_test()
    how = dict(version=common.__version__, torch=torch.__version__, timm=timm.__version__)
    how |= dict(device=str(experiment.device), amp=experiment.amp, micro_batch=experiment.micro_batch)
    how |= dict(batch_norm=run.batch_norm, before_stops=run.resume.before_stops)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(record | dict(model=chosen["weights"]), file)  # a path's name would be part of the archive
            os.fsync(file.fileno())  # a full disk must show before the old model of --overwrite goes
        for old in (path, folder / f"fold{fold}_test.npy"):
            old.unlink(missing_ok=True)  # no predictions beside other weights
        write_logits(folder, fold, table, kinds, len(prepared.task))
        write_csv(folder / f"fold{fold}_epochs.csv", pd.DataFrame(epochs))
        write_json(folder / f"fold{fold}.json", record | experiment.provenance | dict(run=how))
    run.resume.path.unlink(missing_ok=True)
    score = f"valid {METRICS[metric].name} {chosen['scores'][metric]:.4f}"
    conclude(f"fold {fold} of {folder.name}: kept epoch {chosen['epoch']}, {score} → {path}")


def epoch_start():
    """Return the part of a fold's state that each epoch resets: steps done, seconds spent, logits and targets."""
    return dict(step=0, seconds=0.0, logits=[], targets=[])


def fold_start():
    """Return a fold's state at its start: epoch, updates taken and skipped, a row per epoch, kept epochs."""
    return dict(epoch=1, updates=0, skipped=0, rows=[], kept={}) | epoch_start()


class ResumeFile:
    """foldK.resume.pt, from which a stopped fold of an Experiment resumes."""

    def __init__(self, experiment, fold):
        self.path, self.config = experiment.folder / f"fold{fold}.resume.pt", experiment.config
        self.made_with, self.replaced = experiment.provenance | dict(amp=experiment.amp), fold in experiment.replaced
        self.before_stops = []  # the provenance and precision before each stop after which they changed
        self.minutes, self.stop_after = experiment.save_minutes, experiment.stop_after
        self.parts, self.last_save = {}, time.monotonic()

    def time_is_up(self):
        return self.stop_after is not None and time.monotonic() - common.STARTED >= self.stop_after

    def due(self):
        """Return whether it is time to save within the epoch."""
        return self.time_is_up() or (self.minutes > 0 and time.monotonic() - self.last_save >= 60 * self.minutes)

    def stop_if_late(self, name, done):
        """End the script, whose state is saved, where --stop-after says so."""
        if distributed.broadcast(self.time_is_up()):
            say(f"{name}: stopped by --stop-after; run it again to resume after {done}")
            sys.exit(75)  # EX_TEMPFAIL of sysexits.h, "try again later"

    def save(self, state):
        """Write the file. state: what `load` returned, brought up to date. Under torchrun the first process writes it
        for all, and all wait for it. A full disk is a warning."""
        for key in OUTPUTS:
            state[key] = [torch.cat(state[key])] if state[key] else []
        shares = distributed.all_gather({key: [tensor.cpu() for tensor in state[key]] for key in OUTPUTS})
        randoms = distributed.all_gather(random_states())
        if self.minutes > 0 and RANK == 0:
            outputs = {key: [tensor for share in shares for tensor in share[key]] for key in OUTPUTS}
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            content = dict(progress=state | outputs, random=randoms, config=self.config, parts=parts)
            content |= dict(made_with=self.made_with, before_stops=self.before_stops)
            try:
                with replacing(self.path) as temporary:
                    with open(temporary, "wb") as file:  # given a path, torch.save hides that the disk is full
                        torch.save(content, file)
                    with open(temporary, "ab") as file:
                        file.write(bytes.fromhex(file_hash(temporary)))
            except UserError as error:
                warn(f"no resume file: {error}. Training goes on; after a stop this fold would start over")
        self.last_save = time.monotonic()
        distributed.broadcast(0)

    def load(self, run):
        """Register the run's model, optimiser, scheduler, EMA and GradScaler, and restore them and the random states.

        → the fold's state: a dict of epoch, rows, kept and the keys of `epoch_start`; without a file, that of the first
        epoch. A damaged file, or one of other settings, is renamed with a message, and the fold starts over. Where
        code, weights or precision have changed, it does so with --overwrite; else it resumes with a warning."""
        self.parts = dict(model=run.classifier, optimizer=run.optimizer, scaler=run.scaler)
        self.parts |= {k: part for k in ("scheduler", "ema") if (part := getattr(run, k)) is not None}
        if RANK > 0:
            distributed.broadcast(0)  # wait while the first process reads the file, and may rename it
        state = (self._load() if self.path.exists() else None) or fold_start()
        if RANK == 0:
            distributed.broadcast(0)
        if len(set(distributed.all_gather((state["epoch"], state["step"])))) > 1:
            raise UserError(f"the processes read different files {self.path}: give an --output that all of them share")
        if state["rows"] or state["step"]:
            steps = len(run.train_rows) // self.config["batch_size"]
            done = f"epoch {state['epoch']} after {state['step']} of {steps} steps"
            say(f"fold {run.fold} of {run.experiment.folder.name} goes on in {done}")
        device = run.experiment.device
        return state | {key: [tensor.to(device) for tensor in state[key][RANK::WORLD]] for key in OUTPUTS}

    def _load(self):
        try:
            state = read_checked(self.path)
            if changed := differences(state["config"], self.config):
                raise ValueError(f"it was made with other settings: {'; '.join(changed)}")
            if "made_with" not in state:
                raise ValueError("it is of another version of the kit")
            others = {key: was for key, was in state["made_with"].items() if was != self.made_with.get(key)}
            if others and self.replaced:
                raise ValueError(f"it was made with other {listing(others)}")
        except (ValueError, OSError) as error:
            aside = self.path.with_suffix(".damaged")
            os.replace(self.path, aside)
            say(f"{self.path} can't be used ({error}): the fold starts over, and the file is kept as {aside.name}")
            return None
        self.before_stops = state["before_stops"] + [others] * bool(others)
        if others:
            warn(f"{self.path} was made with other {listing(others)}: --overwrite would start the fold over")
        for name, part in self.parts.items():
            if state["parts"].get(name):  # a GradScaler that is switched off has no state
                part.load_state_dict(state["parts"][name])
        if len(state["random"]) > RANK:
            restore_random_states(state["random"][RANK])
        return state["progress"]


def read_checked(path):
    """Return the content of a resume file. Raises ValueError where its bytes don't match its checksum."""
    content = np.memmap(path, np.uint8, "r")
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:].tobytes():
        raise ValueError("it is damaged: its checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def random_states():
    """Return the states of all random generators."""
    kind, keys, *rest = np.random.get_state()
    # of the process's own GPU: reading another one's would open a context on it
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return dict(torch=torch.get_rng_state(), cuda=cuda, numpy=[kind, keys.tolist(), *rest], python=random.getstate())


def restore_random_states(states):
    """Restore what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"][0])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    random.setstate(states["python"])


def earlier_weights(folder, fold, config):
    """Return the state_dicts of backbone and head of the same fold of an earlier experiment. Raises UserError where it
    is missing, of another model, or of other folds, whose training images may be held out here."""
    record = read_record(folder, fold)["config"]
    for key in ("model", "model_kwargs", "head", "norm", "folds_hash"):
        its, ours = (without_drops(part[key]) if key == "model_kwargs" else part[key] for part in (record, config))
        if its != ours:
            raise UserError(f"--init {folder.name}: its {key} is {its!r} and not {ours!r}: give another")
    with readable_checkpoint(path := folder / f"fold{fold}.pt"):
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    parts = "backbone.", "head."
    return [{key.removeprefix(p): value for key, value in weights.items() if key.startswith(p)} for p in parts]


def without_drops(kwargs):
    """Return the settings of --model-kwargs but rates of dropout and stochastic depth, which change no weight."""
    return {key: value for key, value in kwargs.items() if "drop" not in key}


@contextlib.contextmanager
def readable_checkpoint(path):
    """Turn the errors of a foldK.pt that is missing or damaged into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train that fold") from None
    except (*WEIGHT_ERRORS, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or not the kit's ({reason}): train it again with --overwrite") from None


def load_fold(path, device, compiled=False):
    """Read a foldK.pt. → (its dict without the weights, the Classifier in eval mode on `device`)."""
    with readable_checkpoint(path):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model = build_model(saved["config"], len(saved["classes"]), None)
        model.load_state_dict(dict(log_prior=model.log_prior) | saved.pop("model"))  # older files have no log_prior
    if compiled:
        compile_backbone(model.backbone)
    return saved, model.to(device).eval()
