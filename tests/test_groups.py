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
from kit.data.tables import Table
from kit.folds import duplicates
from kit.folds.split import assign_folds, given_groups

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


@pytest.mark.slow
def test_groups_by_column_file_and_none(grouped, tmp_path):
    flags = [*grouped.flags, "--output", tmp_path / "output", "--overwrite"]
    folds = tmp_path / "output" / "prepared" / "folds.csv"
    out = done("00_prepare.py", *flags, "--groups", "product")
    by_column = pd.read_csv(folds)
    assert (by_column.groupby(grouped.train).fold.nunique() == 1).all()
    assert "are joined" not in out, "all copies are of one product"
    path = tmp_path / "groups.csv"
    write_csv(path, [("image_name", "group"), *((f"{k:04}.png", f"p{s}") for k, s in enumerate(grouped.train))])
    done("00_prepare.py", *flags, "--groups", path)
    assert pd.read_csv(folds).fold.tolist() == by_column.fold.tolist()
    out = done("00_prepare.py", *flags, "--groups", "none")
    assert (pd.read_csv(folds).groupby(grouped.train).fold.nunique() > 1).any()
    assert "have a duplicate" not in out
    assert not folds.with_name("duplicates.csv").exists()


def unlike_images(count, seed=0):
    """Return textured pictures of 48 px, no two alike."""
    rng = np.random.default_rng(seed)
    return [np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize((48, 48), 3))
            for _ in range(count)]  # fmt: skip


def write_competition(folder, images, labels, tests=(), **columns):
    """Write a competition of these images; columns: {name: cells} that train.csv has too. → its flags."""
    names = [f"{k:03}.png" for k in range(len(images))]
    (folder / "input").mkdir()
    tests = [*tests] or unlike_images(4, 99)
    write_zip(folder / "input" / "train.zip", {name: png(image) for name, image in zip(names, images, strict=True)})
    write_zip(folder / "input" / "test.zip", {f"t{k:03}.png": png(image) for k, image in enumerate(tests)})
    rows = zip(names, labels, *columns.values(), strict=True)
    write_csv(folder / "input" / "train.csv", [("image_name", "label", *columns), *rows])
    write_csv(folder / "input" / "sample_submit.csv", [(f"t{k:03}.png", 0.5) for k in range(len(tests))])
    return ["--input", folder / "input", "--output", folder / "output", "--size", 32]


def folds_of(flags):
    """Return folds.csv."""
    return pd.read_csv(flags[3] / "prepared" / "folds.csv", dtype=dict(label=str))


def counts_of(flags):
    """Return what prepared.json keeps of duplicates."""
    return json.loads((flags[3] / "prepared" / "prepared.json").read_text())["duplicates"]


@pytest.fixture
def patients(tmp_path):
    """Write 30 pictures twice each, the second time as another patient's, the last ten turned. → the flags."""
    images = unlike_images(30)
    copies = [image if k < 20 else np.ascontiguousarray(np.rot90(image)) for k, image in enumerate(images)]
    columns = dict(patient=[f"p{k}" for k in range(60)])
    return write_competition(tmp_path, images + copies, [k % 2 for k in range(30)] * 2, **columns)


@pytest.mark.parametrize(
    "how", [["--groups", "patient"], ["--groups", "FILE"], ["--group-pattern", "^[0-9]+"],
            ["--groups", "copies", "--group-pattern", "^[0-9]+"]], ids=" ".join
)  # fmt: skip
def test_given_groups_are_joined_with_the_copies_found(patients, how):
    if "FILE" in how:
        write_csv(patients[1] / "groups.csv", [("image_name", "group"), *((f"{k:03}.png", k) for k in range(60))])
        how = ["--groups", "groups.csv"]
    out = done("00_prepare.py", *patients, *how)
    folds = folds_of(patients)
    assert folds.group.tolist() == [*range(30)] * 2
    assert folds.fold[:30].tolist() == folds.fold[30:].tolist()
    assert counts_of(patients)["joined"] == [20, 10]
    assert "different groups held 20 identical pairs and 10 near copies, and are joined" in out


def test_groups_none_with_a_pattern_searches_for_no_copies(patients):
    out = done("00_prepare.py", *patients, "--groups", "none", "--group-pattern", "^[0-9]+")
    assert folds_of(patients).group.tolist() == [*range(60)]
    assert counts_of(patients) is None
    assert "duplicate" not in out


