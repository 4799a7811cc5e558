"""Linear probe: a logistic regression on frozen features, kept by --tune probe, or where --init probe starts.

prepared/features_MODEL_SIZE_HASH.npy: float16 [N + M, V, D], the head's inputs for N training and M test images in the
V views of the experiment. All folds, seeds and experiments share it; HASH covers all that decides them. A .part file
is unfinished, and continued.
"""

import contextlib
import copy
import hashlib
import json
import time

import common
from common import RANK, UserError, read_table, replacing, say

import numpy as np
import torch
from torch import nn

from kit.folds.split import assign_folds
from kit.locks import locked
from kit.train import distributed
from kit.train.checkpoint import epoch_start
from kit.train.inference import PREDICT_BATCH, TTAS, predict
from kit.train.losses import binary_cross_entropy
from kit.train.monitor import note_epoch, scores

BLOCK = 1024  # images after which a stop loses nothing
C_VALUES = 10.0 ** np.arange(-4, 1.5, 0.5)  # C of the logistic regression
INNER = 4  # folds among the training images, by which C is chosen


class Views(nn.Module):
    """The features of a Classifier in the views of TTAS[tta], the plain one first: uint8 [B, 3, S, S] → [B, V, D]."""

    def __init__(self, classifier, tta):
        super().__init__()
        self.classifier = classifier
        self.transforms = getattr(TTAS[tta](classifier), "transforms", None)
        self.count = len(self.transforms or [0])

    def forward(self, images):
        views = [t.augment_image(images) for t in self.transforms] if self.transforms else [images]
        return torch.stack([self.classifier.features(view) for view in views], 1)


def paths(prepared, config, weights, amp):
    """Return {key of TTAS: the path of the features in these views}. weights: as foldK.json holds them; amp: fp16, bf16
    or none."""
    again = f"{common.PREPARE} again, with the same flags"
    tables = [read_table(prepared.folder / name, again) for name in ("folds.csv", "test.csv")]
    record = {key: config[key] for key in ("model", "model_kwargs", "head", "norm", "size")}
    record |= dict(weights=weights, amp=amp, names=[name for table in tables for name in table.image_name])
    record |= {part: prepared.made_from[f"{part}_images"] for part in ("train", "test")}
    hashes = {tta: hashlib.sha256(json.dumps([record, tta], sort_keys=True).encode()).hexdigest()[:12] for tta in TTAS}
    name = f"features_{config['model']}_{config['size']}"
    return {tta: prepared.folder / f"{name}_{digest}.npy" for tta, digest in hashes.items()}


def read_features(files, tta):
    """Return the features in the views `tta`, mapped, or None where there are none. files: as `paths` returns them."""
    for path in files.values() if tta == "none" else [files[tta]]:  # the plain view is the first of each
        with contextlib.suppress(OSError, ValueError, EOFError):  # missing or damaged
            return np.load(path, mmap_mode="r")[:, : 1 if tta == "none" else None]
    return None


def features(run):
    """Return the features float16 [N + M, V, D], mapped; where there are none, compute them with the run's backbone."""
    experiment, tta = run.experiment, run.experiment.config["tta"]
    files = paths(experiment.prepared, experiment.config, experiment.provenance["weights"], experiment.amp)
    with contextlib.ExitStack() as held:
        if RANK == 0:
            held.enter_context(locked(files[tta].with_name(f".{files[tta].stem}.lock"), files[tta], wait=True))
        if distributed.broadcast(read_features(files, tta) is None):
            compute(run, files[tta])
            distributed.broadcast(0)  # the others wait for the file
        return read_features(files, tta)


