"""Image sources: the folders and archives of a part's images, or a table of pixels. They find an image by its name."""

import hashlib
import os
import unicodedata
import zipfile
from collections import defaultdict
from pathlib import Path

from common import UserError, file_hash, listing

import numpy as np
import pandas as pd

from kit.data.archives import DAMAGED, open_archive
from kit.data.decode import END_OF_JPEG, IMAGE_ENDINGS, MOST_BYTES, decode
from kit.data.tables import TRAIN, Table, check_unique, refuse

USUAL = "{part}", "{part}_images", "images"  # folders and archives without their endings, in this order
ENDINGS = ".zip", "", ".7z", ".tar", ".tar.gz", ".tgz"
TABLES = {"train": TRAIN, "test": ("test.csv",)}  # that may hold pixels
FEWEST_PIXELS = 64  # of an image; fewer numbers are something else
ROW = "row"  # a column that a PixelSource's table gets: the rows' numbers from 1, which name the images


class ImageSource:
    """The folders and archives of a part's images, found by the names that the competition's tables use.

    paths: one path or several: folders, .zip and .tar, whose files are read in place, and .7z and .tar.gz, which are
    unpacked below the folder `unpacked`, once. bands: which bands of a TIFF or an array are read. channels: an image is
    three files, such as ID_red.png, ID_green.png and ID_blue.png for ("_red", "_green", "_blue"); their greys become R,
    G and B, and its name in the tables is ID. Raises UserError.

    A name is looked up as it is, then without the archive's top folder, then without its ending (Kaggle's tables often
    leave it out), then by the bare name at any depth, each if only one file has it. .JPG is .jpg. Only a listed file
    can be found.

    files: {key: [File, or one for each channel]}; fingerprint: a hash of all names, sizes and CRCs."""

    table = None  # of the images' names; a PixelSource has one

    def __init__(self, paths, bands=None, unpacked=None, channels=None):
        paths = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [*map(Path, paths)]
        self.path, self.bands, self.files = paths[0] if len(paths) == 1 else listing(paths), bands, {}
        if bands and (len(bands) not in (1, 3) or min(bands) < 1):
            raise UserError(f"--bands {' '.join(map(str, bands))}: give three, or one; the first is 1")
        files = [file for path in paths for file in open_archive(path, unpacked)]
        for file in files:
            hidden = file.name.rpartition("/")[2].startswith(".")  # such as ._0001.png, which macOS adds
            is_image = file.name.lower().endswith(IMAGE_ENDINGS) and not hidden
            if is_image and not is_same(self.files.setdefault(normalize(file.name), file), file):
                raise UserError(f"{self.path} holds two different files named {file.name}: leave one of them")
        identity = sorted((file.name, *file.content) for file in files)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        if not self.files:
            others = listing([file.name for file in files], 3) or "nothing"
            raise UserError(f"{self.path} holds no images but {others}: put the images there")
        self.files = join_channels(self.files, channels) if channels else {k: [file] for k, file in self.files.items()}
        if not self.files:
            raise UserError(f"{self.path} holds no image with files for all of {', '.join(channels)}")
        self.aliases = find_aliases(self.files)

    def find(self, name):
        """Return the image's key in `files`, which is its file's name. None where `name` fits no file, or several. A
        name may begin with folders above the source: images/0.jpg for 0.jpg in the folder images."""
        name = normalize(name)
        while (key := self.aliases.get(name) or self.aliases.get(lower_ending(name))) is None:
            above, slash, name = name.partition("/")
            if not slash or ":" in above or above in ("", ".", ".."):
                return None
        return key

    def decoded(self, name, salvage=False):
        """Return an image that `find` finds, uint8 [H, W, 3]. salvage: accept a truncated JPEG, whose missing rows are
        grey. Raises ValueError with the reason why the image can't be read."""
        images = [self._decoded(file, salvage) for file in self.files[self.find(name)]]
        if len({image.shape for image in images}) > 1:
            raise ValueError("its channels differ in size")
        # The maximum reads a grey file, and one that shows its channel in the channel's colour.
        return images[0] if len(images) == 1 else np.stack([image.max(axis=2) for image in images], axis=2)

    def _decoded(self, file, salvage):
        """Return the image in one file."""
        try:
            with file.open() as opened:
                if file.content[0] <= MOST_BYTES:
                    return decode(opened.read() + (END_OF_JPEG if salvage else b""), self.bands)
                if file.plain and file.name.lower().endswith((".tif", ".tiff")):  # a slide, which has smaller levels
                    return decode(opened, self.bands)
        except DAMAGED as error:
            raise ValueError(str(error)) from None
        mib = 2**20
        raise ValueError(f"{file.content[0] / mib:.0f} MiB when unpacked, and {MOST_BYTES / mib:.0f} are allowed")


def is_same(one, other):
    """Return whether two files hold the same: by size and CRC where both are known, else by their bytes."""
    if one is other or len(one.content) == len(other.content) == 2 or one.content[0] != other.content[0]:
        return one.content == other.content
    try:
        with one.open() as first, other.open() as second:
            return first.read() == second.read()
    except DAMAGED:  # unreadable: the user must choose
        return False


