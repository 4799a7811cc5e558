"""What do frozen features say? A logistic regression on them: --tune probe keeps it, --init probe starts from it.

prepared/features_MODEL_SIZE_HASH.npy: float16 [N + M, V, D], what the head sees of the training and then of the test
images, in the V views of the experiment (one where training turns nothing). All folds, seeds and experiments share it;
HASH is of all that decides it. Beside it a .part is one that was stopped, and goes on.
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
from common import RANK, UserError, prepared_folder, read_table, say
from kit.data.prepared import open_images, read_prepared
from kit.folds.split import deal
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
    """A Classifier's features in each view of TTAS[tta], the plain one first: uint8 [B, 3, S, S] → float [B, V, D]."""

    def __init__(self, classifier, tta):
        super().__init__()
        self.classifier = classifier
        self.transforms = getattr(TTAS[tta](classifier), "transforms", None)
        self.views = len(self.transforms or [0])

    def forward(self, images):
        views = [t.augment_image(images) for t in self.transforms] if self.transforms else [images]
        return torch.stack([self.classifier.features(view) for view in views], 1)


def paths(args, prepared, folds, config, weights):
    """→ {key of TTAS: the path of the features of these views}. weights: as foldK.json has them."""
    tests = read_table(prepared_folder(args) / "test.csv", f"{common.PREPARE} --overwrite").image_name
    record = {key: config[key] for key in ("model", "model_kwargs", "head", "norm", "size")}
    record |= dict(weights=weights, names=[*folds.image_name, *tests])
    record |= {part: prepared["made_from"][f"{part}_images"] for part in ("train", "test")}
    hashes = {tta: hashlib.sha256(json.dumps([record, tta], sort_keys=True).encode()).hexdigest()[:12] for tta in TTAS}
    name = f"features_{config['model']}_{config['size']}"
    return {tta: prepared_folder(args) / f"{name}_{digest}.npy" for tta, digest in hashes.items()}


def kept(paths, tta):
    """→ the features of the views `tta`, mapped, or None. The plain view is the first of all."""
    for path in paths.values() if tta == "none" else [paths[tta]]:
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there or damaged
            return np.load(path, mmap_mode="r")[:, : 1 if tta == "none" else None]
    return None


def features(run):
    """→ float16 [N + M, V, D], mapped: those kept earlier, else computed with the run's backbone and kept."""
    tta = run.config["tta"]
    where = paths(run.args, run.prepared, run.folds, run.config, run.makers["weights"])
    with contextlib.ExitStack() as held:
        if RANK == 0:
            held.enter_context(locked(where[tta].with_name(f".{where[tta].stem}.lock"), where[tta], wait=True))
        if distributed.from_first(kept(where, tta) is None)[0]:
            compute(run, where[tta])
            distributed.from_first(0)  # the others wait for the file
        return kept(where, tta)


def compute(run, path):
    """Writes the features of all images to `path`. Under torchrun the first process writes what all have computed."""
    count = len(read_table(prepared_folder(run.args) / "test.csv", common.PREPARE))
    tests = open_images(run.args, run.prepared, "test", run.config["size"], count)
    views = Views(run.classifier, run.config["tta"])
    shape = len(run.images) + count, views.views, run.classifier.head.in_features
    blocks = [(run.images, start) for start in range(0, len(run.images), BLOCK)]
    blocks += [(tests, start) for start in range(0, count, BLOCK)]
    with contextlib.ExitStack() as held:
        done, file = 0, None
        if RANK == 0:
            file = held.enter_context(writing(path.with_suffix(".part")))
            done = cut(file, shape, np.cumsum([min(BLOCK, len(images) - start) for images, start in blocks]))
        for number in range(distributed.from_first(done)[0], len(blocks)):
            images, start = blocks[number]
            rows = np.arange(start, min(start + BLOCK, len(images)))
            bar = f"features, part {number + 1} of {len(blocks)}"
            block = predict(views, images, rows, PREDICT_BATCH, run.device, run.amp, run.workers, bar)
            with np.errstate(over="ignore"):  # or NumPy's warning would stand before the line below
                block = block.astype(np.float16)
            if not np.isfinite(block).all():
                path.with_suffix(".part").unlink(missing_ok=True)
                what = "features are no numbers, or too large for fp16"
                raise UserError(f"{run.config['model']}: {what}: take another --model, or no probe")
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
    """Yields the file, open to go on at its end. What the disk refuses is a UserError."""
    try:
        with open(path, "ab") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): mend that or see --output") from error


