"""Evidence: which columns name the images and hold the labels, how classes are spelled, and which flags say otherwise.

Flags come first. Images: what the files are called, then the sample's ids, then usual names. Labels: what the sample
names and holds, then usual names.
Two columns that fit equally well and would give different data are refused: the user names one.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from common import UserError, listing, say, wrapped

from kit.data.decode import IMAGE_ENDINGS
from kit.data.tables import CHECKED_ROWS, Dialect, Table, clean, column, is_number, refuse

FILE, NAME, NUMBER = 3, 2, 1  # kinds of cells that name images, the best evidence first
IMAGE_WORDS = re.compile("image|img|file|photo|picture|path", re.IGNORECASE)  # in the name of a column
UNSURE = {"nan", "NaN", "NA", "N/A", "<NA>", "None", "null", "NULL"}  # no label, as libraries write it, or a class
USUAL_LABELS = "label", "category_id"


class Decision(NamedTuple):
    """What 00 decided about one thing."""

    topic: str  # images, labels, task …
    choice: str
    how: str  # "given", "certain" or "likely"
    evidence: str
    flag: str  # that decides otherwise, or ""


def decision_lines(decisions) -> list[str]:
    """Return the table of decisions, {field: text}, for the terminal and the report."""
    line = "{choice} ({how}: {evidence}) → {flag}"
    return [wrapped(f"{d['topic']:<12}", line.format(**d)) for d in decisions]


@dataclass
class SampleCells:
    """The cells of a sample submission, before its header is told from its rows."""

    path: Path
    rows: list[list[str]]  # a header may be among them
    dialect: Dialect
    id_column: int | None  # the number of the column of ids, or None

    @property
    def names(self) -> list[str]:
        """The first row without the id: names of columns, if it is a header."""
        return [clean(cell) for i, cell in enumerate(self.rows[0]) if i != self.id_column]

    @cached_property
    def columns(self) -> list[list[str]]:
        """The cells below the first row (of a single row, its own), one list for each column but the ids'."""
        columns = zip(*(self.rows[1:] or self.rows), strict=True)
        return [[*map(clean, cells)] for i, cells in enumerate(columns) if i != self.id_column]

    @cached_property
    def words(self) -> set[str]:
        """All cells but the ids, the first row's among them."""
        return {*self.names}.union(*self.columns) - {""}

    @property
    def id_name(self) -> str | None:
        """The name of the column of ids, if the first row is a header."""
        return None if self.id_column is None else clean(self.rows[0][self.id_column])


class Fit(NamedTuple):
    """How well the cells of a column name images."""

    kind: int  # FILE, NAME or NUMBER
    distinct: bool  # no cell comes twice
    found: int  # of the checked cells, how many are images
    checked: int
    keys: tuple  # the images that they name


def fit_of(cells, source):
    """Return the Fit of a column's cells, or None where at most half of them are found among the images, and at most
    half end like a file."""
    checked = [cell for cell in cells if cell][:CHECKED_ROWS]
    keys = tuple(source.find(cell) for cell in checked)
    found = [cell for cell, key in zip(checked, keys, strict=True) if key is not None]
    if 2 * sum(cell.lower().endswith(IMAGE_ENDINGS) for cell in checked) > len(checked):
        kind = FILE
    elif 2 * len(found) > len(checked):
        kind = NUMBER if 2 * sum(map(is_number, found)) > len(found) else NAME
    else:
        return None
    return Fit(kind, len({*cells}) == len(cells), len(found), len(checked), keys)


def best_fits(fits):
    """Return the keys of the best of {key: Fit}: file names before others, numbers last; then distinct cells."""
    best = max(((fit.kind, fit.distinct) for fit in fits.values()), default=None)
    return [key for key, fit in fits.items() if (fit.kind, fit.distinct) == best]


