"""Linear probe: a logistic regression on frozen features, kept by --tune probe, or where --init probe starts.

prepared/features_MODEL_SIZE_HASH.npy: float16 [N + M, V, D], the head's inputs for the N training and then the M test
images, in the V views of the experiment (one view without augmentation). All folds, seeds and experiments share it;
HASH is of all that decides it. A .part beside it is unfinished, and continued.
"""

import contextlib
import hashlib
import io
import json
import os
import time

import numpy as np
import torch
from torch import nn

import common
from common import RANK, UserError, read_table, say
from kit.folds.split import assign_folds
from kit.locks import locked
from kit.train import distributed
from kit.train.checkpoint import epoch_start
from kit.train.inference import PREDICT_BATCH, TTAS, predict
from kit.train.losses import binary_cross_entropy
from kit.train.monitor import note_epoch, scores

BLOCK = 1024  # images after which a stop loses nothing
STRENGTHS = 10.0 ** np.arange(-4, 1.5, 0.5)  # C of the logistic regression
INNER = 4  # folds among the training images, by which C is chosen


class Views(nn.Module):
    """A Classifier's features in the views of TTAS[tta], the plain one first: uint8 [B, 3, S, S] → float [B, V, D]."""

    def __init__(self, classifier, tta):
        super().__init__()
        self.classifier = classifier
        self.transforms = getattr(TTAS[tta](classifier), "transforms", None)
        self.count = len(self.transforms or [0])

    def forward(self, images):
        views = [t.augment_image(images) for t in self.transforms] if self.transforms else [images]
        return torch.stack([self.classifier.features(view) for view in views], 1)


def paths(prepared, config, weights):
    """Return {key of TTAS: the path of the features in these views}. weights: as foldK.json holds them."""
    tables = [read_table(prepared.folder / name, f"{common.PREPARE} --overwrite") for name in ("folds.csv", "test.csv")]
    record = {key: config[key] for key in ("model", "model_kwargs", "head", "norm", "size")}
    record |= dict(weights=weights, names=[name for table in tables for name in table.image_name])
    record |= {part: prepared.made_from[f"{part}_images"] for part in ("train", "test")}
    hashes = {tta: hashlib.sha256(json.dumps([record, tta], sort_keys=True).encode()).hexdigest()[:12] for tta in TTAS}
    name = f"features_{config['model']}_{config['size']}"
    return {tta: prepared.folder / f"{name}_{digest}.npy" for tta, digest in hashes.items()}


def read_features(paths, tta):
    """Return the features in the views `tta`, mapped, or None where they aren't kept. The plain view is the first of
    each file."""
    for path in paths.values() if tta == "none" else [paths[tta]]:
        with contextlib.suppress(OSError, ValueError, EOFError):  # missing or damaged
            return np.load(path, mmap_mode="r")[:, : 1 if tta == "none" else None]
    return None


def features(run):
    """Return the features float16 [N + M, V, D], mapped: those kept earlier, else computed with the run's backbone."""
    experiment, tta = run.experiment, run.experiment.config["tta"]
    files = paths(experiment.prepared, experiment.config, experiment.provenance["weights"])
    with contextlib.ExitStack() as held:
        if RANK == 0:
            held.enter_context(locked(files[tta].with_name(f".{files[tta].stem}.lock"), files[tta], wait=True))
        if distributed.from_first(read_features(files, tta) is None)[0]:
            compute(run, files[tta])
            distributed.from_first(0)  # the others wait for the file
        return read_features(files, tta)


