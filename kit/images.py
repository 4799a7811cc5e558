"""Where the competition's images are, how one is found and resized, and how a sheet of them is drawn."""

import hashlib
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import UserError, listing, replacing
from kit.archives import Folder, open_place
from kit.formats import decode
from kit.tiffs import MOST_BYTES

END_OF_JPEG = b"\xff\xd9"  # after it libjpeg leaves the rows that it lacks grey
IMAGE_ENDINGS = (*".png .jpg .jpeg .webp .avif .gif .bmp .tif .tiff .ppm .pgm".split(), ".dcm", ".dicom", ".npy")


class File(NamedTuple):
    """One file of a source. content: its size and, in a zip, its CRC."""

    place: object
    entry: object
    content: list


class ImageSource:
    """The folders and archives of a part's images, found by the names that the competition's tables use.

    paths: one path or several: folders, .zip, .tar, whose files are read in place, and .7z, .tar.gz and the like, which
    are unpacked below the folder `unpacked`, once; kit/archives.py. bands: which of a TIFF's or an array's bands are
    read; kit/formats.py. channels: ("_red", "_green", "_blue"): an image is three files, ID_red.png for one; their
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


def resize(image, size):
    """uint8 [H, W, 3] → [size, size, 3], bilinear, as albumentations' Resize in the thesis (3.1.1).

    An axis that shrinks to less than half is averaged first: bilinear would skip its pixels and keep their noise. The
    other axis waits for the second step, since INTER_AREA is no mean once an axis grows."""
    height, width = (size if side > 2 * size else side for side in image.shape[:2])
    if (height, width) != image.shape[:2]:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


CELL, GAP, LINE = 160, 14, 24  # px: a cell's side, the room between two, the height of a line of text


def draw_classes(path, images, folds, examples, seed, transform=None, columns=6):
    """Writes a picture of some `examples` ({title: rows of folds.csv}, as kit/tasks.py picks them; thesis figures 3.1
    to 3.3) and, below each, of the same after a random `transform` (image, seed). images: uint8 [N, S, S, 3]."""
    sheet = []
    for title, rows in examples.items():
        names = folds.image_name.iloc[rows]
        chosen = names.sample(min(columns, len(names)), random_state=seed)
        sheet.append((f"{title} · {len(names)} images", [(images[i], name) for i, name in chosen.items()]))
        if transform is not None:
            sheet.append(("augmented", [(transform(images[i], i), "") for i in chosen.index]))
    with replacing(path) as temporary:
        contact_sheet(temporary, sheet, columns)


def contact_sheet(path, rows, columns):
    """Writes a PNG of `rows`: (title, [(image uint8 [H, W, 3], caption), …]), at most `columns` images a row."""
    height = LINE + CELL + LINE + GAP
    sheet = Image.new("RGB", (GAP + (CELL + GAP) * columns, GAP + height * len(rows)), "white")
    for top, (title, cells) in zip(range(GAP, sheet.height, height), rows, strict=True):
        write(sheet, (GAP, top + LINE // 2), title, 16, "black", sheet.width - 2 * GAP, "lm")
        for left, (image, caption) in zip(range(GAP, sheet.width, CELL + GAP), cells, strict=False):
            tile = ImageOps.pad(Image.fromarray(np.ascontiguousarray(image)), (CELL, CELL), color="whitesmoke")
            sheet.paste(tile, (left, top + LINE))
            write(sheet, (left + CELL // 2, top + LINE + CELL + LINE // 2), caption, 12, "dimgray", CELL, "mm")
    sheet.save(path, "PNG")


def write(sheet, place, text, size, colour, width, anchor):
    """Writes one line of text. Where it is wider than `width` px, … stands for its middle."""
    font, text = ImageFont.load_default(size), " · ".join(text.splitlines())
    while font.getlength(text) > width:
        middle = len(text) // 2
        text = text[: middle - 1] + "…" + text[middle + 1 :]
    ImageDraw.Draw(sheet).text(place, text, colour, font, anchor)
