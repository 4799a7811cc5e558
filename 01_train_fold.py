"""Trains one fold of an experiment and keeps its model and its out-of-fold predictions.

    python 01_train_fold.py --fold 2
    python 01_train_fold.py --fold 2 --exp nosampler --sampler shuffle
    python 01_train_fold.py --fold 2 --exp convnext --model convnext_large.fb_in22k_ft_in1k \\
        --epochs 3 --batch-size 8 --lr 7e-5
    torchrun --nproc-per-node 2 01_train_fold.py --fold 2      # one fold on two GPUs

Reads OUTPUT/prepared (made by 00_prepare.py). Writes OUTPUT/EXP/config.json, foldK.pt (the model), foldK.csv (the
fold's predictions) and foldK_epochs.csv. A fold that was stopped goes on from its foldK.resume.pt when it is started
again, and ends with the same bytes. The defaults are the thesis' recipe (its tables 3.1 and 4.1).
"""

import argparse
import ast

from common import (
    RANK,
    WORLD,
    Parser,
    UserError,
    experiment_folder,
    locked,
    number,
    progress,
    read_json,
    remove_leftovers,
    replacing,
    run,
    say,
    write_csv,
    write_json,
)

# flags that don't decide what is learnt, so they may differ between the folds of an experiment
NOT_SETTINGS = (
    "fold",
    "exp",
    "overwrite",
    "print_config",
    "workers",
    "device",
    "deterministic",
    "save_minutes",
    "stop_after",
    "input",
    "output",
)


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to run").add_argument
    add("--fold", type=number(int, 0), required=True, help="the fold that is held out")
    add("--exp", default="base", help="the experiment's name: its folder under --output")
    add("--overwrite", action="store_true", help="train the fold again although it is finished")
    add("--print-config", action="store_true", help="print the resolved settings as JSON and exit")
    add("--workers", type=number(int, 0), help="image-loading processes; by itself up to 4 beside a GPU, else none")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--deterministic", action="store_true", help="on a GPU: the same bits each time, at some cost in speed")
    add("--save-minutes", type=number(float, 0), default=10, help="minutes between resume files within an epoch, "
        "beside the one at its end; 0 writes none")  # fmt: skip
    add("--stop-after", type=duration, metavar="8.5h", help="save and end when this long has passed since the start; "
        "the same command goes on. In s, m or h; exit code 75")  # fmt: skip

    add = parser.add_argument_group("model (thesis 3.4)").add_argument
    add("--model", default="eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", help="a timm name (thesis 3.4)")
    add("--model-kwargs", nargs="*", default={}, metavar="KEY=VALUE", help="for timm.create_model: drop_path_rate=0.1")
    add("--weights", default="hub", help="hub, none (from scratch), or a .safetensors or .pth file (thesis 3.4)")
    add("--head", choices=("linear", "fresh"), default="linear", help="linear: the model's own outputs kept, and a "
        "linear layer behind them (thesis 3.4); fresh: timm's classifier for these classes")  # fmt: skip
    add("--tune", choices=("all", "head"), default="all", help="the listing trains all, the text the head (thesis 3.4)")
    add("--grad-checkpointing", action="store_true", help="compute the activations twice instead of keeping them: "
        "less memory, slower")  # fmt: skip
    add("--norm", choices=("thesis", "model"), default="thesis",
        help="mean and std 0.5 (listing), or what the weights were trained with")  # fmt: skip

    add = parser.add_argument_group("images and batches (thesis 3.1, 3.2)").add_argument
    add("--size", type=number(int, 1), default=448, help="side in px, prepared by 00_prepare.py (thesis 3.1.1)")
    add("--augment", choices=("d4", "none"), default="d4", help="flips and quarter turns (thesis 3.1.1)")
    add("--sampler", choices=("imbalanced", "shuffle"), default="imbalanced", help="imbalanced: classes drawn equally "
        "often, with replacement; shuffle: each image once (thesis 3.2.1, 4.3)")  # fmt: skip
    add("--batch-size", type=number(int, 1), default=17, help="images a batch, over all processes (thesis 4.1)")
    add("--accumulate", type=number(int, 1), default=1, help="batches whose gradients are added up before a step")

    add = parser.add_argument_group("training (thesis 3.3 to 3.6, 4.1)").add_argument
    add("--epochs", type=number(int, 1), default=2, help="passes over the training folds (thesis 4.1)")
    add("--loss", choices=("cce", "ce"), default="cce", help="complement cross entropy or cross entropy (thesis 3.6.1)")
    add("--optimizer", default="ranger21", help="ranger21 (thesis 3.5.1; ranger21_fast.py), ranger21-package (the same "
        "from the package), or the name of a timm optimiser, such as adamw")  # fmt: skip
    add("--ranger21-decay", choices=("package", "all"), default="package", help="weight decay on the last parameter "
        "only, as in the package that the thesis ran, or on all, as in the paper")  # fmt: skip
    add("--lr", type=number(float, above=0), default=6e-5, help="peak learning rate (thesis 4.1)")
    add("--min-lr", type=number(float, 0), default=3e-5, help="learning rate at the end of the warm-down (thesis 4.1)")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="Ranger21's own default (thesis 3.5.1)")
    add("--amp", choices=("auto", "fp16", "bf16", "none"), default="auto",
        help="mixed precision (thesis 3.3.1); auto: fp16 on a GPU, none on the CPU")  # fmt: skip
    add(
        "--keep", choices=("best", "last"), default="best", help="the kept epoch: best validation AUC (listing) or last"
    )
    add("--seed", type=number(int, 0), default=777, help="decides all that is random (listing)")
    args = parser.parse_args()
    args.model_kwargs = dict(key_value(parser, text) for text in args.model_kwargs)
    args.changed = {
        key: value for key, value in vars(args).items() if key not in NOT_SETTINGS and value != parser.get_default(key)
    }
    if args.stop_after and not args.save_minutes:
        parser.error("--stop-after has nothing to go on from with --save-minutes 0: leave one of them out")
    if args.batch_size < WORLD:
        parser.error(f"--batch-size {args.batch_size} can't be shared by {WORLD} processes: raise it")
    if args.lr < args.min_lr:
        parser.error(f"--lr {args.lr} is below --min-lr {args.min_lr}, so the warm-down would raise it: lower --min-lr")
    return args