def pick_image_column(table: Table, source, given, named=None, besides=()) -> tuple[str, Decision]:
    """Return (the column of `table` that names the images, the Decision).

    given: the user's column, or None; named: what the sample calls its column of ids; besides: columns that hold
    something else. Raises UserError where none fits by cells or name, or two do and no name decides."""
    flag = "--image-column"
    if given:
        fit = fit_of(table.columns[column(table, given, flag)], source)
        return given, Decision("images", f"column {given!r}", "given", in_words(fit, source), flag)
    fits = {name: fit_of(cells, source) for name, cells in table.columns.items() if name not in besides}
    fits = {name: fit for name, fit in fits.items() if fit}
    tied, how = best_fits(fits), "certain"
    images = [name for name in tied if IMAGE_WORDS.search(name)]
    if tied and fits[tied[0]][:2] == (NUMBER, False):  # a patient's number, a class or an age, unless its name says no
        tied = [named] if named in tied else images
    if len({fits[name].keys for name in tied}) > 1:
        decided = [named] if named in tied else images
        both = f"may be those in column {' or '.join(map(repr, tied))}: name one with {flag}"
        refuse(f"{table.path}: the images", len({fits[name].keys for name in decided}) != 1, both)
        tied, how = decided, "likely"
    if not tied:  # a usual name, whose images are missing
        tied = [name for name in (named, "image_name") if name in table.columns and name not in besides][:1]
        problem = f"has no column that names the images in {source.path}: name one of * with {flag}"
        refuse(table.path, not tied and [*table.columns], problem)
    chosen = fits.get(tied[0])
    first = next((name for name, fit in fits.items() if chosen and fit.keys == chosen.keys), tied[0])
    others = [repr(name) for name, fit in fits.items() if not chosen or fit.keys != chosen.keys]
    evidence = in_words(chosen, source) + (f"; also fits: {listing(others, 3)}" if others else "")
    return first, Decision("images", f"column {first!r}", how, evidence, flag)


def in_words(fit, source):
    """Return a Fit in words."""
    folder = getattr(source.path, "name", source.path)
    return f"{fit.found} of {fit.checked} are files in {folder}" if fit else f"none is a file in {folder}"


def pick_label_columns(table: Table, images, sample: SampleCells, given) -> tuple[list[str], Decision]:
    """Return (the columns of `table` that hold the labels, the Decision): those given, else those that the sample's
    header names, the one that has the sample's words as cells, `label` or category_id, the only one beside `images`."""
    flag = "--label-column"
    if given:
        chosen = [column(table, name, flag) for name in given]
        return chosen, Decision("labels", in_columns(chosen), "given", "all of them", flag)
    others = {name: {*cells} for name, cells in table.columns.items() if name != images}
    named = [name for name in sample.names if name in others]
    words = [{*cells} - {""} for cells in sample.columns if not any(map(is_number, cells))]
    words += [{*sample.names}] if len(sample.names) > 1 and not named else []
    spoken = [name for name, cells in others.items() if any(part and part <= cells for part in words)]
    if named and words and spoken and not {*spoken} & {*named}:
        named = []  # the sample's words are cells of another column
    usual = [name for name in USUAL_LABELS if name in others][:1]
    ways = {
        "the sample's header names them": named,
        "its cells are the sample's words": spoken if len(spoken) == 1 else [],
        "a usual name": usual,
        "the only other column": [*others] if len(others) == 1 else [],
    }
    evidence, chosen = next(((why, names) for why, names in ways.items() if names), ("", []))
    problem = f"has no column that is clearly the label: name one of * with {flag}"
    refuse(table.path, not chosen and [*others], problem)
    check_sample_agrees(table, chosen, sample)
    rivals = [repr(name) for names in ways.values() for name in names if name not in chosen]
    evidence += f"; also fits: {listing(dict.fromkeys(rivals), 3)}" if rivals else ""
    return chosen, Decision("labels", in_columns(chosen), "likely" if rivals else "certain", evidence, flag)


def check_sample_agrees(table, chosen, sample):
    """Raise UserError where some of the chosen columns vary in the sample and others don't: they may be given there,
    as a site or an age is, and not asked for."""
    cells = dict(zip(sample.names, sample.columns, strict=True))
    varied = [name for name in chosen if len({*cells.get(name, ())}) > 1]
    constant = [name for name in chosen if len({*cells.get(name, ())}) == 1]
    if len(sample.rows) > 3 and varied and constant and len(varied) + len(constant) == len(chosen):
        several = f"--label-column {' '.join(constant)}, or {' '.join(chosen)} for all"
        differ = f"varies in {listing(varied)} and not in {listing(constant)}, which {table.path} has too"
        raise UserError(f"{sample.path} {differ}: which are asked for? Give {several}")


