"""Training of an experiment's folds: a model, the epoch that is kept, and out-of-fold predictions for each.

    python 01_train_fold.py --fold 2                                 # the thesis' recipe, experiment "base"
    python 01_train_fold.py --fold all --exp convnext @recipes/convnext.args
    torchrun --nproc-per-node 2 01_train_fold.py --fold 2            # one fold on two GPUs

Reads OUTPUT/prepared. Writes OUTPUT/EXP/config.json and, for each fold, foldK.pt (the model), foldK.csv (predictions of
the held-out images), foldK.json and foldK_epochs.csv; with --predict also foldK_test.npy (logits of the test images). A
fold that was stopped resumes from its foldK.resume.pt and, on a CPU, ends with the same bytes. The defaults follow the
thesis' recipe (its tables 3.1 and 4.1); @recipes/thesis.args has all of its settings.
"""

import json
import operator
import time

import common
from common import RANK, WORLD, Parser, UserError, duration, key_value, number, say

import numpy as np
import torch

from kit.report.pictures import draw_classes
from kit.score.metrics import is_better
from kit.submit.test_set import Machine, earlier_logits, new_logits, read_test_set
from kit.train import distributed
from kit.train.augment import AUGMENTATIONS, Augmentation
from kit.train.checkpoint import OUTPUTS, ResumeFile, epoch_start, save_fold
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
    add("--fold", nargs="+", default=["all"], metavar="K", help="the folds that are held out in turn: 2, 0 2 4, or all")
    add("--exp", default="base", metavar="EXP", help="the experiment's name: its folder under --output")
    add("--print-config", action="store_true", help="print the settings as JSON and exit; auto: the metric decides")
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
    add("--norm", choices=("auto", "thesis", "model"), default="auto", help="mean and std; thesis: 0.5; model: the "
        "weights' own; auto: by --model")  # fmt: skip
    add("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="timm's, like drop_path_rate=0.1")

    add = parser.group("training (thesis 3.5, 3.6, 4.1)")
    add("--epochs", type=number(int, 1), default=2, help="passes over the training folds")
    add("--batch-size", type=number(int, 1), default=17, help="images a batch, over all processes")
    add("--lr", type=number(float, above=0), help="peak learning rate (default: 6e-5, sgd: 0.01)")
    add("--min-lr", type=number(float, 0), help="learning rate at the end (default: half of --lr with ranger21, "
        "else 1/100)")  # fmt: skip
    add("--head-lr", type=number(float, above=0), default=1, metavar="X", help="the head learns at X times --lr")
    add("--loss", choices=LOSSES, default="cce", help="ce: classes; bce: labels and numbers; mse: numbers; cce: the "
        "thesis'")  # fmt: skip
    add("--optimizer", choices=OPTIMIZERS, default="ranger21", help="%(choices)s")
    add("--weight-decay", type=number(float, 0), help="weight decay (default: ranger21 and sgd 1e-4, others 0.05)")
    add("--schedule", choices=SCHEDULES, help="learning rate schedule: %(choices)s (default: ranger21 with ranger21)")
    add("--warmup", type=number(float, 0), help="share of steps with a rising rate (default: ranger21 .22, others .1)")
    add("--layer-decay", type=number(float, above=0), help="multiply the learning rate by X per layer, towards the "
        "input (default: 1)")  # fmt: skip
    add("--clip-grad", type=number(float, above=0), help="maximum gradient norm")
    add("--ema", type=number(float, 0), default=0, help="validate and keep averaged weights, with a decay such as 0.99")
    add("--keep", choices=("best", "last"), default="best", help="the epoch: best validation score, or last")
    add("--seed", type=number(int, 0), nargs="+", default=[777], help="several seeds train an experiment EXP_SEED each")

    add = parser.group("images (thesis 3.1, 3.2)")
    add("--augment", choices=AUGMENTATIONS, default="d4", help="random transforms of training images: %(choices)s")
    add("--sampler", choices=("auto", *SAMPLERS), default="auto", help="imbalanced: each class as often; shuffle: each "
        "image once; auto: by metric")  # fmt: skip
    add("--tta", choices=("auto", *TTAS), default="auto", help="views averaged: %(choices)s; auto: as --augment")

    add = parser.group("time, memory and machine")
    add("--track", choices=TRACKERS, help="log the training live to %(choices)s")
    add("--stop-after", type=duration, metavar="8.5h", help="save and end after this time; the same command resumes")
    add("--save-minutes", type=number(float, 0), default=10, help="between resume files within an epoch; 0: none")
    add("--predict", action="store_true", help="predict the test images after each fold, for 03_infer.py")
    add("--accumulate", type=number(int, 1), default=1, help="batches whose gradients are added up before a step")
    add("--micro-batch", type=number(int, 1), metavar="N", help="compute each batch in parts of N images: less memory")
    add("--grad-checkpointing", action="store_true", help="compute activations twice: less memory, slower")
    add_machine_flags(add, "a GPU's bf16, else fp16", "if a GPU's steps repay it")
    return parser


def defaults():
    """Return the settings of a run without flags."""
    args = make_parser().parse_args([])
    return settings(args, *args.seed)


def train_step(run, images, targets, share, is_last):
    """Compute the forward and the backward pass of a batch or of a part of it; edit it to change the training step.

    images: uint8 [B, 3, S, S]; targets: as the loss takes them; share: the weight of their loss in the update; is_last:
    whether the update follows. → (logits float32 [B, K], loss), detached."""
    with distributed.syncing(run.model, is_last):
        with autocast(run.experiment.device, run.experiment.amp):
            logits = run.model(images)
        loss = run.criterion(logits, targets)
        run.scaler.scale(loss * share).backward()
    return logits.detach(), loss.detach()


def train_batch(run, images, targets, known, is_last):
    """Train on a batch, in parts of --micro-batch images. images: uint8 [B, 3, S, S]; targets: as the loss takes them,
    on the CPU; known: how many targets of the complete update aren't NaN. → (logits float32 [B, K], loss), detached."""
    count, outputs, shares = min(run.experiment.parts, len(images)), [], []
    for k, part in enumerate(zip(images.tensor_split(count), targets.tensor_split(count), strict=True), 1):
        # Under torchrun each process weighs its part of the batch: the gradients will be averaged.
        shares.append(part[1].isfinite().sum().item() * WORLD / known)
        moved = part[0], part[1].to(run.experiment.device, non_blocking=True)
        outputs.append(train_step(run, *moved, shares[-1], is_last and k == count))
    logits, losses = zip(*outputs, strict=True)
    return torch.cat(logits), sum(map(operator.mul, losses, shares)) / (sum(shares) or 1)


def update(run, number):
    """Take step `number` of the optimiser (1, 2, …). → whether it was taken: where gradients overflowed, the GradScaler
    skips it, and the schedule and the EMA wait."""
    if norm := run.experiment.config["clip_grad"]:
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.classifier.parameters(), norm)
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    taken = run.scaler.get_scale() >= scale
    if run.scheduler is not None and taken:
        run.scheduler.step()
    if run.ema is not None and taken:
        run.ema.update(run.classifier, number)
    return taken


