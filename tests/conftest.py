"""Runs the kit's scripts as a user does, and builds small competitions for them."""

import contextlib
import csv
import gc
import importlib.util
import io
import os
import runpy
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from kit.data.decode import read_picture  # noqa: E402

# Ctrl-C reaches the tested commands also where the suite runs in the background, whose children would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A small model from scratch that learns within seconds, for whatever needs a trained fold.
TINY = "--model test_resnet --weights none --size 32 --epochs 2 --batch-size 8 --lr 3e-3 --min-lr 3e-4".split()


def kit(script, *arguments):
    """Runs a script in this process as `python script arguments` would. → code, out, err.

    The same as a process of its own, without the seconds that importing torch takes each time.
    """
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [str(ROOT / script), *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        gc.enable()  # a script leaves it off, since its process ends
        for number, handler in handlers.items():  # as they were, for the pytest around it
            signal.signal(number, handler)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def done(script, *arguments):
    """Runs a script that must succeed. → its output."""
    result = kit(script, *arguments)
    assert result.code == 0, f"{script} {arguments}: {result.err}"
    return result.out


def refused(script, *arguments):
    """Runs a script that must refuse with exit code 2 and one line. → that line."""
    result = kit(script, *arguments)
    assert result.code == 2, (result.code, result.out, result.err)
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith(f"{script}: error: "), lines
    return lines[0]


def prepare(flags, size=32, *more):
    """00 on plain folds, for tests whose subject is something else."""
    return done("00_prepare.py", *flags, "--size", size, "--groups", "none", *more)


def load(script):
    """Imports a numbered script, to test a function of it."""
    name = script.removesuffix(".py").split("_", 1)[1]
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sh(*flags, **environment):
    """A running run.sh, in a session of its own: two folds."""
    return subprocess.Popen(
        ["bash", str(ROOT / "run.sh"), *map(str, flags)],
        env={**os.environ, "PYTHON": sys.executable, "PREPARE": "--folds 2", "INFER": "--batch-size 64", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def decode(data, bands=None):
    """→ the bytes of an image file as uint8 [H, W, 3]."""
    return read_picture(data, bands).pixels


def png(array):
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    return data.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_csv(path, rows, **options):
    with open(path, "w", newline="", **{"encoding": "utf-8", **options}) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def toy_image(rng, label, side=24):
    """A noisy picture with a bright bar (label 0) or without (label 1): easy, at any quarter turn."""
    image = rng.integers(0, 90, (side, side, 3))
    if label == 0:
        image[:, side // 2 - 3 : side // 2 + 3] += 140
    return image.astype(np.uint8)


@pytest.fixture
def toy(tmp_path):
    """A function that writes a competition of toy images and returns its --input and --output flags."""

    def build(train=40, test=10, folder="input"):
        rng = np.random.default_rng(0)
        path = tmp_path / folder
        path.mkdir()
        labels = [i % 2 for i in range(train)]
        names = [f"{i:04}.png" for i in range(train)]
        write_zip(
            path / "train.zip", {f"train/{n}": png(toy_image(rng, y)) for n, y in zip(names, labels, strict=True)}
        )
        tests = [f"t{i:03}.png" for i in range(test)]
        write_zip(path / "test.zip", {f"test/{n}": png(toy_image(rng, i % 2)) for i, n in enumerate(tests)})
        write_csv(path / "train.csv", [("image_name", "label"), *zip(names, labels, strict=True)])
        write_csv(path / "sample_submit.csv", [(n, 0.5) for n in tests])
        return ["--input", path, "--output", tmp_path / "output"]

    return build


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The drawn demo at a small size, prepared in three folds and trained. → flags and folders, for reading only."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--input", folder / "input", "--output", folder / "output"]
    drawing = load_path(ROOT / "input" / "make_demo.py")
    run_main(
        drawing, "--folder", folder / "input", "--products", 60, "--test-products", 12, "--copies", 2, "--side", 48
    )
    done("00_prepare.py", *flags, "--size", 32, "--folds", 3)
    done("01_train_fold.py", *flags, *TINY, "--fold", "all")
    return SimpleNamespace(
        flags=flags, output=folder / "output", input=folder / "input", base=folder / "output" / "base"
    )


def load_path(path):
    """Imports a module by its path; it stays in sys.modules, so that worker processes find its functions."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_main(module, *arguments):
    argv = sys.argv
    sys.argv = [module.__file__, *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = argv


from small_models import no_pictures, of_classes, resnet, vit, weights, worlds  # noqa: E402, F401 (fixtures)
