"""Image sources: the folders and archives of a part's images, or a table of pixels. They find an image by its name."""

import contextlib
import hashlib
import io
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from common import UserError, file_hash, listing

import numpy as np
import pandas as pd
from PIL import Image

from kit.data.archives import A_TABLE, DAMAGED, is_litter, nearby, open_archive
from kit.data.decode import END_OF_JPEG, FORMATS, IMAGE_ENDINGS, MOST_BYTES, Picture, read_picture
from kit.data.tables import TRAIN, Table, check_unique, find_table, read_bytes, refuse

USUAL = "{part}", "{part}_images", "images"  # folders and archives without their endings, in this order
ENDINGS = ".zip", "", ".7z", ".tar", ".tar.gz", ".tgz"
ARCHIVE = re.compile(r"(\.(zip|7z|tar|gz|tgz))+$", re.IGNORECASE)
TABLES = {"train": TRAIN, "test": ("test.csv",)}  # that may hold pixels
FEWEST_PIXELS = 64  # of an image; fewer numbers are something else
ROW = "row"  # a column that a PixelSource's table gets: the rows' numbers from 1, which name the images


class ImageSource:
    """The folders and archives of a part's images, found by the names that the competition's tables use.

    paths: one path or several: folders, .zip and .tar, whose files are read in place, and .7z and .tar.gz, which are
    unpacked below the folder `unpacked`, once. bands: which bands of a TIFF or an array are read. channels: an image is
    three files, such as ID_red.png, ID_green.png and ID_blue.png for ("_red", "_green", "_blue"); their greys become R,
    G and B, and its name in the tables is ID. Raises UserError.

    An image is what ends like one or, without ending, begins like one; hidden files and folders are left out.

    files: {key: [File, or one for each channel]}; fingerprint: a hash of their names, sizes and CRCs; left_out: the
    other files' names, without what operating systems leave behind."""

    table = None  # of the images' names; a PixelSource has one
    depth = None  # bits by which 16-bit images are scaled; None: each by its own

    def __init__(self, paths, bands=None, unpacked=None, channels=None):
        paths = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [*map(Path, paths)]
        self.path, self.bands, self.files = paths[0] if len(paths) == 1 else listing(paths), bands, {}
        if bands and (len(bands) not in (1, 3) or min(bands) < 1):
            raise UserError(f"--bands {' '.join(map(str, bands))}: give three, or one; the first is 1")
        self.left_out, taken, homes = [], [], defaultdict(list)  # homes: the paths that hold a key
        for path, file in ((path, file) for path in paths for file in open_archive(path, unpacked)):  # noqa: B020
            key = normalize(file.name)
            if is_image(file):
                taken.append(file)
                homes[key].append(path)
                if not is_same(self.files.setdefault(key, file), file):
                    raise UserError(f"{self.path} holds two different files named {file.name}: keep one of them")
            elif not any(map(is_litter, key.split("/"))):
                self.left_out.append(key if file.content else f"{key} (link)")
        identity = sorted((file.name, *file.content) for file in taken)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        if not self.files:
            others = f" but {listing(self.left_out, 3)}" if self.left_out else ", and no other files"
            raise UserError(f"{self.path} holds no images{others}: {remedy_for(self.left_out)}")
        is_banded = any(key.lower().endswith((".tif", ".tiff", ".npy")) or "." not in key for key in self.files)
        if bands and not is_banded:
            raise UserError(f"--bands: {self.path} holds no TIFF and no .npy: leave the flag out")
        self.files = join_channels(self.files, channels) if channels else {k: [file] for k, file in self.files.items()}
        if not self.files:
            raise UserError(f"{self.path} holds no image with files for all of {', '.join(channels)}")
        joined = {normalize(file.name) for files in self.files.values() for file in files}
        self.left_out += [key for key in homes if key not in joined]  # of other channels, or lacking one
        self._index_names(paths, {key: homes[normalize(parts[0].name)] for key, parts in self.files.items()})

    def _index_names(self, paths, homes):
        """Prepare `find`. homes: {key: the paths that hold it}. Folders are in lower case."""
        self.whole, self.partial = index_names(homes)
        self.folders = {stem.rpartition("/")[0] for stem in self.whole} - {""}  # that images are in, with those above
        self.roots = {root_name(path) for path in paths}  # the source's own names
        inner = [key.lower().split("/")[:-1] for key in self.files]
        self.tops = {folder for folders in inner for folder in folders[:1]}
        self.has_one_top = len(self.tops) == 1 and all(inner)
        if self.has_one_top:  # what is in it counts as the top too
            self.tops |= {folder for folders in inner for folder in folders[1:2]}
        self.inner = set().union(*inner) - self.roots  # folders' names at any depth
        self.beside = set().union(*map(names_beside, paths)) - self.roots  # and of those that aren't of the source

    def find(self, name):
        """Return the image's key in `files`, which is its file's name. None where `name` fits no file, or several.

        A name may lack its ending (Kaggle's tables often do), and folders from the left, down to the bare name. The
        case of folders and endings doesn't matter. A folder that is there counts: right/5.png is never left/5.png.
        Before such a folder, or this source's own name, there may be others, as in ../input/comp/train/5.png; where no
        folder is there, images/5.png is the 5.png outside all folders."""
        if name in self.files:
            return name
        parts = normalize(name).split("/")
        folders = [part.lower() for part in parts[:-1]]
        own = not self.roots.isdisjoint(folders[:1])  # whether it begins with this source's name
        is_there = not self.tops.isdisjoint(folders[own : own + 1]) or "/".join(folders) in self.folders
        fits = fitting("/".join(parts), self.whole, *self.partial[: self.has_one_top if is_there else 2])
        if not (fits or is_there):
            fits = self._without_folders_above(parts, folders)
        return fits[0] if len(fits) == 1 else None

    def _without_folders_above(self, parts, folders):
        """Return the keys, a list, that fit the part of a name that begins with this source's own name or with a folder
        that is there; of a name with neither, the last part. parts: of the name; folders: those but the last, in lower
        case."""
        is_named = not self.roots.isdisjoint(folders)
        known = self.inner if is_named else self.inner | self.beside
        for i, folder in enumerate(folders):
            fits = fitting("/".join(parts[i:]), self.whole) if folder in self.roots or folder in known else []
            if fits or folder in known:
                return fits
        return [] if is_named else fitting(parts[-1], self.whole)

    def picture(self, name, least=None, salvage=False):
        """Return the Picture of an image that `find` finds; with `least`, of at least so many px a side if it has them.
        salvage: accept a truncated JPEG, whose missing rows are grey. Raises ValueError with the reason why the image
        can't be read."""
        pictures = [self._picture(file, least, salvage) for file in self.files[self.find(name)]]
        if len({picture.size for picture in pictures}) > 1:
            raise ValueError("its channels differ in size")
        # The maximum reads a grey file, and one that shows its channel in the channel's colour.
        pixels = [picture.pixels if len(pictures) == 1 else picture.pixels.max(axis=2) for picture in pictures]
        depth = max((picture.depth for picture in pictures if picture.depth), default=None)
        return Picture(pixels[0] if len(pixels) == 1 else np.stack(pixels, axis=2), depth, pictures[0].size)

    def _picture(self, file, least, salvage):
        """Return the Picture of one file."""
        try:
            with file.open() as opened:
                if file.content[0] <= MOST_BYTES:
                    return read_picture(opened.read() + END_OF_JPEG * salvage, self.bands, least, self.depth)
                if file.plain and file.name.lower().endswith((".tif", ".tiff")):  # a slide, which has smaller levels
                    return read_picture(opened, self.bands, least, self.depth)
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
    """Return a name with forward slashes, without needless ones and ., and with composed accents and kana (macOS
    decomposes them)."""
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def is_image(file):
    """Return whether a File is taken for an image: by its ending or, where it has none, by its first bytes."""
    parts = normalize(file.name).split("/")
    if not file.content or any(part.startswith(".") or is_litter(part) for part in parts):
        return False
    ends = parts[-1].lower().endswith(IMAGE_ENDINGS)
    if ends or split_ending(parts[-1])[1]:
        return ends
    with contextlib.suppress(*DAMAGED), file.open() as opened:
        head = opened.read(132)
        begins = head.startswith(np.lib.format.MAGIC_PREFIX) or any(Image.OPEN[kind][1](head) for kind in FORMATS)
        return begins or head[128:] == b"DICM"
    return False