def test_a_column_and_a_pattern_are_joined(tmp_path):
    """Each patient has two images in turn, but two have none; the last digit joins images 0 and 10, 1 and 11, …"""
    patient = [k // 2 if k not in (12, 13) else "" for k in range(20)]
    flags = write_competition(tmp_path, unlike_images(20), [0, 1] * 10, patient=patient)
    done("00_prepare.py", *flags, "--folds", 3, "--groups", "patient")
    assert folds_of(flags).group.nunique() == 11
    done(
        "00_prepare.py", *flags, "--folds", 3, "--groups", "patient", "--group-pattern", r"([0-9])\.png", "--overwrite"
    )
    assert folds_of(flags).group.tolist() == [k // 2 for k in range(10)] * 2


@pytest.mark.parametrize("how", [[], ["--groups", "copies"]])
def test_copies_of_a_rare_class_stay_in_one_fold(tmp_path, how):
    """12 sources of four copies, and a class of one source, twice. Beside 40 other test images, folds are matched."""
    images = [np.ascontiguousarray(np.rot90(image, turn)) for image in unlike_images(42) for turn in range(4)]
    source, labels = np.arange(168) // 4, [*"abc"[:2] * 82, *"rrrr"]
    flags = write_competition(tmp_path, images[:166], labels[:166], unlike_images(40, 1))
    write_csv(
        flags[1] / "sample_submit.csv", [("image_name", *"abr"), *((f"t{k:03}.png", 0.3, 0.3, 0.4) for k in range(40))]
    )
    out = done("00_prepare.py", *flags, *how)
    assert (folds_of(flags).groupby(source[:166]).fold.nunique() == 1).all()
    assert counts_of(flags)["split"] == 0
    assert "duplicates stay in one fold" in out


def test_a_class_of_fewer_sources_than_folds_is_refused_and_duplicates_png_stays(tmp_path):
    """Its copies must not be spread over the folds instead."""
    sources = unlike_images(64)
    images = [np.ascontiguousarray(np.rot90(image, turn)) for image in sources[:4] for turn in range(4)] + sources[4:]
    flags = write_competition(tmp_path, images, [1] * 16 + [0] * 60, unlike_images(40, 1))
    line = refused("00_prepare.py", *flags)
    picture = flags[3] / "prepared" / "duplicates.png"
    assert (
        f"--folds 5: a fold lacks 1 (images: 16, groups: 4): lower it, add images, or see --groups; see {picture}"
        in line
    )
    assert min(Image.open(picture).size) > 500
    assert not (flags[3] / "prepared" / "prepared.json").exists()
    done("00_prepare.py", *flags, "--folds", 4)
    assert (folds_of(flags)[:16].groupby(np.arange(16) // 4).fold.nunique() == 1).all()


def boards(count, number, rng):
    """Return shots of `count` boards under one camera, in turn."""
    shots = [part + rng.normal(0, 4, part.shape) for part in unlike_images(count, 7)]
    return [np.clip(shots[k % count] * rng.uniform(0.9, 1.1), 0, 255).astype(np.uint8) for k in range(number)]


@pytest.mark.parametrize(
    ("count", "words"),
    [(1, "copies of one source (same part, same camera?), too few"), (4, "copies of 4 sources (same part, same"),
     (12, "12 sources are in several folds, as in the test set")],
)  # fmt: skip
def test_few_sources_get_plain_folds_and_a_warning(tmp_path, count, words):
    rng = np.random.default_rng(0)
    labels = [k // count % 2 for k in range(60)]
    flags = write_competition(tmp_path, boards(count, 60, rng), labels, boards(count, 24, rng))
    out = done("00_prepare.py", *flags)
    assert words in " ".join(out.split())
    assert "stay in one fold" not in out
    folds = folds_of(flags)
    assert folds.group.tolist() == [*range(60)]
    assert folds.fold.tolist() == assign_folds(np.arange(60), folds.target.to_numpy(), 5, 777).tolist()
    assert counts_of(flags)["split"] == count
    assert (flags[3] / "prepared" / "duplicates.png").exists()


def test_a_few_sources_that_the_test_set_does_not_show_stay_together(tmp_path):
    rng = np.random.default_rng(0)
    flags = write_competition(tmp_path, boards(12, 60, rng), [k // 12 % 2 for k in range(60)], unlike_images(24, 8))
    out = done("00_prepare.py", *flags)
    assert folds_of(flags).group.tolist() == [*range(12)] * 5
    assert "duplicates stay in one fold" in out


def test_given_groups_stay_as_they_are_where_all_images_look_like_one_source(tmp_path):
    images = boards(1, 40, np.random.default_rng(0))
    flags = write_competition(tmp_path, images, [k // 10 % 2 for k in range(40)], part=[k % 10 for k in range(40)])
    out = done("00_prepare.py", *flags, "--groups", "part")
    assert folds_of(flags).group.tolist() == [*range(10)] * 4
    assert "copies of one source" in out


def test_a_test_set_of_the_training_sets_sources_splits_them(tmp_path):
    """45 sources of four turned shots, of which the test set has one."""
    shots = [np.ascontiguousarray(np.rot90(image, turn)) for image in unlike_images(45) for turn in range(4)]
    train = [shot for k, shot in enumerate(shots) if k % 4]
    flags = write_competition(tmp_path, train, [k // 3 % 3 % 2 for k in range(135)], shots[::4])
    out = done("00_prepare.py", *flags)
    candidates = json.loads((flags[3] / "prepared" / "prepared.json").read_text())["candidates"]
    assert candidates[0]["chosen"]
    assert candidates[0]["distance"] < 0.1 < candidates[1]["distance"]
    split = (folds_of(flags).groupby(np.arange(135) // 3).fold.nunique() > 1).sum()
    assert counts_of(flags)["split"] == split > 40
    assert f"warning: {split} sources are in several folds, as in the test set" in out
    assert "stay in one fold" not in out
    assert "the CV may be too low" not in out


def test_groups_that_cannot_be_used_are_refused(grouped, tmp_path):
    flags, path = [*grouped.flags, "--output", tmp_path / "output", "--groups"], tmp_path / "groups.csv"
    assert "no such column" in refused("00_prepare.py", *flags, "brand")
    write_csv(path, [("image_name", "group"), ("0000.png", 1)])
    assert "no group for 0001.png" in refused("00_prepare.py", *flags, path)
    write_csv(path, [("image_name", "group"), *((f"{k:04}.png", k % 2) for k in range(TRAIN))])
    assert "fewer groups of images than folds (2)" in refused("00_prepare.py", *flags, path)


def test_words_for_a_missing_group_are_blank_ones(toy):
    """Also where the file names the images without folder and ending, or with others."""
    flags = toy(12, 4)
    groups = ["None", "NA", "NaN", "null", "", "n/a", "a", "a", "b", "b", "c", "c"]
    for name in ("{:04}", "images/{:04}.jpg"):
        rows = [(name.format(i), group) for i, group in enumerate(groups)]
        write_csv(flags[1] / "groups.csv", [("image_name", "group"), *rows])
        out = done("00_prepare.py", *flags, "--size", 32, "--folds", 2, "--groups", "groups.csv", "--overwrite")
        assert "6 images have a blank cell for their group: each is a group of its own" in out
        assert folds_of(flags).group.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8]
    write_csv(flags[1] / "groups.csv", [("image_name", "group"), ("0000", 1), ("0000.jpg", 2), *rows[1:]])
    assert "has no group for 0000.png" in refused("00_prepare.py", *flags, "--groups", "groups.csv")


def test_an_image_of_two_groups_is_refused():
    names = ["a1.png", "a1.png", "b1.png", "b1.png"]
    table = Table("train.csv", dict(image=names, patient=["p", "q", "NA", "nan"]))
    with pytest.raises(UserError, match=r"several cells in column 'patient' for a1\.png: keep one group of each"):
        given_groups(Flags(groups="patient"), ["a1.png", "b1.png"], table, "image")
    table.columns["patient"][0] = "q"
    assert given_groups(Flags(groups="patient"), ["a1.png", "b1.png"], table, "image").tolist() == [0, 1]


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


def test_copies_of_one_source_cannot_stay_together(toy):
    flags, content = toy(), png(toy_image(np.random.default_rng(0), 0))
    write_zip(flags[1] / "train.zip", {f"train/{i:04}.png": content for i in range(40)})
    line = refused("00_prepare.py", *flags, "--size", 32, "--groups", "copies")
    assert "all images look like copies of one source (same part, same camera?): give --groups none" in line
    assert (flags[3] / "prepared" / "duplicates.png").exists()
    done("00_prepare.py", *flags, "--size", 32, "--groups", "none")


def test_candidate_pairs_by_the_features_of_a_timm_model(grouped, tmp_path, monkeypatch):
    """The model's features, one row of unit length for each image, are compared beside words and colours; also with
    --group-pattern."""
    compared, candidate_pairs = [], duplicates.candidate_pairs

    def spy(records, *vectors):
        compared.append([np.array(one) for one in vectors])
        return candidate_pairs(records, *vectors)

    monkeypatch.setattr(duplicates, "candidate_pairs", spy)
    flags = [*grouped.flags, "--output", tmp_path / "output", "--limit", 30, "--folds", 2]
    done("00_prepare.py", *flags, "--embed", "test_resnet", "--weights", "none")
    prepared = tmp_path / "output" / "prepared"
    ((words, embedding),) = compared
    assert words.shape == (len(embedding), duplicates.VECTOR)
    assert len(embedding) == sum(len(pd.read_csv(prepared / name)) for name in ("folds.csv", "test.csv"))
    assert embedding.shape[1] != duplicates.VECTOR
    assert np.linalg.norm(embedding, axis=1) == pytest.approx(1, abs=1e-5)
    assert len(np.unique(embedding.round(6), axis=0)) > 0.9 * len(embedding)
    assert json.loads((prepared / "prepared.json").read_text())["groups"] == "auto by test_resnet none"
    flags += ["--overwrite", "--group-pattern", "^[0-9]+"]
    done("00_prepare.py", *flags, "--embed", "test_resnet", "--weights", "none")
    assert [len(vectors) for vectors in compared] == [2, 2]
    assert "--groups none wants none" in refused("00_prepare.py", *flags, "--groups", "none", "--embed", "test_resnet")
