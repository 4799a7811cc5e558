"""Trains folds of an experiment and keeps each one's model and out-of-fold predictions.

    python 01_train_fold.py --fold 2                                 # the thesis' recipe, experiment "base"
    python 01_train_fold.py --fold all --exp convnext @recipes/convnext.args
    torchrun --nproc-per-node 2 01_train_fold.py --fold 2            # one fold on two GPUs

Reads OUTPUT/prepared. Writes OUTPUT/EXP/config.json and, for each fold, foldK.pt (the model), foldK.csv (predictions of
the held-out images), foldK.json and foldK_epochs.csv. A fold that was stopped goes on from its foldK.resume.pt and,
on a CPU, ends with the same bytes. The defaults are the thesis' recipe (its tables 3.1 and 4.1).
"""

import common  # first: it makes the other imports faster

# isort: split
import contextlib
import json
import random
import time
from types import SimpleNamespace

import numpy as np
import torch
from timm.utils import ModelEmaV3

from common import RANK, WORLD, Parser, UserError, duration, experiment_folder, key_value, number, say
from kit.data.prepared import open_images, read_prepared
from kit.experiment import check_config, claimed, is_finished, read_record, taken, warn_of_other_makers
from kit.report.pictures import draw_classes
from kit.score import tasks
from kit.score.metrics import is_better
from kit.train import distributed
from kit.train.augment import AUGMENTATIONS, Augmentation
from kit.train.checkpoint import SEEN, ResumeFile, earlier_weights, epoch_start, makers, save_fold
from kit.train.dataset import SAMPLERS, training_batches
from kit.train.device import (
    PRECISIONS,
    autocast,
    compile_backbone,
    enough_memory,
    keep_memory,
    pick_amp,
    pick_device,
    pick_workers,
)
from kit.train.inference import PREDICT_BATCH, TTAS, predict, to_device
from kit.train.linear_probe import probe, start_head
from kit.train.losses import LOSSES
from kit.train.model import HEADS, build_model
from kit.train.monitor import Watch, note_epoch, scores, seen, warn_if_endless
from kit.train.optim import OPTIMIZERS, SCHEDULES, choose_trained, train_mode
from kit.train.settings import changed, check_flags, experiment_names, fold_numbers, for_task, init_makers, settings
from kit.train.trackers import TRACKERS, Track


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
    add("--head", choices=HEADS, default="linear", help="%(choices)s: on outputs, on features, on a ViT's tokens")
    add("--tune", choices=("all", "head", "probe"), default="all", help="all weights, or the head alone; probe: a "
        "logistic regression on frozen features")  # fmt: skip
    add("--init", default="weights", metavar="EXP", help="start from this experiment's folds; probe: a fitted head")
    add("--freeze", type=number(float, 0), default=0, help="share of the layers that stays as it is, from the "
        "image on")  # fmt: skip
    add("--norm", choices=("thesis", "model"), default="thesis", help="thesis: mean and std 0.5; model: the weights' "
        "own")  # fmt: skip
    add("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="for timm.create_model, such as "
        "drop_path_rate=0.1")  # fmt: skip

    add = parser.group("training (thesis 3.5, 3.6, 4.1)")
    add("--epochs", type=number(int, 1), default=2, help="passes over the training folds")
    add("--batch-size", type=number(int, 1), default=17, help="images a batch, over all processes")
    add("--lr", type=number(float, above=0), default=6e-5, help="peak learning rate")
    add("--min-lr", type=number(float, 0), default=3e-5, help="learning rate at the end")
    add("--loss", choices=LOSSES, default="cce", help="%(choices)s: complement, plain, binary cross entropy, squared "
        "error")  # fmt: skip
    add("--optimizer", choices=OPTIMIZERS, default="ranger21", help="%(choices)s")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="pulls the weights to 0")
    add("--schedule", choices=SCHEDULES, default="ranger21", help="of the learning rate: %(choices)s")
    add("--warmup", type=number(float, 0), help="share of the steps in which the rate rises (default: ranger21 0.22, "
        "cosine 0)")  # fmt: skip
    add("--layer-decay", type=number(float, above=0), help="a layer learns at X times the next one's rate (default: 1)")
    add("--clip-grad", type=number(float, above=0), help="shorten gradients that are longer than this")
    add("--ema", type=number(float, 0), default=0, help="keep and validate an average of the weights, such as 0.99")
    add("--keep", choices=("best", "last"), default="best", help="the epoch: best validation score, or last")
    add("--seed", type=number(int, 0), nargs="+", default=[777], help="decides all that is random; several train an "
        "EXP_N each")  # fmt: skip

    add = parser.group("images (thesis 3.1, 3.2)")
    add("--augment", choices=AUGMENTATIONS, default="d4", help="the random transform: %(choices)s")
    add("--sampler", choices=SAMPLERS, default="imbalanced", help="%(choices)s: each class or each image equally often")
    add("--tta", choices=("auto", *TTAS), default="auto", help="views averaged: %(choices)s; auto: as --augment")

    add = parser.group("time, memory and machine")
    add("--track", choices=TRACKERS, help="show the training live in %(choices)s")
    add("--stop-after", type=duration, metavar="8.5h", help="save and end after this time; the same command goes on")
    add("--save-minutes", type=number(float, 0), default=10, help="between resume files within an epoch; 0: none")
    add("--accumulate", type=number(int, 1), default=1, help="batches whose gradients are added up before a step")
    add("--grad-checkpointing", action="store_true", help="compute activations twice: less memory, slower")
    add("--amp", choices=PRECISIONS, default="auto", help="precision: %(choices)s; auto: fp16 on a GPU")
    add("--compile", action="store_true", help="torch.compile: about a minute at the start, then faster on a GPU")
    add("--workers", type=number(int, 0), help="processes that load images (default: up to 4 beside a GPU, else 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--deterministic", action="store_true", help="on a GPU: the same bits each time, at some cost in speed")
    return parser


