"""Where the competition's images are, how one is found and resized, and how a sheet of them is drawn."""

import hashlib
import io
import os
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from common import UserError, file_hash, listing
from kit.data.archives import Folder, open_place
from kit.data.decode import END_OF_JPEG, IMAGE_ENDINGS, decode
from kit.data.tables import TRAIN, Table, check_unique, refuse
from kit.data.tiffs import MOST_BYTES


class File(NamedTuple):
    """One file of a source. content: its size and, in a zip, its CRC."""

    place: object
    entry: object
    content: list


class ImageSource:
    """The folders and archives of a part's images, found by the names that the competition's tables use.

    paths: one path or several: folders, .zip, .tar, whose files are read in place, and .7z, .tar.gz and the like, which
    are unpacked below the folder `unpacked`, once. bands: which of a TIFF's or an array's bands are
    read. channels: ("_red", "_green", "_blue"): an image is three files, ID_red.png for one; their
    greys become R, G, B, and a name in the tables is ID. Raises UserError.

    A name is looked up as it stands, then without the archive's top folder, then without its ending (Kaggle's tables
    often leave it out), then by the file's bare name at any depth, wherever that leaves one file. .JPG is .jpg. Only a
    listed file can be found."""

    def __init__(self, paths, bands=None, unpacked=None, channels=None):
        paths = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [*map(Path, paths)]
        self.path, self.bands, self.files = paths[0] if len(paths) == 1 else listing(paths), bands, {}
        if bands and (len(bands) not in (1, 3) or min(bands) < 1):
            raise UserError(f"--bands {' '.join(map(str, bands))}: give three, or one; the first is 1")
        identity = []
        for place in [open_place(path, unpacked) for path in paths]:
            identity += place.entries.values()
            for entry, (name, *content) in place.entries.items():
                hidden = name.rpartition("/")[2].startswith(".")  # as ._0001.png, which macOS adds
                if name.lower().endswith(IMAGE_ENDINGS) and not hidden:
                    file = File(place, entry, content)
                    if not same(self.files.setdefault(plain(name), file), file):
                        raise UserError(f"{self.path} holds two different files named {name}: leave one of them")
        self.fingerprint = hashlib.sha256(repr(sorted(identity)).encode()).hexdigest()
        if not self.files:
            held = listing([name for name, *_ in identity], 3) or "nothing"
            raise UserError(f"{self.path} holds no images but {held}: put the images there")
        self.files = {key: [file] for key, file in self.files.items()}
        if channels:
            self.files = by_channel(self.files, channels)
        if not self.files:
            raise UserError(f"{self.path} holds no image with files for all of {', '.join(channels)}")
        self.aliases = aliases(self.files)

    def find(self, name):
        """→ the image's key in `files`, its file's name. None where `name` means none, or several. A name may begin
        with folders that lie above the source: images/0.jpg in the folder images."""
        name = plain(name)
        while (key := self.aliases.get(name) or self.aliases.get(lowered(name))) is None:
            above, slash, name = name.partition("/")
            if not slash or ":" in above or above in ("", ".", ".."):
                return None
        return key

    def decoded(self, name, salvage=False):
        """→ the image that `find` knows, as `decode` gives it. `salvage` accepts a truncated JPEG: the rows that it
        lacks are grey. Raises ValueError with the reason why the image can't be read."""
        images = [self._decoded(file, salvage) for file in self.files[self.find(name)]]
        if len({image.shape for image in images}) > 1:
            raise ValueError("its channels differ in size")
        # The greatest value is a grey's own, and that of a file that shows its channel in its colour.
        return images[0] if len(images) == 1 else np.stack([image.max(axis=2) for image in images], axis=2)

    def _decoded(self, file, salvage):
        try:
            if file.content[0] <= MOST_BYTES:
                return decode(file.place.read(file.entry) + (END_OF_JPEG if salvage else b""), self.bands)
            if isinstance(file.place, Folder) and file.entry.suffix.lower() in (".tif", ".tiff"):  # slides have levels
                with open(file.place.file(file.entry), "rb") as opened:
                    return decode(opened, self.bands)
        except OSError as error:
            raise ValueError(str(error)) from None
        mib = 2**20
        raise ValueError(f"{file.content[0] / mib:.0f} MiB when unpacked, and {MOST_BYTES / mib:.0f} are allowed")


