"""What is kept of a trained fold, and what made it?"""

import contextlib
import hashlib
import os
import pickle
import random
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch

from common import RANK, STARTED, WORLD, UserError, conclude, file_hash, replacing, say, warn, write_csv, write_json
from kit.experiment import differences, read_record, write_logits
from kit.score.metrics import METRICS
from kit.train import distributed
from kit.train.device import compile_backbone
from kit.train.model import WEIGHT_ERRORS, build_model

OF_TESTS = "task", "ranges", "positive", "per_id", "reading"  # what 03 needs to know of other test images
# What decides how a fold is trained: a change between two folds is worth a warning.
CODE = [
    "01_train_fold.py",
    *(f"kit/train/{part}.py" for part in "augment dataset losses model optim linear_probe ranger21".split()),
]


def makers(weights, earlier=None):
    """→ the hashes of the code and of the weights that train a fold. weights: --weights; earlier: the hash of what
    made the experiment of --init, if any."""
    root, code = Path(__file__).parent.parent.parent, hashlib.sha256()
    for name in CODE:
        code.update((root / name).read_bytes())
    weights = weights if weights in ("hub", "none") else file_hash(Path(weights))
    return dict(code=code.hexdigest(), weights=weights) | (dict(init=earlier) if earlier else {})


def save_fold(run, kept, logits, epochs):
    """Writes foldK.csv, foldK.json and, last, foldK.pt, whose presence says that the fold is finished.

    kept: what 01's train_fold returned; logits: float32 [n, K] of the held-out images by the kept weights, with the
    experiment's views; epochs: the rows of foldK_epochs.csv."""
    config, classes, path = run.config, run.prepared["classes"], run.folder / f"fold{run.fold}.pt"
    chosen = kept[config["keep"]]
    table = run.folds.loc[run.folds.fold == run.fold, ["image_name", "target"]].reset_index(drop=True)
    kinds = dict(best=kept["best"]["logits"], last=kept["last"]["logits"], views=logits)
    about = dict(
        fold=run.fold, epoch=chosen["epoch"], config=config, classes=classes, metric=run.metric,
        submission=run.prepared["submission"],
        # new keys: pickle writes a string that it has met before as a reference, and those of a resume file are others
        scores={key: chosen["scores"][key] for key in ("loss", "accuracy", run.metric) if key in chosen["scores"]},
    )  # fmt: skip
    about |= {key: run.prepared[key] for key in OF_TESTS if key in run.prepared}
    how = dict(device=str(run.device), amp=run.amp, torch=torch.__version__, timm=timm.__version__)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(about | dict(model=chosen["weights"]), file)  # a path's name would be part of the archive
            os.fsync(file.fileno())  # a full disk must show before the old model of --overwrite goes
        for old in (path, run.folder / f"fold{run.fold}_test.npy"):
            old.unlink(missing_ok=True)  # predictions never stand beside other weights
        write_logits(run.folder, run.fold, table, kinds, classes)
        write_csv(run.folder / f"fold{run.fold}_epochs.csv", pd.DataFrame(epochs))
        write_json(run.folder / f"fold{run.fold}.json", about | run.makers | dict(run=how))
    run.resume.path.unlink(missing_ok=True)
    score = f"valid {METRICS[run.metric].name} {chosen['scores'][run.metric]:.4f}"
    conclude(f"fold {run.fold} of {run.folder.name}: kept epoch {chosen['epoch']}, {score} → {path}")


DIGEST = 32  # bytes of a SHA-256
TO_BE_CONTINUED = 75  # exit code of --stop-after; sysexits.h calls it EX_TEMPFAIL, "try again later"
SEEN = ("logits", "targets")  # of the epoch so far: lists of tensors in the state


def epoch_start():
    """What begins anew with each epoch in a fold's state: steps done, seconds spent, logits and targets seen."""
    return dict(step=0, seconds=0.0, logits=[], targets=[])