def cut(file, shape, ends):
    """Cuts an .npy file of `shape`, float16, after the last whole block that it has; a new one gets its header.
    ends: the images after which blocks end. → the number of whole blocks."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="<f2", fortran_order=False, shape=shape))
    row, header = 2 * shape[1] * shape[2], header.getvalue()
    whole = np.searchsorted(ends, (file.seek(0, os.SEEK_END) - len(header)) // row, side="right").item()
    file.truncate(len(header) + ends[whole - 1] * row if whole else 0)
    if not whole:
        file.write(header)
    return whole


def fit_head(vectors, targets, groups, classes, balanced, seed):
    """A logistic regression on standardised vectors float [n, D], as a linear layer on the vectors themselves.
    → (weight float32 [K, D], bias float32 [K], C). C has the least log loss in folds that keep groups (int [n])
    together; balanced: each class weighs the same, as by the imbalance sampler."""
    from sklearn.linear_model import LogisticRegression  # takes a second, which other ways of training needn't wait for
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    points, options = scaler.transform(vectors), dict(class_weight="balanced" if balanced else None, max_iter=1000)
    strength = choose_strength(points, targets, deal(groups, targets, INNER, seed), options)
    model = LogisticRegression(C=strength, **options).fit(points, targets)
    pair = np.array([[-0.5], [0.5]]) if len(model.classes_) == 2 else 1  # of two classes there is one row
    weight, bias = np.zeros((classes, points.shape[1])), np.full(classes, model.intercept_.min() - 10)  # of none seen
    weight[model.classes_], bias[model.classes_] = pair * model.coef_, (pair * model.intercept_).ravel()
    weight /= scaler.scale_
    return weight.astype(np.float32), (bias - weight @ scaler.mean_).astype(np.float32), strength


def fit_shared_head(vectors, targets, groups, seed):
    """As fit_head for labels and numbers (float [n, K] from 0 to 1, NaN where one is missing): logistic regressions for
    all, of one C. → (weight float32 [K, D], bias float32 [K], C)."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    points, known = torch.from_numpy(scaler.transform(vectors)).float(), np.nan_to_num(targets) > 0.5
    wanted = torch.from_numpy(targets)
    inner, losses = deal(groups, known, INNER, seed), []
    for strength in STRENGTHS:
        found = []
        for fold in np.unique(inner):
            seen = torch.from_numpy(inner != fold)
            weight, bias = fit_linear(points[seen], wanted[seen], strength)
            found.append(binary_cross_entropy(points[~seen] @ weight.T + bias, wanted[~seen]).item())
        losses.append(np.mean(found))
        if losses[-1] > losses[-2:][0] and min(losses) not in losses[-2:]:
            break
    strength = STRENGTHS[np.argmin(losses)]
    weight, bias = (part.double().numpy() for part in fit_linear(points, wanted, strength))
    weight /= scaler.scale_
    return weight.astype(np.float32), (bias - weight @ scaler.mean_).astype(np.float32), strength


def fit_linear(points, targets, strength):
    """Minimises the summed binary cross entropy and half the squared weights over C. → (weight [K, D], bias [K])."""
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
    """→ the C with the least mean log loss over the folds (int [n]). Stops where two larger ones in turn are worse."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    parts = [(LogisticRegression(warm_start=True, **options), folds != k) for k in np.unique(folds)]
    parts = [(m, s) for m, s in parts if len(np.unique(targets[s])) > 1 and np.isin(targets[~s], targets[s]).any()]
    if not parts:  # too few groups to ask: scikit-learn's own
        return 1.0
    best, losses = STRENGTHS[0], []
    for strength in STRENGTHS:
        found = []
        for model, seen in parts:
            model.set_params(C=strength).fit(points[seen], targets[seen])
            asked = ~seen & np.isin(targets, model.classes_)
            found.append(log_loss(targets[asked], model.predict_proba(points[asked]), labels=model.classes_))
        losses.append(np.mean(found))
        if losses[-1] == min(losses):
            best = strength
        elif losses[-1] > losses[-2] and min(losses) not in losses[-2:]:
            break
    return best


def start_head(run):
    """Puts the logistic regression in place of the run's head. → the features of `features`."""
    if not isinstance(run.classifier.head, nn.Linear):
        raise UserError(f"--head {run.config['head']} is no single layer that a probe could fit: give --head fresh")
    vectors, rows = features(run), run.train_rows
    data = vectors[rows].mean(axis=1, dtype=np.float32), run.targets[rows], run.folds.group.to_numpy()[rows]
    if run.targets.ndim == 2:
        weight, bias, strength = fit_shared_head(*data, run.config["seed"])
    else:
        balanced = run.config["sampler"] == "imbalanced"
        weight, bias, strength = fit_head(*data, len(run.prepared["classes"]), balanced, run.config["seed"])
    run.classifier.head.load_state_dict(dict(weight=torch.from_numpy(weight), bias=torch.from_numpy(bias)))
    say(f"fold {run.fold}: a logistic regression on frozen features, C = {strength:.2g}")
    return vectors


def test_features(args, oof, fold, tta, count):
    """→ float16 [count, V, D], what the probe of a fold needs of the test images, where it is kept; else None."""
    config, weights = (oof.records[fold][key] for key in ("config", "weights"))
    if config.get("tune") != "probe":
        return None
    vectors = kept(paths(args, oof.prepared, read_prepared(args)[1], config, weights), tta)
    return None if vectors is None else vectors[-count:]


@torch.inference_mode()
def head_logits(head, vectors):
    """→ (logits of the plain view, mean logits of all views), float32 [n, K] each, of features float16 [n, V, D]."""
    head = head.cpu()
    plain, mean = vectors[:, 0].astype(np.float32), vectors.mean(axis=1, dtype=np.float32)
    return tuple(head(torch.from_numpy(points)).numpy() for points in (plain, mean))


def probe(run):
    """Fits the head, in place of training. → what 01's train_and_predict returns: the only epoch as {"best", "last"},
    logits float32 [n, K] of the held-out images in all views, the rows of foldK_epochs.csv."""
    state, began = dict(epoch=1, rows=[]) | epoch_start(), time.perf_counter()
    plain, logits = head_logits(run.classifier.head, start_head(run)[: len(run.images)])
    state.update(seconds=time.perf_counter() - began)
    train, valid = (scores(run, plain[rows], run.targets[rows]) for rows in (run.train_rows, run.valid_rows))
    note_epoch(run, state, train, valid, 0.0)
    kept = dict(epoch=1, scores=valid, logits=torch.from_numpy(plain[run.valid_rows]))
    kept |= dict(weights={key: value.cpu() for key, value in run.classifier.state_dict().items()})
    return dict(best=kept, last=kept), logits[run.valid_rows], state["rows"]
