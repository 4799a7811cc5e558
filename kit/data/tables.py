"""Tables of a competition: CSV, TSV and COCO-like JSON, packed or not, in any encoding."""

import csv
import gzip
import io
import json
import math
import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import UserError, listing, say

import pandas as pd

from kit.data.archives import is_litter, nearby
from kit.data.decode import IMAGE_ENDINGS

TRAIN = "train.csv", "train.tsv", "train_labels.csv", "trainLabels.csv", "labels.csv", "train_master.tsv"
SAMPLE = "sample_submit.csv sample_submission.csv sampleSubmission.csv SampleSubmission.csv submission_format.csv"
SAMPLE = (*SAMPLE.split(), "sample_submit.tsv", "sample.csv")
NO_SAMPLE = "put the sample there, name it with --sample-submit, or make one of test.csv with --submit-columns"
PACKED = "", ".zip", ".gz"  # what may follow a table's name
OTHER_FILES = {  # how a file begins that is no table → what it is, and the remedy
    r"\s*<(!doctype|html|\?xml)": "is a web page, not a table: accept the competition's rules, then download it again",
    r"version https://git-lfs": "is a pointer of Git LFS, not a table: fetch the file itself, git lfs pull",
}
ENCODINGS = "cp932 cp1252 mac_roman euc_jp cp1250 cp1251 cp850 gb18030 cp949 big5".split()  # besides UTF-8 and UTF-16
# Letters beyond ASCII that look like words. cp932: of two bytes, with kana or without a small ASCII letter beside them
# (accents misread as kanji have one). cp1252: accented letters amid ASCII letters, and a sign beside others.
SURE = 0.7  # least share of such letters in a right reading
WIDE, SMALL, CAPITAL = r"\xa1-\ud7ff\uf900-\uff60\uffe0-\uffef", "ß-öø-ÿ", "À-ÖØ-Þ"
LETTERS = {
    "cp932": re.compile(rf"(?<![a-z{WIDE}])[{WIDE}]++(?![a-z])|[{WIDE}]*[ぁ-ヿ][{WIDE}]*"),
    "cp1252": re.compile(
        rf"(?<=[A-Za-z])[{SMALL}]{{1,2}}(?![A-Z{CAPITAL}])|\b[{SMALL}](?=[a-z])|\bà\b|œ(?=u)|(?<=[a-z])’(?=[a-z])|"
        rf"(?<![a-z{SMALL}])[{CAPITAL}](?=[A-Za-z])|(?<=[A-Z])[{CAPITAL}](?![a-z])|"
        r"(?<=[ -~])[°²³½](?![^\0-~])|(?<![^\0-~])[½±µ](?=[ -~])"
    ),
}
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MISSING = "nan", "na", "n/a", "<na>", "null", "none"  # a missing number, as libraries write it, in lower case
csv.field_size_limit(2**31 - 1)  # a cell may hold an image's outline
CHECKED_ROWS = 200  # of a column that are checked for image names or ids


class Dialect(NamedTuple):
    """How a table is written."""

    separator: str = ","  # between cells
    decimal: str = "."  # of its numbers
    newline: str = "\n"  # at the end of a line: or "\r\n"


class Table(NamedTuple):
    """A table's columns by name."""

    path: Path  # where it was read
    columns: dict[str, list[str]]  # the cells of each, stripped

    def __len__(self):
        return len(next(iter(self.columns.values())))


def find_table(folder, given, usual):
    """Return the path of a table: the one given by a flag, else the first of the `usual` names that exists, packed or
    not, else the first name."""
    paths = [folder / f"{name}{packed}" for name in ([given] if given else usual) for packed in PACKED]
    return next((path for path in paths if path.exists()), paths[0])


