"""Training of an experiment's folds: a model, the epoch that is kept, and out-of-fold predictions for each.

    python 01_train_fold.py --fold 2                                 # the thesis' recipe, experiment "base"
    python 01_train_fold.py --fold all --exp convnext @recipes/convnext.args
    torchrun --nproc-per-node 2 01_train_fold.py --fold 2            # one fold on two GPUs

Reads OUTPUT/prepared. Writes OUTPUT/EXP/config.json and, for each fold, foldK.pt (the model), foldK.csv (predictions of
the held-out images), foldK.json and foldK_epochs.csv. A fold that was stopped resumes from its foldK.resume.pt and, on
a CPU, ends with the same bytes. The defaults are the thesis' recipe (its tables 3.1 and 4.1).
"""

import json
import time

import common
from common import RANK, WORLD, Parser, UserError, duration, key_value, number

import numpy as np
import torch

from kit.report.pictures import draw_classes
from kit.score.metrics import is_better
from kit.train import distributed
from kit.train.augment import AUGMENTATIONS, Augmentation
from kit.train.checkpoint import OUTPUTS, epoch_start, save_fold
from kit.train.dataset import SAMPLERS, training_loader
from kit.train.device import add_machine_flags, autocast, enough_memory, keep_memory, pick_amp, pick_device
from kit.train.inference import PREDICT_BATCH, TTAS, predict, to_device
from kit.train.linear_probe import probe, start_head
from kit.train.losses import LOSSES
from kit.train.model import HEADS
from kit.train.monitor import EpochMonitor, note_epoch, outputs, scores, warn_if_slow
from kit.train.optim import OPTIMIZERS, SCHEDULES, train_mode
from kit.train.run import open_experiment, start_fold
from kit.train.settings import changed, check_flags, experiment_folders, settings
from kit.train.trackers import TRACKERS


def make_parser():
    parser = Parser(__doc__)
    add = parser.group("what to run")
    add("--fold", nargs="+", required=True, metavar="K", help="the folds that are held out in turn: 2, 0 2 4, or all")
    add("--exp", default="base", metavar="EXP", help="the experiment's name: its folder under --output")
    add("--print-config", action="store_true", help="print the resolved settings as JSON and exit")
    add("--overwrite", action="store_true", help="train folds again although they are finished")
    parser.shared(add)

    add = parser.group("model (thesis 3.4)")
    add("--model", default="eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", help="a timm name")
    add("--size", type=number(int, 1), default=448, metavar="PX", help="side of the images, prepared by 00_prepare.py")
    add("--weights", default="hub", metavar="FILE", help="hub, none (from scratch), or a .safetensors or .pth file")
    add("--head", choices=HEADS, default="linear", help="linear: on class outputs; fresh: on features; tokens: class "
        "token + mean patch")  # fmt: skip
    add("--tune", choices=("all", "head", "probe"), default="all", help="all weights, or the head alone; probe: a "
        "logistic regression on frozen features")  # fmt: skip
    add("--init", default="weights", metavar="EXP", help="start from the same folds of EXP; probe: with a fitted head")
    add("--freeze", type=number(float, 0), default=0, help="freeze this share of the layers, input side first")
    add("--norm", choices=("thesis", "model"), default="thesis", help="mean and std: 0.5, or those of the weights")
    add("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="timm's, like drop_path_rate=0.1")

    add = parser.group("training (thesis 3.5, 3.6, 4.1)")
    add("--epochs", type=number(int, 1), default=2, help="passes over the training folds")
    add("--batch-size", type=number(int, 1), default=17, help="images a batch, over all processes")
    add("--lr", type=number(float, above=0), default=6e-5, help="peak learning rate")
    add("--min-lr", type=number(float, 0), default=3e-5, help="learning rate at the end")
    add("--loss", choices=LOSSES, default="cce", help="ce: classes; bce: labels and numbers; mse: numbers; cce: the "
        "thesis'")  # fmt: skip
    add("--optimizer", choices=OPTIMIZERS, default="ranger21", help="%(choices)s")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="weight decay")
    add("--schedule", choices=SCHEDULES, default="ranger21", help="learning rate schedule: %(choices)s")
    add("--warmup", type=number(float, 0), help="share of steps with a rising rate (default: ranger21 0.22, cosine 0)")
    add("--layer-decay", type=number(float, above=0), help="multiply the learning rate by X per layer, towards the "
        "input (default: 1)")  # fmt: skip
    add("--clip-grad", type=number(float, above=0), help="maximum gradient norm")
    add("--ema", type=number(float, 0), default=0, help="validate and keep averaged weights, with a decay such as 0.99")
    add("--keep", choices=("best", "last"), default="best", help="the epoch: best validation score, or last")
    add("--seed", type=number(int, 0), nargs="+", default=[777], help="several seeds train an experiment EXP_SEED each")

    add = parser.group("images (thesis 3.1, 3.2)")
    add("--augment", choices=AUGMENTATIONS, default="d4", help="random transforms of training images: %(choices)s")
    add("--sampler", choices=SAMPLERS, default="imbalanced", help="%(choices)s: each class or each image equally often")
    add("--tta", choices=("auto", *TTAS), default="auto", help="views averaged: %(choices)s; auto: as --augment")

    add = parser.group("time, memory and machine")
    add("--track", choices=TRACKERS, help="log the training live to %(choices)s")
    add("--stop-after", type=duration, metavar="8.5h", help="save and end after this time; the same command resumes")
    add("--save-minutes", type=number(float, 0), default=10, help="between resume files within an epoch; 0: none")
    add("--accumulate", type=number(int, 1), default=1, help="batches whose gradients are added up before a step")
    add("--grad-checkpointing", action="store_true", help="compute activations twice: less memory, slower")
    add_machine_flags(add, "fp16 on a GPU")
    return parser


