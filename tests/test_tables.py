"""Tables: packed, encoded, separated and spelled in many ways, all of which give the same cells or are refused."""

import gzip
import io
import json
import unicodedata
import zipfile

from common import UserError, read_table

import numpy as np
import pytest
from conftest import png, prepare, refused, write_csv

from kit.data import tables

ROWS = [("image", "label"), ("a0", "cat"), ("a1", "dog"), ("a2", "owl")]
PLAIN = "image,label\na0,cat\na1,dog\na2,owl\n"
COLUMNS = {"image": ["a0", "a1", "a2"], "label": ["cat", "dog", "owl"]}


def is_image(name):
    """Whether a name is that of one of 100 images, a0 to a99."""
    return name in {f"a{i}" for i in range(100)}


def columns_of(tmp_path, content, name="train.csv", **options):
    """Writes a table. → its columns, as they are read."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return tables.read_table(path, "a remedy", **options).columns


def refusal(tmp_path, content, name="train.csv", **options):
    """Writes a table that must be refused. → the message."""
    with pytest.raises(UserError) as error:
        columns_of(tmp_path, content, name, **options)
    return str(error.value)


def zipped(**files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def labelled(flags, rows):
    """Gives the toy competition other labels. → its 40 names and 40 labels."""
    names = [f"{i:04}.png" for i in range(40)]
    labels = [rows[i % len(rows)] for i in range(40)]
    write_csv(flags[1] / "train.csv", [("image_name", "label"), *zip(names, labels, strict=True)])
    return names, labels


def folds(flags):
    return read_table(flags[3] / "prepared" / "folds.csv", "", dtype=str)


def settings(flags):
    return json.loads((flags[3] / "prepared" / "prepared.json").read_text())


# ---------------------------------------------------------------- separators, quotes, packing

SAME = {
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "sep=;": "sep=;\r\n" + PLAIN.replace(",", ";"),
    '"sep=|"': '"sep=|"\n' + PLAIN.replace(",", "|"),
    "sep=, before a table whose first cell has a semicolon": "sep=,\n" + PLAIN,
    "commas at the ends of all lines": PLAIN.replace("\n", ",,\n"),
    "commas at the ends of all lines but the first": PLAIN.replace("\n", ",,\n").replace("label,,", "label"),
    "a column without name and cells": "image,,label\na0,,cat\na1,,dog\na2,,owl\n",
    "blanks before quotes": 'image, label\na0, "cat"\na1,  "dog"\n "a2", "owl"\n',
    "blanks after quotes": '"image" ,"label"\n"a0" ,"cat" \na1,dog\na2,owl\n',
    "old Mac line ends": PLAIN.replace("\n", "\r"),
    "two BOMs": "\ufeff\ufeff" + PLAIN,
    "a BOM that was read as Latin-1": "ï»¿" + PLAIN,
    "UTF-16": PLAIN.encode("utf-16"),
    "a zip that is called .csv": zipped(**{"train.csv": PLAIN}),
    "a zip of ./train.csv": zipped(**{"./train.csv": PLAIN}),
    "a gzip that is called .csv": gzip.compress(PLAIN.encode(), mtime=0),
    "a zip made by macOS": zipped(**{"data/": "", "data/train.csv": PLAIN, "__MACOSX/data/._train.csv": "x"}),
}


@pytest.mark.parametrize("name", SAME)
def test_one_table_written_in_many_ways(name, tmp_path):
    assert columns_of(tmp_path, SAME[name]) == COLUMNS
    assert columns_of(tmp_path, SAME[name], is_name=is_image) == COLUMNS


@pytest.mark.parametrize(
    ("text", "columns"),
    {
        "a comma in each label": ("id;label\na;x, y\nb;z, w\n", {"id": ["a", "b"], "label": ["x, y", "z, w"]}),
        "semicolons in the labels": ("id,labels\na,x;y\nb,z\n", {"id": ["a", "b"], "labels": ["x;y", "z"]}),
        "a tab table with a comma in its header": ("id\tx, y\na\t1\n", {"id": ["a"], "x, y": ["1"]}),
        "quoted commas": ('id;label\na;"x,y"\nb;"z;w"\n', {"id": ["a", "b"], "label": ["x,y", "z;w"]}),
    }.values(),
)
def test_marks_inside_cells_dont_separate(text, columns, tmp_path):
    assert columns_of(tmp_path, text) == columns


def test_decimal_commas_become_points(tmp_path, capsys):
    text = "id;size;label;note\na0;0,5;1,5;x, y\na1;-2,25e1;;z\na2;3;NA;\n"
    columns = columns_of(tmp_path, text)
    assert [*columns.values()][1:] == [["0.5", "-2.25e1", "3"], ["1.5", "", "NA"], ["x, y", "z", ""]]
    assert capsys.readouterr().out.startswith("train.csv: the commas in column 2 (size), 3 (label) are decimal")
    rows, dialect = tables.read_rows(tmp_path / "train.csv", "")
    assert (rows[1], dialect) == (["a0", "0.5", "1.5", "x, y"], (";", ",", "\n"))
    assert columns_of(tmp_path, text, lists=True)["size"] == ["0,5", "-2,25e1", "3"]
    headless = columns_of(tmp_path, "a0.png;0,5\na1.png;0,25\n")
    assert headless == {"1": ["a0.png", "a1.png"], "2": ["0.5", "0.25"]}, "also where each row has one comma"


@pytest.mark.parametrize(
    "text", ["id;tags;x\na;1,5;0.5\nb;2,3;1\n", "id;tags;x\na;1,5,7;1\nb;2,3;2\n", 'id,tags,x\na,"1,5",2\nb,"2,3",3\n']
)
def test_lists_between_commas_are_no_decimals(text, tmp_path):
    """Other numbers have points; or a cell has two commas; or commas separate the columns."""
    (tmp_path / "train.csv").write_text(text)
    rows, dialect = tables.read_rows(tmp_path / "train.csv", "")
    assert (rows[2][1], dialect.decimal) == ("2,3", ".")


@pytest.mark.parametrize("mark", [";", "\t"])
@pytest.mark.parametrize(
    ("cells", "sure"),
    [
        (["1,200", "2,500", "300"], False),
        (["1,200", "-12,500", ""], False),
        (["1,2", "2", "3,1"], False),
        (["0,1", "2", "1,2", "NA"], False),
        (["0,125", "1,200", "300"], True),
        (["0,5", "0,25", "1", "0"], True),
        (["1,5", "5", "2,2"], True),
        (["1,05", "5", "2,1"], True),
        (["21,7", "20,3", "35"], True),
    ],
)
def test_commas_that_may_be_no_decimal_ones_are_refused(cells, sure, mark, tmp_path):
    """Three digits may be thousands, small numbers that come before and after commas pairs of labels."""
    text = f"id{mark}x\n" + "".join(f"a{i}{mark}{cell}\n" for i, cell in enumerate(cells))
    if sure:
        assert columns_of(tmp_path, text)["x"] == [cell.replace(",", ".") for cell in cells]
    else:
        line = refusal(tmp_path, text)
        assert f"has cells such as {cells[0]}, " in line
        assert line.endswith("write points, or 1200 for 1,200, or give --label-form list --separator ,")
        assert columns_of(tmp_path, text, lists=True)["x"] == cells


@pytest.mark.parametrize(("end", "found"), [("\n", "\n"), ("\r\n", "\r\n")])
def test_line_ends_are_found(end, found, tmp_path):
    (tmp_path / "train.csv").write_bytes(PLAIN.replace("\n", end).encode())
    assert tables.read_rows(tmp_path / "train.csv", "")[1] == (",", ".", found)


def test_cells_of_a_sample_keep_their_blanks_and_spelling(tmp_path):
    cafe = unicodedata.normalize("NFD", "café")
    (tmp_path / "train.csv").write_text(f"Id, Usage\nt0, {cafe}\n")
    assert tables.read_rows(tmp_path / "train.csv", "")[0] == [["Id", " Usage"], ["t0", f" {cafe}"]]
    assert columns_of(tmp_path, f"Id, Usage\nt0, {cafe}\n") == {"Id": ["t0"], "Usage": ["café"]}, "a table is NFC"


def test_a_cell_above_131072_characters(tmp_path):
    cell = "1 2 " * 50_000
    assert columns_of(tmp_path, f"id,outline,label\na,{cell},1\n") == {
        "id": ["a"],
        "outline": [cell.strip()],
        "label": ["1"],
    }


@pytest.mark.parametrize(
    "text",
    [
        'image,label\na0,"cat\na1,dog\na2,owl\n',
        'image,label\na0,"cat\na1,"dog\na2,owl\n',
        'image,label\na0,cat\na1,"dog\na2,"owl"\na3,cat\n',
    ],
)
def test_a_quotation_mark_that_isnt_closed_swallows_no_row(text, tmp_path):
    assert "quotation mark that isn't closed" in refusal(tmp_path, text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "text",
    [
        'image,label\na0,"cat\na1,dog\na2,owl"\na3,cat\n',
        'image,label\na0,"cat\na2,owl"\na3,cat\n',
        'image,label\n"a0,cat\na1,dog\na2",owl\na3,cat\n',
        'image,label,x\na0,"cat,1\n\na1,dog,2\na2,owl",1\na3,cat,5\n',
    ],
)
def test_rows_between_quotation_marks_of_two_rows_are_not_lost(text, end, tmp_path):
    assert "has rows inside the quotes of row 2: correct these" in refusal(tmp_path, text.replace("\n", end))


def test_cells_of_several_lines_and_inch_marks_are_read(tmp_path):
    assert columns_of(tmp_path, 'id,note\na,"two\nlines"\nb,5" pipe\n') == {
        "id": ["a", "b"],
        "note": ["two\nlines", '5" pipe'],
    }


@pytest.mark.parametrize("text", ["id,label\na,1\nb\n", "id,label\na,1,\nb,2,x\n", "id,label,\na,1,\nb,2\nc,3,4\n"])
def test_rows_of_other_lengths_are_refused(text, tmp_path):
    assert "has another number of cells than the first row" in refusal(tmp_path, text)


def test_training_on_a_packed_table_with_quotes_and_commas_at_the_ends(toy):
    """The same folds as with the plain table, and the classes without quotes."""
    flags = toy()
    names, labels = labelled(flags, ["cat", "dog", "owl"])
    write_csv(flags[1] / "sample_submit.csv", [("id", "label"), *((f"t{i:03}.png", "cat") for i in range(10))])
    prepare(flags)
    before = (flags[3] / "prepared" / "folds.csv").read_bytes()
    assert settings(flags)["classes"] == ["cat", "dog", "owl"]
    (flags[1] / "train.csv").unlink()
    text = "".join(f'{name}, "{label}",,\n' for name, label in zip(names, labels, strict=True))
    (flags[1] / "train.csv.gz").write_bytes(gzip.compress(f"sep=,\nimage_name, label,,\n{text}".encode(), mtime=0))
    prepare(flags, 32, "--overwrite")
    assert (flags[3] / "prepared" / "folds.csv").read_bytes() == before


# ---------------------------------------------------------------- files that are no tables


@pytest.mark.parametrize(
    ("content", "words"),
    {
        "a web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page, not a table: accept"),
        "a web page with a BOM": (b"\xef\xbb\xbf<html lang=en>\n<p>a,b</p>", "web page, not a table: accept"),
        "an error of a server": (
            b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            "not a table: accept",
        ),
        "a refusal of an API": (b'{"code":403,"message":"You must accept this rules"}', "is JSON, not a table"),
        "JSON rows": (b'[{"image": "a0", "label": 1}]', "is JSON, not a table"),
        "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        "a picture": (png(np.zeros((8, 8, 3), np.uint8)), "is binary"),
        "a workbook": (zipped(**{"[Content_Types].xml": "<x/>", "xl/workbook.xml": "<x/>"}), "save its sheet as CSV"),
        "an old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "of a workbook, save the sheet as CSV"),
        "two tables": (zipped(a="x,y\n1,2\n", b="x,y\n1,2\n"), "holds a, b: one table was expected"),
        "an empty zip": (zipped(**{"data/": ""}), "holds no file: one table was expected"),
        "half a gzip": (gzip.compress(PLAIN.encode(), mtime=0)[:20], "can't be read"),
        "blank lines": (b"\n\n ,\n", "is empty: a remedy"),
    }.values(),
)
def test_other_files_are_refused_with_what_they_are(content, words, tmp_path):
    assert words in refusal(tmp_path, content)


def test_a_table_that_isnt_there_names_those_that_are(toy):
    flags = toy()
    (flags[1] / "train.csv").rename(flags[1] / "Train_Labels_v2.csv")
    line = refused("00_prepare.py", *flags, "--train-csv", "train_labels.csv")
    assert "train_labels.csv is missing: put" in line
    assert line.endswith("(Train_Labels_v2.csv?)")
    assert not flags[3].exists()


# ---------------------------------------------------------------- encodings

READ = {
    "cp1252": ["Crème brûlée", "Noël", "MÜNCHEN", "Straße", "piñata", "pot à eau", "bœuf", "Ñandú", "Baird’s", "20 °C"],
    "cp932": ["猫", "トマト", "苺", "薔薇", "A型", "4月", "Tシャツ", "①", "iPhone用ケース", "赤・青", "髙橋", "㎜"],
}


@pytest.mark.parametrize(("encoding", "word"), [(name, word) for name, words in READ.items() for word in words])
def test_letters_tell_western_from_japanese_tables(encoding, word, tmp_path, capsys):
    text = f"image,label\na0,{word}\na1,x\n"
    assert columns_of(tmp_path, text.encode(encoding))["label"] == [word, "x"]
    assert capsys.readouterr().out == f"train.csv isn't UTF-8: read as {encoding}, {word} (see --encoding)\n"


@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        *zip(["mac_roman"] * 5, ["Crème", "brûlée", "Noël", "Curaçao", "Smörgås"], strict=True),
        *[("cp1251", "кошка"), ("cp949", "고양이"), ("gb18030", "狗 兔子"), ("cp850", "Crème"), ("cp932", "5cm角")],
        *[("euc_jp", "トマト"), ("cp1250", "kočka Łódź"), ("cp1252", "Škoda")],
    ],
)
def test_other_encodings_are_refused_unless_words_or_the_flag_decide(encoding, word, tmp_path):
    raw = f"image,label\na0,{word}\na1,x\n".encode(encoding)
    line = refusal(tmp_path, raw)
    assert "isn't UTF-8, and a word in it may be" in line
    assert f"{word.split()[0]}" in line
    for options in (dict(encoding=encoding), dict(words=["y", f" {unicodedata.normalize('NFD', word)}"])):
        assert columns_of(tmp_path, raw, **options)["label"] == [word, "x"]
    named = f"image,label\n{word},x\na1,x\n".encode(encoding)
    assert columns_of(tmp_path, named, is_name=lambda name: name == word)["image"] == [word, "a1"]


@pytest.mark.parametrize("words", [["ｱｲｳ", "ｶｷｸ"], ["ｱ", "ｲ", "ｳ"], ["ｱ1", "ｲ2"], ["ﾄﾏﾄ", "猫"]])
def test_half_width_kana_are_not_read_as_signs(words, tmp_path):
    raw = ("image,label\n" + "".join(f"a{i},{word}\n" for i, word in enumerate(words))).encode("cp932")
    assert f"{words[0]!r} (cp932)" in refusal(tmp_path, raw)
    assert columns_of(tmp_path, raw, encoding="cp932")["label"] == words


def test_a_flag_that_doesnt_fit_is_refused(tmp_path):
    raw = "image,label\na0,Noël\n".encode("cp1252")
    assert "isn't cp932: give another --encoding" in refusal(tmp_path, raw, encoding="cp932")
    assert "there is no such encoding" in refusal(tmp_path, raw, encoding="latin-99")
    assert columns_of(tmp_path, PLAIN.encode(), encoding="cp932") == COLUMNS, "UTF-8 needs no flag"


def test_the_flag_names_the_encoding_of_all_tables(toy):
    flags = toy()
    words = ["Škoda", "Citroën"]
    rows = [("image_name", "label"), *((f"{i:04}.png", words[i % 2]) for i in range(40))]
    write_csv(flags[1] / "train.csv", rows[:6] + rows[6::2] + rows[7::2], encoding="cp1252")
    sample = [("id", "label"), *((f"t{i:03}.png", "Škoda") for i in range(10))]
    write_csv(flags[1] / "sample_submit.csv", sample, encoding="cp1252")
    prepare(flags, 32, "--encoding", "cp1252", "--metric", "accuracy")
    assert settings(flags)["classes"] == ["Citroën", "Škoda"]
    assert settings(flags)["reading"]["encoding"] == "cp1252", "03 needs it for other test images"


# ---------------------------------------------------------------- headers


def test_a_headless_table_without_endings_keeps_its_first_row(toy):
    flags = toy()
    write_csv(flags[1] / "train.csv", [(f"{i:04}", i % 2) for i in range(40)])
    prepare(flags)
    found = folds(flags)
    assert dict(zip(found.image_name, found.label, strict=True)) == {f"{i:04}": f"{i % 2}" for i in range(40)}


@pytest.mark.parametrize(
    "text",
    [
        "a0,0\na1,1\na2,0\n",
        "a500,0\na1,1\na2,0\n",
        "a0,cat\na1,dog\na2,cat\n",
        "0,a5,cat\n1,a6,dog\n2,a7,cat\n",
        "a0,1\na0,2\na1,1\na1,2\n",
    ],
    ids=["numbers", "its first image is missing", "words", "an index", "several rows an image"],
)
def test_a_first_row_like_the_others_is_no_header(text, tmp_path):
    columns = columns_of(tmp_path, text, is_name=is_image)
    assert [*columns] == [f"{i + 1}" for i in range(len(columns))]
    assert [*map(",".join, zip(*columns.values(), strict=True))] == text.split()
    assert "--train-header" in refusal(tmp_path, "a0,label\na1,1\na2,0\n", is_name=is_image)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("id,0,1\n5,0,1\n6,1,0\n7,0,1\n", ["id", "0", "1"]),
        (",file,label\n0,5,1\n1,6,0\n", ["", "file", "label"]),
        ("0,1\n0,0\n1,1\n2,0\n", ["0", "1"]),
        ("patient,image,age\n1,5,30\n1,6,30\n2,7,1\n", ["patient", "image", "age"]),
        ("image,label\nx,1\ny,0\n", ["image", "label"]),
    ],
    ids=["columns of numbers", "an index", "pandas numbers the columns", "a patient", "no image is there"],
)
def test_a_first_row_of_names_is_a_header(text, names, tmp_path):
    assert [*columns_of(tmp_path, text, is_name=lambda name: name in map(str, range(100)))] == names


def test_a_first_row_that_may_be_both_is_refused(tmp_path):
    """An image is called `image`; a class is called as its column; both may be told by the flag."""
    for text in ("image,label\na0,1\na1,0\n", "x,cat\na0,dog\na1,cat\n"):
        line = refusal(tmp_path, text, is_name=lambda name: name == "image" or is_image(name))
        assert "give --train-header yes or no" in line
        for header, count in (("yes", 2), ("no", 3)):
            columns = columns_of(tmp_path, text, header=header, is_name=is_image)
            assert [len(cells) for cells in columns.values()] == [count, count]


# ---------------------------------------------------------------- COCO


def coco(images, annotations, **more):
    return json.dumps(dict(images=images, annotations=[dict(image_id=i, category_id=k) for i, k in annotations]) | more)


def test_coco_ids_are_one_as_numbers_and_as_words(toy):
    flags = toy()
    images = [dict(id=i, file_name=f"{i:04}.png") for i in range(40)]
    annotations = [([i, str(i), float(i)][i % 3], i % 2) for i in range(40)]
    (flags[1] / "train.json").write_text(coco(images, annotations))
    write_csv(flags[1] / "sample_submit.csv", [("file_name", "category_id"), *((f"t{i:03}.png", 1) for i in range(10))])
    prepare(flags, 32, "--train-csv", "train.json")
    found = folds(flags)
    assert dict(zip(found.image_name, found.label, strict=True)) == {f"{i:04}.png": f"{i % 2}" for i in range(40)}


def test_images_and_annotations_without_each_other_are_counted(tmp_path, capsys):
    images = [dict(id=1, file_name="a1"), dict(id=2, file_name="a2", site=7.0), dict(id=3, file_name="a3", site=None)]
    columns = columns_of(tmp_path, coco(images, [(1, 5), ("2", 6.0), (9, 5)]), "train.json")
    assert columns == {"id": ["1", "2"], "file_name": ["a1", "a2"], "site": ["", "7"], "category_id": ["5", "6"]}
    shown = capsys.readouterr().out
    assert "1 of 3 images have no annotation and are left out" in shown
    assert "annotations of 1 images that it doesn't list are left out: 9" in shown
    assert "lists no image, or none that has" in refusal(tmp_path, coco(images, [(8, 1), (9, 0)]), "train.json")
    twice = [dict(id=1, file_name="a1"), dict(id="1", file_name="a2")]
    assert "names 1 more than once" in refusal(tmp_path, coco(twice, [(1, 1)]), "train.json")


# ---------------------------------------------------------------- several tables


def table_of(name, **columns):
    return tables.Table(tables.Path(name), columns)


def test_a_join_counts_rows_without_a_partner(capsys):
    labels = table_of("labels.csv", id=["a", "b", "c"], label=["1", "0", "1"])
    sites = table_of("sites.csv", id=["c", "a", "d"], site=["S", "T", "U"])
    assert tables.join(labels, sites).columns == dict(id=["a", "b", "c"], label=["1", "0", "1"], site=["T", "", "S"])
    assert capsys.readouterr().out == "sites.csv has no row for 1 of the 3 rows of labels.csv\n"
    tables.join(labels, table_of("all.csv", id=["a", "b", "c"], site=["S", "T", "U"]))
    assert capsys.readouterr().out == ""


def test_a_join_by_a_column_that_holds_something_else_is_refused():
    labels = table_of("labels.csv", **{"": ["0", "1", "2"]}, id=["a", "b", "c"], label=["1", "0", "1"])
    sites = table_of("sites.csv", **{"": ["0", "1", "2"]}, id=["a", "c", "b"], site=["S", "T", "U"])
    with pytest.raises(UserError, match=r"1 of 3 rows fit; by '' alone 3: rename the columns"):
        tables.join(labels, sites)


def test_tables_below_each_other_say_what_one_lacks(capsys):
    first = table_of("train.csv", id=["a"], label=["1"])
    second = table_of("val.csv", id=["b"], Label=["0"])
    assert tables.stack([first, second]).columns == dict(id=["a", "b"], label=["1", ""], Label=["", "0"])
    assert capsys.readouterr().out.splitlines() == [
        "train.csv lacks Label, which other tables have: blank there",
        "val.csv lacks label, which other tables have: blank there",
    ]
    other = table_of("more.csv", file=["b"], Label=["0"])
    with pytest.raises(UserError, match=r"more\.csv has the columns file, Label, and train\.csv others"):
        tables.stack([first, other])


# ---------------------------------------------------------------- numbers and blank cells


def test_what_a_number_is():
    assert tables.is_number("0", "-1", "+2.50", ".5", "7.", "1e5", "1E-05", "007")
    others = [
        "",
        "-",
        ".",
        "1_12",
        "inf",
        "nan",
        "NaN",
        "0x1",
        "１",
        "1 2",
        " 1",
        "1,5",
        "1e",
        "e5",
        "True",
        "1e999",
        "1.2.3",
    ]
    assert [cell for cell in others if tables.is_number(cell)] == []


def test_words_for_a_missing_number_are_blank_beside_numbers_only():
    words = ["nan", "NA", "N/A", "None", "null", "<NA>"]
    assert tables.blanks(["1", "", "2.5", *words]) == [False, True, False, *[True] * len(words)]
    assert tables.blanks(["cat", " ", *words]) == [False, True, *[False] * len(words)]
    assert tables.blanks(["", "None", "cancer"]) == [True, False, False]