def read_bytes(path, remedy):
    """Return the bytes of a file or, where it is packed by zip or gzip, whatever its name, those of the only file in
    it. Raises UserError; `remedy` ends its message."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            return gzip.decompress(raw)
        if raw[:2] != b"PK":
            return raw
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            files = [name for name in archive.namelist() if name[-1] != "/"]
            names = [name for name in files if not any(map(is_litter, name.removeprefix("./").split("/")))]
            refuse(path, "[Content_Types].xml" in names, "is an Excel workbook: save its sheet as CSV")
            refuse(path, len(names) != 1 and (names or ["no file"]), "holds *: one table was expected")
            return archive.read(names[0])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}; {nearby(path.parent, path.name)}") from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} can't be read ({error}): {remedy}") from None


def read_text(path, remedy, encoding=None, known=lambda word: False):
    """Return the text of a file, packed or not: UTF-8, UTF-16 with BOM, or else in `encoding`, by default the one in
    which words are `known` (a function: word → bool) or look like words. Raises UserError."""
    raw = read_bytes(path, remedy)
    # A spreadsheet's "Unicode text" is UTF-16, marked by its first two bytes.
    text = decoded(raw, "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    if text is None or "\0" in text:
        binary = not encoding and b"\0" in raw
        refuse(path, binary, f"is binary, not text (of a workbook, save the sheet as CSV): {remedy}")
        encoding = encoding or guess_encoding(path, raw, known)
        text = decoded(raw, encoding)
        refuse(path, text is None, f"isn't {encoding}: give another --encoding, or save it as UTF-8")
    text = text.replace("\ufeff", "").removeprefix("ï»¿")  # BOMs, of which some programs write two
    for beginning, problem in OTHER_FILES.items():
        refuse(path, re.match(beginning, text, re.IGNORECASE), problem)
    return text


def decoded(raw, encoding):
    """Return the text of bytes, or None where they are of another encoding. Raises UserError for an unknown one."""
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None
    except LookupError:
        raise UserError(f"--encoding {encoding}: there is no such encoding: give cp932, cp1252 or another") from None


def guess_encoding(path, raw, known):
    """Return the encoding of bytes that aren't UTF-8, as `read_text` does, and print it."""
    cells = [*dict.fromkeys(re.findall(rb'[^,;\t\r\n"]*[^\0-\x7f][^,;\t\r\n"]*', raw))]
    readings = {name: [decoded(cell, name) for cell in cells] for name in ENCODINGS}
    words = {name: [*map(clean, found)] for name, found in readings.items() if None not in found}
    hits = {name: sum(map(known, words[name][:CHECKED_ROWS])) for name in words}
    shares = {name: share_of_letters(words[name], LETTERS[name]) for name in words if name in LETTERS}
    best = max(words, key=lambda name: (hits[name], shares.get(name, 0)))
    rival = max((share for name, share in shares.items() if name != best), default=0)
    clear = hits[best] or shares.get(best, 0) > max(SURE, 2 * rival)
    shown = {words[name][0]: f"{words[name][0]!r} ({name})" for name in reversed(words)}
    problem = "isn't UTF-8, and a word in it may be *: name the encoding with --encoding, or save it as UTF-8"
    refuse(path, not clear and [*shown.values()][::-1], problem)
    say(f"{path.name} isn't UTF-8: read as {best}, {listing(words[best], 3)} (see --encoding)")
    return best


def share_of_letters(words, letters):
    """Return the share of the letters beyond ASCII that the regular expression `letters` finds."""
    text = "\n".join(words)
    count = sum(not letter.isascii() for letter in text)
    return sum(map(len, letters.findall(text))) / count if count else 1.0  # there were blanks only


def read_rows(path, remedy, encoding=None, known=lambda word: False, lists=False):
    """Return (the rows of a table as lists of strings, without blank lines; its Dialect). Decimal commas have become
    points, unless commas make `lists`. encoding and known: as `read_text` takes them. Raises UserError; `remedy` ends
    its message."""
    text = read_text(path, remedy, encoding, known)
    problem = "is JSON, not a table: accept the competition's rules and download it again, or end its name in .json"
    refuse(path, re.match(r'\s*(\{\s*"|\[\s*\{)', text), problem)
    named = re.match(r'"?sep=([,;\t|])"?[,;\t ]*(\r\n?|\n)', text)  # Excel's first line
    text = text[named.end() :] if named else text
    separator = named[1] if named else separator_of(text, ".tsv" in path.suffixes, known)
    rows = split_rows(text, separator)
    refuse(path, not rows, f"is empty: {remedy}")
    least = min(map(len, rows))
    if max(map(len, rows)) > least and not any("".join(row[least:]).strip() for row in rows):
        rows = [row[:least] for row in rows]  # commas at the ends of lines
    ragged = [i + 1 for i, row in enumerate(rows) if len(row) != len(rows[0])]
    odd = ragged or ('"' in text and [i + 1 for i, row in enumerate(rows) if re.search(r"[\r\n]", "".join(row))])
    if odd and '"' in text:
        try:
            split_rows(text, separator, strict=True)
        except csv.Error as error:
            refuse(path, odd, f"has a quotation mark that isn't closed ({error}), near row *: correct it")
    refuse(path, ragged, f"has another number of cells than the first row ({len(rows[0])}) in row *: correct it")
    for i in odd or ():  # a quotation mark too many may have swallowed rows
        marks = {line.count(separator) for line in separator.join(rows[i - 1]).splitlines() if line.strip()}
        refuse(path, marks == {len(rows[0]) - 1} != {0} and [i], "has rows inside the quotes of row *: correct these")
    commas = not lists and separator != "," and "," in text and write_points(path, rows)
    return rows, Dialect(separator, "," if commas else ".", "\r\n" if "\r\n" in text else "\n")