def duration(text):
    """An argparse type: '8.5h' → 30600.0 seconds."""
    seconds = float(text[:-1]) * dict(s=1, m=60, h=3600).get(text[-1:], float("nan"))
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a time such as 8.5h, 90m or 300s")
    return seconds


def key_value(parser, text):
    """'drop_path_rate=0.1' → ('drop_path_rate', 0.1)"""
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        parser.error(f"--model-kwargs {text}: write KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: a mistyped flag answers at once

import contextlib
import copy
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import timm.optim
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchsampler import ImbalancedDatasetSampler

import distributed
import model as models
from data import Augmentation, Images, accuracy, auc, logit_columns, open_images, read_prepared, softmax
from ranger21_fast import Ranger21Fast, learning_rate
from resume import ResumeFile

TO_BE_CONTINUED = 75  # exit code of --stop-after; sysexits.h calls it EX_TEMPFAIL, "try again later"
SEEN = ("logits", "targets")  # of the epoch so far, in `now`
WINDOW = 1024  # images that the running scores of the bar look back on, so that they cost the same all epoch long

# ---------------------------------------------------------------- settings


def resolve(args):
    """→ (config: the settings that make the experiment, device). `auto` is replaced by what it means here."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    device = models.pick_device(args.device, args.deterministic)
    config["amp"] = models.pick_amp(args.amp, device)
    if args.weights not in ("hub", "none") and not Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights} is no file: give a .safetensors or .pth file, hub or none")
    if args.optimizer not in ("ranger21", "ranger21-package", *timm.optim.list_optimizers()):
        raise UserError(f"--optimizer {args.optimizer} is neither ranger21 nor one of timm's: adamw, sgd, lamb, lion …")
    if args.ranger21_decay == "all" and args.optimizer != "ranger21":
        raise UserError("--ranger21-decay all needs --optimizer ranger21: leave one of them out")
    return config, device


def check_config(folder, config):
    """Raises UserError where the experiment's other folds were trained with other settings. → whether there are any."""
    if not any(folder.glob("fold*.pt")):
        return False
    earlier = read_json(folder / "config.json", f"remove {folder}")
    changed = [
        f"{key} was {earlier.get(key)!r} and is now {config.get(key)!r}"
        for key in sorted((earlier.keys() | config.keys()) - {"changed"})
        if earlier.get(key) != config.get(key)
    ]
    if changed:
        raise UserError(
            f"experiment {folder.name} has folds trained with other settings: {'; '.join(changed)}. "
            f"Give another --exp, or remove {folder}"
        )
    return True


# ---------------------------------------------------------------- loss


def complement_cross_entropy(logits, targets):
    """Complement cross entropy (Kim, Lee and Jeon 2021, arXiv 2009.02189; thesis 3.6.1), the mean over the batch.

    logits float [B, K], targets int [B] → a float32 scalar: cross entropy minus 1 / (K - 1) times the entropy of the
    softmax over the *other* classes, which is thereby made uniform. With two classes there is one other class, its
    entropy is 0, and the loss is cross entropy.

    The softmax without the target's logit is the paper's p_j / (1 - p_target), but needs no division by a number that
    rounds to 0. The thesis' listing has K for K - 1 and the opposite sign, which sharpens what the paper levels; for
    its two classes both are 0.
    """
    logits = logits.float()
    is_target = F.one_hot(targets, logits.shape[1]).bool()
    log_q = F.log_softmax(logits.masked_fill(is_target, -torch.inf), dim=1).masked_fill(is_target, 0)
    q = log_q.exp().masked_fill(is_target, 0)
    entropy = -(q * log_q).sum(dim=1).mean()
    return F.cross_entropy(logits, targets) - entropy / (logits.shape[1] - 1)


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets)


