"""Checks of the flags of 01_train_fold.py, and the settings among them, which config.json holds."""

import hashlib
import json
import re
from pathlib import Path

from common import WORLD, UserError, experiment_folder, listing, say

from kit.experiment import is_finished, read_record
from kit.score.metrics import METRICS
from kit.train.augment import AUGMENTATIONS
from kit.train.losses import LOSS_TASKS
from kit.train.model import THESIS_MODEL, current_name
from kit.train.optim import ADAM, DEFAULTS
from kit.train.trackers import check_library

# flags that don't decide what is learnt: they may differ between the folds of an experiment
NOT_SETTINGS = "input output fold exp overwrite print_config save_minutes stop_after track".split()
NOT_SETTINGS += "device amp compile workers deterministic micro_batch grad_checkpointing predict".split()
STEP_FLAGS = ("freeze", "ema", "layer_decay", "warmup", "clip_grad")


def settings(flags, seed):
    """Return the settings of an experiment, as config.json holds them. flags: the parsed ones."""
    config = {key: value for key, value in vars(flags).items() if key not in NOT_SETTINGS}
    tta = AUGMENTATIONS[flags.augment].tta if flags.tta == "auto" else flags.tta
    config |= dict(tta=tta, model=current_name(flags.model), model_kwargs=dict(flags.model_kwargs), seed=seed)
    config["lr"] = flags.lr or DEFAULTS.get(flags.optimizer, ADAM)["lr"]
    config |= {key: value for key, value in following(config).items() if config[key] in (None, "auto")}
    config["weights"] = "none" if flags.weights == "none" else "pretrained"
    return json.loads(json.dumps(config))  # as read from config.json: a tuple is a list there


def following(config):
    """Return the settings that follow from others where they aren't given."""
    usual = DEFAULTS.get(config["optimizer"], ADAM)
    norm = "thesis" if config["model"] == THESIS_MODEL else "model"
    return usual | dict(lr=config["lr"], min_lr=usual["min_lr"] * config["lr"], norm=norm)


def experiment_folders(output, exp, seeds):
    """Return the folders of the experiments to train: that of `exp`, or with several seeds EXP_777, EXP_778 …"""
    return [experiment_folder(output, f"{exp}_{seed}" if len(seeds) > 1 else exp) for seed in seeds]


def sampler_of(metric_key):
    """Return what --sampler auto means for a metric."""
    return "imbalanced" if METRICS[metric_key].balanced else "shuffle"


def for_task(config, task, metric_key):
    """Return the settings, with the task's loss and sampler in place of those for classes, and with the metric's
    sampler in place of auto; prints which. Raises UserError for a loss of another task."""
    suited, loss, tasks = {}, config["loss"], LOSS_TASKS.get(config["loss"], ("classes",))
    metric, sampler = METRICS[metric_key], config["sampler"]
    if task.key not in tasks and loss in LOSS_TASKS:
        raise UserError(f"--loss {loss} is for {' and '.join(tasks)}, and the task is {task.key}: leave it out")
    if task.key not in tasks:
        suited["loss"] = task.loss
    if task.sampler not in (None, sampler):
        suited["sampler"] = task.sampler
    if suited:
        words = " ".join(f"--{key} {value}" for key, value in suited.items())
        say(f"the task is {task.key}: {words} in place of those for classes")
    elif sampler == "auto":
        suited["sampler"] = sampler_of(metric_key)
        effect = "doesn't depend" if metric.balanced else "depends"
        say(f"--sampler {suited['sampler']}: {metric.name} {effect} on the classes' shares")
    elif sampler in ("imbalanced", "thesis") and not metric.balanced:
        effects = dict(imbalanced="these are put back", thesis="predictions are for equal shares")
        say(f"--sampler {sampler}: {metric.name} depends on the classes' shares, and {effects[sampler]}")
    return config | suited


