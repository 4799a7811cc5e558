"""Is the training going well, and how long will it take? What is seen and said while a fold trains."""

import sys
import time

import pandas as pd
import torch

from common import RANK, UserError, progress, say, warn, write_csv
from kit.experiment import is_finished
from kit.score import tasks, thresholds
from kit.score.metrics import METRICS
from kit.train.inference import TTAS, predict
from kit.train.optim import current_lr

WINDOW = 1024  # images that the bar's running scores look back on, so that they cost the same all epoch long
BLOCK = 4096  # images whose loss is computed at once
MOST_SKIPPED = 5  # losses in a row that are no numbers, before training ends
SETTLED = 3  # steps before the speed is measured: the first ones allocate and compile
LARGE = 50e6  # weights of a model that nobody should train without a GPU
LOOK_SECONDS = 0.5


def scores(run, logits, targets):
    """Loss and the competition's metric, of classes their accuracy too, of logits [N, K] and the targets that the loss
    takes (arrays): a dict of floats. Of a metric that reads sets, at the thresholds that suit these images best."""
    loss, metric = loss_of(run, torch.as_tensor(logits), torch.as_tensor(targets)), run.metric
    predictions = tasks.predictions(run.prepared, logits)
    targets = tasks.from_unit(run.prepared, targets)
    if METRICS[metric].of_sets:
        predictions = thresholds.best(metric, targets, predictions)
    names = ("accuracy", metric) if tasks.task_of(run.prepared) == "classes" else (metric,)
    by_name = {name: METRICS[name].score(targets, predictions, None) for name in names}
    return dict(loss=loss) | {name: float(score) for name, score in by_name.items()}


def loss_of(run, logits, targets):
    """→ the loss (float) of all images; of classes over blocks, since it takes several times the logits' memory."""
    if tasks.task_of(run.prepared) != "classes":
        return run.criterion(logits, targets).item()
    parts = zip(logits.split(BLOCK), targets.split(BLOCK), strict=True)
    return sum(run.criterion(*part).item() * len(part[1]) for part in parts) / len(targets)


def seen(state, last=0):
    """→ logits [N, K] and targets [N] of the epoch's batches so far, or of the `last` ones, as arrays."""
    return tuple(torch.cat(state[key][-last:]).cpu().numpy() for key in ("logits", "targets"))


