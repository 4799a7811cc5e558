"""Where the competition's images lie, and what one of them looks like to a person. Used by 00_prepare.py."""

import hashlib
import io
import os
import unicodedata
import zipfile

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common import UserError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

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
            files = sorted(file for file in path.rglob("*") if file.is_file())
            self.files = {file.relative_to(path).as_posix(): file for file in files}
            identity = [(name, file.stat().st_size) for name, file in self.files.items()]
        else:
            try:
                self.zip = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise UserError(f"{path} is no zip archive, or a damaged one ({error}): download it again") from None
            entries = [entry for entry in self.zip.infolist() if not entry.is_dir()]
            self.files = {entry_name(entry): entry for entry in entries}
            identity = [(name, entry.file_size, entry.CRC) for name, entry in self.files.items()]
        self.fingerprint = hashlib.sha256(repr(sorted(identity)).encode()).hexdigest()
        self.files = {plain(name): file for name, file in self.files.items() if is_image(name)}
        self.aliases = aliases(self.files)

    def find(self, name):
        """→ the key of the file that `name` means, or None."""
        name = plain(name)
        return name if name in self.files else self.aliases.get(name)

    def read(self, key):
        """→ the file's bytes."""
        file = self.files[key]
        return file.read_bytes() if self.zip is None else self.zip.read(file)


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
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise ValueError("no image" if data else "empty file") from None
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None
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
