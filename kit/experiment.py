"""Experiments: the files of their folds, checks that the folds belong together, and the ledger.

Fold K is finished where foldK.pt, foldK.csv and foldK.json are there. foldK.json holds its settings (config), scores
and provenance: hashes of code and weights, precision, device, versions.
"""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import common
from common import UserError, file_hash, listing, read_json, read_table, replacing, warn, write_csv, write_json

import numpy as np
import pandas as pd

from kit.data.prepared import Prepared, read_prepared
from kit.locks import lock, locked, opened, remove_leftovers

FOLD_FILES = ("pt", "csv", "json")
MOST_COLUMNS = common.MANY  # classes whose logits are columns of foldK.csv
KINDS = ("best", "last", "views")  # of out-of-fold logits: best epoch, last epoch, kept weights in all views


def differences(earlier, config):
    """Return ['lr was 0.003 and is now 0.001', …]. A setting that `earlier` lacks is younger and had its default."""
    if "head_lr" in config and "head_lr" not in earlier:  # what 0.1.0 called so is now the thesis'
        renamed = dict(augment={"d4": "thesis"}, sampler={"imbalanced": "thesis"})
        earlier = earlier | {key: names.get(earlier[key], earlier[key]) for key, names in renamed.items()}
    lines = []
    for key in sorted(config.keys() - {"changed"}):
        same = earlier[key] == config[key] if key in earlier else key not in config["changed"]
        was = repr(earlier[key]) if key in earlier else "its default"
        if not same:
            others = "folds_hash has changed: the folds are others"
            lines.append(others if key == "folds_hash" else f"{key} was {was} and is now {config[key]!r}")
    return lines


def is_finished(folder, fold):
    """Return whether all files of a finished fold are there."""
    return all((folder / f"fold{fold}.{ending}").exists() for ending in FOLD_FILES)


def train_again(folder, fold):
    """Return the remedy for files of a fold that can't be used."""
    return f"train fold {fold} of {folder.name} again, with the flags it had and --overwrite"


def read_record(folder, fold):
    """Return the content of foldK.json."""
    path = folder / f"fold{fold}.json"
    record = read_json(path, train_again(folder, fold))
    if not isinstance(record, dict) or "config" not in record:
        raise UserError(f"{path} is of another version of the kit, or damaged: {train_again(folder, fold)}")
    return record


def check_config(folder, config, replaced):
    """Raise UserError where a finished fold that isn't one of `replaced` has other settings than `config`."""
    numbers = [path.stem.removeprefix("fold") for path in folder.glob("fold*.pt")]
    for fold in sorted({int(number) for number in numbers if number.isdecimal()} - {*replaced}):
        if is_finished(folder, fold) and (changed := differences(read_record(folder, fold)["config"], config)):
            was = f"fold {fold} of experiment {folder.name} was trained with other settings: {'; '.join(changed)}"
            raise UserError(f"{was}. Give another --exp, or remove {folder}")


@contextlib.contextmanager
def lock_fold(folder, fold):
    """Lock a fold for the block. Raises UserError where another process holds it."""
    with locked(folder / f".fold{fold}.lock", f"fold {fold} of {folder.name}"):
        remove_leftovers(folder, f"fold{fold}.*", f"fold{fold}_*")
        yield


@contextlib.contextmanager
def lock_config(folder, config, replaced):
    """Write `config` to config.json, and keep it so for the block. Raises UserError where finished
    folds that aren't `replaced`, or folds that another process trains at this moment, have other settings."""
    path = folder / "config.json"
    with opened(folder / ".lock") as file:
        alone = lock(file, wait=False)
        if not alone:
            lock(file, alone=False)  # after the process that may be writing config.json
        check_config(folder, config, replaced)
        earlier = read_json(path, "run this again") if path.exists() else {}
        if earlier and not alone and (changed := differences(earlier, config)):
            was = f"{folder.name} is being trained with other settings: {'; '.join(changed)}"
            raise UserError(f"{was}. Give another --exp, or wait")
        if earlier != config and (alone or not earlier):
            write_json(path, config)
        lock(file, alone=False)
        yield


def logit_columns(count):
    """Return foldK.csv's logit columns; for many classes one column, the hash of foldK_logits.npy, which holds them."""
    return [f"{kind}_{k}" for kind in KINDS for k in range(count)] if count <= MOST_COLUMNS else ["logits"]