def normalize(name):
    """Return a name with forward slashes, and with composed accents and kana (macOS decomposes them)."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def lower_ending(name):
    """Return (the name without its ending, the ending in lower case), a key that no file's name is."""
    stem, ending = os.path.splitext(name)
    return stem, ending.lower()


def join_channels(files, channels):
    """Return {key: [a file for each channel]} of {key: file}, for the images that have all channels. A key is that of
    the first channel's file, without the channel. Raises UserError unless there are three channels."""
    if len(channels) != 3:
        raise UserError(f"--channels {' '.join(channels)}: give three, for red, green and blue")
    joined, key_of = {}, {os.path.splitext(key)[0]: key for key in reversed(files)}
    for stem, key in key_of.items():
        image = stem.removesuffix(channels[0])
        keys = [key_of.get(image + channel) for channel in channels]
        if stem.endswith(channels[0]) and all(keys):
            joined[image + os.path.splitext(key)[1]] = [files[key] for key in keys]
    return joined


def find_aliases(files):
    """Return {name: key} of all names that mean one file: as it is, without the top folder, the ending, or both; where
    nothing has that name, the last part of the name, with or without its ending; and all these by `lower_ending`."""
    paths, last_parts, lowered = {}, {}, {}  # None where a name means several files
    for key in files:
        last = key.rpartition("/")[2]
        for meanings, names in ((paths, {key, key.partition("/")[2] or key}), (last_parts, {last})):
            for alias in {*names, *(os.path.splitext(name)[0] for name in names)}:
                for meaning, name in ((meanings, alias), (lowered, lower_ending(alias))):
                    meaning[name] = key if meaning.get(name, key) == key else None
    all_names = lowered | last_parts | paths | {key: key for key in files}
    return {alias: key for alias, key in all_names.items() if key}


def find_images(part, flags):
    """Return the source of the images of `part` ("train" or "test"): the folders and archives that the Flags name, else
    part.zip, part and so on, else a table of pixels. Raises UserError where there is none."""
    given = getattr(flags, f"{part}_images")
    usual = [f"{name.format(part=part)}{ending}" for name in USUAL for ending in ENDINGS]
    paths = [flags.input / name for name in given or usual]
    found = [path if path.exists() else path.with_name(f"{path.name}.001") for path in paths]  # of several parts
    present = [path for path in found if path.exists()]
    tables = given or (part == "train" and flags.train_csv)
    if not present and (pixels := find_pixels(flags.input, tables[:1] if tables else TABLES[part])):
        return pixels
    missing = [path for path, other in zip(paths, found, strict=True) if other not in present]
    problem = f"is missing: put the competition's images there, or name them with --{part}-images"
    refuse(missing and missing[0], missing and (given or not present), problem)
    return ImageSource(present[: None if given else 1], flags.bands, flags.output / "unpacked", flags.channels)


def check_images(source, names, table):
    """Raise UserError naming the images of the table that the source lacks, or that the table spells in two ways."""
    missing = [name for name in names if source.find(name) is None]
    problem = f"lacks {len(missing)} of the images in {table}: * (see --image-column, --submit-header)"
    refuse(source.path, missing, problem)
    check_unique(table, map(source.find, names))


class PixelSource:
    """A CSV file, or a zip of one, with the pixels of an image in each row: a source as ImageSource is one. The images'
    names are the rows' numbers, from 1. columns: of the pixels; table: the Table of the others. Raises UserError where
    the pixels make no square, ValueError where they are no numbers or differ in count."""

    def __init__(self, path, columns):
        dtype = str if len(columns) == 1 else defaultdict(lambda: str, dict.fromkeys(columns, np.float32))
        frame = pd.read_csv(path, dtype=dtype, keep_default_na=False)
        pixels = frame[columns].to_numpy()
        if len(columns) == 1:
            pixels = np.stack([np.array(cell.split(), np.float32) for cell in pixels[:, 0]])
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
        """Return the image's key in `files`, or None."""
        return name if name in self.files else None

    def decoded(self, name, salvage=False):
        """Return an image, uint8 [S, S, 3]."""
        image = self.images[int(name) - 1]
        return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def find_pixels(folder, names):
    """Return the PixelSource of the first of these tables that has pixels, or None."""
    paths = [folder / f"{name}{packed}" for name in names for packed in ("", ".zip")]
    for path in [path for path in paths if path.suffix in (".csv", ".zip")]:
        columns = []
        try:
            columns = pixel_columns(pd.read_csv(path, nrows=1, dtype=str, keep_default_na=False))
            if columns:
                return PixelSource(path, columns)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            if columns:
                raise UserError(f"{path} has cells that are no pixels ({error}): download it again") from None
    return None


def pixel_columns(first):
    """Return the columns of pixels, by a table's first row: pixel0, pixel1, …, or one of many numbers separated by
    blanks. Empty: none."""
    numbered = [name for name in first if name.lower().startswith("pixel") and name[5:].strip("_ ").isdecimal()]
    cells = {name: " ".join(first[name]).split() for name in first}
    packed = [name for name in first if len(cells[name]) >= FEWEST_PIXELS and all(map(str.isdecimal, cells[name]))]
    return numbered if len(numbered) >= FEWEST_PIXELS else packed[:1]