def in_columns(names):
    """Return names of columns in words."""
    return f"column {names[0]!r}" if len(names) == 1 else f"{len(names)} columns, {listing(map(repr, names), 3)}"


def pick_id_column(rows, source) -> int | None:
    """Return the number of the sample's column that names test images, or None. Raises UserError where two do."""
    columns = zip(*(rows[1:] or rows), strict=True)
    fits = {i: fit_of([*map(clean, cells)], source) for i, cells in enumerate(columns)}
    fits = {i: fit for i, fit in fits.items() if fit and fit.found and (fit.kind, fit.distinct) > (NUMBER, i > 0)}
    tied = best_fits(fits)
    if len({fits[i].keys for i in tied}) > 1:
        header, before = [*map(clean, rows[0])], tied
        tied = [i for i in tied if IMAGE_WORDS.search(header[i]) or re.fullmatch(".*id", header[i], re.IGNORECASE)]
        problem = "has several columns that may name the test images (*): keep one of them"
        refuse("the sample", len({fits[i].keys for i in tied}) != 1 and [repr(header[i]) for i in before], problem)
    return tied[0] if tied else None


def class_values(flags):
    """Return --class-values as {label of the training data: its new name}."""
    items = [item.rpartition("=") for item in flags.class_values or []]
    refuse("--class-values", not all(equals for _, equals, _ in items), "needs pairs LABEL=VALUE")
    return {label: value for label, _, value in items}


def renamed(path, columns, flags):
    """Return {column: cells} with --class-values applied. Raises UserError where it names a label that isn't there."""
    values, cells = class_values(flags), {cell for cells in columns.values() for cell in cells}
    lacking = [f"{label!r}" for label in values if not any(label in cell for cell in cells)]
    refuse("--class-values", lacking, f"names *, which {path} lacks")
    return {name: [values.get(cell, cell) for cell in cells] for name, cells in columns.items()}


def tidied(path, names, cells, sample, flags):
    """Return class labels as the sample spells them: cat for Cat, 2.0 or 2 for 2.0. Raises UserError where one is
    blank, may be a class or none (nan, NA), or differs from another only in case, blanks, - and _, unless known."""
    unlabelled = [name for name, cell in zip(names, cells, strict=True) if not cell]
    refuse(path, unlabelled, "has no label for *: label or remove them, or see --drop-unlabelled")
    spellings, known = {}, {*sample.words, *class_values(flags).values()}
    for word in sorted(sample.words):
        spellings.setdefault(folded(word), []).append(word)
    new, numeric = {}, is_number(*{*cells})
    pointed = any("." in word and not float(word) % 1 for word in filter(is_number, sample.words))
    for cell in {*cells} - known:
        found = spellings.get(folded(cell), [])
        new[cell] = found[0] if len(found) == 1 and not numeric else cell
        if numeric and not float(cell) % 1 and "." in cell:
            new[cell] = f"{float(cell):.{int(pointed)}f}"
    changed = [f"{cell} → {label}" for cell, label in sorted(new.items()) if cell != label]
    if changed:
        say(f"labels are spelled {'as in the sample' if not numeric else 'as whole numbers'}: {listing(changed)}")
    cells = [new.get(cell, cell) for cell in cells]
    unsure = sorted({*cells} & UNSURE - known)
    problem = "has labels (*) that may be a class or none: give --drop-unlabelled, or --class-values"
    refuse(path, unsure, f"{problem} {' '.join(f'{cell}={cell}' for cell in unsure)}")
    alike = {}
    for cell in sorted({*cells}):
        alike.setdefault(folded(cell), []).append(cell)
    for first, *others in [group for group in alike.values() if not {*group} <= known]:
        spelled = f"spell them alike, as --class-values {' '.join(f'{other}={first}' for other in others)} does"
        refuse(path, others, f"has the labels {first} and *: {spelled}")
    return cells


def folded(label):
    """Return what spellings of one label share."""
    text = unicodedata.normalize("NFC", label).casefold()
    return float(label) if is_number(label) else re.sub(r"[\s_-]+", " ", text)
