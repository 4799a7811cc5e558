"""Monitoring of a training: scores, losses that are NaN, the time that a fold takes."""

import contextlib
import sys
import time

from common import RANK, UserError, progress, say, warn, write_csv

import pandas as pd
import torch

from kit.experiment import is_finished
from kit.score import thresholds
from kit.score.metrics import METRICS
from kit.train.checkpoint import OUTPUTS
from kit.train.device import COMPILE_GAIN, COMPILE_SECONDS, compiling_repays
from kit.train.inference import TTAS, predict
from kit.train.optim import current_lr

WINDOW = 1024  # images of the bar's running scores, which thereby cost the same all epoch long
BLOCK = 4096  # images whose loss is computed at once
MOST_SKIPPED = 5  # losses in a row that aren't finite, before training ends
LEAST_SCALE = 2**-4  # of the GradScaler, which halves 65,536 at each skipped step
SETTLED = 3  # steps before the speed is measured: the first ones allocate and compile
LARGE = 50e6  # weights of a model that is too slow without a GPU
READ_SECONDS = 0.5  # between two readings of the losses


def scores(run, logits, targets):
    """Return the loss and the metrics of the competition and of the task, as a dict of floats.

    logits, targets: arrays as the loss takes them. A metric with cuts (kit/score/thresholds.py) is read at the best."""
    task, metric = run.experiment.prepared.task, run.experiment.prepared.metric
    size = BLOCK if task.splits_loss else len(targets)  # the loss takes several times the logits' memory
    blocks = zip(torch.as_tensor(logits).split(size), torch.as_tensor(targets).split(size), strict=True)
    loss = sum(run.criterion(*block).item() * len(block[1]) for block in blocks) / len(targets)
    predictions, targets = task.predictions(logits), task.from_01(targets)
    read = {name: thresholds.in_sample(name, targets, predictions) for name in (*task.extra_metrics, metric)}
    return dict(loss=loss) | {name: METRICS[name].score(targets, moved) for name, moved in read.items()}


def outputs(state, last=0):
    """Return logits [n, K] and targets of the epoch's batches so far, or of the `last` ones, as arrays."""
    return tuple(torch.cat(state[key][-last:]).cpu().numpy() for key in OUTPUTS)