def split_rows(text, separator, strict=False):
    """Return the rows of a text as lists of strings, without blank lines. strict: raise csv.Error where quotation marks
    don't pair."""
    blanks = re.search(rf'(^|{re.escape(separator)}) +"', text, re.MULTILINE) is not None  # a, "b"
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=blanks, strict=strict)
    return [row for row in rows if "".join(row).strip()]


def separator_of(text, tabs, known):
    """Return what separates the cells: of the marks in the first line the one by which all rows have as many, and more
    than one; of several the one that makes a column of most `known` names, then a tab, a semicolon beside decimal
    commas, a comma. tabs: prefer these."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    marks = [mark for mark in "\t;," if mark in first]
    if len(marks) < 2 or (tabs and "\t" in marks):
        return (*marks, ",")[0]
    readings = {mark: split_rows(text, mark) for mark in marks}
    fits = [mark for mark, rows in readings.items() if rows and {*map(len, rows)} == {len(rows[0])} != {1}]
    columns = {mark: zip(*readings[mark][:CHECKED_ROWS], strict=True) for mark in fits}
    names = {mark: max(sum(map(known, {*map(clean, cells)})) for cells in columns[mark]) for mark in fits}
    fits = [mark for mark in fits if names[mark] == max(names.values())]
    if "," in fits and ";" in fits:
        cells = [cell for row in readings[";"][1:] or readings[";"] for cell in row if "," in cell]
        fits.remove("," if cells and is_number(*(cell.strip().replace(",", ".") for cell in cells)) else ";")
    return (*fits, *("," if "," in marks else marks))[0]


def write_points(path, rows):
    """Turn the decimal commas in columns of numbers into points, unless other numbers have points, and print where.
    → whether there were any. Raises UserError where commas may as well separate thousands, or labels."""
    columns = [[cell.strip() for cell in cells[1:] or cells] for cells in zip(*rows, strict=True)]
    if any("." in cell and is_number(cell) for cells in columns for cell in cells):
        return False
    points = [[cell.replace(",", ".") for cell in cells] for cells in columns]
    found = [i for i, cells in enumerate(points) if cells != columns[i] and are_numbers(cells)]
    doubtful = [next(cell for cell in columns[i] if "," in cell) for i in found if is_doubtful(columns[i])]
    problem = "has cells such as *, with decimal commas, thousands or two labels: write points, or 1200 for 1,200"
    refuse(path, doubtful, f"{problem}, or give --label-form list --separator ,")
    for row in rows:
        for i in found:
            row[i] = point if is_number(point := row[i].strip().replace(",", ".")) else row[i]
    if found:
        numbers = listing(f"{i + 1} ({rows[0][i].strip()})" for i in found)
        say(f"{path.name}: the commas in column {numbers} are decimal ones (in lists, give --separator ,)")
    return bool(found)


def is_doubtful(cells):
    """Return whether commas in a column of numbers may be no decimal ones: each is before three digits (1,200), or the
    cells may be one label or two, which share labels (3,1 beside 1,2 and 2) and exceed 1."""
    numbers = {cell for cell in cells if is_number(cell.replace(",", "."))}
    commas = [cell for cell in numbers if "," in cell]
    thousands = all(re.fullmatch("[+-]?[1-9][0-9]{0,2},[0-9]{3}", cell) for cell in commas)
    shared = {cell.partition(",")[2] for cell in commas} & {cell.partition(",")[0] for cell in numbers}
    pairs = all(re.fullmatch(r"(0|[1-9][0-9]?)(,(?!\1$)(0|[1-9][0-9]?))?", cell) for cell in numbers)
    return thousands or bool(shared and pairs and any(float(cell.replace(",", ".")) > 1 for cell in numbers))


def read_table(path, remedy, header="auto", is_name=None, encoding=None, words=(), lists=False):
    """Return the Table in a file. Columns without a header are called 1, 2, …; those of a COCO-like JSON are the fields
    of its images, and category_id. Columns without name and cells are left out.

    header: yes, no, or auto, which `is_bare` decides. is_name: a function that tells whether an image has this name, or
    None; words: cells that other tables hold. Both tell in which encoding a table is that isn't UTF-8. lists: whether
    commas separate labels in a cell, and are no decimal ones."""
    if ".json" in path.suffixes:
        return read_coco(path, remedy, encoding)
    known = {clean(word) for word in words if not word.isascii()}
    rows, _ = read_rows(path, remedy, encoding, lambda word: word in known or bool(is_name and is_name(word)), lists)
    columns = [[*map(clean, cells)] for cells in zip(*rows, strict=True)]
    if header == "no" or (header == "auto" and is_bare(path, columns, is_name)):
        return Table(path, {f"{i + 1}": cells for i, cells in enumerate(columns)})
    refuse(path, len(rows) == 1, "has a header and no rows: download it again")
    columns = [(name, cells) for name, *cells in columns if name or any(cells)]
    refuse(path, [*map(repr, repeated(name for name, _ in columns))][:1], "has several columns *: rename them")
    return Table(path, dict(columns))


def clean(cell):
    """Return a cell without blanks around it, in Unicode's composed form: é is one letter."""
    return unicodedata.normalize("NFC", cell).strip()


