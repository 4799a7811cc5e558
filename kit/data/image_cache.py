"""Memory-mapped cache of decoded images, written so that a full disk or a killed run leaves no half file."""

import contextlib
import math
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from common import UserError, cpu_count, listing, progress, say, wrapped

import numpy as np

from kit.data.decode import Picture, resize
from kit.data.tables import refuse

GREY = 128
SEEN = 256  # px at which kit/folds looks at images
AT_ONCE = 4096  # images queued for the threads, 1.5 KB each
USED = 0.95  # share of the 16-bit images whose depth the scale holds


def write_cache(source, names, size, path, visit, chosen=None):
    """Decode every image once and write it at once, so that memory doesn't grow with their number, to `path`: uint8
    [N, size, size, 3]. → [((width, height), why it can't be read or None, its Picture's depth) of each image]. source:
    an ImageSource or PixelSource; visit: a function (i, Picture), called in the threads that decode; chosen: numbers of
    the images that are decoded again, in a cache that is there."""
    if chosen is None:
        shape, chosen = (len(names), size, size, 3), range(len(names))
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
            reserve(file, math.prod(shape))
    results, start = [], np.load(path, mmap_mode="r").offset

    def convert(i):
        picture, reason = decode_or_grey(source, names[i], size)
        os.pwrite(file.fileno(), resize(picture.pixels, size).data, start + i * size * size * 3)
        visit(i, picture)
        return picture.size, reason, picture.depth

    with open(path, "r+b") as file, ThreadPoolExecutor(cpu_count()) as pool, progress(len(chosen), path.name) as bar:
        for first in range(0, len(chosen), AT_ONCE):
            for result in pool.map(convert, chosen[first : first + AT_ONCE]):
                results.append(result)
                bar.update()
        os.fsync(file.fileno())
    return results


def common_depth(depths):
    """Return the depth, bits, by which all 16-bit images of a data set are scaled, and print it: the least that 95 % of
    them need no more than. The rest, which are cut off at white, may be damaged or another camera's; scaled by theirs,
    all others would be dark. depths: those that the images use; None for 8 bits. None where all have 8."""
    used = [depth for depth in depths if depth]
    if not used:
        return None
    depth = int(np.quantile(used, USED, method="inverted_cdf"))
    counts = listing(f"{count} use {bits} bits" for bits, count in sorted(Counter(used).items()))
    cut = "; what is brighter becomes white" * (max(used) > depth)
    say(wrapped(f"{'depth':<12}", f"16-bit images are all scaled as {depth} bits ({counts}{cut})"))
    return depth


def decode_or_grey(source, name, size):
    """Return (Picture, None) or, for an unreadable image, (a truncated JPEG as far as it goes, or a grey image; the
    reason). Large JPEGs are read at a reduced size that is enough for `size` px and for kit/folds."""
    least = 2 * max(size, SEEN)
    try:
        return source.picture(name, least), None
    except ValueError as error:
        with contextlib.suppress(ValueError):
            return source.picture(name, least, salvage=True), str(error)
        return Picture(np.full((size, size, 3), GREY, np.uint8)), str(error)


def reserve(file, size):
    """Allocate the next `size` bytes of a file: a full disk is an error here, and a crash in a memory map."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        return os.posix_fallocate(file.fileno(), file.tell(), size)
    for start in range(0, size, 2**24):  # macOS
        os.pwrite(file.fileno(), bytes(min(2**24, size - start)), file.tell() + start)


@contextlib.contextmanager
def array_in_file(folder, dtype, *shape):
    """Yield an array mapped from a temporary file in `folder`, so that memory doesn't grow with the data."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # named: processes that compare pairs map it by its name
        reserve(file, math.prod(shape) * np.dtype(dtype).itemsize)
        yield np.memmap(file.name, dtype, "r+", shape=shape)


@contextlib.contextmanager
def staged(folder, needed, clear):
    """Yield an empty folder, whose files move into `folder` when the block ends well. A run that fails or is killed
    leaves the earlier files as they were; else `clear` removes them first. Raises UserError where fewer than `needed`
    bytes are free, or the folder can't be written."""
    staging = folder / ".new"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed run
        staging.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        space = f"has {free / 2**30:.1f} GiB free and the caches need {needed / 2**30:.1f} GiB"
        refuse(folder, needed > free, f"{space}: free some, choose another --output, or a smaller --size")
        yield staging
        patterns = ("prepared.json", "*_*.npy", "features_*", "duplicates.*", "matched.png") if clear else ()
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "prepared.json"):  # which comes last
            os.replace(path, folder / path.name)
    except OSError as error:
        raise UserError(f"{staging} can't be written ({error.strerror or error}): see --output") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
