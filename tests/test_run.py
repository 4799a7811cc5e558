"""run.sh as its users run it: to the end, with Ctrl-C in the middle, on several GPUs, until the time is up."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, run_sh

PLAIN = dict(PREPARE="--folds 2 --groups none")
# Notes how it was called, and where the GPUs are; answers --print-config as 01 does. `-c` runs the real Python.
STUB = """#!/bin/bash
if [[ $1 == -c ]]; then exec {python} "$@"; fi
echo "${{CUDA_VISIBLE_DEVICES-}}| $*" >>{calls}
if [[ $* == *--print-config* ]]; then echo '{{"exps": {exps}, "size": 384}}'; fi
if [[ "$*" == *"--fold {failing}"* ]]; then exit 75; fi
"""


def calls_of(folder, *flags, failing="none", exps=("quick",), **environment):
    """Runs run.sh with a stub for Python, in a competition of 5 folds. → (exit code, the scripts' command lines)"""
    stub, calls, prepared = folder / "python", folder / "calls", folder / "out" / "prepared"
    prepared.mkdir(parents=True)
    (prepared / "prepared.json").write_text('{"folds": 5}')
    stub.write_text(STUB.format(python=sys.executable, calls=calls, failing=failing, exps=json.dumps(exps)))
    stub.chmod(0o755)
    process = run_sh(*flags, "--output", folder / "out", PYTHON=str(stub), **environment)
    _, err = process.communicate(timeout=60)
    assert err == ""
    return process.returncode, calls.read_text().replace(str(folder), "").splitlines()


def test_run_sh_tells_each_script_its_flags(tmp_path):
    flags = ["--input=in", "@recipes/convnext.args", "--stop-after", "8h"]
    code, calls = calls_of(tmp_path, *flags, PREPARE="--folds 5", CUDA_VISIBLE_DEVICES="")
    passed_on = "--input=in @recipes/convnext.args --stop-after 8h --output /out"
    assert code == 0
    assert calls == [
        f"| 01_train_fold.py {passed_on} --fold all --print-config",
        "| 00_prepare.py --input in --output /out --size 384 --folds 5",
        f"| 01_train_fold.py {passed_on} --fold all",
        "| 02_oof.py quick --input in --output /out",
        "| 03_infer.py quick --input in --output /out --batch-size 64",
    ]


def test_run_sh_hands_the_experiments_of_all_seeds_to_02_and_03(tmp_path):
    code, calls = calls_of(tmp_path, "--seed", 1, 2, exps=("a_1", "a_2"), INFER="--blend rank", CUDA_VISIBLE_DEVICES="")
    assert code == 0
    assert calls[2:] == [
        "| 01_train_fold.py --seed 1 2 --output /out --fold all",
        "| 02_oof.py a_1 a_2 --output /out",
        "| 03_infer.py a_1 a_2 --output /out --blend rank",
    ]


@pytest.mark.parametrize("failing", ["none", "1"])
def test_parallel_shares_the_folds_between_the_gpus(failing, tmp_path):
    code, calls = calls_of(tmp_path, "--parallel", failing=failing, CUDA_VISIBLE_DEVICES="3,5")
    train = sorted(line for line in calls if "01_train" in line and "--print-config" not in line)
    assert train == [
        "3| 01_train_fold.py --output /out --fold 0 2 4",
        "5| 01_train_fold.py --output /out --fold 1 3",
    ]
    assert (code, sum("03_infer" in line for line in calls)) == ((0, 1) if failing == "none" else (75, 0))


def test_more_gpus_than_folds(tmp_path):
    _, calls = calls_of(tmp_path, "--parallel", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    train = sorted(line[0] + line[-1] for line in calls if "01_train" in line and "--print-config" not in line)
    assert train == ["00", "11", "22", "33", "44"]


def test_run_sh_trains_every_fold(tmp_path):
    process = run_sh("--output", tmp_path / "output", "--fold", 2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "run.sh: error: it trains every fold; for one, python 01_train_fold.py --fold K\n"


def test_run_sh_refuses_a_wrong_flag_before_any_work(tmp_path):
    process = run_sh("--input", tmp_path, "--output", tmp_path / "output", "--epohcs", 3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "--epohcs" in err
    assert not (tmp_path / "output").exists()


# ---------------------------------------------------------------- the real scripts


def wait_for(process, path):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_run_sh_goes_on_after_stop_after_and_after_ctrl_c(toy, tmp_path):
    flags = [*toy(train=60), "--exp=quick", *TINY]
    folder = tmp_path / "output" / "quick"
    process = run_sh(*flags, "--stop-after", "1s", **PLAIN)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (75, "")
    assert out.count("stopped by --stop-after; run it again to go on after 1 of 3 steps") == 1
    assert "fold 1 epoch" not in out
    assert (folder / "fold0.resume.pt").exists()

    process = run_sh(*flags, **PLAIN)
    wait_for(process, folder / "fold0.pt")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "fold 0 of quick goes on in epoch 1 after 1 of 3 steps" in out
    assert "Traceback" not in err
    assert not list(tmp_path.rglob(".tmp*"))
    assert not list(folder.glob("submission*"))

    process = run_sh(*flags, "--stop-after", "0.5h", **PLAIN)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "fold 0 of quick is finished" in out
    assert "10 rows, checked" in out
    assert list(folder.glob("submission_quick_CV*.csv"))


def running():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text()


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_of_all_gpus(toy, tmp_path):
    """The GPUs are only named here; each process finds none and takes the CPU. test_notebooks.py goes on to the end."""
    process = run_sh(*toy(train=60), "--parallel", *TINY, CUDA_VISIBLE_DEVICES="0,1", **PLAIN)

    def ours():
        return [line for line in running() if str(tmp_path) in line]

    while {line.split("--fold\0")[1][0] for line in ours() if "--fold\0" in line} != {"0", "1"}:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    wait_for(process, tmp_path / "output" / "base" / "config.json")  # the imports are done, a fold is taken
    os.kill(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C, which reaches run.sh alone
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err
    assert not ours()
    assert not list(tmp_path.rglob(".tmp*"))


@pytest.mark.slow
def test_parallel_ends_badly_where_a_fold_does(toy):
    process = run_sh(*toy(train=60), "--parallel", *TINY, "--batch-size", 1000, CUDA_VISIBLE_DEVICES="0,1", **PLAIN)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.count("--batch-size 1000 is more than the 30 training images") == 2
    assert "rows, checked" not in out
