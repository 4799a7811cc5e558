"""Evidence: which columns name the images and hold the labels, how classes are spelled, and which flags say otherwise.

Flags come first. Images: what the files are called, then the sample's ids, then usual names. Labels: what the sample
names and holds, then usual names.
Two columns that fit equally well and would give different data are refused: the user names one.
"""

import re
import shlex
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from common import UserError, listing, say, wrapped

from kit.data.decode import IMAGE_ENDINGS
from kit.data.tables import CHECKED_ROWS, Dialect, Table, clean, column, is_number, refuse

DISTINCT = 0.9  # least share of different cells in a column of names; rows may be repeated
FILE, NAME, NUMBER = 3, 2, 1  # kinds of cells that name images, the best evidence first
IMAGE_WORDS = re.compile("image|img|file|photo|picture|path", re.IGNORECASE)  # in the name of a column
UNSURE = {"nan", "na", "n/a", "<na>", "null"}  # in lower case: no label, as libraries write it, or a class
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

    def label_words(self, labels) -> set[str]:
        """The cells that may spell labels: those of columns but Usage and, where several are labels, their names."""
        cells = [cells for name, cells in zip(self.names, self.columns, strict=True) if name.lower() != "usage"]
        known = {*map(folded, labels)}
        names = self.names if sum(folded(name) in known for name in self.names) > 1 else []
        return {*names}.union(*cells) - {""}

    @property
    def id_name(self) -> str | None:
        """The name of the column of ids, if the first row is a header."""
        return None if self.id_column is None else clean(self.rows[0][self.id_column])


class Fit(NamedTuple):
    """How well the cells of a column name images."""

    kind: int  # FILE, NAME or NUMBER
    distinct: bool  # few cells come twice
    found: int  # of the checked cells, how many are images
    checked: int
    keys: tuple  # the images that they name


def fit_of(cells, source):
    """Return the Fit of a column's cells, or None where at most half of them are found among the images, and at most
    half end like a file."""
    checked = [cell for cell in cells if cell][:CHECKED_ROWS]
    if not any(source.find(cell) is not None or cell.lower().endswith(IMAGE_ENDINGS) for cell in checked[::10]):
        return None  # a first look: a table may have hundreds of columns
    keys = tuple(source.find(cell) for cell in checked)
    found = [cell for cell, key in zip(checked, keys, strict=True) if key is not None]
    if 2 * sum(cell.lower().endswith(IMAGE_ENDINGS) for cell in checked) > len(checked):
        kind = FILE
    elif 2 * len(found) > len(checked):
        kind = NUMBER if 2 * sum(map(is_number, found)) > len(found) else NAME
    else:
        return None
    return Fit(kind, len({*cells}) >= DISTINCT * len(cells), len(found), len(checked), keys)


def choose_fit(columns, source, named, is_name):
    """Choose the column that names images. → (its key in `columns`, {key: cells}, or None; how sure; {key: Fit} of all
    that fit; the keys of those between which nothing decides).

    named: what the sample calls its ids, or None; is_name: whether a column's key sounds like images. A file's name or
    another word goes before a number; a column of repeated numbers (a patient, an age) names none by itself."""
    fits = {key: fit for key, cells in columns.items() if (fit := fit_of(cells, source))}
    fits = {key: fit for key, fit in fits.items() if fit.found} or fits
    strong = [key for key, fit in fits.items() if fit.kind > NUMBER]
    rivals = strong or [key for key, fit in fits.items() if fit.distinct or key == named or is_name(key)]
    if named in fits and named not in rivals:
        rivals.append(named)
    images = {key: [*map(source.find, columns[key])] for key in fits} if len(fits) > 1 else dict.fromkeys(fits)
    if all(images[key] == images[rivals[0]] for key in rivals):
        alike = [key for key in fits if rivals and images[key] == images[rivals[0]]]
        return (named if named in rivals else next(iter(alike), None)), "certain", fits, []
    decided = [key for key in rivals if is_name(key)]
    if named in rivals:
        decided = [named] if fits[named].kind > NUMBER or not strong else []
    if decided and all(images[key] == images[decided[0]] for key in decided):
        return decided[0], "likely", fits, []
    return None, "", fits, rivals


