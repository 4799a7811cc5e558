"""Tasks: one class an image, a set of labels, or numbers; everything that depends on which of them it is.

    task      targets                                     predictions float [N, K]
    Classes   int64 [N]                                   softmax: a probability for each class
    Labels    float32 [N, K], 0 or 1                      sigmoid: a probability for each label
    Numbers   float32 [N, K], NaN where one is missing    sigmoid, scaled to the range of the training targets

prepared.json and foldK.json hold a task as `task`, `classes` (the K names) and, for numbers, `ranges`. In folds.csv the
column `target` is a class's number, the labels' numbers or the numbers themselves, separated by blanks.
Shapes: N images; K classes, labels or numbers.
"""

from dataclasses import dataclass
from typing import ClassVar

from common import softmax

import numpy as np
import pandas as pd
from scipy import special

from kit.score.metrics import METRICS, Array

QUANTILES = 10  # strata of numbers
STEEPNESS = 5  # of the softmax that makes probabilities of a ridge regression's outputs
TINY = 1e-15  # the least probability whose logarithm is taken


@dataclass
class Task:
    """What is predicted for each image."""

    names: list[str]  # of the K classes, labels or numbers
    ranges: list[list[float]] | None = None  # least and largest training target of each number; None for other tasks

    key: ClassVar[str]  # in prepared.json, and in registries whose entries suit some tasks
    noun: ClassVar[str]  # what one of the K is called
    value: ClassVar[str] = "probability"  # what one prediction is
    loss: ClassVar[str]  # the key of LOSSES that replaces one for another task
    sampler: ClassVar[str | None] = "shuffle"  # the key of SAMPLERS; None: as given
    extra_metrics: ClassVar[tuple[str, ...]] = ()  # keys of METRICS that are shown beside the competition's own
    splits_loss: ClassVar[bool] = False  # the loss of all images is the mean of their losses
    rows_sum_to_1: ClassVar[bool] = False
    can_rank: ClassVar[bool] = True  # ranks are as good as predictions
    strata_are_classes: ClassVar[bool] = True  # each must be in the training images of every fold
    counted: ClassVar[bool] = True  # `by_fold` counts images
    column_value: ClassVar[str] = "probability"  # a key of SUBMISSIONS: several value columns in a submission
    single_value: ClassVar[str | None] = None  # the same, for one value column; None: its cells decide
    right_or_wrong: ClassVar[bool] = False  # what a prediction of one image is

    def __len__(self) -> int:
        return len(self.names)

    def as_json(self) -> dict:
        return dict(task=self.key, classes=self.names) | (dict(ranges=self.ranges) if self.ranges else {})

    @property
    def is_binary(self) -> bool:
        return self.right_or_wrong and len(self) == 2

    def fitted(self, targets: Array) -> "Task":
        """Return the task for these training targets: numbers get their ranges."""
        return self

    def parse(self, cells, separator: str = " ") -> Array:
        """Return the targets that cells, labels separated by `separator`, name. Raises KeyError or ValueError."""
        return self.read_targets(cells)

    def to_01(self, targets: Array) -> Array:
        """Return targets as losses take them: numbers scaled from 0 to 1 by the training range, others as they are."""
        return targets

    def from_01(self, values: Array) -> Array:
        """Return the inverse of `to_01`, of targets or of predictions."""
        return values

    def perfect(self, targets: Array) -> tuple[Array, Array]:
        """Return (targets, predictions float64) that a metric scores best; one image of each class saves memory."""
        return targets, np.asarray(targets, np.float64)

    def strata(self, targets: Array) -> Array:
        """Return what every fold gets its share of: int [N], or bool [N, K] for labels."""
        return targets

    def by_fold(self, targets: Array, folds: Array) -> pd.DataFrame:
        """Return images of each class or label, or means of each number, with a column for each fold."""
        summary = np.nansum if self.counted else np.nanmean
        columns = {k: summary(targets[folds == k], axis=0) for k in np.unique(folds)}
        return pd.DataFrame(columns, index=self.names).rename_axis(columns="fold")

    def wrong(self, targets: Array, predictions: Array) -> Array:
        """Return the rows, int, that can be called mistakes: for classes the wrong ones, otherwise all."""
        return np.arange(len(targets))

    def goodness(self, targets: Array, predictions: Array) -> tuple[Array, str]:
        """Return (how good each image's prediction is, float [N], larger is better; what that is)."""
        return -self.losses(targets, predictions), "minus the loss of an image"

    def label_problems(self, targets: Array, predictions: Array) -> list:
        """Return the single-class problems in which label errors are searched: (k or None, int [N], float [N, ·])."""
        return []

    def worst_output(self, targets: Array, predictions: Array) -> Array:
        """Return the output, int [N], that Grad-CAM explains: the predicted class, or the one most wrong."""
        distance = np.abs(self.to_01(targets) - self.to_01(predictions))
        return np.nan_to_num(distance).argmax(axis=1)

    def table_of_each(self, targets: Array, predictions: Array, most: int = 20) -> pd.DataFrame | None:
        """Return a row for each label or number, or for the commonest of many; None for classes."""
        rows = {}
        for k, name in enumerate(self.names):
            known = np.isfinite(targets[:, k])
            rows[name] = self._row(targets[known, k].astype(np.float64), predictions[known, k])
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(self.noun)
        return table.sort_values("images", ascending=False, kind="stable")[:most] if len(table) > most else table

    def regression_targets(self, targets: Array) -> tuple[Array, Array]:
        """Return (what a ridge regression learns, float32 [M, J]; which of the M each image has, int [N])."""
        return targets, np.arange(len(targets))

    def from_regression(self, outputs: Array) -> Array:
        """Return predictions from a ridge regression's outputs, float [N, J]."""
        return outputs


