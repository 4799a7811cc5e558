"""Images whose pixels stand in a table: a column for each, or all in one cell."""

import io
import zipfile

import numpy as np
import pandas as pd

from common import UserError, file_hash
from kit.tables import Table, refuse

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
