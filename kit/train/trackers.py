"""Experiment trackers, by --track: TensorBoard, Weights & Biases.

Fold K of an experiment is the tracker's run EXP/foldK. It holds the settings; step/loss (the mean since the last
logging) and step/lr, about twice a second; each row of foldK_epochs.csv as epoch/…. Its steps are the batches since the
start of the fold. A fold that resumes after a stop continues its run. The libraries are optional, and only --track
imports them.
"""

import contextlib
import importlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import RANK, UserError, warn

FLUSH_SECONDS = 10  # TensorBoard shows values after this time at the latest


class Fold(NamedTuple):
    """A fold that starts or resumes, as a tracker needs it."""

    name: str  # EXP/foldK
    output: Path  # --output
    settings: dict  # of the experiment
    run_id: str | None  # the run to continue, None where the fold starts
    step: int  # the first one to be logged


class Opened(NamedTuple):
    """A tracker's open run. `log` and `close` may raise anything: that is one warning, and the training goes on."""

    id: str  # finds the run after a stop
    log: Callable[[dict[str, float], int], None]  # (values, step)
    close: Callable[[bool], None]  # (whether the fold is finished)


class Tracker(NamedTuple):
    """An entry of TRACKERS."""

    library: str  # the module to import, and its name for pip
    start: Callable[[Fold], Opened]


def to_tensorboard(fold: Fold) -> Opened:
    """Open event files in OUTPUT/tensorboard/EXP/foldK. A fold that starts removes those of its earlier training."""
    from torch.utils.tensorboard import SummaryWriter

    folder = fold.output / "tensorboard" / fold.name
    if not fold.run_id:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
    # From this step on, TensorBoard drops what was logged between the last resume file and the stop.
    purge_step = fold.step if fold.run_id else None
    writer = SummaryWriter(folder, purge_step=purge_step, flush_secs=FLUSH_SECONDS)
    if not fold.run_id:
        rows = [f"| {key} | {value} |" for key, value in fold.settings.items()]
        writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def log(values, step):
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Opened(fold.name, log, lambda finished: writer.close())


def to_wandb(fold: Fold) -> Opened:
    """Open a run of Weights & Biases, with its files in OUTPUT/wandb. Its WANDB_… variables apply, such as
    WANDB_PROJECT (default: foldkit) and WANDB_MODE=offline, which needs no network."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "foldkit"), group=fold.name.split("/")[0], name=fold.name,
        id=fold.run_id, resume="allow" if fold.run_id else None, config=fold.settings,
        dir=os.environ.get("WANDB_DIR", str(fold.output)),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")  # wandb's own counter can't go back to the last resume file

    def log(values, step):
        run.log(values | dict(step=step))

    return Opened(run.id, log, lambda finished: run.finish(exit_code=0 if finished else 1))


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker("tensorboard", to_tensorboard),
    "wandb": Tracker("wandb", to_wandb),
}


def check_library(name):
    """Import the library of TRACKERS[name]; for None, do nothing. Raises UserError where the import fails."""
    if name is None:
        return
    try:
        importlib.import_module(TRACKERS[name].library)
    except Exception as error:  # a broken installation may raise anything
        raise missing(name, error) from None


def missing(name, error):
    """Return the UserError for a library that is missing."""
    return UserError(f"--track {name} can't be used here ({error}): pip install {TRACKERS[name].library}")


class Track:
    """A fold's run in TRACKERS[name], opened at the first logging and closed at the end of the `with` block. With name
    None, and in all processes but the first, it logs nothing.

    folder: the experiment's, in --output."""

    def __init__(self, name, folder, fold, settings):
        self.name, self.opened, self.off = name, None, name is None or RANK > 0
        self.fold = Fold(f"{folder.name}/fold{fold}", folder.parent, settings, None, 0)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.opened and not self.off:
            with self._failure_as_warning():
                self.opened.close(kind is None)

    def note(self, state, part, values, step):
        """Log `values` (a dict of numbers) as PART/key at the step. The run's id goes into the fold's state, and so
        into its resume file."""
        if self.off:
            return
        with self._failure_as_warning():
            if self.opened is None:
                self.opened = self._open(state.setdefault("track", {}), step)
            self.opened.log({f"{part}/{key}": float(value) for key, value in values.items()}, step)

    def _open(self, ids, step):
        fold = self.fold._replace(run_id=ids.get(self.name), step=step)
        try:
            opened = TRACKERS[self.name].start(fold)
        except ImportError as error:  # a part of the library is missing
            raise missing(self.name, error) from None
        ids[self.name] = opened.id
        return opened

    @contextlib.contextmanager
    def _failure_as_warning(self):
        """Turn any error of the block but a UserError into one warning, and stop tracking. The random streams of the
        training stay as they are."""
        states = random.getstate(), np.random.get_state()
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of the library, its server or its disk: none is worth ending a training for
            self.off = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f"{self.fold.name}: --track {self.name} failed ({reason}). Training goes on without it")
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
