"""Sample submissions, labels and tables, without images: what would end in a submission that means something else."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_csv

from common import UserError
from kit.data import labels, tables
from kit.submit import sample_submission
from kit.submit.submission import check_submission, submission_rows

ARGS = dict(
    image_column=None, label_column=None, label_form="auto", separator=" ", target_column=None, drop_unlabelled=False,
    submit_header="auto", submit_value="auto", positive=None, metric="auto",
)  # fmt: skip


def source_of(*names):
    return SimpleNamespace(path="images", find=lambda name: name if name in names else None)


SOURCE = source_of(*(f"{part}{i}" for part in "at" for i in range(6)))


def truth_of(tmp_path, header, rows, **args):
    """→ the Labels of a training table of images a0, a1, …"""
    write_csv(tmp_path / "train.csv", [header, *([f"a{i}", *row] for i, row in enumerate(rows))])
    table = tables.read_table(tmp_path / "train.csv", "")
    return labels.read_labels(SimpleNamespace(**ARGS | args), table, SOURCE, args.get("header", ["id"]))


def sample_of(tmp_path, truth, rows, tests=None, source=SOURCE, **args):
    write_csv(tmp_path / "sample.csv", rows)
    if tests:
        write_csv(tmp_path / "tests.csv", tests)
        tests = tables.read_table(tmp_path / "tests.csv", "")
    return sample_submission.read_sample(SimpleNamespace(**ARGS | args), tmp_path / "sample.csv", source, truth, tests)


def filled(tmp_path, truth, found, predictions, **prepared):
    """→ the rows of a submission, written and checked."""
    prepared = dict(task=truth.task, classes=truth.classes, submission=found.form, metric="accuracy") | prepared
    rows = submission_rows(found.layout, np.array(predictions, float), prepared)
    write_csv(tmp_path / "out.csv", rows)
    check_submission(tmp_path / "out.csv", found.layout, prepared)
    return rows


def three(tmp_path, names="012"):
    return truth_of(tmp_path, ["id", "label"], [[name] for name in names])


def test_a_column_for_each_class_is_no_ranking_where_the_header_names_them(tmp_path):
    found = sample_of(tmp_path, three(tmp_path), [["id", "0", "1", "2"], ["t0", "0", "0", "1"]])
    assert (found.form["value"], found.form["columns"]) == ("probability", ["0", "1", "2"])
    found = sample_of(tmp_path, three(tmp_path, "abc"), [["id", "first", "second"], ["t0", "b", "a"]])
    assert (found.form["value"], found.form["top"]) == ("top", 2)


def test_classes_that_are_called_like_images_are_a_header(tmp_path):
    source = source_of("0", "1", "2")
    found = sample_of(tmp_path, three(tmp_path), [["id", "0", "1", "2"], ["1", "0.3", "0.3", "0.4"]], source=source)
    assert (found.form["header"], found.images) == (["id", "0", "1", "2"], ["1"])
    ranked = [["t0", "b", "a", "c"], ["t1", "a", "b", "c"]]
    assert sample_of(tmp_path, three(tmp_path, "abc"), ranked).form["header"] is None


def test_numbers_go_to_the_columns_that_their_names_begin_with(tmp_path, capsys):
    truth = truth_of(
        tmp_path, ["id", "x_mean", "y_mean"], [["1", "10"], ["2", "20"]], label_column=["x_mean", "y_mean"]
    )
    found = sample_of(tmp_path, truth, [["id", "y", "x"], ["t0", "0", "0"]])
    assert filled(tmp_path, truth, found, [[1.5, 15]], **truth.ranges())[1] == ["t0", "15", "1.5"]
    assert "other names: y ← y_mean, x ← x_mean" in capsys.readouterr().out
    sample_of(tmp_path, truth, [["id", "p", "q"], ["t0", "0", "0"]])
    assert "so they are taken in order: p ← x_mean, q ← y_mean" in capsys.readouterr().out


def test_the_ids_of_a_table_of_pixels_go_before_its_row_numbers(tmp_path):
    source = source_of("1", "2", "3")
    source.table = True
    tests = [["row", "id"], ["1", "3"], ["2", "1"], ["3", "2"]]
    found = sample_of(tmp_path, three(tmp_path), [["id", "label"], ["1", "0"], ["2", "0"], ["3", "0"]], tests, source)
    image_of = dict(zip(found.units.tolist(), found.images, strict=True))
    assert [image_of[unit] for unit in found.layout.unit] == ["2", "3", "1"]


def test_an_image_that_two_ids_share_is_refused(tmp_path):
    tests = [["image_name", "patient"], ["t0", "A"], ["t1", "A"], ["t1", "B"], ["t2", "B"]]
    with pytest.raises(UserError, match="two ids that share the image t1"):
        sample_of(tmp_path, three(tmp_path), [["patient", "label"], ["A", "0"], ["B", "0"]], tests)


def test_an_id_that_the_table_of_tests_lacks_costs_no_other_id_its_images(tmp_path):
    tests = [["image_name", "patient"], ["t0", "A"], ["t1", "A"], ["t2", "B"]]
    found = sample_of(tmp_path, three(tmp_path), [["patient", "label"], ["B", "0"], ["A", "0"], ["C", "0"]], tests)
    assert dict(zip(found.images, found.units.tolist(), strict=True)) == dict(t0=1, t1=1, t2=0, C=2)


def test_tables_are_joined_by_all_columns_that_both_have(tmp_path):
    write_csv(tmp_path / "a.csv", [["num", "id"], ["1", "a0"], ["2", "a1"]])
    write_csv(tmp_path / "b.csv", [["num", "id", "label"], ["2", "a0", "x"], ["1", "a1", "y"]])
    one, other = (tables.read_table(tmp_path / f"{name}.csv", "") for name in "ab")
    with pytest.raises(UserError, match="and no row fits"):
        tables.join(one, other)
    write_csv(tmp_path / "b.csv", [["num", "id", "label"], ["2", "a1", "x"], ["1", "a0", "y"]])
    assert tables.join(one, tables.read_table(tmp_path / "b.csv", "")).columns["label"] == ["y", "x"]


@pytest.mark.parametrize("form", ["binary", "onehot"])
@pytest.mark.parametrize("cell", ["", "nan", "-1", "2", "0.5", "yes"])
def test_a_column_for_each_label_holds_zeros_and_ones(tmp_path, form, cell):
    with pytest.raises(UserError, match="has other cells than 0 and 1 in x, y"):
        truth_of(tmp_path, ["id", "x", "y"], [["0", "1"], ["1", cell]], label_column=["x", "y"], label_form=form)


def test_a_long_table_with_two_values_of_one_target_is_refused(tmp_path):
    write_csv(tmp_path / "t.csv", [["image_name", "kind", "label"], ["a0", "q", "0"], ["a0", "q", "1"]])
    args, table = SimpleNamespace(**ARGS | dict(target_column="kind")), tables.read_table(tmp_path / "t.csv", "")
    with pytest.raises(UserError, match="two values of q for a0"):
        labels.read_labels(args, table, SOURCE, ["id"])


@pytest.mark.parametrize(
    ("cell", "written"), {"a b": "a c", "a|b": "a|c", "a, b": "a, c", "[a, b]": "[a, c]", "": "a c"}.items()
)
def test_a_set_is_written_as_the_sample_writes_it(tmp_path, cell, written):
    truth = truth_of(tmp_path, ["id", "labels"], [["a b"], ["c"], ["b c"]], label_column=["labels"], label_form="list")
    found = sample_of(tmp_path, truth, [["id", "labels"], ["t0", cell]])
    assert filled(tmp_path, truth, found, [[0.9, 0.1, 0.8]])[1] == ["t0", written]


def test_ranked_labels_are_written_as_the_sample_writes_them(tmp_path):
    found = sample_of(tmp_path, three(tmp_path, "abc"), [["id", "label"], ["t0", "a;b"]])
    assert filled(tmp_path, three(tmp_path, "abc"), found, [[0.1, 0.2, 0.7]])[1] == ["t0", "c;b"]


def test_more_ranked_columns_than_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match="has 4 value columns for 3 classes"):
        sample_of(tmp_path, three(tmp_path, "abc"), [["id", "p1", "p2", "p3", "p4"], ["t0", *"abca"]])


def test_a_separator_that_leaves_commas_in_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match="has labels such as a, where ' ' stands between two"):
        truth_of(tmp_path, ["id", "labels"], [["a, d"], ["d"]], label_column=["labels"], label_form="list")
    with pytest.raises(UserError, match="--separator is empty"):
        truth_of(tmp_path, ["id", "x"], [["a"], ["d"]], label_column=["x"], label_form="list", separator="")


def test_a_number_that_never_changes_is_refused(tmp_path):
    with pytest.raises(UserError, match="no two different numbers in column y"):
        truth_of(
            tmp_path, ["id", "x", "y"], [["1", "5"], ["2", "5"], ["", ""]], label_column=["x", "y"], label_form="number"
        )


def test_the_samples_ids_are_no_label(tmp_path):
    rows = [["7", "a0", "0.5"], ["8", "a1", "1.5"]]
    write_csv(tmp_path / "train.csv", [["id", "path", "score"], *rows])
    args = SimpleNamespace(**ARGS | dict(metric="rmse"))
    truth = labels.read_labels(args, tables.read_table(tmp_path / "train.csv", ""), SOURCE, ["id", "score"])
    assert (truth.names, truth.classes) == (["a0", "a1"], ["score"])


def test_a_tsv_with_commas_in_its_cells_is_split_at_tabs(tmp_path):
    (tmp_path / "t.tsv").write_text("a0\ta,b\na1\tc\n")
    assert tables.read_rows(tmp_path / "t.tsv", "") == [["a0", "a,b"], ["a1", "c"]]


def test_a_class_names_the_only_value_column_wherever_it_stands(tmp_path):
    truth = truth_of(tmp_path, ["id", "label"], [["bad"], ["ok"]])
    for rows in ([["bad", "id"], ["0.5", "t0"]], [["id", "bad", "comment"], ["t0", "0.5", "x"]]):
        found = sample_of(tmp_path, truth, rows)
        assert sample_submission.positive_class(SimpleNamespace(**ARGS), "", truth, found.form) == "bad"
    assert filled(tmp_path, truth.with_second("bad"), found, [[0.2, 0.8]], positive="bad")[1] == ["t0", "0.8", "x"]


def test_f1_of_one_class_asks_which(tmp_path):
    truth = truth_of(tmp_path, ["id", "label"], [["ng"], ["ok"]])
    found = sample_of(tmp_path, truth, [["id", "label"], ["t0", "ok"]])
    with pytest.raises(UserError, match=r"f1-positive scores one class \(ng, ok\): name it with --positive"):
        sample_submission.positive_class(SimpleNamespace(**ARGS | dict(metric="f1-positive")), "", truth, found.form)