def is_bare(path, columns, is_name):
    """Return whether the table has no header: its first row names an image file or, by `is_name`, an image; or
    it is like the names of images below it, im0 above im1. Raises UserError where the other columns say otherwise.
    columns: the cells of each, the first row among them."""
    if any(cells[0].lower().endswith(IMAGE_ENDINGS) for cells in columns):
        return True
    votes, others = [], []
    for first, *cells in columns if is_name else []:
        checked = {*cells[:CHECKED_ROWS]} - {""}
        if 2 * sum(map(is_name, checked)) <= len(checked):
            others.append((first, cells))
            continue
        distinct = len({*cells}) == len(cells)
        alike, *forms = (re.sub("[0-9]+", "0", name) for name in (first, *checked))  # that a program numbered
        like = is_name(first) or alike in forms
        votes.append((distinct, bool(like and not (distinct and first in cells))))
    votes = {like for distinct, like in votes if distinct == max(votes)[0]}
    words = [(first, cells) for first, cells in others if votes and first and not is_number(first)]
    against = any(are_numbers(cells) if True in votes else first in cells for first, cells in words)
    problem = "may begin with a header or with a row, *: give --train-header yes or no"
    refuse(path, (len(votes) > 1 or against) and [cells[0] for cells in columns], problem)
    return True in votes


def read_coco(path, remedy, encoding=None):
    """Return the Table of a JSON with `images` and, for training images, `annotations`: a row for each image, with its
    category_id (several are separated by blanks). Images without annotation are left out where others have one, and
    annotations of images that it doesn't list; how many is printed."""
    try:
        content = json.loads(read_text(path, remedy, encoding))
        images, annotations, categories = content["images"], content.get("annotations", []), {}
        for annotation in annotations:
            categories.setdefault(as_cell(annotation["image_id"]), {})[as_cell(annotation["category_id"])] = None
        ids = [as_cell(image["id"]) for image in images] if categories else [None] * len(images)
        kept = [image for image, i in zip(images, ids, strict=True) if i in categories or not categories]
        names = dict.fromkeys(key for image in kept for key in image if not isinstance(image[key], (list, dict)))
        columns = {name: [as_cell(image.get(name)) for image in kept] for name in names}
        if categories:
            columns["category_id"] = [" ".join(categories[i]) for i in ids if i in categories]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no JSON of images and annotations ({error!r}): name a table") from None
    refuse(path, not kept, "lists no image, or none that has an annotation: download it again")
    if categories:
        check_unique(path, ids)
        listed = {*ids}
        if len(kept) < len(images):
            say(f"{path.name}: {len(images) - len(kept)} of {len(images)} images have no annotation and are left out")
        if lost := [i for i in categories if i not in listed]:
            say(f"{path.name}: annotations of {len(lost)} images that it doesn't list are left out: {listing(lost)}")
    return Table(path, columns)


