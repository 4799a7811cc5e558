"""Error messages and files of the four scripts on a disk that fills up at each of their writes.

    unshare -rm python tests/bench/full_disk.py --folder /tmp/full            # about 10 minutes on 2 cores
    unshare -rm python tests/bench/full_disk.py --folder /tmp/full --most 3   # at most 3 disk sizes per script

OUTPUT is a tmpfs of limited size, which Linux' `unshare` lets any user mount. An undisturbed run of each script shows
how full the disk is whenever a file is created or deleted. The script then runs from the same start on disks of these
sizes and of sizes in between, so that each file fails at its beginning, in its middle and at its end. The script must
succeed, or exit with code 2 and one line that names the file or the disk. Each file under a final name must be that of
the undisturbed run or the earlier one, and no temporary file may remain. On a larger disk, the same command must then
write the undisturbed run's bytes.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from shutil import disk_usage

import kill
import timm
import torch

AMPLE, WEIGHTS, PAGE = "64m", "weights.pth", os.sysconf("SC_PAGE_SIZE")
VARYING = "_epochs.csv", ".lock"  # hold seconds, process numbers
GROWING = ".resume.pt", ".part", "experiments.csv"  # a later run continues these or adds a row
TRAIN = [*kill.TRAIN[:-2], "--optimizer", "adamw", "--model-kwargs", "drop_rate=0.2", *kill.OFTEN]
PROBE = [f"@{kill.ROOT / 'recipes' / 'probe.args'}", *kill.TRAIN[:2], *kill.TRAIN[4:6], "--weights", WEIGHTS]
STEPS = {
    "00": ["00_prepare.py", "--size", 32, "--folds", 2],
    "01": ["01_train_fold.py", *TRAIN, "--fold", "all", "--exp", "base"],
    "01 probe": ["01_train_fold.py", *PROBE, "--fold", "all", "--exp", "probe"],
    "02": ["02_oof.py", "base", "probe"],
    "03": ["03_infer.py", "base", "probe"],
}


def mount(folder, *options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], check=True)


def fresh(disk, before, size):
    """Mount a disk of this size with the files of `before`."""
    subprocess.run(["umount", disk], check=True)
    mount(disk, f"size={size}")
    shutil.copytree(before, disk, dirs_exist_ok=True)


def names(folder):
    return {os.path.relpath(os.path.join(at, name), folder) for at, _, files in os.walk(folder) for name in files}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names(folder) if not name.endswith(VARYING)}


def sizes(pid, disk, most):
    """Wait for the end of the undisturbed run. → the sizes to try, in bytes: those in use whenever a file was created
    or deleted, half way to the next one, and a page below it."""
    seen, there, before = set(), None, disk_usage(disk).used
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if there != (now := names(disk)):
            seen |= {before, disk_usage(disk).used}
        there, before = now, disk_usage(disk).used
        time.sleep(0.0005)
    assert ended[1] == 0, f"the undisturbed run ended with {ended[1]}"
    pairs = itertools.pairwise(sorted(seen | {disk_usage(disk).used}))
    tried = {size for low, high in pairs for size in (low, (low + high) // 2 // PAGE * PAGE, high - PAGE)}
    return sorted(tried)[:: -(-len(tried) // most)]


def attempt(step, log):
    """Run a step. → (exit code, its lines on stderr)."""
    status = os.waitpid(kill.start(*step, error=log), 0)[1]
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace").splitlines()


def faults(code, lines, disk, before, good):
    """Return what is wrong after a run on the full disk, a list of sentences."""
    left, errors = contents(disk), [line for line in lines if ": error: " in line]
    problems = [f"ended with {code}: {lines[-1:]}"] if code not in (0, 2) else []
    if code == 2 and (len(errors) != 1 or str(disk) not in errors[0]):
        problems.append(f"its errors are {errors}")
    if other := [line for line in lines if line not in errors and ": warning: " not in line]:
        problems.append(f"{len(other)} more lines on stderr, the last: {other[-1]}")
    for name, content in left.items():
        if "/.tmp" in f"/{name}" or ".new/" in name:
            problems.append(f"left {name}")
        elif not name.endswith(GROWING) and content not in [side[name] for side in (before, good) if name in side]:
            problems.append(f"{name} is neither the undisturbed run's nor the earlier one")
    return problems + [f"lost {name}" for name in before if name not in left]


def try_step(name, step, disk, folder, most):
    """Run the step on each size of disk. → (row of the table, {sentence: the sizes in bytes})."""
    before, after, log, violations = folder / f"before {name}", folder / f"after {name}", folder / "log", {}
    shutil.copytree(disk, before)
    earlier = contents(before)
    tried = sizes(kill.start(*step, error=log), disk, most)
    shutil.copytree(disk, after)
    good, row = contents(after), dict(script=name, sizes=len(tried))
    for size in tried:
        fresh(disk, before, size)
        code, lines = attempt(step, log)
        problems = faults(code, lines, disk, earlier, good)
        mount(disk, "remount", f"size={AMPLE}")
        again, printed = attempt(step, log)
        if again or contents(disk) != good:
            differing = [n for n in {*good, *contents(disk)} if good.get(n) != contents(disk).get(n)]
            problems.append(f"on a larger disk: exit code {again}, {printed[-1:]}, other bytes in {differing}")
        for key, count in dict(refused=code == 2, warned=not code and bool(lines), violations=bool(problems)).items():
            row[key] = row.get(key, 0) + count
        for problem in problems:
            violations.setdefault(problem, []).append(size)
    fresh(disk, after, AMPLE)
    return row, violations


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; deleted first")
    parser.add_argument("--most", type=int, default=10**6, help="at most this many disk sizes per script")
    args = parser.parse_args()
    disk, rows = args.folder / "output", []
    shutil.rmtree(args.folder, ignore_errors=True)
    disk.mkdir(parents=True)
    kill.import_scripts()
    kill.finish(kill.start("input/make_demo.py", "--folder", args.folder / "input", "--products", 24,
        "--test-products", 8, "--copies", 2, "--side", 48))  # fmt: skip
    torch.save(timm.create_model("test_resnet").state_dict(), args.folder / WEIGHTS)
    mount(disk, f"size={AMPLE}")
    (disk / "notes.txt").write_text("the user's own\n")  # an empty disk's size, 0, would mean no limit
    for name, step in STEPS.items():
        step = [args.folder / flag if flag == WEIGHTS else flag for flag in step]
        step += ["--input", args.folder / "input", "--output", disk]
        row, violations = try_step(name, step, disk, args.folder, args.most)
        rows.append(row)
        lines = [f"  {len(tried)} sizes, {tried[0]} bytes: {problem}" for problem, tried in violations.items()]
        print(row, *lines, sep="\n", flush=True)
    (args.folder / "full.json").write_text(json.dumps(rows))
    sys.exit("violations" if any(row["violations"] for row in rows) else 0)


if __name__ == "__main__":
    main()
