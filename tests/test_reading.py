"""Readings: what 00_prepare.py decides about tables and samples, and what it refuses because two readings fit."""

import json
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

from common import UserError, read_table

import numpy as np
import pytest
from conftest import TINY, done, png, refused, toy_image, write_csv

from kit.data.labels import read_labels
from kit.data.prepared import Flags
from kit.data.reading import SampleCells
from kit.data.tables import Dialect, Table
from kit.submit.sample_submission import class_in, find_id_column

QUICK = "--size 32 --groups none --folds 2".split()
N, T = [f"{i}.png" for i in range(20)], [f"t{i}.png" for i in range(4)]


@pytest.fixture
def competition(tmp_path):
    """→ a function (rows of train.csv, rows of sample_submission.csv, …) → flags, that writes a competition of plain
    images. The rows are given with their header; files: {path: rows} of further tables."""

    def write(train, sample, names=N, tests=T, files=None):
        rng, folder = np.random.default_rng(0), tmp_path / "input"
        for part, images in (("train", names), ("test", tests)):
            for i, name in enumerate(images):
                path = folder / part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(toy_image(rng, i % 2)))
        for path, rows in {"train.csv": train, "sample_submission.csv": sample, **(files or {})}.items():
            if rows:
                write_csv(folder / path, rows)
        return ["--input", folder, "--output", tmp_path / "output"]

    return write


def prepare(flags, *more):
    """00 → (its output, prepared.json, folds.csv)."""
    out, folder = done("00_prepare.py", *flags, *QUICK, *more), flags[3] / "prepared"
    return out, json.loads((folder / "prepared.json").read_text()), read_table(folder / "folds.csv", "")


def refuse(flags, *more):
    line = refused("00_prepare.py", *flags, *QUICK, *more)
    assert not flags[3].exists() or not [*flags[3].glob("prepared/*.npy")]
    return line


def label_of(folds):
    return dict(zip(folds.image_name, folds.label, strict=True))


def sample(cell=0.5, names=T, header=("id", "label")):
    return [header, *([name, *([cell] * (len(header) - 1))] for name in names)]


# ---------------------------------------------------------------- which column names the images


@pytest.mark.parametrize("header", ["", "Unnamed: 0", "age", "row"])
@pytest.mark.parametrize("ending", [".png", ""])
def test_row_numbers_are_no_images_beside_file_names(competition, header, ending):
    order = np.random.default_rng(0).permutation(20)
    rows = [(k, f"{i}{ending}", i % 2) for k, i in enumerate(order)]
    flags = competition([(header, "file", "label"), *rows], sample())
    out, prepared, folds = prepare(flags)
    assert label_of(folds) == {f"{i}{ending}": str(i % 2) for i in order}
    assert "images      column 'file' (" in out
    assert f"also fits: {header!r}" in out or not ending
    assert prepared["evidence"][1] | dict(evidence="") == dict(
        topic="images",
        choice="column 'file'",
        how="certain" if ending else "likely",
        evidence="",
        flag="--image-column",
    )


def test_two_columns_of_numbers_that_both_name_images_are_refused(competition):
    order = np.random.default_rng(0).permutation(20)
    flags = competition([("key", "code", "label"), *((k, i, i % 2) for k, i in enumerate(order))], sample())
    line = refuse(flags)
    assert "'key' or 'code'" in line
    assert "--image-column" in line
    _, _, folds = prepare(flags, "--image-column", "code")
    assert label_of(folds) == {str(i): str(i % 2) for i in order}


def test_the_samples_column_of_ids_decides_between_two_columns_of_numbers(competition):
    order = np.random.default_rng(0).permutation(20)
    tests = [f"{i}.png" for i in range(30, 34)]
    rows = [("key", "code", "label"), *((k, i, i % 2) for k, i in enumerate(order))]
    flags = competition(rows, [("code", "label"), *((i, 0.5) for i in range(30, 34))], tests=tests)
    out, _, folds = prepare(flags)
    assert label_of(folds) == {str(i): str(i % 2) for i in order}
    assert "column 'code' (likely: 20 of 20 are files in train; also fits: 'key')" in out


