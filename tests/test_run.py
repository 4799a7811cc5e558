"""run.sh: all scripts in turn, errors before any work, Ctrl-C, several GPUs, --stop-after."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

from common import UserError

import pytest
from conftest import TINY, run_sh

from kit import pipeline

PLAIN = dict(PREPARE="--folds 2 --groups none")


@pytest.mark.parametrize(("folds", "gpus", "shares"), [(5, "0,1", ["024", "13"]), (2, "0,1,2", ["0", "1"])])
def test_the_folds_are_shared_between_the_gpus(folds, gpus, shares, monkeypatch):
    popen, started = subprocess.Popen, []

    def start(command, env=None, **options):
        if command[0] == "cat":
            return popen(command, **options)
        started.append((env["CUDA_VISIBLE_DEVICES"], "".join(command[command.index("--fold") + 1 :])))
        return popen(["true"])

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    pipeline.train_in_parallel(["--exp", "base"], folds)
    assert started == [*zip(gpus.split(","), shares, strict=False)]


def test_errors_in_variables_and_flags_are_found_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.sh"])
    flags = ["--input", str(tmp_path), "--output", str(tmp_path / "output"), "--weights", "none"]
    for name in ("PREPARE", "INFER"):
        monkeypatch.setenv(name, "--folds '5")
        with pytest.raises(UserError, match=f"{name} can't be read"):
            pipeline.main(flags)
        monkeypatch.setenv(name, "--bogus 3")
        with pytest.raises(SystemExit, match="2"):
            pipeline.main(flags)
        assert "unrecognized arguments: --bogus 3" in capsys.readouterr().err
        monkeypatch.delenv(name)
    for exp in ("my/exp", "prepared"):
        with pytest.raises(UserError, match=r"can't be an experiment"):
            pipeline.main([*flags, "--exp", exp])
    with pytest.raises(SystemExit, match="2"):
        pipeline.main([*flags, "base"])
    assert "unrecognized arguments: base" in capsys.readouterr().err
    (tmp_path / "flags.args").write_text("--fold 0\n")
    with pytest.raises(UserError, match="it trains every fold"):
        pipeline.main([*flags, f"@{tmp_path}/flags.args"])
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("given", "predicts", "amp", "compiled"),
    [
        ("", True, "bf16", "on"),
        ("--compile off --workers 2", True, "bf16", "off"),  # INFER has the last word
        ("--amp none", False, "none", "on"),  # 01's logits would be predicted again
        ("--tta none", False, "bf16", "on"),
        ("--test-images hidden --sample-submit hidden.csv", False, "bf16", "on"),
    ],
)
def test_03_gets_the_machine_of_01_which_predicts_its_logits(given, predicts, amp, compiled, tmp_path, monkeypatch):
    ran, shared = {}, []
    monkeypatch.setattr("sys.argv", ["run.sh"])
    monkeypatch.setenv("INFER", given)
    monkeypatch.setattr(pipeline, "run", lambda script, parsed: ran.update({script.__name__: parsed}))
    monkeypatch.setattr(pipeline, "train_in_parallel", lambda flags, folds: shared.extend(flags))
    prepared = SimpleNamespace(folds=5, metric="auc", task=None, submission={})
    monkeypatch.setattr(pipeline, "read_prepared", lambda output: (prepared, None))
    flags = ["--output", str(tmp_path), *"--amp bf16 --compile --workers 1 --deterministic".split()]
    pipeline.main(flags)
    train, infer = ran["01_train_fold"], ran["03_infer"]
    assert train.predict == predicts
    assert (infer.amp, infer.compile, infer.deterministic) == (amp, compiled, True)
    assert infer.workers == (2 if "--workers" in given else 1)
    pipeline.main(["--parallel", *flags])
    assert shared == ["--predict"] * predicts + flags


@pytest.mark.slow
def test_run_sh_refuses_fold(tmp_path):
    process = run_sh("--output", tmp_path / "output", "--fold", 2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "run.sh: error: it trains every fold: leave --fold out, or run python 01_train_fold.py --fold K\n"


def test_run_sh_refuses_a_wrong_flag_before_any_work(tmp_path):
    process = run_sh("--input", tmp_path, "--output", tmp_path / "output", "--epohcs", 3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "--epohcs" in err
    assert not (tmp_path / "output").exists()


# ---------------------------------------------------------------- with training


def wait_for(process, path):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_run_sh_resumes_after_stop_after_and_after_ctrl_c(toy, tmp_path):
    flags = [*toy(train=60), "--exp=quick", *TINY]
    folder = tmp_path / "output" / "quick"
    process = run_sh(*flags, "--stop-after", "1s", **PLAIN)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (75, "")
    assert out.count("stopped by --stop-after; run it again to resume after 1 of 3 steps") == 1
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
    assert out.count("10 images, predicted earlier") >= 2, "by 01, on the GPU of the fold"
    assert list(folder.glob("submission_quick_CV*.csv"))


def command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text()


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_of_all_gpus(toy, tmp_path):
    """The GPUs are only named here: each process finds none and uses the CPU. test_notebooks.py runs to the end."""
    process = run_sh(*toy(train=60), "--parallel", *TINY, CUDA_VISIBLE_DEVICES="0,1", **PLAIN)

    def ours():
        return [line for line in command_lines() if str(tmp_path) in line]

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
def test_parallel_fails_where_a_fold_fails(toy):
    process = run_sh(*toy(train=60), "--parallel", *TINY, "--batch-size", 1000, CUDA_VISIBLE_DEVICES="0,1", **PLAIN)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.count("--batch-size 1000 is more than the 30 training images") == 2
    assert "rows, checked" not in out
