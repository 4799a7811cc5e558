"""Damage to a competition's files, and the check that a script that refuses them changes nothing."""

import numpy as np
from conftest import done, png, refused, toy_image, write_csv, write_zip

PREPARE = ["--size", 32, "--folds", 2, "--groups", "none"]


def build_world(folder):
    """Writes a competition of 24 training and 4 test images into folder/input, and prepares it into folder/output."""
    rng = np.random.default_rng(0)
    (folder / "input").mkdir()
    names = [f"{i:04}.png" for i in range(24)]
    images = {f"train/{name}": png(toy_image(rng, i % 2)) for i, name in enumerate(names)}
    write_zip(folder / "input" / "train.zip", images)
    write_zip(folder / "input" / "test.zip", {f"test/t{i}.png": png(toy_image(rng, i % 2)) for i in range(4)})
    write_csv(folder / "input" / "train.csv", [("image_name", "label"), *((n, i % 2) for i, n in enumerate(names))])
    write_csv(folder / "input" / "sample_submit.csv", [(f"t{i}.png", 0.5) for i in range(4)])
    done("00_prepare.py", *flags_of(folder), *PREPARE)


def flags_of(folder):
    return ["--input", folder / "input", "--output", folder / "output"]


def snapshot(folder):
    """→ the bytes of every file except lock files, which name their last holder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    return {
        str(path): path.read_bytes() if path.exists() else b"dead link"
        for path in files
        if not path.name.endswith("lock")
    }


def refused_untouched(folder, script, *flags):
    """Runs a script that must refuse, and must change nothing in the folder. → its one line."""
    before = snapshot(folder)
    line = refused(script, *flags_of(folder), *flags)
    assert snapshot(folder) == before, "something was written, changed or removed"
    return line


def edited(name, change):
    """→ a function that changes the text of a file by `change`."""

    def damage(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return damage


def without(name):
    return lambda folder: (folder / name).unlink()
