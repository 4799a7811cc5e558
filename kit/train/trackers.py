"""Where can one watch a training while it runs? --track: TensorBoard, MLflow, Weights & Biases.

Fold K of an experiment is a run EXP/foldK there. It holds the settings, step/loss (the mean since the last look) and
step/lr about twice a second, and each row of foldK_epochs.csv as epoch/…, beside the step: batches since the fold's
start. A fold that goes on after a stop goes on in its run. The libraries are optional: nothing imports them unasked.
"""

import contextlib
import importlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import RANK, UserError, warn
from kit.locks import locked

PROJECT = "foldkit"  # the project of all runs, unless MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT names another
FLUSH_SECONDS = 10  # what TensorBoard shows is at most this old
# Unless the user says otherwise: a server that is gone costs the training some seconds, by default minutes. MLflow
# tells its makers nothing of its use.
MLFLOW = (
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
    ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
    ("MLFLOW_LOGGING_LEVEL", "WARNING"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
)


class MissingLibrary(UserError):
    """--track asks for what isn't installed."""


class Fold(NamedTuple):
    """A fold that begins, or goes on after a stop."""

    name: str  # EXP/foldK
    output: Path  # --output
    settings: dict  # of the experiment
    earlier: str | None  # the id of its run where it goes on, else None
    step: int  # the first that will be logged


class Opened(NamedTuple):
    """A run in a tracker. Both functions may raise anything: that is a warning, and the training goes on."""

    id: str  # finds the run again after a stop
    log: Callable  # (values: a dict of floats, step) → None
    close: Callable  # (finished: whether the fold is) → None


class Tracker(NamedTuple):
    library: str  # what must be importable, and is the name for pip
    start: Callable  # Fold → Opened
    environment: tuple = ()  # (variable, its value unless it is set), before the import


def to_tensorboard(fold):
    """Event files in OUTPUT/tensorboard/EXP/foldK. A fold that begins anew replaces those it had."""
    from torch.utils.tensorboard import SummaryWriter

    folder = fold.output / "tensorboard" / fold.name
    if not fold.earlier:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
    # From this step on, TensorBoard forgets what was logged between the last resume file and the stop.
    purge_step = fold.step if fold.earlier else None
    writer = SummaryWriter(folder, purge_step=purge_step, flush_secs=FLUSH_SECONDS)
    if not fold.earlier:
        rows = [f"| {key} | {value} |" for key, value in fold.settings.items()]
        writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def log(values, step):
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Opened(fold.name, log, lambda finished: writer.close())


def to_mlflow(fold):
    """The server of MLFLOW_TRACKING_URI, else the database OUTPUT/mlruns/mlflow.db."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    folder, address = (fold.output / "mlruns").resolve(), os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        import sqlalchemy  # noqa: F401 (mlflow-skinny comes without, and its own error doesn't say so)

        folder.mkdir(parents=True, exist_ok=True)
        address = f"sqlite:///{folder}/mlflow.db"
    with locked(fold.output / ".mlflow.lock", "MLflow", wait=True):  # folds side by side would make it twice
        client = MlflowClient(address)
        project = mlflow_project(client, None if os.environ.get("MLFLOW_TRACKING_URI") else folder.as_uri())
    run, logged = fold.earlier, {}
    if run:  # what was logged between the last resume file and the stop stays as it is
        client.update_run(run, status="RUNNING")
        for key in client.get_run(run).data.metrics:
            logged[key] = max(metric.step for metric in client.get_metric_history(run, key))
    else:
        run = client.create_run(project, run_name=fold.name).info.run_id
        client.log_batch(run, params=[Param(key, str(value)) for key, value in fold.settings.items()])

    def log(values, step):
        now = time.time_ns() // 10**6
        new = [Metric(key, value, now, step) for key, value in values.items() if step > logged.get(key, -1)]
        client.log_batch(run, metrics=new)

    return Opened(run, log, lambda finished: client.set_terminated(run, "FINISHED" if finished else "KILLED"))


def mlflow_project(client, artifacts):
    """→ the id of the MLflow experiment for all runs, made if it isn't there, with its files at `artifacts`."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, artifacts)


def to_wandb(fold):
    """Weights & Biases, as its own WANDB_… variables say; WANDB_MODE=offline works without network. Its files lie in
    OUTPUT/wandb."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), group=fold.name.split("/")[0], name=fold.name,
        id=fold.earlier, resume="allow" if fold.earlier else None, config=fold.settings,
        dir=os.environ.get("WANDB_DIR", str(fold.output)),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")  # wandb's own counter can't go back to the last resume file

    def log(values, step):
        run.log(values | dict(step=step))

    return Opened(run.id, log, lambda finished: run.finish(exit_code=0 if finished else 1))


TRACKERS = {
    "tensorboard": Tracker("tensorboard", to_tensorboard),
    "mlflow": Tracker("mlflow", to_mlflow, MLFLOW),
    "wandb": Tracker("wandb", to_wandb),
}


def check_library(name):
    """Raises UserError where the library of TRACKERS[name] can't be imported; name None asks for none."""
    if name is None:
        return
    for variable, value in TRACKERS[name].environment:
        os.environ.setdefault(variable, value)
    try:
        importlib.import_module(TRACKERS[name].library)
    except Exception as error:  # an installation that is broken may raise anything
        raise missing(name, error) from None


def missing(name, error):
    """→ the error of a library that isn't there."""
    return MissingLibrary(f"--track {name} can't be used here ({error}): pip install {TRACKERS[name].library}")


class Track:
    """A fold's run in TRACKERS[name], opened when there is something to log; with name None, and in all processes but
    the first, nothing happens. As a context it closes the run.

    folder: the experiment's, in --output."""

    def __init__(self, name, folder, fold, settings):
        self.name, self.opened, self.off = name, None, name is None or RANK > 0
        self.about = Fold(f"{folder.name}/fold{fold}", folder.parent, settings, None, 0)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.opened and not self.off:
            with self._harmless():
                self.opened.close(kind is None)

    def note(self, state, part, values, step):
        """Logs `values` (a dict of numbers) as PART/key at the step. The id of the run is kept in the fold's state, and
        so in its resume file."""
        if self.off:
            return
        with self._harmless():
            if self.opened is None:
                self.opened = self._open(state.setdefault("track", {}), step)
            self.opened.log({f"{part}/{key}": float(value) for key, value in values.items()}, step)

    def _open(self, ids, step):
        about = self.about._replace(earlier=ids.get(self.name), step=step)
        try:
            opened = TRACKERS[self.name].start(about)
        except ImportError as error:  # of a part of the library
            raise missing(self.name, error) from None
        ids[self.name] = opened.id
        return opened

    @contextlib.contextmanager
    def _harmless(self):
        """Whatever goes wrong in the block is one warning, and the end of the tracking; a missing library is an error.
        The random streams of the training stay as they are."""
        states = random.getstate(), np.random.get_state()
        try:
            yield
        except MissingLibrary:
            raise
        except Exception as error:  # of a library, its server and its disk; none of theirs is worth a training
            self.off = True
            said = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f"{self.about.name}: --track {self.name} failed ({said}). Training goes on without it")
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
