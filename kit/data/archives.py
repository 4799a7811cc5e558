"""Where a part's files lie: a folder, a zip, a tar, or an archive that is unpacked once. All give names and bytes."""

import bisect
import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import shutil
import tarfile
import threading
import zipfile

from common import UserError, say
from kit.locks import locked

# Of these no single file can be read without all before it.
PACKED = (".7z", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
STREAMS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by the first two bytes
PART = re.compile(r"\.\d{3}$")  # of train.zip.001
SPARE = 2**28  # bytes that unpacking leaves free on the disk


def open_place(path, unpacked=None):
    """→ the Folder, Zip or Tar at `path`. `train.zip.001`, or `train.zip` that isn't there, stands for all its parts.

    A .7z or a packed tar is unpacked below the folder `unpacked`, once. Raises UserError where it's None, and for
    archives that are damaged, encrypted, or larger than the free space."""
    name = PART.sub("", path.name).lower()
    if path.is_dir():
        return Folder(path)
    if name.endswith(PACKED):
        return unpack(path, unpacked)
    return Tar(path) if name.endswith(".tar") else Zip(path)


class Folder:
    """`entries`: {path: (name, size)} of all files, at any depth."""

    def __init__(self, path):
        self.path, paths = path, [file for file in sorted(path.rglob("*")) if file.is_file()]
        self.entries = {file: (file.relative_to(path).as_posix(), file.stat().st_size) for file in paths}

    def file(self, entry):
        """→ the path of a file. Raises ValueError where a link leads out of the folder."""
        if entry.is_symlink() and not entry.resolve().is_relative_to(self.path.resolve()):
            raise ValueError("a link that leads out of the folder")
        return entry

    def read(self, entry):
        """→ its bytes. Raises OSError, and ValueError for a link that leads out of the folder."""
        return self.file(entry).read_bytes()


class Zip:
    """`entries`: {ZipInfo: (name, size, CRC)} of all files."""

    def __init__(self, path):
        self.zip = open_zip(path)
        entries = [entry for entry in self.zip.infolist() if entry.filename and not entry.is_dir()]
        self.entries = {entry: (entry.filename, entry.file_size, entry.CRC) for entry in entries}

    def read(self, entry):
        """→ its bytes. Raises OSError, and ValueError where they're damaged or packed in an unknown way."""
        try:
            return self.zip.read(entry)
        except (zipfile.BadZipFile, zipfile.zlib.error, NotImplementedError, EOFError) as error:
            raise ValueError(str(error)) from None


class Tar:
    """`entries`: {(its place, size): (name, size)} of all plain files. Links are left out."""

    def __init__(self, path):
        with damaged(path, "tar archive"):
            self.opened, self.lock = open_parts(path), threading.Lock()
            with tarfile.open(fileobj=self.opened, mode="r:") as tar:
                files = [file for file in tar if file.isreg() and not file.issparse()]
        self.entries = {(file.offset_data, file.size): (file.name.removeprefix("./"), file.size) for file in files}

    def __del__(self):
        with contextlib.suppress(AttributeError):  # it couldn't be opened
            self.opened.close()

    def read(self, entry):
        """→ its bytes. Raises OSError."""
        with self.lock:  # threads share the place in the file
            self.opened.seek(entry[0])
            return self.opened.read(entry[1])


def open_zip(path, encodings=("utf-8", "cp932", "cp437")):
    """Opens a zip. Names without the UTF-8 mark are UTF-8 all the same (macOS), cp932 (Windows in Japan) or cp437."""
    if path.with_suffix(".z01").exists():
        raise UserError(f"{path} is one of several parts: join them, zip -s 0 {path.name} --out joined.zip")
    try:
        whole = path if parts(path) == [path] else open_parts(path)
        archive = zipfile.ZipFile(whole, metadata_encoding=encodings[0])
    except (zipfile.BadZipFile, NotImplementedError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError) and encodings[1:]:
            return open_zip(path, encodings[1:])
        raise UserError(f"{path} is no zip archive, or a damaged one ({error}): download it again") from None
    if any(entry.flag_bits & 1 for entry in archive.infolist()):
        raise encrypted(path)
    return archive


def encrypted(path):
    folder = path.with_suffix("")
    return UserError(f"{path} is encrypted: unpack it with its password into {folder}")


@contextlib.contextmanager
def damaged(path, kind):
    """Turns what damaged bytes make of the readers in the block into a UserError. An error of the disk goes on."""
    try:
        yield
    except (tarfile.TarError, EOFError, lzma.LZMAError, zipfile.zlib.error, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{path} is no {kind}, or a damaged one ({error}): download it again") from None


def parts(path):
    """→ the files that make up an archive: itself, or train.zip.001, train.zip.002, … Raises UserError for a gap."""
    if not PART.search(path.name) and (path.exists() or not path.with_name(path.name + ".001").exists()):
        return [path]
    whole = PART.sub("", path.name)
    there = sorted(file for file in path.parent.iterdir() if PART.search(file.name) and file.stem == whole)
    for number, file in enumerate(there, 1):
        if file.suffix != f".{number:03}":
            raise UserError(f"{path.with_name(f'{whole}.{number:03}')} is missing: download all parts of {whole}")
    return there or [path]


def open_parts(path):
    """→ an archive, or its parts as if they were one file, opened for reading bytes."""
    files = parts(path)
    try:
        return open(path, "rb") if files == [path] else io.BufferedReader(_Parts(files), 2**16)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): mend that or download it again") from None


class _Parts(io.RawIOBase):
    """Several files read as one."""

    def __init__(self, paths):
        self.files, self.at = [path.open("rb", buffering=0) for path in paths], 0
        self.starts = [0, *itertools.accumulate(path.stat().st_size for path in paths)]

    def close(self):
        for file in self.files:
            file.close()
        super().close()

    def readable(self):
        return True

    seekable = readable

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.starts[-1]}[whence]
        if self.at < 0:
            raise OSError(f"negative place {self.at}")
        return self.at

    def readinto(self, buffer):
        if self.at >= self.starts[-1]:
            return 0
        part = bisect.bisect_right(self.starts, self.at) - 1
        self.files[part].seek(self.at - self.starts[part])
        count = self.files[part].readinto(buffer)
        self.at += count
        return count