def as_cell(value):
    """Return a value of a JSON as a cell: null is blank, and 3.0, as pandas writes numbers beside gaps, is 3."""
    return "" if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value)


def stack(parts):
    """Return the Table of tables one below the other; a column that one of them lacks is blank there, and that is
    printed. Raises UserError where one shares no column with the first."""
    names = dict.fromkeys(name for part in parts for name in part.columns)
    for part in parts:
        problem = f"has the columns *, and {parts[0].path} others: name them alike in both, or see --train-header"
        refuse(part.path, part.columns.keys().isdisjoint(parts[0].columns) and [*part.columns], problem)
        if lacks := [name for name in names if name not in part.columns]:
            say(f"{part.path.name} lacks {listing(lacks)}, which other tables have: blank there")
    return Table(parts[0].path, pd.concat([pd.DataFrame(part.columns) for part in parts]).fillna("").to_dict("list"))


def join(table, other):
    """Return `table` with the columns of `other` that it lacks, joined by all columns that both have. Rows of `table`
    without a partner stay, with blank cells, and are counted. Raises UserError where no column is shared, no row has a
    partner, or one column by itself would find more."""
    left, right = pd.DataFrame(table.columns), pd.DataFrame(other.columns)
    shared = [name for name in left if name in right]
    refuse(other.path, not shared, f"has no column of {table.path}: they can't be joined")
    twice = [", ".join(key) for key in repeated(right[shared].itertuples(index=False, name=None))]
    refuse(other.path, twice, f"names the {listing(shared)} * more than once: keep one row of each")
    joined = left.merge(right, "left", on=shared, indicator="partner of a row")
    found = (joined.pop("partner of a row") == "both").sum()
    alone = {n: left[n].isin(right[n]).sum() for n in shared if left[n].is_unique and right[n].is_unique}
    best = max(alone, key=alone.get, default=None)
    fitting = f"{found} of {len(left)} rows fit" if found else "no row fits"
    fits = f"shares the columns {listing(shared)} with {table.path}, and {fitting}"
    more = f"{fits}; by {best!r} alone {alone.get(best)}: rename the columns that hold something else"
    refuse(other.path, alone.get(best, 0) > found, more)
    refuse(other.path, not found, fits)
    if found < len(left):
        say(f"{other.path.name} has no row for {len(left) - found} of the {len(left)} rows of {table.path.name}")
    return Table(table.path, joined.fillna("").to_dict("list"))


def column(table, name, flag):
    """Return `name`. Raises UserError unless it is a column of the table."""
    problem = f"has no such column as {name!r}: name one of * with {flag}"
    refuse(table.path, name not in table.columns and [*table.columns], problem)
    return name


def refuse(path, culprits, problem):
    """Raise UserError where there are culprits, a list or a condition. In `problem`, the last * stands for the list; an
    earlier one may be part of a label, a name or a pattern."""
    if culprits:
        before, mark, after = problem.rpartition("*")
        listed = listing(culprits) if mark and hasattr(culprits, "__iter__") else mark
        raise UserError(f"{path} {before}{listed}{after}")


def check_unique(path, names):
    """Raise UserError where a name comes twice."""
    refuse(path, repeated(names), "names * more than once: keep one row of each")


def repeated(cells):
    """Return the cells, a list, that come more than once."""
    return [cell for cell, count in Counter(cells).items() if count > 1]


def is_number(*cells):
    """Return whether all cells are finite numbers in ASCII digits, as -.5 and 1e-05; True, nan, 1_12, 0x1 are none."""
    return all(NUMBER.fullmatch(cell) and math.isfinite(float(cell)) for cell in cells)


def are_numbers(cells):
    """Return whether the cells of a column are numbers, but for blank ones and words for a missing number."""
    different = {cell.strip().lower() for cell in cells} - {"", *MISSING}
    return bool(different) and is_number(*different)


def blanks(cells):
    """Return which cells of a column are blank, a list of bool: those that are empty and, in a column of numbers, those
    that say nan, NA, None or the like. Beside other words, these may be a class."""
    empty = {"", *MISSING} if are_numbers(cells) else {""}
    return [cell.strip().lower() in empty for cell in cells]


def is_blank(cell):
    """Return whether a cell is empty or says nan."""
    return cell.strip().lower() in ("", "nan")