class EpochMonitor(contextlib.AbstractContextManager):
    """The progress bar of an epoch of `steps` steps, its losses, scores and speed. Reading a loss synchronises the GPU,
    so it is read twice a second and not at every step."""

    def __init__(self, run, state, steps):
        self.run, self.state, self.steps, self.losses, self.skipped, self.in_a_row = run, state, steps, [], 0, 0
        self.began, self.last_read = time.perf_counter() - state["seconds"], time.monotonic()
        self.batch, self.name = run.experiment.config["batch_size"], run.epoch_name(state["epoch"])
        self.bar = progress(steps * self.batch, self.name)
        self.bar.update(state["step"] * self.batch)
        self.first = state["step"]
        self.settled = () if run.timed else None  # (step, time) from which the speed is measured; () once printed

    def __exit__(self, *error):
        self.bar.close()
        if self.skipped and error[0] is None:
            warn(f"{self.name}: {self.skipped} of {self.steps} losses were NaN or infinite, their steps were skipped")

    def count(self, taken):
        """Count an update, taken or skipped. Raises UserError once the GradScaler has skipped so many that its scale is
        below LEAST_SCALE: the gradients themselves aren't finite."""
        self.state["updates"] += taken
        self.state["skipped"] += not taken
        if self.run.scaler.get_scale() < LEAST_SCALE:
            self.refuse(f"{self.state['skipped']} steps")

    def refuse(self, steps):
        """Raise UserError: `steps` (in words) changed no weight."""
        remedy = "lower --lr, or give --amp bf16 or none, with --overwrite"
        what = f"the gradients of {steps} were NaN or infinite, so they changed nothing"
        raise UserError(f"{self.name}: {what}: {remedy}")

    def after(self, step, loss, save):
        """Note a step and its loss (a tensor). save: whether a resume file is about to be written."""
        self.losses.append(loss)
        self.bar.update(self.batch)
        self.state["seconds"] = time.perf_counter() - self.began
        if step + 1 == self.steps or save or time.monotonic() - self.last_read > READ_SECONDS:
            self.read_losses(step)
            if self.settled:
                self.forecast(step)
                self.settled = ()
                self.run.timed = True
            elif self.settled is None and step >= self.first + SETTLED:
                self.settled = step, time.perf_counter()
            self.last_read = time.monotonic()
        is_end = step + 1 == self.steps and self.state["epoch"] == self.run.experiment.config["epochs"]
        if is_end and self.state["skipped"] > self.state["updates"]:
            self.refuse(f"{self.state['skipped']} of {self.state['skipped'] + self.state['updates']} steps")

    def read_losses(self, step):
        """Read the losses since the last reading, for the tracker and the bar. Raises UserError where too many in a row
        aren't finite; without a GradScaler, one is too many."""
        most, lr = MOST_SKIPPED if self.run.scaler.is_enabled() else 1, current_lr(self.run.optimizer)
        losses, self.losses = torch.stack(self.losses).cpu(), []
        for i, finite in enumerate(torch.isfinite(losses).tolist()):
            self.in_a_row = 0 if finite else self.in_a_row + 1
            self.skipped += not finite
            if self.in_a_row == most:
                what = (
                    f"the loss is {losses[i].item()} at step {step + 2 - len(losses) + i} of {self.steps}, lr {lr:.3g}"
                )
                raise UserError(f"{self.name}: {what}: lower --lr, or give --amp bf16 or none")
        values = dict(loss=losses[torch.isfinite(losses)].mean(), lr=lr)
        self.run.track.note(self.state, "step", values, (self.state["epoch"] - 1) * self.steps + step + 1)
        if not self.bar.disable:
            window = scores(self.run, *outputs(self.state, last=-(-WINDOW // self.batch)))
            shown = {key: f"{value:.4f}" for key, value in window.items()}
            self.bar.set_postfix(shown | {"lr": f"{lr:.2e}"}, refresh=False)

    def forecast(self, step):
        """Print what the fold will take: minutes, and the GPU's memory. With --compile auto, compile where that
        repays in the steps to come, of this and the next folds."""
        run, config, device = self.run, self.run.experiment.config, self.run.experiment.device
        pace = (time.perf_counter() - self.settled[1]) / (step - self.settled[0])
        # A forward pass is about a third of a step; the kept epoch's held-out images are predicted in all views too.
        views = len(getattr(TTAS[config["tta"]](run.classifier), "transforms", []))
        steps = config["epochs"] * self.steps + len(run.valid_rows) * (config["epochs"] + views) / (3 * self.batch)
        minutes = steps * pace / 60
        duration = f"{minutes:.1f} min" if minutes > 1 else f"{60 * minutes:.0f} s"
        line = f"fold {run.fold} takes about {duration} ({pace:.2f} s a step of {self.batch} images)"
        if device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(device).total_memory
            line += f", GPU memory {peak / 2**30:.1f} of {total / 2**30:.1f} GiB at most so far"
        folds = len(run.experiment.chosen) - run.experiment.chosen.index(run.fold)
        seconds = pace * (folds * steps - (self.state["epoch"] - 1) * self.steps - step)  # to come
        if run.experiment.compile == "auto" and compiling_repays(seconds, device):
            line += f"; torch.compile begins: about {COMPILE_SECONDS} s, to save {COMPILE_GAIN * seconds:.0f} s"
            run.experiment.compile = "on"  # the next folds begin with it
            torch._dynamo.config.suppress_errors = True  # what can't be compiled runs as it did
            run.compile()
        write = self.bar.write if sys.stdout.isatty() and RANK == 0 else say  # a bar must be moved out of the way
        write(line)


def note_epoch(run, name, state, train, valid, seconds):
    """Add the epoch's row to foldK_epochs.csv, and print it after `name`. seconds: of the validation."""
    folder, batch_size = run.experiment.folder, run.experiment.config["batch_size"]
    parts = dict(train=train, valid=valid).items()
    pace, lr = state["step"] * batch_size / state["seconds"], current_lr(run.optimizer)
    row = {f"{part}_{key}": value for part, values in parts for key, value in values.items()}
    row = dict(epoch=state["epoch"], **row, lr=lr, seconds=state["seconds"] + seconds, images_per_second=pace)
    state["rows"].append(row)
    shown = [f"{part} {' '.join(f'{key} {value:.4f}' for key, value in values.items())}" for part, values in parts]
    say(f"{name}  {'  '.join(shown)}  {row['seconds']:.1f} s")
    if RANK == 0 and not is_finished(folder, run.fold):  # --overwrite keeps the old files until its end
        write_csv(folder / f"fold{run.fold}_epochs.csv", pd.DataFrame(state["rows"]))
    run.track.note(state, "epoch", row, state["epoch"] * state["step"])  # a probe makes no steps


def warn_if_slow(run):
    """Warn of a large model on a CPU, with the hours that the fold would take at the speed of one image."""
    experiment, weights = run.experiment, sum(p.numel() for p in run.classifier.parameters())
    if experiment.device.type != "cpu" or weights < LARGE:
        return
    began = time.perf_counter()
    predict(run.classifier, experiment.images, run.train_rows[:1], 1, experiment.device, experiment.amp)
    seconds = (time.perf_counter() - began) * 3 * len(run.train_rows) * experiment.config["epochs"]
    warn(
        f"{experiment.config['model']} has {weights / 1e6:.0f} million weights and there is no GPU: this fold would "
        f"take about {seconds / 3600:.0f} hours. Without a GPU: @recipes/cpu.args, in another --exp"
    )