def same(one, other):
    """Whether two files hold the same: by size and CRC, where both are known, else by their bytes."""
    if one is other or len(one.content) == len(other.content) == 2 or one.content[0] != other.content[0]:
        return one.content == other.content
    try:
        return one.place.read(one.entry) == other.place.read(other.entry)
    except (OSError, ValueError):  # which of them could be used, nobody knows
        return False


def plain(name):
    """One spelling for a name: forward slashes, composed accents and kana (macOS decomposes them)."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def lowered(name):
    """The name with its ending in small letters; no such name is a file's own."""
    stem, ending = os.path.splitext(name)
    return stem, ending.lower()


def by_channel(files, channels):
    """{key: [file]} → {key of the first channel's file, without the channel: [a file of each]}, where none is lacking.
    Raises UserError unless three channels are named."""
    if len(channels) != 3:
        raise UserError(f"--channels {' '.join(channels)}: give three, for red, green and blue")
    found = {}
    for key, file in files.items():
        stem, ending = os.path.splitext(key)
        for channel in channels:
            if stem.endswith(channel):
                found.setdefault(stem.removesuffix(channel), {}).setdefault(channel, (ending, file))
    whole = {stem: [of[channel] for channel in channels] for stem, of in found.items() if len(of) == 3}
    return {stem + parts[0][0]: [file for _, [file] in parts] for stem, parts in whole.items()}


def aliases(files):
    """→ {name: key} of all names that mean one file: as it stands, without the top folder, the ending, or both; where
    nothing has that name, the last part of the name, with or without its ending; and all these, `lowered`."""
    near, bare, small = {}, {}, {}
    for key in files:
        last = key.rpartition("/")[2]
        for meanings, names in ((near, {key, key.partition("/")[2] or key}), (bare, {last})):
            for alias in {*names, *(os.path.splitext(name)[0] for name in names)}:
                meanings[alias] = key if meanings.get(alias, key) == key else None  # None: several
                small[lowered(alias)] = key if small.get(lowered(alias), key) == key else None
    known = bare | near | {key: key for key in files}
    return {alias: key for alias, key in (small | known).items() if key}


USUAL = "{part}", "{part}_images", "images"  # zips or folders, in this order
ENDINGS = ".zip", "", ".7z", ".tar", ".tar.gz", ".tgz"
TABLES = {"train": TRAIN, "test": ("test.csv",)}  # that may hold pixels


def find_images(args, part):
    """→ the source of the images of `part`: the folders and archives given by its flag, else INPUT/part.zip, INPUT/part
    and so on, else a table of pixels. Raises UserError where there is none."""
    given = getattr(args, f"{part}_images")
    usual = [f"{name.format(part=part)}{ending}" for name in USUAL for ending in ENDINGS]
    paths = [args.input / name for name in given or usual]
    there = [path for path in paths if path.exists() or path.with_name(f"{path.name}.001").exists()]
    if not there:
        named = given[0] if given else (args.train_csv or [None])[0] if part == "train" else None
        if pixels := find_pixels(args.input, named, TABLES[part]):
            return pixels
    lacking = [path for path in paths if path not in there] if given else paths[:1] * (not there)
    problem = f"is missing: put the competition's images there, or name them with --{part}-images"
    refuse(lacking and lacking[0], lacking, problem)
    return ImageSource(there if given else there[:1], args.bands, args.output / "unpacked", args.channels)


def check_images(source, names, table):
    """Raises UserError naming the images of the table that the source lacks, or that the table spells in two ways."""
    missing = [name for name in names if source.find(name) is None]
    refuse(
        source.path, missing, f"lacks {len(missing)} of the images in {table}: * (see --image-column, --submit-header)"
    )
    check_unique(table, map(source.find, names))


