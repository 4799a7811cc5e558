"""Pipeline of run.sh: 00, 01 for all folds, 02 and 03.

One process runs them all, so that torch and timm are imported once; with --parallel, each GPU trains its folds in a
process of its own. Unlike other parts it loads the scripts.
"""

import importlib
import os
import shlex
import subprocess
import sys

import common
from common import ROOT, UserError

import torch

from kit.data.prepared import read_prepared
from kit.score.blend import check_blend
from kit.train.device import pick_device
from kit.train.settings import check_flags, experiment_folders

MACHINE = "device amp compile workers deterministic".split()  # flags that 03 shares with 01


def parse(script, words, **defaults):
    """Return a script's parsed flags. An error in them carries the script's name. defaults: of flags, for its own."""
    caller, sys.argv[0] = sys.argv[0], f"{script.__name__}.py"
    parser = script.make_parser()
    parser.set_defaults(**defaults)
    args = parser.parse_args([str(word) for word in words])
    sys.argv[0] = caller
    return args


def run(script, parsed):
    """Run a script; its messages carry its name."""
    sys.argv[0] = f"{script.__name__}.py"
    script.main(parsed)
    sys.argv[0] = "run.sh"


def words_of(name, flags):
    """Return the words in `flags`. name: of the environment variable or the flag that holds them."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"{name} can't be read ({error}): fix its quotes") from None


def train_in_parallel(flags, folds):
    """Train the folds in a process for each visible GPU: GPU i of n takes folds i, i + n, i + 2n … Raises SystemExit
    with the code of one that failed, once all have ended: a fold that fails doesn't end the others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = visible.split(",") if visible else [None]
    jobs = []
    # Through `cat`, since two progress bars on one terminal would be unreadable.
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as reader:
        try:
            for i, gpu in enumerate(gpus[:folds]):
                share = map(str, range(i, folds, len(gpus)))
                command = [sys.executable, ROOT / "01_train_fold.py", *flags, "--fold", *share]
                env = os.environ | ({} if gpu is None else dict(CUDA_VISIBLE_DEVICES=gpu))
                jobs.append(subprocess.Popen(command, env=env, stdout=reader.stdin, start_new_session=True))
            codes = [job.wait() for job in jobs]
        finally:  # Ctrl-C and SIGTERM reach this process alone, and it ends the others
            for job in jobs:
                job.terminate()
            for job in jobs:
                job.wait()
    if any(codes):  # 75 is a fold that --stop-after ended: a failed one comes before it
        code = next((code for code in codes if code not in (0, 75)), 75)
        sys.exit(128 - code if code < 0 else code)  # below 0: by a signal


def main(flags):
    parallel, flags = "--parallel" in flags, [flag for flag in flags if flag != "--parallel"]
    names = "00_prepare", "01_train_fold", "02_oof", "03_infer"
    prepare, train, oof, infer = map(importlib.import_module, names)
    args = parse(train, ["--fold=all", *flags])
    if args.fold != ["all"]:
        raise UserError("it trains every fold: leave --fold out, or run python 01_train_fold.py --fold K")
    if args.print_config:
        return run(train, args)
    check_flags(args)  # here and below: errors that can be found before any work
    exps = [folder.name for folder in experiment_folders(args.output, args.exp, args.seed)]
    folders = ["--input", args.input, "--output", args.output]
    if not parallel:  # there the process of each GPU does it; here it would take some of a GPU's memory
        pick_device(args.device, args.deterministic)
    given = {name: words_of(name, os.environ.get(name, "")) for name in ("PREPARE", "INFER")}
    preparing = parse(prepare, [*folders, "--size", args.size, *given["PREPARE"]])
    scoring = parse(oof, [*exps, *folders])
    machine = {flag: getattr(args, flag) for flag in MACHINE}
    inferring = parse(infer, [*exps, *folders, *given["INFER"]], **machine)
    if (inferring.test_images, inferring.tta, inferring.amp) == (None, None, args.amp):  # else 03 needs other logits
        args.predict, flags = True, ["--predict", *flags]
    run(prepare, preparing)
    prepared, _ = read_prepared(args.output)
    check_blend(inferring.blend, prepared.metric, prepared.task, prepared.submission)
    if parallel:
        train_in_parallel(flags, prepared.folds)
    else:
        run(train, args)
    run(oof, scoring)
    run(infer, inferring)


if __name__ == "__main__":
    sys.argv[0] = "run.sh"
    common.run(main)
