"""Kills the kit's scripts at random moments, starts them again, and compares the bytes at the end.

    python tests/bench/kill.py 100 --folder /tmp/kill            # about 5 minutes on 2 cores
    python tests/bench/kill.py 20 --folder /tmp/kill --seed 1

01_train_fold.py, with Ranger21 and AdamW, with 0 and 2 workers, with dropout: SIGKILL at a random moment, or as soon as
a resume file is being written; then the same command again, until N kills are done. Its foldK.pt, foldK.csv and
foldK.json must be those of a run that nobody touched. 00, 02 and 03 are killed N/5 times in all: no file under a final
name may ever be half, and a last run must give the bytes of an untouched one. Prints a row for each; exits with 1 where
a byte differs.

Each start is a fork of a process that has imported everything, which saves the seconds that importing torch takes; the
kill is a real one.
"""

import argparse
import importlib.util
import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from kit.train.checkpoint import read_checked

ROOT = Path(__file__).parent.parent.parent
TRAIN = (
    "--model test_resnet --weights none --size 32 --epochs 2 --batch-size 4 --lr 3e-3 --min-lr 3e-4 --fold 0".split()
)
OPTIMIZERS = "ranger21", "adamw"
OFTEN = ["--save-minutes", "1e-9"]  # after every step, so that many kills fall into a save


def import_scripts():
    """Imports all that the scripts import; `main` isn't called."""
    for script in ("00_prepare.py", "01_train_fold.py", "02_oof.py", "03_infer.py"):
        spec = importlib.util.spec_from_file_location(script[3:-3], ROOT / script)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def start(script, *arguments, error=None):
    """Starts `python script arguments` in a fork; `error`: the file for its stderr. → its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    sys.argv = [str(ROOT / script), *map(str, arguments)]
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    if error:
        os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def finish(pid):
    status = os.waitpid(pid, 0)[1]
    if status:
        sys.exit(f"a script that nobody killed ended with {status}")


def killed(pid, moment, folder, pattern):
    """Kills `pid` after `moment` seconds or, if that is None, as soon as a temporary file of `pattern` is there.
    → whether it came to that before the end."""
    deadline = time.monotonic() + (60 if moment is None else moment)
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        if moment is None and any(folder.glob(pattern)):
            break
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def files(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


def duration(script, *arguments):
    began = time.monotonic()
    finish(start(script, *arguments))
    return time.monotonic() - began


def kill_training(flags, output, kills, rng):
    """→ rows of the table: settings, runs completed, kills, those within an epoch and during a save, equal or not."""
    rows = []
    for optimizer in OPTIMIZERS:
        for workers in (0, 2):
            name = f"{optimizer} {workers} workers"
            command = [*flags, *TRAIN, "--optimizer", optimizer, "--workers", workers, *OFTEN]
            command += ["--model-kwargs", "drop_rate=0.2"]
            whole = output / f"whole_{optimizer}"
            if not whole.exists():  # one reference for both worker counts: they must not matter either
                seconds = duration("01_train_fold.py", *command, "--exp", whole.name)
            expected = files(whole, ["fold0.pt", "fold0.csv", "fold0.json"])
            folder = output / f"killed_{optimizer}_{workers}"
            row = dict(run=name, kills=0, completed=0, within_epoch=0, during_save=0, equal=True)
            while row["kills"] < kills or row["completed"] == 0:
                during = row["kills"] % 3 == 2  # every third waits for a save
                moment = None if during else rng.uniform(0, seconds)
                pid = start("01_train_fold.py", *command, "--exp", folder.name)
                if row["kills"] < kills and killed(pid, moment, folder, ".tmp*resume.pt"):
                    row["kills"] += 1
                    row["during_save"] += any(folder.glob(".tmp*resume.pt"))
                    row["within_epoch"] += within_epoch(folder)
                    continue
                if row["kills"] >= kills:
                    finish(pid)
                row["completed"] += 1
                row["equal"] &= files(folder, expected) == expected and not any(folder.glob("*resume*"))
                shutil.rmtree(folder)
            rows.append(row)
            print(row, flush=True)
    return rows


def within_epoch(folder):
    """Whether the newest whole resume file is of the middle of an epoch."""
    path = folder / "fold0.resume.pt"
    return path.exists() and read_checked(path)["progress"]["step"] > 0


def kill_others(flags, output, kills, rng):
    """00 with --overwrite, 02 and 03: whole files at any moment, the same bytes at the end."""
    rows = []
    base = output / "whole_ranger21"
    prepared = "folds.csv test.csv train_32.npy test_32.npy duplicates.csv duplicates.png samples.png prepared.json"
    expected_of = {
        "00_prepare.py": (output / "prepared", prepared.split(), ["--size", 32, "--folds", 3, "--overwrite"]),
        "02_oof.py": (base, "oof.csv report.html confusion.png roc.png curves.png".split(), [base.name]),
        "03_infer.py": (base, None, [base.name, "--tta", "none"]),
    }
    finish(start("01_train_fold.py", *flags, *TRAIN, "--model-kwargs", "drop_rate=0.2", *OFTEN, "--workers", 0,
        "--optimizer", "ranger21", "--exp", base.name, "--fold", "all"))  # fmt: skip
    finish(start("02_oof.py", *flags, base.name))
    finish(start("03_infer.py", *flags, base.name))  # notes the score in the ledger, which the report shows
    for script, (folder, names, more) in expected_of.items():
        seconds = duration(script, *flags, *more)
        names = names or [path.name for pattern in ("submission*", "fold*_test.*") for path in folder.glob(pattern)]
        expected = files(folder, names)
        row = dict(run=script, kills=0, completed=0, equal=True)
        while row["kills"] < kills:
            if not killed(start(script, *flags, *more), rng.uniform(0, seconds), folder, ""):
                row["completed"] += 1
                for path in folder.glob("fold*_test.*"):  # or the next run would have nothing to predict
                    path.unlink()
                continue
            row["kills"] += 1
            present = {name: content for name, content in expected.items() if (folder / name).exists()}
            row["equal"] &= files(folder, present) == present  # each file under a final name is whole
        finish(start(script, *flags, *more))
        row["equal"] &= files(folder, names) == expected
        row["equal"] &= not any(folder.glob(".new*"))
        rows.append(row)
        print(row, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, help="of 01_train_fold.py, a quarter for each of the four settings")
    parser.add_argument("--folder", type=Path, required=True, help="is made anew")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    flags = ["--input", args.folder / "input", "--output", args.folder / "output"]
    import_scripts()
    finish(start("input/make_demo.py", "--folder", args.folder / "input", "--products", 40, "--test-products", 12,
        "--copies", 2, "--side", 48))  # fmt: skip
    finish(start("00_prepare.py", *flags, "--size", 32, "--folds", 3))
    rng = random.Random(args.seed)
    rows = kill_training(flags, args.folder / "output", -(-args.kills // (2 * len(OPTIMIZERS))), rng)
    rows += kill_others(flags, args.folder / "output", -(-args.kills // 15), rng)
    (args.folder / "kills.json").write_text(json.dumps(rows))
    sys.exit(0 if all(row["equal"] for row in rows) else "bytes differ")


if __name__ == "__main__":
    main()