class Watch:
    """The progress bar of an epoch of `steps` steps, and a look at the losses now and then.

    Looking at a number makes a GPU wait for it, so the losses are looked at twice a second and not at every step."""

    def __init__(self, run, state, steps):
        self.run, self.state, self.steps, self.losses, self.skipped, self.in_a_row = run, state, steps, [], 0, 0
        self.began, self.last_look = time.perf_counter() - state["seconds"], time.monotonic()
        self.batch = run.config["batch_size"]
        self.bar = progress(steps * self.batch, run.name)
        self.bar.update(state["step"] * self.batch)
        self.settled = None  # (step, time) from which the speed is measured, in the first epoch

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.skipped and error[0] is None:
            warn(f"{self.run.name}: {self.skipped} of {self.steps} losses were no numbers, their steps were skipped")

    def after(self, step, loss, save):
        """To be called after each step with its loss (a tensor), and with whether all is about to be saved."""
        self.losses.append(loss)
        self.bar.update(self.batch)
        self.state["seconds"] = time.perf_counter() - self.began
        last = step + 1 == self.steps
        if last or save or time.monotonic() - self.last_look > LOOK_SECONDS:
            self.look(step)
            self.forecast(step)
            self.last_look = time.monotonic()

    def look(self, step):
        """Counts losses that are no numbers. Raises UserError where they are too many in a row, or where no GradScaler
        keeps them from the weights."""
        most = MOST_SKIPPED if self.run.scaler.is_enabled() else 1
        losses, self.losses = torch.stack(self.losses).cpu(), []
        for i, finite in enumerate(torch.isfinite(losses).tolist()):
            self.in_a_row = 0 if finite else self.in_a_row + 1
            self.skipped += not finite
            if self.in_a_row == most:
                where = f"at step {step + 2 - len(losses) + i} of {self.steps}, lr {current_lr(self.run.optimizer):.3g}"
                what = f"{self.run.name}: the loss is {losses[i].item()} {where}"
                raise UserError(f"{what}: lower --lr, or give --amp bf16 or none")
        lr, done = current_lr(self.run.optimizer), (self.state["epoch"] - 1) * self.steps + step + 1
        loss = losses[torch.isfinite(losses)].mean()
        self.run.track.note(self.state, "step", dict(loss=loss, lr=lr), done)
        if not self.bar.disable:
            window = scores(self.run, *seen(self.state, last=-(-WINDOW // self.batch)))
            shown = {key: f"{value:.4f}" for key, value in window.items()}
            self.bar.set_postfix(shown | {"lr": f"{lr:.2e}"}, refresh=False)

    def forecast(self, step):
        """Says once a fold what it will take: minutes, and the GPU's memory."""
        run = self.run
        if self.state["epoch"] > 1 or step < SETTLED or run.told:
            return
        if self.settled is None:
            self.settled = step, time.perf_counter()
            return
        pace = (time.perf_counter() - self.settled[1]) / (step - self.settled[0])
        # A forward pass is about a third of a step; the kept epoch's held-out images are seen in all views once more.
        views = len(getattr(TTAS[run.config["tta"]](run.classifier), "transforms", []))
        steps = run.config["epochs"] * self.steps
        steps += len(run.valid_rows) * (run.config["epochs"] + views) / (3 * self.batch)
        seconds = steps * pace
        time_it_takes = f"{seconds / 60:.1f} min" if seconds > 60 else f"{seconds:.0f} s"
        words = f"fold {run.fold} takes about {time_it_takes} ({pace:.2f} s a step of {self.batch} images)"
        if run.device.type == "cuda":
            peak, whole = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(run.device).total_memory
            words += f", GPU memory {peak / 2**30:.1f} of {whole / 2**30:.1f} GiB at most so far"
        run.told = True
        write = self.bar.write if sys.stdout.isatty() and RANK == 0 else say  # a bar must be moved out of the way
        write(words)


def note_epoch(run, state, train, valid, seconds):
    """Adds the epoch's row to foldK_epochs.csv and prints it."""
    row = dict(epoch=state["epoch"])
    for part, found in (("train", train), ("valid", valid)):
        row |= {f"{part}_{key}": value for key, value in found.items()}
    pace, lr = state["step"] * run.config["batch_size"] / state["seconds"], current_lr(run.optimizer)
    row |= dict(lr=lr, seconds=state["seconds"] + seconds, images_per_second=pace)
    state["rows"].append(row)
    train, valid = (" ".join(f"{key} {value:.4f}" for key, value in part.items()) for part in (train, valid))
    say(f"{run.name}  train {train}  valid {valid}  {row['seconds']:.1f} s")
    if RANK == 0 and not is_finished(run.folder, run.fold):  # --overwrite leaves the old files whole until its end
        write_csv(run.folder / f"fold{run.fold}_epochs.csv", pd.DataFrame(state["rows"]))
    run.track.note(state, "epoch", row, state["epoch"] * state["step"])  # a probe makes no steps


def warn_if_endless(run):
    """A large model on a CPU: says what the fold would take, by the time that one image needs."""
    weights = sum(p.numel() for p in run.classifier.parameters())
    if run.device.type != "cpu" or weights < LARGE:
        return
    began = time.perf_counter()
    predict(run.classifier, run.images, run.train_rows[:1], 1, run.device, run.amp)
    seconds = (time.perf_counter() - began) * 3 * len(run.train_rows) * run.config["epochs"]
    warn(
        f"{run.config['model']} has {weights / 1e6:.0f} million weights and there is no GPU: this fold would take "
        f"about {seconds / 3600:.0f} hours. Without a GPU: @recipes/cpu.args, in another --exp"
    )