class ResumeFile:
    """foldK.resume.pt.

    config: the fold's settings. defaults: what a setting was that an older file lacks. minutes: the least time between
    two saves within an epoch; 0 saves nothing. stop_after: seconds after the start of the process at which training
    saves and ends, or None."""

    def __init__(self, path, config, defaults, minutes, stop_after=None):
        self.path, self.config, self.defaults = path, config, defaults
        self.minutes, self.stop_after = minutes, stop_after
        self.parts, self.last_save = {}, time.monotonic()

    def due(self):
        """Whether it is time to save within the epoch."""
        return self.time_is_up() or (self.minutes > 0 and time.monotonic() - self.last_save >= 60 * self.minutes)

    def time_is_up(self):
        return self.stop_after is not None and time.monotonic() - STARTED >= self.stop_after

    def stop(self, name, done):
        """Ends the script, whose state is saved."""
        say(f"{name}: stopped by --stop-after; run it again to go on after {done}")
        sys.exit(TO_BE_CONTINUED)

    def save(self, state):
        """Writes the state of everything; `state` is what `load` returned, brought up to date. Under torchrun the first
        process writes what all have seen of the epoch, and all wait for it. A full disk costs the safety copy, not the
        training."""
        for key in SEEN:
            state[key] = [torch.cat(state[key])] if state[key] else []
        shares = distributed.gather({key: [tensor.cpu() for tensor in state[key]] for key in SEEN})
        randoms = distributed.gather(random_states())
        if self.minutes > 0 and RANK == 0:
            seen = {key: [tensor for share in shares for tensor in share[key]] for key in SEEN}
            self._write(dict(progress=state | seen, random=randoms))
        self.last_save = time.monotonic()
        distributed.from_first(0)

    def _write(self, content):
        content |= dict(config=self.config, parts={name: part.state_dict() for name, part in self.parts.items()})
        try:
            with replacing(self.path) as temporary:
                with open(temporary, "wb") as file:  # by its path, torch.save wouldn't say that the disk is full
                    torch.save(content, file)
                with open(temporary, "ab") as file:
                    file.write(bytes.fromhex(file_hash(temporary)))
        except UserError as error:
            warn(f"no resume file: {error}. Training goes on; after a stop this fold would start over")

    def load(self, run):
        """Takes charge of the run's model, optimiser, scheduler and GradScaler, and puts them and the random states
        back as they were when the file was saved. → the fold's state: a dict of epoch, step, rows, kept and what
        `epoch_start` names; where there is no file, the start of the first epoch.

        A damaged file, or one of other settings, is set aside with a message, and the fold starts over."""
        self.parts = dict(model=run.classifier, optimizer=run.optimizer, scaler=run.scaler)
        self.parts |= {k: part for k in ("scheduler", "ema") if (part := getattr(run, k)) is not None}
        if RANK > 0:
            distributed.from_first(0)  # waits here while the first process looks at the file, and may set it aside
        state = self._load() if self.path.exists() else None
        if RANK == 0:
            distributed.from_first(0)
        state = state or dict(epoch=1, rows=[], kept={}) | epoch_start()
        if len(set(distributed.gather((state["epoch"], state["step"])))) > 1:
            raise UserError(f"the processes see different files {self.path}: give an --output that all of them see")
        if state["rows"] or state["step"]:
            steps = len(run.train_rows) // self.config["batch_size"]
            done = f"epoch {state['epoch']} after {state['step']} of {steps} steps"
            say(f"fold {run.fold} of {run.folder.name} goes on in {done}")
        return state | {key: [tensor.to(run.device) for tensor in state[key][RANK::WORLD]] for key in SEEN}

    def _load(self):
        try:
            state = read_checked(self.path)
            changed = differences(self.defaults | state["config"], self.config)
            if changed:
                raise ValueError(f"it was made with other settings: {'; '.join(changed)}")
        except (ValueError, OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            aside = self.path.with_suffix(".damaged")
            os.replace(self.path, aside)
            say(f"{self.path} can't be used ({error}): the fold starts over, and the file is kept as {aside.name}")
            return None
        for name, part in self.parts.items():
            if state["parts"].get(name):  # a GradScaler that is switched off has no state
                part.load_state_dict(state["parts"][name])
        if len(state["random"]) > RANK:
            restore_random_states(state["random"][RANK])
        return state["progress"]


def read_checked(path):
    """Reads a resume file. Raises ValueError where a byte of it has changed, or some are missing."""
    content = np.memmap(path, np.uint8, "r")
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:].tobytes():
        raise ValueError("it is damaged: its checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def random_states():
    kind, keys, *rest = np.random.get_state()
    # of the process's own GPU: asking another one would open a context on it
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return dict(torch=torch.get_rng_state(), cuda=cuda, numpy=[kind, keys.tolist(), *rest], python=random.getstate())


def restore_random_states(states):
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"][0])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    random.setstate(states["python"])


def earlier_weights(folder, fold, config):
    """→ the state_dicts of the backbone and of the head of the same fold of an earlier experiment.

    Raises UserError where it is missing, of another model, or of other folds: it may have seen the held-out images."""
    record = read_record(folder, fold)["config"]
    for key in ("model", "model_kwargs", "head", "norm", "folds_hash"):
        if record[key] != config[key]:
            raise UserError(f"--init {folder.name}: its {key} is {record[key]!r} and not {config[key]!r}: give another")
    with whole(path := folder / f"fold{fold}.pt"):
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    parts = {"backbone.": {}, "head.": {}}
    for key, value in weights.items():
        for part in parts:
            if key.startswith(part):
                parts[part][key.removeprefix(part)] = value
    return parts.values()


@contextlib.contextmanager
def whole(path):
    """Turns the errors of a fold's file that is missing or damaged into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train that fold") from None
    except (*WEIGHT_ERRORS, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or not the kit's ({reason}): train it again with --overwrite") from None


def load_fold(path, device, compiled=False):
    """Reads a foldK.pt. → (its dict without the weights, the model in eval mode on `device`)."""
    with whole(path):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model = build_model(saved["config"], len(saved["classes"]), "none")
        model.load_state_dict(saved.pop("model"))
    if compiled:
        compile_backbone(model.backbone)
    return saved, model.to(device).eval()