def write_logits(folder, fold, table, kinds, count):
    """Write foldK.csv: `table`, and the logits. kinds: a dict of KINDS, [n, K] each."""
    logits = [np.asarray(kinds[kind], np.float32) for kind in KINDS]
    if count > MOST_COLUMNS:
        with replacing(path := folder / f"fold{fold}_logits.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, logits)
        cells = file_hash(path)[:16]
    else:
        cells = np.concatenate(logits, axis=1)
    columns = pd.DataFrame(cells, columns=logit_columns(count), index=table.index)
    write_csv(folder / f"fold{fold}.csv", pd.concat([table, columns], axis=1))


@dataclass
class Oof:
    """The out-of-fold predictions of an experiment: those of its finished folds, put together (thesis 4.2)."""

    exp: str  # the experiment's name
    folder: Path  # OUTPUT/EXP
    config: dict  # its settings
    prepared: Prepared
    folds: pd.DataFrame  # the N rows of folds.csv whose fold is finished
    targets: np.ndarray  # [N] or [N, K], as the task has them
    present: list[int]  # the finished folds
    missing: list[int]  # the others
    records: dict[int, dict]  # foldK.json of each finished fold
    parts: dict[int, np.ndarray]  # the logits of each finished fold, float [KINDS, n, K]

    @property
    def task(self):
        return self.prepared.task

    def logits(self, kind):
        """Return the logits of one of KINDS: float [N, K]. For many classes, all three would fill the memory."""
        logits = np.empty((len(self.folds), len(self.task)), next(iter(self.parts.values())).dtype)
        for fold, part in self.parts.items():
            logits[self.folds.fold == fold] = part[KINDS.index(kind)]
        return logits

    @cached_property
    def predictions(self):
        """The predictions out of fold, by the kept weights in the experiment's views: float [N, K]."""
        return self.task.predictions(self.logits("views"))

    @property
    def folds_text(self):
        """'3 of 5 folds', or '' where all are finished."""
        return f"{len(self.present)} of {self.prepared.folds} folds" if self.missing else ""


def read_oof(output, exp):
    """Return the Oof of an experiment. Raises UserError where no fold is finished, or one doesn't fit the others."""
    folder = common.experiment_folder(output, exp)
    prepared, folds = read_prepared(output)
    present = [k for k in range(prepared.folds) if is_finished(folder, k)]
    if not present:
        seeds = listing(sorted(path.name for path in output.glob(f"{exp}_*/") if is_finished(path, 0)))
        meant = f"; {seeds} have some" if seeds else ""
        raise UserError(f"{folder} has no finished fold: train with 01_train_fold.py --exp {exp} --fold all{meant}")
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
    task, folds = prepared.task, folds[folds.fold.isin(present)].reset_index(drop=True)
    return Oof(
        exp=exp, folder=folder, config=config, prepared=prepared, folds=folds, targets=task.read_targets(folds.target),
        present=present, missing=[k for k in range(prepared.folds) if k not in present], records=records,
        parts={k: read_fold(folder, k, len(task), folds[folds.fold == k]) for k in present},
    )  # fmt: skip


def read_fold(folder, fold, count, expected):
    """Return the logits of foldK.csv, float64 [KINDS, n, K] (for many classes float32, mapped), in the order of
    `expected`, that fold's rows of folds.csv. Raises UserError where they don't fit."""
    path, remedy = folder / f"fold{fold}.csv", train_again(folder, fold)
    table = read_table(path, remedy, dtype={"image_name": str, "target": expected.target.dtype, "logits": str})
    names, columns = ["image_name", "target"], logit_columns(count)
    if [*table.columns] != names + columns or table[names].values.tolist() != expected[names].values.tolist():
        raise UserError(f"{path} doesn't hold the images of fold {fold}: {remedy}")
    if count <= MOST_COLUMNS:
        numbers = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        logits = numbers.reshape(len(table), len(KINDS), count).transpose(1, 0, 2)
    else:
        path = path.with_name(f"fold{fold}_logits.npy")
        try:
            if not (table.logits == file_hash(path)[:16]).all():
                raise ValueError("its hash differs")
            logits = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is missing or damaged ({error}): {remedy}") from None
    bad = table.image_name[~np.all([np.isfinite(kind).all(axis=1) for kind in logits], axis=0)]
    if len(bad):
        raise UserError(f"{path} has predictions that are NaN or infinite ({listing(bad)}): {remedy}")
    return logits


def warn_of_mixed_provenance(exp, records):
    """Warn where folds were trained with different code, weights, precision or images at once for batch norm. records:
    {fold: foldK.json}."""
    for what in ("code", "weights", "init", "amp", "batch_norm"):
        folds_of = {}
        for fold, record in sorted(records.items()):
            run = record.get("run", {})
            before = [part[what] for part in run.get("before_stops", []) if what in part]
            folds_of.setdefault(str([*before, record.get(what, run.get(what))]), []).append(fold)
        if len(folds_of) > 1:
            parts = " | ".join(f"fold {', '.join(map(str, folds))}" for folds in folds_of.values())
            warn(f"the folds of {exp} are trained with different {what} ({parts}): --overwrite trains a fold again")


def note_in_ledger(output, experiment, cells):
    """Write `cells` (a dict of column: value) into the experiment's row of OUTPUT/experiments.csv. None leaves a cell
    as it is; other rows and columns, the user's own included, stay. → the table, all strings."""
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
