"""What the four scripts share: flags, one-line errors, files written whole, the prepared data, progress."""

import numpy as np

from common import AGAIN, PREPARE, UserError, file_hash, listing, prepared_folder, read_json, read_table


def read_prepared(args):
    """→ (prepared.json as a dict, folds.csv as a table). Raises UserError where folds.csv was changed by hand."""
    folder = prepared_folder(args)
    prepared = read_json(folder / "prepared.json", PREPARE)
    folds = read_table(folder / "folds.csv", PREPARE)
    if file_hash(folder / "folds.csv") != prepared["folds_hash"]:
        raise UserError(f"{folder}/folds.csv was changed since: restore it, or {AGAIN} --overwrite for new folds")
    return prepared, folds


def open_images(args, prepared, part, size, count):
    """The cached images of `part` ("train" or "test"): uint8 [count, size, size, 3] RGB, mapped, not read."""
    path = prepared_folder(args) / f"{part}_{size}.npy"
    if size not in prepared["sizes"]:
        raise UserError(f"{path.parent} holds images of {listing(prepared['sizes'])} px: {AGAIN} --size {size}")
    try:
        images = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {AGAIN} --size {size}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, then {AGAIN} --size {size}") from None
    if images.shape != (count, size, size, 3) or images.dtype != np.uint8:
        raise UserError(f"{path} holds {images.shape} {images.dtype}: remove it, then {AGAIN} --size {size}")
    return images
