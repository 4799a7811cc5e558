"""What do frozen features say? A logistic regression on them: --tune probe keeps it, --init probe starts from it.

prepared/features_MODEL_SIZE.npy: float16 [N + M, V, D], what the head sees of the training and then of the test images,
in the V views of the experiment (one where training turns nothing). All folds, seeds and experiments share it. A .json
beside it says what made it.
"""

import contextlib
import hashlib
import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import nn

import common
from common import RANK, UserError, prepared_folder, read_table, replacing, say, write_json
from kit import distributed
from kit.folds import deal
from kit.locks import locked
from kit.model import PREDICT_BATCH, TTAS, predict
from kit.resume import epoch_start
from kit.watch import note_epoch, scores

BLOCK = 4096  # images whose features are in memory at a time
STRENGTHS = 10.0 ** np.arange(-4, 1.5, 0.5)  # C of the logistic regression
INNER = 4  # folds among the training images, by which C is chosen


class Views(nn.Module):
    """A Classifier's features in each view of TTAS[tta], the plain one first: uint8 [B, 3, S, S] → float [B, V, D]."""

    def __init__(self, classifier, tta):
        super().__init__()
        self.classifier = classifier
        self.transforms = getattr(TTAS[tta](classifier), "transforms", None)

    def forward(self, images):
        views = [t.augment_image(images) for t in self.transforms] if self.transforms else [images]
        return torch.stack([self.classifier.features(view) for view in views], 1)


def path_and_record(args, prepared, folds, config, weights):
    """→ (the path of the features, what they are of). weights: as foldK.json has them."""
    tests = read_table(prepared_folder(args) / "test.csv", f"{common.PREPARE} --overwrite").image_name
    names = hashlib.sha256("\n".join([*folds.image_name, *tests]).encode()).hexdigest()
    record = {key: config[key] for key in ("model", "model_kwargs", "head", "norm", "size", "cache_size", "tta")}
    record |= dict(weights=weights, names=names)
    record |= {part: prepared["made_from"][f"{part}_images"] for part in ("train", "test")}
    name = f"features_{config['model']}_{config['size']}.npy"
    return prepared_folder(args) / name, record


def kept(path, record):
    """→ the features in `path`, mapped, if they are those of `record`; else None. The plain view comes first."""
    with contextlib.suppress(OSError, ValueError, EOFError, KeyError, TypeError, UserError):  # lost or damaged: anew
        there = common.read_json(path.with_suffix(".json"), "run this again")
        if there == record | dict(tta=there["tta"]) and record["tta"] in ("none", there["tta"]):
            return np.load(path, mmap_mode="r")[:, : 1 if record["tta"] == "none" else None]
    return None


def features(run):
    """→ float16 [N + M, V, D], mapped: those kept earlier, else computed with the run's backbone and kept."""
    path, record = path_and_record(run.args, run.prepared, run.folds, run.config, run.makers["weights"])
    with contextlib.ExitStack() as held:
        if RANK == 0:
            held.enter_context(locked(path.with_name(".features.lock"), path, wait=True))
        if distributed.from_first(kept(path, record) is None)[0]:
            path.with_suffix(".json").unlink(missing_ok=True)
            compute(run, path)
            if RANK == 0:
                write_json(path.with_suffix(".json"), record)
            distributed.from_first(0)  # the others wait for the file
        return kept(path, record)


def compute(run, path):
    """Writes the features of all images to `path`. Under torchrun the first process writes what all have computed."""
    config, count = run.config, len(read_table(prepared_folder(run.args) / "test.csv", common.PREPARE))
    tests = common.open_images(run.args, run.prepared, "test", run.images.shape[1], count)
    views, total = Views(run.classifier, config["tta"]), len(run.images) + count
    with contextlib.ExitStack() as held:
        if RANK == 0:
            file = held.enter_context(open(held.enter_context(replacing(path)), "wb"))
        for part, images in (("train", run.images), ("test", tests)):
            for start in range(0, len(images), BLOCK):
                rows = np.arange(start, min(start + BLOCK, len(images)))
                bar = f"features of {part} images {start} to {rows[-1]}"
                block = predict(views, images, rows, PREDICT_BATCH, run.device, run.amp, run.workers, bar)
                with np.errstate(over="ignore"):  # or NumPy's warning would stand before the line below
                    block = block.astype(np.float16)
                if not np.isfinite(block).all():
                    what = "features are no numbers, or too large for fp16"
                    raise UserError(f"{config['model']}: {what}: take another --model, or no probe")
                if RANK == 0 and file.tell() == 0:
                    shape = total, *block.shape[1:]
                    np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=shape))
                if RANK == 0:
                    file.write(block.tobytes())
    say(f"features of {total} images, {block.shape[1]} views, {block.shape[2]} numbers each → {path}")


def fit_head(vectors, targets, groups, classes, balanced, seed):
    """A logistic regression on standardised vectors float [n, D], as a linear layer on the vectors themselves.
    → (weight float32 [K, D], bias float32 [K], C). C has the least log loss in folds that keep groups (int [n])
    together; balanced: each class weighs the same, as by the imbalance sampler."""
    scaler = StandardScaler().fit(vectors)
    points, options = scaler.transform(vectors), dict(class_weight="balanced" if balanced else None, max_iter=1000)
    strength = choose_strength(points, targets, deal(groups, targets, INNER, seed), options)
    model = LogisticRegression(C=strength, **options).fit(points, targets)
    pair = np.array([[-0.5], [0.5]]) if len(model.classes_) == 2 else 1  # of two classes there is one row
    weight, bias = np.zeros((classes, points.shape[1])), np.full(classes, model.intercept_.min() - 10)  # of none seen
    weight[model.classes_], bias[model.classes_] = pair * model.coef_, (pair * model.intercept_).ravel()
    weight /= scaler.scale_
    return weight.astype(np.float32), (bias - weight @ scaler.mean_).astype(np.float32), strength


def choose_strength(points, targets, folds, options):
    """→ the C with the least mean log loss over the folds (int [n]). Stops where two larger ones in turn are worse."""
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
    weight, bias, strength = fit_head(
        vectors[rows].mean(axis=1, dtype=np.float32), run.targets[rows], run.folds.group.to_numpy()[rows],
        len(run.prepared["classes"]), run.config["sampler"] == "imbalanced", run.config["seed"],
    )  # fmt: skip
    run.classifier.head.load_state_dict(dict(weight=torch.from_numpy(weight), bias=torch.from_numpy(bias)))
    say(f"fold {run.fold}: a logistic regression on frozen features, C = {strength:.2g}")
    return vectors


def test_features(args, oof, fold, tta, count):
    """→ float16 [count, V, D], what the probe of a fold needs of the test images, where it is kept; else None."""
    config, weights = (oof.records[fold][key] for key in ("config", "weights"))
    if config.get("tune") != "probe":
        return None
    path, wanted = path_and_record(args, oof.prepared, common.read_prepared(args)[1], config, weights)
    vectors = kept(path, wanted | dict(tta=tta))
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
    state.update(step=len(run.train_rows) // run.config["batch_size"], seconds=time.perf_counter() - began)
    train, valid = (scores(run, plain[rows], run.targets[rows]) for rows in (run.train_rows, run.valid_rows))
    note_epoch(run, state, train, valid, 0.0)
    kept = dict(epoch=1, scores=valid, logits=torch.from_numpy(plain[run.valid_rows]))
    kept |= dict(weights={key: value.cpu() for key, value in run.classifier.state_dict().items()})
    return dict(best=kept, last=kept), logits[run.valid_rows], state["rows"]