def compute(run, path):
    """Write the features of all images to `path`. Under torchrun the first process writes those of all processes."""
    experiment, prepared = run.experiment, run.experiment.prepared
    train, size, model = experiment.images, experiment.config["size"], experiment.config["model"]
    count = len(read_table(prepared.folder / "test.csv", common.PREPARE))
    tests, views = prepared.open_images("test", size, count), Views(run.classifier, experiment.config["tta"])
    shape = len(train) + count, views.count, run.classifier.head.in_features
    blocks = [(images, start) for images in (train, tests) for start in range(0, len(images), BLOCK)]
    with contextlib.ExitStack() as held:
        done, file = 0, None
        if RANK == 0:
            file = held.enter_context(writing(path.with_suffix(".part")))
            done = cut(file, shape, np.cumsum([min(BLOCK, len(images) - start) for images, start in blocks]))
        for number in range(distributed.from_first(done)[0], len(blocks)):
            images, start = blocks[number]
            rows = np.arange(start, min(start + BLOCK, len(images)))
            bar = f"features, part {number + 1} of {len(blocks)}"
            machine = experiment.device, experiment.amp, experiment.workers
            block = predict(views, images, rows, PREDICT_BATCH, *machine, bar)
            with np.errstate(over="ignore"):  # or NumPy's warning would be printed before the error below
                block = block.astype(np.float16)
            if not np.isfinite(block).all():
                path.with_suffix(".part").unlink(missing_ok=True)
                what = "features are no numbers, or too large for fp16"
                raise UserError(f"{model}: {what}: take another --model, or no probe")
            if RANK == 0:
                file.write(block.tobytes())
                file.flush()
                os.fsync(file.fileno())
            if distributed.from_first(run.resume.time_is_up())[0]:
                run.resume.stop("features", f"{number + 1} of {len(blocks)} parts")
    if RANK == 0:
        os.replace(path.with_suffix(".part"), path)
    say(f"features of {shape[0]} images, {shape[1]} views, {shape[2]} numbers each → {path}")


@contextlib.contextmanager
def writing(path):
    """Open a file to append to it. Raises UserError where the disk refuses."""
    try:
        with open(path, "ab") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): fix that or see --output") from error


def cut(file, shape, ends):
    """Cut an .npy file of `shape`, float16, after its last complete block; an empty one gets its header.

    ends: the images after which blocks end. → the number of complete blocks."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="<f2", fortran_order=False, shape=shape))
    row, header = 2 * shape[1] * shape[2], header.getvalue()
    complete = np.searchsorted(ends, (file.seek(0, os.SEEK_END) - len(header)) // row, side="right").item()
    file.truncate(len(header) + ends[complete - 1] * row if complete else 0)
    if not complete:
        file.write(header)
    return complete


def fit_head(vectors, targets, groups, classes, balanced, seed):
    """Fit a logistic regression to standardised vectors float [n, D], and return it as a linear layer on the vectors
    themselves: (weight float32 [K, D], bias float32 [K], C).

    C has the least log loss in folds that keep groups (int [n]) together; balanced: each class weighs the same, as by
    the imbalance sampler."""
    from sklearn.linear_model import LogisticRegression  # takes a second, which other ways of training needn't wait for
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    points, options = scaler.transform(vectors), dict(class_weight="balanced" if balanced else None, max_iter=1000)
    strength = choose_strength(points, targets, assign_folds(groups, targets, INNER, seed), options)
    model = LogisticRegression(C=strength, **options).fit(points, targets)
    pair = np.array([[-0.5], [0.5]]) if len(model.classes_) == 2 else 1  # for two classes there is one row
    weight = np.zeros((classes, points.shape[1]))
    bias = np.full(classes, model.intercept_.min() - 10)  # of classes without training images
    weight[model.classes_], bias[model.classes_] = pair * model.coef_, (pair * model.intercept_).ravel()
    weight /= scaler.scale_
    return weight.astype(np.float32), (bias - weight @ scaler.mean_).astype(np.float32), strength


def fit_shared_head(vectors, targets, groups, seed):
    """Fit logistic regressions of one C to labels or numbers, float [n, K] from 0 to 1, NaN where one is missing.
    → as fit_head."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    points, wanted = torch.from_numpy(scaler.transform(vectors)).float(), torch.from_numpy(targets)
    inner, means = assign_folds(groups, np.nan_to_num(targets) > 0.5, INNER, seed), []
    for strength in STRENGTHS:
        losses = []
        for fold in np.unique(inner):
            train = torch.from_numpy(inner != fold)
            weight, bias = fit_linear(points[train], wanted[train], strength)
            losses.append(binary_cross_entropy(points[~train] @ weight.T + bias, wanted[~train]).item())
        means.append(np.mean(losses))
        if means[-1] > means[-2:][0] and min(means) not in means[-2:]:
            break
    strength = STRENGTHS[np.argmin(means)]
    weight, bias = (part.double().numpy() for part in fit_linear(points, wanted, strength))
    weight /= scaler.scale_
    return weight.astype(np.float32), (bias - weight @ scaler.mean_).astype(np.float32), strength


