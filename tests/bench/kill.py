"""Resume after SIGKILL: bytes of the four scripts' files after kills at random moments, beside an undisturbed run's.

    python tests/bench/kill.py 100 --folder /tmp/kill            # about 5 minutes on 2 cores
    python tests/bench/kill.py 20 --folder /tmp/kill --seed 1

01_train_fold.py runs with Ranger21 and AdamW, with 0 and 2 workers, with dropout. It is killed at a random moment or
while a resume file is being written, and started again with the same command, until N kills are done. Its foldK.pt,
foldK.csv and foldK.json must equal those of an undisturbed run. 00, 02 and 03 are killed N/5 times in all: each file
under a final name must be complete at any moment, and a last run must write the bytes of an undisturbed one. The bench
prints a row for each setting and exits with 1 if a byte differs.

Each start is a fork of a process that has imported everything, which saves the seconds that importing torch takes; the
kill is a real SIGKILL.
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
OFTEN = ["--save-minutes", "1e-9"]  # saves after each step, so that many kills fall into a save


def import_scripts():
    """Import all that the scripts import, without calling their `main`."""
    for script in ("00_prepare.py", "01_train_fold.py", "02_oof.py", "03_infer.py"):
        spec = importlib.util.spec_from_file_location(script[3:-3], ROOT / script)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def start(script, *arguments, error=None):
    """Start `python script arguments` in a fork; `error`: the file for its stderr. → its process id."""
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
    """Wait for a process that isn't killed and must succeed."""
    status = os.waitpid(pid, 0)[1]
    if status:
        sys.exit(f"an undisturbed script ended with {status}")


def killed(pid, moment, folder, pattern):
    """Kill `pid` after `moment` seconds or, if that is None, as soon as a temporary file matches `pattern`.
    → whether the kill came before the process ended."""
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
    """Kill 01. → rows of the table: setting, runs completed, kills, those in mid-epoch and in a save, equal or not."""
    rows = []
    for optimizer in OPTIMIZERS:
        for workers in (0, 2):
            name = f"{optimizer} {workers} workers"
            command = [*flags, *TRAIN, "--optimizer", optimizer, "--workers", workers, *OFTEN]
            command += ["--model-kwargs", "drop_rate=0.2"]
            reference = output / f"reference_{optimizer}"
            if not reference.exists():  # one for both worker counts, which must give the same bytes too
                seconds = duration("01_train_fold.py", *command, "--exp", reference.name)
            expected = files(reference, ["fold0.pt", "fold0.csv", "fold0.json"])
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
    """Return whether the newest resume file was written in mid-epoch."""
    path = folder / "fold0.resume.pt"
    return path.exists() and read_checked(path)["progress"]["step"] > 0


def kill_others(flags, output, kills, rng):
    """Kill 00 with --overwrite, 02 and 03. → rows of the table: script, runs completed, kills, equal or not."""
    rows = []
    base = output / "reference_ranger21"
    prepared = "folds.csv test.csv train_32.npy test_32.npy duplicates.csv duplicates.png samples.png prepared.json"
    expected_of = {
        "00_prepare.py": (output / "prepared", prepared.split(), ["--size", 32, "--folds", 3, "--overwrite"]),
        "02_oof.py": (base, "oof.csv report.html confusion.png roc.png curves.png".split(), [base.name]),
        "03_infer.py": (base, None, [base.name, "--tta", "none"]),
    }
    finish(start("01_train_fold.py", *flags, *TRAIN, "--model-kwargs", "drop_rate=0.2", *OFTEN, "--workers", 0,
        "--optimizer", "ranger21", "--exp", base.name, "--fold", "all"))  # fmt: skip
    finish(start("02_oof.py", *flags, base.name))
    finish(start("03_infer.py", *flags, base.name))  # adds the score to the ledger, which the report shows
    for script, (folder, names, more) in expected_of.items():
        seconds = duration(script, *flags, *more)
        names = names or [path.name for pattern in ("submission*", "fold*_test.*") for path in folder.glob(pattern)]
        expected = files(folder, names)
        row = dict(run=script, kills=0, completed=0, equal=True)
        while row["kills"] < kills:
            if not killed(start(script, *flags, *more), rng.uniform(0, seconds), folder, ""):
                row["completed"] += 1
                for path in folder.glob("fold*_test.*"):  # else the next run would have nothing to predict
                    path.unlink()
                continue
            row["kills"] += 1
            present = {name: content for name, content in expected.items() if (folder / name).exists()}
            row["equal"] &= files(folder, present) == present  # each file under a final name is complete
        finish(start(script, *flags, *more))
        row["equal"] &= files(folder, names) == expected
        row["equal"] &= not any(folder.glob(".new*"))
        rows.append(row)
        print(row, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, help="kills of 01_train_fold.py, a quarter for each of the four settings")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; deleted first")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
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
