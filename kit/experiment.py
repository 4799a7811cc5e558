"""Experiments: the files of their folds, checks that the folds belong together, and the ledger.

Fold K is finished where foldK.pt, foldK.csv and foldK.json are there. foldK.json holds its settings (config), scores
and provenance: hashes of code and weights, precision, device, versions.
"""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

import common
from common import UserError, file_hash, listing, read_json, read_table, replacing, warn, write_csv, write_json
from kit.data.prepared import Prepared, read_prepared
from kit.locks import lock, locked, opened, remove_leftovers

FOLD_FILES = ("pt", "csv", "json")
MOST_COLUMNS = common.MANY  # classes whose logits are columns of foldK.csv
KINDS = ("best", "last", "views")  # of out-of-fold logits: best epoch, last epoch, kept weights in all views


def differences(earlier, config):
    """Return ['lr was 0.003 and is now 0.001', …] for the keys that both configs have."""
    keys = sorted(key for key in earlier.keys() & config.keys() - {"changed"} if earlier[key] != config[key])
    hashes = "folds_hash has changed: the folds are others"
    return [hashes if k == "folds_hash" else f"{k} was {earlier[k]!r} and is now {config[k]!r}" for k in keys]


def is_finished(folder, fold):
    """Return whether all files of a finished fold are there."""
    return all((folder / f"fold{fold}.{ending}").exists() for ending in FOLD_FILES)


def train_again(folder, fold):
    """Return the remedy for files of a fold that can't be used."""
    return f"train fold {fold} of {folder.name} again, with the flags it had and --overwrite"


def read_record(folder, fold):
    """Return the content of foldK.json."""
    return read_json(folder / f"fold{fold}.json", train_again(folder, fold))


def check_config(folder, config, defaults, replaced=()):
    """Raise UserError where a finished fold that isn't one of `replaced` has other settings than `config`.

    A setting that the fold's record lacks is younger than the fold, which therefore had its default."""
    for path in sorted(folder.glob("fold*.pt")):
        fold = path.stem.removeprefix("fold")
        if fold.isdecimal() and is_finished(folder, fold) and int(fold) not in replaced:
            changed = differences(defaults | read_record(folder, fold)["config"], config)
            if changed:
                was = f"fold {fold} of experiment {folder.name} was trained with other settings: {'; '.join(changed)}"
                raise UserError(f"{was}. Give another --exp, or remove {folder}")


@contextlib.contextmanager
def lock_fold(folder, fold):
    """Lock a fold for the block. Raises UserError where another process holds it."""
    with locked(folder / f".fold{fold}.lock", f"fold {fold} of {folder.name}"):
        remove_leftovers(folder, f"fold{fold}.*", f"fold{fold}_*")
        yield


@contextlib.contextmanager
def lock_config(folder, config, defaults, replaced):
    """Write `config` to config.json, and keep it so for the block. replaced: the folds that are trained again.

    Raises UserError where finished folds, or folds that another process trains at this moment, have other settings."""
    path = folder / "config.json"
    with opened(folder / ".lock") as file:
        alone = lock(file, wait=False)
        if not alone:
            lock(file, alone=False)  # after the process that may be writing config.json
        check_config(folder, config, defaults, replaced)
        earlier = read_json(path, "run this again") if path.exists() else {}
        changed = differences(defaults | earlier, config) if earlier else []
        if changed and not alone:
            was = f"{folder.name} is being trained with other settings: {'; '.join(changed)}"
            raise UserError(f"{was}. Give another --exp, or wait")
        if earlier != config and (alone or not earlier):
            write_json(path, config)
        lock(file, alone=False)
        yield


def logit_columns(kind, count):
    """Return the columns of foldK.csv with the logits of one of KINDS; none where foldK_logits.npy holds them."""
    return [f"{kind}_{k}" for k in range(count)] if count <= MOST_COLUMNS else []


def write_logits(folder, fold, table, kinds, count):
    """Write foldK.csv: `table`, and the logits: kinds, a dict of KINDS, [n, K] each. For many classes they get a file
    beside it, whose hash is in the table."""
    path, columns = folder / f"fold{fold}.csv", {}
    if count > MOST_COLUMNS:
        beside = path.with_name(f"fold{fold}_logits.npy")
        with replacing(beside) as temporary, open(temporary, "wb") as file:
            parts = [np.asarray(kinds[kind], np.float32) for kind in KINDS]
            shape = len(parts), *parts[0].shape
            np.lib.format.write_array_header_1_0(file, dict(descr="<f4", fortran_order=False, shape=shape))
            for part in parts:  # one after the other: together they would be in memory twice
                file.write(np.ascontiguousarray(part).data)
        columns["logits"] = file_hash(beside)[:16]
    for kind in KINDS:
        columns |= dict(zip(logit_columns(kind, count), np.asarray(kinds[kind]).T, strict=False))
    write_csv(path, pd.concat([table, pd.DataFrame(columns, index=table.index)], axis=1))


@dataclass
class Oof:
    """The out-of-fold predictions of an experiment: those of its finished folds, put together (thesis 4.2)."""

    exp: str  # the experiment's name
    folder: Path  # OUTPUT/EXP
    config: dict  # its settings
    prepared: Prepared
    folds: pd.DataFrame  # the N rows of folds.csv whose fold is finished
    targets: np.ndarray  # [N] or [N, K], as the task has them
    logits: "Logits"  # logits[kind], for one of KINDS: float [N, K] in the order of `folds`
    present: list[int]  # the finished folds
    missing: list[int]  # the others
    records: dict[int, dict]  # foldK.json of each finished fold

    @property
    def task(self):
        return self.prepared.task

    @cached_property
    def predictions(self):
        """What is submitted, out of fold: float [N, K], by the kept weights with the experiment's views."""
        return self.task.predictions(self.logits["views"])

    @property
    def folds_said(self):
        """'3 of 5 folds', or '' where all are finished."""
        return f"{len(self.present)} of {self.prepared.folds} folds" if self.missing else ""


