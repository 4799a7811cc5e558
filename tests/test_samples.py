"""Sample submissions, labels and tables: mistakes that would give a submission with another meaning."""

import json
from types import SimpleNamespace

from common import UserError

import numpy as np
import pytest
from conftest import done, png, write_csv

from kit.data import tables
from kit.data.labels import read_labels
from kit.data.prepared import Flags
from kit.data.reading import SampleCells
from kit.submit.sample_submission import read_sample, read_sample_cells
from kit.submit.submission import write_submission


def source_of(*names):
    return SimpleNamespace(path="images", table=None, find=lambda name: name if name in names else None)


SOURCE = source_of(*(f"{part}{i}" for part in "at" for i in range(6)))


def cells_of(*header):
    """→ the SampleCells of a sample that is a header, and ids alone."""
    return SampleCells("sample.csv", [[*header], ["t0"] + ["0"] * (len(header) - 1)], tables.Dialect(), 0)


def training_of(tmp_path, header, rows, **flags):
    """→ the TrainingLabels of a table of images a0, a1, …"""
    write_csv(tmp_path / "train.csv", [header, *([f"a{i}", *row] for i, row in enumerate(rows))])
    return read_labels(tables.read_table(tmp_path / "train.csv", ""), SOURCE, cells_of("id"), Flags(**flags))


def sample_of(tmp_path, training, rows, tests=None, source=SOURCE, form=None, **flags):
    write_csv(tmp_path / "sample.csv", rows)
    if tests:
        write_csv(tmp_path / "tests.csv", tests)
        tests = tables.read_table(tmp_path / "tests.csv", "")
    flags = Flags(**flags)
    sample = read_sample_cells(tmp_path / "sample.csv", source, tests, flags)
    return read_sample(sample, source, training.task, tests, flags, training.columns, form)


def filled(tmp_path, sample, predictions):
    """→ the rows of a submission, written and checked."""
    path, predictions = tmp_path / "out.csv", np.array(predictions)
    write_submission(path, sample.layout, predictions, sample.task, "accuracy", sample.form)
    return tables.read_rows(path, "")[0]


def three(tmp_path, names="012"):
    return training_of(tmp_path, ["id", "label"], [[name] for name in names])


def two(tmp_path):
    return training_of(tmp_path, ["id", "label"], [["cat"], ["dog"]])


# ---------------------------------------------------------------- the sample's columns


def test_a_column_for_each_class_is_no_ranking_where_the_header_names_them(tmp_path):
    sample = sample_of(tmp_path, three(tmp_path), [["id", "0", "1", "2"], ["t0", "0", "0", "1"]])
    assert (sample.form["value"], sample.form["columns"]) == ("probability", ["0", "1", "2"])
    sample = sample_of(tmp_path, three(tmp_path, "abc"), [["id", "first", "second"], ["t0", "b", "a"]])
    assert (sample.form["value"], sample.form["top"]) == ("top", 2)


def test_classes_named_like_images_are_a_header(tmp_path):
    source = source_of("0", "1", "2")
    sample = sample_of(tmp_path, three(tmp_path), [["id", "0", "1", "2"], ["1", "0.3", "0.3", "0.4"]], source=source)
    assert (sample.form["header"], sample.images) == (["id", "0", "1", "2"], ["1"])
    ranked = [["t0", "b", "a", "c"], ["t1", "a", "b", "c"]]
    assert sample_of(tmp_path, three(tmp_path, "abc"), ranked).form["header"] is None


def test_numbers_go_to_the_columns_that_their_names_begin_with(tmp_path, capsys):
    columns = ["x_mean", "y_mean"]
    training = training_of(tmp_path, ["id", *columns], [["1.5", "10"], ["2", "20"]], label_column=columns)
    sample = sample_of(tmp_path, training, [["id", "y", "x"], ["t0", "0", "0"]])
    assert filled(tmp_path, sample, [[1.5, 15]])[1] == ["t0", "15", "1.5"]
    assert "other names: y ← y_mean, x ← x_mean" in capsys.readouterr().out
    sample_of(tmp_path, training, [["id", "p", "q"], ["t0", "0", "0"]])
    assert "so they are taken in order: p ← x_mean, q ← y_mean" in capsys.readouterr().out


