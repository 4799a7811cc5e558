"""Experiment trackers: what --track logs, read back by TensorBoard itself and by a stand-in for Weights & Biases."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, TINY, done, kit, refused
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kit.train import trackers

FOLD = [*TINY, "--fold", 0, "--exp", "new"]
PROBE = "--model test_resnet --size 32 --batch-size 8 --tune probe --head fresh --fold 0 --exp probe".split()
EACH_STEP = ["--save-minutes", "1e-9"]  # saves, and therefore logs, at each step


@pytest.fixture
def flags(trained, tmp_path):
    shutil.copytree(trained.output / "prepared", tmp_path / "output" / "prepared")
    return ["--input", trained.input, "--output", tmp_path / "output"]


@pytest.fixture
def weights(tmp_path):
    """Write a file of weights, in place of pretrained ones."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def events_of(output, exp="new", fold=0):
    return EventAccumulator(str(output / "tensorboard" / exp / f"fold{fold}"), size_guidance={"scalars": 0}).Reload()


def curves_of(output, exp="new", fold=0):
    """Return {name: [(step, value), …]} as TensorBoard shows it."""
    events = events_of(output, exp, fold)
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def settings_of(output, fold):
    """Return the rows of the table of settings in TensorBoard, without its header."""
    (text,) = (
        e.tensor_proto.string_val[0].decode() for e in events_of(output, fold=fold).Tensors("settings/text_summary")
    )
    return text.splitlines()[2:]


def epochs_of(output, exp="new", fold=0):
    return pd.read_csv(output / exp / f"fold{fold}_epochs.csv")


def check_epochs(curves, epochs, steps):
    """Check that the rows of foldK_epochs.csv are logged, each at the step at which its epoch ended."""
    for column in epochs:
        expected = [(steps * (i + 1), pytest.approx(value, rel=1e-6)) for i, value in enumerate(epochs[column])]
        assert curves[f"epoch/{column}"] == expected, column


def steps_per_epoch(flags):
    folds = pd.read_csv(flags[3] / "prepared" / "folds.csv")
    return (folds.fold != 0).sum() // 8


def warnings_of(*command):
    """Run a script that must succeed. → the lines of its stderr."""
    result = kit(*command)
    assert result.code == 0, result.err
    return result.err.strip().splitlines()


def test_loss_and_learning_rate_of_each_step_are_logged_and_the_model_is_unchanged(flags):
    """The mean loss of the steps is the epoch's."""
    done("01_train_fold.py", *flags, *FOLD)
    untracked = (flags[3] / "new" / "fold0.pt").read_bytes()
    done("01_train_fold.py", *flags, *FOLD, *EACH_STEP, "--track", "tensorboard", "--overwrite")
    assert (flags[3] / "new" / "fold0.pt").read_bytes() == untracked
    assert "track" not in json.loads((flags[3] / "new" / "config.json").read_text())
    curves, epochs, steps = curves_of(flags[3]), epochs_of(flags[3]), steps_per_epoch(flags)
    check_epochs(curves, epochs, steps)
    losses, rates = (dict(curves[f"step/{key}"]) for key in ("loss", "lr"))
    assert [*losses] == [*rates] == [*range(1, 2 * steps + 1)]
    for i, row in epochs.iterrows():
        steps_of_epoch = range(i * steps + 1, (i + 1) * steps + 1)
        assert sum(losses[step] for step in steps_of_epoch) / steps == pytest.approx(row.train_loss, rel=1e-4)
        assert rates[steps_of_epoch[-1]] == pytest.approx(row.lr, rel=1e-6)
    assert len({*losses.values()}) > steps


def test_each_fold_is_a_run_with_settings_and_epochs(flags):
    done("01_train_fold.py", *flags, *FOLD[:-4], "--fold", 0, 1, "--exp", "new", "--track", "tensorboard")
    config = json.loads((flags[3] / "new" / "config.json").read_text())
    assert config["model"] == "test_resnet"
    for fold in (0, 1):
        assert settings_of(flags[3], fold) == [f"| {key} | {value} |" for key, value in config.items()]
        check_epochs(curves_of(flags[3], fold=fold), epochs_of(flags[3], fold=fold), steps_per_epoch(flags))


