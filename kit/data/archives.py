"""Archives: folders, zip and tar files read in place; 7z and tar.gz files unpacked once. All are lists of Files."""

import contextlib
import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from common import UserError, say

from kit.locks import locked

PACKED = (".7z", ".tar.gz", ".tgz")  # no single file in them can be read without all before it
BZ2_OR_XZ = (".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
DAMAGED = tarfile.TarError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, OSError
RESERVE = 2**28  # bytes that unpacking leaves free on the disk


class File(NamedTuple):
    """A file in a folder or an archive."""

    name: str  # with the folders in which it is there
    content: tuple[int, ...]  # its size and, in a zip, its CRC
    open: Callable  # () → the file, opened for reading; this or reading it raises one of DAMAGED
    plain: bool = False  # whether it isn't in an archive


def open_archive(path, unpacked=None):
    """Return the Files, a list, of the folder or archive at `path`; a .7z or .tar.gz is unpacked below the folder
    `unpacked`, once. Raises UserError where that is None, and for what is missing, damaged, encrypted, in parts, packed
    by bz2 or xz, or too large."""
    name, joined = path.name.lower(), path.with_suffix("")
    if not path.exists():
        raise UserError(f"{path} is missing: download it")
    if path.is_dir():
        files = [(file, file.relative_to(path).as_posix()) for file in sorted(path.rglob("*")) if file.is_file()]
        return [File(name, (file.stat().st_size,), partial(open_plain, file, path), True) for file, name in files]
    if re.search(r"\.\d{3}$", name):
        raise UserError(f"{path} is one of several parts: join them, cat {joined}.* > {joined}")
    if name.endswith(BZ2_OR_XZ):
        raise UserError(f"{path} is packed by bz2 or xz: unpack it, tar -xf {path}, and name the folder")
    if name.endswith(PACKED):
        return unpack(path, unpacked)
    kind, read = ("tar archive", read_tar) if name.endswith(".tar") else ("zip archive", read_zip)
    try:
        return read(path)
    except DAMAGED as error:
        raise damaged(path, kind, error) from None


def open_plain(path, folder):
    """Open a file for reading. Raises OSError, and ValueError where a link leads out of the folder."""
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("a link that leads out of the folder")
    return path.open("rb")


def read_zip(path):
    """Return the Files of a zip."""
    if path.with_suffix(".z01").exists():
        raise UserError(f"{path} is one of several parts: join them, zip -s 0 {path.name} --out joined.zip")
    for encoding in ("utf-8", "cp932", "cp437"):  # names without the UTF-8 mark: macOS, Windows in Japan, others
        with contextlib.suppress(UnicodeDecodeError):
            archive = zipfile.ZipFile(path, metadata_encoding=encoding)
            break
    else:
        raise ValueError("names in no known encoding")
    if any(entry.flag_bits & 1 for entry in archive.infolist()):
        raise encrypted(path)
    entries = [entry for entry in archive.infolist() if entry.filename and not entry.is_dir()]
    return [File(entry.filename, (entry.file_size, entry.CRC), partial(archive.open, entry)) for entry in entries]


def read_tar(path):
    """Return the plain Files of a tar; links are left out."""

    def open_part(offset, size):
        with path.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    with tarfile.open(path, "r:") as tar:
        files = [file for file in tar if file.isreg() and not file.issparse()]
    parts = [(file.name.removeprefix("./"), file.offset_data, file.size) for file in files]
    return [File(name, (size,), partial(open_part, offset, size)) for name, offset, size in parts]


def damaged(path, kind, error):
    """Return the UserError about an archive that can't be read."""
    return UserError(f"{path} is no {kind}, or a damaged one ({error}): download it again")


def encrypted(path):
    """Return the UserError about an encrypted archive."""
    return UserError(f"{path} is encrypted: unpack it with its password into {path.with_suffix('')}")


def unpack(path, unpacked):
    """Unpack an archive into a folder of its own below `unpacked`, unless that was done and the archive is unchanged.
    → its Files, or those of the tar or zip that is the only file in it (train.tar.7z). Raises UserError."""
    if unpacked is None:
        raise UserError(f"{path} can't be read in place: unpack it, and name the folder")
    made_from = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns)])
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # train/images.7z is not test/images.7z
    folder = unpacked / f"{path.name}.{digest}"
    note, new = folder / "made_from.txt", unpacked / f".new.{folder.name}"
    with locked(unpacked / f".{folder.name}.lock", folder, wait=True):
        if not (note.exists() and note.read_text() == made_from):
            say(f"unpacking {path} into {folder}, once")
            try:
                shutil.rmtree(new, ignore_errors=True)  # of a killed run
                (new / "files").mkdir(parents=True)
                (unpack_7z if path.suffix.lower() == ".7z" else unpack_tar_gz)(path, new / "files")
                (new / note.name).write_text(made_from)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(new, folder)
            except OSError as error:
                raise UserError(f"{path} can't be unpacked into {unpacked} ({error.strerror or error})") from error
            finally:
                shutil.rmtree(new, ignore_errors=True)
    files = open_archive(folder / "files")
    only = folder / "files" / files[0].name if len(files) == 1 else folder
    return open_archive(only) if only.suffix.lower() in (".tar", ".zip") else files


def check_free_space(path, folder, size):
    """Raise UserError where `size` more bytes don't fit on the disk."""
    free = shutil.disk_usage(folder).free - RESERVE
    if size > free:
        raise UserError(f"{path} unpacks to more than the {max(free, 0) / 2**30:.1f} GiB that are free: see --output")


def unpack_tar_gz(path, folder):
    """Unpack the plain files of a .tar.gz; links and devices are left out."""
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in filter(tarfile.TarInfo.isreg, tar):
                check_free_space(path, folder, member.size)
                tar.extract(member, folder, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"{path} isn't safe to unpack ({error}): take it from its source") from None
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        raise damaged(path, "packed tar", error) from None


def unpack_7z(path, folder):
    """Unpack the plain files of a .7z; links are left out."""
    try:
        import py7zr
    except ImportError:
        raise UserError(f"{path} needs py7zr: pip install py7zr") from None
    try:
        with py7zr.SevenZipFile(path) as archive:
            check_free_space(path, folder, sum(member.uncompressed for member in archive.files))
            files = [member.filename for member in archive.files if not member.is_directory]
            plain = [member.filename for member in archive.files if member.is_file]
            # A list of names is looked through for each file: only where there are links to leave out.
            archive.extract(folder, targets=plain if len(plain) < len(files) else None)
    except (UserError, OSError):
        raise
    except py7zr.exceptions.PasswordRequired:
        raise encrypted(path) from None
    except Exception as error:  # whatever damaged bytes and names that lead out of the folder make of py7zr
        raise damaged(path, "7z archive", error) from None