def test_a_patients_number_is_no_image(competition):
    rows = [("patient", "image", "label"), *((i // 4 + 1, i, i // 4 % 2) for i in range(20))]
    tests = [f"{i}.png" for i in range(50, 54)]
    flags = competition(rows, [("image", "label"), *((i, 0.5) for i in range(50, 54))], tests=tests)
    assert label_of(prepare(flags)[2]) == {str(i): str(i // 4 % 2) for i in range(20)}


def test_a_column_of_repeated_numbers_alone_names_no_images(competition):
    flags = competition([("patient", "scan", "label"), *((i // 4, f"s{i}", i // 4 % 2) for i in range(20))], sample())
    assert "has no column that names the images in" in refuse(flags)


def test_missing_images_are_named_and_a_column_of_labels_does_not_take_their_place(competition):
    rows = [("path", "label"), *((f"x{i}.jpg", i // 7 % 10) for i in range(20))]
    line = refuse(competition(rows, sample(1), names=N), "--metric", "accuracy")
    assert "lacks 20 of the images" in line
    assert "x0.jpg" in line


def test_the_samples_index_is_no_column_of_ids(competition):
    tests = [f"{i}.png" for i in (3, 1, 0, 2)]
    rows = [("", "image", "label"), *((k, name, 0.5) for k, name in enumerate(tests))]
    flags = competition([("image", "label"), *((n, i % 2) for i, n in enumerate(N))], rows, tests=tests)
    prepared = prepare(flags)[1]
    assert read_table(flags[3] / "prepared" / "test.csv", "").image_name.tolist() == tests
    assert prepared["submission"]["id_column"] == 1
    assert prepared["submission"]["values"] == [2]


# ---------------------------------------------------------------- which columns hold the labels


@pytest.mark.parametrize("usual", ["label", "category_id"])
def test_the_columns_that_the_sample_names_go_before_usual_ones(competition, usual):
    rows = [("image_name", usual, "target"), *((n, i % 4, i % 2) for i, n in enumerate(N))]
    out, prepared, folds = prepare(competition(rows, sample(header=("image_name", "target"))))
    assert folds.label.tolist() == [str(i % 2) for i in range(20)]
    assert f"column 'target' (likely: the sample's header names them; also fits: {usual!r})" in out
    assert prepared["classes"] == ["0", "1"]


def test_a_column_of_the_samples_words_goes_before_numbers(competition):
    rows = [("image", "label", "name"), *((n, i % 2, ("cat", "dog")[i % 2]) for i, n in enumerate(N))]
    assert prepare(competition(rows, sample("dog")))[1]["classes"] == ["cat", "dog"]


def test_a_column_that_the_sample_gives_is_not_asked_for(competition):
    rows = [("image", "site", "target"), *((n, i % 3, i % 2) for i, n in enumerate(N))]
    given = [("image", "site", "target"), *((t, i % 3, 0.5) for i, t in enumerate(T))]
    line = refuse(competition(rows, given))
    assert "varies in site and not in target" in line
    assert "--label-column target" in line
    prepared = prepare(competition(rows, given), "--label-column", "target")[1]
    assert prepared["submission"]["values"] == [2]


def test_two_targets_are_two_runs(competition):
    words = [("image", "make", "color"), *((n, "ab"[i % 2], "rgb"[i % 3]) for i, n in enumerate(N))]
    line = refuse(competition(words, sample("a", header=("image", "make", "color"))))
    for part in ("--label-column make --output output/make", "--label-column color --output output/color"):
        assert part in line
    codes = [("image", "make", "color"), *((n, i % 2, i % 3) for i, n in enumerate(N))]
    line = refuse(competition(codes, sample(0, header=("image", "make", "color"))))
    assert "--label-column make" in line
    assert "--label-form number" in line
    assert prepare(competition(codes, sample(0, header=("image", "make", "color"))), "--metric", "mcrmse")[0]


# ---------------------------------------------------------------- classes or numbers


def test_decimals_are_numbers(competition):
    rows = [("image", "age"), *((n, f"{20 + 1.7 * i:.2f}") for i, n in enumerate(N))]
    out, prepared, _ = prepare(competition(rows, sample(0, header=("image", "age"))))
    assert (prepared["task"], prepared["metric"]) == ("numbers", "rmse")
    assert "numbers, one in each column; a blank cell is a missing one (certain: decimals such as 20.00)" in out or (
        "decimals such as 21.70" in out
    )


def test_counts_are_numbers_or_refused(competition):
    counts = [("image", "cells"), *((n, i * i + 1) for i, n in enumerate([*N, *(f"x{i}.png" for i in range(10))]))]
    names = [row[0] for row in counts[1:]]
    line = refuse(competition(counts, sample(0, header=("image", "cells")), names=names))
    assert "30 whole numbers from 1 to 842 in column 'cells', which may be classes or numbers" in line
    average = competition(counts, sample(43.67, header=("image", "cells")), names=names)
    assert prepare(average)[1]["task"] == "numbers"
    assert prepare(average, "--metric", "accuracy", "--overwrite", "--submit-value", "label")[1]["task"] == "classes"


def test_the_name_of_a_column_may_say_that_few_numbers_are_counts(competition):
    rows = [("image", "count"), *((n, i % 7) for i, n in enumerate(N))]
    assert "classes or numbers" in refuse(competition(rows, sample(0, header=("image", "count"))))


def test_whole_numbers_with_a_point_are_grades(competition):
    rows = [("image", "label"), *((n, f"{i % 3}.0") for i, n in enumerate(N))]
    assert prepare(competition(rows, sample(0)), "--metric", "qwk")[1]["classes"] == ["0", "1", "2"]
    assert prepare(competition(rows, sample("0.0")), "--metric", "qwk", "--overwrite")[1]["classes"] == [
        "0.0",
        "1.0",
        "2.0",
    ]


@pytest.mark.parametrize("odd", ["-1.0", "", "nan"])
def test_marks_beside_0_and_1_are_asked_for(competition, odd):
    header = ("image", "edema", "nodule")
    rows = [header, *((n, i % 2, ["0.0", "1.0", odd][i % 3]) for i, n in enumerate(N))]
    flags = competition(rows, sample(header=header))
    for more in ([], ["--metric", "column-auc"], ["--label-form", "binary"]):
        line = refuse(flags, *more)
        assert f"--class-values={odd}=0" in line, line
    _out, prepared, folds = prepare(flags, f"--class-values={odd}=0")
    assert (prepared["task"], prepared["classes"]) == ("labels", ["edema", "nodule"])
    assert folds.target.tolist()[:3] == ["", "0 1", ""] or "1" in folds.target.tolist()[1]


def test_true_and_false_are_1_and_0(competition):
    header = ("image", "cat", "dog")
    rows = [header, *((n, str(i % 2 == 0), str(i % 2 == 1)) for i, n in enumerate(N))]
    _, prepared, folds = prepare(competition(rows, sample(header=header)))
    assert prepared["classes"] == ["cat", "dog"]
    assert folds.label.tolist() == ["cat", "dog"] * 10
    single = [("image", "label"), *((n, str(i % 2 == 0)) for i, n in enumerate(N))]
    out, prepared, _ = prepare(competition(single, sample()), "--overwrite")
    assert prepared["classes"] == ["False", "True"]
    assert "positive    'True'" in out


def test_numbers_with_a_few_odd_cells_are_refused(competition):
    names = [*N, *(f"x{i}.png" for i in range(10))]
    rows = [("image", "age"), *((n, "80+" if i == 3 else 20 + i) for i, n in enumerate(names))]
    assert "all numbers but 80+" in refuse(competition(rows, sample(0, header=("image", "age")), names=names))


@pytest.mark.parametrize(("cells", "form"), [(("1 2", "3", "2 3"), "list"), (("[1, 2]", "[3]", "[2, 3]"), "list")])
def test_lists_of_numbers_are_sets(competition, cells, form):
    rows = [("image", "tags"), *((n, cells[i % 3]) for i, n in enumerate(N))]
    assert prepare(competition(rows, sample(cells[0], header=("image", "tags"))))[1]["task"] == "labels"


def test_words_that_may_be_a_class_or_several_labels_are_asked_for(competition):
    rows = [("image", "labels"), *((n, ("scab", "rust", "rust scab")[i % 3]) for i, n in enumerate(N))]
    flags = competition(rows, sample("scab", header=("image", "labels")))
    assert "--label-form class, or --label-form list" in refuse(flags)
    assert prepare(flags, "--label-form", "class")[1]["classes"] == ["rust", "rust scab", "scab"]
    assert prepare(flags, "--metric", "f1-samples", "--overwrite")[1]["classes"] == ["rust", "scab"]
    rows = [("image", "labels"), *((n, ("leaf rust", "black rot")[i % 2]) for i, n in enumerate(N))]
    assert len(prepare(competition(rows, sample("leaf rust")), "--overwrite")[1]["classes"]) == 2


def test_digits_and_underscores_are_words(competition):
    rows = [("image", "label"), *((n, ("1_12", "11_2")[i % 2]) for i, n in enumerate(N))]
    assert prepare(competition(rows, sample("1_12")))[1]["classes"] == ["11_2", "1_12"]


# ---------------------------------------------------------------- classes and their spelling


@pytest.mark.parametrize("word", ["nan", "NA", "None"])
def test_a_class_called_like_a_gap_is_asked_for_unless_the_sample_names_it(competition, word):
    rows = [("image", "label"), *((n, ("cat", word, "dog")[i % 3]) for i, n in enumerate(N))]
    line = refuse(competition(rows, sample("cat")))
    assert f"--class-values {word}={word}" in line
    assert "--drop-unlabelled" in line
    assert sorted(
        prepare(competition(rows, sample("cat")), "--class-values", f"{word}={word}")[1]["classes"]
    ) == sorted(["cat", "dog", word])
    assert prepare(competition(rows, sample("cat")), "--drop-unlabelled", "--overwrite")[1]["classes"] == ["cat", "dog"]
    assert word in prepare(competition(rows, sample(word)), "--overwrite")[1]["classes"]


def test_spellings_that_differ_in_case_are_refused_unless_the_sample_has_both(competition):
    rows = [("image", "label"), *((n, ("Cat", "dog", "cat")[i % 3]) for i, n in enumerate(N))]
    assert "--class-values" in refuse(competition(rows, sample("dog")))
    assert prepare(competition(rows, sample("dog")), "--class-values", "Cat=cat")[1]["classes"] == ["cat", "dog"]
    both = [("id", "label"), *zip(T, ("Cat", "cat", "dog", "dog"), strict=True)]
    assert prepare(competition(rows, both), "--overwrite")[1]["classes"] == ["Cat", "cat", "dog"]


def test_labels_are_spelled_as_in_the_sample(competition):
    rows = [("image", "label"), *((n, ("Cat", "DOG")[i % 2]) for i, n in enumerate(N))]
    both = [("id", "label"), *zip(T, ("cat", "dog", "cat", "dog"), strict=True)]
    assert prepare(competition(rows, both))[1]["classes"] == ["cat", "dog"]


def test_decomposed_spellings_are_one_class(competition):
    glass = unicodedata.normalize("NFD", "ガラス")
    rows = [("image", "label"), *((n, (glass, "プラ", "ガラス", "プラ")[i % 4]) for i, n in enumerate(N))]
    assert prepare(competition(rows, sample("ガラス")))[1]["classes"] == ["ガラス", "プラ"]
    names = [f"{(glass, 'プラ')[i % 2]}/{i}.png" for i in range(20)]
    (competition([], [])[1] / "train.csv").unlink()
    for path in (competition([], [])[1] / "train").glob("*.png"):
        path.unlink()
    assert prepare(competition([], sample("ガラス"), names=names), "--overwrite")[1]["classes"] == ["ガラス", "プラ"]


# ---------------------------------------------------------------- what the sample's cells ask for


def words(i):
    return ("glass", "paper")[i % 2]


def test_codes_in_the_sample_for_classes_in_words_are_asked_for(competition):
    rows = [("image", "label"), *((n, words(i)) for i, n in enumerate(N))]
    coded = [("id", "label"), *((t, i % 2) for i, t in enumerate(T))]
    line = refuse(competition(rows, coded))
    assert "--class-values, such as glass=0 paper=1" in line
    flags = competition(rows, coded)
    prepared = prepare(flags, "--class-values", "glass=0", "paper=1", "--submit-value", "label")[1]
    assert (prepared["classes"], prepared["submission"]["value"]) == (["0", "1"], "label")
    assert "names 'steel', which" in refused("00_prepare.py", *flags, *QUICK, "--class-values", "steel=2")


def test_quoted_decimal_commas_in_the_sample_are_refused(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    assert "cells such as 0,5, with a decimal comma" in refuse(competition(rows, sample("0,5")))


def test_bands_without_any_file_that_has_bands_are_refused(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    assert "holds no TIFF and no .npy" in refuse(competition(rows, sample()), "--bands", 4, 3, 2)


def test_three_words_and_one_probability_are_refused(competition):
    rows = [("image", "label"), *((n, ("benign", "malignant", "unknown")[i % 3]) for i, n in enumerate(N))]
    flags = competition(rows, sample())
    assert "--positive" in refuse(flags)
    assert prepare(flags, "--positive", "malignant")[1]["submission"]["summed"] == ["malignant"]


def test_a_decimal_asks_for_a_probability_whatever_the_metric(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    out, prepared, _ = prepare(competition(rows, sample()), "--metric", "accuracy")
    assert prepared["submission"]["value"] == "probability"
    out, prepared, _ = prepare(competition(rows, sample(0)), "--overwrite")
    assert prepared["submission"]["value"] == "probability"
    assert "which may be labels too: --submit-value label" in " ".join(out.split())
    assert prepare(competition(rows, sample(0)), "--metric", "accuracy")[1]["submission"]["value"] == "label"


def test_probabilities_of_more_than_two_classes_are_scored_by_log_loss(competition):
    rows = [("image", "label"), *((n, "abc"[i % 3]) for i, n in enumerate(N))]
    out, prepared, _ = prepare(competition(rows, sample(header=("id", "a", "b", "c"))))
    assert prepared["metric"] == "logloss"
    assert "metric      log loss (likely: " in out


def test_columns_are_the_classes_that_they_begin_or_end_with(competition):
    rows = [("image", "label"), *((n, ("stable", "unstable")[i % 2]) for i, n in enumerate(N))]
    one = prepare(competition(rows, sample(header=("id", "unstable_prob"))))[1]
    assert one["classes"] == ["stable", "unstable"]
    one = prepare(competition(rows, sample(header=("id", "p(stable)"))), "--overwrite")[1]
    assert one["classes"] == ["unstable", "stable"]
    both = prepare(competition(rows, sample(header=("id", "prob_unstable", "prob_stable"))), "--overwrite")[1]
    assert both["submission"]["columns"] == ["unstable", "stable"]


def test_rows_that_the_sample_repeats_are_predicted_once_and_written_each_time(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    asked = [("imgs", "pred"), *((t, 0.5) for t in [*T, T[1]])]
    flags = competition(rows, asked)
    out, _, _ = prepare(flags)
    assert "4 in 5 rows" in out
    done("01_train_fold.py", *flags, *TINY, "--epochs", 1, "--head", "fresh", "--fold", "all")
    done("03_infer.py", *flags, "--name", flags[3] / "s.csv")
    written = [line.split(",") for line in (flags[3] / "s.csv").read_text().splitlines()]
    assert [name for name, _ in written] == ["imgs", *T, T[1]]
    assert written[2][1] == written[5][1]


def test_the_submission_has_the_samples_separator_decimal_commas_and_line_ends(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    flags = competition(rows, None)
    lines = ["id;p", *(f"{name};0,5" for name in T)]
    (flags[1] / "sample_submission.csv").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    prepared = prepare(flags)[1]["submission"]
    assert [prepared[key] for key in ("separator", "decimal", "newline")] == [";", ",", "\r\n"]
    done("01_train_fold.py", *flags, *TINY, "--epochs", 1, "--head", "fresh", "--fold", "all")
    done("03_infer.py", *flags, "--name", flags[3] / "s.csv")
    written = (flags[3] / "s.csv").read_bytes().decode().split("\r\n")
    assert written[0] == "id;p"
    assert all(re.fullmatch(rf"{name};0,[0-9]+", line) for name, line in zip(T, written[1:5], strict=True)), written
    assert written[5:] == [""]
    more = ["--test-images", flags[1] / "test", "--sample-submit", flags[1] / "sample_submission.csv"]
    done("03_infer.py", *flags, *more, "--name", flags[3] / "hidden.csv")
    assert (flags[3] / "hidden.csv").read_bytes() == (flags[3] / "s.csv").read_bytes()


def test_a_sample_is_made_of_the_table_of_test_images(competition):
    rows = [("image", "age", "label"), *((n, i, words(i)) for i, n in enumerate(N))]
    flags = competition(rows, None, files={"test.csv": [("image", "age"), *((t, 7) for t in T)]})
    assert "--submit-columns" in refuse(flags)
    more = ["--sample-submit", "test.csv", "--submit-columns", "verdict", "--submit-value", "label"]
    _, prepared, folds = prepare(flags, *more)
    assert (prepared["submission"]["header"], prepared["submission"]["value"]) == (["image", "verdict"], "label")
    assert folds.label.tolist() == [words(i) for i in range(20)]
    assert read_table(flags[3] / "prepared" / "test.csv", "").image_name.tolist() == T


# ---------------------------------------------------------------- the sample's ids


def patients(first):
    """A test table of two images for each patient, whose numbers are images too; names are shuffled."""
    return [("patient", "image"), *((i // 2, first - i) for i in range(4))]


def test_ids_of_a_test_table_are_no_images_where_the_sample_names_its_column(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    tests = [f"{i}.png" for i in range(4)]
    asked = [("patient", "label"), (0, 0.5), (1, 0.5)]
    for more in ([], ["--test-csv", "test.csv"]):
        flags = competition(rows, asked, tests=tests, files={"test.csv": patients(3)})
        out, _, _ = prepare(flags, *more, "--overwrite")
        table = read_table(flags[3] / "prepared" / "test.csv", "")
        assert dict(zip(table.image_name, table.submission_id, strict=True)) == {"3": 0, "2": 0, "1": 1, "0": 1}
        assert "column 'patient' of" in out


def test_ids_that_may_be_images_or_those_of_a_table_are_refused(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    tests = [f"{i}.png" for i in range(4)]
    flags = competition(rows, [("id", "label"), (0, 0.5), (1, 0.5)], tests=tests, files={"test.csv": patients(3)})
    assert "--test-csv test.csv" in refuse(flags)


def test_a_column_of_other_files_in_the_test_table_is_no_image_column(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    table = [("image", "reference"), *((t.removesuffix(".png"), T[i - 1]) for i, t in enumerate(T))]
    flags = competition(rows, sample(names=[t.removesuffix(".png") for t in T], header=("image", "p")))
    write_csv(flags[1] / "test.csv", table)
    prepare(flags)
    assert read_table(flags[3] / "prepared" / "test.csv", "").image_name.tolist() == [t.removesuffix(".png") for t in T]


def test_ids_that_are_images_are_not_split_into_an_image_and_a_class(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    tests = [f"{stem}.png" for stem in ("10", "11", "100", "101", "110", "111")]
    flags = competition(rows, sample(names=["100", "101", "110", "111"]), tests=tests)
    prepare(flags)
    assert read_table(flags[3] / "prepared" / "test.csv", "").image_name.tolist() == ["100", "101", "110", "111"]


def test_a_test_table_beside_the_sample_is_used_where_the_ids_are_no_images(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    table = [("key", "image"), *((f"p{i // 2}", t) for i, t in enumerate(T))]
    flags = competition(rows, [("key", "label"), ("p0", 0.5), ("p1", 0.5)], files={"test.csv": table})
    assert "column 'key' of" in prepare(flags)[0]
    assert read_table(flags[3] / "prepared" / "test.csv", "").submission_id.tolist() == [0, 0, 1, 1]


# ---------------------------------------------------------------- settings that change no fold


def test_the_metric_and_the_value_change_without_overwrite(competition):
    rows = [("image", "label"), *((n, i % 2) for i, n in enumerate(N))]
    flags = competition(rows, sample(0))
    folds = prepare(flags)[2]
    out, prepared, after = prepare(flags, "--metric", "accuracy")
    assert (prepared["metric"], prepared["submission"]["value"]) == ("accuracy", "label")
    assert "the metric and the submission changed" in out
    assert after.equals(folds)
    assert (
        prepare(flags, "--metric", "accuracy", "--submit-value", "probability")[1]["submission"]["value"]
        == "probability"
    )
    path = flags[3] / "prepared" / "prepared.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(candidates=[dict(score=0.9)])))
    prepared = prepare(flags, "--metric", "auc", "--submit-value", "label")[1]
    assert prepared["candidates"] == [dict(score=None)], "the forecast must not take the other metric's score"
    assert (prepared["flags"]["metric"], prepared["flags"]["submit_value"]) == ("auc", "label"), "for the handover"
    assert [d["choice"] for d in prepared["evidence"] if d["topic"] == "metric"] == ["AUC"]
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(candidates=None)))
    prepare(flags, "--metric", "accuracy", "--submit-value", "probability")
    for name in ("sample.csv", "test.csv"):
        (flags[3] / "prepared" / name).unlink()
    more = ["--metric", "accuracy", "--submit-value", "probability"]
    assert "prepared with other seed" in refused("00_prepare.py", *flags, *QUICK, *more, "--seed", 5)
    assert not (flags[3] / "prepared" / "test.csv").exists(), "a refusal writes nothing"
    prepare(flags, "--metric", "accuracy", "--submit-value", "probability")
    assert (flags[3] / "prepared" / "sample.csv").exists()
    write_csv(flags[1] / "train.csv", [("image", "label"), *((n, (i + 1) % 2) for i, n in enumerate(N))])
    line = refused("00_prepare.py", *flags, *QUICK, "--metric", "auc")
    assert "prepared with other tables" in line, "another metric hides no other labels"


# ---------------------------------------------------------------- what a stranger found


def labels_as_read(columns, asked, files):
    """→ {image: label} of a table {column: cells} of images `files`, read beside a sample of rows `asked`."""
    stems = {file.rpartition(".")[0]: file for file in files}
    source = SimpleNamespace(path="train", table=None, find=lambda n: n if n in files else stems.get(n))
    cells = SampleCells("sample.csv", asked, Dialect(), find_id_column(asked, source, None))
    found = read_labels(Table(Path("train.csv"), columns), source, cells, Flags())
    return dict(zip(found.names, found.cells, strict=True))


FILES = [*(f"{i}.png" for i in range(300)), *(f"a{i:03}.png" for i in range(40)), *(f"t{i}.png" for i in range(9))]
ASKED = [["image_id", "label"], *([f"t{i}", "cat"] for i in range(9))]


def test_an_index_does_not_replace_ids_of_which_some_repeat_or_that_differ_late():
    ids = [*map(str, range(5, 25)), "5", "6"]
    right = {name: ("cat", "dog")[int(name) % 2] for name in ids}
    columns = {"": [*map(str, range(22))], "image_id": ids, "label": [right[name] for name in ids]}
    assert labels_as_read(columns, ASKED, FILES) == right
    late = [*map(str, range(205)), *map(str, range(210, 255))]
    columns = {"index": [*map(str, range(250))], "image_id": late, "label": ["cat", "dog"] * 125}
    assert [*labels_as_read(columns, ASKED, FILES)] == late


def test_a_column_of_other_files_does_not_replace_the_ids_that_the_sample_names():
    names = [f"a{i:03}" for i in range(30)]
    for other in ("{:03}_mask.png", "a{:03}.png"):
        columns = {"image_id": names, "file": [other.format(i + 1) for i in range(30)], "label": ["cat", "dog"] * 15}
        assert [*labels_as_read(columns, ASKED, FILES)] == names


def test_a_placeholder_word_of_another_column_does_not_make_it_the_label():
    names = [f"a{i:03}" for i in range(30)]
    columns = {"image_id": names, "sex": ["male", "unknown", "female"] * 10, "label": ["cat", "dog"] * 15}
    rows = [["t0", "unknown"], ["t1", "unknown"]]
    assert {*labels_as_read(columns, [["image_id", "label"], *rows], FILES).values()} == {"cat", "dog"}
    with pytest.raises(UserError, match="'label' by its name, or 'sex', which has the sample's words"):
        labels_as_read(columns, [["image_id", "target"], *rows], FILES)


@pytest.mark.parametrize("labels", [("A", "a", "b"), ("a_b", "a-b", "c"), ("10", "1e1", "ff")])
def test_labels_that_differ_are_not_merged_by_the_samples_spelling(labels):
    names = [f"a{i:03}" for i in range(30)]
    columns = {"image_id": names, "label": [*labels] * 10}
    asked = [["image_id", "label"], *([f"t{i}", labels[0]] for i in range(9))]
    with pytest.raises(UserError, match=r"has the labels .* spell them alike"):
        labels_as_read(columns, asked, FILES)


def test_the_word_usage_respells_no_label():
    names = [f"a{i:03}" for i in range(30)]
    columns = {"image_id": names, "label": ["public", "private", "state"] * 10}
    asked = [["image_id", "label", "Usage"], *([f"t{i}", "state", ("Public", "Private")[i % 2]] for i in range(9))]
    assert {*labels_as_read(columns, asked, FILES).values()} == {"public", "private", "state"}


@pytest.mark.parametrize("cells", [("a|b", "b|c|d", "a|c"), ("a;b", "b;c", "c"), ("a b", "b a", "c a")])
def test_cells_of_several_labels_are_no_classes(cells):
    names = [f"a{i:03}" for i in range(30)]
    asked = [["image_id", "label"], *([f"t{i}", "a"] for i in range(9))]
    with pytest.raises(UserError, match="may be one class or several labels"):
        labels_as_read({"image_id": names, "label": [*cells] * 10}, asked, FILES)


def test_a_numeric_column_of_ids_is_found_wherever_it_stands(competition):
    rows = [("file", "label"), *((n, i % 4) for i, n in enumerate(N))]
    tests = [f"{i}.png" for i in range(8)]
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    for header, row in ((("", "id", "label"), lambda k, i: (k, i, 1)), (("label", "id"), lambda k, i: (k % 2, i))):
        flags = competition(rows, [header, *(row(k, i) for k, i in enumerate(order))], tests=tests)
        prepared = prepare(flags, "--overwrite", "--label-column", "label", "--metric", "accuracy")[1]
        assert prepared["submission"]["id_column"] == 1
        assert read_table(flags[3] / "prepared" / "test.csv", "").image_name.tolist() == [*map(str, order)]


def test_another_usual_table_that_has_what_the_sample_names_is_asked_for(competition):
    sexes = [("image_id", "sex"), *((n, "mf"[i % 2]) for i, n in enumerate(N))]
    labels = [("image_id", "label"), *((n, i % 3) for i, n in enumerate(N))]
    flags = competition(sexes, sample(1), files={"train_labels.csv": labels})
    assert "train_labels.csv has it: give --train-csv, or --join" in refuse(flags)
    assert prepare(flags, "--train-csv", "train_labels.csv")[1]["classes"] == ["0", "1", "2"]


def test_two_classes_that_the_sample_has_as_cells_are_labels(competition):
    rows = [("image", "label"), *((n, 1 + i % 2) for i, n in enumerate(N))]
    assert prepare(competition(rows, sample(2)))[1]["submission"]["value"] == "label"
    mixed = [("image", "label"), *((n, "12x"[i % 3]) for i, n in enumerate(N))]
    assert prepare(competition(mixed, sample(2)), "--overwrite")[1]["submission"]["value"] == "label"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("p_no finding", "no finding"),
        ("not_pneumonia", None),
        ("pneumonia_or_no finding", None),
        ("pneumonia(p)", "pneumonia"),
    ],
)
def test_a_columns_name_means_one_class_or_none(name, found):
    assert class_in(name, ["no finding", "pneumonia"]) == found


def test_a_one_hot_column_without_any_1_is_named(competition):
    header = ("image", "cat", "dog", "bird")
    rows = [header, *((n, 1 - i % 2, i % 2, 0) for i, n in enumerate(N))]
    line = refuse(competition(rows, sample(header=header)))
    assert "has no 1 in bird: give --label-column cat dog" in line


# ---------------------------------------------------------------- drawn tables of two readings


def draw(seed):
    """A table that can be read in two ways, and the right one. → (Table, SampleCells, source, {image: label})."""
    rng = np.random.default_rng(seed)
    count, tests = int(rng.integers(12, 40)), 5
    order, ending = rng.permutation(count), rng.choice([".png", ".jpg", ""])
    stem = rng.choice(["", "img_"])
    names = [f"{stem}{i}{ending if rng.random() < 2 else ''}" for i in order]
    labels = rng.choice([*(["cat", "dog"], ["0", "1"], ["0", "1", "2"])][int(rng.integers(3))], count).tolist()
    labels[:3] = [*dict.fromkeys(labels), *labels][:3]
    columns = {rng.choice(["image", "id", "file", "name", "scan"]): names}
    target = str(rng.choice(["label", "target", "diagnosis"]))
    columns[target] = labels
    for kind in rng.choice(
        ["index", "age", "patient", "rank", "label2", "site"], int(rng.integers(1, 4)), replace=False
    ):
        columns |= {
            "index": {rng.choice(["", "Unnamed: 0"]): [str(k) for k in range(count)]},
            "age": {"age": [str(k) for k in rng.integers(0, count, count)]},
            "patient": {"patient": [str(k // 3) for k in range(count)]},
            "rank": {"rank": [str(k) for k in rng.permutation(count)]},
            "label2": {"label" if target != "label" else "category_id": [str(k % 4) for k in range(count)]},
            "site": {"site": [str(k) for k in rng.integers(0, 3, count)]},
        }[kind]
    keys = [*columns]
    shuffled = {key: columns[key] for key in rng.permutation(np.array(keys, object))}
    image = keys[0]
    cell = {2: ["0.5"], 3: ["1"]}.get(len({*labels}), ["0"])[0]
    cell = "cat" if "cat" in labels else cell
    asked = [[image if rng.random() < 0.5 else "key", target], *([f"t{i}.png", cell] for i in range(tests))]
    files = {f"{stem}{i}{ending or '.png'}" for i in range(count)} | {f"t{i}.png" for i in range(tests)}
    stems = {file.rpartition(".")[0]: file for file in files}
    source = SimpleNamespace(path="train", table=None, find=lambda n: n if n in files else stems.get(n))
    sample_cells = SampleCells("sample.csv", asked, Dialect(), find_id_column(asked, source, None))
    return Table("train.csv", shuffled), sample_cells, source, dict(zip(names, labels, strict=True))


def test_drawn_tables_are_read_right_or_refused(capsys):
    """500 tables with row numbers, ages, patients, ranks, sites and a second label beside images and labels."""
    refusals, wrong = [], []
    for seed in range(500):
        table, cells, source, right = draw(seed)
        try:
            found = read_labels(table, source, cells, Flags())
        except UserError as error:
            refusals.append(str(error))
            continue
        if dict(zip(found.names, found.cells, strict=True)) != right:
            wrong.append(seed)
    assert wrong == []
    assert len(refusals) < 150, "what is clear is read"
    assert all(re.search("--[a-z]", line) for line in refusals)