def train_epoch(run, state):
    """Train from step state["step"] to the end of the epoch. → the scores of its images, each predicted in its step.

    `state` is kept up to date, and saved when due. A step here is a batch; `accumulate` of them make an update."""
    config, start = run.experiment.config, state["step"]
    train_mode(run.classifier, fixed_statistics=run.batch_norm == 0)
    loader, known = training_loader(run, state["epoch"], start)
    steps, accumulate = start + len(loader), config["accumulate"]
    with EpochMonitor(run, state, steps) as monitor:
        for step, (images, targets) in enumerate(loader, start):
            first = step - step % accumulate
            batches = known[first - start :][:accumulate]
            is_last = step + 1 - first == len(batches)
            images = to_device(images, run.experiment.device)
            logits, loss = train_batch(run, images, targets, max(1, sum(batches)), is_last)
            state["logits"].append(logits)
            state["targets"].append(targets)
            save = False
            if is_last:
                monitor.count(update(run, state["updates"] + 1))
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
    if run.batch_norm == 0 and config["init"] != "probe":
        at_once = run.experiment.images_at_once
        count = f"{at_once} image{'s' * (at_once > 1)} at once"
        say(f"fold {run.fold}: batch norm keeps its statistics: {count} can't give better ones, 8 can")
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


def train_and_save(run):
    """Train a fold and save it. Draws augmented.png, where it is missing."""
    experiment = run.experiment
    path, config, images = experiment.folder / "augmented.png", experiment.config, experiment.images
    if RANK == 0 and (experiment.replaced or not path.exists()):
        transform = Augmentation(config["augment"], images.shape[1])
        draw_classes(path, images, experiment.folds, experiment.prepared.task, config["seed"], transform)
    warn_if_slow(run)
    kept, logits, rows = probe(run) if config["tune"] == "probe" else train_fold(run)
    if RANK == 0:
        save_fold(run, kept, logits, rows)


def finish_fold(experiment, fold, test, machine, worked):
    """Train a fold and predict the TestSet `test`, if it isn't None, each unless it is done. → whether this process has
    done any work by now; worked: whether it had before. Without any, --stop-after doesn't end it between the two: it
    would end each start at the same place."""
    with start_fold(experiment, fold) as run:
        if run is not None:
            train_and_save(run)
        worked = distributed.broadcast(worked or run is not None)  # the fold's files are there for all processes
        where = experiment.folder, fold, test, experiment.config["tta"], machine
        if test is None or earlier_logits(*where) is not None:
            return worked
        if worked:
            ResumeFile(experiment, fold).stop_if_late(f"fold {fold}", "its training")
        new_logits(experiment.prepared, *where, None if run is None else run.classifier)
        return True


def less_memory(flags):
    """Return the remedy where a GPU's memory is too small for the batch in use."""
    at_once, remedies = min(flags.micro_batch or flags.batch_size, flags.batch_size // WORLD), []
    if at_once > 1:
        remedies.append(f"--micro-batch {at_once // 2} computes each batch in parts, of {at_once // 2} images now")
    if not flags.grad_checkpointing:
        remedies.append("--grad-checkpointing computes activations twice")
    return f"{' or '.join(remedies) or 'take a smaller --size or --model'}; finished folds stay, this one resumes"


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
    flags = "fold overwrite weights compile workers track save_minutes stop_after micro_batch grad_checkpointing"
    machine = {flag: getattr(args, flag) for flag in flags.split()} | dict(device=device, amp=amp)
    seeds = zip(folders, args.seed, strict=True)
    experiments = [open_experiment(folder, settings(args, seed), defaults(), **machine) for folder, seed in seeds]
    test = read_test_set(experiments[0].prepared, {args.size}) if args.predict else None
    predicting, worked = Machine(device, args.amp, args.compile == "on", args.workers, PREDICT_BATCH), False
    with distributed.process_group(device), enough_memory(less_memory(args)):
        for experiment in experiments:
            for fold in experiment.chosen:
                worked = finish_fold(experiment, fold, test, predicting, worked)


if __name__ == "__main__":
    common.run(main, make_parser())