LEAST = 64  # pixels of an image; fewer numbers are something else
ROW = "row"  # the column that such a Table gets: the rows' numbers from 1, which name the images


class PixelSource:
    """A source of images as ImageSource is one. path: a CSV file, or a zip of one. The names of its images are the
    rows' numbers, from 1. `table`: the Table of its other columns. Raises UserError where the pixels make no square."""

    def __init__(self, path):
        with open_table(path) as file:
            frame = pd.read_csv(file, dtype={name: str for name in other_columns(path)}, keep_default_na=False)
        columns = pixel_columns(frame)
        if len(columns) == 1:
            rows = [np.array(cell.split(), np.float32) for cell in frame[columns[0]]]
            refuse(path, len({len(row) for row in rows}) > 1, f"has rows of several lengths in {columns[0]}")
            pixels = np.stack(rows)
        else:
            pixels = frame[columns].to_numpy(np.float32)
        pixels = pixels * (255 if pixels.max() <= 1 else 1)
        count, bands = pixels.shape[1], 3 if round((pixels.shape[1] / 3) ** 0.5) ** 2 * 3 == pixels.shape[1] else 1
        side = round((count / bands) ** 0.5)
        refuse(path, side * side * bands != count, f"has {count} pixels an image, which make no square")
        refuse(path, not (pixels.min() >= 0 and pixels.max() <= 255), "has pixels below 0 or above 255")
        self.images = pixels.astype(np.uint8).reshape(-1, side, side, bands)
        self.path, self.fingerprint = path, file_hash(path)
        self.files = {str(number): None for number in range(1, len(frame) + 1)}
        others = {name: frame[name].str.strip().tolist() for name in frame.columns if name not in columns}
        self.table = Table(path, {ROW: [*self.files]} | others)

    def find(self, name):
        return name if name in self.files else None

    def decoded(self, name, salvage=False):
        """→ uint8 [S, S, 3]."""
        image = self.images[int(name) - 1]
        return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def open_table(path):
    """→ the open file of a table, or of the only one in a zip."""
    if path.suffix != ".zip":
        return open(path, "rb")
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read(archive.namelist()[0]))


def other_columns(path):
    """→ the columns of a table that aren't pixels, by its first row."""
    with open_table(path) as file:
        frame = pd.read_csv(file, nrows=1, dtype=str, keep_default_na=False)
    pixels = pixel_columns(frame)
    return [name for name in frame.columns if name not in pixels] + (pixels if len(pixels) == 1 else [])


def pixel_columns(frame):
    """→ the columns whose cells are pixels: pixel0, pixel1, …, or one of many numbers between blanks. None: []."""
    numbered = [name for name in frame.columns if name.lower().startswith("pixel") and name[5:].strip("_ ").isdecimal()]
    if len(numbered) >= LEAST:
        return numbered
    for name in frame.columns:
        cells = str(frame[name].iloc[0]).split() if len(frame) else []
        if len(cells) >= LEAST and all(cell.isdecimal() for cell in cells):
            return [name]
    return []


def has_pixels(path):
    """Whether `path` is a table of pixels."""
    try:
        with open_table(path) as file:
            return bool(pixel_columns(pd.read_csv(file, nrows=1, dtype=str, keep_default_na=False)))
    except (OSError, ValueError, zipfile.BadZipFile, pd.errors.ParserError):
        return False


def find_pixels(folder, given, names):
    """→ the PixelSource of the first of these tables that has pixels, or None."""
    for name in [given] if given else names:
        for path in (folder / name, folder / f"{name}.zip"):
            if path.is_file() and path.suffix in (".csv", ".zip") and has_pixels(path):
                try:
                    return PixelSource(path)
                except (ValueError, pd.errors.ParserError) as error:
                    raise UserError(f"{path} has cells that are no pixels ({error}): download it again") from None
    return None
