"""Experiment trackers, by --track: TensorBoard, Weights & Biases.

Fold K of an experiment is the tracker's run EXP/foldK. It holds the settings; step/loss (the mean since the last
logging) and step/lr, about twice a second; each row of foldK_epochs.csv as epoch/…. Its steps are the batches since the
start of the fold. A fold that resumes after a stop continues its run. Only --track imports the libraries.
"""

import contextlib
import importlib
import os
import random
from collections.abc import Callable
from typing import NamedTuple

from common import RANK, UserError, warn

import numpy as np


class TrackerRun(NamedTuple):
    """A tracker's open run. `log` and `close` may raise anything: that is one warning, and the training goes on."""

    id: str  # finds the run after a stop
    log: Callable[[dict[str, float], int], None]  # (values, step)
    close: Callable[[bool], None]  # (whether the fold is finished)


class Tracker(NamedTuple):
    """An entry of TRACKERS. Its key is the library's name for pip."""

    module: str  # of the library, to be imported
    start: Callable[["Track"], TrackerRun]


def to_tensorboard(fold: "Track") -> TrackerRun:
    """Open event files in OUTPUT/tensorboard/EXP/foldK. A fold that starts removes those of its earlier training."""
    from torch.utils.tensorboard import SummaryWriter

    folder = fold.output / "tensorboard" / fold.name
    if fold.run_id:  # from this step on, TensorBoard drops what was logged between the last resume file and the stop
        writer = SummaryWriter(folder, purge_step=fold.step, flush_secs=10)
    else:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer = SummaryWriter(folder, flush_secs=10)
        rows = [f"| {key} | {value} |" for key, value in fold.settings.items()]
        writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def log(values, step):
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return TrackerRun(fold.name, log, lambda finished: writer.close())


def to_wandb(fold: "Track") -> TrackerRun:
    """Open a run of Weights & Biases, with its files in OUTPUT/wandb. Its WANDB_… variables apply, such as
    WANDB_PROJECT (default: foldkit) and WANDB_MODE=offline, which needs no network."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "foldkit"), group=fold.name.split("/")[0], name=fold.name,
        id=fold.run_id, resume="allow" if fold.run_id else None, config=fold.settings,
        dir=os.environ.get("WANDB_DIR", str(fold.output)),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")  # wandb's own counter can't go back to the last resume file
    log = lambda values, step: run.log(values | dict(step=step))  # noqa: E731
    return TrackerRun(run.id, log, lambda finished: run.finish(exit_code=0 if finished else 1))


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker("torch.utils.tensorboard", to_tensorboard),
    "wandb": Tracker("wandb", to_wandb),
}


def check_library(name):
    """Import the library of TRACKERS[name]. Raises UserError where that fails."""
    try:
        importlib.import_module(TRACKERS[name].module)
    except Exception as error:  # a broken installation may raise anything
        raise UserError(f"--track {name} can't be used here ({error}): pip install {name}") from None


class Track(contextlib.AbstractContextManager):
    """A fold's run in TRACKERS[key], opened at the first logging and closed at the end of the `with` block. With key
    None, and in all processes but the first, it logs nothing.

    name: EXP/foldK; run_id: the run to continue, None where the fold starts; step: the first one to be logged."""

    def __init__(self, key, folder, fold, settings):
        self.key, self.output, self.name, self.settings = key, folder.parent, f"{folder.name}/fold{fold}", settings
        self.run_id, self.step, self.opened, self.off = None, 0, None, key is None or RANK > 0

    def __exit__(self, kind, error, trace):
        if self.opened:
            self._call(lambda: self.opened.close(kind is None))

    def note(self, state, part, values, step):
        """Log `values` (a dict of numbers) as PART/key at the step. The run's id goes into the fold's state."""

        def log():
            if self.opened is None:
                ids = state.setdefault("track", {})
                self.run_id, self.step = ids.get(self.key), step
                self.opened = TRACKERS[self.key].start(self)
                ids[self.key] = self.opened.id
            self.opened.log({f"{part}/{key}": float(value) for key, value in values.items()}, step)

        self._call(log)

    def _call(self, function):
        """Call a function unless tracking is off. An error switches it off and is a warning; random streams stay."""
        if self.off:
            return
        states = random.getstate(), np.random.get_state()
        try:
            function()
        except Exception as error:  # of the library, its server or its disk: none is worth ending a training for
            self.off = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f"{self.name}: --track {self.key} failed ({reason}). Training goes on without it")
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