def remedy_for(names):
    """Return what to do with files that are no images to the kit."""
    if any(ARCHIVE.search(name) for name in names):
        return "unpack the archives"
    kinds = {split_ending(name)[1].lower().partition(" ")[0] for name in names if not A_TABLE.search(name)}
    kinds = sorted(kinds - {"", *IMAGE_ENDINGS})
    return f"convert the {listing(kinds)} files to PNG or JPEG" if kinds else "put the images there"


def split_ending(name):
    """Return (the name without its ending, the ending); digits after a point, as in 1.2.840, are none."""
    stem, ending = os.path.splitext(name)
    return (stem, ending) if ending.strip(".0123456789") else (name, "")


def root_name(path):
    """Return the name, in lower case, of a folder or of an archive without its ending."""
    name = os.path.basename(os.path.abspath(path)).lower()
    return name if path.is_dir() else ARCHIVE.sub("", name)


def names_beside(path):
    """Return the names of the folders and archives beside a path, as root_name gives them."""
    above = Path(os.path.abspath(path)).parent
    paths = above.iterdir() if os.access(above, os.R_OK) else ()
    return {root_name(path) for path in paths if path.is_dir() or ARCHIVE.search(path.name)}


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


def index_names(homes):
    """Return ({name: [keys]}, ({name: [keys]}, {name: [keys]})) of {key: [paths]}: the names with all folders, without
    the first one, and without more. They lack the ending, and their folders are in lower case.

    With all folders are: a key; the path's name and the key; of an archive the same without its only top folder, and
    the rest alone where archive and folder are called alike."""
    whole, partial = defaultdict(list), (defaultdict(list), defaultdict(list))
    tops = defaultdict(set)
    for key, path in [(key, path) for key, paths in homes.items() for path in paths]:
        tops[path].add(key.lower().rpartition("/")[0].partition("/")[0])
    roots = {path: (root_name(path), path.is_file(), tops[path] if len(tops[path]) == 1 else ()) for path in tops}
    for key, paths in homes.items():
        stem = fold(key)[0]
        top, _, rest = stem.partition("/")
        names = {stem}
        for root, is_archive, only in map(roots.get, paths):
            names.add(f"{root}/{stem}")
            if top in only and rest and (is_archive or top == root):
                names |= {f"{root}/{rest}"} | ({rest} if top == root else set())
        for name in names:
            whole[name].append(key)
        while rest:
            partial[stem.count("/") - rest.count("/") > 1][rest].append(key)
            rest = rest.partition("/")[2]
    return whole, partial