def defaults():
    """→ the settings of a run without flags. A setting that is younger than an experiment had this value in it."""
    args = make_parser().parse_args(["--fold", "0"])
    return settings(args, *args.seed)


# ---------------------------------------------------------------- one epoch


def train_step(run, images, targets, share, whole):
    """Forward and backward pass of a batch, uint8 [B, 3, S, S] and int [B]: what to change to learn differently from
    an image. share: this batch's part of the step's gradient; whole: a step follows. → (logits, loss), detached."""
    with distributed.syncing(run.model, whole):
        with autocast(run.device, run.amp):
            logits = run.model(images)
        loss = run.criterion(logits, targets)
        run.scaler.scale(loss * share).backward()
    return logits.detach(), loss.detach()


def update(run, number):
    """Step `number` of the optimiser, from 1 on, unless the GradScaler skips it for gradients that overflowed."""
    if run.config["clip_grad"]:
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.classifier.parameters(), run.config["clip_grad"])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.scheduler is not None:
        run.scheduler.step()
    if run.ema is not None:
        run.ema.update(run.classifier, number)


def train_epoch(run, state):
    """Trains from step state["step"] to the end of the epoch. → the scores over the epoch's images, as they came.

    `state` is kept up to date, and saved when due."""
    train_mode(run.classifier, run.config["init"])
    loader = training_batches(run, state["epoch"], state["step"])
    steps, accumulate = state["step"] + len(loader), run.config["accumulate"]
    with Watch(run, state, steps) as watch:
        for step, (images, targets) in enumerate(loader, state["step"]):
            images, targets = to_device(images, run.device), targets.to(run.device, non_blocking=True)
            first = step - step % accumulate
            group = min(accumulate, steps - first)
            whole = step + 1 - first == group
            # Under torchrun each process counts by its part of the batch: their gradients will be averaged.
            share = len(images) * WORLD / run.config["batch_size"] / group
            logits, loss = train_step(run, images, targets, share, whole)
            state["logits"].append(logits)
            state["targets"].append(targets)
            save = stop = False
            if whole:
                update(run, (state["epoch"] - 1) * -(-steps // accumulate) + first // accumulate + 1)
                state["step"] = step + 1
                if step + 1 < steps:
                    stop, save = distributed.from_first(run.resume.time_is_up(), run.resume.due())  # a stop is due
            watch.after(step, loss, save)
            if save:
                run.resume.save(state)
            if stop:
                run.resume.stop(run.name, f"{step + 1} of {steps} steps")
    parts = [*zip(*distributed.gather(seen(state)), strict=True)]
    state.update({key: [] for key in SEEN})  # of many classes, a copy too many while the fold validates
    return scores(run, *(np.concatenate(part) if WORLD > 1 else part[0] for part in parts))


def validate(run, model, bar):
    """→ logits float32 [n, K] of the fold's held-out images, without any random transform."""
    logits = predict(model, run.images, run.valid_rows, PREDICT_BATCH, run.device, run.amp, run.workers, bar)
    if not np.isfinite(logits).all():
        raise UserError(f"{bar}: the predictions are no numbers: lower --lr, or train with --amp none")
    return logits


# ---------------------------------------------------------------- one fold


def set_up(shared, fold):
    """→ all that the training of a fold needs, as a namespace: `shared`, model, loss, optimiser, resume file."""
    config, folds, device, args = shared.config, shared.folds, shared.device, shared.args
    seed = np.random.SeedSequence([config["seed"], fold]).generate_state(1).item()
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(seed)
    weights, head = args.weights, None
    if config["init"] not in ("weights", "probe"):
        weights, head = earlier_weights(experiment_folder(args, config["init"]), fold, config)
    classifier = build_model(config, len(shared.prepared["classes"]), weights).to(device)
    if head is not None:
        classifier.head.load_state_dict(head)
    if RANK > 0:  # dropout must not hide the same places in each process's share of a batch
        torch.manual_seed(np.random.SeedSequence([config["seed"], fold, RANK]).generate_state(1).item())
    choose_trained(classifier, config["tune"], config["freeze"])
    train_rows, valid_rows = (np.flatnonzero(mask) for mask in (folds.fold != fold, folds.fold == fold))
    updates = -(-(len(train_rows) // config["batch_size"]) // config["accumulate"])
    optimizer, scheduler = OPTIMIZERS[config["optimizer"]](classifier, config, updates * config["epochs"])
    if args.compile:
        compile_backbone(classifier.backbone)
        if config["optimizer"] == "ranger21":
            optimizer.compile()
    path = shared.folder / f"fold{fold}.resume.pt"
    ema = ModelEmaV3(classifier, decay=config["ema"], use_warmup=True) if config["ema"] else None
    return SimpleNamespace(
        **vars(shared), fold=fold, name=f"fold {fold}", train_rows=train_rows, valid_rows=valid_rows, told=False,
        classifier=classifier, model=distributed.wrap(classifier, device), criterion=LOSSES[config["loss"]],
        optimizer=optimizer, scheduler=scheduler, ema=ema, kept_model=classifier if ema is None else ema.module,
        scaler=torch.amp.GradScaler(device.type, enabled=shared.amp == "fp16"),
        resume=ResumeFile(path, config, shared.defaults, args.save_minutes, args.stop_after),
        track=Track(args.track, shared.folder, fold, config),
    )  # fmt: skip


def train_fold(run, state):
    """Trains the epochs that are left (thesis 4.2). → {"best" and "last": epoch, scores, logits, weights if kept}.

    "best" is the epoch with the best validation score, the later of equals (listing, `>=`)."""
    config, kept = run.config, state["kept"]
    while state["epoch"] <= config["epochs"]:
        epoch, last = state["epoch"], str(config["epochs"])
        run.name = f"fold {run.fold} epoch {epoch:{len(last)}}/{last}"
        train, began = train_epoch(run, state), time.perf_counter()
        logits = validate(run, run.kept_model, f"{run.name} valid")
        valid = scores(run, logits, run.targets[run.valid_rows])
        note_epoch(run, state, train, valid, time.perf_counter() - began)
        kept["last"] = dict(epoch=epoch, scores=valid, logits=torch.from_numpy(logits))
        if "best" not in kept or is_better(run.metric, valid[run.metric], kept["best"]["scores"][run.metric]):
            kept["best"] = kept["last"]
        if kept[config["keep"]]["epoch"] == epoch:
            weights = {key: value.cpu().clone() for key, value in run.kept_model.state_dict().items()}
            kept[config["keep"]] = kept[config["keep"]] | dict(weights=weights)
        state.update(epoch=epoch + 1, **epoch_start())
        if epoch < config["epochs"] or config["tta"] != "none":
            run.resume.save(state)
            if distributed.from_first(run.resume.time_is_up())[0]:
                run.resume.stop(run.name, f"{epoch} of {config['epochs']} epochs")
    return kept


def train_and_predict(run):
    """→ (what train_fold returned, logits float32 [n, K] of the held-out images in all views, the epochs' rows)."""
    if run.config["init"] == "probe":
        start_head(run)
    state = run.resume.load(run)
    kept, tta = train_fold(run, state), run.config["tta"]
    run.classifier.load_state_dict(kept[run.config["keep"]]["weights"])
    logits = kept[run.config["keep"]]["logits"].numpy()
    if tta != "none":
        logits = validate(run, TTAS[tta](run.classifier), f"fold {run.fold}, {tta} views")
    return kept, logits, state["rows"]


def train_and_keep(shared, fold):
    """Trains one fold, from where it was stopped, unless it is finished."""
    config, folder, replaced = shared.config, shared.folder, shared.replaced
    with contextlib.ExitStack() as held:
        if RANK == 0:
            held.enter_context(taken(folder, fold))
        # Nobody begins before the first process holds the fold; by then, another job may have finished it.
        if distributed.from_first(is_finished(folder, fold) and fold not in replaced)[0]:
            stopped = (folder / f"fold{fold}.resume.pt").exists()
            anew = "goes on with training it again" if stopped else "trains it again"
            say(f"fold {fold} of {folder.name} is finished (--overwrite {anew})")
            return
        run = set_up(shared, fold)
        held.enter_context(run.track)
        if RANK == 0:
            held.enter_context(claimed(folder, config, shared.defaults, {fold, *replaced}))
            records = {k: read_record(folder, k) for k in range(run.prepared["folds"]) if is_finished(folder, k)}
            warn_of_other_makers(folder.name, records | {fold: run.makers})
            if not (picture := folder / "augmented.png").exists() or replaced:
                transform = Augmentation(config["augment"], run.images.shape[1])
                draw_classes(
                    picture, run.images, run.folds, tasks.examples(run.prepared, run.folds), config["seed"], transform
                )
        warn_if_endless(run)
        kept, logits, rows = probe(run) if config["tune"] == "probe" else train_and_predict(run)
        if RANK == 0:
            save_fold(run, kept, logits, rows)


def gather(args, folder, seed, device):
    """→ what the folds of an experiment share, as a namespace. Raises UserError where its finished folds differ."""
    prepared, folds = read_prepared(args)
    config, usual = for_task(settings(args, seed), tasks.task_of(prepared)), defaults()
    config["changed"] = changed(config, usual)
    numbers = fold_numbers(args, prepared["folds"])
    if args.batch_size > (count := len(folds) - folds.fold.value_counts().max()):
        raise UserError(f"--batch-size {args.batch_size} is more than the {count} training images: lower it")
    config |= {key: prepared[key] for key in ("folds_hash", "metric")}  # decided by 00, and the same for all folds
    made_by = makers(args.weights, init_makers(args, folder, numbers))
    replaced = set(numbers) if args.overwrite else set()
    check_config(folder, config, usual, replaced)
    return SimpleNamespace(
        args=args, config=config, defaults=usual, folder=folder, replaced=replaced, makers=made_by,
        prepared=prepared, metric=prepared["metric"], folds=folds, numbers=numbers,
        images=open_images(args, prepared, "train", config["size"], len(folds)),
        targets=tasks.to_unit(prepared, tasks.read_targets(prepared, folds.target)),
        device=device, amp=pick_amp(args.amp, device),
        workers=pick_workers(args.workers, device),
    )  # fmt: skip


def main(args):
    check_flags(args)
    device = pick_device(args.device, args.deterministic)
    keep_memory()
    exps = experiment_names(args)
    folders = [experiment_folder(args, exp) for exp in exps]
    if args.print_config:
        config = settings(args, args.seed[0])
        how = dict(fold=args.fold, exps=exps, device=str(device), amp=pick_amp(args.amp, device))
        how |= dict(changed=changed(config, defaults()))
        print(json.dumps(config | how, indent=1))
        return
    experiments = [gather(args, folder, seed, device) for folder, seed in zip(folders, args.seed, strict=True)]
    with distributed.together(device), enough_memory("give --batch-size 1 --accumulate 17 --grad-checkpointing"):
        for shared in experiments:
            for fold in shared.numbers:
                train_and_keep(shared, fold)


if __name__ == "__main__":
    common.run(main, make_parser())