def changed(config, defaults):
    """Return the settings that aren't the defaults, for the ledger."""
    usual = defaults | following(config) | dict(lr=DEFAULTS.get(config["optimizer"], ADAM)["lr"])
    return {key: value for key, value in config.items() if value != usual[key]}


def init_provenance(init, folder, folds):
    """Return the hash of what trained `folds` of the experiment --init, or None where it names none. Raises UserError
    where that has not finished these folds, or is the one to be trained, `folder`."""
    if init in ("weights", "probe"):
        return None
    earlier = experiment_folder(folder.parent, init)
    if earlier == folder or not all(is_finished(earlier, fold) for fold in folds):
        raise UserError(f"--init {init} must be another experiment that has finished fold {listing(folds)}")
    records = [read_record(earlier, fold) for fold in folds]
    texts = {json.dumps([record.get(key) for key in ("code", "weights", "init", "config")]) for record in records}
    return hashlib.sha256("".join(sorted(texts)).encode()).hexdigest()


def check_flags(flags):
    """Raise UserError for flags of 01 that contradict each other, and for a --track without its library."""
    if flags.track:
        check_library(flags.track)
    if flags.stop_after and not flags.save_minutes:
        raise UserError("--stop-after needs resume files, and --save-minutes 0 writes none: leave one of them out")
    if flags.batch_size < WORLD:
        raise UserError(f"--batch-size {flags.batch_size} can't be shared by {WORLD} processes: raise it")
    config = settings(flags, flags.seed[0])
    if config["lr"] < config["min_lr"]:
        raise UserError(f"--lr {config['lr']} is below --min-lr {flags.min_lr}, its value at the end: lower that too")
    if flags.weights not in ("hub", "none") and not Path(flags.weights).is_file():
        raise UserError(f"--weights {flags.weights} is no file: give a .safetensors or .pth file, hub or none")
    if len(set(flags.seed)) < len(flags.seed):
        raise UserError("--seed names a seed twice, and both would be trained in one folder: name each once")
    for flag in ("freeze", "ema", "warmup"):
        if (value := getattr(flags, flag) or 0) >= 1:
            raise UserError(f"--{flag} {value:g} must be below 1")
    if flags.layer_decay and flags.layer_decay > 1:
        raise UserError(f"--layer-decay {flags.layer_decay:g} would make low layers learn faster: give 1 or less")
    if flags.weights == "none" and "probe" in (flags.tune, flags.init):
        raise UserError("a probe of --weights none would fit noise: give pretrained weights")
    if flags.tune == "probe" and flags.init not in ("weights", "probe"):
        raise UserError(f"--tune probe takes the features of --weights: leave --init {flags.init} out")
    given = [f"--{flag.replace('_', '-')}" for flag in STEP_FLAGS if getattr(flags, flag)]
    if flags.tune == "probe" and given:
        raise UserError(f"--tune probe makes no training steps: leave {' '.join(given)} out")
    if flags.tune == "head" and flags.freeze:
        raise UserError("--tune head freezes every layer below the head: leave --freeze out")
    if config["schedule"] == "ranger21" and (flags.warmup or 0) > 0.72:
        raise UserError(f"--warmup {flags.warmup:g}: Ranger21's warm-down begins at 0.72: give less")


def fold_numbers(words, count):
    """Return the folds, int, that the words of --fold name. Raises UserError for what is no fold of `count`."""
    every = [str(k) for k in range(count)]
    chosen = every if words == ["all"] else words
    if wrong := [fold for fold in chosen if fold not in every]:
        first_to_last = lambda m: " ".join(k for k in every if int(m[1]) <= int(k) <= int(m[2]))  # noqa: E731
        text = re.sub(r"(\d+)-(\d+)", first_to_last, " ".join(words))
        several = [number for number in every if re.search(rf"\b{number}\b", text)]
        hint = f": write {' '.join(several)}" if len(several) > 1 else ", and all must stand alone"
        raise UserError(f"--fold {' '.join(wrong)}: there are folds 0 to {count - 1}{hint}")
    return [int(fold) for fold in chosen]
