"""Archives: folders, zip and tar files read in place; 7z and tar.gz files unpacked once. All are lists of Files."""

import contextlib
import difflib
import gzip
import hashlib
import io
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common import UserError, listing, say

from kit.locks import locked

PACKED = (".7z", ".tar.gz", ".tgz")  # to read a file in them, all before it must be unpacked
BZ2_OR_XZ = (".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
DAMAGED = tarfile.TarError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, OSError
UNZIPPED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}  # methods
UNZIPPED |= {getattr(zipfile, "ZIP_ZSTANDARD", zipfile.ZIP_STORED)}  # since Python 3.14
LITTER = "__macosx", ".ds_store", "@eadir", "thumbs.db", "desktop.ini"  # in lower case
A_TABLE = re.compile(r"\.(csv|tsv|txt|json|xlsx?|parquet)\b", re.IGNORECASE)
ALIKE = 0.6  # difflib's least ratio at which a name is proposed
RESERVE = 2**28  # bytes that unpacking leaves free on the disk


class File(NamedTuple):
    """A file in a folder or an archive."""

    name: str  # with the folders in which it is there
    content: tuple[int, ...]  # its size and, in a zip, its CRC; nothing where it can't be read, as a dead link
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
        try:
            return [*read_folder(path)]
        except OSError as error:
            raise UserError(f"{error.filename} can't be read ({error.strerror}): see its permissions") from None
    if re.search(r"\.\d{3}$", name):
        raise UserError(f"{path} is one of several parts: join them, cat {joined}.* > {joined}")
    if name.endswith(BZ2_OR_XZ):
        raise UserError(f"{path} is packed by bz2 or xz: unpack it, tar -xf {path}, and name the folder")
    if name.endswith(PACKED):
        return unpack(path, unpacked)
    if not (name.endswith((".tar", ".zip")) or zipfile.is_zipfile(path)):
        raise UserError(f"{path} is no zip, tar, tar.gz or 7z: unpack it, and name the folder")
    kind, read = ("tar archive", read_tar) if name.endswith(".tar") else ("zip archive", read_zip)
    try:
        return read(path)
    except DAMAGED as error:
        raise damaged(path, kind, error) from None


def nearby(folder, wanted):
    """Return what is in the folder, and which of it may be meant: "there are: Train_Images, test1 (Train_Images?)". The
    likeliest come first: tables for a table, by their names without case, endings, _ and -."""

    def likeness(name):
        one, other = (re.sub(r"[_\W]", "", text.partition(".")[0].lower()) for text in (wanted, name))
        is_same_kind = bool(A_TABLE.search(wanted)) == bool(A_TABLE.search(name))
        return is_same_kind and difflib.SequenceMatcher(None, one, other).ratio()

    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if not (name.startswith(".") or is_litter(name))]
    names.sort(key=likeness, reverse=True)
    meant = [f" ({name}?)" for name in names[:1] if likeness(name) >= ALIKE]
    return f"there are: {listing(names)}{''.join(meant)}" if names else f"{folder} is empty or missing"


def is_litter(name):
    """Return whether a file or folder of this name is what an operating system leaves behind."""
    return name.startswith("._") or name.lower() in LITTER


def read_folder(path, name="", above=()):
    """Yield the Files of a folder, in order; dead links without content. Other links are followed, also out of the
    folder, but not to folders that are read anyway or hold this one: these would be loops, or give a file two names.
    name: of the folder in the first one, with a slash; above: the real paths of the folders above. Raises OSError."""
    above = (*above, Path(os.path.realpath(path)))
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        real = Path(os.path.realpath(entry)) if entry.is_symlink() else entry
        again = real is not entry and any(real.is_relative_to(at) or at.is_relative_to(real) for at in above)
        if real.is_dir() and not again:
            yield from read_folder(entry.path, f"{name}{entry.name}/", above)
        elif real.is_file() or real is not entry:
            content = (real.stat().st_size,) if real.is_file() else ()
            yield File(name + entry.name, content, partial(open, entry.path, "rb"), True)


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
    if unknown := {entry.compress_type for entry in entries} - UNZIPPED:
        raise unknown_packing(path, f"method {min(unknown)}")
    contents = [() if stat.S_ISLNK(entry.external_attr >> 16) else (entry.file_size, entry.CRC) for entry in entries]
    opened = zip(entries, contents, strict=True)
    return [File(entry.filename, content, partial(archive.open, entry)) for entry, content in opened]


def read_tar(path):
    """Return the Files of a tar; links and sparse files without content."""

    def open_part(offset, size):
        with path.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    with tarfile.open(path, "r:") as tar:
        files = [file for file in tar if not file.isdir()]
    names = [file.name.removeprefix("./") for file in files]
    contents = [(file.size,) if file.isreg() and not file.issparse() else () for file in files]
    return [*map(File, names, contents, (partial(open_part, file.offset_data, file.size) for file in files))]


def damaged(path, kind, error):
    """Return the UserError about an archive that can't be read."""
    return UserError(f"{path} is no {kind}, or a damaged one ({error}): download it again")


def encrypted(path):
    """Return the UserError about an encrypted archive."""
    return UserError(f"{path} is encrypted: unpack it with its password into {path.with_suffix('')}")


def unknown_packing(path, packing):
    """Return the UserError about an archive that is packed in an unknown way, such as "method 9"."""
    folder = path.with_suffix("")
    return UserError(f"{path}: its packing ({packing}) isn't known here: unpack it into {folder} (7z, Explorer)")


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
    except py7zr.exceptions.UnsupportedCompressionMethodError as error:
        raise unknown_packing(path, error.args[-1]) from None
    except Exception as error:  # whatever damaged bytes and names that lead out of the folder make of py7zr
        raise damaged(path, "7z archive", error) from None