def compute(run, path):
    """Write the features of all images to `path`. A block of images is kept in a .part beside it until all are there.
    Under torchrun the first process writes those of all processes."""
    experiment, prepared = run.experiment, run.experiment.prepared
    train, count = experiment.images, len(read_table(prepared.folder / "test.csv", common.PREPARE))
    tests = prepared.open_images("test", experiment.config["size"], count)
    views = Views(run.classifier, experiment.config["tta"])
    blocks = [(images, start) for images in (train, tests) for start in range(0, len(images), BLOCK)]
    parts = [path.with_suffix(f".{number}.part") for number in range(len(blocks))]
    done = distributed.broadcast(sum(part.exists() for part in parts))
    for number, (images, start) in [*enumerate(blocks)][done:]:
        rows, bar = np.arange(start, min(start + BLOCK, len(images))), f"features, part {number + 1} of {len(blocks)}"
        machine = experiment.device, experiment.amp, experiment.workers
        with np.errstate(over="ignore"):  # or NumPy's warning would be printed before the error below
            block = predict(views, images, rows, PREDICT_BATCH, *machine, bar).astype(np.float16)
        if not np.isfinite(block).all():
            what = "features are NaN, or too large for fp16"
            raise UserError(f"{experiment.config['model']}: {what}: take another --model, or no probe")
        if RANK == 0:
            save_array(parts[number], [block], block.shape)
        run.resume.stop_if_late("features", f"{number + 1} of {len(blocks)} parts")
    shape = len(train) + count, views.count, run.classifier.head.in_features
    if RANK == 0:
        save_array(path, (np.load(part) for part in parts), shape)
        for part in parts:
            part.unlink()
    say(f"features of {shape[0]} images, {shape[1]} views, {shape[2]} numbers each → {path}")


def save_array(path, blocks, shape):
    """Write an .npy file of `shape`, float16. blocks: its arrays, one after the other."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=shape))
        for block in blocks:
            file.write(block.tobytes())


def fit_head(vectors, targets, groups, outputs, balanced, seed):
    """Fit a logistic regression to standardised vectors float [n, D], and return it as a linear layer on the vectors
    themselves: (weight float32 [K, D], bias float32 [K], C).

    targets: int [n] of `outputs` classes, or float [n, K] from 0 to 1, NaN where one is missing. C has the least loss
    in folds that keep groups (int [n]) together. balanced: each class weighs the same, as by the imbalance sampler."""
    from sklearn.preprocessing import StandardScaler  # takes a second, which other ways of training needn't wait for

    scaler = StandardScaler().fit(vectors)
    points, strata = scaler.transform(vectors), targets if targets.ndim == 1 else np.nan_to_num(targets) > 0.5
    inner = assign_folds(groups, strata, INNER, seed)
    if targets.ndim == 1:
        weight, bias, c = fit_classes(points, targets, inner, outputs, balanced)
    else:
        weight, bias, c = fit_outputs(points, targets, inner)
    weight = weight / scaler.scale_
    return weight.astype(np.float32), (bias - weight @ scaler.mean_).astype(np.float32), c


def choose_c(loss):
    """Return the C with the least loss; two worse ones in a row end the search. loss: a function of C."""
    best, losses = None, []
    for c in C_VALUES:
        losses.append(loss(c))
        if losses[-1] == min(losses):
            best = c
        elif losses[-1] > losses[-2] and min(losses) not in losses[-2:]:
            break
    return best


def fit_classes(points, targets, folds, outputs, balanced):
    """Fit scikit-learn's logistic regression to classes, int [n]. → (weight [K, D], bias [K], C)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    options = dict(class_weight="balanced" if balanced else None, max_iter=1000)
    parts = [(LogisticRegression(warm_start=True, **options), folds != k) for k in np.unique(folds)]
    parts = [(m, s) for m, s in parts if len(np.unique(targets[s])) > 1 and np.isin(targets[~s], targets[s]).any()]

    def held_out_loss(c):
        losses = []
        for model, train in parts:
            model.set_params(C=c).fit(points[train], targets[train])
            rows = ~train & np.isin(targets, model.classes_)
            losses.append(log_loss(targets[rows], model.predict_proba(points[rows]), labels=model.classes_))
        return np.mean(losses)

    c = choose_c(held_out_loss) if parts else 1.0  # too few groups for inner folds
    model = LogisticRegression(C=c, **options).fit(points, targets)
    pair = np.array([[-0.5], [0.5]]) if len(model.classes_) == 2 else 1  # for two classes there is one row
    weight = np.zeros((outputs, points.shape[1]))
    bias = np.full(outputs, model.intercept_.min() - 10)  # of classes without training images
    weight[model.classes_], bias[model.classes_] = pair * model.coef_, (pair * model.intercept_).ravel()
    return weight, bias, c


