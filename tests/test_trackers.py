"""--track: what TensorBoard, MLflow and Weights & Biases are told, read back by their own libraries."""

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
import torchsampler  # noqa: F401 (before MLflow: it can't be imported after importlib_metadata, which that brings)
from conftest import ROOT, TINY, done, kit, refused
from mlflow import MlflowClient
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kit.train import trackers

FOLD = [*TINY, "--fold", 0, "--exp", "new"]
EACH_STEP = ["--save-minutes", "1e-9"]  # saves after each step, and what is saved has been looked at


@pytest.fixture
def flags(trained, tmp_path):
    shutil.copytree(trained.output / "prepared", tmp_path / "output" / "prepared")
    return ["--input", trained.input, "--output", tmp_path / "output"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def from_tensorboard(output, exp="new", fold=0):
    """→ {name: [(step, value), …]} as TensorBoard shows it."""
    events = EventAccumulator(str(output / "tensorboard" / exp / f"fold{fold}"), size_guidance={"scalars": 0}).Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def mlflow_runs(output):
    """→ (the client of OUTPUT/mlruns, {run's name: run}), finished or not."""
    client = MlflowClient(f"sqlite:///{output}/mlruns/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("foldkit").experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return client, {run.info.run_name: run for run in runs}


def from_mlflow(output, exp="new", fold=0):
    client, runs = mlflow_runs(output)
    run = runs[f"{exp}/fold{fold}"].info.run_id
    keys = client.get_run(run).data.metrics
    return {key: [(metric.step, metric.value) for metric in client.get_metric_history(run, key)] for key in keys}


READERS = {"tensorboard": from_tensorboard, "mlflow": from_mlflow}


def epochs_of(output, exp="new", fold=0):
    return pd.read_csv(output / exp / f"fold{fold}_epochs.csv")


def check_epochs(seen, epochs, steps):
    """The rows of fold0_epochs.csv, each beside the step at which its epoch ended."""
    for column in epochs:
        expected = [(steps * (i + 1), pytest.approx(value, rel=1e-6)) for i, value in enumerate(epochs[column])]
        assert seen[f"epoch/{column}"] == expected, column


def steps_of_an_epoch(flags):
    folds = pd.read_csv(flags[3] / "prepared" / "folds.csv")
    return (folds.fold != 0).sum() // 8


@pytest.mark.parametrize("name", READERS)
def test_reads_back_what_was_logged(flags, name):
    """Each step's loss, rate and epoch; the mean loss of the steps is that of the epoch. The model is the same."""
    done("01_train_fold.py", *flags, *FOLD)
    untracked = (flags[3] / "new" / "fold0.pt").read_bytes()
    done("01_train_fold.py", *flags, *FOLD, *EACH_STEP, "--track", name, "--overwrite")
    assert (flags[3] / "new" / "fold0.pt").read_bytes() == untracked
    assert "track" not in json.loads((flags[3] / "new" / "config.json").read_text())
    seen, epochs, steps = READERS[name](flags[3]), epochs_of(flags[3]), steps_of_an_epoch(flags)
    check_epochs(seen, epochs, steps)
    losses, rates = (dict(seen[f"step/{key}"]) for key in ("loss", "lr"))
    assert [*losses] == [*rates] == [*range(1, 2 * steps + 1)]
    for i, row in epochs.iterrows():
        own = range(i * steps + 1, (i + 1) * steps + 1)
        assert sum(losses[step] for step in own) / steps == pytest.approx(row.train_loss, rel=1e-4)
        assert rates[own[-1]] == pytest.approx(row.lr, rel=1e-6)
    assert len({*losses.values()}) > steps


def test_settings_and_state_in_mlflow(flags):
    done("01_train_fold.py", *flags, *FOLD[:-4], "--fold", 0, 1, "--exp", "new", "--track", "mlflow")
    _, runs = mlflow_runs(flags[3])
    assert {name: run.info.status for name, run in runs.items()} == {"new/fold0": "FINISHED", "new/fold1": "FINISHED"}
    params = runs["new/fold1"].data.params
    config = json.loads((flags[3] / "new" / "config.json").read_text())
    assert params == {key: str(value) for key, value in config.items()}
    for fold in (0, 1):
        check_epochs(from_mlflow(flags[3], fold=fold), epochs_of(flags[3], fold=fold), steps_of_an_epoch(flags))


def test_settings_in_tensorboard(flags):
    done("01_train_fold.py", *flags, *FOLD, "--track", "tensorboard")
    events = EventAccumulator(str(flags[3] / "tensorboard" / "new" / "fold0")).Reload()
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("settings/text_summary"))
    assert "| model | test_resnet |" in text
    assert "| lr | 0.003 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_goes_on_in_the_same_run_after_a_kill(flags, name):
    """Killed between two resume files, so that some steps are trained and logged twice."""
    done("01_train_fold.py", *flags, *FOLD[:-1], "whole", *EACH_STEP, "--track", name)
    whole = READERS[name](flags[3], "whole")
    killed = """if True:
        import os, runpy, sys
        sys.path.insert(0, {root!r})
        from kit import resume, watch
        watch.LOOK_SECONDS = -1
        look = watch.Watch.look
        def look_and_die(self, step):
            look(self, step)
            if self.state["epoch"] == 2 and step == 4:
                if self.run.track.name == "tensorboard":
                    self.run.track.opened.log.__closure__[0].cell_contents.flush()
                os._exit(9)
        resume.ResumeFile.due = lambda self: False
        watch.Watch.look = look_and_die
        sys.argv = {argv!r}
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    argv = [str(word) for word in (ROOT / "01_train_fold.py", *flags, *FOLD, "--track", name)]
    code = killed.format(root=str(ROOT), argv=argv)
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 9
    steps = steps_of_an_epoch(flags)
    assert [step for step, _ in READERS[name](flags[3])["step/loss"]] == [*range(1, steps + 6)], "5 of epoch 2"
    time.sleep(1)  # TensorBoard sorts a run's files by the second in their names, and no process starts in less
    out = done("01_train_fold.py", *flags, *FOLD, *EACH_STEP, "--track", name)
    assert "goes on in epoch 2 after 0" in out
    seen = READERS[name](flags[3])
    assert seen.keys() == whole.keys()
    for key in seen.keys() - {"epoch/seconds", "epoch/images_per_second"}:
        assert seen[key] == whole[key], f"{key}: each step once"
    check_epochs(seen, epochs_of(flags[3]), steps)


@pytest.mark.parametrize("name", READERS)
def test_a_fold_that_begins_anew_has_no_curves_of_the_old_one(flags, name):
    done("01_train_fold.py", *flags, *FOLD, "--epochs", 3, "--track", name)
    if name == "mlflow":
        client, runs = mlflow_runs(flags[3])
        client.delete_run(runs["new/fold0"].info.run_id)  # or from_mlflow would see two of the name
    done("01_train_fold.py", *flags, *FOLD, "--track", name, "--overwrite")
    check_epochs(READERS[name](flags[3]), epochs_of(flags[3]), steps_of_an_epoch(flags))


@pytest.mark.slow
def test_stop_after_closes_the_run_and_goes_on_in_it(flags):
    argv = [str(w) for w in (ROOT / "01_train_fold.py", *flags, *FOLD, "--track", "mlflow")]
    stopped = subprocess.run([sys.executable, *argv, "--stop-after", "0.1s"], capture_output=True, text=True)
    assert stopped.returncode == 75, stopped.stderr
    _, runs = mlflow_runs(flags[3])
    assert runs["new/fold0"].info.status == "KILLED"
    done("01_train_fold.py", *flags, *FOLD, "--track", "mlflow")
    _, runs = mlflow_runs(flags[3])
    assert [*runs] == ["new/fold0"]
    assert runs["new/fold0"].info.status == "FINISHED"
    check_epochs(from_mlflow(flags[3]), epochs_of(flags[3]), steps_of_an_epoch(flags))


def test_a_missing_library_is_refused_before_any_training(flags, tmp_path, monkeypatch):
    for name in trackers.TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
        line = refused("01_train_fold.py", *flags, *FOLD, "--track", name)
        assert f"--track {name} can't be used here" in line
        assert line.endswith(f"pip install {name}")
    assert not (flags[3] / "new").exists()


def test_a_database_that_mlflow_skinny_lacks_is_refused(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    assert refused("01_train_fold.py", *flags, *FOLD, "--track", "mlflow").endswith("pip install mlflow")


def test_a_server_that_is_gone_is_one_warning(flags, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings = warned("01_train_fold.py", *flags, *FOLD, *EACH_STEP, "--track", "mlflow")
    assert len(warnings) == 1, warnings
    assert "new/fold0: --track mlflow failed (" in warnings[0]
    assert len(epochs_of(flags[3])) == 2
    assert not (flags[3] / "mlruns").exists()


def test_a_tracker_that_fails_in_the_middle_is_one_warning(flags, monkeypatch):
    """A new one, by one function and one entry, which reaches for the training's random numbers and then breaks."""
    seen, closed = [], []

    def fragile(fold):
        def log(values, step):
            random.seed(0), np.random.seed(0)
            seen.append((step, values))
            if step > 3:
                raise ConnectionError("gone\nfor good")

        return trackers.Opened("1", log, closed.append)

    monkeypatch.setitem(trackers.TRACKERS, "fragile", trackers.Tracker("json", fragile))
    before = random.getstate()
    np.random.seed(3)
    trackers.Track("fragile", Path("output/new"), 0, {}).note({}, "step", dict(loss=1), 1)
    assert random.getstate() == before
    assert np.random.random() == np.random.RandomState(3).random_sample()
    seen.clear()
    done("01_train_fold.py", *flags, *FOLD)
    untracked = (flags[3] / "new" / "fold0.pt").read_bytes()
    warnings = warned("01_train_fold.py", *flags, *FOLD, *EACH_STEP, "--overwrite", "--track", "fragile")
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert warnings == [
        "01_train_fold.py: warning: new/fold0: --track fragile failed (gone). Training goes on without it"
    ]
    assert not closed, "what has failed isn't asked again"
    assert (flags[3] / "new" / "fold0.pt").read_bytes() == untracked


def warned(*command):
    """Runs a script that must succeed. → the lines of its stderr."""
    result = kit(*command)
    assert result.code == 0, result.err
    return result.err.strip().splitlines()


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
def test_wandb_is_told_and_goes_on(flags, tmp_path, monkeypatch):
    """By a stand-in for the library that writes down the calls."""
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
    assert starts[0]["config"]["model"] == "test_resnet"
    assert Path(starts[0]["dir"]) == flags[3]
    logged = [values for kind, values, *_ in calls if kind == "log"]
    epochs, steps = epochs_of(flags[3]), steps_of_an_epoch(flags)
    seen = {}
    for values in logged:
        for key in values.keys() - {"step"}:
            seen.setdefault(key, []).append((values["step"], values[key]))
    check_epochs(seen, epochs, steps)
    assert [code for kind, code, *_ in calls if kind == "finish"] == [1, 0]


def test_a_probe_logs_its_scores(flags, weights):
    done("01_train_fold.py", *flags, *PROBE, "--weights", weights, "--track", "tensorboard")
    seen, epochs = from_tensorboard(flags[3], "probe"), epochs_of(flags[3], "probe")
    check_epochs(seen, epochs, 0)
    assert "step/loss" not in seen


PROBE = "--model test_resnet --size 32 --batch-size 8 --tune probe --head fresh --fold 0 --exp probe".split()


@pytest.fixture
def weights(tmp_path):
    """A file of weights, as if they were pretrained."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"