def defaults():
    """Return the settings of a run without flags."""
    args = make_parser().parse_args(["--fold", "0"])
    return settings(args, *args.seed)


def train_step(run, images, targets, share, is_last):
    """Compute the forward and the backward pass of a batch; edit it to change the training step.

    images: uint8 [B, 3, S, S]; targets: as the loss takes them; share: the batch's part of the update's gradient;
    is_last: whether the update follows it. → (logits, loss), detached."""
    with distributed.syncing(run.model, is_last):
        with autocast(run.experiment.device, run.experiment.amp):
            logits = run.model(images)
        loss = run.criterion(logits, targets)
        run.scaler.scale(loss * share).backward()
    return logits.detach(), loss.detach()


def update(run, number):
    """Take step `number` of the optimiser, from 1 on; the GradScaler skips it if gradients overflowed."""
    if norm := run.experiment.config["clip_grad"]:
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.classifier.parameters(), norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.scheduler is not None:
        run.scheduler.step()
    if run.ema is not None:
        run.ema.update(run.classifier, number)


def train_epoch(run, state):
    """Train from step state["step"] to the end of the epoch. → the scores of its images, each predicted in its step.

    `state` is kept up to date, and saved when due. A step here is a batch; `accumulate` of them make an update."""
    config, device = run.experiment.config, run.experiment.device
    train_mode(run.classifier, config["init"])
    loader = training_loader(run, state["epoch"], state["step"])
    steps, accumulate = state["step"] + len(loader), config["accumulate"]
    with EpochMonitor(run, state, steps) as monitor:
        for step, (images, targets) in enumerate(loader, state["step"]):
            images, targets = to_device(images, device), targets.to(device, non_blocking=True)
            first = step - step % accumulate
            batches = min(accumulate, steps - first)
            is_last = step + 1 - first == batches
            # Under torchrun each process weighs its part of the batch: the gradients will be averaged.
            share = len(images) * WORLD / config["batch_size"] / batches
            logits, loss = train_step(run, images, targets, share, is_last)
            state["logits"].append(logits)
            state["targets"].append(targets)
            save = False
            if is_last:
                update(run, (state["epoch"] - 1) * -(-steps // accumulate) + first // accumulate + 1)
                state["step"] = step + 1
                save = step + 1 < steps and distributed.broadcast(run.resume.due())
            monitor.after(step, loss, save)
            if save:
                run.resume.save(state)
                run.resume.stop_if_late(run.epoch_name(state["epoch"]), f"{step + 1} of {steps} steps")
    parts = [*zip(*distributed.all_gather(outputs(state)), strict=True)]
    state.update({key: [] for key in OUTPUTS})  # large for many classes, and needless while the fold validates
    return scores(run, *(np.concatenate(part) if WORLD > 1 else part[0] for part in parts))


def validate(run, model, bar):
    """Return the logits of the fold's held-out images, float32 [n, K], not augmented. bar: the progress bar's name."""
    experiment = run.experiment
    machine = experiment.device, experiment.amp, experiment.workers
    logits = predict(model, experiment.images, run.valid_rows, PREDICT_BATCH, *machine, bar)
    if not np.isfinite(logits).all():
        raise UserError(f"{bar}: the predictions are NaN or infinite: lower --lr, or train with --amp none")
    return logits


def train_fold(run):
    """Train a fold to its last epoch, from where it was stopped (thesis 4.2), and predict its held-out images.

    → ({"best" and "last": epoch, scores, logits, weights if kept}, logits float32 [n, K] with the experiment's views,
    the epochs' rows). "best" is the epoch with the best validation score, the later of equals (listing, `>=`)."""
    config, metric = run.experiment.config, run.experiment.prepared.metric
    if config["init"] == "probe":
        start_head(run)
    state = run.resume.load(run)
    kept, keep, tta = state["kept"], config["keep"], config["tta"]
    while (epoch := state["epoch"]) <= config["epochs"]:
        name, train, began = run.epoch_name(epoch), train_epoch(run, state), time.perf_counter()
        logits = validate(run, run.kept_model, f"{name} valid")
        valid = scores(run, logits, run.experiment.targets[run.valid_rows])
        note_epoch(run, name, state, train, valid, time.perf_counter() - began)
        kept["last"] = dict(epoch=epoch, scores=valid, logits=torch.from_numpy(logits))
        if "best" not in kept or is_better(metric, valid[metric], kept["best"]["scores"][metric]):
            kept["best"] = kept["last"]
        if kept[keep]["epoch"] == epoch:
            weights = {key: value.cpu().clone() for key, value in run.kept_model.state_dict().items()}
            kept[keep] = kept[keep] | dict(weights=weights)
        state.update(epoch=epoch + 1, **epoch_start())
        if epoch < config["epochs"] or tta != "none":
            run.resume.save(state)
            run.resume.stop_if_late(name, f"{epoch} of {config['epochs']} epochs")
    run.classifier.load_state_dict(kept[keep]["weights"])
    logits = kept[keep]["logits"].numpy()
    if tta != "none":
        logits = validate(run, TTAS[tta](run.classifier), f"fold {run.fold}, {tta} views")
    return kept, logits, state["rows"]


def train_and_save(experiment, fold):
    """Train one fold, unless it is finished, and save it. Draws augmented.png, where it is missing."""
    with start_fold(experiment, fold) as run:
        if run is None:
            return
        path, config, images = experiment.folder / "augmented.png", experiment.config, experiment.images
        if RANK == 0 and (experiment.replaced or not path.exists()):
            transform = Augmentation(config["augment"], images.shape[1])
            draw_classes(path, images, experiment.folds, experiment.prepared.task, config["seed"], transform)
        warn_if_slow(run)
        kept, logits, rows = probe(run) if config["tune"] == "probe" else train_fold(run)
        if RANK == 0:
            save_fold(run, kept, logits, rows)


def main(args):
    check_flags(args)
    device = pick_device(args.device, args.deterministic)
    keep_memory()
    folders, amp = experiment_folders(args.output, args.exp, args.seed), pick_amp(args.amp, device)
    if args.print_config:
        config, exps = settings(args, args.seed[0]), [folder.name for folder in folders]
        how = dict(fold=args.fold, exps=exps, device=str(device), amp=amp, changed=changed(config, defaults()))
        print(json.dumps(config | how, indent=1))
        return
    flags = "fold overwrite weights compile workers track save_minutes stop_after".split()
    machine = {flag: getattr(args, flag) for flag in flags} | dict(device=device, amp=amp)
    seeds = zip(folders, args.seed, strict=True)
    experiments = [open_experiment(folder, settings(args, seed), defaults(), **machine) for folder, seed in seeds]
    with distributed.process_group(device), enough_memory("give --batch-size 1 --accumulate 17 --grad-checkpointing"):
        for experiment in experiments:
            for fold in experiment.chosen:
                train_and_save(experiment, fold)


if __name__ == "__main__":
    common.run(main, make_parser())
