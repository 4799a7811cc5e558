"""The prepared data and the scores on it: what 00 writes, 01 trains on, 02 scores and 03 predicts."""

import os

import numpy as np
import pandas as pd

from common import UserError, file_hash, listing, prepared_folder, read_json, write_csv

PREPARE = "run python 00_prepare.py"

# ---------------------------------------------------------------- prepared files


def read_table(path, remedy, dtype=None):
    """Reads a CSV of the kit's own; names and labels stay strings (`0001` is no 1, `NA` no missing value)."""
    dtype = dtype or {"image_name": str, "label": str}
    try:
        return pd.read_csv(path, dtype=dtype, keep_default_na=False, encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, then {remedy}") from None


def read_prepared(args):
    """→ (prepared.json as a dict, folds.csv as a table). Raises UserError where folds.csv was changed by hand."""
    folder = prepared_folder(args)
    prepared = read_json(folder / "prepared.json", PREPARE)
    folds = read_table(folder / "folds.csv", PREPARE)
    if file_hash(folder / "folds.csv") != prepared["folds_hash"]:
        raise UserError(
            f"{folder / 'folds.csv'} isn't the file that 00_prepare.py wrote: restore it, "
            "or run python 00_prepare.py --overwrite to make new folds"
        )
    return prepared, folds


def open_images(args, prepared, part, size, count):
    """The cached images of `part` ("train" or "test"): uint8 [count, size, size, 3] RGB, mapped, not read."""
    path = prepared_folder(args) / f"{part}_{size}.npy"
    if size not in prepared["sizes"]:
        raise UserError(f"{path.parent} holds images of {listing(prepared['sizes'])} px: {PREPARE} --size {size}")
    try:
        images = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {PREPARE} --size {size}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, then {PREPARE} --size {size}") from None
    if images.shape != (count, size, size, 3) or images.dtype != np.uint8:
        raise UserError(f"{path} holds {images.shape} {images.dtype}: remove it, then {PREPARE} --size {size}")
    return images


# ---------------------------------------------------------------- augmentation


class Augmentation:
    """The random transform of the training images (thesis 3.1.1): (uint8 [H, W, 3], seed) → the same shape.

    "d4" is the thesis': horizontal flip, quarter turns and vertical flip, each with probability one half. Geometry
    only, on bytes: resizing is done once, in 00_prepare.py, and normalisation on the device, in model.py.
    """

    def __init__(self, name):
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or the import asks the network for a newer version
        import albumentations as A  # imported here: it takes a second that 02_oof.py needn't wait for

        d4 = (A.HorizontalFlip(p=0.5), A.RandomRotate90(p=0.5), A.VerticalFlip(p=0.5))
        self.transforms = {"d4": d4, "none": ()}[name]

    def __call__(self, image, seed):
        # Seeded one by one: A.Compose gives all its transforms the same seed, and then both flips happen or neither,
        # so that no image is ever mirrored (albumentations 2.0.8).
        for k, transform in enumerate(self.transforms):
            transform.set_random_seed(seed + k)
            image = transform(image=image)["image"]
        return image


class Images:
    """A data set for torch's DataLoader: `images[rows[i]]`, augmented, with its target.

    An index is a pair (i, seed). The seed alone decides the augmentation of that draw, so the number of workers, their
    start-up and a resume in mid-epoch can't change it, and no two workers can replay the same random stream.
    """

    def __init__(self, images, rows, targets=None, transform=None):
        self.images, self.rows, self.transform = images, rows, transform
        self.targets = np.zeros(len(rows), np.int64) if targets is None else targets

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        i, seed = index
        image = self.images[self.rows[i]]
        if self.transform is not None:
            image = self.transform(image, seed)
        return np.array(image), self.targets[i]  # a contiguous copy: flips are views, the memory map is read-only


# ---------------------------------------------------------------- scores


def softmax(logits):
    """Probabilities in float64 from logits [N, K]; each row sums to 1."""
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def auc(targets, probabilities, weights=None):
    """Area under the ROC curve (thesis 2.2) of probabilities [N, K]; targets int [N], weights [N] of the rows or None.

    Two classes: that of the second class. More: the mean over classes of one against the rest. NaN where a class is
    missing (or alone), as in the first batches of an epoch.
    """
    classes = probabilities.shape[1]
    weights = np.ones(len(targets)) if weights is None else weights
    if len(np.unique(targets[weights > 0])) < classes:
        return float("nan")
    chosen = [1] if classes == 2 else range(classes)
    return float(np.mean([binary_auc(targets == c, probabilities[:, c], weights) for c in chosen]))


def binary_auc(positive, scores, weights):
    """scikit-learn's roc_auc_score, but fast enough for a bootstrap, and without the second that its import takes."""
    if not np.isfinite(scores).all():
        return float("nan")
    values = np.unique(scores, return_inverse=True)[1]
    above, below = np.bincount(values, weights * positive), np.bincount(values, weights * ~positive)
    lower = np.cumsum(below) - below / 2  # equal scores count one half
    return (above * lower).sum() / (above.sum() * below.sum())


def accuracy(targets, probabilities, weights=None):
    """Share of rows whose most probable class is the target."""
    return float(np.average(probabilities.argmax(axis=1) == targets, weights=weights))


# ---------------------------------------------------------------- out-of-fold predictions


def logit_columns(kind, classes):
    """The columns of foldK.csv that hold the logits of the `best` or the `last` epoch."""
    return [f"{kind}_{c}" for c in range(len(classes))]


def read_oof(args, folder):
    """Puts the folds' out-of-fold predictions together (thesis 4.2).

    → (config, prepared, folds table, {"best": logits, "last": logits}), the logits float64 [N, K] in folds.csv's order.
    Raises UserError where a fold is missing, was trained on other folds, or doesn't hold its fold's images.
    """
    train = f"python 01_train_fold.py --exp {folder.name} --fold"
    config = read_json(folder / "config.json", f"run {train} 0")
    prepared, folds = read_prepared(args)
    if config["folds_hash"] != prepared["folds_hash"]:
        raise UserError(
            f"{folder} was trained on other folds than those of {prepared_folder(args)}: "
            "prepare those again, or train under another --exp"
        )
    numbers = range(prepared["folds"])
    missing = [k for k in numbers if not all((folder / f"fold{k}{end}").exists() for end in (".pt", ".csv"))]
    if missing:
        raise UserError(f"{folder} has no finished fold {listing(missing)}: run {train} {missing[0]}")
    parts = []
    for k in numbers:
        path, expected = folder / f"fold{k}.csv", folds[folds.fold == k]
        part = read_table(path, f"run {train} {k} --overwrite")
        columns = [column for kind in ("best", "last") for column in logit_columns(kind, prepared["classes"])]
        if list(part.columns) != ["image_name", "target", *columns] or (
            part[["image_name", "target"]].values.tolist() != expected[["image_name", "target"]].values.tolist()
        ):
            raise UserError(f"{path} doesn't hold the images of fold {k}: run {train} {k} --overwrite")
        bad = part.loc[~np.isfinite(part[columns].to_numpy(np.float64)).all(axis=1), "image_name"]
        if len(bad):
            raise UserError(f"{path} has predictions that are no numbers ({listing(bad)}): run {train} {k} --overwrite")
        parts.append(part.set_index(expected.index))
    table = pd.concat(parts).sort_index()
    kinds = ("best", "last")
    return config, prepared, folds, {kind: table[logit_columns(kind, prepared["classes"])].to_numpy() for kind in kinds}


# ---------------------------------------------------------------- the ledger


def note_in_ledger(args, experiment, cells):
    """Writes `cells` (a dict of column: value) into the experiment's row of OUTPUT/experiments.csv, a new one at need.

    Where a value is None, and everywhere else, the file stays as it is, columns and remarks of the user's own included.
    → the table, all strings.
    """
    path, rows = args.output / "experiments.csv", []
    if path.exists():
        remedy = "run python 02_oof.py for each experiment"
        table = read_table(path, remedy, dtype=str)
        if "experiment" not in table or table.experiment.duplicated().any():
            raise UserError(f"{path} has no column `experiment` of different names: mend or remove it, then {remedy}")
        rows = table.to_dict("records")
    mine = next((row for row in rows if row["experiment"] == experiment), None)
    if mine is None:
        mine = dict(experiment=experiment)
        rows.append(mine)
    for column, value in cells.items():
        if value is not None or column not in mine:
            mine[column] = "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)
    table = pd.DataFrame(rows).fillna("")
    write_csv(path, table)
    return table
