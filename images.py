"""Where the competition's images lie, and what one of them looks like to a person. Used by 00_prepare.py."""

import hashlib
import io
import os
import unicodedata
import zipfile

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common import UserError, listing

MOST_BYTES = 2**29  # of one file, by its declared size: what claims more is no photo but a bomb
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
Image.init()  # knows all its formats from here on; of these, none that starts a program (EPS) or needs another file
FORMATS = [name for name in "PNG JPEG WEBP AVIF GIF BMP TIFF PPM".split() if name in Image.OPEN]

# ---------------------------------------------------------------- archives and folders


class ImageSource:
    """A zip or a folder of images, found by the names that the competition's tables use.

    A name is looked up as it stands, then without the archive's top folder, then without its ending (Kaggle's tables
    often leave it out), wherever that leaves one file. Nothing is unpacked: archives are read where they lie, and a
    name can only find a file that the archive or the folder lists.
    """

    def __init__(self, path):
        self.path = path
        if path.is_dir():
            self.zip = None
            files = [(file.relative_to(path).as_posix(), file) for file in sorted(path.rglob("*")) if file.is_file()]
            identity = [(name, file.stat().st_size) for name, file in files]
        else:
            try:
                self.zip = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
                raise UserError(f"{path} is no zip archive, or a damaged one ({error}): download it again") from None
            entries = [entry for entry in self.zip.infolist() if entry.filename and not entry.is_dir()]
            if any(entry.flag_bits & 1 for entry in entries):
                raise UserError(f"{path} is encrypted: unpack it with its password into {path.with_suffix('')}")
            files = [(entry_name(entry), entry) for entry in entries]
            identity = [(name, entry.file_size, entry.CRC) for name, entry in files]
        self.fingerprint = hashlib.sha256(repr(sorted(identity)).encode()).hexdigest()
        self.files = {}
        for (name, file), (_, *content) in zip(files, identity, strict=True):
            if not is_image(name):
                continue
            other = self.files.setdefault(plain(name), file)
            if other is not file and (self.zip is None or content != [other.file_size, other.CRC]):
                raise UserError(f"{path} holds two different files named {name}: leave one of them")
        if not self.files:
            shown = listing([name for name, _ in files], 3) or "nothing"
            raise UserError(f"{path} holds no images but {shown}: put the images themselves there")
        self.aliases = aliases(self.files)

    def find(self, name):
        """→ the key of the file that `name` means, or None."""
        name = plain(name)
        return name if name in self.files else self.aliases.get(name)

    def decoded(self, key):
        """→ the image, as `decode` gives it. Raises ValueError with the reason why it can't be read."""
        file = self.files[key]
        if self.zip is None and not file.resolve().is_relative_to(self.path.resolve()):
            raise ValueError("a link that leads out of the folder")
        size = file.stat().st_size if self.zip is None else file.file_size
        if size > MOST_BYTES:
            raise ValueError(f"{size / 2**20:.0f} MiB when unpacked, and {MOST_BYTES / 2**20:.0f} are allowed")
        try:
            data = file.read_bytes() if self.zip is None else self.zip.read(file)
        except (zipfile.BadZipFile, zipfile.zlib.error, NotImplementedError, OSError, EOFError) as error:
            raise ValueError(str(error)) from None
        return decode(data)


def entry_name(entry):
    """A zip entry's name. Without the UTF-8 mark it is UTF-8 all the same (macOS) or cp932 (Windows in Japan)."""
    if entry.flag_bits & 0x800:
        return entry.filename
    raw = entry.filename.encode("cp437")  # what zipfile decoded it from
    for encoding in ("utf-8", "cp932"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return entry.filename


def plain(name):
    """One spelling for a name: forward slashes, composed accents and kana (macOS decomposes them)."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def is_image(name):
    parts = name.split("/")
    return "__MACOSX" not in parts and not parts[-1].startswith(".") and name.lower().endswith(IMAGE_ENDINGS)


def aliases(files):
    """Other names by which exactly one file can be meant: without the top folder, without the ending, or both."""
    found = {}
    for key in files:
        _, slash, below = key.partition("/")
        for name in {key, below if slash else key}:
            for alias in {name, os.path.splitext(name)[0]} - {key}:
                found.setdefault(alias, set()).add(key)
    return {alias: keys.pop() for alias, keys in found.items() if len(keys) == 1}


# ---------------------------------------------------------------- one image


def decode(data):
    """The bytes of an image file → uint8 [H, W, 3] RGB, as a person sees it.

    EXIF rotation is applied, palettes and CMYK are converted, 16 bits are scaled to 8, transparent parts stand on
    white, an animation shows its first frame. Raises ValueError for what is no image, is truncated, or has no 8- or
    16-bit values. Pillow and not OpenCV, which gives a truncated JPEG back half grey, and drops transparency.
    """
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
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point values")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def resize(image, size):
    """uint8 [H, W, 3] → [size, size, 3], bilinear, as albumentations' Resize in the thesis (3.1.1).

    Where the image shrinks to less than half, bilinear would skip pixels and leave their noise; there the area's mean.
    """
    shrunk = min(image.shape[:2]) > 2 * size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrunk else cv2.INTER_LINEAR)


# ---------------------------------------------------------------- pictures


def contact_sheet(path, rows, columns):
    """Writes a PNG of `rows`: (title, [(image uint8 [H, W, 3], caption), …]). One row's images lie side by side.

    All in one pair of axes: matplotlib takes seconds for an axes of its own around each image.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inches, high, left = 1.6, 1.15, 0.3  # of a cell; its height and the titles' room in cells
    figure = plt.figure(figsize=(inches * (columns + left), inches * high * len(rows)))
    axis = figure.add_axes((0, 0, 1, 1))
    for row, (title, cells) in enumerate(rows):
        middle = (row + 0.5) * high + 0.05
        axis.text(-left / 2, middle, title, fontsize=7, ha="center", va="center", rotation=90, parse_math=False)
        for column, (image, caption) in enumerate(cells):
            height, width = 0.48 * np.array(image.shape[:2]) / max(image.shape[:2])
            x = column + 0.5
            axis.imshow(image, extent=(x - width, x + width, middle + height, middle - height))
            axis.text(x, middle - 0.5, caption, fontsize=6, ha="center", va="bottom", parse_math=False)
    axis.axis("off")
    axis.set(xlim=(-left, columns), ylim=(len(rows) * high, 0), aspect="auto")  # each imshow has set its own
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)