LOSSES = {"cce": complement_cross_entropy, "ce": cross_entropy}

# ---------------------------------------------------------------- batches


def draw_epoch(labels, config, fold, epoch):
    """The training images of an epoch, in order: a list of (position in the training folds, augmentation seed).

    "imbalanced" draws with replacement, each class equally often, through torchsampler (thesis 3.2.1). The draw depends
    on the seed, the fold and the epoch alone.
    """
    seeds = np.random.SeedSequence([config["seed"], fold, epoch]).generate_state(len(labels) + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds[-1]))  # the global generator is the only one that torchsampler takes
        if config["sampler"] == "imbalanced":
            order = list(ImbalancedDatasetSampler(labels, labels=labels.tolist()))
        else:
            order = torch.randperm(len(labels)).tolist()
    return list(zip(order, seeds[:-1].tolist(), strict=True))


def training_batches(images, rows, targets, config, fold, epoch, workers, device, done=0):
    """A DataLoader over one epoch's draw, without the first `done` batches, the last incomplete one dropped (listing,
    `drop_last`). Of several processes, each has its share of every batch."""
    stream, size = [config["seed"], fold, epoch], config["batch_size"]
    order = draw_epoch(targets, config, fold, epoch)
    return DataLoader(
        Images(images, rows, targets, Augmentation(config["augment"])),
        batch_sampler=[order[k * size : (k + 1) * size][RANK::WORLD] for k in range(done, len(order) // size)],
        # one of its own, or making the loader would move the random stream that dropout draws from
        generator=torch.Generator().manual_seed(int(np.random.SeedSequence(stream).generate_state(1)[0])),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=models.ignore_ctrl_c,
    )


# ---------------------------------------------------------------- optimiser


def make_optimizer(module, config, steps_per_epoch):
    """→ (optimiser, its learning-rate scheduler or None: Ranger21 has its own). Raises UserError where timm can't."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    ranger = dict(
        lr=config["lr"],
        weight_decay=config["weight_decay"],
        num_batches_per_epoch=steps_per_epoch,
        num_epochs=config["epochs"],
        warmdown_min_lr=config["min_lr"],
    )
    if config["optimizer"] == "ranger21":
        return Ranger21Fast(parameters, decay=config["ranger21_decay"], **ranger), None
    if config["optimizer"] == "ranger21-package":
        from ranger21 import Ranger21  # imports matplotlib's pyplot, for a second

        with quiet():  # logging_active would keep every step's variance, at a synchronisation each
            return Ranger21(parameters, logging_active=False, **ranger), None
    try:
        optimizer = timm.optim.create_optimizer_v2(
            module, config["optimizer"], lr=config["lr"], weight_decay=config["weight_decay"]
        )
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--optimizer {config['optimizer']} can't be made here ({error}): try adamw") from None
    steps = steps_per_epoch * config["epochs"]
    factor = lambda done: learning_rate(min(done + 1, steps), steps, config["lr"], config["min_lr"]) / config["lr"]  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def current_lr(optimizer):
    """The learning rate of the last step; both Ranger21s keep it beside `lr`, which never moves."""
    group = optimizer.param_groups[0]
    return getattr(optimizer, "current_lr", group.get("current_lr", group["lr"]))


def quiet():
    """The package of Ranger21 prints two dozen lines of settings, and notes at every change of its schedule."""
    return contextlib.redirect_stdout(io.StringIO())


# ---------------------------------------------------------------- one epoch


def scores(criterion, logits, targets):
    """Loss, accuracy and AUC of logits [N, K] and targets [N]; the AUC on probabilities, in training as well."""
    probabilities = softmax(logits)
    loss = criterion(torch.as_tensor(logits), torch.as_tensor(targets)).item()
    return dict(loss=loss, accuracy=accuracy(targets, probabilities), auc=auc(targets, probabilities))


def set_training_mode(classifier, tune):
    """Dropout and batch statistics move only where weights are trained."""
    classifier.eval()
    classifier.tuned(tune).train()


def train_epoch(trained, loader, criterion, optimizer, scheduler, scaler, config, device, description, now, resume):
    """The rest of an epoch: the loader's batches, after the `now["step"]` that are done. → the scores over all its
    images (in training mode, as they came). `now` is kept up to date, and saved to `resume` when that is due. `trained`
    is the Classifier, in training mode, or DistributedDataParallel around it."""
    began, last_look = time.perf_counter() - now["seconds"], time.monotonic()
    steps = now["step"] + len(loader)
    look_back, losses = -(-WINDOW // config["batch_size"]), []
    with progress(steps * config["batch_size"], description) as bar:
        bar.update(now["step"] * config["batch_size"])
        for step, (images, targets) in enumerate(loader, now["step"]):
            images, targets = models.to_device(images, device), targets.to(device, non_blocking=True)
            first = step - step % config["accumulate"]
            last = step + 1 == steps
            whole = step + 1 - first == config["accumulate"] or last
            # of several processes, each counts by its share of the batch: their gradients will be averaged
            share = len(images) * WORLD / config["batch_size"]
            with contextlib.nullcontext() if whole or WORLD == 1 else trained.no_sync():
                with models.autocast(device, config["amp"]):
                    logits = trained(images)
                loss = criterion(logits, targets)
                scaler.scale(loss * share / min(config["accumulate"], steps - first)).backward()
            now["logits"].append(logits.detach())
            now["targets"].append(targets)
            losses.append(loss.detach())
            if whole:
                update(optimizer, scheduler, scaler)
                now.update(step=step + 1, seconds=time.perf_counter() - began)
            bar.update(config["batch_size"])
            save = stop = False
            if whole and not last:
                save, stop = distributed.from_first(resume.due(), resume.time_is_up())
            # Looking at a number makes a GPU wait, so it is done now and then, and before anything is saved.
            if last or save or time.monotonic() - last_look > 0.5:
                check_losses(losses, step, steps, description, optimizer)
                last_look, losses = time.monotonic(), []
                if save:
                    now.update({key: [torch.cat(now[key])] for key in SEEN})
                    save_progress(resume, now)
                if stop:
                    say(
                        f"{description}: stopped by --stop-after; run it again to go on from step {step + 1} of {steps}"
                    )
                    sys.exit(TO_BE_CONTINUED)
                if not bar.disable:
                    window = numpy(now["logits"][-look_back:]), numpy(now["targets"][-look_back:])
                    shown = {key: f"{value:.4f}" for key, value in scores(criterion, *window).items()}
                    bar.set_postfix(shown | {"lr": f"{current_lr(optimizer):.2e}"})
    seen = distributed.gather((numpy(now["logits"]), numpy(now["targets"])))
    return scores(criterion, *(np.concatenate(parts) for parts in zip(*seen, strict=True)))


def save_progress(resume, now):
    """Saves `now`, of several processes with what each has seen of the epoch; all wait until the file is there."""
    seen = {key: distributed.gather([tensor.cpu() for tensor in now[key]]) for key in SEEN}
    resume.save(now | {key: [tensor for part in parts for tensor in part] for key, parts in seen.items()})
    distributed.from_first(0)


def check_losses(losses, step, steps, description, optimizer):
    """Raises UserError where one of the last losses, that of `step` at their end, is no number."""
    losses = torch.stack(losses).cpu()
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        i = bad[0].item()
        raise UserError(
            f"{description}: the loss is {losses[i].item()} at step {step + 2 - len(losses) + i} of {steps}, "
            f"lr {current_lr(optimizer):.3g}: lower --lr, or train with --amp bf16 or none"
        )


def update(optimizer, scheduler, scaler):
    """One step of the optimiser, unless the GradScaler skips it for gradients that overflowed."""
    with quiet():
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if scheduler is not None:
        scheduler.step()


def numpy(tensors):
    return torch.cat(tensors).cpu().numpy()


# ---------------------------------------------------------------- one fold


def train_fold(classifier, images, folds, fold, config, device, workers, folder, resume):
    """Trains all epochs (thesis 4.2), from where `resume` (a ResumeFile) left off.

    → {"best" and "last": dict(epoch, scores, logits, and weights of the kept one)}. "best" is the epoch with the best
    validation AUC, the later of equals (listing, `>=`).
    """
    targets = folds.target.to_numpy(np.int64)
    train_rows, valid_rows = (np.flatnonzero(mask) for mask in (folds.fold != fold, folds.fold == fold))
    steps = len(train_rows) // config["batch_size"]
    criterion = LOSSES[config["loss"]]
    classifier.requires_grad_(False)
    classifier.tuned(config["tune"]).requires_grad_(True)
    optimizer, scheduler = make_optimizer(classifier.tuned(config["tune"]), config, -(-steps // config["accumulate"]))
    scaler = torch.amp.GradScaler(device.type, enabled=config["amp"] == "fp16")
    trained = distributed.wrap(classifier, device)
    parts = dict(model=classifier, optimizer=optimizer, scaler=scaler) | ({"scheduler": scheduler} if scheduler else {})
    now = resume.load(**parts) or dict(epoch=1, rows=[], kept={}) | at_epochs_start()
    if len(set(distributed.gather((now["epoch"], now["step"])))) > 1:
        raise UserError(f"the processes see different files {resume.path}: give an --output that all of them see")
    if now["rows"] or now["step"]:
        say(f"fold {fold} of {folder.name} goes on in epoch {now['epoch']} after {now['step']} of {steps} steps")
    now |= {key: [tensor.to(device) for tensor in now[key][RANK::WORLD]] for key in SEEN}

    while now["epoch"] <= config["epochs"]:
        epoch, rows, kept = now["epoch"], now["rows"], now["kept"]
        name = f"fold {fold} epoch {epoch}/{config['epochs']}"
        loader = training_batches(
            images, train_rows, targets[train_rows], config, fold, epoch, workers, device, now["step"]
        )
        set_training_mode(classifier, config["tune"])
        train = train_epoch(trained, loader, criterion, optimizer, scheduler, scaler, config, device, name, now, resume)
        began = time.perf_counter()
        logits = models.predict(
            classifier, images, valid_rows, config["batch_size"], device, config["amp"], workers, f"{name} valid"
        )
        if not np.isfinite(logits).all():
            raise UserError(f"{name}: the validation predictions are no numbers: lower --lr, or train with --amp none")
        valid = scores(criterion, logits, targets[valid_rows])
        rows.append(
            {"epoch": epoch}
            | {f"train_{key}": value for key, value in train.items()}
            | {f"valid_{key}": value for key, value in valid.items()}
            | {"lr": current_lr(optimizer), "seconds": now["seconds"] + time.perf_counter() - began}
            | {"images_per_second": steps * config["batch_size"] / now["seconds"]}
        )
        say(epoch_line(name, rows[-1]))
        if RANK == 0:
            write_csv(folder / f"fold{fold}_epochs.csv", pd.DataFrame(rows))
        kept["last"] = dict(epoch=epoch, scores=valid, logits=torch.from_numpy(logits))
        if "best" not in kept or not valid["auc"] < kept["best"]["scores"]["auc"]:
            kept["best"] = kept["last"] | weights_if(classifier, config["keep"] == "best" and RANK == 0)
        now.update(epoch=epoch + 1, **at_epochs_start())
        if epoch < config["epochs"]:
            save_progress(resume, now)
    kept["last"] |= weights_if(classifier, config["keep"] == "last" and RANK == 0)
    return kept


def at_epochs_start():
    """What a fold knows of an epoch that begins: updates made, seconds spent, logits and targets seen."""
    return dict(step=0, seconds=0.0, logits=[], targets=[])


def weights_if(classifier, wanted):
    return {"weights": copy.deepcopy({k: v.cpu() for k, v in classifier.state_dict().items()})} if wanted else {}


def epoch_line(name, row):
    return (
        f"{name}  train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.4f} auc {row['train_auc']:.4f}  "
        f"valid loss {row['valid_loss']:.4f} acc {row['valid_accuracy']:.4f} auc {row['valid_auc']:.4f}  "
        f"lr {row['lr']:.2e}  {row['seconds']:.1f} s  {row['images_per_second']:.1f} images/s"
    )


def save_fold(folder, fold, kept, config, prepared, folds):
    """Writes foldK.csv, then foldK.pt, whose presence says that the fold is finished."""
    table = folds.loc[folds.fold == fold, ["image_name", "target"]].reset_index(drop=True)
    for kind in ("best", "last"):
        table[logit_columns(kind, prepared["classes"])] = kept[kind]["logits"].numpy()
    (folder / f"fold{fold}.pt").unlink(missing_ok=True)  # of --overwrite: predictions never stand beside other weights
    write_csv(folder / f"fold{fold}.csv", table)
    chosen = kept[config["keep"]]
    saved = dict(
        model=chosen["weights"],
        config=config,
        classes=prepared["classes"],
        fold=fold,
        folds_hash=prepared["folds_hash"],
        epoch=chosen["epoch"],
        # new keys: pickle writes a string that it has met before as a reference, and those of a resume file are others
        scores={key: chosen["scores"][key] for key in ("loss", "accuracy", "auc")},
    )
    with replacing(folder / f"fold{fold}.pt") as temporary, open(temporary, "wb") as file:
        torch.save(saved, file)  # to a file object: given a path, torch writes its name into the archive


@contextlib.contextmanager
def taken(folder, config, args):
    """Holds the fold for the block, and makes sure that the experiment's config.json is this config."""
    with locked(folder / f".fold{args.fold}.lock", f"fold {args.fold} of {args.exp}"):
        with locked(folder / ".lock", args.exp, wait=True):
            if not check_config(folder, config):
                write_json(folder / "config.json", config)
        remove_leftovers(folder, f"fold{args.fold}*")
        yield


def main():
    args = ARGS
    folder = experiment_folder(args, args.exp)
    config, device = resolve(args)
    workers = models.pick_workers(args.workers, device)
    if args.print_config:
        print(json.dumps(config | dict(fold=args.fold, exp=args.exp, device=str(device), workers=workers), indent=1))
        return
    prepared, folds = read_prepared(args)
    if args.fold >= prepared["folds"]:
        raise UserError(f"--fold {args.fold}: there are folds 0 to {prepared['folds'] - 1}")
    count = (folds.fold != args.fold).sum()
    if args.batch_size > count:
        raise UserError(f"--batch-size {args.batch_size} is more than the {count} training images: lower it")
    images = open_images(args, prepared, "train", args.size, len(folds))
    config["folds_hash"] = prepared["folds_hash"]
    check_config(folder, config)
    finished = folder / f"fold{args.fold}.pt"
    is_finished = f"fold {args.fold} of {args.exp} is finished (--overwrite trains it again)"
    if finished.exists() and not args.overwrite:
        say(is_finished)
        return
    torch.manual_seed(np.random.SeedSequence([args.seed, args.fold]).generate_state(1).item())
    classifier = models.build_model(config, len(prepared["classes"])).to(device)
    resume = ResumeFile(folder / f"fold{args.fold}.resume.pt", args.save_minutes, dict(config=config), args.stop_after)
    with distributed.together(device), taken(folder, config, args) if RANK == 0 else contextlib.nullcontext():
        # nobody begins before the first process has the fold in its hands; by then, another job may have finished it
        if distributed.from_first(finished.exists() and not args.overwrite)[0]:
            say(is_finished)
            return
        if RANK > 0:  # dropout must not hide the same places in each process' share of a batch
            torch.manual_seed(np.random.SeedSequence([args.seed, args.fold, RANK]).generate_state(1).item())
        kept = train_fold(classifier, images, folds, args.fold, config, device, workers, folder, resume)
        if RANK == 0:
            save_fold(folder, args.fold, kept, config, prepared, folds)
            resume.remove()
    chosen = kept[args.keep]
    score = f"epoch {chosen['epoch']}, valid AUC {chosen['scores']['auc']:.4f}"
    say(f"fold {args.fold} of {args.exp}: kept {score} → {finished}")


if __name__ == "__main__":
    run(main)
