"""The whole job: 00, 01 for all folds, 02 and 03. run.sh starts it.

One process does it all, so that torch, timm and the rest are imported once; with --parallel, each GPU trains its folds
in a process of its own. It knows the scripts, since it is no part of them.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import common
from common import UserError, experiment_folder, prepared_folder
from kit.train.device import pick_device
from kit.train.settings import check_flags, experiment_names

ROOT = Path(__file__).parent.parent


def load(name):
    """→ a script, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(script, words):
    """→ a script's flags. A mistake in them is its own: the message bears its name."""
    caller, sys.argv[0] = sys.argv[0], f"{script.__name__}.py"
    args = script.make_parser().parse_args([str(word) for word in words])
    sys.argv[0] = caller
    return args


def run(script, args):
    sys.argv[0] = f"{script.__name__}.py"
    script.main(args)
    sys.argv[0] = "run.sh"


def words_of(name, flags):
    """→ the flags in a variable or a flag of that name, as words."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"{name} can't be read ({error}): mend its quotes") from None


def shares(folds, gpus):
    """→ the folds of each of so many GPUs: GPU i of n takes folds i, i + n, i + 2n …"""
    return [list(range(gpu, folds, gpus)) for gpu in range(min(gpus, folds))]


def train_in_parallel(flags, folds):
    """Trains the folds in a process for each visible GPU. Raises SystemExit with the code of one that failed, once all
    have ended: a fold that fails doesn't end the others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = visible.split(",") if visible else [None]
    jobs = []
    # Through `cat`, since two progress bars on one terminal would be unreadable.
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as reader:
        try:
            for gpu, share in zip(gpus, shares(folds, len(gpus)), strict=False):
                command = [sys.executable, ROOT / "01_train_fold.py", *flags, "--fold", *map(str, share)]
                place = {} if gpu is None else dict(CUDA_VISIBLE_DEVICES=gpu)
                jobs.append(subprocess.Popen(
                    command, env=os.environ | place, stdout=reader.stdin, start_new_session=True
                ))  # fmt: skip
            codes = [job.wait() for job in jobs]
        finally:  # Ctrl-C and SIGTERM reach this process alone, and it ends the others
            for job in jobs:
                job.terminate()
            for job in jobs:
                job.wait()
    if any(codes):  # 75 is a fold that --stop-after ended: worth less than one that failed
        code = next((code for code in codes if code not in (0, 75)), 75)
        sys.exit(128 - code if code < 0 else code)  # below 0: by a signal


def main(flags):
    parallel, flags = "--parallel" in flags, [flag for flag in flags if flag != "--parallel"]
    prepare, train, oof, infer = map(load, ("00_prepare", "01_train_fold", "02_oof", "03_infer"))
    args = parse(train, ["--fold=all", *flags])
    if args.fold != ["all"]:
        raise UserError("it trains every fold: leave --fold out, or run python 01_train_fold.py --fold K")
    if args.print_config:
        return run(train, args)
    # Mistakes that can be seen before any work end it here.
    check_flags(args)
    exps, folders = experiment_names(args), ["--input", args.input, "--output", args.output]
    for exp in exps:
        experiment_folder(args, exp)
    if not parallel:  # each GPU's own process asks; this one would take some of a GPU's memory
        pick_device(args.device, args.deterministic)
    given = {name: words_of(name, os.environ.get(name, "")) for name in ("PREPARE", "INFER")}
    preparing = parse(prepare, [*folders, "--size", args.size, *given["PREPARE"]])
    scoring = parse(oof, [*exps, *folders])
    inferring = parse(infer, [*exps, *folders, "--device", args.device, *given["INFER"]])
    run(prepare, preparing)
    if parallel:
        prepared = common.read_json(prepared_folder(args) / "prepared.json", common.PREPARE)
        train_in_parallel(flags, prepared["folds"])
    else:
        run(train, args)
    run(oof, scoring)
    run(infer, inferring)


if __name__ == "__main__":
    sys.argv[0] = "run.sh"
    common.run(main)
