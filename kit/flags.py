"""Do the flags of 01_train_fold.py make sense, alone and together?"""

from pathlib import Path

from common import WORLD, UserError
from kit.losses import SOFT

SHARES = ("freeze", "ema", "label_smoothing", "warmup")  # must be below 1


def check_flags(args):
    """Raises UserError for flags that contradict each other."""
    if args.stop_after and not args.save_minutes:
        raise UserError("--stop-after has nothing to go on from with --save-minutes 0: leave one of them out")
    if args.batch_size < WORLD:
        raise UserError(f"--batch-size {args.batch_size} can't be shared by {WORLD} processes: raise it")
    if args.lr < args.min_lr:
        raise UserError(f"--lr {args.lr} is below --min-lr {args.min_lr}: lower --min-lr, or the warm-down raises it")
    if args.weights not in ("hub", "none") and not Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights} is no file: give a .safetensors or .pth file, hub or none")
    if args.cache_size is not None and args.cache_size < args.size:
        raise UserError(f"--cache-size {args.cache_size} is below --size {args.size}: raise it, or leave it out")
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
    check_mixing(args)


def check_mixing(args):
    """Raises UserError where the loss or the batch can't do what mixup, cutmix or label smoothing ask."""
    for flag in ("mixup", "cutmix", "label_smoothing"):
        if getattr(args, flag) and args.loss not in SOFT:
            what = f"--{flag.replace('_', '-')} makes soft targets, which --loss {args.loss} doesn't take"
            raise UserError(f"{what}: give --loss {' or '.join(SOFT)}")
    if (args.mixup or args.cutmix) and args.batch_size % (2 * WORLD):
        raise UserError(f"--batch-size {args.batch_size}: --mixup and --cutmix pair a process's images: make it even")


def fold_numbers(args, count):
    """→ the folds to train, as ints. Raises UserError for what is no fold of `count`."""
    every = [str(k) for k in range(count)]
    chosen = every if args.fold == ["all"] else args.fold
    if wrong := [fold for fold in chosen if fold not in every]:
        raise UserError(f"--fold {' '.join(wrong)}: there are folds 0 to {count - 1}; all stands alone")
    return [int(fold) for fold in chosen]