def fold(name):
    """Return (a name without its ending, folders in lower case; the ending in lower case)."""
    folder, slash, last = name.rpartition("/")
    stem, ending = split_ending(last)
    return folder.lower() + slash + stem, ending.lower()


def fitting(name, *indexes):
    """Return the keys that fit the name best, a list, in the first of the indexes that has any: letter by letter, then
    with its ending, then with any."""
    stem, ending = fold(name)
    folder, slash, last = name.rpartition("/")
    for index in indexes:
        same = [key for key in index.get(stem, ()) if fold(key)[1] == ending]
        exact = [key for key in same if key.endswith(name)] or [key for key in same if key.rpartition("/")[2] == last]
        if fits := exact or same or index.get(folder.lower() + slash + last):
            return fits
    return []


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
    if missing and (given or not present):
        there = nearby(missing[0].parent, missing[0].name)
        raise UserError(f"{missing[0]} is missing; {there}: name folders or archives with --{part}-images")
    return ImageSource(present[: None if given else 1], flags.bands, flags.output / "unpacked", flags.channels)


def pattern_of_classes(names):
    """Return a pattern for --label-pattern where the images' names begin with their class, such as (dog|cat) for
    cat.1.jpg and dog.2.jpg; "" where a word comes once, or all begin alike."""
    words = Counter(re.match(r"[^\W\d_]*", name.rpartition("/")[2])[0] for name in names)
    are_classes = 1 < len(words) <= 20 and min(words.values()) > 1 and "" not in words
    return f"({'|'.join(sorted(words, reverse=True))})" if are_classes else ""  # a word goes before its beginning


