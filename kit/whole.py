"""The whole job: 00, 01 for all folds, 02 and 03. run.sh starts it.

One process does it all, so that torch, timm and the rest are imported once; with --parallel, each GPU trains its folds
in a process of its own. The only part that knows the scripts, since it is no part of them.
"""

import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import common
from common import UserError, prepared_folder
from kit.device import pick_device
from kit.flags import check_flags, experiment_names

ROOT = Path(__file__).parent.parent


def load(name):
    """→ a script, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, words):
    """Runs a script's main with these words as its flags; its messages bear its name."""
    sys.argv[0] = f"{script.__name__}.py"
    script.main(script.make_parser().parse_args([str(word) for word in words]))


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
                with contextlib.suppress(ProcessLookupError):
                    job.terminate()
                job.wait()
    if failed := [code for code in codes if code]:
        sys.exit(failed[0])


def main(flags):
    parallel, flags = "--parallel" in flags, [flag for flag in flags if flag != "--parallel"]
    if any(flag.split("=")[0] == "--fold" for flag in flags):
        raise UserError("it trains every fold; for one, python 01_train_fold.py --fold K")
    train = load("01_train_fold")
    args = train.make_parser().parse_args([*flags, "--fold", "all"])
    if not args.print_config:  # mistakes that can be seen before any work
        check_flags(args)
        pick_device(args.device, args.deterministic)
        folders = ["--input", args.input, "--output", args.output]
        run(load("00_prepare"), [*folders, "--size", args.size, *shlex.split(os.environ.get("PREPARE", ""))])
    if parallel and not args.print_config:
        prepared = common.read_json(prepared_folder(args) / "prepared.json", common.PREPARE)
        train_in_parallel(flags, prepared["folds"])
    else:
        run(train, [*flags, "--fold", "all"])
    if not args.print_config:
        exps = experiment_names(args)
        run(load("02_oof"), [*exps, *folders])
        run(load("03_infer"), [*exps, *folders, *shlex.split(os.environ.get("INFER", ""))])


if __name__ == "__main__":
    sys.argv[0] = "run.sh"
    common.run(main)