class Classes(Task):
    """One class of several for each image. The positive class is the second of two."""

    key, noun, loss, sampler = "classes", "class", "ce", None
    extra_metrics = ("accuracy",)
    splits_loss = rows_sum_to_1 = right_or_wrong = True

    def default_metric(self) -> str:
        return "auc" if self.is_binary else "accuracy"

    def read_targets(self, cells) -> Array:
        """Return the targets in the column `target` of folds.csv, or in a part of it."""
        return np.asarray(cells, np.int64)

    def write_targets(self, targets: Array) -> list:
        """Return the column `target` of folds.csv: whole numbers, or strings."""
        return [int(target) for target in targets]

    def parse(self, cells, separator: str = " ") -> Array:
        number_of = {name: k for k, name in enumerate(self.names)}
        return np.array([number_of[cell] for cell in cells])

    def predictions(self, logits: Array) -> Array:
        """Return predictions float [N, K], numbers in their own units, from logits [N, K]."""
        return softmax(logits)

    def perfect(self, targets: Array) -> tuple[Array, Array]:
        classes = np.unique(targets)
        return classes, np.eye(len(self))[classes]

    def losses(self, targets: Array, predictions: Array) -> Array:
        """Return how wrong each image's prediction is, float [N]: the log loss of its class, the mean log loss of its
        labels, or the mean distance of its numbers on a scale from 0 to 1 (0 where all are missing)."""
        return -np.log(np.clip(predictions[np.arange(len(targets)), targets], TINY, 1))

    def goodness(self, targets: Array, predictions: Array) -> tuple[Array, str]:
        return np.exp(-self.losses(targets, predictions)), "probability of the image's label"

    def wrong(self, targets: Array, predictions: Array) -> Array:
        return np.flatnonzero(predictions.argmax(axis=1) != targets)

    def label_problems(self, targets: Array, predictions: Array) -> list:
        return [(None, targets, predictions)]

    def worst_output(self, targets: Array, predictions: Array) -> Array:
        return predictions.argmax(axis=1)

    def table_of_each(self, targets: Array, predictions: Array, most: int = 20) -> None:
        return None

    def right_answer(self, target, label: str) -> str:
        """Return a line on what is right for an image; label: its cell in folds.csv."""
        return f"label {label}"

    def predicted(self, prediction: Array) -> str:
        """Return what was predicted for an image, float [K], in a line."""
        return f"{self.names[prediction.argmax()]}: {prediction.max():.3f}"

    def examples(self, targets: Array, most: int = 10) -> dict[str, Array]:
        """Return {title: rows} that a picture should show: some classes or labels, or small to large numbers."""
        return {f"label {name}": rows for name, rows in [*self.members(targets).items()][:most]}

    def members(self, targets: Array) -> dict[str, Array]:
        """Return {name: rows} of every class or label, or of ranges of the first number."""
        return {name: np.flatnonzero(targets == k) for k, name in enumerate(self.names)}

    def by_fold(self, targets: Array, folds: Array) -> pd.DataFrame:
        names = pd.Categorical.from_codes(targets, self.names)
        return pd.crosstab(pd.Series(names, name="label"), pd.Series(folds, name="fold"), dropna=False)

    def regression_targets(self, targets: Array) -> tuple[Array, Array]:
        rows = np.unique(targets, return_inverse=True)[1]
        return np.eye(rows.max() + 1, dtype=np.float32), rows

    def from_regression(self, outputs: Array) -> Array:
        return softmax(outputs * np.float32(STEEPNESS))


