"""Memory-mapped cache of decoded images, written so that a full disk or a killed run leaves no half file."""

import contextlib
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

from common import UserError, cpu_count, progress, replacing

import numpy as np

from kit.data.decode import resize
from kit.data.tables import refuse

GREY = 128


def write_cache(source, names, size, path, visit):
    """Decode every image once and write it at once, so that memory doesn't grow with their number, to `path`: uint8
    [N, size, size, 3]. → [((width, height), why it can't be read or None) of each image]. source: an ImageSource or
    PixelSource; visit: a function (i, image of its own size), called in the threads that decode."""
    results, shape = [], (len(names), size, size, 3)

    def convert(i, name):
        image, reason = decode_or_grey(source, name, size)
        os.pwrite(file.fileno(), resize(image, size).data, start + i * math.prod(shape[1:]))
        visit(i, image)
        return image.shape[1::-1], reason

    with replacing(path) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor(cpu_count()) as pool:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
        start = file.tell()
        reserve(file, math.prod(shape))
        with progress(len(names), path.name) as bar:
            for result in pool.map(convert, range(len(names)), names):
                results.append(result)
                bar.update()
    return results


def decode_or_grey(source, name, size):
    """Return (uint8 [H, W, 3], None) or, for an unreadable image, (a truncated JPEG as far as it goes, or a grey image
    of `size` px; the reason)."""
    try:
        return source.decoded(name), None
    except ValueError as error:
        with contextlib.suppress(ValueError):
            return source.decoded(name, salvage=True), str(error)
        return np.full((size, size, 3), GREY, np.uint8), str(error)


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
    leaves the earlier files as they were; otherwise `clear` removes them. Raises UserError where fewer than `needed`
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