@pytest.mark.slow
def test_a_killed_fold_continues_its_run_with_each_step_once(flags):
    """The kill comes between two resume files, so that some steps are trained and logged twice."""
    done("01_train_fold.py", *flags, *FOLD[:-1], "unbroken", *EACH_STEP, "--track", "tensorboard")
    unbroken, steps = curves_of(flags[3], "unbroken"), steps_per_epoch(flags)
    killed = """if True:
        import os, runpy, sys
        sys.path.insert(0, {root!r})
        from kit.train import checkpoint, trackers
        note, save = trackers.Track.note, checkpoint.ResumeFile.save
        def note_and_die(self, state, part, values, step):
            note(self, state, part, values, step)
            if part == "step" and step == {last_step}:
                self.opened.log.__closure__[0].cell_contents.flush()
                os._exit(9)
        def save_between_epochs(self, state):
            if state["step"] == 0:
                save(self, state)
        trackers.Track.note = note_and_die
        checkpoint.ResumeFile.save = save_between_epochs
        sys.argv = {argv!r}
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    command = (ROOT / "01_train_fold.py", *flags, *FOLD, *EACH_STEP, "--track", "tensorboard")
    code = killed.format(root=str(ROOT), argv=[str(word) for word in command], last_step=steps + 5)
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 9
    assert [step for step, _ in curves_of(flags[3])["step/loss"]] == [*range(1, steps + 6)], "5 of epoch 2"
    time.sleep(1)  # TensorBoard sorts a run's files by the second in their names
    assert "in epoch 2 after 0 of" in done(*command)
    curves = curves_of(flags[3])
    assert curves.keys() == unbroken.keys()
    for key in curves.keys() - {"epoch/seconds", "epoch/images_per_second"}:
        assert curves[key] == unbroken[key], f"{key}: each step once"
    check_epochs(curves, epochs_of(flags[3]), steps)


@pytest.mark.slow
def test_a_fold_stopped_by_stop_after_continues_its_run(flags):
    command = [str(word) for word in (ROOT / "01_train_fold.py", *flags, *FOLD, "--track", "tensorboard")]
    stopped = subprocess.run([sys.executable, *command, "--stop-after", "0.1s"], capture_output=True, text=True)
    assert stopped.returncode == 75, stopped.stderr
    assert [step for step, _ in curves_of(flags[3])["step/loss"]] == [1]
    time.sleep(1)  # TensorBoard sorts a run's files by the second in their names
    done("01_train_fold.py", *flags, *FOLD, "--track", "tensorboard")
    curves = curves_of(flags[3])
    assert curves["step/loss"][0][0] == 1, "the steps before the stop stay"
    check_epochs(curves, epochs_of(flags[3]), steps_per_epoch(flags))


def test_a_fold_that_starts_over_has_no_curves_of_its_earlier_training(flags):
    done("01_train_fold.py", *flags, *FOLD, "--epochs", 3, "--track", "tensorboard")
    done("01_train_fold.py", *flags, *FOLD, "--track", "tensorboard", "--overwrite")
    check_epochs(curves_of(flags[3]), epochs_of(flags[3]), steps_per_epoch(flags))


def test_a_probe_logs_its_scores(flags, weights):
    done("01_train_fold.py", *flags, *PROBE, "--weights", weights, "--track", "tensorboard")
    curves = curves_of(flags[3], "probe")
    check_epochs(curves, epochs_of(flags[3], "probe"), 0)
    assert "step/loss" not in curves


def test_a_missing_library_is_refused_before_any_training(flags, monkeypatch):
    for name, tracker in trackers.TRACKERS.items():
        monkeypatch.setitem(sys.modules, tracker.module, None)  # importing it raises ImportError
        line = refused("01_train_fold.py", *flags, *FOLD, "--track", name)
        assert f"--track {name} can't be used here" in line
        assert line.endswith(f"pip install {name}")
    assert not (flags[3] / "new").exists()


def test_a_library_that_lacks_a_part_is_refused(flags, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard.compat", None)
    assert refused("01_train_fold.py", *flags, *FOLD, "--track", "tensorboard").endswith("pip install tensorboard")


def test_a_tracker_that_cannot_start_is_one_warning(flags):
    (flags[3] / "tensorboard").write_text("a file where its folder should be")
    warnings = warnings_of("01_train_fold.py", *flags, *FOLD, *EACH_STEP, "--track", "tensorboard")
    assert len(warnings) == 1, warnings
    assert "new/fold0: --track tensorboard failed (" in warnings[0]
    assert len(epochs_of(flags[3])) == 2


def test_a_tracker_that_fails_during_training_is_one_warning(flags, monkeypatch):
    """The tracker is a new one, made of one function and one entry. It changes the global random states, then fails."""
    logged, closed = [], []

    def fragile(fold):
        def log(values, step):
            random.seed(0), np.random.seed(0)
            logged.append((step, values))
            if step > 3:
                raise ConnectionError("gone\nfor good")

        return trackers.TrackerRun("1", log, closed.append)

    monkeypatch.setitem(trackers.TRACKERS, "fragile", trackers.Tracker("json", fragile))
    before = random.getstate()
    np.random.seed(3)
    trackers.Track("fragile", Path("output/new"), 0, {}).note({}, "step", dict(loss=1), 1)
    assert random.getstate() == before
    assert np.random.random() == np.random.RandomState(3).random_sample()
    logged.clear()
    done("01_train_fold.py", *flags, *FOLD)
    untracked = (flags[3] / "new" / "fold0.pt").read_bytes()
    warnings = warnings_of("01_train_fold.py", *flags, *FOLD, *EACH_STEP, "--overwrite", "--track", "fragile")
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    assert warnings == [
        "01_train_fold.py: warning: new/fold0: --track fragile failed (gone). Training goes on without it"
    ]
    assert not closed, "a tracker that has failed isn't called again"
    assert (flags[3] / "new" / "fold0.pt").read_bytes() == untracked


FAKE_WANDB = """
import json, pathlib
CALLS = pathlib.Path(__file__).with_name("calls.jsonl")