def pick_image_column(table: Table, source, given, named=None, besides=()) -> tuple[str, Decision]:
    """Return (the column of `table` that names the images, the Decision).

    given: the user's column, or None; named: what the sample calls its column of ids; besides: columns that hold
    something else. Raises UserError where none fits by cells or name, or two do and no name decides."""
    flag = "--image-column"
    if given:
        fit = fit_of(table.columns[column(table, given, flag)], source)
        return given, Decision("images", f"column {given!r}", "given", in_words(fit, source), flag)
    columns = {name: cells for name, cells in table.columns.items() if name not in besides or name == named}
    chosen, how, fits, rivals = choose_fit(columns, source, named, lambda name: bool(IMAGE_WORDS.search(name)))
    both = f"may be those in column {' or '.join(map(repr, rivals))}: name one with {flag}"
    refuse(f"{table.path}: the images", bool(rivals), both)
    if chosen is None:  # a usual name, whose images are missing
        chosen, how = next((name for name in (named, "image_name") if name in columns), None), "likely"
        problem = f"has no column that names the images in {source.path}: name one of * with {flag}"
        refuse(table.path, chosen is None and [*table.columns], problem)
    fit = fits.get(chosen)
    others = [repr(name) for name, other in fits.items() if not fit or other.keys != fit.keys]
    evidence = in_words(fit, source) + (f"; also fits: {listing(others, 3)}" if others else "")
    return chosen, Decision("images", f"column {chosen!r}", how, evidence, flag)


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
    others = {name: {*map(folded, cells)} for name, cells in table.columns.items() if name != images}
    named = [name for name in sample.names if name in others]
    named = [name for name in named if len(others[name]) > 1 or is_number(*table.columns[name])]  # not a constant Usage
    words = [{*map(folded, {*cells} - {""})} for cells in sample.columns if not any(map(is_number, cells))]
    words += [{*map(folded, sample.names)}] if len(sample.names) > 1 and not named else []
    spoken = [name for name, cells in others.items() if any(part and part <= cells for part in words)]
    usual = [name for name in USUAL_LABELS if name in others][:1]
    claimed = named or usual
    if len(spoken) == 1 and claimed and spoken[0] not in claimed:
        numeric = all(is_number(*table.columns[name]) for name in claimed)  # then the words say what they mean
        named, usual = ([], []) if numeric else (named, usual)
        both = f"{claimed[0]!r} by its name, or {spoken[0]!r}, which has the sample's words: give {flag} with one"
        refuse(f"{table.path}: the labels may be in column", not named and not numeric, both)
    ways = {
        "the sample's header names them": named,
        "its cells are the sample's words": spoken if len(spoken) == 1 else [],
        "a usual name": usual,
        "the only other column": [*others] if len(others) == 1 else [],
    }
    evidence, chosen = next(((why, names) for why, names in ways.items() if names), ("", []))
    problem = f"has no column that is clearly the label: name one or more of * with {flag}"
    refuse(table.path, not chosen and [*others], problem)
    varied = check_sample_agrees(table, chosen, sample)
    rivals = [repr(name) for names in ways.values() for name in names if name not in chosen]
    evidence += f"; also fits: {listing(dict.fromkeys(rivals), 3)}" if rivals else ""
    return chosen, Decision("labels", in_columns(chosen), "likely" if rivals or varied else "certain", evidence, flag)


def check_sample_agrees(table, chosen, sample):
    """Raise UserError where some of the chosen columns vary in the sample and others don't: they may be given there,
    as a site or an age is, and not asked for. → whether several vary."""
    cells = dict(zip(sample.names, sample.columns, strict=True))
    varied = [name for name in chosen if len({*cells.get(name, ())}) > 1]
    constant = [name for name in chosen if len({*cells.get(name, ())}) == 1]
    if len(sample.rows) > 3 and varied and constant and len(varied) + len(constant) == len(chosen):
        several = f"--label-column {' '.join(constant)}, or {' '.join(chosen)} for all"
        differ = f"varies in {listing(varied)} and not in {listing(constant)}, which {table.path} has too"
        raise UserError(f"{sample.path} {differ}: which are asked for? Give {several}")
    return len(varied) > 1


def in_columns(names):
    """Return names of columns in words."""
    return f"column {names[0]!r}" if len(names) == 1 else f"{len(names)} columns, {listing(map(repr, names), 3)}"


def pick_id_column(rows, source) -> int | None:
    """Return the number of the sample's column that names test images, or None. Raises UserError where two do."""
    header = [*map(clean, rows[0])]
    columns = {i: [*map(clean, cells)] for i, cells in enumerate(zip(*(rows[1:] or rows), strict=True))}
    is_id = re.compile(rf"{IMAGE_WORDS.pattern}|id$", re.IGNORECASE)
    chosen, _, fits, rivals = choose_fit(columns, source, None, lambda i: bool(is_id.search(header[i])))
    problem = "has several columns that may name the test images (*): keep one of them"
    refuse("the sample", [repr(header[i]) for i in rivals], problem)
    repeated = 0 in fits and len({*columns[0]}) > 1  # ids that the sample repeats
    chosen = 0 if chosen is None and repeated else chosen
    return chosen if chosen is not None and fits[chosen].found else None


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
    asked, different = sample.label_words(cells), {*cells}
    for word in sorted(asked):
        spellings.setdefault(folded(word), []).append(word)
    new, numeric = {}, is_number(*different)
    pointed = any("." in word and not float(word) % 1 for word in filter(is_number, asked))
    for cell in {*cells} - known:
        found = spellings.get(folded(cell), [])
        new[cell] = found[0] if len(found) == 1 and not numeric and found[0] not in different else cell
        if numeric and not float(cell) % 1 and "." in cell:
            new[cell] = f"{float(cell):.{int(pointed)}f}"
    changed = [f"{cell} → {label}" for cell, label in sorted(new.items()) if cell != label]
    if changed:
        say(f"labels are spelled {'as in the sample' if not numeric else 'as whole numbers'}: {listing(changed)}")
    cells = [new.get(cell, cell) for cell in cells]
    unsure = sorted(cell for cell in {*cells} - known if is_unsure(cell))
    problem = "has labels (*) that may be a class or none: give --drop-unlabelled, or --class-values"
    refuse(path, unsure, f"{problem} {' '.join(f'{cell}={cell}' for cell in unsure)}")
    alike = {}
    for cell in sorted({*cells}):
        alike.setdefault(folded(cell), []).append(cell)
    for first, *others in [group for group in alike.values() if not {*group} <= known]:
        pairs = " ".join(shlex.quote(f"{other}={first}") for other in others)
        spelled = f"spell them alike, as --class-values {pairs} does, or name each as itself there"
        refuse(path, others, f"has the labels {first} and *: {spelled}")
    return cells


def is_unsure(cell):
    """Return whether a label may be a class or none: nan, NA, None. In lower case none is a class."""
    return cell.lower() in UNSURE or cell in ("None", "NONE")


def folded(label):
    """Return what spellings of one label share."""
    text = unicodedata.normalize("NFC", label).casefold()
    return float(label) if is_number(label) else re.sub(r"[\s_-]+", " ", text)