def test_more_ranked_columns_than_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match="has 4 value columns for 3 classes"):
        sample_of(tmp_path, three(tmp_path, "abc"), [["id", "p1", "p2", "p3", "p4"], ["t0", *"abca"]])


# ---------------------------------------------------------------- the sample's ids


def test_ids_of_a_pixel_table_go_before_its_row_numbers(tmp_path):
    source = source_of("1", "2", "3")
    source.table = True
    tests = [["row", "id"], ["1", "3"], ["2", "1"], ["3", "2"]]
    sample = sample_of(tmp_path, three(tmp_path), [["id", "label"], ["1", "0"], ["2", "0"], ["3", "0"]], tests, source)
    image_of = dict(zip(sample.submission_ids.tolist(), sample.images, strict=True))
    assert [image_of[number] for number in sample.layout.submission_id] == ["2", "3", "1"]


def test_an_image_shared_by_two_ids_is_refused(tmp_path):
    tests = [["image_name", "patient"], ["t0", "A"], ["t1", "A"], ["t1", "B"], ["t2", "B"]]
    with pytest.raises(UserError, match="two ids that share the image t1"):
        sample_of(tmp_path, three(tmp_path), [["patient", "label"], ["A", "0"], ["B", "0"]], tests)


def test_an_id_missing_from_the_test_table_leaves_the_other_ids_their_images(tmp_path):
    tests = [["image_name", "patient"], ["t0", "A"], ["t1", "A"], ["t2", "B"]]
    sample = sample_of(tmp_path, three(tmp_path), [["patient", "label"], ["B", "0"], ["A", "0"], ["C", "0"]], tests)
    assert dict(zip(sample.images, sample.submission_ids.tolist(), strict=True)) == dict(t0=1, t1=1, t2=0, C=2)


# ---------------------------------------------------------------- the order of classes


@pytest.mark.parametrize("positive", ["cat", "dog"])
@pytest.mark.parametrize("table", [False, True], ids=["ids name the class", "test.csv names the class"])
def test_a_row_for_each_image_and_class_asks_for_its_class_whichever_is_positive(tmp_path, table, positive):
    """In the ids t0_cat, t0_dog …, or by a table of the ids row0, row1 …"""
    folder, kinds = tmp_path / "input", ("cat", "dog")
    train, tests = ([(f"{part}{i}", kind) for i in range(n) for kind in kinds] for part, n in (("a", 8), ("t", 2)))
    for name, _ in train + tests:
        path = folder / ("train" if name[0] == "a" else "test") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
    rows = [(name, kind, int(kind == kinds[int(name[1:]) % 2])) for name, kind in train]
    write_csv(folder / "train.csv", [("image_name", "kind", "label"), *rows])
    ids = [f"row{i}" if table else "_".join(pair) for i, pair in enumerate(tests)]
    write_csv(folder / "test.csv", [("id", "image_name", "kind"), *zip(ids, *zip(*tests, strict=True), strict=True)])
    write_csv(folder / "sample_submit.csv", [("id", "value"), *((name, 0.5) for name in ids)])
    flags = ["--input", folder, "--output", tmp_path, "--target-column", "kind", "--positive", positive]
    more = ["--test-csv", "test.csv"] if table else []
    done("00_prepare.py", *flags, *more, "--size", 8, "--folds", 2, "--groups", "none")
    classes = json.loads((tmp_path / "prepared" / "prepared.json").read_text())["classes"]
    assert classes[1] == positive
    _, *layout = tables.read_rows(tmp_path / "prepared" / "sample.csv", "")[0]
    assert [classes[int(target)] for _, target, *_ in layout] == [kind for _, kind in tests]


