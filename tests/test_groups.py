"""00_prepare.py --groups: duplicates stay in one fold, and what was found is printed and written."""

import json
from types import SimpleNamespace

from common import UserError

import numpy as np
import pandas as pd
import pytest
from bench.duplicates import drawn, with_copies
from conftest import done, png, refused, toy_image, write_csv, write_zip
from PIL import Image

from kit.data.prepared import Flags
from kit.folds import duplicates
from kit.folds.split import given_groups

TRAIN, TEST, SHARED = 75, 15, 6  # images; of the test images, those whose source may be in train


def competition(folder):
    """Write 30 sources × 3 copies, of which one training image has the wrong label. → the source of each training and
    test image, and the name of the wrong one."""
    images, source = with_copies(drawn(30), 2, np.random.default_rng(2))
    order = np.random.default_rng(0).permutation(TRAIN + SHARED)  # 27 sources
    train, test = order[:TRAIN], np.concatenate([order[TRAIN:], np.arange(TRAIN + SHARED, TRAIN + TEST)])
    labels = [int(source[i] % 2) for i in train]
    wrong = next(k for k, i in enumerate(train) if (source[train] == source[i]).sum() == 3)
    labels[wrong] = 1 - labels[wrong]
    names = [f"{k:04}.png" for k in range(TRAIN)]
    folder.mkdir()
    write_zip(folder / "train.zip", {name: png(images[i]) for name, i in zip(names, train, strict=True)})
    write_zip(folder / "test.zip", {f"t{k:04}.png": png(images[i]) for k, i in enumerate(test)})
    rows = zip(names, labels, source[train], strict=True)
    write_csv(folder / "train.csv", [("image_name", "label", "product"), *rows])
    write_csv(folder / "sample_submit.csv", [(f"t{k:04}.png", 0) for k in range(TEST)])
    return SimpleNamespace(train=source[train], test=source[test], wrong=names[wrong])


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Prepare that competition with --groups auto."""
    folder = tmp_path_factory.mktemp("grouped")
    sources = competition(folder / "input")
    flags = ["--input", folder / "input", "--output", folder / "output", "--size", 32]
    out = done("00_prepare.py", *flags)
    return SimpleNamespace(flags=flags, out=out, prepared=folder / "output" / "prepared", **vars(sources))


def test_duplicates_stay_in_one_fold_and_folds_are_balanced(grouped):
    folds = pd.read_csv(grouped.prepared / "folds.csv")
    assert folds.groupby("group").fold.nunique().max() == 1
    split = folds.groupby(grouped.train).fold.nunique() > 1
    assert split.mean() < 0.05, "sources over several folds"
    counts = pd.crosstab(folds.fold, folds.label)
    largest = folds.group.value_counts().max()
    # whole groups can't be assigned more evenly than this; the one with the wrong label counts in both classes
    assert (counts.max() - counts.min() <= largest + 1).all()


def test_duplicates_and_label_conflicts_are_printed_and_written(grouped):
    counts = json.loads((grouped.prepared / "prepared.json").read_text())["duplicates"]
    alone = np.bincount(grouped.train)[grouped.train] == 1
    assert counts["train_with_duplicate"] == pytest.approx(1 - alone.mean(), abs=0.03)
    assert counts["test_with_duplicate"] == pytest.approx(np.isin(grouped.test, grouped.train).mean(), abs=0.07)
    (conflict,) = [names for names in counts["conflicts"] if grouped.wrong in names]
    for line in duplicates.duplicate_lines(counts):
        assert line in grouped.out
    table = pd.read_csv(grouped.prepared / "duplicates.csv", dtype=str, keep_default_na=False)
    group = table[table.group == table.group[table.image_name == grouped.wrong].item()]
    assert group.image_name[group.part == "train"].tolist() == conflict
    assert (group.labels_disagree == "1").all()
    assert set(table.part) == {"train", "test"}
    assert min(Image.open(grouped.prepared / "duplicates.png").size) > 500


def test_with_fewer_than_40_test_images_auto_only_keeps_duplicates_together(grouped):
    """tests/test_matching.py has the competitions with more."""
    assert json.loads((grouped.prepared / "prepared.json").read_text())["candidates"] is None
    assert not (grouped.prepared / "matched.png").exists()
    listed, folds = (pd.read_csv(grouped.prepared / name) for name in ("duplicates.csv", "folds.csv"))
    listed = listed[listed.part == "train"].set_index("image_name").group
    groups = folds.set_index("image_name").group[listed.index]
    assert (groups.groupby(listed).nunique() == 1).all()
    assert (folds.groupby("group").size() > 1).sum() == (listed.value_counts() > 1).sum()


def test_groups_by_column_file_and_none(grouped, tmp_path):
    flags = [*grouped.flags, "--output", tmp_path / "output", "--overwrite"]
    folds = tmp_path / "output" / "prepared" / "folds.csv"
    done("00_prepare.py", *flags, "--groups", "product")
    by_column = pd.read_csv(folds)
    assert (by_column.groupby(grouped.train).fold.nunique() == 1).all()
    path = tmp_path / "groups.csv"
    write_csv(path, [("image_name", "group"), *((f"{k:04}.png", f"p{s}") for k, s in enumerate(grouped.train))])
    done("00_prepare.py", *flags, "--groups", path)
    assert pd.read_csv(folds).fold.tolist() == by_column.fold.tolist()
    out = done("00_prepare.py", *flags, "--groups", "none")
    assert (pd.read_csv(folds).groupby(grouped.train).fold.nunique() > 1).any()
    assert "have a duplicate" not in out
    assert not folds.with_name("duplicates.csv").exists()


def test_groups_that_cannot_be_used_are_refused(grouped, tmp_path):
    flags, path = [*grouped.flags, "--output", tmp_path / "output", "--groups"], tmp_path / "groups.csv"
    assert "no such column" in refused("00_prepare.py", *flags, "brand")
    write_csv(path, [("image_name", "group"), ("0000.png", 1)])
    assert "no group for 0001.png" in refused("00_prepare.py", *flags, path)
    write_csv(path, [("image_name", "group"), *((f"{k:04}.png", k % 2) for k in range(TRAIN))])
    assert "only 2 groups of images" in refused("00_prepare.py", *flags, path)


def test_group_pattern_joins_the_names_in_which_it_finds_the_same_text():
    def groups(pattern):
        return given_groups(Flags(group_pattern=pattern), ["a1.png", "a2.png", "b1.png"], None, None).tolist()

    assert groups("^[a-z]") == [0, 0, 1]
    assert groups(r"([0-9])\.png") == [0, 1, 0]
    refusals = {
        "(": "is no regular expression",
        "^a": "finds nothing in b1.png",
        "(a)?[.12]": "finds nothing in b1.png",
    }
    for pattern, words in refusals.items():
        with pytest.raises(UserError, match=words):
            groups(pattern)


def test_images_that_are_all_copies_of_one_source_are_refused(toy):
    flags, content = toy(), png(toy_image(np.random.default_rng(0), 0))
    write_zip(flags[1] / "train.zip", {f"train/{i:04}.png": content for i in range(40)})
    line = refused("00_prepare.py", *flags, "--size", 32)
    assert "all images look like copies of one source (same part, same camera?): give --groups none" in line
    done("00_prepare.py", *flags, "--size", 32, "--groups", "none")


def test_candidate_pairs_by_the_features_of_a_timm_model(grouped, tmp_path, monkeypatch):
    """The model's features, one row of unit length for each image, replace words and colours."""
    compared, candidate_pairs = [], duplicates.candidate_pairs

    def spy(records, vectors):
        compared.append(np.array(vectors))
        return candidate_pairs(records, vectors)

    monkeypatch.setattr(duplicates, "candidate_pairs", spy)
    flags = [*grouped.flags, "--output", tmp_path / "output", "--limit", 30, "--folds", 2]
    done("00_prepare.py", *flags, "--embed", "test_resnet", "--weights", "none")
    prepared = tmp_path / "output" / "prepared"
    (embedding,) = compared
    assert len(embedding) == sum(len(pd.read_csv(prepared / name)) for name in ("folds.csv", "test.csv"))
    assert embedding.shape[1] != duplicates.VECTOR
    assert np.linalg.norm(embedding, axis=1) == pytest.approx(1, abs=1e-5)
    assert len(np.unique(embedding.round(6), axis=0)) > 0.9 * len(embedding)
    assert json.loads((prepared / "prepared.json").read_text())["groups"] == "auto by test_resnet none"