def note(*call):
    with open(CALLS, "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    id = "run1"
    def define_metric(self, name, **more):
        note("define", name, more)
    def log(self, values):
        note("log", values)
    def finish(self, exit_code):
        note("finish", exit_code)

def init(**settings):
    note("init", settings)
    return Run()
"""


@pytest.mark.slow
def test_wandb_gets_settings_and_curves_and_continues_its_run_after_a_stop(flags, tmp_path, monkeypatch):
    """A stand-in for the library writes the calls down."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    argv = [sys.executable, *map(str, (ROOT / "01_train_fold.py", *flags, *FOLD, "--track", "wandb"))]
    assert subprocess.run([*argv, "--stop-after", "0.1s"], stdout=subprocess.DEVNULL).returncode == 75
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
    calls = [json.loads(line) for line in (tmp_path / "lib" / "calls.jsonl").read_text().splitlines()]
    starts = [settings for kind, settings, *_ in calls if kind == "init"]
    assert [(start["name"], start["group"], start["id"], start["resume"]) for start in starts] == [
        ("new/fold0", "new", None, None),
        ("new/fold0", "new", "run1", "allow"),
    ]
    assert {start["project"] for start in starts} == {"foldkit"}
    assert starts[0]["config"] == json.loads((flags[3] / "new" / "config.json").read_text())
    assert Path(starts[0]["dir"]) == flags[3]
    curves = {}
    for values in (values for kind, values, *_ in calls if kind == "log"):
        for key in values.keys() - {"step"}:
            curves.setdefault(key, []).append((values["step"], values[key]))
    check_epochs(curves, epochs_of(flags[3]), steps_per_epoch(flags))
    assert [code for kind, code, *_ in calls if kind == "finish"] == [1, 0]
