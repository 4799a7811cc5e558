"""Every code cell of the notebooks, run by IPython with the network off and the two services' folders elsewhere."""

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

# runs the cells of a notebook one after the other, and ends with 1 where a cell or a command in it fails
RUN_CELLS = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(sys.stdin):
    print("In:", cell, flush=True)
    shell.user_ns["_exit_code"] = 0
    if not shell.run_cell(cell).success or shell.user_ns["_exit_code"]:
        sys.exit(1)
"""


def run_notebook(path, folder, flags):
    """Runs a notebook with /kaggle and /content lying in `folder`, and other flags for 01. → what it printed."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    for i, source in enumerate(sources):
        source = re.sub("(?m)^FLAGS = .*", f'FLAGS = "{flags}"', source)
        source = re.sub("(?m)^PREPARE = .*", 'PREPARE = "--folds 2 --size 32"', source)
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
    """The kit's own files, which the services' users upload, as read-only as Kaggle's inputs are."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    folder = tmp_path / "kit"
    for name in files.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_kaggle(toy, tmp_path, kit, monkeypatch):
    """The time is up in the first session, which sees no GPU; the second begins with its output, trains a fold on each
    of two GPUs, and goes on to the submission. The GPUs are only named: each process finds none and takes the CPU."""
    inputs, working = (tmp_path / "kaggle" / name for name in ("input", "working"))
    competition = Path(toy(train=60)[1])
    inputs.mkdir(parents=True)
    competition.rename(inputs / "competition")
    kit.rename(inputs / "foldkit")
    (inputs / "wheels").mkdir()
    (inputs / "weights").mkdir()
    working.mkdir()
    save_file(timm.create_model("test_resnet").state_dict(), inputs / "weights" / "model.safetensors")
    flags = " ".join(TINY).replace("--weights none ", "")
    subprocess.run(["chmod", "-R", "a-w", inputs], check=True)

    first = run_notebook(without_end(tmp_path), tmp_path, f"{flags} --save-minutes 1e-6")
    assert first.count("stopped by --stop-after; run it again to go on from step 1 of 3") == 1
    subprocess.run(["chmod", "u+w", inputs], check=True)
    working.rename(inputs / "earlier")
    working.mkdir()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    out = run_notebook(ROOT / "notebooks" / "kaggle.ipynb", tmp_path, flags)
    assert "is up to date" in out
    assert out.count("goes on in epoch 1 after 1 of 3 steps") == 1
    assert "10 rows, checked" in out
    assert (working / "submission.csv").read_text().count("\n") == 10


def without_end(folder):
    """Kaggle's notebook as far as the training, of which the time is up at once."""
    notebook = json.loads((ROOT / "notebooks" / "kaggle.ipynb").read_text())
    training = next(i for i, cell in enumerate(notebook["cells"]) if "run.sh" in "".join(cell["source"]))
    notebook["cells"] = notebook["cells"][: training + 1]
    command = "".join(notebook["cells"][-1]["source"])
    notebook["cells"][-1]["source"] = command.replace("8.5h", "1s") + "; test $? = 75"
    path = folder / "kaggle.ipynb"
    path.write_text(json.dumps(notebook))
    return path


def test_colab(toy, tmp_path, kit):
    competition, drive = Path(toy(train=60)[1]), tmp_path / "content" / "drive" / "MyDrive"
    drive.mkdir(parents=True)
    competition.rename(drive / "competition")
    kit.rename(drive / "foldkit")
    stub = tmp_path / "stubs" / "google" / "colab"
    stub.mkdir(parents=True)
    (stub / "drive.py").write_text("def mount(folder):\n    print('mounted', folder)\n")
    out = run_notebook(ROOT / "notebooks" / "colab.ipynb", tmp_path, " ".join(TINY))
    assert f"mounted {tmp_path}/content/drive" in out
    assert "10 rows, checked" in out
    assert "report.html" in out


@pytest.mark.parametrize("name", ["kaggle", "colab"])
def test_the_flags_are_those_of_the_kit(name):
    flags = re.search(r'FLAGS = \\"(.*?)\\"', (ROOT / "notebooks" / f"{name}.ipynb").read_text())[1].split()
    config = json.loads(done("01_train_fold.py", "--fold", 0, "--print-config", *flags))
    assert config["batch_size"] * config["accumulate"] == 17
    assert config["model"].startswith("eva02_large")
