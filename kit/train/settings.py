"""Do the flags of 01_train_fold.py make sense, alone and together, and which of them make an experiment?"""

import hashlib
import json
from pathlib import Path

from common import WORLD, UserError, experiment_folder, listing, say
from kit.experiment import is_finished, read_record
from kit.score.tasks import TASKS
from kit.train.augment import AUGMENTATIONS
from kit.train.losses import OF_TASKS
from kit.train.trackers import check_library

# flags that don't decide what is learnt, so that they may differ between the folds of an experiment
NOT_SETTINGS = (
    "fold exp overwrite print_config workers device deterministic amp compile save_minutes stop_after track".split()
)
SHARES = ("freeze", "ema", "warmup")  # must be below 1
OF_STEPS = ("freeze", "ema", "layer_decay", "warmup", "clip_grad")


def settings(args, seed):
    """→ the settings that make the experiment, as config.json holds them. Paths, devices, precision aren't settings."""
    config = {key: value for key, value in vars(args).items() if key not in (*NOT_SETTINGS, "input", "output")}
    tta = AUGMENTATIONS[args.augment].tta if args.tta == "auto" else args.tta
    config |= dict(tta=tta, model_kwargs=dict(args.model_kwargs), seed=seed)
    config["weights"] = "none" if args.weights == "none" else "pretrained"
    return json.loads(json.dumps(config))  # as config.json will give them back: a tuple is a list there


def experiment_names(args):
    """→ the names of the experiments that are trained: --exp, or with several seeds EXP_777, EXP_778 …"""
    return [f"{args.exp}_{seed}" for seed in args.seed] if len(args.seed) > 1 else [args.exp]


def for_task(config, task):
    """→ the settings, with the loss and the sampler of the task where those given are for classes; a line says so.
    Raises UserError for another loss that doesn't suit."""
    suited, tasks = dict(config), OF_TASKS.get(config["loss"], ("classes",))
    if task not in tasks and "classes" in tasks:
        suited["loss"] = TASKS[task].loss
    elif task not in tasks:
        raise UserError(f"--loss {config['loss']} is for {' and '.join(tasks)}, and the task is {task}: leave it out")
    if task != "classes":
        suited["sampler"] = "shuffle"
    if suited != config:
        words = " ".join(f"--{key} {suited[key]}" for key in ("loss", "sampler") if suited[key] != config[key])
        say(f"the task is {task}: {words} in place of those for classes")
    return suited


def changed(config, defaults):
    """→ the settings that aren't the defaults, for the ledger."""
    return {key: value for key, value in config.items() if value != defaults[key]}


def init_makers(args, folder, folds):
    """→ a hash of what made the experiment --init, or None where it names none.

    Raises UserError where that has not finished `folds`, or is the one to be trained, `folder`."""
    if args.init in ("weights", "probe"):
        return None
    earlier = experiment_folder(args, args.init)
    if earlier == folder or not all(is_finished(earlier, fold) for fold in folds):
        raise UserError(f"--init {args.init} must be another experiment that has finished fold {listing(folds)}")
    records = [read_record(earlier, fold) for fold in folds]
    made_by = {json.dumps([record.get(key) for key in ("code", "weights", "init", "config")]) for record in records}
    return hashlib.sha256("".join(sorted(made_by)).encode()).hexdigest()


def check_flags(args):
    """Raises UserError for flags that contradict each other, and for a --track without its library."""
    check_library(args.track)
    if args.stop_after and not args.save_minutes:
        raise UserError("--stop-after has nothing to go on from with --save-minutes 0: leave one of them out")
    if args.batch_size < WORLD:
        raise UserError(f"--batch-size {args.batch_size} can't be shared by {WORLD} processes: raise it")
    if args.lr < args.min_lr:
        raise UserError(f"--lr {args.lr} is below --min-lr {args.min_lr}, where the rate ends: lower that too")
    if args.weights not in ("hub", "none") and not Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights} is no file: give a .safetensors or .pth file, hub or none")
    if len(set(args.seed)) < len(args.seed):
        raise UserError("--seed names a seed twice: each would be trained into the same folder")
    for flag in SHARES:
        if (value := getattr(args, flag) or 0) >= 1:
            raise UserError(f"--{flag.replace('_', '-')} {value:g} must be below 1")
    if args.layer_decay and args.layer_decay > 1:
        raise UserError(f"--layer-decay {args.layer_decay:g} would make low layers learn faster: give 1 or less")
    if args.weights == "none" and "probe" in (args.tune, args.init):
        raise UserError("a probe of --weights none would fit noise: give pretrained weights")
    if args.tune == "probe" and args.init not in ("weights", "probe"):
        raise UserError(f"--tune probe takes the features of --weights: leave --init {args.init} out")
    if args.tune == "probe" and (given := [flag for flag in OF_STEPS if getattr(args, flag)]):
        flags = " ".join(f"--{flag.replace('_', '-')}" for flag in given)
        raise UserError(f"--tune probe makes no training steps: leave {flags} out")
    if args.tune == "head" and args.freeze:
        raise UserError("--tune head freezes every layer below the head: leave --freeze out")
    if args.schedule == "ranger21" and (args.warmup or 0) > 0.72:
        raise UserError(f"--warmup {args.warmup:g}: Ranger21's warm-down begins at 0.72: give less")


def fold_numbers(args, count):
    """→ the folds to train, as ints. Raises UserError for what is no fold of `count`."""
    every = [str(k) for k in range(count)]
    chosen = every if args.fold == ["all"] else args.fold
    if wrong := [fold for fold in chosen if fold not in every]:
        raise UserError(f"--fold {' '.join(wrong)}: there are folds 0 to {count - 1}, and all must stand alone")
    return [int(fold) for fold in chosen]
