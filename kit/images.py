"""Where the competition's images are, how one is decoded and resized, and how a sheet of them is drawn."""

import hashlib
import io
import os
import unicodedata
import zipfile

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from common import UserError, listing, replacing

MOST_BYTES = 2**29  # of one file, unpacked: what claims more is no photo but a bomb
END_OF_JPEG = b"\xff\xd9"  # after it libjpeg leaves the rows that it lacks grey
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
Image.init()  # knows all its formats from here on; of these, none that starts a program (EPS) or needs another file
FORMATS = [name for name in "PNG JPEG WEBP AVIF GIF BMP TIFF PPM".split() if name in Image.OPEN]


class ImageSource:
    """A zip or a folder of images, found by the names that the competition's tables use.

    A name is looked up as it stands, then without the archive's top folder, then without its ending (Kaggle's tables
    often leave it out), wherever that leaves one file. Only a listed file can be found, and nothing is unpacked."""

    def __init__(self, path):
        self.path, self.zip, self.files = path, None if path.is_dir() else open_zip(path), {}
        if self.zip:
            entries = [entry for entry in self.zip.infolist() if entry.filename and not entry.is_dir()]
            identity = {entry: (entry.filename, entry.file_size, entry.CRC) for entry in entries}
        else:
            paths = [file for file in sorted(path.rglob("*")) if file.is_file()]
            identity = {file: (file.relative_to(path).as_posix(), file.stat().st_size) for file in paths}
        self.fingerprint = hashlib.sha256(repr(sorted(identity.values())).encode()).hexdigest()
        for file, (name, *content) in identity.items():
            hidden = name.rpartition("/")[2].startswith(".")  # as ._0001.png, which macOS adds
            if name.lower().endswith(IMAGE_ENDINGS) and not hidden:
                other = self.files.setdefault(plain(name), (file, *content))
                if [*other[1:]] != content:
                    raise UserError(f"{path} holds two different files named {name}: leave one of them")
        if not self.files:
            held = listing([name for name, *_ in identity.values()], 3) or "nothing"
            raise UserError(f"{path} holds no images but {held}: put the images there")
        self.aliases = aliases(self.files)

    def find(self, name):
        """→ the file's name in the zip or folder, its key in `files`. None where `name` means none, or several."""
        return self.aliases.get(plain(name))

    def decoded(self, name, salvage=False):
        """→ the image that `find` knows, as `decode` gives it. `salvage` accepts a truncated JPEG: the rows that it
        lacks are grey. Raises ValueError with the reason why the image can't be read."""
        file, size, *_ = self.files[self.find(name)]
        if self.zip is None and not file.resolve().is_relative_to(self.path.resolve()):
            raise ValueError("a link that leads out of the folder")
        if size > MOST_BYTES:
            raise ValueError(f"{size / 2**20:.0f} MiB when unpacked, and {MOST_BYTES / 2**20:.0f} are allowed")
        try:
            data = file.read_bytes() if self.zip is None else self.zip.read(file)
        except (zipfile.BadZipFile, zipfile.zlib.error, NotImplementedError, OSError, EOFError) as error:
            raise ValueError(str(error)) from None
        return decode(data + (END_OF_JPEG if salvage else b""))


def open_zip(path, encodings=("utf-8", "cp932", "cp437")):
    """Opens a zip. Names without the UTF-8 mark are UTF-8 all the same (macOS), cp932 (Windows in Japan) or cp437."""
    try:
        archive = zipfile.ZipFile(path, metadata_encoding=encodings[0])
    except (zipfile.BadZipFile, NotImplementedError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError) and encodings[1:]:
            return open_zip(path, encodings[1:])
        raise UserError(f"{path} is no zip archive, or a damaged one ({error}): download it again") from None
    if any(entry.flag_bits & 1 for entry in archive.infolist()):
        raise UserError(f"{path} is encrypted: unpack it with its password into {path.with_suffix('')}")
    return archive


def plain(name):
    """One spelling for a name: forward slashes, composed accents and kana (macOS decomposes them)."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def aliases(files):
    """→ {name: key} of all names that mean one file: as it stands, without the top folder, the ending, or both."""
    meanings = {}
    for key in files:
        for name in {key, key.partition("/")[2] or key}:
            for alias in {name, os.path.splitext(name)[0]}:
                meanings.setdefault(alias, set()).add(key)
    return {alias: keys.pop() for alias, keys in meanings.items() if len(keys) == 1} | {key: key for key in files}


def decode(data):
    """The bytes of an image file → uint8 [H, W, 3] RGB, as a person sees it.

    EXIF rotation is applied, palettes and CMYK are converted, transparent parts stand on white, an animation shows its
    first frame. 16-bit grey is scaled to 8 bits by the depth that it uses. Raises ValueError for what is no image, is
    truncated, or has neither 8- nor 16-bit values. By Pillow: OpenCV drops transparency, accepts truncated JPEGs."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise ValueError("no image" if data else "empty file") from None
    except Exception as error:  # whatever damaged bytes make of Pillow's readers: a dozen kinds, as fuzzing shows
        raise ValueError(str(error) or type(error).__name__) from None
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit values")
        depth = next(bits for bits in (8, 10, 12, 14, 16) if grey.max() < 2**bits)  # as cameras store
        image = Image.fromarray((grey >> (depth - 8)).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point values")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def resize(image, size):
    """uint8 [H, W, 3] → [size, size, 3], bilinear, as albumentations' Resize in the thesis (3.1.1).

    An axis that shrinks to less than half is averaged first: bilinear would skip its pixels and keep their noise. The
    other axis waits for the second step, since INTER_AREA is no mean once an axis grows."""
    height, width = (size if side > 2 * size else side for side in image.shape[:2])
    if (height, width) != image.shape[:2]:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


CELL, GAP, LINE = 160, 14, 24  # px: a cell's side, the room between two, the height of a line of text


def draw_classes(path, images, folds, classes, seed, transform=None, columns=6):
    """Writes a picture of images of each class (thesis figures 3.1 to 3.3) and, below each, of the same after a random
    `transform` (image, seed). images: uint8 [N, S, S, 3]; folds: the table folds.csv."""
    sheet = []
    for label in classes[:10]:
        names = folds.image_name[folds.label == label]
        chosen = names.sample(min(columns, len(names)), random_state=seed)
        sheet.append((f"label {label} · {len(names)} images", [(images[i], name) for i, name in chosen.items()]))
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
