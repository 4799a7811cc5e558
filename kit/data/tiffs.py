"""The tags of a TIFF, and its samples as they're stored, of any number of bands and any type. Pillow knows neither."""

import io
import struct

import numpy as np
from PIL import Image, TiffImagePlugin

MOST_BYTES = 2**29  # of one file, unpacked: what claims more is no photo but a bomb
PACKINGS = 1, 5, 8, 32773, 32946, 34925, 50000  # TIFF's that keep every bit: none, LZW, deflate, packbits, LZMA, zstd
WIDTH, HEIGHT, BITS, PACKING, COLOURS, STRIPS, ORIENTATION, BANDS, ROWS, LENGTHS, LAYOUT = (
    256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284)  # fmt: skip
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_LENGTHS, EXTRA, KIND = 317, 322, 323, 324, 325, 338, 339


def read_page(file):
    """→ the tags of a TIFF's first page, {number: value}; the file is back at its start."""
    head = file.read(16)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head if head[:4] == b"II+\0" else head[:8])
    file.seek(tags.next)
    tags.load(file)
    file.seek(0)
    return tags


def tiff_samples(file, page):
    """→ the samples [H, W, C] of a TIFF's first page as they're stored, of any number of bands and any type. Raises
    ValueError for bits that aren't whole bytes, and for compressions that lose some.

    Pillow knows no such pixels, but the libtiff in it unpacks bytes. So it's given the same file with other tags: each
    plane a grey 8-bit picture as wide as a row has bytes. The rest is undone here."""
    width, height, count = page[WIDTH], page[HEIGHT], page.get(BANDS, 1)
    bits, kinds, packing = {*page.get(BITS, (1,))}, {*page.get(KIND, (1,))}, page.get(PACKING, 1)
    if len(bits) > 1 or len(kinds) > 1 or not bits <= {8, 16, 32, 64} or not kinds <= {1, 2, 3}:
        raise ValueError(f"bands of {sorted(bits)} bits, kinds {sorted(kinds)}")
    if packing not in PACKINGS:
        raise ValueError(f"TIFF compression {packing} can't be read by bands")
    dtype = np.dtype(f"{'<' if page.prefix == b'II' else '>'}{'uif'[kinds.pop() - 1]}{bits.pop() // 8}")
    planes = count if page.get(LAYOUT, 1) == 2 else 1
    tiled, of_plane = TILES in page, count // planes
    pixel = of_plane * dtype.itemsize
    step = page[TILE_WIDTH] if tiled else width
    row = -(-width // step) * step  # tiles are whole
    places, lengths = (page[tag] for tag in ((TILES, TILE_LENGTHS) if tiled else (STRIPS, LENGTHS)))
    data, read = file.read(MOST_BYTES + 1), []
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES / 2**20:.0f} MiB, too much to be read by bands")
    for plane in range(planes):
        share = slice(plane * len(places) // planes, (plane + 1) * len(places) // planes)
        tags = {WIDTH: row * pixel, HEIGHT: height, BITS: 8, PACKING: packing, COLOURS: 1, BANDS: 1}
        if tiled:
            tags |= {TILE_WIDTH: step * pixel, TILE_HEIGHT: page[TILE_HEIGHT]}
            tags |= {TILES: places[share], TILE_LENGTHS: lengths[share]}
        else:
            tags |= {ROWS: page.get(ROWS, height), STRIPS: places[share], LENGTHS: lengths[share]}
        end = len(data) + len(data) % 2
        changed = b"II*\0" + struct.pack("<I", end) + data[8:].ljust(end - 8, b"\0") + directory(tags, end)
        with Image.open(io.BytesIO(changed), formats=["TIFF"]) as opened:
            stored = np.asarray(opened)
        stored = stored.reshape(height, row // step, step * pixel)
        read.append(unpredicted(stored, page.get(PREDICTOR, 1), dtype, of_plane).reshape(height, row, of_plane))
    return np.concatenate(read, axis=-1)[:, :width].astype(dtype.newbyteorder("="))


def directory(tags, start):
    """{number: value or values} → the bytes of a directory of tags that begins at `start`, all of 32 bits."""
    entries, behind = b"", b""
    for number, values in sorted(tags.items()):
        packed = np.atleast_1d(values).astype("<u4").tobytes()
        if len(packed) > 4:
            packed, behind = struct.pack("<I", start + 2 + 12 * len(tags) + 4 + len(behind)), behind + packed
        entries += struct.pack("<HHI", number, 4, np.size(values)) + packed
    return struct.pack("<H", len(tags)) + entries + bytes(4) + behind


def unpredicted(stored, predictor, dtype, of_plane):
    """uint8 [H, tiles, bytes] → the samples [H, tiles, pixels, of_plane]: undoes that each pixel is stored as the
    difference to the one left of it (2), or so in bytes, the highest bytes of all samples first (3)."""
    shape = *stored.shape[:2], -1, of_plane
    if predictor == 3:
        summed = np.cumsum(stored.reshape(shape), axis=2, dtype=np.uint8)
        by_place = summed.reshape(*shape[:2], dtype.itemsize, -1).swapaxes(2, 3)
        return np.ascontiguousarray(by_place).view(dtype.newbyteorder(">")).reshape(shape)
    if predictor == 2:  # of whole numbers, even where floats are stored
        numbers = np.ascontiguousarray(stored).view(dtype.str.replace("f", "u")).reshape(shape)
        return np.cumsum(numbers, axis=2, dtype=f"u{dtype.itemsize}").view(dtype.newbyteorder("="))
    return np.ascontiguousarray(stored).view(dtype).reshape(shape)
