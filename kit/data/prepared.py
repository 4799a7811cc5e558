"""Prepared data: the flags of 00_prepare.py, what it decided, and the cached images."""

from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path

from common import AGAIN, PREPARE, UserError, file_hash, listing, prepared_folder, read_json, read_table, write_json

import numpy as np
import pandas as pd

from kit.score.tasks import Task, task_from_json

# What 03 needs, beside the task, for other test images; and the flags in `reading`, if they aren't the defaults
KEYS_FOR_TEST = "metric submission per_id reading depth".split()
FLAGS_FOR_TEST = "bands channels encoding image_column separator submit_columns submit_header target_column".split()
NO_GROUPS = "auto", "copies", "none"  # kinds of --groups that name no column and no file


@dataclass
class Flags:
    """The flags by which 00_prepare.py reads the competition and makes folds. Names of files are relative to `input`;
    None stands for the usual ones."""

    input: Path = Path("input")
    output: Path = Path("output")  # archives that can't be read in place are unpacked below it
    train_csv: list[str] | None = None
    train_images: list[str] | None = None
    test_images: list[str] | None = None
    sample_submit: str | None = None
    test_csv: str | None = None
    join: str | None = None  # a table whose columns are added to the training table's
    train_header: str = "auto"  # whether the training table has a header: auto, yes or no
    encoding: str | None = None  # of tables that aren't UTF-8; None: by their words
    bands: list[int] | None = None  # of a TIFF or an array that are red, green and blue, counted from 1
    channels: list[str] | None = None  # ends of the names of an image's three files
    image_column: str | None = None  # the images' names; None: found by the images
    label_column: list[str] | None = None  # the labels; None: by the sample
    label_form: str = "auto"  # a key of LABEL_FORMS
    label_pattern: str | None = None  # a regular expression that finds the class in an image's path
    separator: str = " "  # between the labels of a list
    target_column: str | None = None  # of tables with a row for each image and target: the targets' names, or END
    drop_unlabelled: bool = False  # whether rows without a label are left out
    metric: str = "auto"  # a key of METRICS
    submit_header: str = "auto"  # whether the sample has a header: auto, yes or no
    submit_value: str = "auto"  # what its cells hold: a key of SUBMISSIONS
    submit_columns: list[str] | None = None  # value columns of a sample that has none, or no header
    class_values: list[str] | None = None  # LABEL=VALUE: what labels of the training data are called instead
    positive: list[str] | None = None  # the class whose probability is submitted; of more than two, several add up
    per_id: str = "mean"  # mean or max of the predictions of an id's several images
    limit: int | None = None  # about this many training images, and this many of the sample's first ids
    folds: int = 5  # how many
    seed: int = 777
    groups: str = "auto"  # auto, copies, none, a column of the training table, or a CSV
    group_pattern: str | None = None  # a regular expression; joined with `groups`
    embed: str | None = None  # a timm model whose features are compared too
    weights: str | None = None  # of that model

    @property
    def searched(self) -> bool:
        """Whether copies are searched among the images, to be kept together."""
        return self.groups != "none"

    @property
    def gives_groups(self) -> bool:
        """Whether the user gives groups, with which copies are joined; folds aren't matched to the test set then."""
        return bool(self.group_pattern) or self.groups not in NO_GROUPS


@dataclass
class Prepared:
    """What 00_prepare.py decided, as OUTPUT/prepared/prepared.json holds it.

    The fields down to `reading` decide the folds: a later run must agree with them. The others follow from the images.
    """

    folder: Path  # OUTPUT/prepared, or where it is being made; not in the file
    made_from: dict  # hashes: of the tables, of the training images, of the test images
    task: Task  # Classes, Labels or Numbers, with the K names in their final order
    metric: str  # a key of METRICS
    folds: int  # how many
    seed: int
    groups: str  # --groups or --group-pattern, with the model of --embed
    submission: dict  # what the sample submission asks for: kit/submit/sample_submission.py
    limit: int | None = None  # --limit, for a quick look
    per_id: str | None = None  # "mean" or "max" where an id of the sample has several images
    reading: dict = field(default_factory=dict)  # flags that other test images need too

    sizes: list[int] = field(default_factory=list)  # px of the cached images
    depth: int | None = None  # bits by which all 16-bit images are scaled; None where all have 8
    folds_hash: str = ""  # SHA-256 of folds.csv
    duplicates: dict | None = None  # counts; None where no duplicates were searched
    candidates: list | None = None  # folds compared with the test set; None where there were none
    shift: dict | None = None  # adversarial validation
    evidence: list = field(default_factory=list)  # how tables and files were read: Decisions of kit/data/reading.py
    flags: dict = field(default_factory=dict)  # those of 00 that weren't the defaults
    unreadable: list[str] = field(default_factory=list)  # names of images that are grey, with the reasons

    def as_json(self) -> dict:
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("folder", "task")}
        return self.task.as_json() | content

    def decisions(self) -> dict:
        """Return what a later run of 00 must agree with, as prepared.json holds it."""
        return dict(takewhile(lambda item: item[0] != "sizes", self.as_json().items()))

    def for_test(self) -> dict:
        """Return what foldK.pt and foldK.json keep, so that 03 can predict other test images."""
        return self.task.as_json() | {key: getattr(self, key) for key in KEYS_FOR_TEST}

    def write(self) -> None:
        write_json(self.folder / "prepared.json", self.as_json())

    def open_images(self, part: str, size: int, count: int) -> np.ndarray:
        """Return the cached images of `part` ("train" or "test"): uint8 [count, size, size, 3] RGB, memory-mapped.
        Raises UserError where they aren't there, or are damaged."""
        path = self.folder / f"{part}_{size}.npy"
        if size not in self.sizes:
            raise UserError(f"{self.folder} holds images of {listing(self.sizes)} px: {AGAIN} --size {size}")
        try:
            images = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {AGAIN} --size {size}") from None
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, then {AGAIN} --size {size}") from None
        if images.shape != (count, size, size, 3) or images.dtype != np.uint8:
            raise UserError(f"{path} holds {images.shape} {images.dtype}: remove it, then {AGAIN} --size {size}")
        return images


def read_prepared(output: Path) -> tuple[Prepared, pd.DataFrame]:
    """Return (what OUTPUT/prepared/prepared.json holds, folds.csv). Raises UserError where folds.csv was changed."""
    folder = prepared_folder(output)
    content = read_json(folder / "prepared.json", PREPARE)
    try:
        values = {f.name: content[f.name] for f in fields(Prepared) if f.name in {*content} - {"task"}}
        prepared = Prepared(folder=folder, task=task_from_json(content), **values)
    except (KeyError, TypeError):
        other = "is of another version of the kit, or damaged"
        raise UserError(f"{folder}/prepared.json {other}: {AGAIN} --overwrite, and train again") from None
    folds = read_table(folder / "folds.csv", PREPARE)
    if file_hash(folder / "folds.csv") != prepared.folds_hash:
        raise UserError(f"{folder}/folds.csv was changed since: restore it, or {AGAIN} --overwrite for new folds")
    return prepared, folds
