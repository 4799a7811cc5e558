"""The notebooks: every code cell, run by IPython with the network off and the two services' folders elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from conftest import ROOT, TINY, done
from safetensors.torch import save_file

# Runs the cells of a notebook one after the other; ends with 1 where a cell or a command in it fails. 75: time is up.
RUN_CELLS = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(sys.stdin):
    print("In:", cell, flush=True)
    shell.user_ns["_exit_code"] = 0
    if not shell.run_cell(cell).success or shell.user_ns["_exit_code"] not in (0, 75):
        sys.exit(1)
"""


def run_notebook(name, folder, flags, **changes):
    """Run a notebook with /kaggle and /content in `folder`, and other flags for 01. → what it printed.

    changes: other values of the variables that the notebook sets."""
    cells = json.loads((ROOT / "notebooks" / name).read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    changes |= dict(FLAGS=flags, PREPARE="--folds 2 --size 32 --groups none")
    for i, source in enumerate(sources):
        for variable, value in changes.items():
            source = re.sub(f"(?m)^{variable} = .*", f"{variable} = {value!r}", source)
        sources[i] = source.replace("/kaggle/", f"{folder}/kaggle/").replace("/content/", f"{folder}/content/")
    no_network = ["unshare", "--net"] if subprocess.run(["unshare", "--net", "true"]).returncode == 0 else []
    process = subprocess.run(
        [*no_network, sys.executable, "-c", RUN_CELLS],
        input=json.dumps(sources),
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(folder / "stubs")}
        | {"IPYTHONDIR": str(folder / "ipython"), "HTTPS_PROXY": "http://127.0.0.1:9"},
        text=True,
        capture_output=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture
def kit(tmp_path):
    """Copy the kit's own files, which the services' users upload. → their folder."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    folder = tmp_path / "kit"
    for name in filter(lambda name: (ROOT / name).exists(), files.stdout.splitlines()):  # git still lists deleted ones
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def names(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_kaggle_trains_in_two_sessions_and_predicts_a_hidden_test_set(toy, tmp_path, kit, monkeypatch):
    """The first session, which sees no GPU, has time for fold 0 only. The second one begins with its output, trains
    fold 1 and writes the submission; its two GPUs are only named, so each process takes the CPU."""
    inputs, working, scratch = (tmp_path / "kaggle" / name for name in ("input", "working", "tmp"))
    competition = Path(toy(train=60)[1])
    inputs.mkdir(parents=True)
    competition.rename(inputs / "competition")
    kit.rename(inputs / "foldkit")
    (inputs / "wheels").mkdir()
    (inputs / "weights").mkdir()
    working.mkdir()
    weights = inputs / "weights" / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    flags = " ".join(TINY).replace("--weights none ", "")
    subprocess.run(["chmod", "-R", "a-w", inputs], check=True)

    # Fold 0 is finished before the first session, so that the time is up within fold 1, at any speed of the machine.
    folders = ["--input", inputs / "competition", "--output", scratch / "output"]
    done("00_prepare.py", *folders, "--folds", 2, "--size", 32, "--groups", "none")
    done("01_train_fold.py", *folders, *TINY, "--weights", weights, "--fold", 0)
    first = run_notebook("kaggle.ipynb", tmp_path, flags, HOURS=0)
    assert first.count("stopped by --stop-after; run it again to resume after 1 of 3 steps") == 1
    assert "fold1.resume.pt" in names(scratch)
    kept = names(working)
    assert {"prepared.json", "folds.csv", "samples.png", "fold0.pt", "fold0.csv", "fold0.json", "config.json"} <= kept
    assert not [name for name in kept if re.fullmatch(r"(train|test)_\d+\.npy|.*\.resume\.pt|\..*", name)]

    shutil.rmtree(scratch)
    subprocess.run(["chmod", "u+w", inputs], check=True)
    working.rename(inputs / "earlier")
    working.mkdir()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    there = "/kaggle/input/competition/"
    hidden = f"--test-images {there}test.zip --sample-submit {there}sample_submit.csv"
    out = run_notebook("kaggle.ipynb", tmp_path, flags, HIDDEN=hidden)
    assert "fold 0 of base is finished" in out
    assert "fold 0 epoch" not in out
    assert "fold 1 epoch 2/2" in out
    assert out.count("10 rows, checked") == 2, "the test set, and once more as a hidden one"
    assert {"fold1.pt", "fold0_test.npy", "report.html"} <= names(working)
    assert (working / "submission.csv").read_text().count("\n") == 10


@pytest.mark.slow
def test_colab_trains_and_finds_its_folds_in_the_drive_again(toy, tmp_path, kit):
    """A session trains all folds; a second one, on a new machine, finds all of them in the Drive."""
    competition, drive = Path(toy(train=60)[1]), tmp_path / "content" / "drive" / "MyDrive"
    drive.mkdir(parents=True)
    competition.rename(drive / "competition")
    kit.rename(drive / "foldkit")
    stub = tmp_path / "stubs" / "google" / "colab"
    stub.mkdir(parents=True)
    (stub / "drive.py").write_text("def mount(folder):\n    print('mounted', folder)\n")
    out = run_notebook("colab.ipynb", tmp_path, " ".join(TINY))
    assert f"mounted {tmp_path}/content/drive" in out
    assert out.count("kept epoch") == 2
    assert "10 rows, checked" in out
    assert {"fold0.pt", "fold1.pt", "fold1_test.npy", "report.html"} <= names(drive / "output")
    assert not {"train_32.npy", "test_32.npy"} & names(drive / "output")

    shutil.rmtree(tmp_path / "content" / "output")
    model = drive / "output" / "base" / "fold0.pt"
    before = model.stat().st_ino
    out = run_notebook("colab.ipynb", tmp_path, " ".join(TINY))
    assert "fold 0 of base is finished" in out
    assert "fold 1 of base is finished" in out
    assert out.count("predicted earlier") == 2
    assert model.stat().st_ino == before, "a file in the Drive must not be replaced by the same file"


@pytest.mark.parametrize("name", ["kaggle", "colab"])
def test_01_accepts_the_flags_and_batches_hold_17_images(name):
    flags = re.search(r'FLAGS = \\"(.*?)\\"', (ROOT / "notebooks" / f"{name}.ipynb").read_text())[1].split()
    config = json.loads(done("01_train_fold.py", "--fold", 0, "--print-config", *flags))
    assert config["batch_size"] * config["accumulate"] == 17
    assert config["model"].startswith("eva02_large")