@pytest.mark.parametrize(
    ("ids", "written"), [(["t0_cat", "t0_dog"], ["0.8", "0.2"]), (["t0"], ["0.8"])], ids=["a row a class", "one column"]
)
def test_an_earlier_form_keeps_the_order_of_classes(tmp_path, ids, written):
    training, rows = two(tmp_path), [["id", "value"], *([name, "0.5"] for name in ids)]
    first = sample_of(tmp_path, training, rows, positive=["cat"])
    again = sample_of(tmp_path, training.with_task(first.task), rows, form=first.form)
    assert again.form == first.form
    for sample in (first, again):
        assert sample.task.names == ["dog", "cat"]
        assert [value for _, value in filled(tmp_path, sample, [[0.2, 0.8]])[1:]] == written


def test_columns_without_a_header_need_names_or_the_order_of_the_training_table(tmp_path):
    rows = [["t0", "0.5", "0.5"]]
    with pytest.raises(UserError, match="no header to say which column is which of cat, dog"):
        sample_of(tmp_path, two(tmp_path), rows)
    named = sample_of(tmp_path, two(tmp_path), rows, positive=["cat"], submit_columns=["dog", "cat"])
    assert filled(tmp_path, named, [[0.2, 0.8]]) == [["t0", "0.2", "0.8"]]
    columns = ["zebra", "ape", "cow"]
    marks = [[int(i == k) for k in range(3)] for i in range(3)]
    onehot = training_of(tmp_path, ["id", *columns], marks, label_column=columns)
    sample = sample_of(tmp_path, onehot, [["t0", "0.3", "0.3", "0.4"]])
    assert onehot.task.names == ["ape", "cow", "zebra"]
    assert filled(tmp_path, sample, [[0.1, 0.2, 0.7]]) == [["t0", "0.7", "0.1", "0.2"]]


def test_a_class_names_the_only_value_column_wherever_it_stands(tmp_path):
    training = training_of(tmp_path, ["id", "label"], [["bad"], ["ok"]])
    for rows in ([["bad", "id"], ["0.5", "t0"]], [["id", "bad", "comment"], ["t0", "0.5", "x"]]):
        sample = sample_of(tmp_path, training, rows)
        assert sample.task.names == ["ok", "bad"]
        assert training.with_task(sample.task).targets.tolist() == [1, 0]
    assert filled(tmp_path, sample, [[0.2, 0.8]])[1] == ["t0", "0.8", "x"]


def test_several_positive_classes_add_up(tmp_path):
    rows = [["id", "value"], ["t0", "0.5"]]
    sample = sample_of(tmp_path, three(tmp_path, "abc"), rows, submit_value="probability", positive=["c", "a"])
    assert sample.form["summed"] == ["c", "a"]
    assert filled(tmp_path, sample, [[0.25, 0.25, 0.5]])[1] == ["t0", "0.75"]


def test_f1_of_one_class_asks_which(tmp_path):
    training = training_of(tmp_path, ["id", "label"], [["ng"], ["ok"]])
    with pytest.raises(UserError, match=r"f1-positive scores one class \(ng, ok\): name it with --positive"):
        sample_of(tmp_path, training, [["id", "label"], ["t0", "ok"]], metric="f1-positive")


# ---------------------------------------------------------------- cells of labels


@pytest.mark.parametrize(
    ("cell", "written"), {"a b": "a c", "a|b": "a|c", "a, b": "a, c", "[a, b]": "[a, c]", "": "a c"}.items()
)
def test_a_set_is_written_as_the_sample_writes_it(tmp_path, cell, written):
    rows = [["a b"], ["c"], ["b c"]]
    training = training_of(tmp_path, ["id", "labels"], rows, label_column=["labels"], label_form="list")
    sample = sample_of(tmp_path, training, [["id", "labels"], ["t0", cell]])
    assert filled(tmp_path, sample, [[0.9, 0.1, 0.8]])[1] == ["t0", written]


def test_ranked_labels_are_written_as_the_sample_writes_them(tmp_path):
    sample = sample_of(tmp_path, three(tmp_path, "abc"), [["id", "label"], ["t0", "a;b"]])
    assert filled(tmp_path, sample, [[0.1, 0.2, 0.7]])[1] == ["t0", "c;b"]


# ---------------------------------------------------------------- training tables