def read_oof(output, exp):
    """Read the out-of-fold predictions of an experiment. → Oof. Raises UserError where no fold is finished, or a fold's
    files, settings or folds don't fit."""
    folder = common.experiment_folder(output, exp)
    prepared, folds = read_prepared(output)
    present = [k for k in range(prepared.folds) if is_finished(folder, k)]
    if not present:
        raise UserError(f"{folder} has no finished fold: train with 01_train_fold.py --exp {exp} --fold all")
    records = {k: read_record(folder, k) for k in present}
    config = records[present[0]]["config"]  # not config.json's: an --overwrite that failed may have changed that
    for k, record in records.items():
        path = folder / f"fold{k}.pt"
        if record["config"]["folds_hash"] != prepared.folds_hash:
            raise UserError(f"{path} was trained on other folds than the present ones: {train_again(folder, k)}")
        if changed := differences(config, record["config"]):
            was = f"{path} was trained with other settings than fold {present[0]}: {'; '.join(changed)}"
            raise UserError(f"{was}: {train_again(folder, k)}")
    warn_of_mixed_provenance(exp, records)
    parts = [read_fold(folder, k, len(prepared.task), folds[folds.fold == k]) for k in present]
    rows = np.concatenate([np.flatnonzero(folds.fold == k) for k in present])
    own = folds.iloc[np.sort(rows)].reset_index(drop=True)
    return Oof(
        exp=exp, folder=folder, config=config, prepared=prepared, folds=own, present=present, records=records,
        missing=[k for k in range(prepared.folds) if k not in present], targets=prepared.task.read_targets(own.target),
        logits=Logits(parts, np.argsort(np.argsort(rows))),
    )  # fmt: skip


class Logits:
    """Logits of all folds, put in order for one kind at a time: for many classes the parts are mapped, and all three
    in memory would fill it. parts: each fold's, float [KINDS, n, K]; rows: the row of each of their images."""

    def __init__(self, parts, rows):
        self.parts, self.rows = parts, rows

    def __getitem__(self, kind):
        logits, first = np.empty((len(self.rows), self.parts[0].shape[2]), self.parts[0].dtype), 0
        for part in self.parts:
            logits[self.rows[first : first + part.shape[1]]] = part[KINDS.index(kind)]
            first += part.shape[1]
        return logits


def read_fold(folder, fold, count, expected):
    """Return the logits of foldK.csv, float64 [KINDS, n, K] (for many classes float32, mapped), in the order of
    `expected`, that fold's rows of folds.csv. Raises UserError where they don't fit."""
    path, remedy = folder / f"fold{fold}.csv", train_again(folder, fold)
    table = read_table(path, remedy, dtype={"image_name": str, "target": expected.target.dtype, "logits": str})
    columns = [column for kind in KINDS for column in logit_columns(kind, count)]
    names = ["image_name", "target"]
    same_columns = [*table.columns] == [*names, *(columns or ["logits"])]
    if not same_columns or table[names].values.tolist() != expected[names].values.tolist():
        raise UserError(f"{path} doesn't hold the images of fold {fold}: {remedy}")
    if columns:
        numbers = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        logits = numbers.reshape(len(table), len(KINDS), count).transpose(1, 0, 2)
    else:
        logits = read_wide(path.with_name(f"fold{fold}_logits.npy"), table.logits, remedy)
    bad = table.image_name[~np.all([np.isfinite(kind).all(axis=1) for kind in logits], axis=0)]
    if len(bad):
        raise UserError(f"{path} has predictions that are no numbers ({listing(bad)}): {remedy}")
    return logits


def read_wide(path, hashes, remedy):
    """Return the logits in the file that `write_logits` put beside the table."""
    try:
        if not (hashes == file_hash(path)[:16]).all():
            raise ValueError("its hash differs")
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): {remedy}") from None


def warn_of_mixed_provenance(exp, records):
    """Warn where folds were trained with different code or weights. records: {fold: foldK.json}."""
    for what in ("code", "weights", "init"):
        folds_of = {}
        for fold, record in sorted(records.items()):
            folds_of.setdefault(str(record.get(what)), []).append(fold)
        if len(folds_of) > 1:
            parts = " | ".join(f"fold {', '.join(map(str, folds))}" for folds in folds_of.values())
            warn(f"the folds of {exp} are trained with different {what} ({parts}): --overwrite trains a fold again")


def note_in_ledger(output, experiment, cells):
    """Write `cells` (a dict of column: value) into the experiment's row of OUTPUT/experiments.csv.

    None leaves a cell as it is. Other rows and columns, the user's own included, stay. → the table, all strings."""
    path, remedy = output / "experiments.csv", "run python 02_oof.py for each experiment"
    with locked(output / ".experiments.lock", path, wait=True):
        table = read_table(path, remedy, dtype=str) if path.exists() else pd.DataFrame(columns=["experiment"])
        if "experiment" not in table or table.experiment.duplicated().any():
            raise UserError(f"{path} needs a column `experiment`, each name once: fix or remove it, then {remedy}")
        rows = {row["experiment"]: row for row in table.to_dict("records")}
        row = rows.setdefault(experiment, dict(experiment=experiment))
        for column, value in cells.items():
            if value is not None or column not in row:
                row[column] = "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)
        table = pd.DataFrame([*rows.values()]).fillna("")
        write_csv(path, table)
    return table