class Labels(Task):
    """Any number of labels for each image."""

    key, noun, loss, single_value = "labels", "label", "bce", "set"

    def default_metric(self) -> str:
        return "column-auc"

    def read_targets(self, cells) -> Array:
        targets = np.zeros((len(cells), len(self)), np.float32)
        for row, cell in zip(targets, cells, strict=True):
            row[[int(k) for k in str(cell).split()]] = 1
        return targets

    def write_targets(self, targets: Array) -> list:
        return [" ".join(map(str, np.flatnonzero(row))) for row in targets]

    def parse(self, cells, separator: str = " ") -> Array:
        number = {name: str(k) for k, name in enumerate(self.names)}
        return self.read_targets([" ".join(number[name] for name in cell.split(separator) if name) for cell in cells])

    def predictions(self, logits: Array) -> Array:
        return special.expit(np.asarray(logits, np.float64))

    def strata(self, targets: Array) -> Array:
        return targets > 0

    def losses(self, targets: Array, predictions: Array) -> Array:
        right = np.where(targets > 0.5, predictions, 1 - predictions)
        return -np.log(np.clip(right, TINY, 1)).mean(axis=1)

    def label_problems(self, targets: Array, predictions: Array) -> list:
        columns = enumerate(zip(targets.T, predictions.T, strict=True))
        return [(k, (target > 0).astype(int), np.stack([1 - p, p], axis=1)) for k, (target, p) in columns]

    def right_answer(self, target, label: str) -> str:
        return f"labels {label or 'none'}"

    def predicted(self, prediction: Array) -> str:
        return ", ".join(f"{self.names[k]} {prediction[k]:.2f}" for k in np.argsort(-prediction)[:3])

    def examples(self, targets: Array, most: int = 10) -> dict[str, Array]:
        commonest = np.argsort(-targets.sum(axis=0))[:most]
        return {f"label {self.names[k]}": np.flatnonzero(targets[:, k]) for k in commonest}

    def members(self, targets: Array) -> dict[str, Array]:
        groups = [*targets.T, targets.sum(axis=1) == 0]
        return dict(zip([*self.names, "none of them"], map(np.flatnonzero, groups), strict=True))

    def from_regression(self, outputs: Array) -> Array:
        return np.clip(outputs, 0, 1)

    def _row(self, target: Array, predicted: Array) -> dict:
        return dict(images=int(target.sum()), AUC=METRICS["column-auc"].score(target[:, None], predicted[:, None]))


class Numbers(Task):
    """One number or several for each image."""

    key, noun, value, loss = "numbers", "number", "prediction", "bce"
    column_value = single_value = "number"
    can_rank = strata_are_classes = counted = False

    def default_metric(self) -> str:
        return "rmse" if len(self) == 1 else "mcrmse"

    def fitted(self, targets: Array) -> "Numbers":
        bounds = np.stack([np.nanmin(targets, axis=0), np.nanmax(targets, axis=0)], axis=1)
        return Numbers(self.names, bounds.astype(float).tolist())

    def read_targets(self, cells) -> Array:
        return np.array([str(cell).split(" ") for cell in cells], np.float32).reshape(-1, len(self))

    def write_targets(self, targets: Array) -> list:
        return [" ".join(f"{value:.9g}" for value in row) for row in targets]

    def to_01(self, targets: Array) -> Array:
        low, high = np.array(self.ranges, np.float32).T
        return (targets - low) / np.where(high > low, high - low, 1)

    def from_01(self, values: Array) -> Array:
        low, high = np.array(self.ranges, np.float64).T
        return low + values * (high - low)

    def predictions(self, logits: Array) -> Array:
        return self.from_01(special.expit(np.asarray(logits, np.float64)))

    def strata(self, targets: Array) -> Array:
        """Return quantiles; those of the mean standard score where there are several numbers."""
        table = pd.DataFrame(targets)
        score = ((table - table.mean()) / table.std().replace(0, 1)).mean(axis=1).fillna(0)
        count = min(QUANTILES, max(1, len(score) // 10))
        return pd.qcut(score.rank(method="first"), count, labels=False).to_numpy(np.int64)

    def losses(self, targets: Array, predictions: Array) -> Array:
        distance = np.abs(self.to_01(targets) - self.to_01(predictions))
        return np.nansum(distance, axis=1) / np.maximum(1, np.isfinite(distance).sum(axis=1))

    def right_answer(self, target, label: str) -> str:
        return f"target {self.predicted(target)}"

    def predicted(self, prediction: Array) -> str:
        return " ".join(f"{value:.4g}" for value in prediction[:5])

    def members(self, targets: Array) -> dict[str, Array]:
        order, parts = np.argsort(targets[:, 0], kind="stable"), {}
        for rows in np.array_split(order[np.isfinite(targets[order, 0])], 5):
            if len(rows):
                title = f"{self.names[0]} from {targets[rows[0], 0]:.4g} to {targets[rows[-1], 0]:.4g}"
                parts[title] = np.concatenate([parts.get(title, rows[:0]), rows])  # two may hold one number alone
        return parts

    examples = members

    def regression_targets(self, targets: Array) -> tuple[Array, Array]:
        return super().regression_targets(np.where(np.isfinite(targets), targets, np.nanmean(targets, axis=0)))

    def _row(self, target: Array, predicted: Array) -> dict:
        varied = len(target) > 1 and target.std() > 0 and predicted.std() > 0
        correlation = np.corrcoef(target, predicted)[0, 1] if varied else np.nan
        error = np.sqrt(np.mean((target - predicted) ** 2))
        return dict(images=len(target), mean=target.mean(), predicted=predicted.mean(), r=correlation, RMSE=error)


TASKS: dict[str, type[Task]] = {task.key: task for task in (Classes, Labels, Numbers)}


def task_from_json(content: dict) -> Task:
    """Return the task that prepared.json, foldK.json or foldK.pt holds."""
    return TASKS[content["task"]](content["classes"], content.get("ranges"))