def test_tables_are_joined_by_all_columns_that_both_have(tmp_path):
    write_csv(tmp_path / "a.csv", [["num", "id"], ["1", "a0"], ["1", "a1"], ["2", "a1"]])
    write_csv(tmp_path / "b.csv", [["num", "id", "label"], ["2", "a0", "x"], ["3", "a1", "y"]])
    one, other = (tables.read_table(tmp_path / f"{name}.csv", "") for name in "ab")
    with pytest.raises(UserError, match="and no row fits"):
        tables.join(one, other)
    write_csv(tmp_path / "b.csv", [["num", "id", "label"], ["1", "a1", "x"], ["1", "a0", "y"]])
    joined = tables.join(one, tables.read_table(tmp_path / "b.csv", ""))
    assert joined.columns == one.columns | dict(label=["y", "x", ""]), "a row without a partner has a blank cell"


@pytest.mark.parametrize("form", ["binary", "onehot"])
@pytest.mark.parametrize("cell", ["", "nan", "-1", "2", "0.5", "yes"])
def test_a_column_for_each_label_holds_zeros_and_ones(tmp_path, form, cell):
    with pytest.raises(UserError, match="has other cells than 0 and 1 in x, y"):
        training_of(tmp_path, ["id", "x", "y"], [["0", "1"], ["1", cell]], label_column=["x", "y"], label_form=form)


@pytest.mark.parametrize("row", [["0", "0"], ["1", "1"]])
def test_a_column_for_each_class_has_a_single_1_in_a_row(tmp_path, row):
    with pytest.raises(UserError, match="has no single 1 for a1: see --label-form binary"):
        training_of(tmp_path, ["id", "x", "y"], [["0", "1"], row], label_column=["x", "y"], label_form="onehot")


def test_a_long_table_with_two_values_of_one_target_is_refused(tmp_path):
    write_csv(tmp_path / "t.csv", [["image_name", "kind", "label"], ["a0", "q", "0"], ["a0", "q", "1"]])
    table = tables.read_table(tmp_path / "t.csv", "")
    with pytest.raises(UserError, match="two values of q for a0"):
        read_labels(table, SOURCE, cells_of("id"), Flags(target_column="kind"))


def test_a_separator_that_leaves_commas_in_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match="has labels such as a, where ' ' stands between two"):
        training_of(tmp_path, ["id", "labels"], [["a, d"], ["d"]], label_column=["labels"], label_form="list")
    with pytest.raises(UserError, match="--separator is empty"):
        training_of(tmp_path, ["id", "x"], [["a"], ["d"]], label_column=["x"], label_form="list", separator="")


def test_a_number_that_never_changes_is_refused(tmp_path):
    rows = [["1", "5"], ["2", "5"], ["", ""]]
    with pytest.raises(UserError, match="no two different numbers in column y"):
        training_of(tmp_path, ["id", "x", "y"], rows, label_column=["x", "y"], label_form="number")


def test_the_ranges_of_numbers_are_those_of_the_images_kept(tmp_path):
    rows = [["1.5"], ["9"], ["2"], [""]]
    training = training_of(tmp_path, ["id", "x"], rows, label_column=["x"], label_form="number")
    assert training.task.ranges == [[1.5, 9]]
    part = training.part(np.array([0, 2, 3]))
    assert (part.names, part.task.ranges) == (["a0", "a2", "a3"], [[1.5, 2]])


def test_the_samples_ids_are_no_label(tmp_path):
    rows = [["7", "a0", "0.5"], ["8", "a1", "1.5"]]
    write_csv(tmp_path / "train.csv", [["id", "path", "score"], *rows])
    table = tables.read_table(tmp_path / "train.csv", "")
    training = read_labels(table, SOURCE, cells_of("id", "score"), Flags(metric="rmse"))
    assert (training.names, training.task.names) == (["a0", "a1"], ["score"])


def test_a_tsv_with_commas_in_its_cells_is_split_at_tabs(tmp_path):
    (tmp_path / "t.tsv").write_text("a0\ta,b\na1\tc\n")
    assert tables.read_rows(tmp_path / "t.tsv", "")[0] == [["a0", "a,b"], ["a1", "c"]]
