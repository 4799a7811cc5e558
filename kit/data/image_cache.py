"""Images decoded once into a memory map, on a disk that may be full, in a folder that changes all at once."""

import contextlib
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common import UserError, cpu_count, progress, replacing
from kit.data.decode import resize
from kit.data.tables import refuse


def cache(source, names, size, path, look):
    """Decodes every image once and writes uint8 [N, size, size, 3] to `path`. `look(i, image)` sees each whole image.
    → [((width, height), why the image can't be read or None) of each image]. Of such an image, what is left is used.
    Each thread writes its images to their place in the file, so memory doesn't grow with the data."""
    results, shape = [], (len(names), size, size, 3)

    def convert(i, name):
        image, reason = decode(source, name, size)
        os.pwrite(file.fileno(), resize(image, size).data, start + i * math.prod(shape[1:]))
        look(i, image)
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


def decode(source, name, size):
    """→ (uint8 [H, W, 3], None), or of an unreadable image (a JPEG as far as it goes, else all grey; the reason)."""
    try:
        return source.decoded(name), None
    except ValueError as error:
        with contextlib.suppress(ValueError):
            return source.decoded(name, salvage=True), str(error)
        return np.full((size, size, 3), 128, np.uint8), str(error)


def reserve(file, size):
    """Makes the next `size` bytes of a file real: a full disk is an error here, and in a memory map a crash."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        return os.posix_fallocate(file.fileno(), file.tell(), size)
    for start in range(0, size, 2**24):  # macOS
        os.pwrite(file.fileno(), bytes(min(2**24, size - start)), file.tell() + start)


@contextlib.contextmanager
def array_in_file(folder, dtype, *shape):
    """Yields an array that lies in a temporary file, so that memory doesn't grow with the data."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # named: processes that judge pairs map it by its name
        reserve(file, math.prod(shape) * np.dtype(dtype).itemsize)
        yield np.memmap(file.name, dtype, "r+", shape=shape)


@contextlib.contextmanager
def staged(folder, needed, anew):
    """Yields an empty folder, whose files take their place in `folder` when the block ends well. A run that fails or is
    killed leaves the earlier files as they were; `anew` removes those. Raises UserError where `needed` bytes lack."""
    staging = folder / ".new"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a killed run
        staging.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        space = f"has {free / 2**30:.1f} GiB free and the caches need {needed / 2**30:.1f} GiB"
        refuse(folder, needed > free, f"{space}: free some, choose another --output, or a smaller --size")
        yield staging
        made = ("prepared.json", "*_*.npy", "features_*", "duplicates.*", "matched.png")
        for path in [path for name in made for path in folder.glob(name)] if anew else []:
            path.unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "prepared.json"):  # the others come first
            os.replace(path, folder / path.name)
    except OSError as error:
        raise UserError(f"{staging} can't be written ({error.strerror or error}): see --output") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