def unpack(path, unpacked):
    """Unpacks an archive into a folder of its own below `unpacked`, unless it's there and the archive is as it was.
    → its Folder, or the Tar or Zip that is the only file in it (train.tar.7z). Raises UserError."""
    if unpacked is None:
        raise UserError(f"{path} can't be read in place: unpack it, and name the folder")
    made_from = repr([(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in existing(path)])
    which = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # train/images.7z is not test/images.7z
    folder = unpacked / f"{path.name}.{which}"
    note, new = folder / "made_from.txt", unpacked / f".new.{folder.name}"
    with locked(unpacked / f".{folder.name}.lock", folder, wait=True):
        if not (note.exists() and note.read_text() == made_from):
            say(f"unpacking {path} into {folder}, once")
            try:
                shutil.rmtree(new, ignore_errors=True)  # of a killed run
                (new / "files").mkdir(parents=True)
                (unpack_7z if PART.sub("", path.name).lower().endswith(".7z") else unpack_tar)(path, new / "files")
                (new / note.name).write_text(made_from)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(new, folder)
            except OSError as error:
                raise UserError(f"{path} can't be unpacked into {unpacked} ({error.strerror or error})") from error
            finally:
                shutil.rmtree(new, ignore_errors=True)
    place = Folder(folder / "files")
    only = next(iter(place.entries)) if len(place.entries) == 1 else folder
    return open_place(only) if only.suffix.lower() in (".tar", ".zip") else place


def existing(path):
    if missing := [part for part in parts(path) if not part.exists()]:
        raise UserError(f"{missing[0]} is missing: download it")
    return parts(path)


def check_room(path, folder, size):
    """Raises UserError where `size` more bytes don't fit on the disk."""
    free = shutil.disk_usage(folder).free - SPARE
    if size > free:
        raise UserError(f"{path} unpacks to more than the {max(free, 0) / 2**30:.1f} GiB that are free: see --output")


def unpack_tar(path, folder):
    """Unpacks the plain files of a packed tar; links and devices are left out."""
    with damaged(path, "packed tar"), open_parts(path) as file:
        magic = file.read(2)
        file.seek(0)
        with STREAMS.get(magic, gzip.open)(file) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if member.isreg():
                    check_room(path, folder, member.size)
                    try:
                        tar.extract(member, folder, filter="data")
                    except tarfile.FilterError as error:
                        raise UserError(f"{path} isn't safe to unpack ({error}): take it from its source") from None


def unpack_7z(path, folder):
    """Unpacks the plain files of a 7z; links are left out."""
    try:
        import py7zr
    except ImportError:
        raise UserError(f"{path} needs py7zr: pip install py7zr") from None
    try:
        with open_parts(path) as file, py7zr.SevenZipFile(file) as archive:
            if archive.needs_password():
                raise encrypted(path)
            check_room(path, folder, sum(member.uncompressed for member in archive.files))
            files = [member.filename for member in archive.files if not member.is_directory]
            plain = [member.filename for member in archive.files if member.is_file]
            # A list of names is looked through for each file: only where there are links to leave out.
            archive.extract(folder, targets=plain if len(plain) < len(files) else None)
    except (UserError, OSError):
        raise
    except py7zr.exceptions.PasswordRequired:
        raise encrypted(path) from None
    except Exception as error:  # whatever damaged bytes and names that lead out of the folder make of py7zr
        raise UserError(f"{path} is no 7z archive, or a damaged one ({error}): download it again") from None