def fit_linear(points, targets, strength):
    """Minimise the summed binary cross entropy plus half the squared weights over C. → (weight [K, D], bias [K])."""
    weight = torch.zeros(targets.shape[1], points.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")
    count = (~targets.isnan()).sum()

    def closure():
        optimizer.zero_grad()
        loss = binary_cross_entropy(points @ weight.T + bias, targets) * count
        loss = (loss + (weight**2).sum() / (2 * strength)) / count
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def choose_strength(points, targets, folds, options):
    """Return the C of the least mean log loss over the folds (int [n]), which two larger, worse ones in turn end."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    parts = [(LogisticRegression(warm_start=True, **options), folds != k) for k in np.unique(folds)]
    parts = [(m, s) for m, s in parts if len(np.unique(targets[s])) > 1 and np.isin(targets[~s], targets[s]).any()]
    if not parts:  # too few groups for inner folds: scikit-learn's default
        return 1.0
    best, means = STRENGTHS[0], []
    for strength in STRENGTHS:
        losses = []
        for model, train in parts:
            model.set_params(C=strength).fit(points[train], targets[train])
            rows = ~train & np.isin(targets, model.classes_)
            losses.append(log_loss(targets[rows], model.predict_proba(points[rows]), labels=model.classes_))
        means.append(np.mean(losses))
        if means[-1] == min(means):
            best = strength
        elif means[-1] > means[-2] and min(means) not in means[-2:]:
            break
    return best


def start_head(run):
    """Replace the run's head by the logistic regression. → what `features` returned."""
    experiment, head, rows = run.experiment, run.classifier.head, run.train_rows
    config, task = experiment.config, experiment.prepared.task
    if not isinstance(head, nn.Linear):
        raise UserError(f"--head {config['head']} is no single layer that a probe could fit: give --head fresh")
    vectors, groups = features(run), experiment.folds.group.to_numpy()
    data = vectors[rows].mean(axis=1, dtype=np.float32), experiment.targets[rows], groups[rows]
    if experiment.targets.ndim == 2:
        weight, bias, strength = fit_shared_head(*data, config["seed"])
    else:
        weight, bias, strength = fit_head(*data, len(task), config["sampler"] == "imbalanced", config["seed"])
    head.load_state_dict(dict(weight=torch.from_numpy(weight), bias=torch.from_numpy(bias)))
    say(f"fold {run.fold}: a logistic regression on frozen features, C = {strength:.2g}")
    return vectors


def test_features(oof, fold, tta, count):
    """Return the features of the `count` test images for the probe of a fold, float16 [M, V, D]; None where they aren't
    kept, or the fold is no probe."""
    config, weights = (oof.records[fold][key] for key in ("config", "weights"))
    if config.get("tune") != "probe":
        return None
    vectors = read_features(paths(oof.prepared, config, weights), tta)
    return None if vectors is None else vectors[-count:]


@torch.inference_mode()
def head_logits(head, vectors):
    """Return the plain view's logits and the mean of all views', float32 [n, K] each. vectors: float16 [n, V, D]."""
    head = head.cpu()
    plain, mean = vectors[:, 0].astype(np.float32), vectors.mean(axis=1, dtype=np.float32)
    return tuple(head(torch.from_numpy(points)).numpy() for points in (plain, mean))


def probe(run):
    """Fit the head, in place of a training. → as 01's train_fold, with one epoch as "best" and "last"."""
    images, targets, rows = run.experiment.images, run.experiment.targets, run.valid_rows
    state, began = dict(epoch=1, rows=[]) | epoch_start(), time.perf_counter()
    plain, logits = head_logits(run.classifier.head, start_head(run)[: len(images)])
    state.update(seconds=time.perf_counter() - began)
    train, valid = (scores(run, plain[part], targets[part]) for part in (run.train_rows, rows))
    note_epoch(run, f"fold {run.fold}", state, train, valid, 0.0)
    weights = {key: value.cpu() for key, value in run.classifier.state_dict().items()}
    kept = dict(epoch=1, scores=valid, logits=torch.from_numpy(plain[rows]), weights=weights)
    return dict(best=kept, last=kept), logits[rows], state["rows"]