def check_images(source, names, table):
    """Raise UserError naming the images of the table that the source lacks, or that the table spells in two ways."""
    missing = [name for name in names if source.find(name) is None]
    last_parts = {fold(normalize(name).rpartition("/")[2])[0] for name in missing}
    unread = [name for name in source.left_out if fold(name.rpartition("/")[2])[0] in last_parts]
    others = f"; {listing(unread, 3)} can't be read here: {remedy_for(unread)}" if unread else ""
    hint = missing and nearest(source, missing[0])
    refuse(source.path, missing, f"lacks {len(missing)} of the images in {table}: * ({hint}){others}")
    check_unique(table, map(source.find, names))


def nearest(source, name):
    """Return which files of the source a name may mean that it doesn't find, in words: those that it fits, or that
    differ from it in zeros before digits, case or ending; where there are none, the flags that decide."""

    def form(name):
        return "/" + re.sub("0*([0-9]+)", r"\1", fold(normalize(name))[0].casefold())

    keys = [key for key in source.files if form(key).endswith(form(name))]
    if not keys:
        return "see --image-column, --submit-header"
    stems = {fold(key.rpartition("/")[2])[0] for key in keys}
    if len(keys) == 1 or stems != {fold(normalize(name).rpartition("/")[2])[0]}:
        return f"the nearest to {name} is {listing(keys, 3)}"
    part = "folder" if len({key.rpartition("/")[0] for key in keys}) > 1 else "ending"
    return f"{name} fits several files ({listing(keys, 3)}): write the {part} too"


class PixelSource:
    """A CSV file, packed or not, with the pixels of an image in each row: a source as ImageSource is one. The images'
    names are the rows' numbers, from 1. columns: of the pixels; content: the CSV's bytes; table: the Table of the other
    columns. Raises UserError where the pixels make no square, ValueError where they are no numbers or differ in
    count."""

    left_out = ()

    def __init__(self, path, columns, content):
        dtype = str if len(columns) == 1 else defaultdict(lambda: str, dict.fromkeys(columns, np.float32))
        frame = pd.read_csv(io.BytesIO(content), dtype=dtype, keep_default_na=False)
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

    def picture(self, name, least=None, salvage=False):
        """Return the Picture of an image."""
        image = self.images[int(name) - 1]
        return Picture(image if image.shape[2] == 3 else np.repeat(image, 3, axis=2))


def find_pixels(folder, names):
    """Return the PixelSource of the first of these tables that has pixels, or None."""
    for path in (find_table(folder, name, ()) for name in names):
        columns = []
        try:
            if path.is_file() and path.suffix in (".csv", ".zip", ".gz"):
                content = read_bytes(path, "download it again")
                columns = pixel_columns(pd.read_csv(io.BytesIO(content), nrows=1, dtype=str, keep_default_na=False))
            if columns:
                return PixelSource(path, columns, content)
        except ValueError as error:
            if columns:
                raise UserError(f"{path} has cells that are no pixels ({error}): download it again") from None
    return None


def pixel_columns(first):
    """Return the columns of pixels, by a table's first row: pixel0, pixel1, … in the order of their numbers, or one of
    many numbers separated by blanks. Empty: none."""
    numbered = [name for name in first if name.lower().startswith("pixel") and name[5:].strip("_ ").isdecimal()]
    numbered.sort(key=lambda name: int(name[5:].strip("_ ")))
    cells = {name: " ".join(first[name]).split() for name in first}
    packed = [name for name in first if len(cells[name]) >= FEWEST_PIXELS and all(map(str.isdecimal, cells[name]))]
    return numbered if len(numbered) >= FEWEST_PIXELS else packed[:1]