def fit_outputs(points, targets, folds):
    """Fit logistic regressions of one C to labels or numbers, float [n, K]. → as fit_classes."""
    points, targets = torch.from_numpy(points).float(), torch.from_numpy(targets)

    def fit(points, targets, c):
        """Minimise the summed binary cross entropy plus half the squared weights over C. → (weight, bias)."""
        count = (~targets.isnan()).sum()
        weight = torch.zeros(targets.shape[1], points.shape[1], requires_grad=True)
        bias = torch.zeros(targets.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = binary_cross_entropy(points @ weight.T + bias, targets) * count
            loss = (loss + (weight**2).sum() / (2 * c)) / count
            loss.backward()
            return loss

        optimizer.step(closure)
        return weight.detach(), bias.detach()

    def held_out_loss(c):
        losses = []
        for fold in np.unique(folds):
            train = torch.from_numpy(folds != fold)
            weight, bias = fit(points[train], targets[train], c)
            losses.append(binary_cross_entropy(points[~train] @ weight.T + bias, targets[~train]).item())
        return np.mean(losses)

    c = choose_c(held_out_loss)
    return *(part.double().numpy() for part in fit(points, targets, c)), c


def start_head(run):
    """Replace the run's head by the logistic regression. → what `features` returned."""
    experiment, head, rows = run.experiment, run.classifier.head, run.train_rows
    config, task = experiment.config, experiment.prepared.task
    if not isinstance(head, nn.Linear):
        raise UserError(f"--head {config['head']} is no single layer that a probe could fit: give --head fresh")
    vectors, groups = features(run), experiment.folds.group.to_numpy()
    data = vectors[rows].mean(axis=1, dtype=np.float32), experiment.targets[rows], groups[rows]
    weight, bias, c = fit_head(*data, len(task), config["sampler"] == "imbalanced", config["seed"])
    head.load_state_dict(dict(weight=torch.from_numpy(weight), bias=torch.from_numpy(bias)))
    say(f"fold {run.fold}: a logistic regression on frozen features, C = {c:.2g}")
    return vectors


def test_features(prepared, record, tta, count, amp):
    """Return the features of the `count` test images for a fold's probe, float16 [M, V, D], or None where none were
    computed in the precision `amp`. record: foldK.json."""
    files = paths(prepared, record["config"], record["weights"], amp) if record["config"]["tune"] == "probe" else None
    vectors = files and read_features(files, tta)
    return None if vectors is None else vectors[-count:]


@torch.inference_mode()
def head_logits(classifier, vectors):
    """Return the plain view's logits and the mean of all views', float32 [n, K] each. vectors: float16 [n, V, D]."""
    head, log_prior = copy.deepcopy(classifier.head).cpu(), classifier.log_prior.cpu()
    plain, mean = vectors[:, 0].astype(np.float32), vectors.mean(axis=1, dtype=np.float32)
    return tuple((head(torch.from_numpy(points)) + log_prior).numpy() for points in (plain, mean))


def probe(run):
    """Fit the head, in place of a training. → as 01's train_fold, with one epoch as "best" and "last"."""
    images, targets, rows = run.experiment.images, run.experiment.targets, run.valid_rows
    state, began = dict(epoch=1, rows=[]) | epoch_start(), time.perf_counter()
    plain, logits = head_logits(run.classifier, start_head(run)[: len(images)])
    state.update(seconds=time.perf_counter() - began)
    train, valid = (scores(run, plain[part], targets[part]) for part in (run.train_rows, rows))
    note_epoch(run, f"fold {run.fold}", state, train, valid, 0.0)
    weights = {key: value.cpu() for key, value in run.classifier.state_dict().items()}
    kept = dict(epoch=1, scores=valid, logits=torch.from_numpy(plain[rows]), weights=weights)
    return dict(best=kept, last=kept), logits[rows], state["rows"]
